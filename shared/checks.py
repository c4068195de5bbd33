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


class Checks:
    """Collects what is wrong with an object's fields; `finish` raises it. A field that is None is left out: it stands for "not set"."""

    def __init__(self, settings: object):
        self._settings = settings
        self.problems: list[str] = []

    def require(self, condition: bool, problem: str) -> None:
        """Notes `problem` unless `condition` holds. The sentence says what was given, what is allowed and what to do."""
        if not condition:
            self.problems.append(problem)

    def at_least(self, low: float, *names: str) -> None:
        """Each of these fields must be `low` or more. A nan is refused, as by all of these methods."""
        for name, value in self._values(names):
            self.require(value >= low, f"{name}={value}: must be at least {low:g}")

    def above(self, low: float, *names: str) -> None:
        """Each of these fields must be finite and more than `low`."""
        for name, value in self._values(names):
            self.require(low < value < math.inf, f"{name}={value}: must be above {low:g}")

    def between(self, low: float, high: float, *names: str) -> None:
        """Each of these fields must be from `low` to `high`, both included."""
        for name, value in self._values(names):
            self.require(low <= value <= high, f"{name}={value}: must be from {low:g} to {high:g}")

    def one_of(self, name: str, allowed: Sequence[Any]) -> None:
        """The field must be one of `allowed`, at least one value."""
        for name, value in self._values((name,)):
            self.require(value in allowed, f"{name}={value!r}: must be {_or(allowed)}")

    def finish(self) -> None:
        """Raises ValueError, in one line headed by the class's name, if anything was noted."""
        if self.problems:
            raise ValueError(f"{type(self._settings).__name__}: {'; '.join(self.problems)}")

    def _values(self, names: Sequence[str]) -> list[tuple[str, Any]]:
        found = [(name, getattr(self._settings, name)) for name in names]
        return [(name, value) for name, value in found if value is not None]


def _or(allowed: Sequence[Any]) -> str:
    words = [str(value) for value in allowed]
    if len(words) > 2:
        return f"one of {', '.join(words)}"
    return " or ".join(words)
