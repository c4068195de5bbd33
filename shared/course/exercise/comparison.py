"""Week 0. Compares a learner's result with the reference's, and says in a sentence how they differ."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Equal in type, shape and value, floats within `tolerance` (relative and absolute; nan equals nan).

    A list and a tuple of the same items are equal: which of them it is says nothing about the idea.
    """
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
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    return type(a) is type(b) and bool(a == b)


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
            return f"expected a tensor {short(expected)}, got {_no_tensor(given)}."
        return _tensor_difference(given, expected, tolerance)
    are_numbers = isinstance(given, int | float) and isinstance(expected, int | float)
    if isinstance(given, Tensor) and isinstance(expected, int | float) and given.numel() == 1:
        return (
            f"the value is wanted as a Python number, and it is a tensor of shape {list(given.shape)}:"
            " .item() takes it out."
        )
    are_sequences = isinstance(given, list | tuple) and isinstance(expected, list | tuple)
    if type(given) is not type(expected) and not are_numbers and not are_sequences:
        return (
            f"expected {type(expected).__name__} {short(expected)},"
            f" got {type(given).__name__} {short(given)}."
        )
    if isinstance(expected, list | tuple):
        return _sequence_difference(given, expected, tolerance)
    return f"expected {short(expected)}, got {short(given)}."


def _no_tensor(given: Any) -> str:
    """What there is in place of a tensor, with the way to one."""
    if isinstance(given, np.ndarray):
        return f"a NumPy array of shape {list(given.shape)}: torch.from_numpy makes it a tensor"
    if isinstance(given, bool | int | float | np.generic):
        return f"the number {given!r}: torch.tensor makes it one, and .item() takes a number out of one"
    if isinstance(given, list | tuple) and given and isinstance(given[0], Tensor):
        return f"a {type(given).__name__} of {len(given)} tensors: torch.stack or torch.cat joins them"
    return short(given)


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


SHOWN_WHOLE = 64
"""Elements of a tensor up to which all are shown."""


def whole(value: Any) -> str:
    """A value as a learner would type it, with all its numbers; of a large tensor, its shape and beginning.

    >>> print(whole(torch.tensor([[1.0, 2.5], [0.0, 1 / 3]])))
    tensor([[1, 2.5], [0, 0.3333]])
    """
    if isinstance(value, Tensor):
        return _whole_array("tensor", value.detach(), (torch.float32, torch.int64, torch.bool))
    if isinstance(value, np.ndarray):
        return _whole_array("array", value, (np.dtype("float64"), np.dtype("int64"), np.dtype(bool)))
    if isinstance(value, list | tuple) and len(value) <= SHOWN_WHOLE:
        items = ", ".join(whole(item) for item in value)
        if isinstance(value, tuple):
            return f"({items},)" if len(value) == 1 else f"({items})"
        return f"[{items}]"
    if isinstance(value, dict) and len(value) <= 8:
        return "{" + ", ".join(f"{key!r}: {whole(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return _numbers(value)
    text = repr(value)
    return text if len(text) <= 600 else f"{text[:600]} ... ({len(text)} characters)"


def _whole_array(word: str, value: Any, usual: tuple) -> str:
    """A tensor or an array; its type where that is not one of the usual ones."""
    if math.prod(value.shape) <= SHOWN_WHOLE:
        kind = "" if value.dtype in usual else f" of {str(value.dtype).removeprefix('torch.')}"
        return f"{word}({_numbers(value.tolist())}){kind}"
    start = ", ".join(_numbers(v) for v in value.reshape(-1)[:6].tolist())
    return f"{word} of shape {list(value.shape)}, {value.dtype}: {start}, ..."


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_numbers, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
