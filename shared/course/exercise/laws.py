"""Week 0. Laws that a reference keeps and a wrong answer breaks: rows sum to one, the past does not see the
future, a batch's rows do not see each other. Each function says in a sentence what is broken, or None.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.course.exercise.comparison import same
from shared.course.exercise.evidence import (
    CRASHED,
    Evidence,
    Pair,
    array_of,
    close_arrays,
    is_array,
    pairs_of,
    run_quietly,
    sums_to_one,
)


def not_finite(evidence: Evidence) -> str | None:
    """nan in the result of every failure, where the right ones have none."""
    for failure in evidence.failures:
        yours, expected = array_of(failure.yours), array_of(failure.expected)
        if yours is None or expected is None or np.isnan(expected).any() or not np.isnan(yours).any():
            return None
    return (
        "There is nan in your result. 0 times infinity is nan, and so are infinity minus infinity, 0 / 0, the"
        " logarithm of a negative number, and a softmax over a row that is all -inf."
    )


def different_each_time(evidence: Evidence) -> str | None:
    """Two calls with the same arguments give two results, where the reference's are equal."""
    arguments = evidence.failures[0].arguments
    once, again = run_quietly(evidence.answer, arguments), run_quietly(evidence.answer, arguments)
    if same(once, again, evidence.tolerance) or not _repeats(
        evidence.reference, arguments, evidence.tolerance
    ):
        return None
    return (
        "It gives another result each time for the same input. Whatever is random has to come from what the"
        " function is given (a generator, a seed), so that a run can be repeated."
    )


def _repeats(function: Callable[[tuple], Any], arguments: tuple, tolerance: float) -> bool:
    return same(run_quietly(function, arguments), run_quietly(function, arguments), tolerance)


def unused_argument(evidence: Evidence) -> str | None:
    """Another value of an argument makes a difference to the reference, and none to the answer.

    None to all that is seen of the answer: what a part of the result should depend on may have gone into
    another. Only arguments that the task names count; the others are the grader's own, such as a seed.
    """
    answer = evidence.whole or evidence.answer
    as_given = [
        (case, run_quietly(evidence.reference, case), run_quietly(answer, case)) for case in evidence.cases
    ]
    unused = [
        f"`{name}`"
        for at, name in enumerate(evidence.parameters)
        if name in evidence.named and _is_unused(evidence, at, as_given)
    ]
    if not unused:
        return None
    if len(unused) == 1:
        return f"The argument {unused[0]} makes no difference to your result, and it should: is it used?"
    names = f"{', '.join(unused[:-1])} and {unused[-1]}"
    return f"The arguments {names} make no difference to your result, and they should: are all of them used?"


def _is_unused(evidence: Evidence, at: int, as_given: Sequence[tuple[tuple, Any, Any]]) -> bool:
    """as_given: each case's arguments, with the right result and the answer's."""
    answer = evidence.whole or evidence.answer
    is_wanted = False
    for arguments, right, yours in as_given:
        for other in _other_values(evidence, at, arguments[at]):
            changed = (*arguments[:at], other, *arguments[at + 1 :])
            changed_right = run_quietly(evidence.reference, changed)
            if changed_right is CRASHED:
                continue
            changed_yours = run_quietly(answer, changed)
            if changed_yours is CRASHED or not same(changed_yours, yours, evidence.tolerance):
                return False
            if not same(changed_right, right, evidence.tolerance):
                is_wanted = True
    return is_wanted


def _other_values(evidence: Evidence, at: int, value: Any) -> Iterator[Any]:
    """Values that an argument might as well have: another case's, or nearly the same."""
    others = [case[at] for case in evidence.cases if not same(case[at], value, 0)]
    if not is_array(value):
        yield from others[:2]
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value + 1  # a limit that is off by one shows just beside the values of the cases
        if value > 1:
            yield value - 1
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value + torch.linspace(0.5, 1.5, value.numel()).view(value.shape).to(value.dtype)
    elif is_array(value):
        yield from [other for other in others if other.shape == value.shape][:2]


def does_not_sum_to_one(evidence: Evidence) -> str | None:
    """The right values sum to 1 along a dimension; the answer's do not, or along another one."""
    pairs = pairs_of(evidence)
    if pairs is None:
        return None
    dimensions = min(expected.ndim for _, expected in pairs)
    for back in range(1, dimensions + 1):
        if not all(expected.shape[-back] > 1 and sums_to_one(expected, -back) for _, expected in pairs):
            continue
        wrong = [yours for yours, _ in pairs if not sums_to_one(yours, -back)]
        if not wrong:
            return None
        sums = wrong[0].sum(axis=-back)
        worst = sums.flat[int(np.abs(sums - 1).argmax())]
        text = (
            f"The values should sum to 1 along the {_dimension(back, dimensions)}; yours sum to {worst:.4g}"
        )
        for other in range(1, dimensions + 1):
            if other != back and all(sums_to_one(yours, -other) for yours, _ in pairs):
                return (
                    f"{text}. They do along the {_dimension(other, dimensions)}: the sum was taken over the"
                    " wrong dimension, or it lost its dimension (keepdim=True)."
                )
        if all(abs(yours.sum() - 1) < 1e-4 for yours, _ in pairs):
            return f"{text}. All of them together do: each row has to be divided by its own sum."
        return f"{text}."
    return None


