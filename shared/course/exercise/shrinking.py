"""Week 0. Makes a failing case as small as it can be and still fail, so that a learner sees it at a glance.

The idea is that of property-based testing (Claessen and Hughes, "QuickCheck", 2000): cut, round and drop, and
keep what still fails.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.runtime import clock

TRIES = 300
SECONDS = 1.5


def size(arguments: Any) -> int:
    """How much there is to read: elements of tensors and items of lists, and characters."""
    if isinstance(arguments, Tensor | np.ndarray):
        return math.prod(arguments.shape) + 1
    if isinstance(arguments, str | bytes):
        return len(arguments)
    if isinstance(arguments, dict):
        return sum(size(key) + size(value) for key, value in arguments.items())
    if isinstance(arguments, list | tuple | set | frozenset):
        return sum(map(size, arguments)) + 1
    return 1


def smallest(arguments: tuple, still_fails: Callable[[tuple], bool]) -> tuple:
    """The smallest arguments found on which `still_fails` is true; it must be for those given."""
    best = arguments
    started = clock()
    tries = 0
    improved = True
    while improved:
        improved = False
        for candidate in _smaller(best):
            tries += 1
            if tries > TRIES or clock() - started > SECONDS:
                return best
            if still_fails(copy.deepcopy(candidate)):
                best = candidate
                improved = True
                break
    return best


def _smaller(arguments: tuple) -> Iterator[tuple]:
    """Simpler arguments, the boldest cuts first."""
    for length in sorted({n for value in arguments for n in _lengths(value)}, reverse=True):
        for shorter in sorted({1, length // 2, length - 1} - {0, length}):
            yield tuple(_cut(value, length, shorter) for value in arguments)
    for i, value in enumerate(arguments):
        for simpler in _simpler(value):
            yield (*arguments[:i], simpler, *arguments[i + 1 :])


def _lengths(value: Any) -> Iterator[int]:
    """The sizes that values share, such as a batch's: those of tensors, lists and strings."""
    if isinstance(value, Tensor | np.ndarray):
        yield from (n for n in value.shape if n > 1)
    elif isinstance(value, list | tuple | str | bytes):
        if len(value) > 1:
            yield len(value)
        if not isinstance(value, str | bytes):
            for item in value:
                yield from _lengths(item)


def _cut(value: Any, length: int, shorter: int) -> Any:
    """The value with every dimension of this length cut to a shorter one, and a number equal to it, too."""
    if isinstance(value, Tensor | np.ndarray):
        for dimension, n in enumerate(value.shape):
            if n == length:
                value = value[(slice(None),) * dimension + (slice(shorter),)]
        return value.clone() if isinstance(value, Tensor) else value.copy()
    if isinstance(value, str | bytes):
        return value[:shorter] if len(value) == length else value
    if isinstance(value, list | tuple):
        kept = value[:shorter] if len(value) == length else value
        return type(value)(_cut(item, length, shorter) for item in kept)
    if isinstance(value, int) and not isinstance(value, bool) and value == length:
        return shorter
    return value


def _simpler(value: Any) -> Iterator[Any]:
    """One argument, simpler while the others stay as they are."""
    if isinstance(value, Tensor | np.ndarray):
        yield from _simpler_array(value)
    elif isinstance(value, str | bytes):
        yield from _without_a_part(value)
    elif isinstance(value, list | tuple):
        yield from _without_a_part(value)
        for at, item in enumerate(value if size(value) <= 100 else ()):
            for simpler in _simpler(item):
                yield type(value)([*value[:at], simpler, *value[at + 1 :]])
    elif isinstance(value, float) and value != round(value, 1):
        yield round(value, 1)


def _without_a_part(value: Any) -> Iterator[Any]:
    """A list or a string without one item; of a long one each half, and the rest without an eighth."""
    if len(value) > 40:
        yield from (value[: len(value) // 2], value[len(value) // 2 :])
        eighth = len(value) // 8
        yield from (value[:at] + value[at + eighth :] for at in range(0, len(value), eighth))
    else:
        yield from (value[:at] + value[at + 1 :] for at in range(len(value) - 1, -1, -1))


def _simpler_array(value: Tensor | np.ndarray) -> Iterator[Any]:
    for dimension, n in enumerate(value.shape):
        if n > 1:
            for shorter in sorted({1, n // 2, n - 1}):
                yield value[(slice(None),) * dimension + (slice(shorter),)]
    for decimals in (0, 1):
        if isinstance(value, Tensor) and value.is_floating_point():
            rounded = value.detach().round(decimals=decimals) + 0.0  # makes 0 of -0
            if not rounded.any() and value.any():  # 1 shows more than 0, which hides what it multiplies
                yield value.detach().sign()
            if not torch.equal(rounded, value):
                yield rounded
        elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
            rounded_array = value.round(decimals) + 0.0
            if not np.array_equal(rounded_array, value):
                yield rounded_array
