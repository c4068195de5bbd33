"""Week 0. The learner's own copies of the lessons, and the page that JupyterLab opens on.

    python -m shared.course notebooks              # JupyterLab, with lessons as weeks/*/my_notebook.ipynb
    python -m shared.course notebooks --fresh 3    # week 3's lesson anew, with your answers filled in

A copy is hers: git does not track it, so `git pull` brings new lessons and never meets her work. What she has
solved is kept elsewhere (see `exercise/answers.py`), and is put into a new copy in place of the stubs.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from shared.course.exercise.week import Week, exercise_names, solved_exercises
from shared.course.runs import TOPICS, relative, week_results
from shared.runtime import ROOT, read_json, write_atomically

LESSON = "notebook.ipynb"
COPY = "my_notebook.ipynb"
START = Path("weeks/start.md")
LAB_SETTINGS = Path(__file__).parent / "lab_settings"
"""JupyterLab's own settings for the course: Markdown opens as a page, and nobody is asked about news."""
ORIGIN = "llm_weeks_lesson"
"""In a copy's metadata: the sum of the lesson that it was made from."""


@dataclass(frozen=True)
class Notebooks:
    """Opens the lessons in JupyterLab, each as a copy of your own."""

    fresh: tuple[int, ...] = ()
    """Weeks whose copy is made anew from the present lesson; the old one is kept beside it."""
    browser: bool = True
    """Open the browser. Without it, JupyterLab's address is printed."""
    allow_root: bool = False
    """Run as root, as in a container, which JupyterLab refuses otherwise."""


def notebooks(settings: Notebooks) -> None:
    """Makes the copies that are missing and the start page, and runs JupyterLab until it is stopped.

    Raises ValueError, with the cure, where JupyterLab does not run and the user is root.
    """
    for topic in TOPICS:
        copy_lesson(topic, anew=int(topic[:2]) in settings.fresh)
    write_atomically(ROOT / START, start_page())
    command = [
        *(sys.executable, "-m", "jupyter", "lab"),
        f"--LabApp.default_url=/lab/tree/{START.as_posix()}",
        f"--LabApp.app_settings_dir={LAB_SETTINGS}",
    ]
    if not settings.browser:
        command.append("--no-browser")
    if settings.allow_root:
        command.append("--allow-root")
    exit_status = subprocess.run(command, cwd=ROOT).returncode
    if exit_status and is_root() and not settings.allow_root:
        raise ValueError(
            "JupyterLab does not run as root. In a container, where that is no danger:"
            f" {sys.executable} -m shared.course notebooks --allow-root --no-browser"
        )
    if exit_status:  # JupyterLab has said why
        raise SystemExit(exit_status)


def is_root() -> bool:
    """Whether this process may do everything; never on Windows, which has no such user."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def copy_lesson(topic: str, anew: bool = False) -> Path:
    """The learner's copy of a week's lesson, made if it is missing, or anew.

    An old copy that gives way is kept, with the day in its name. Solved exercises are filled in.
    """
    folder = ROOT / "weeks" / topic
    copy = folder / COPY
    if copy.exists() and not anew:
        return copy
    if copy.exists():
        kept = copy.with_name(f"my_notebook_until_{datetime.now():%Y-%m-%d_%H%M%S}.ipynb")
        copy.rename(kept)
        print(f"{topic}: your earlier notebook is kept as {relative(kept)}")
    lesson = read_json(folder / LESSON)
    lesson["metadata"][ORIGIN] = lesson_sum(topic)
    _fill_in(lesson, Week(int(topic[:2])))
    write_atomically(copy, json.dumps(lesson, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return copy


def lesson_sum(topic: str) -> str:
    """A short sum of a lesson, which tells whether a copy was made from the present one."""
    return hashlib.sha256((ROOT / "weeks" / topic / LESSON).read_bytes()).hexdigest()[:16]


def is_outdated(topic: str) -> bool:
    """Whether the lesson has changed since the learner's copy was made."""
    copy = ROOT / "weeks" / topic / COPY
    return copy.exists() and read_json(copy)["metadata"].get(ORIGIN) != lesson_sum(topic)


def _fill_in(lesson: dict[str, Any], week: Week) -> None:
    """Puts kept answers in place of the stubs."""
    for name, exercise in week.exercises.items():
        path = week.shelf.file(name)
        if not (week.shelf.is_solved(name) and path.exists()):
            continue
        for cell in lesson["cells"]:
            if "".join(cell["source"]).strip() == exercise.stub.strip():
                cell["source"] = path.read_text(encoding="utf-8").strip().splitlines(keepends=True)
                cell["outputs"] = []


def start_page() -> str:
    """The page that JupyterLab opens on: what comes next, and all weeks with what is solved and run."""
    rows = []
    following = ""
    for topic in TOPICS:
        folder = ROOT / "weeks" / topic
        exercises, solved = exercise_names(folder), solved_exercises(folder)
        link = f"[{lesson_title(topic)}]({topic}/{COPY})"
        if len(solved) < len(exercises):
            following = following or link
        is_run = "yes" if week_results(topic, "mine") else ""
        number = int(topic[:2])
        note = f"changed since you began: `make notebooks FRESH={number}`" if is_outdated(topic) else ""
        done = f"{len(solved)} of {len(exercises)}" if solved else ""
        rows.append(f"| {number} | {link} | {done} | {is_run} | {note} |")
    return START_PAGE.format(following=following or "any of these", rows="\n".join(rows))


def lesson_title(topic: str) -> str:
    """What a lesson is called: its first heading, without the number."""
    lesson = read_json(ROOT / "weeks" / topic / LESSON)
    heading = "".join(lesson["cells"][0]["source"]).splitlines()[0]
    return heading.lstrip("# ").partition(": ")[2] or heading


START_PAGE = """# A language model from nothing

**Go on with {following}.** A click opens it; Shift+Enter runs a cell and goes to the next.

| week | lesson | solved | script run | |
| --- | --- | --- | --- | --- |
{rows}

These are your own copies (`my_notebook.ipynb` in each week's folder): write in them as you like. What you
have solved is kept in your home folder, in `.llm-weeks/answers`, and goes with you to a new copy or a new
clone. `git pull` brings new lessons and leaves your copies alone.

After a lesson, run its script with your own code, in a terminal (File, New, Terminal) in the repository's
folder, with the environment active:

```sh
source .venv/bin/activate             # Windows: .venv\\Scripts\\activate
python weeks/01_bigram/run.py --mine
python -m shared.course status
```
"""
