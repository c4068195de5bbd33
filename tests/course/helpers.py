"""Made-up exercises, and a made-up week of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch

from shared.course.exercise import Exercise


def made_up(reference: Callable, cases: Sequence[tuple] | Callable, **more: Any) -> Exercise:
    """An exercise. cases: a list of arguments, or a function of a generator that makes one."""
    make = cases if callable(cases) else lambda generator: cases
    return Exercise("Do it.", reference, make, more.pop("mistakes", ()), ("one", "two", "three"), **more)


def normal(*shapes: tuple[int, ...]) -> Callable:
    """Cases of one tensor each, of these shapes, from N(0, 1)."""
    return lambda generator: [(torch.randn(shape, generator=generator),) for shape in shapes]


EXERCISES = dedent("""
    import torch
    from torch import Tensor

    from shared.course.exercise import Exercise, Mistake


    def double(x: Tensor) -> Tensor:
        return x * 2


    def halve(n: int) -> int:
        return n // 2


    def cases(generator):
        return [(torch.randn(3, 2, generator=generator),), (torch.randn(4, generator=generator),)]


    TRIPLED = Mistake("three times", lambda x: x * 3, "Three is one too many.")
    EXERCISES = (
        Exercise("Double every number of `x`.", double, cases, (TRIPLED,), ("add", "x + x", "return x + x")),
        Exercise("Halve `n`.", halve, lambda g: [(4,), (7,), (1000,)], (), ("a", "b", "c"), points=3),
    )
""")
ANSWERS = dedent('''
    def double(x):
        """Adding a number to itself doubles it."""
        return x + x


    def halve(n):
        """A shift by one bit."""
        return n >> 1
''')


def toy_week(root: Path) -> Path:
    """A repository with one week, number 3, of two exercises: double and halve. Returns the week's folder."""
    folder = root / "weeks" / "03_toy"
    folder.mkdir(parents=True)
    (folder / "exercises.py").write_text(EXERCISES, encoding="utf-8")
    (folder / "answers.py").write_text(ANSWERS, encoding="utf-8")
    return folder
