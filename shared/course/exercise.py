"""Week 0. Graded exercises: compares a learner's function with a reference, and says which known mistake it
makes.

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
import json
import math
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.commandline import errors_for_people
from shared.runtime import ROOT, write_json

PROGRESS = ROOT / "weeks" / ".progress.json"


@dataclass(frozen=True)
class Mistake:
    """A wrong version that learners really write."""

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
        signature = str(inspect.signature(self.reference)).replace(
            "numpy.", "np."
        )  # the name that it is imported under
        return f"def {self.name}{signature}:\n    ...  # your code here\n"


@dataclass(frozen=True)
class Verdict:
    """What `grade` says. status: "solved", "not attempted" or "wrong"."""

    status: str
    message: str
    mistake: str | None = None
    """The name of the known mistake that the function makes."""


def grade(exercise: Exercise, function: Callable, seed: int = 0) -> Verdict:
    """Runs `function` on the exercise's cases beside the reference. The inputs are copies, so nothing it does
    can reach a later case.
    """
    if untouched(function):
        return Verdict(
            "not attempted", f"{exercise.name}: not attempted yet. Fill in the stub and run the cell again."
        )
    cases = list(exercise.cases(torch.Generator().manual_seed(seed)))
    outputs = []
    for number, args in enumerate(cases, 1):
        given = copy.deepcopy(args)
        try:
            output = function(*given)
        except NotImplementedError:
            return Verdict(
                "not attempted",
                f"{exercise.name}: not attempted yet. Fill in the stub and run the cell again.",
            )
        except Exception as error:
            return Verdict(
                "wrong",
                f"{exercise.name} crashed on case {number},"
                f" {describe_call(args)}:\n{_where(error, function)}",
            )
        outputs.append(output)
        if not same(given, args, 0):
            which = [
                n
                for n, a, b in zip(inspect.signature(exercise.reference).parameters, given, args)
                if not same(a, b, 0)
            ]
            return Verdict(
                "wrong",
                f"{exercise.name} changed its input `{', '.join(which)}` in place (case {number}). Whoever"
                " calls it still needs that value: work on a copy, or use an operation that returns a new"
                " tensor (x = x + 1, masked_fill instead of masked_fill_).",
            )
    expected = [exercise.reference(*copy.deepcopy(args)) for args in cases]
    wrong = [i for i, (o, e) in enumerate(zip(outputs, expected)) if not same(o, e, exercise.tolerance)]
    if not wrong:
        return Verdict(
            "solved", f"{exercise.name}: solved. It agrees with the reference on all {len(cases)} cases."
        )
    for mistake in exercise.mistakes:
        if all(same(o, e, exercise.tolerance) for o, e in zip(outputs, _outputs(mistake.function, cases))):
            return Verdict(
                "wrong",
                f"{exercise.name}: this looks like a known mistake: {mistake.name}.\n{mistake.why}",
                mistake.name,
            )
    i = wrong[0]
    return Verdict(
        "wrong",
        f"{exercise.name} is not right on {len(wrong)} of {len(cases)} cases. The first is case {i + 1},"
        f" {describe_call(cases[i])}:\n{difference(outputs[i], expected[i], exercise.tolerance)}",
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
    empty = (
        (lambda: ...).__code__.co_code,
        (lambda: None).__code__.co_code,
        _empty.__code__.co_code,
        _documented.__code__.co_code,
    )
    return code.co_code in empty and all(c is None or c is ... or isinstance(c, str) for c in code.co_consts)


def _empty() -> None: ...


def _documented() -> None:
    """A docstring."""


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Equal in type, shape and value, floats within `tolerance` (relative and absolute; nan equals nan)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        )
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return (
            a == b
            or math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
            or (math.isnan(a) and math.isnan(b))
        )
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if callable(a) and callable(b):
        return a is b or type(a) is type(b)
    return type(a) is type(b) and a == b


def difference(given: Any, expected: Any, tolerance: float = 1e-5) -> str:
    """What is wrong with `given`, in a sentence that helps: missing, type, shape, dtype, not finite, or
    values.
    """
    if given is None:
        return "it returned None: is the `return` missing?"
    if isinstance(expected, torch.Tensor):
        if not isinstance(given, torch.Tensor):
            return f"expected a tensor {_short(expected)}, got {_short(given)}."
        if given.shape != expected.shape:
            help = ""
            if sorted(given.shape) == sorted(expected.shape):
                help = " The sizes are right but in another order: a transpose is missing, or one too many."
            elif given.numel() == expected.numel():
                help = " The number of elements is right: a view or reshape at the end is missing."
            elif given.dim() < expected.dim():
                help = " A dimension is gone: keepdim=True, or an index where a slice is needed?"
            return f"expected shape {list(expected.shape)}, got {list(given.shape)}.{help}"
        if given.dtype != expected.dtype:
            return f"the shape is right, but the dtype is {given.dtype} and should be {expected.dtype}."
        if expected.is_floating_point() and expected.isfinite().all() and not given.isfinite().all():
            return (
                "the result has nan or inf in it: a division by zero, a log of zero, or a softmax over a row"
                " that is all -inf?"
            )
        close = tolerance if expected.is_floating_point() else 0
        wrong = ~torch.isclose(given.double(), expected.double(), rtol=close, atol=close, equal_nan=True)
        off = (given.double() - expected.double()).abs().nan_to_num(math.inf).masked_fill(~wrong, 0)
        place = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
        bad = int(wrong.sum())
        at = f" at {list(place)}" if place else ""
        return (
            f"shape and dtype are right, but {bad} of {off.numel()} values differ, most{at}:"
            f" {given[place].item():.6g}, expected {expected[place].item():.6g}."
        )
    if type(given) is not type(expected) and not (
        isinstance(given, (int, float)) and isinstance(expected, (int, float))
    ):
        return (
            f"expected {type(expected).__name__} {_short(expected)}, got {type(given).__name__}"
            f" {_short(given)}."
        )
    if isinstance(expected, (list, tuple)):
        if len(given) != len(expected):
            return (
                f"expected {len(expected)} items, got {len(given)}: {_short(given)} instead of"
                f" {_short(expected)}."
            )
        i = next(i for i, (g, e) in enumerate(zip(given, expected)) if not same(g, e, tolerance))
        return f"item {i}: {difference(given[i], expected[i], tolerance)}"
    return f"expected {_short(expected)}, got {_short(given)}."


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        if value.numel() <= 8:
            return (
                f"{[round(v, 4) if isinstance(v, float) else v for v in value.flatten().tolist()]} of shape"
                f" {list(value.shape)}"
            )
        return f"of shape {list(value.shape)}, {value.dtype}"
    return textwrap.shorten(repr(value), 120)


def describe_call(args: tuple) -> str:
    """A case's arguments, short enough to read."""
    return "called with " + ", ".join(
        "tensor " + _short(a) if isinstance(a, torch.Tensor) else _short(a) for a in args
    )


