"""Week 0. Relations between a wrong result and the right one: its sign, its logarithm, its transpose, shifted
by one. Each function says in a sentence which relation holds, or None.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shared.course.exercise.evidence import (
    Evidence,
    Pair,
    array_of,
    close_arrays,
    is_array,
    pairs_of,
    run_quietly,
)


def _holds(pairs: list[Pair], relation: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether a change of the right result makes yours, in all failures, and changes one of them."""
    changed = [(yours, relation(expected)) for yours, expected in pairs]
    return all(close_arrays(yours, made) for yours, made in changed)


def sign(evidence: Evidence) -> str | None:
    """Minus the right values."""
    pairs = pairs_of(evidence)
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


def function_of_right(evidence: Evidence) -> str | None:
    """A function of the right values, one of FUNCTIONS. Not where the right one is always 0 or 1 alone: many
    functions make 1 of 0, and 0 of 1, and a count that is off by one is none of them.
    """
    pairs = pairs_of(evidence)
    if not pairs or all(expected.size == 1 and expected.item() in (0, 1) for _, expected in pairs):
        return None
    for sentence, function in FUNCTIONS.items():
        if _holds(pairs, function):
            return sentence
    return None


def inverted(evidence: Evidence) -> str | None:
    """A mask or a truth value the wrong way round."""
    for failure in evidence.failures:
        yours, expected = failure.yours, failure.expected
        if isinstance(expected, bool):
            if yours is expected or not isinstance(yours, bool):
                return None
        elif not (
            is_array(expected)
            and is_array(yours)
            and expected.dtype in (torch.bool, np.dtype(bool))
            and yours.dtype == expected.dtype
            and yours.shape == expected.shape
            and bool((yours != expected).all())
        ):
            return None
    return "True and False are exchanged, everywhere."


def more_or_fewer_true(evidence: Evidence) -> str | None:
    """A mask that is True in too many places, or in too few."""
    signs = set()
    for failure in evidence.failures:
        yours, expected = failure.yours, failure.expected
        masks = all(
            is_array(value) and value.dtype in (torch.bool, np.dtype(bool)) for value in (yours, expected)
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


def rearranged(evidence: Evidence) -> str | None:
    """Transposed, turned round, or shifted by one place."""
    pairs = pairs_of(evidence)
    if pairs is None:
        return _rearranged_lists(evidence)
    dimensions = {expected.ndim for _, expected in pairs}
    if len(dimensions) > 1 or dimensions == {0}:
        return None
    for axis in range(dimensions.pop()):
        sentence = _rearranged_along(pairs, axis)
        if sentence:
            return sentence
    if all(close_arrays(yours, expected) for yours, expected in pairs):
        return None  # they differ in their type, or too little to be told apart here
    in_order = [(np.sort(yours, axis=None), np.sort(expected, axis=None)) for yours, expected in pairs]
    if all(close_arrays(yours, expected) for yours, expected in in_order):
        return "The values are the right ones, but in another order or in other places."
    return None


def _rearranged_along(pairs: list[Pair], axis: int) -> str | None:
    for other in range(axis + 1, pairs[0][0].ndim):
        if all(close_arrays(yours, expected.swapaxes(axis, other)) for yours, expected in pairs):
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
    return close_arrays(yours[(*cut, mine)], expected[(*cut, right)])


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


def wrapped_round(evidence: Evidence) -> str | None:
    """Whole numbers that are off by a multiple of what their type can hold."""
    pairs = pairs_of(evidence)
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


def off_by_one(evidence: Evidence) -> str | None:
    """Whole numbers that are all one too large, or too small."""
    pairs = pairs_of(evidence)
    if not pairs or any(isinstance(failure.expected, float) for failure in evidence.failures):
        return None
    whole = all(np.array_equal(expected, expected.round()) for _, expected in pairs)
    if whole and all(close_arrays(yours, expected + 1) for yours, expected in pairs):
        return "It is one too many."
    if whole and all(close_arrays(yours, expected - 1) for yours, expected in pairs):
        return "It is one too few."
    return None


def only_at_the_edge(evidence: Evidence) -> str | None:
    """Right everywhere but in the first or the last place of a dimension."""
    pairs = pairs_of(evidence)
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
    return close_arrays(np.take(yours, inner, axis), np.take(expected, inner, axis))


def nearly(evidence: Evidence) -> str | None:
    """Within a hundredth of the right values, all of them."""
    pairs = pairs_of(evidence)
    if not pairs or any(np.array_equal(expected, expected.round()) for _, expected in pairs):
        return None
    largest = max(float(np.abs(yours - expected).max() / np.abs(expected).max()) for yours, expected in pairs)
    if not 0 < largest < 0.01:
        return None
    return (
        f"It is nearly right: the values are off by {largest:.1g} of the largest at most. float32 rounds by"
        " less: a part computed in a type of fewer digits (bfloat16, float16), an approximation in place of"
        " the exact function, a constant with too few digits, or a small term (eps) in another place."
    )


def entries(evidence: Evidence) -> str | None:
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
    return None


def always_the_same(evidence: Evidence) -> str | None:
    """One value in all places and cases, where the right ones differ."""
    pairs = pairs_of(evidence)
    if not pairs or len(evidence.cases) < 2:
        return None
    values = np.concatenate([yours.reshape(-1) for yours, _ in pairs])
    right = np.concatenate([expected.reshape(-1) for _, expected in pairs])
    if not np.isfinite(values).all():
        return None
    if len(values) < 2 or not np.allclose(values, values[0]) or np.allclose(right, right[0]):
        return None
    everywhere = [array_of(run_quietly(evidence.answer, case)) for case in evidence.cases]
    if all(found is None or np.allclose(found, values[0]) for found in everywhere):
        return f"Every value of your result is {values[0]:.4g}, whatever the input."
    return None
