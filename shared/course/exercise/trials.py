"""Week 0. One case of an answer that is being graded: what was seen of it beside what is right."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.course.exercise.comparison import same
from shared.course.exercise.definition import SAID


@dataclass
class Trial:
    """One case of an answer that is being graded."""

    arguments: tuple
    expected: dict[str, Any]
    seen: dict[str, Any] = field(default_factory=dict)

    def is_wrong_in(self, what: str, tolerance: float) -> bool:
        """Whether this is wrong of what was seen; what a NotRight cut off is not."""
        was_reached = what in self.seen or SAID not in self.seen
        return was_reached and not same(self.seen.get(what), self.expected.get(what), tolerance)


def first_difference(failed: Sequence[Trial], tolerance: float) -> str:
    """The first thing seen, in the exercise's order, that is wrong in some case."""
    for what in failed[0].expected:
        if any(trial.is_wrong_in(what, tolerance) for trial in failed):
            return what
    return SAID if any(SAID in trial.seen for trial in failed) else next(iter(failed[0].expected))
