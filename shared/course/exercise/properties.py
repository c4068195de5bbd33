"""Week 0. Says in what way an answer is wrong, without knowing the mistake: rows do not sum to one, off by a
factor, shifted, transposed, the future leaks, an argument is not used.

Each property is a law that the reference keeps and the answer breaks, or a relation between the two results.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.course.exercise.comparison import same


@dataclass(frozen=True)
class Failure:
    """A case that an answer fails: what it was given, what it returned, and what is right."""

    arguments: tuple
    yours: Any
    expected: Any


@dataclass(frozen=True)
class Evidence:
    """What the grader has seen of a wrong answer."""

    parameters: Sequence[str]
    failures: Sequence[Failure]
    """At least one."""
    cases: Sequence[tuple]
    """The arguments of all cases."""
    answer: Callable[[tuple], Any]
    """Runs the answer on a copy of a case's arguments; may raise anything."""
    reference: Callable[[tuple], Any]
    tolerance: float


def property_of(evidence: Evidence) -> str | None:
    """What is wrong, in a sentence; None where no property is recognised."""
    swapped = _parts_in_another_order(evidence)
    if swapped:
        return swapped
    narrowed = _narrowed(evidence)
    for recognise in RECOGNISED:
        with np.errstate(all="ignore"):
            sentence = recognise(narrowed)
        if sentence:
            return sentence
    return None


def _parts_in_another_order(evidence: Evidence) -> str | None:
    """A tuple or list of results whose parts are the right ones, exchanged."""
    for failure in evidence.failures:
        yours, expected = failure.yours, failure.expected
        if not (isinstance(yours, list | tuple) and isinstance(expected, list | tuple)):
            return None
        if len(yours) != len(expected) or len(expected) > 8 or not any(map(_is_array, expected)):
            return None
        left = list(yours)
        for part in expected:
            at = next((i for i, own in enumerate(left) if same(own, part, evidence.tolerance)), None)
            if at is None:
                return None
            left.pop(at)
    return "The parts of the result are right, but in another order than the task names them."


def _narrowed(evidence: Evidence, depth: int = 0) -> Evidence:
    """The evidence on the first part of a tuple, list or dict that differs, where there is one such part."""
    first = evidence.failures[0]
    key = _differing_part(first.yours, first.expected, evidence.tolerance)
    if key is None or depth == 3:
        return evidence

    def part(value: Any) -> Any:
        return value[key]

    failures = []
    for failure in evidence.failures:
        try:
            yours, expected = part(failure.yours), part(failure.expected)
        except (KeyError, IndexError, TypeError):
            continue
        if not same(yours, expected, evidence.tolerance):
            failures.append(Failure(failure.arguments, yours, expected))
    answer, reference = evidence.answer, evidence.reference
    narrowed = replace(
        evidence,
        failures=failures,
        answer=lambda arguments: part(answer(arguments)),
        reference=lambda arguments: part(reference(arguments)),
    )
    return _narrowed(narrowed, depth + 1)


def _differing_part(yours: Any, expected: Any, tolerance: float) -> Any:
    """The key or the index of the first part that differs; None where the whole does."""
    if isinstance(expected, dict) and isinstance(yours, dict) and expected.keys() == yours.keys():
        return next((k for k in expected if not same(yours[k], expected[k], tolerance)), None)
    nested = isinstance(expected, list | tuple) and isinstance(yours, list | tuple)
    is_record = isinstance(expected, tuple) or any(map(_is_array, expected)) if nested else False
    if not is_record or len(expected) != len(yours):
        return None
    return next((i for i, part in enumerate(expected) if not same(yours[i], part, tolerance)), None)


