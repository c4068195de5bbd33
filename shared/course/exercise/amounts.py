"""Week 0. By how much a wrong result is off: a factor or an amount, and what it is among the numbers of its
case, such as the square root of a size. Each function says so in a sentence, or None.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared.course.exercise.evidence import Evidence, Failure, close_arrays, is_array, pairs_of, sums_to_one


def factor(evidence: Evidence) -> str | None:
    """Too large or too small by one factor in each case."""
    pairs = pairs_of(evidence)
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
        if not close_arrays(yours, expected * ratio.flat[0], 2e-3):
            return None
        factors.append(float(ratio.flat[0]))
    known = _known_quantity(evidence, factors)
    if known:
        what = "too large by a factor" if abs(factors[0]) > 1 else "multiplied once too often by this"
        return f"The values are {what}: {known}. (In the first such case, {factors[0]:.4g}.)"
    turned = _known_quantity(evidence, [1 / factor for factor in factors])
    if turned:
        what = "too small by a factor" if abs(factors[0]) < 1 else "divided once too often by this"
        return f"The values are {what}: {turned}. (Yours are {factors[0]:.4g} times the right ones.)"
    if len(factors) > 1 and np.allclose(factors, factors[0], rtol=2e-3):
        return f"The values are off by a constant factor: yours are {factors[0]:.5g} times the right ones."
    if len(factors) > 1 and pairs[0][1].size > 1:
        shown = " and ".join(f"{factor:.4g}" for factor in factors[:2])
        return (
            f"The values are off by one factor for all of them, and another one in each case: {shown}"
            " times the right ones in two of them. What is it that you divide or multiply by?"
        )
    return None


def factor_by_place(evidence: Evidence) -> str | None:
    """Off by a factor that is another one at each place of one dimension, and the same everywhere else."""
    pairs = pairs_of(evidence)
    if not pairs:
        return None
    dimensions = min(expected.ndim for _, expected in pairs)
    for axis in range(dimensions):
        found = [_factors_along(yours, expected, axis) for yours, expected in pairs]
        if dimensions > 1 and all(factors is not None for factors in found):
            different = [f for f in found if f is not None and len(f) > 2 and np.ptp(f) > 0.02]
            if different:
                longest = max(different, key=len)
                shown = ", ".join(f"{factor:.4g}" for factor in longest[:5])
                return (
                    f"The values are off by a factor that depends on the place along dimension {axis}: in"
                    f" one case yours are {shown}{', ...' if len(longest) > 5 else ''} times the right ones."
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
    return factors.reshape(-1) if tells and close_arrays(yours, factors * expected, 1e-3) else None


def offset(evidence: Evidence) -> str | None:
    """Too large or too small by the same amount everywhere."""
    pairs = pairs_of(evidence)
    if not pairs:
        return None
    amounts = []
    for yours, expected in pairs:
        difference = yours - expected
        if not np.isfinite(difference).all() or not close_arrays(
            difference, np.full_like(difference, difference.flat[0]), 1e-4
        ):
            return None
        amounts.append(float(difference.flat[0]))
    if sum(expected.size for _, expected in pairs) < 2:  # one number is always off by one amount
        return None
    if np.allclose(amounts, amounts[0], rtol=1e-3):
        which = "large" if amounts[0] > 0 else "small"
        return (
            f"The values are off by the same amount everywhere: yours are {abs(amounts[0]):.4g} too {which}."
        )
    known = _known_quantity(evidence, amounts) or _known_quantity(evidence, [-amount for amount in amounts])
    if known:
        return f"The values are off by the same amount everywhere: by {known}."
    return None


def sharper(evidence: Evidence) -> str | None:
    """A distribution as a softmax of other logits: those of the right one, times a factor."""
    pairs = pairs_of(evidence)
    if not pairs or not all(
        sums_to_one(expected, -1) and sums_to_one(yours, -1) for yours, expected in pairs
    ):
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
    if not slopes or np.allclose(slopes, 1, rtol=1e-2):  # as sharp as the right one: something else is wrong
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
    if is_array(failure.expected) and failure.expected.ndim:
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
    if is_array(value) and value.ndim:
        sizes = {f"the size -{back} of `{name}`": value.shape[-back] for back in range(2, value.ndim + 1)}
        elements = {f"the number of elements of `{name}`": math.prod(value.shape)}
        return {f"the last size of `{name}`": value.shape[-1], **sizes, **elements}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {f"`{name}`": value}
    if isinstance(value, list | tuple | str):
        return {f"the length of `{name}`": len(value)}
    return {}
