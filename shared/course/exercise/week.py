"""Week 0. A week's exercises as a notebook uses them: tasks, checks, hints, and the learner's own code."""

import ast
import inspect
import os
import re
import sys
import textwrap
from html import escape
from pathlib import Path
from typing import Any

from shared.course.exercise.answers import Shelf, load_module, module_source, source_of
from shared.course.exercise.definition import Answer, Exercise
from shared.course.exercise.grading import grade, readable_case
from shared.course.exercise.verdict import Case, Verdict, as_html, box
from shared.extras import needs
from shared.runtime import ROOT

HINTS = 3
ITEM = r"(?:-|\d+\.) "
"""How an item of a list begins."""
EARLIER = ROOT / "weeks" / ".progress.json"
"""Where the course noted what is solved before it kept answers."""


def week_numbers() -> list[int]:
    """The weeks that have exercises."""
    return [int(path.parent.name[:2]) for path in sorted((ROOT / "weeks").glob("*/exercises.py"))]


def exercise_names(folder: Path) -> list[str]:
    """The names of a week's exercises, in order, read from its exercises.py without running it."""
    tree = ast.parse((folder / "exercises.py").read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if not isinstance(target, ast.Name):
            continue
        if target.id == "EXERCISES" and isinstance(value, ast.Tuple):
            return [names[item.id] for item in value.elts if isinstance(item, ast.Name)]
        if isinstance(value, ast.Call):
            for keyword in value.keywords:
                if keyword.arg == "reference" and isinstance(keyword.value, ast.Name):
                    names[target.id] = keyword.value.id
    raise ValueError(f"{folder / 'exercises.py'} has no tuple EXERCISES")


def solved_exercises(folder: Path) -> list[str]:
    """The names of a week's exercises that are solved; none of its code is run."""
    shelf = Shelf(folder.name)
    return [name for name in exercise_names(folder) if shelf.is_solved(name)]


class Week:
    """The exercises of a week, by its number; see the package's docstring for how they are used."""

    def __init__(self, number: int):
        folders = sorted((ROOT / "weeks").glob(f"{number:02d}_*/exercises.py"))
        if not folders:
            raise ValueError(
                f"week {number} has no exercises; weeks that do: {', '.join(map(str, week_numbers()))}"
            )
        self.number = number
        self.folder = folders[0].parent
        self.shelf = Shelf(self.folder.name)
        if not os.environ.get("LLM_WEEKS_ANSWERS"):
            self.shelf.adopt(EARLIER, str(number))
        module = load_module(folders[0], f"exercises_{number:02d}")
        self.exercises: dict[str, Exercise] = {exercise.name: exercise for exercise in module.EXERCISES}
        self._mine: dict[str, Answer] = {}
        """What was solved in this process."""
        self._cases: dict[str, Case] = {}
        """Where each answer failed last."""

    def find(self, name: str) -> Exercise:
        """The exercise of that name. Raises ValueError with the names there are."""
        if name not in self.exercises:
            raise ValueError(
                f"week {self.number} has no exercise {name!r}; there are: {', '.join(self.exercises)}"
            )
        return self.exercises[name]

    # ---- what a learner asks for

    def task(self, name: str) -> None:
        """Shows what to write."""
        draw_or_print(*self._task(self.find(name)))

    def hint(self, name: str) -> None:
        """Shows the next hint: three, from a nudge to nearly the answer; then where the solution is."""
        exercise = self.find(name)
        shown = self.shelf.hints(name)
        self.shelf.hinted(name, min(shown + 1, HINTS + 1))
        if shown < HINTS:
            text = f"Hint {shown + 1} of {HINTS}: {exercise.hints[shown]}"
        else:
            text = f"Those were all hints. {self._how('solution', name)} shows a solution."
        draw_or_print(text, box(text, "not attempted"))

    def check(self, answer: Answer, name: str | None = None) -> None:
        """Grades an answer as the exercise of its name, and shows the verdict.

        name: for an answer that has no name of its own. One that is solved is kept (see answers.py); a wrong
        one takes the mark of an earlier right one away, a stub does not.
        """
        name = name or self._name_of(answer)
        exercise = self.find(name)
        verdict = grade(exercise, answer, source=source_of(answer))
        notes = self.remember(verdict, answer)
        text = "\n".join([verdict.message, *notes, self._standing(name)])
        html = verdict.html() + "".join(f"<p>{escape(note)}</p>" for note in notes)
        if verdict.status != "solved":
            html += self._hints_to_open(exercise)
        draw_or_print(text, html + self._bar(name))

    def case(self, name: str) -> Case:
        """The smallest case on which the last check failed, to try by hand; before any, one that is easy to
        read: `case = week.case("count_pairs"); count_pairs(*case.arguments)`.

        That call is for functions. A class, or an update that needs models, cannot be called so: `case.given`
        has by name what the grader makes them from.
        """
        exercise = self.find(name)
        if exercise.lacking:
            raise ValueError(f"{name} has no case to show on this machine: {exercise.lacking}")
        return self._cases.get(name) or readable_case(exercise)

    def solution(self, name: str, reveal: bool = False) -> None:
        """Shows a clean solution with a word on why, once the exercise is solved or its hints are used up.

        reveal: shows it in any case.
        """
        exercise = self.find(name)
        if not (reveal or self.shelf.is_solved(name) or self.shelf.hints(name) >= HINTS):
            text = (
                f"`{name}` is not solved, and {self.shelf.hints(name)} of {HINTS} hints are used. Try them"
                f" first: {self._how('hint', name)}. {self._how('solution', name, 'reveal')} shows it all the"
                " same."
            )
            draw_or_print(text, box(text, "not attempted"))
            return
        why, source = self.solution_of(exercise)
        text = f"{why}\n\n```python\n{source}\n```" if why else f"```python\n{source}\n```"
        draw_or_print(f"{why}\n\n{source}", box(text, "solved"))

    def mine(self, name: str) -> Any:
        """The learner's own function or class, once it is solved, else the course's; a line says which."""
        exercise = self.find(name)
        if name in self._mine:
            print(f"{name}: yours")
            return self._mine[name]
        if self.shelf.is_solved(name):
            try:
                kept = self.shelf.load(name)
            except ValueError as error:
                print(f"{name}: the course's ({error})")
                return exercise.reference
            print(f"{name}: yours, as you solved it before")
            return kept
        print(f"{name}: the course's, until yours is solved")
        return exercise.reference

    def solved(self) -> list[str]:
        """Names of the exercises solved so far, in this sitting or an earlier one."""
        return [name for name in self.exercises if self.shelf.is_solved(name)]

    # ---- what the command line shares

    def remember(self, verdict: Verdict, answer: Answer) -> list[str]:
        """Keeps what a verdict changes, and says what it changed, in sentences."""
        name = verdict.exercise
        if verdict.case is not None:
            self._cases[name] = verdict.case
        if verdict.status == "solved":
            self._mine[name] = answer
            self._cases.pop(name, None)
            reason = self.shelf.solve(name, answer)
            if reason is not None:
                return [f"It counts, but it cannot be kept for later: {reason}."]
            return []
        if verdict.status == "not attempted":
            if self.shelf.is_solved(name):
                return [f"You solved it before, and it stays solved.{self._whereabouts(name)}"]
            return []
        self._mine.pop(name, None)
        if self.shelf.lose(name):
            return [f"It was solved before, and now is not.{self._whereabouts(name)}"]
        return []

    def _whereabouts(self, name: str) -> str:
        """Where the last right answer is, as a sentence after a space; empty where its source wasn't kept."""
        file = self.shelf.file(name)
        return f" Your last right answer is in {file}." if file.exists() else ""

    def solution_of(self, exercise: Exercise) -> tuple[str, str]:
        """A word on why, and the source of a clean solution, from the week's answers.py."""
        path = self.folder / "answers.py"
        answers = load_module(path, f"answers_{self.number:02d}")
        answer = getattr(answers, exercise.name)
        why = inspect.getdoc(answer) or ""
        source = module_source(exercise.name, answer)
        return " ".join(why.split()), _without_docstring(source, why)

    def _task(self, exercise: Exercise) -> tuple[str, str]:
        text = _a_line_each(exercise.task)
        if exercise.differentiable:
            text += " Gradients must flow through it to its inputs."
        if exercise.forbids:
            text += f" Not allowed here: {', '.join(f'`{name}`' for name in exercise.forbidden_names)}."
        wrapped = (textwrap.fill(line, 88, subsequent_indent=_hanging(line)) for line in text.split("\n"))
        return "\n".join([*wrapped, "", exercise.stub]), box(text, "not attempted")

    def _name_of(self, answer: Answer) -> str:
        """The exercise that an answer is for: by its own name, or the name that the notebook has for it."""
        own = getattr(answer, "__name__", "")
        if own in self.exercises:
            return own
        caller = sys._getframe(2).f_globals
        bound = [name for name in self.exercises if name in caller and caller[name] is answer]
        if len(bound) == 1:
            return bound[0]
        if not callable(answer):
            raise ValueError(
                f"check takes a function or a class itself, without calling it, and this is"
                f" {type(answer).__name__}: week.check({next(iter(self.exercises))})"
            )
        called = own or type(answer).__name__
        raise ValueError(
            f"week {self.number} has no exercise {called!r}; there are: {', '.join(self.exercises)}. An"
            ' answer with another name is checked with it: week.check(answer, "name")'
        )

    def _how(self, what: str, name: str, option: str = "") -> str:
        """How a learner asks for something, where she is."""
        if in_notebook():
            return f'`week.{what}("{name}"{f", {option}=True" if option else ""})`'
        return f"`python -m shared.course.exercise {what} {name}{f' --{option}' if option else ''}`"

    def _standing(self, name: str) -> str:
        """How many are solved, and which is next."""
        solved = self.solved()
        text = f"Week {self.number}: {len(solved)} of {len(self.exercises)} solved."
        following = [other for other in self.exercises if other not in solved and other != name]
        return f"{text} Next: {following[0]}." if following and name in solved else text

    def _hints_to_open(self, exercise: Exercise) -> str:
        """The hints, each opened by a click, and after them the way to the solution."""
        last = f'<p>After these: <code>week.solution("{exercise.name}", reveal=True)</code></p>'
        for number in range(HINTS, 0, -1):
            hint = as_html(exercise.hints[number - 1])
            last = f"<details><summary>Hint {number} of {HINTS}</summary>{hint}{last}</details>"
        return last

    def _bar(self, name: str) -> str:
        """The week's progress as a bar."""
        share = 100 * len(self.solved()) / len(self.exercises)
        return (
            '<div style="background:rgba(127,127,127,.25);height:6px;border-radius:3px;max-width:20em">'
            f'<div style="background:#1a7f37;height:6px;border-radius:3px;width:{share:.0f}%"></div></div>'
            f"<small>{escape(self._standing(name))}</small>"
        )


def _a_line_each(task: str) -> str:
    """A task's Markdown with each paragraph, and each item of a list, on one line."""
    parts = []
    for part in re.split(r"\n\s*\n", inspect.cleandoc(task)):
        items = re.split(rf"\n(?={ITEM})", part) if re.match(ITEM, part) else [part]
        parts.append("\n".join(" ".join(item.split()) for item in items))
    return "\n\n".join(parts)


def _hanging(line: str) -> str:
    """The indent below the first line of a list's item; nothing for a paragraph."""
    marker = re.match(ITEM, line)
    return " " * len(marker[0]) if marker else ""


def _without_docstring(source: str, why: str) -> str:
    """The solution without the words that are shown above it."""
    for quoted in (f'    """{why}"""\n', f'    """{textwrap.indent(why, "    ").strip()}\n    """\n'):
        source = source.replace(quoted, "")
    return source.strip()


def draw_or_print(text: str, html: str) -> None:
    """Draws HTML in a notebook, and prints the text anywhere else."""
    text, html = (words.encode("utf-8", "backslashreplace").decode("utf-8") for words in (text, html))
    if in_notebook():
        with needs("course"):
            from IPython.display import display

        display({"text/html": html, "text/plain": text}, raw=True)
    else:
        print(text)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; IPython in a terminal cannot draw."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def path_of_solutions(week: Week) -> Path:
    """The file that the command line grades."""
    return week.folder / "solutions.py"