# ---- values as arrays


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def array_of(value: Any) -> np.ndarray | None:
    """A number, a tensor, or a list of numbers, as float64; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().double().numpy()
    if isinstance(value, bool | str | bytes) or value is None:
        return None
    if isinstance(value, int | float | np.ndarray | list | tuple):
        try:
            array = np.asarray(value)
        except ValueError:  # lists of different lengths
            return None
        return array.astype(np.float64) if array.dtype.kind in "iuf" and array.size else None
    return None


Pair = tuple[np.ndarray, np.ndarray]


def _pairs(evidence: Evidence) -> list[Pair] | None:
    """The results of all failures as arrays of one shape each, yours first; None where they are not."""
    pairs = []
    for failure in evidence.failures:
        yours, expected = array_of(failure.yours), array_of(failure.expected)
        if yours is None or expected is None or yours.shape != expected.shape:
            return None
        pairs.append((yours, expected))
    return pairs


def _close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _holds(pairs: list[Pair], relation: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether a change of the right result makes yours, in all failures, and changes one of them."""
    changed = [(yours, relation(expected)) for yours, expected in pairs]
    return all(_close(yours, made) for yours, made in changed)


# ---- laws that the reference keeps


def _different_each_time(evidence: Evidence) -> str | None:
    arguments = evidence.failures[0].arguments
    once, again = _run(evidence.answer, arguments), _run(evidence.answer, arguments)
    if same(once, again, evidence.tolerance) or not _repeats(
        evidence.reference, arguments, evidence.tolerance
    ):
        return None
    return (
        "It gives another result each time for the same input. Whatever is random has to come from what the"
        " function is given (a generator, a seed), so that a run can be repeated."
    )


def _repeats(function: Callable[[tuple], Any], arguments: tuple, tolerance: float) -> bool:
    return same(_run(function, arguments), _run(function, arguments), tolerance)


_CRASHED = object()


def _run(function: Callable[[tuple], Any], arguments: tuple) -> Any:
    try:
        return function(copy.deepcopy(arguments))
    except Exception:
        return _CRASHED


def _unused_argument(evidence: Evidence) -> str | None:
    """Another value of an argument makes a difference to the reference, and none to the answer."""
    for at, name in enumerate(evidence.parameters):
        matters = 0
        for arguments in evidence.cases:
            for other in _other_values(evidence, at, arguments[at]):
                changed = (*arguments[:at], other, *arguments[at + 1 :])
                right = _run(evidence.reference, changed)
                if right is _CRASHED or same(right, _run(evidence.reference, arguments), evidence.tolerance):
                    continue
                yours = _run(evidence.answer, changed)
                if yours is _CRASHED or not same(yours, _run(evidence.answer, arguments), evidence.tolerance):
                    matters = -1000
                else:
                    matters += 1
        if matters > 0:
            return f"The argument `{name}` makes no difference to your result, and it should: is it used?"
    return None


def _other_values(evidence: Evidence, at: int, value: Any) -> Iterator[Any]:
    """Values that an argument might as well have: another case's, or nearly the same."""
    others = [case[at] for case in evidence.cases if not same(case[at], value, 0)]
    if not _is_array(value):
        yield from others[:2]
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value + torch.linspace(0.5, 1.5, value.numel()).view(value.shape).to(value.dtype)
    elif _is_array(value):
        yield from [other for other in others if other.shape == value.shape][:2]


def _does_not_sum_to_one(evidence: Evidence) -> str | None:
    pairs = _pairs(evidence)
    if pairs is None:
        return None
    dimensions = min(expected.ndim for _, expected in pairs)
    for back in range(1, dimensions + 1):
        if not all(expected.shape[-back] > 1 and _sums(expected, -back) for _, expected in pairs):
            continue
        wrong = [yours for yours, _ in pairs if not _sums(yours, -back)]
        if not wrong:
            return None
        sums = wrong[0].sum(axis=-back)
        worst = sums.flat[int(np.abs(sums - 1).argmax())]
        text = (
            f"The values should sum to 1 along the {_dimension(back, dimensions)}; yours sum to {worst:.4g}"
        )
        for other in range(1, dimensions + 1):
            if other != back and all(_sums(yours, -other) for yours, _ in pairs):
                return (
                    f"{text}. They do along the {_dimension(other, dimensions)}: the sum was taken over the"
                    " wrong dimension, or it lost its dimension (keepdim=True)."
                )
        if all(abs(yours.sum() - 1) < 1e-4 for yours, _ in pairs):
            return f"{text}. All of them together do: each row has to be divided by its own sum."
        return f"{text}."
    return None


