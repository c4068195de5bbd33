"""Week 0. Settings that are checked when they are made: all that is wrong with them, in one message.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Walk:
...     steps: int = 10
...     pace: str = "slow"
...
...     def __post_init__(self) -> None:
...         checks = Checks(self)
...         checks.at_least(1, "steps")
...         checks.one_of("pace", ("slow", "fast"))
...         checks.finish()
>>> Walk(steps=0, pace="idle")
Traceback (most recent call last):
    ...
ValueError: Walk: steps=0: must be at least 1; pace='idle': must be slow or fast
"""

import math
from collections.abc import Sequence
from typing import Any

from shared.runtime import check_seed


class Checks:
    """Collects what is wrong with the fields of a settings object; `finish` raises it as one ValueError.

    A field that is None means "not set" and passes every check. A nan passes none of those on numbers.
    """

    def __init__(self, settings: object):
        self._settings = settings
        self.problems: list[str] = []

    def require(self, condition: bool, problem: str) -> None:
        """Notes `problem` unless `condition` holds: a clause that says what was given and what is allowed."""
        if not condition:
            self.problems.append(problem)

    def at_least(self, low: float, *names: str) -> None:
        """Each of these fields must be `low` or more."""
        for name, value in self._set_fields(names):
            self.require(value >= low, f"{name}={value}: must be at least {low:g}")

    def not_negative(self, *names: str) -> None:
        """Each of these fields must be 0 or more."""
        for name, value in self._set_fields(names):
            self.require(value >= 0, f"{name}={value}: must not be negative")

    def above(self, low: float, *names: str) -> None:
        """Each of these fields must be more than `low`, and finite."""
        for name, value in self._set_fields(names):
            self.require(value > low, f"{name}={value}: must be above {low:g}")
            self.require(value != math.inf, f"{name}={value}: must be finite")

    def between(self, low: float, high: float, *names: str) -> None:
        """Each of these fields must be from `low` to `high`, both included."""
        for name, value in self._set_fields(names):
            self.require(low <= value <= high, f"{name}={value}: must be from {low:g} to {high:g}")

    def below(self, high: float, *names: str) -> None:
        """Each of these fields must be from 0, included, to `high`, not included."""
        for name, value in self._set_fields(names):
            self.require(0 <= value < high, f"{name}={value}: must be from 0 up to, not including, {high:g}")

    def one_of(self, name: str, allowed: Sequence[Any]) -> None:
        """This field must be one of `allowed`, which has at least one value."""
        for _, value in self._set_fields([name]):
            self.require(value in allowed, f"{name}={value!r}: must be {_alternatives(allowed)}")

    def seed(self, name: str = "seed") -> None:
        """This field must be a seed that Python, NumPy and torch all take."""
        for _, value in self._set_fields([name]):
            try:
                check_seed(value)
            except ValueError as error:
                self.problems.append(str(error))

    def finish(self) -> None:
        """Raises ValueError, in one line headed by the name of the settings' class, if anything is wrong."""
        if self.problems:
            raise ValueError(f"{type(self._settings).__name__}: {'; '.join(self.problems)}")

    def _set_fields(self, names: Sequence[str]) -> list[tuple[str, Any]]:
        """The fields of these names that are not None, with their values."""
        fields = [(name, getattr(self._settings, name)) for name in names]
        return [(name, value) for name, value in fields if value is not None]


def _alternatives(allowed: Sequence[Any]) -> str:
    words = [str(value) for value in allowed]
    if len(words) > 2:
        return f"one of {', '.join(words)}"
    return " or ".join(words)
