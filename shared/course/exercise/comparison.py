"""Week 0. Compares a learner's result with the reference's, and says in a sentence how they differ."""

import inspect
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, allclose, equal, isclose

# These are bound here, where no answer has put anything else in their place.

LOOSE = 2e-3
"""Within which a result may be that of a known mistake, made in another way."""


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Equal in type, shape and value, floats within `tolerance` (relative and absolute; nan equals nan).

    A list and a tuple of the same items are equal: which of them it is says nothing about the idea.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _same_tensors(a, b, tolerance)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype.kind not in "fc":
            return np.array_equal(a, b)
        return np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(a, int | float) and isinstance(b, int | float):
        return _same_numbers(a, b, tolerance)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    if callable(a) and callable(b):
        return a is b or type(a) is type(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # what cannot be compared is not equal
        return False


def _same_numbers(a: float, b: float, tolerance: float) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def _same_tensors(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.layout != b.layout or a.device != b.device or a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = plain_tensor(a), plain_tensor(b)
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if not a.is_floating_point() and not a.is_complex():
        return equal(a, b)
    return allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def plain_tensor(value: Tensor) -> Tensor:
    """A tensor without what a subclass of Tensor would do when it is compared."""
    if type(value) is Tensor:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.detach().as_subclass(Tensor)


def is_odd(value: Tensor) -> bool:
    """Whether a tensor's numbers cannot simply be read: sparse, or not on the CPU."""
    return value.layout is not torch.strided or value.device.type != "cpu"


def is_bounded(value: Any) -> bool:
    """Whether no number in a result is infinite or nan."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return is_odd(value) or bool(value.isfinite().all())
    return math.isfinite(value) if isinstance(value, float) else True


def is_all_nan(value: Any) -> bool:
    """Whether a tensor has nothing but nan in it: a result that shows nothing of what went wrong."""
    if not isinstance(value, Tensor) or is_odd(value) or not value.is_floating_point():
        return False
    return value.numel() > 0 and bool(value.isnan().all())


def has_no_nan(value: Any) -> bool:
    """Whether no number in a result is nan."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return not bool(value.isnan().any())
    return value == value if isinstance(value, float) else True


def difference(given: Any, expected: Any, tolerance: float = 1e-5) -> str:
    """How `given` differs from `expected`, in a sentence that helps.

    It names the first of these that is wrong: no result, type, shape, dtype, not finite, values.
    """
    if given is None:
        return "it returned None: is the `return` missing?"
    unfinished = _unfinished(given)
    if unfinished and type(given) is not type(expected):
        return unfinished
    if isinstance(expected, Tensor):
        if not isinstance(given, Tensor):
            return f"expected a tensor {short(expected)}, got {_no_tensor(given)}."
        return _tensor_difference(plain_tensor(given), plain_tensor(expected), tolerance)
    are_numbers = isinstance(given, int | float) and isinstance(expected, int | float)
    if isinstance(given, Tensor) and isinstance(expected, int | float) and given.numel() == 1:
        return (
            f"the value is wanted as a Python number, and it is a tensor of shape {list(given.shape)}:"
            " .item() takes it out."
        )
    are_sequences = isinstance(given, list | tuple) and isinstance(expected, list | tuple)
    if isinstance(given, dict) and isinstance(expected, dict):
        return _dict_difference(given, expected, tolerance)
    if type(given) is not type(expected) and not are_numbers and not are_sequences:
        return (
            f"expected {type(expected).__name__} {short(expected)},"
            f" got {type(given).__name__} {short(given)}."
        )
    if isinstance(expected, list | tuple):
        return _sequence_difference(given, expected, tolerance)
    if isinstance(expected, str | bytes) and len(expected) > SHOWN_WHOLE:
        return _text_difference(given, expected)
    return f"expected {short(expected)}, got {short(given)}."


def _unfinished(given: Any) -> str | None:
    """What to say of a result that is still to be computed."""
    if inspect.isgenerator(given):
        return "it returned a generator, since there is a `yield` in it: collect the values, and return them."
    if inspect.iscoroutine(given):
        given.close()
        return "it returned a coroutine, since it is an `async def`: a plain `def` is wanted."
    return None


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
    if given.layout != expected.layout:
        return f"the tensor is {_layout(given)} and should be {_layout(expected)}: .to_dense() fills it in."
    if given.device != expected.device:
        return f"the tensor is on the device {given.device} and should be on {expected.device}."
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
    if not expected.is_floating_point() and not expected.is_complex():
        tolerance = 0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = given.detach().to_dense().to(wide), expected.detach().to_dense().to(wide)
    wrong = ~isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    error = (a - b).abs().nan_to_num(math.inf).masked_fill(~wrong, 0)
    place = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    where = f" at {list(place)}" if place else ""
    return (
        f"shape and dtype are right, but {int(wrong.sum())} of {wrong.numel()} values differ, most{where}:"
        f" {a[place].item():.6g}, expected {b[place].item():.6g}."
    )


def _layout(value: Tensor) -> str:
    return "dense" if value.layout is torch.strided else "sparse"


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
    pairs = enumerate(zip(given, expected))
    at = next((i for i, (item, right) in pairs if not same(item, right, tolerance)), None)
    if len(given) == len(expected) and at is not None:
        return f"item {at}: {_part_difference(given[at], expected[at], tolerance)}"
    says = f"expected {len(expected)} items, got {len(given)}"
    yours, right = short(given), short(expected)
    both = f"{says}: {yours} instead of {right}."
    if at is None:
        return both
    first = f"The first that is wrong is item {at}: {short(given[at])} instead of {short(expected[at])}."
    if yours.endswith(CUT) or right.endswith(CUT):
        return f"{says}. {first}"
    return f"{both} {first}" if max(len(given), len(expected)) > 12 else both


def _part_difference(given: Any, expected: Any, tolerance: float) -> str:
    """As `difference`, of a part of what was returned: None in it was put there by somebody."""
    if given is None:
        return f"expected {short(expected)}, got None."
    return difference(given, expected, tolerance)


def _dict_difference(given: dict, expected: dict, tolerance: float) -> str:
    """The first of these that is wrong: entries missing, entries too many, a value."""
    for says, keys in (
        ("missing", [key for key in expected if key not in given]),
        ("too many", [key for key in given if key not in expected]),
    ):
        if len(keys) == 1:
            return f"an entry is {says}: {short(keys[0])}."
        if keys:
            return f"{len(keys)} entries are {says}, the first is {short(keys[0])}."
    key = next(key for key in expected if not same(given[key], expected[key], tolerance))
    return f"at {short(key)}: {_part_difference(given[key], expected[key], tolerance)}"


def _text_difference(given: str | bytes, expected: str | bytes) -> str:
    """Of long texts what stands at the first place where they differ."""
    pairs = enumerate(zip(given, expected))
    at = next((i for i, (a, b) in pairs if a != b), min(len(given), len(expected)))
    start = max(at - 10, 0)
    yours, right = given[start : at + 20], expected[start : at + 20]
    unit = "byte" if isinstance(expected, bytes) else "character"
    return f"from {unit} {start} of {len(expected)} on, expected {right!r}, got {yours!r}."


CUT = " [...]"
"""The end of what is shown in part."""


def short(value: Any) -> str:
    """A value, short enough to read in a sentence; of a large tensor, its shape and dtype."""
    if isinstance(value, float):
        return f"{value:.8g}"
    if not isinstance(value, Tensor):
        text = re.sub(r"\s*\n\s*", " ", written(value))
        return text if len(text) <= 120 else f"{text[:114]}{CUT}"
    value = plain_tensor(value)
    if value.numel() > 8 or is_odd(value):
        return f"of shape {list(value.shape)}, {value.dtype}"
    values = [round(v, 4) if isinstance(v, float) else v for v in value.flatten().tolist()]
    return f"{values} of shape {list(value.shape)}"


SHOWN_WHOLE = 64
"""Elements of a tensor up to which all are shown."""
LINE = 88
"""Characters of a list or a tuple above which each of its items gets a line of its own."""
AT_THE_ENDS = 2, 12
"""Entries of a long dict that are shown: so many at its beginning, so many at its end."""


def whole(value: Any, digits: int = 4) -> str:
    """A value as a learner would type it, with all its numbers; of a large tensor, its shape and beginning.

    digits: of a float that are shown.

    >>> print(whole(torch.tensor([[1.0, 2.5], [0.0, 1 / 3]])))
    tensor([[1, 2.5], [0, 0.3333]])
    """
    if isinstance(value, Tensor):
        value = plain_tensor(value)
        if is_odd(value):
            return f"{_layout(value)} tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
        return _whole_array("tensor", value.detach(), (torch.float32, torch.int64, torch.bool), digits)
    if isinstance(value, np.ndarray):
        usual = (np.dtype("float64"), np.dtype("int64"), np.dtype(bool))
        return _whole_array("array", value, usual, digits)
    if isinstance(value, list | tuple) and len(value) <= SHOWN_WHOLE:
        return _whole_sequence(value, digits)
    if isinstance(value, dict) and _is_large_state(value):
        return _shapes_of(value)
    if isinstance(value, dict):
        return _whole_dict(value, digits)
    if isinstance(value, float):
        return _numbers(value, digits)
    text = written(value)
    return text if len(text) <= 600 else f"{text[:600]} ... ({len(text)} characters)"


def _whole_sequence(value: Sequence, digits: int) -> str:
    """A list or a tuple of arrays or of other lists has an item a line, where it is long."""
    items = [whole(item, digits) for item in value]
    is_nested = any(isinstance(item, Tensor | np.ndarray | list | tuple) for item in value)
    is_long = is_nested and len(items) > 1 and sum(map(len, items)) > LINE
    inside = ",\n ".join(item.replace("\n", "\n ") for item in items) if is_long else ", ".join(items)
    if isinstance(value, tuple):
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return f"[{inside}]"


def _whole_dict(value: dict, digits: int) -> str:
    """A dict; of a long one how it begins and ends, such as a vocabulary's first bytes and last merges."""
    entries = list(value.items())
    first, last = AT_THE_ENDS
    if len(entries) <= SHOWN_WHOLE:
        return "{" + ", ".join(_entry(entry, digits) for entry in entries) + "}"
    begin, end = ([_entry(entry, digits) for entry in part] for part in (entries[:first], entries[-last:]))
    shown = [*begin, "...", *end]
    return "{" + ", ".join(shown) + f"}} ({len(entries)} entries)"


def _is_large_state(value: dict) -> bool:
    """Whether it has nothing but tensors, with more numbers than one would read."""
    if not all(isinstance(tensor, Tensor) for tensor in value.values()):
        return False
    return sum(tensor.numel() for tensor in value.values()) > SHOWN_WHOLE


def _shapes_of(state: dict[Any, Tensor]) -> str:
    """The names, shapes and dtypes of a model's tensors, a line each."""
    kinds = [
        f"{written(name)}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in state.items()
    ]
    return "{" + ",\n ".join(kinds) + "}"


def _entry(entry: tuple[Any, Any], digits: int) -> str:
    return f"{written(entry[0])}: {whole(entry[1], digits)}"


def _whole_array(word: str, value: Any, usual: tuple, digits: int) -> str:
    """A tensor or an array; its type where that is not one of the usual ones."""
    if math.prod(value.shape) <= SHOWN_WHOLE:
        is_mask = value.dtype in (torch.bool, np.dtype(bool)) and value.ndim > 1  # a wall of True and False
        is_usual = value.dtype in usual and not is_mask
        kind = "" if is_usual else f" of {str(value.dtype).removeprefix('torch.')}"
        shown = value + 0 if is_mask else value
        return f"{word}({_numbers(shown.tolist(), digits)}){kind}"
    start = ", ".join(_numbers(v, digits) for v in value.reshape(-1)[:6].tolist())
    return f"{word} of shape {list(value.shape)}, {value.dtype}: {start}, ..."


def written(value: Any) -> str:
    """`repr` that comes to an end: of a long list its beginning, of what cannot be written its type."""
    is_long = isinstance(value, list | tuple | dict | set | frozenset) and len(value) > 1000
    try:
        return reprlib.repr(value) if is_long else repr(value)
    except Exception as error:
        return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"


def _numbers(value: Any, digits: int) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_numbers(item, digits) for item in value)}]"
    if isinstance(value, float):
        return f"{value + 0.0:.{digits}g}"  # + 0.0 makes 0 of -0
    return written(value)