def _sums(values: np.ndarray, axis: int) -> bool:
    return bool(np.allclose(values.sum(axis=axis), 1, atol=1e-4)) and bool((values >= 0).all())


def _dimension(back: int, dimensions: int) -> str:
    if dimensions == 2:
        return {1: "rows (dimension 1)", 2: "columns (dimension 0)"}[back]
    return "last dimension" if back == 1 else f"dimension {-back}"


def _future_leaks(evidence: Evidence) -> str | None:
    """A later part of an input changes an earlier part of the result, where the reference's stays."""
    for at, name in enumerate(evidence.parameters):
        for arguments in evidence.cases:
            sentence = _leak(evidence, arguments, at, name)
            if sentence:
                return sentence
    return None


def _leak(evidence: Evidence, arguments: tuple, at: int, name: str) -> str | None:
    value = arguments[at]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    for dimension, length in enumerate(value.shape):
        if length < 3:
            continue
        last, first = _changed_at(value, dimension, length - 1), _changed_at(value, dimension, 0)
        right, yours = (
            _before_and_after(function, arguments, at, last)
            for function in (evidence.reference, evidence.answer)
        )
        from_first = _before_and_after(evidence.reference, arguments, at, first)
        if right is None or yours is None or from_first is None or yours[0].shape != right[0].shape:
            continue
        for out in (d for d in range(right[0].ndim) if right[0].shape[d] == length):
            moves = _moved(yours, out)
            reaches_back = _moved(right, out)[:-1].any() or not _moved(right, out)[-1]
            if reaches_back or not moves[:-1].any():
                continue
            place = (
                f"with another value at position {length - 1} of `{name}`, your result changes at position"
            )
            if _moved(from_first, out)[-1]:
                return (
                    f"The future leaks: {place} {int(moves.argmax())} already. A position may depend on"
                    " itself and the ones before it, and on nothing later."
                )
            return (
                f"Positions are mixed that have nothing to do with each other: {place} {int(moves.argmax())},"
                f" too (dimension {dimension} of `{name}`, dimension {out} of the result)."
            )
    return None


def _changed_at(value: Tensor, dimension: int, place: int) -> Tensor:
    changed = value.clone()
    changed.select(dimension, place).add_(1.0).mul_(-1.7)
    return changed


def _before_and_after(
    function: Callable[[tuple], Any], arguments: tuple, at: int, changed: Any
) -> Pair | None:
    before = array_of(_run(function, arguments))
    after = array_of(_run(function, (*arguments[:at], changed, *arguments[at + 1 :])))
    if before is None or after is None or before.shape != after.shape:
        return None
    return before, after


def _moved(results: Pair, dimension: int) -> np.ndarray:
    """Bool [size of the dimension]: where two results differ."""
    before, after = results
    moved = ~np.isclose(before, after, rtol=1e-5, atol=1e-6, equal_nan=True)
    return np.asarray(moved.any(axis=tuple(i for i in range(before.ndim) if i != dimension)))


