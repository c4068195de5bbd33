"""Week 0. The exercises on the command line, with all that the notebook has.

python -m shared.course.exercise 3                   # writes week 3's stubs to solutions.py; then grades them
python -m shared.course.exercise task causal_attention
python -m shared.course.exercise hint causal_attention
python -m shared.course.exercise case causal_attention
python -m shared.course.exercise solution causal_attention
python -m shared.course.exercise grade --json        # for teachers: a row for each exercise of all weeks
"""

import difflib
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from shared.commandline import errors_for_people, parse_args
from shared.course.exercise.answers import load_module, source_of
from shared.course.exercise.definition import Exercise
from shared.course.exercise.grading import grade
from shared.course.exercise.verdict import Verdict
from shared.course.exercise.week import Week, path_of_solutions, week_numbers
from shared.course.runs import relative

SOLUTIONS_HEAD = """import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


"""
"""What a new solutions.py begins with."""
ALSO_IMPORTED = {"GPTConfig": "\nfrom shared.models.gpt import GPTConfig"}
"""What it imports besides where a stub names it."""
COMMANDS = ("task", "hint", "solution", "case", "grade")


@dataclass(frozen=True)
class GradeSettings:
    """Grades answers for a teacher, without keeping or changing anything."""

    weeks: tuple[int, ...] = ()
    """None given: all."""
    solutions: Path | None = None
    """A folder that holds NN_topic/solutions.py or NN_topic/NAME.py, such as a student's repository or kept
    answers. None: what was solved here.
    """
    seed: int = 0
    """Of the cases: one that students do not know shows answers that only fit those they have seen."""
    json: bool = False
    """One JSON object a row."""


def main(argv: Sequence[str]) -> None:
    """Does what the words of the command line ask for. Raises ValueError where they ask for nothing known."""
    words = list(argv)
    if len(words) == 2 and words[0] == "week":  # as the command was spelled before
        words = words[1:]
    if words and words[0].isdigit() and len(words) == 1:
        grade_solutions(Week(int(words[0])))
    elif words and words[0] == "grade":
        grade_for_teacher(parse_args(GradeSettings, _weeks_as_flag(words[1:]), GradeSettings.__doc__))
    elif len(words) >= 2 and words[0] in COMMANDS and not words[1].startswith("-"):
        show_exercise(words[0], words[1], reveal=_reveals(words[2:]))
    else:
        raise ValueError(_usage(words))


def _usage(words: Sequence[str]) -> str:
    given = f"{' '.join(words)!r} is no command; " if words else ""
    return (
        f"{given}give a week's number (python -m shared.course.exercise 3), or one of task, hint, case and"
        " solution with an exercise's name, or grade"
    )


def _weeks_as_flag(words: Sequence[str]) -> list[str]:
    """`grade 1 2` as `grade --weeks 1 2`."""
    return ["--weeks", *words] if words and words[0].isdigit() else list(words)


def _reveals(words: Sequence[str]) -> bool:
    if words and list(words) != ["--reveal"]:
        raise ValueError(f"{' '.join(words)!r} is not understood here; there is --reveal, for solution")
    return bool(words)


def show_exercise(command: str, name: str, reveal: bool = False) -> None:
    """The task, the next hint, a case or the solution of an exercise of any week."""
    week = _week_of(name)
    if command == "task":
        week.task(name)
    elif command == "hint":
        week.hint(name)
    elif command == "solution":
        week.solution(name, reveal=reveal)
    else:
        _find_failing_case(week, name)
        print(week.case(name))


def _week_of(name: str) -> Week:
    weeks = [Week(number) for number in week_numbers()]
    for week in weeks:
        if name in week.exercises:
            return week
    every = [exercise for week in weeks for exercise in week.exercises]
    near = difflib.get_close_matches(name, every, n=3)
    hint = f"; do you mean {', '.join(near)}?" if near else f"; there are: {', '.join(every)}"
    raise ValueError(f"no week has an exercise {name!r}{hint}")


def _find_failing_case(week: Week, name: str) -> None:
    """Grades the exercise in solutions.py, if it is there, so that its failing case is known."""
    path = path_of_solutions(week)
    answer = getattr(load_module(path, "solutions"), name, None) if path.exists() else None
    if answer is not None:
        week.remember(grade(week.exercises[name], answer, source=source_of(answer)), answer)


