"""Week 0. Says in what way an answer is wrong, without knowing the mistake: rows do not sum to one, off by a
factor, shifted, transposed, the future leaks, an argument is not used.

Each property is a law that the reference keeps and the answer breaks (laws.py), or a relation between the two
results (relations.py, amounts.py).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from shared.course.exercise.amounts import factor, factor_by_place, offset, sharper
from shared.course.exercise.comparison import same
from shared.course.exercise.evidence import Evidence, Failure, is_array
from shared.course.exercise.laws import (
    depends_on_the_batch,
    different_each_time,
    does_not_sum_to_one,
    future_leaks,
    not_finite,
    positions_mixed,
    right_in_double,
    unused_argument,
)
from shared.course.exercise.relations import (
    always_the_same,
    entries,
    function_of_right,
    inverted,
    more_or_fewer_true,
    nearly,
    off_by_one,
    only_at_the_edge,
    rearranged,
    sign,
    wrapped_round,
)


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
            is_of_all = not narrowed.part or recognise is unused_argument
            return sentence if is_of_all else f"In {narrowed.part} of the result: {sentence}"
    return None


def _parts_in_another_order(evidence: Evidence) -> str | None:
    """A tuple or list of results whose parts are the right ones, exchanged."""
    for failure in evidence.failures:
        yours, expected = failure.yours, failure.expected
        if not (isinstance(yours, list | tuple) and isinstance(expected, list | tuple)):
            return None
        if len(yours) != len(expected) or len(expected) > 8 or not any(map(is_array, expected)):
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
        part=", ".join(filter(None, (evidence.part, _named(key, first.expected)))),
        whole=evidence.whole or answer,
    )
    return _narrowed(narrowed, depth + 1)


def _named(key: Any, result: Any) -> str:
    """A part of a result, in words."""
    return f"entry {key!r}" if isinstance(result, dict) else f"item {key}"


def _differing_part(yours: Any, expected: Any, tolerance: float) -> Any:
    """The key or the index of the first part that differs; None where the whole does."""
    if isinstance(expected, dict) and isinstance(yours, dict) and expected.keys() == yours.keys():
        return next((k for k in expected if not same(yours[k], expected[k], tolerance)), None)
    nested = isinstance(expected, list | tuple) and isinstance(yours, list | tuple)
    is_record = isinstance(expected, tuple) or any(map(is_array, expected)) if nested else False
    if not is_record or len(expected) != len(yours):
        return None
    return next((i for i, part in enumerate(expected) if not same(yours[i], part, tolerance)), None)


RECOGNISED: tuple[Callable[[Evidence], str | None], ...] = (
    different_each_time,
    always_the_same,
    inverted,
    right_in_double,
    not_finite,
    future_leaks,
    rearranged,
    sign,
    function_of_right,
    does_not_sum_to_one,
    unused_argument,
    wrapped_round,
    off_by_one,
    factor,
    factor_by_place,
    more_or_fewer_true,
    offset,
    sharper,
    positions_mixed,
    depends_on_the_batch,
    nearly,
    entries,
    only_at_the_edge,
)
"""In this order: the first that holds is told. Exact relations come before laws that are broken."""