def _depends_on_the_batch(evidence: Evidence) -> str | None:
    """The last row alone gives what it gives among others: so it is for the reference."""
    for arguments in evidence.cases:
        sizes = [value.shape[0] for value in arguments if _is_array(value) and value.ndim > 1]
        if not sizes or len(set(sizes)) > 1 or sizes[0] < 2:
            continue
        alone = tuple(value[-1:] if _is_array(value) and value.ndim > 1 else value for value in arguments)
        rows = []
        for function in (evidence.reference, evidence.answer):
            among, single = array_of(_run(function, arguments)), array_of(_run(function, alone))
            if among is None or single is None or among.ndim == 0 or among.shape[0] != sizes[0]:
                break
            rows.append(among[-1:].shape == single.shape and _close(among[-1:], single))
        if rows == [True, False]:
            return (
                "The last row gives another result alone than among other rows. Rows of a batch have nothing"
                " to do with each other: check along which dimension you cut, sum, average or take a softmax."
            )
    return None


def _right_in_double(evidence: Evidence) -> str | None:
    """In float64 the answer agrees with the reference."""
    for failure in evidence.failures:
        floats = [v for v in failure.arguments if isinstance(v, Tensor) and v.dtype == torch.float32]
        if not floats:
            return None
        arguments = tuple(
            value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
            for value in failure.arguments
        )
        yours, right = (
            array_of(_run(evidence.answer, arguments)),
            array_of(_run(evidence.reference, arguments)),
        )
        if yours is None or right is None or not _close(yours, right, 1e-6):
            return None
    return (
        "The formula is right, but not in float32: with the same inputs in float64 your result agrees. A"
        " number became too large, too small, or lost its last digits on the way; exp of large numbers and"
        " the logarithm of tiny ones are the usual places."
    )


# ---- relations between the results


def _sign(evidence: Evidence) -> str | None:
    pairs = _pairs(evidence)
    if pairs and _holds(pairs, lambda expected: -expected):
        return "The values are right but for the sign: all of it is turned round."
    return None


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "It is e to the power of the right result: a logarithm is missing.": np.exp,
    "It is the natural logarithm of the right result: an exp is missing, or a log too many.": np.log,
    "It is minus the logarithm of the right result.": lambda x: -np.log(x),
    "It is the square of the right result: a square root is missing.": np.square,
    "It is the square root of the right result.": np.sqrt,
    "It is 1 divided by the right result: the fraction is upside down.": lambda x: 1 / x,
    "It is 1 minus the right result: the two cases are exchanged.": lambda x: 1 - x,
    "It is the softmax of the right result: one softmax too many.": lambda x: _softmax(x),
}


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True)) if x.ndim else np.ones_like(x)
    return powers / powers.sum(axis=-1, keepdims=True) if x.ndim else powers


def _function_of_right(evidence: Evidence) -> str | None:
    pairs = _pairs(evidence)
    if not pairs:
        return None
    for sentence, function in FUNCTIONS.items():
        if _holds(pairs, function):
            return sentence
    return None


def _inverted(evidence: Evidence) -> str | None:
    """A mask or a truth value the wrong way round."""
    for failure in evidence.failures:
        yours, expected = failure.yours, failure.expected
        if isinstance(expected, bool):
            if yours is expected or not isinstance(yours, bool):
                return None
        elif not (
            _is_array(expected)
            and _is_array(yours)
            and expected.dtype in (torch.bool, np.dtype(bool))
            and yours.dtype == expected.dtype
            and yours.shape == expected.shape
            and bool((yours != expected).all())
        ):
            return None
    return "True and False are exchanged, everywhere."


def _more_or_fewer_true(evidence: Evidence) -> str | None:
    """A mask that is True in too many places, or in too few."""
    signs = set()
    for failure in evidence.failures:
        yours, expected = failure.yours, failure.expected
        masks = all(
            _is_array(value) and value.dtype in (torch.bool, np.dtype(bool)) for value in (yours, expected)
        )
        if not masks or yours.shape != expected.shape:
            return None
        more, fewer = bool((yours & ~expected).any()), bool((~yours & expected).any())
        signs.add((more, fewer))
    if signs == {(True, False)}:
        return "Your mask is True in all the right places, and in some where it should be False."
    if signs == {(False, True)}:
        return "Your mask is never True in a wrong place, and it misses some where it should be."
    return None


