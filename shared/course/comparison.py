"""Week 0. Compares a learner's result with the reference's, and says in a sentence how they differ."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Equal in type, shape and value, floats within `tolerance` (relative and absolute; nan equals nan)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _same_tensors(a, b, tolerance)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return _same_numbers(a, b, tolerance)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if callable(a) and callable(b):
        return a is b or type(a) is type(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    return a == b


def _same_numbers(a: float, b: float, tolerance: float) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def _same_tensors(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def difference(given: Any, expected: Any, tolerance: float = 1e-5) -> str:
    """How `given` differs from `expected`, in a sentence that helps.

    It names the first of these that is wrong: no result, type, shape, dtype, not finite, values.
    """
    if given is None:
        return "it returned None: is the `return` missing?"
    if isinstance(expected, Tensor):
        if not isinstance(given, Tensor):
            return f"expected a tensor {short(expected)}, got {short(given)}."
        return _tensor_difference(given, expected, tolerance)
    are_numbers = isinstance(given, int | float) and isinstance(expected, int | float)
    if type(given) is not type(expected) and not are_numbers:
        return (
            f"expected {type(expected).__name__} {short(expected)},"
            f" got {type(given).__name__} {short(given)}."
        )
    if isinstance(expected, list | tuple):
        return _sequence_difference(given, expected, tolerance)
    return f"expected {short(expected)}, got {short(given)}."


def _tensor_difference(given: Tensor, expected: Tensor, tolerance: float) -> str:
    if given.shape != expected.shape:
        return (
            f"expected shape {list(expected.shape)}, got {list(given.shape)}.{_shape_hint(given, expected)}"
        )
    if given.dtype != expected.dtype:
        return f"the shape is right, but the dtype is {given.dtype} and should be {expected.dtype}."
    if expected.is_floating_point() and expected.isfinite().all() and not given.isfinite().all():
        return (
            "the result has nan or inf in it: a division by zero, a log of zero, or a softmax over a row"
            " that is all -inf?"
        )
    if not expected.is_floating_point():
        tolerance = 0
    a, b = given.double(), expected.double()
    wrong = ~torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    error = (a - b).abs().nan_to_num(math.inf).masked_fill(~wrong, 0)
    place = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    where = f" at {list(place)}" if place else ""
    return (
        f"shape and dtype are right, but {int(wrong.sum())} of {wrong.numel()} values differ, most{where}:"
        f" {given[place].item():.6g}, expected {expected[place].item():.6g}."
    )


def _shape_hint(given: Tensor, expected: Tensor) -> str:
    """What may have led to another shape, as a sentence after a space; empty where nothing is likely."""
    if sorted(given.shape) == sorted(expected.shape):
        return " The sizes are right but in another order: a transpose is missing, or one too many."
    if given.numel() == expected.numel():
        return " The number of elements is right: a view or reshape at the end is missing."
    if given.dim() < expected.dim():
        return " A dimension is gone: keepdim=True, or an index where a slice is needed?"
    return ""


def _sequence_difference(given: Sequence, expected: Sequence, tolerance: float) -> str:
    if len(given) != len(expected):
        return (
            f"expected {len(expected)} items, got {len(given)}: {short(given)} instead of {short(expected)}."
        )
    pairs = enumerate(zip(given, expected))
    at = next(i for i, (item, right) in pairs if not same(item, right, tolerance))
    return f"item {at}: {difference(given[at], expected[at], tolerance)}"


def short(value: Any) -> str:
    """A value, short enough to read in a sentence; of a large tensor, its shape and dtype."""
    if not isinstance(value, Tensor):
        return textwrap.shorten(repr(value), 120)
    if value.numel() > 8:
        return f"of shape {list(value.shape)}, {value.dtype}"
    values = [round(v, 4) if isinstance(v, float) else v for v in value.flatten().tolist()]
    return f"{values} of shape {list(value.shape)}"