# ---- a learner's file


def grade_solutions(week: Week) -> None:
    """Grades the week's solutions.py, which is first written with the stubs if it isn't there."""
    path = path_of_solutions(week)
    if not path.exists():
        write_stubs(week, path)
        return
    solutions = load_module(path, "solutions")
    counted: Counter[str] = Counter()
    for name, exercise in week.exercises.items():
        answer = getattr(solutions, name, None)
        if answer is None:
            counted["missing"] += 1
            print(f"{name}: not in {path.name}{_renamed(exercise, vars(solutions))}")
            continue
        verdict = grade(exercise, answer, source=source_of(answer))
        counted[verdict.status] += 1
        print("\n".join([verdict.message, *week.remember(verdict, answer)]))
    words = [f"{counted[status]} {status}" for status in ("solved", "wrong", "not attempted", "missing")]
    print(f"\nweek {week.number}: of {len(week.exercises)} exercises in {relative(path)}: {', '.join(words)}")
    if len(week.solved()) > counted["solved"]:
        print(f"With those that you solved elsewhere, in the notebook, {len(week.solved())} are solved.")


def _renamed(exercise: Exercise, names: dict[str, object]) -> str:
    """A name in the file that may be the exercise's, misspelled."""
    near = difflib.get_close_matches(exercise.name, [n for n, v in names.items() if callable(v)], n=1)
    return f"; is it {near[0]}? The exercise's name is wanted" if near else ""


def write_stubs(week: Week, path: Path) -> None:
    """A new solutions.py: each task as a comment, and its stub."""
    stubs = []
    for exercise in week.exercises.values():
        task = textwrap.fill(
            " ".join(exercise.task.split()), 100, initial_indent="# ", subsequent_indent="# "
        )
        stubs.append(f"{task}\n{exercise.stub}")
    text = "\n\n".join(stubs)
    also = [line for name, line in ALSO_IMPORTED.items() if name in text]
    head = "\n".join([SOLUTIONS_HEAD.rstrip(), *also])
    path.write_text(f"{head}\n\n\n{text}", encoding="utf-8")
    print(f"wrote {relative(path)} with {len(stubs)} stubs: fill them in, then run the same command again")


# ---- a teacher's table


def grade_for_teacher(settings: GradeSettings) -> None:
    """A row for each exercise: its week, what became of it, and the points."""
    rows = []
    earned = possible = 0
    for number in settings.weeks or week_numbers():
        week = Week(number)
        for exercise in week.exercises.values():
            with redirect_stdout(StringIO()):  # what an answer prints is no row
                verdict = _graded(week, exercise, settings)
            points = exercise.points if verdict.status == "solved" else 0
            earned += points
            possible += exercise.points
            rows.append(
                {
                    "week": number,
                    "exercise": exercise.name,
                    "status": verdict.status,
                    "points": points,
                    "of": exercise.points,
                    "kind": verdict.kind,
                    "says": verdict.says if verdict.status == "wrong" else "",
                }
            )
    for row in rows:
        text = (
            json.dumps(row)
            if settings.json
            else f"week {row['week']:<3} {row['exercise']:40} {row['status']}"
        )
        print(text)
    if not settings.json:
        print(f"{earned} of {possible} points")


def _graded(week: Week, exercise: Exercise, settings: GradeSettings) -> Verdict:
    folder = settings.solutions or week.shelf.folder.parent
    missing = Verdict(exercise.name, "not attempted", "no file has it.")
    for path in (
        folder / week.folder.name / f"{exercise.name}.py",
        folder / week.folder.name / "solutions.py",
    ):
        if not path.exists():
            continue
        try:
            answer = getattr(load_module(path, "solutions"), exercise.name, None)
        except ValueError as error:
            return Verdict(exercise.name, "wrong", str(error), kind="crash")
        if answer is not None:
            return grade(exercise, answer, settings.seed, source_of(answer))
    return missing


if __name__ == "__main__":
    with errors_for_people():
        main(sys.argv[1:])