def _factor(evidence: Evidence) -> str | None:
    """Too large or too small by one factor in each case."""
    pairs = _pairs(evidence)
    if not pairs:
        return None
    factors = []
    for yours, expected in pairs:
        used = np.abs(expected) > 1e-6
        if not used.any() or not np.isfinite(yours).all():
            return None
        ratio = yours[used] / expected[used]
        if not np.allclose(ratio, ratio.flat[0], rtol=2e-3) or abs(ratio.flat[0]) < 1e-9:
            return None
        if not _close(yours, expected * ratio.flat[0], 2e-3):
            return None
        factors.append(float(ratio.flat[0]))
    known = _known_quantity(evidence, factors)
    if known:
        return f"The values are too large by a factor: {known}. (In the first such case, {factors[0]:.4g}.)"
    turned = _known_quantity(evidence, [1 / factor for factor in factors])
    if turned:
        return f"The values are too small by a factor: {turned}. (Yours are {factors[0]:.4g} of the right.)"
    if len(factors) > 1 and np.allclose(factors, factors[0], rtol=2e-3):
        return f"The values are off by a constant factor: yours are {factors[0]:.5g} times the right ones."
    if len(factors) > 1 and pairs[0][1].size > 1:
        shown = " and ".join(f"{factor:.4g}" for factor in factors[:2])
        return (
            f"The values are off by one factor for the whole result, and another one in each case: {shown}"
            " times the right ones in the first two. What is it that you divide or multiply by?"
        )
    return None


def _factor_by_place(evidence: Evidence) -> str | None:
    """Off by a factor that is another one at each place of one dimension, and the same everywhere else."""
    pairs = _pairs(evidence)
    if not pairs:
        return None
    dimensions = min(expected.ndim for _, expected in pairs)
    for axis in range(dimensions):
        found = [_factors_along(yours, expected, axis) for yours, expected in pairs]
        if dimensions > 1 and all(factors is not None for factors in found):
            longest = max((factors for factors in found if factors is not None), key=len)
            if len(longest) > 2:
                shown = ", ".join(f"{factor:.4g}" for factor in longest[:5])
                return (
                    f"The values are off by a factor that depends on the place along dimension {axis}: yours"
                    f" are {shown}{', ...' if len(longest) > 5 else ''} times the right ones."
                )
    return None


def _factors_along(yours: np.ndarray, expected: np.ndarray, axis: int) -> np.ndarray | None:
    """The factor at each place of an axis, where each place has one."""
    others = tuple(i for i in range(expected.ndim) if i != axis)
    squares = (expected**2).sum(axis=others, keepdims=True)
    if not (squares > 1e-12).all() or not np.isfinite(yours).all():
        return None
    factors = (yours * expected).sum(axis=others, keepdims=True) / squares
    tells = bool((np.abs(factors - 1) > 0.02).any()) and expected.size > expected.shape[axis]
    return factors.reshape(-1) if tells and _close(yours, factors * expected, 1e-3) else None


def _offset(evidence: Evidence) -> str | None:
    """Too large or too small by the same amount everywhere."""
    pairs = _pairs(evidence)
    if not pairs:
        return None
    amounts = []
    for yours, expected in pairs:
        difference = yours - expected
        if not np.isfinite(difference).all() or not _close(
            difference, np.full_like(difference, difference.flat[0]), 1e-4
        ):
            return None
        amounts.append(float(difference.flat[0]))
    if len(amounts) < 2 and evidence.failures[0].yours.__class__ in (int, float):
        return None
    if np.allclose(amounts, amounts[0], rtol=1e-3):
        return f"The values are off by the same amount everywhere: yours are {amounts[0]:+.4g} too large."
    known = _known_quantity(evidence, amounts) or _known_quantity(evidence, [-amount for amount in amounts])
    if known:
        return f"The values are off by the same amount everywhere: by {known}."
    return None