def _dimension(back: int, dimensions: int) -> str:
    if dimensions == 2:
        return {1: "rows (dimension 1)", 2: "columns (dimension 0)"}[back]
    return "last dimension" if back == 1 else f"dimension {-back}"


def future_leaks(evidence: Evidence) -> str | None:
    """A later part of an input changes an earlier part of the result, where the reference looks back."""
    return next((sentence for is_future, sentence in _leaks(evidence) if is_future), None)


def positions_mixed(evidence: Evidence) -> str | None:
    """The same where the reference looks neither back nor ahead."""
    return next((sentence for is_future, sentence in _leaks(evidence) if not is_future), None)


def _leaks(evidence: Evidence) -> Iterator[tuple[bool, str]]:
    for at, name in enumerate(evidence.parameters):
        for arguments in evidence.cases:
            yield from _leaks_in(evidence, arguments, at, name)


def _leaks_in(evidence: Evidence, arguments: tuple, at: int, name: str) -> Iterator[tuple[bool, str]]:
    value = arguments[at]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
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
            if _moved(from_first, out)[-1]:
                yield (
                    True,
                    f"The future leaks: with another value at the last of {length} positions of `{name}`,"
                    f" your result changes at position {int(moves.argmax())} already (counted from 0). A"
                    " position may depend on itself and the ones before it, and on nothing later.",
                )
                continue
            if dimension == out:  # else sizes are equal by chance, as a weight's and those of the result
                yield (
                    False,
                    f"Places are mixed that have nothing to do with each other: with another value at the"
                    f" last of {length} places along dimension {dimension} of `{name}`, your result changes"
                    f" at place {int(moves.argmax())} (counted from 0) of that dimension, too.",
                )


def _changed_at(value: Tensor, dimension: int, place: int) -> Tensor:
    changed = value.clone()
    changed.select(dimension, place).add_(1.0).mul_(-1.7)
    return changed


def _before_and_after(
    function: Callable[[tuple], Any], arguments: tuple, at: int, changed: Any
) -> Pair | None:
    before = array_of(run_quietly(function, arguments))
    after = array_of(run_quietly(function, (*arguments[:at], changed, *arguments[at + 1 :])))
    if before is None or after is None or before.shape != after.shape:
        return None
    return before, after


def _moved(results: Pair, dimension: int) -> np.ndarray:
    """Bool [size of the dimension]: where two results differ."""
    before, after = results
    moved = ~np.isclose(before, after, rtol=1e-5, atol=1e-6, equal_nan=True)
    return np.asarray(moved.any(axis=tuple(i for i in range(before.ndim) if i != dimension)))


def depends_on_the_batch(evidence: Evidence) -> str | None:
    """The last row alone gives what it gives among others: so it is for the reference."""
    for arguments in evidence.cases:
        sizes = [value.shape[0] for value in arguments if is_array(value) and value.ndim > 1]
        if not sizes or len(set(sizes)) > 1 or sizes[0] < 2:
            continue
        alone = tuple(value[-1:] if is_array(value) and value.ndim > 1 else value for value in arguments)
        rows = []
        for function in (evidence.reference, evidence.answer):
            among, single = array_of(run_quietly(function, arguments)), array_of(run_quietly(function, alone))
            if among is None or single is None or among.ndim == 0 or among.shape[0] != sizes[0]:
                break
            rows.append(among[-1:].shape == single.shape and close_arrays(among[-1:], single))
        if rows == [True, False]:
            return (
                "The last row gives another result alone than among other rows. Rows have nothing to do with"
                " each other here: does each read its own numbers, and is what you cut, sum or average cut,"
                " summed or averaged along the right dimension?"
            )
    return None


def right_in_double(evidence: Evidence) -> str | None:
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
            array_of(run_quietly(evidence.answer, arguments)),
            array_of(run_quietly(evidence.reference, arguments)),
        )
        if yours is None or right is None or not close_arrays(yours, right, 1e-6):
            return None
    return (
        "The formula is right, but not in float32: with the same inputs in float64 your result agrees. A"
        " number became too large, too small, or lost its last digits on the way; exp of large numbers and"
        " the logarithm of tiny ones are the usual places."
    )
