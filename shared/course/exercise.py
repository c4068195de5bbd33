"""Week 0. Graded exercises: a learner's function is compared with a reference and with known mistakes.

In a notebook (a week's exercises live in its `exercises.py`):

    from shared.course.exercise import Week
    week = Week(1)
    week.task("count_pairs")           # shows the task and the signature
    def count_pairs(tokens, vocab_size):
        ...
    week.check(count_pairs)            # not attempted / solved / what is wrong
    week.hint("count_pairs")           # one more hint each time

From the command line: `python -m shared.course.exercise week 1` lists week 1's exercises and writes
`weeks/01_bigram/solutions.py` with their stubs; edit it and run the same command again to have it graded.
"""

import copy
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from shared.commandline import errors_for_people
from shared.course.comparison import difference, same, short
from shared.runtime import ROOT, read_json, write_json

PROGRESS = ROOT / "weeks" / ".progress.json"
"""Which exercises are solved; git doesn't track it."""
SOLUTIONS_HEAD = "import math\n\nimport numpy as np\nimport torch\nimport torch.nn.functional as F\n\n\n"
"""What a new solutions.py begins with."""


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that learners really give."""

    name: str
    """Short, as one would say it: "mask after the softmax"."""
    function: Callable
    why: str
    """What is wrong with it and why it matters: a sentence or two, told to the learner."""


@dataclass(frozen=True)
class Exercise:
    """What a learner writes, the answer, and how to tell them apart."""

    task: str
    """What to write: a few sentences, with shapes."""
    reference: Callable
    """The right answer; its name and signature are the stub's."""
    cases: Callable[[torch.Generator], Sequence[tuple]]
    """Makes argument tuples from a seeded generator. Enough of them that every mistake differs from the
    reference on one.
    """
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    """From a nudge to nearly the answer."""
    tolerance: float = 1e-5

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def stub(self) -> str:
        """The function to fill in, as source."""
        signature = str(inspect.signature(self.reference))
        signature = signature.replace("numpy.", "np.")  # the name that it is imported under
        return f"def {self.name}{signature}:\n    # your code here\n    ...\n"


@dataclass(frozen=True)
class Verdict:
    """What `grade` says. status: "solved", "not attempted" or "wrong"."""

    status: str
    message: str
    mistake: str | None = None
    """The name of the known mistake that the function makes."""


def grade(exercise: Exercise, function: Callable, seed: int = 0) -> Verdict:
    """Runs `function` on the exercise's cases beside the reference.

    The inputs are copies, so nothing that it does can reach a later case.
    """
    if untouched(function):
        return _not_attempted(exercise)
    cases = list(exercise.cases(torch.Generator().manual_seed(seed)))
    outputs = []
    for number, args in enumerate(cases, 1):
        given = copy.deepcopy(args)
        try:
            outputs.append(function(*given))
        except NotImplementedError:
            return _not_attempted(exercise)
        except Exception as error:
            return Verdict(
                "wrong",
                f"{exercise.name} crashed on case {number},"
                f" {describe_call(args)}:\n{_where(error, function)}",
            )
        if not same(given, args, 0):
            return _changed_input(exercise, number, given, args)
    expected = [exercise.reference(*copy.deepcopy(args)) for args in cases]
    agrees = [same(output, right, exercise.tolerance) for output, right in zip(outputs, expected)]
    if all(agrees):
        return Verdict(
            "solved", f"{exercise.name}: solved. It agrees with the reference on all {len(cases)} cases."
        )
    for mistake in exercise.mistakes:
        if same(outputs, _outputs(mistake.function, cases), exercise.tolerance):
            return Verdict(
                "wrong",
                f"{exercise.name}: this looks like a known mistake: {mistake.name}.\n{mistake.why}",
                mistake.name,
            )
    first = agrees.index(False)
    return Verdict(
        "wrong",
        f"{exercise.name} is not right on {agrees.count(False)} of {len(cases)} cases. The first is case"
        f" {first + 1}, {describe_call(cases[first])}:\n"
        f"{difference(outputs[first], expected[first], exercise.tolerance)}",
    )


def _not_attempted(exercise: Exercise) -> Verdict:
    return Verdict(
        "not attempted", f"{exercise.name}: not attempted yet. Fill in the stub and run the cell again."
    )


def _changed_input(exercise: Exercise, number: int, given: tuple, args: tuple) -> Verdict:
    """The verdict on a function that turned the arguments `args` of a case into `given`."""
    parameters = inspect.signature(exercise.reference).parameters
    changed = [name for name, a, b in zip(parameters, given, args) if not same(a, b, 0)]
    return Verdict(
        "wrong",
        f"{exercise.name} changed its input `{', '.join(changed)}` in place (case {number}). Whoever"
        " calls it still needs that value: work on a copy, or use an operation that returns a new"
        " tensor (x = x + 1, masked_fill instead of masked_fill_).",
    )


_CRASHED = object()  # equal to nothing


def _outputs(function: Callable, cases: Sequence[tuple]) -> list[Any]:
    outputs = []
    for args in cases:
        try:
            outputs.append(function(*copy.deepcopy(args)))
        except Exception:
            outputs.append(_CRASHED)
    return outputs