def _sharper(evidence: Evidence) -> str | None:
    """A distribution as a softmax of other logits: those of the right one, times a factor."""
    pairs = _pairs(evidence)
    if not pairs or not all(_sums(expected, -1) and _sums(yours, -1) for yours, expected in pairs):
        return None
    slopes = []
    for yours, expected in pairs:
        used = (expected > 1e-9) & (yours > 1e-9)
        row = used.sum(axis=-1) > 1
        if not row.any():
            continue
        a, b = np.log(np.where(used, yours, 1)), np.log(np.where(used, expected, 1))
        count = np.maximum(used.sum(axis=-1, keepdims=True), 1)
        a = np.where(used, a - a.sum(axis=-1, keepdims=True) / count, 0)
        b = np.where(used, b - b.sum(axis=-1, keepdims=True) / count, 0)
        slope = float((a * b).sum() / max((b * b).sum(), 1e-12))
        if not np.allclose(a, slope * b, atol=2e-3) or abs(slope) < 1e-6:
            return None
        slopes.append(slope)
    if not slopes:
        return None
    known = _known_quantity(evidence, slopes)
    if known:
        return f"The distribution is too sharp, as if all logits (scores) were multiplied by {known}."
    known = _known_quantity(evidence, [1 / slope for slope in slopes])
    if known:
        return f"The distribution is too flat, as if all logits (scores) were divided by {known}."
    if np.allclose(slopes, slopes[0], rtol=1e-2):
        return f"It is as if all logits (scores) were multiplied by {slopes[0]:.4g} before the softmax."
    return None


def _known_quantity(evidence: Evidence, values: list[float]) -> str | None:
    """What these values are in their cases, such as the square root of the last size of `q`."""
    tables = [_quantities(evidence.parameters, failure) for failure in evidence.failures]
    if len(values) != len(tables):
        return None
    for words in tables[0]:
        found = [table.get(words) for table in tables]
        if all(q is not None and math.isclose(q, v, rel_tol=2e-3) for q, v in zip(found, values)):
            if not math.isclose(values[0], 1, rel_tol=2e-3) or len(values) > 1:
                return words
    return None


def _quantities(parameters: Sequence[str], failure: Failure) -> dict[str, float]:
    """Numbers that can be found in a case, by what they are."""
    plain: dict[str, float] = {}
    for name, value in zip(parameters, failure.arguments):
        plain |= _plain_quantities(name, value)
    if _is_array(failure.expected) and failure.expected.ndim:
        plain["the number of elements of the result"] = math.prod(failure.expected.shape)
    made = {"2": 2.0, "ln 2": math.log(2), "ln 10": math.log(10), "π": math.pi, **plain}
    for words, value in plain.items():
        made[f"1 less {words}"] = 1 - value
        if value > 0:
            made[f"the square root of {words}"] = math.sqrt(value)
            made[f"the square of {words}"] = value**2
            made[f"{words}, over one more"] = value / (value + 1)
        if value > 1:
            made[f"{words}, over one less"] = value / (value - 1)
            made[f"{words} less one"] = value - 1
    return made


def _plain_quantities(name: str, value: Any) -> dict[str, float]:
    """The sizes of an argument, or the number that it is."""
    if _is_array(value) and value.ndim:
        sizes = {f"the size -{back} of `{name}`": value.shape[-back] for back in range(2, value.ndim + 1)}
        elements = {f"the number of elements of `{name}`": math.prod(value.shape)}
        return {f"the last size of `{name}`": value.shape[-1], **sizes, **elements}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {f"`{name}`": value}
    if isinstance(value, list | tuple | str):
        return {f"the length of `{name}`": len(value)}
    return {}