def type_of(value: Any) -> str:
    """What kind of thing a result is: list and tuple, int and float, dict and Counter are of one kind."""
    if isinstance(value, list | tuple):
        return "sequence"
    if isinstance(value, dict):
        return "dict"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return "function" if callable(value) else type(value).__name__


def _holds_arrays(value: Any) -> bool:
    """Whether there is a tensor, an array or one of NumPy's numbers in a list, or in a list of its items."""
    if isinstance(value, list | tuple):
        return any(map(_holds_arrays, value))
    return isinstance(value, Tensor | np.ndarray | np.generic)


def alike_in_type(yours: Any, right: Any, tolerance: float) -> bool:
    """Whether a result is of the right type and shape, or its first part that is wrong is."""
    if isinstance(right, Tensor) and isinstance(yours, Tensor):
        is_alike = yours.dtype == right.dtype and yours.shape == right.shape
        return is_alike and is_odd(yours) == is_odd(right)
    if type_of(yours) != type_of(right) or (yours is None) != (right is None):
        return False
    if isinstance(right, list | tuple) and (_holds_arrays(right) or _holds_arrays(yours)):
        if len(right) != len(yours):
            return False
        pairs = zip(yours, right)
        return all(alike_in_type(a, b, tolerance) for a, b in pairs if not same(a, b, tolerance))
    return True


def loosened(value: Any, tolerance: float = LOOSE) -> Any:
    """A result whose type says less, when it is compared loosely: another float type, a list for a tuple."""
    if tolerance < LOOSE:
        return value
    if isinstance(value, Tensor):
        if value.is_complex():
            return value.detach()
        return value.detach().double() if value.is_floating_point() else value.detach().long()
    if isinstance(value, dict):
        return {key: loosened(part, tolerance) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [loosened(part, tolerance) for part in value]
    return value
