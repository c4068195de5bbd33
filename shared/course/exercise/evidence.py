"""Week 0. What the grader has seen of a wrong answer, and how it is looked at as numbers."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from shared.course.exercise.comparison import is_odd, plain_tensor


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
    part: str = ""
    """Which part of a result of several this is about: "item 0". Empty: all of it."""
    whole: Callable[[tuple], Any] | None = None
    """As `answer`, but with all of the result, or all that is seen of it; None where that is the same."""
    named: Sequence[str] = ()
    """Those of the parameters that the task's stub names, too; the others are the grader's own."""


CRASHED = object()
"""Equal to nothing else."""


def run_quietly(function: Callable[[tuple], Any], arguments: tuple) -> Any:
    """What a function makes of a copy of a case's arguments; CRASHED where it raises."""
    try:
        return function(copy.deepcopy(arguments))
    except Exception:
        return CRASHED


# ---- values as arrays


def is_array(value: Any) -> bool:
    """Whether it is a tensor of PyTorch or an array of NumPy."""
    return isinstance(value, Tensor | np.ndarray)


def array_of(value: Any) -> np.ndarray | None:
    """A number, a tensor, or a list of numbers, as float64; None for anything else."""
    if isinstance(value, Tensor):
        is_readable = not is_odd(value) and not value.is_complex()
        return plain_tensor(value).detach().double().numpy() if is_readable else None
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


def pairs_of(evidence: Evidence) -> list[Pair] | None:
    """The results of all failures as arrays of one shape each, yours first; None where they are not."""
    pairs = []
    for failure in evidence.failures:
        yours, expected = array_of(failure.yours), array_of(failure.expected)
        if yours is None or expected is None or yours.shape != expected.shape:
            return None
        pairs.append((yours, expected))
    return pairs


def close_arrays(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> bool:
    """Equal in shape and, nearly, in values; nan equals nan."""
    return a.shape == b.shape and np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def sums_to_one(values: np.ndarray, axis: int) -> bool:
    """Whether the values are distributions along an axis."""
    return bool(np.allclose(values.sum(axis=axis), 1, atol=1e-4)) and bool((values >= 0).all())