def _rearranged(evidence: Evidence) -> str | None:
    """Transposed, turned round, or shifted by one place."""
    pairs = _pairs(evidence)
    if pairs is None:
        return _rearranged_lists(evidence)
    dimensions = {expected.ndim for _, expected in pairs}
    if len(dimensions) > 1 or dimensions == {0}:
        return None
    for axis in range(dimensions.pop()):
        sentence = _rearranged_along(pairs, axis)
        if sentence:
            return sentence
    in_order = [(np.sort(yours, axis=None), np.sort(expected, axis=None)) for yours, expected in pairs]
    if all(_close(yours, expected) for yours, expected in in_order):
        return "The values are the right ones, but in another order or in other places."
    return None


def _rearranged_along(pairs: list[Pair], axis: int) -> str | None:
    for other in range(axis + 1, pairs[0][0].ndim):
        if all(_close(yours, expected.swapaxes(axis, other)) for yours, expected in pairs):
            return f"The result is transposed: its dimensions {axis} and {other} are exchanged."
    if _holds(pairs, lambda expected: np.flip(expected, axis)):
        return f"The result is in the opposite order along dimension {axis}."
    for by, where in ((1, "later"), (-1, "earlier")):
        long_enough = any(expected.shape[axis] > 2 for _, expected in pairs)
        if long_enough and all(_is_shifted(yours, expected, axis, by) for yours, expected in pairs):
            return f"The result is shifted along dimension {axis}: each value stands one place {where}."
    return None


def _is_shifted(yours: np.ndarray, expected: np.ndarray, axis: int, by: int) -> bool:
    length = expected.shape[axis]
    if length < 3:  # too short to tell
        return True
    head, tail = slice(0, length - 1), slice(1, length)
    mine, right = (tail, head) if by == 1 else (head, tail)
    cut = (slice(None),) * axis
    return _close(yours[(*cut, mine)], expected[(*cut, right)])


def _rearranged_lists(evidence: Evidence) -> str | None:
    def each(relation: Callable[[Any, Any], bool]) -> bool:
        return all(relation(failure.yours, failure.expected) for failure in evidence.failures)

    if not each(lambda a, b: type(a) is type(b) and isinstance(b, list | tuple | str | bytes)):
        return None
    if each(lambda a, b: a == b[::-1]):
        return "The result is right, but in the opposite order."
    if each(lambda a, b: a[1:] == b or a[:-1] == b):
        end = "first" if each(lambda a, b: a[1:] == b) else "last"
        return f"There is one item too many: the {end} one should not be there."
    if each(lambda a, b: a == b[1:] or a == b[:-1]):
        end = "first" if each(lambda a, b: a == b[1:]) else "last"
        return f"One item is missing: the {end} one."
    if each(lambda a, b: b[: len(a)] == a):
        return "It stops too early: what is there is right, and the rest is missing."
    if each(lambda a, b: a[: len(b)] == b):
        return "It goes on too long: the right result, and more after it."
    if each(lambda a, b: len(a) == len(b) and sorted(map(repr, a)) == sorted(map(repr, b))):
        return "The items are the right ones, but in another order."
    return None


def _wrapped_round(evidence: Evidence) -> str | None:
    """Whole numbers that are off by a multiple of what their type can hold."""
    pairs = _pairs(evidence)
    if not pairs or any(isinstance(failure.expected, float) for failure in evidence.failures):
        return None
    differences = np.concatenate([(yours - expected).reshape(-1) for yours, expected in pairs])
    for bits in (32, 16, 8):
        if np.isfinite(differences).all() and not (differences % 2.0**bits).any():
            return (
                f"Numbers are off by a multiple of 2^{bits}: a type of {bits} bits has no room for them and"
                " starts anew. Turn the ids into int64 before you compute."
            )
    return None