def untouched(function: Callable) -> bool:
    """Whether the body is nothing but a docstring, `...` or `pass`."""
    code = function.__code__
    trivial = (_ellipsis, _pass, _documented, lambda: ..., lambda: None)
    constants = [c for c in code.co_consts if c is not None and c is not ... and not isinstance(c, str)]
    return not constants and code.co_code in [body.__code__.co_code for body in trivial]


def _ellipsis() -> None: ...


def _pass() -> None:
    pass


def _documented() -> None:
    """A docstring."""


def random_int(generator: torch.Generator, low: int, high: int) -> int:
    """A random number from `low` up to, not including, `high`, for an exercise's cases."""
    return int(torch.randint(low, high, (1,), generator=generator))


def describe_call(args: tuple) -> str:
    """A case's arguments, short enough to read."""
    described = [f"tensor {short(a)}" if isinstance(a, torch.Tensor) else short(a) for a in args]
    return f"called with {', '.join(described)}"


def _where(error: Exception, function: Callable) -> str:
    """The learner's own line that failed, and the error."""
    file = function.__code__.co_filename
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = ""
    if frames and frames[-1].line:
        line = f"  line {frames[-1].lineno}: {frames[-1].line}\n"
    return f"{line}  {type(error).__name__}: {error}"


# ---- a week's exercises, and what is solved


class Week:
    """The exercises of a week, by its number; see the module's docstring for how they are used."""

    def __init__(self, number: int, progress: Path = PROGRESS):
        folders = sorted((ROOT / "weeks").glob(f"{number:02d}_*/exercises.py"))
        if not folders:
            every = sorted((ROOT / "weeks").glob("*/exercises.py"))
            numbers = ", ".join(str(int(path.parent.name[:2])) for path in every)
            raise ValueError(f"week {number} has no exercises; weeks that do: {numbers}")
        self.number = number
        self.folder = folders[0].parent
        self._progress = progress
        module = _load(folders[0], f"exercises_{number:02d}")
        self.exercises: dict[str, Exercise] = {exercise.name: exercise for exercise in module.EXERCISES}
        self._hints: dict[str, int] = {}  # how many were shown, by exercise

    def _find(self, name: str) -> Exercise:
        if name not in self.exercises:
            raise ValueError(
                f"week {self.number} has no exercise {name!r}; there are: {', '.join(self.exercises)}"
            )
        return self.exercises[name]

    def task(self, name: str) -> None:
        """Shows what to write."""
        exercise = self._find(name)
        print(f"{textwrap.fill(' '.join(exercise.task.split()), 100)}\n\n{exercise.stub}")

    def hint(self, name: str) -> None:
        """Shows the next hint: three, from a nudge to nearly the answer."""
        exercise = self._find(name)
        shown = min(self._hints.get(name, 0), 2)
        self._hints[name] = shown + 1
        print(f"Hint {shown + 1} of 3: {exercise.hints[shown]}")

    def check(self, function: Callable) -> None:
        """Grades `function` as the exercise of its name, prints the verdict, and remembers a solved one."""
        verdict = grade(self._find(function.__name__), function)
        print(verdict.message)
        if verdict.status == "solved":
            self._remember(function.__name__)

    def _remember(self, name: str) -> None:
        solved = read_progress(self._progress)
        if name not in solved.setdefault(str(self.number), []):
            solved[str(self.number)].append(name)
            write_json(self._progress, solved)

    def solved(self) -> list[str]:
        """Names of the exercises solved so far, in this sitting or an earlier one."""
        kept = read_progress(self._progress).get(str(self.number), [])
        return [name for name in self.exercises if name in kept]


def read_progress(path: Path = PROGRESS) -> dict[str, list[str]]:
    """Solved exercises by week number."""
    return read_json(path) if path.exists() else {}


def _load(path: Path, name: str) -> ModuleType:
    """A Python file as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str]) -> None:
    """`week N`: grades that week's solutions.py, which is first written with the stubs if it isn't there."""
    if len(argv) != 2 or argv[0] != "week" or not argv[1].isdigit():
        raise ValueError("usage: python -m shared.course.exercise week N")
    week = Week(int(argv[1]))
    path = week.folder / "solutions.py"
    if not path.exists():
        _write_stubs(week, path)
    try:
        solutions = _load(path, "solutions")
    except Exception as error:
        raise ValueError(f"{path.relative_to(ROOT)} does not run: {type(error).__name__}: {error}") from None
    for name in week.exercises:
        if hasattr(solutions, name):
            week.check(getattr(solutions, name))
        else:
            print(f"{name}: not in {path.name}")
    print(f"\nweek {week.number}: {len(week.solved())} of {len(week.exercises)} solved")


def _write_stubs(week: Week, path: Path) -> None:
    stubs = []
    for exercise in week.exercises.values():
        task = textwrap.fill(" ".join(exercise.task.split()), 110, subsequent_indent="# ")
        stubs.append(f"# {task}\n{exercise.stub}")
    path.write_text(SOLUTIONS_HEAD + "\n\n".join(stubs), encoding="utf-8")
    where = path.relative_to(ROOT)
    print(f"wrote {where} with {len(stubs)} stubs: fill them in, then run the same command again")


if __name__ == "__main__":
    with errors_for_people():
        main(sys.argv[1:])