def _where(error: Exception, function: Callable) -> str:
    """The learner's own line that failed, and the error."""
    mine = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename == function.__code__.co_filename
    ]
    line = f"  line {mine[-1].lineno}: {mine[-1].line}\n" if mine and mine[-1].line else ""
    return f"{line}  {type(error).__name__}: {error}"


# ---- a week's exercises, and what is solved


class Week:
    """The exercises of a week, by its number; see the module's docstring for how they are used."""

    def __init__(self, number: int, progress: Path = PROGRESS):
        folders = sorted((ROOT / "weeks").glob(f"{number:02d}_*/exercises.py"))
        if not folders:
            have = [int(p.parent.name[:2]) for p in sorted((ROOT / "weeks").glob("*/exercises.py"))]
            raise ValueError(f"week {number} has no exercises; weeks that do: {', '.join(map(str, have))}")
        self.number, self.folder, self._progress = number, folders[0].parent, progress
        spec = importlib.util.spec_from_file_location(f"exercises_{number:02d}", folders[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.exercises: dict[str, Exercise] = {e.name: e for e in module.EXERCISES}
        self._hints: dict[str, int] = {}

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
        """Grades `function` as the exercise of its name, says what came out, and remembers a solved one."""
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
    return json.loads(path.read_text()) if path.exists() else {}


def main(argv: list[str]) -> None:
    """`week N`: grade that week's solutions.py, or write it with the stubs."""
    if len(argv) != 2 or argv[0] != "week" or not argv[1].isdigit():
        raise ValueError("usage: python -m shared.course.exercise week N")
    week = Week(int(argv[1]))
    path = week.folder / "solutions.py"
    if not path.exists():
        parts = [
            f"# {textwrap.fill(' '.join(e.task.split()), 110, subsequent_indent='# ')}\n{e.stub}"
            for e in week.exercises.values()
        ]
        path.write_text(
            "import math\n\nimport numpy as np\nimport torch\nimport torch.nn.functional as F\n\n\n"
            + "\n\n".join(parts),
            encoding="utf-8",
        )
        print(
            f"wrote {path.relative_to(ROOT)} with {len(parts)} stubs: fill them in, then run the same command"
            " again"
        )
    spec = importlib.util.spec_from_file_location("solutions", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path.relative_to(ROOT)} does not run: {type(error).__name__}: {error}") from None
    for name in week.exercises:
        if hasattr(module, name):
            week.check(getattr(module, name))
        else:
            print(f"{name}: not in {path.name}")
    print(f"\nweek {week.number}: {len(week.solved())} of {len(week.exercises)} solved")


if __name__ == "__main__":
    with errors_for_people():
        main(sys.argv[1:])