def _off_by_one(evidence: Evidence) -> str | None:
    pairs = _pairs(evidence)
    if not pairs or any(isinstance(failure.expected, float) for failure in evidence.failures):
        return None
    whole = all(np.array_equal(expected, expected.round()) for _, expected in pairs)
    if whole and all(_close(yours, expected + 1) for yours, expected in pairs):
        return "It is one too many."
    if whole and all(_close(yours, expected - 1) for yours, expected in pairs):
        return "It is one too few."
    return None


def _only_at_the_edge(evidence: Evidence) -> str | None:
    """Right everywhere but in the first or the last place of a dimension."""
    pairs = _pairs(evidence)
    if not pairs:
        return None
    for axis in range(min(expected.ndim for _, expected in pairs)):
        for place, word in ((0, "first"), (-1, "last")):
            long = [(yours, expected) for yours, expected in pairs if expected.shape[axis] > 2]
            if long and all(_wrong_only_at(yours, expected, axis, place) for yours, expected in long):
                return f"It is right everywhere but at the {word} place of dimension {axis}."
    return None


def _wrong_only_at(yours: np.ndarray, expected: np.ndarray, axis: int, place: int) -> bool:
    inner = np.delete(np.arange(expected.shape[axis]), place)
    return _close(np.take(yours, inner, axis), np.take(expected, inner, axis))


def _nearly(evidence: Evidence) -> str | None:
    """Within a hundredth of the right values, all of them."""
    pairs = _pairs(evidence)
    if not pairs or any(np.array_equal(expected, expected.round()) for _, expected in pairs):
        return None
    largest = max(float(np.abs(yours - expected).max() / np.abs(expected).max()) for yours, expected in pairs)
    if not largest < 0.01:
        return None
    return (
        f"It is nearly right: the values are off by {largest:.1g} of the largest at most. That is no"
        " rounding: an approximation in place of the exact function, a constant with too few digits, or a"
        " small term (eps) in another place."
    )


def _entries(evidence: Evidence) -> str | None:
    """A dict with entries too many, or too few, or a set."""
    first = evidence.failures[0]
    yours, expected = first.yours, first.expected
    if not (isinstance(expected, dict | set) and type(yours) is type(expected)):
        return None
    more = [key for key in yours if key not in expected]
    fewer = [key for key in expected if key not in yours]
    if more:
        values = {repr(yours[key]) for key in more} if isinstance(yours, dict) else set()
        value = f" (with the value {values.pop()})" if len(values) == 1 else ""
        return f"It has {len(more)} entries that should not be there, such as {more[0]!r}{value}."
    if fewer:
        return f"{len(fewer)} entries are missing, such as {fewer[0]!r}."
    if isinstance(expected, dict) and isinstance(yours, dict):
        off = next(key for key in expected if not same(yours[key], expected[key], evidence.tolerance))
        return f"The keys are right; the value of {off!r} is {yours[off]!r} and should be {expected[off]!r}."
    return None


def _always_the_same(evidence: Evidence) -> str | None:
    """One value in all places and cases, where the right ones differ."""
    pairs = _pairs(evidence)
    if not pairs or len(evidence.cases) < 2:
        return None
    values = np.concatenate([yours.reshape(-1) for yours, _ in pairs])
    right = np.concatenate([expected.reshape(-1) for _, expected in pairs])
    if len(values) > 1 and np.allclose(values, values[0]) and not np.allclose(right, right[0]):
        return f"Every value of your result is {values[0]:.4g}, whatever the input."
    return None


RECOGNISED: tuple[Callable[[Evidence], str | None], ...] = (
    _different_each_time,
    _always_the_same,
    _inverted,
    _right_in_double,
    _future_leaks,
    _rearranged,
    _does_not_sum_to_one,
    _unused_argument,
    _sign,
    _function_of_right,
    _factor,
    _factor_by_place,
    _more_or_fewer_true,
    _wrapped_round,
    _off_by_one,
    _offset,
    _sharper,
    _depends_on_the_batch,
    _nearly,
    _entries,
    _only_at_the_edge,
)
"""In this order: the first that holds is told."""
