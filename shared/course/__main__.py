"""Week 0. The course as a whole, from the command line.

python -m shared.course notebooks
python -m shared.course run --weeks 1 4 --preset smoke
python -m shared.course status
python -m shared.course doctor
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from shared.commandline import errors_for_people, parse_args
from shared.course.doctor import Doctor, doctor
from shared.course.exercise.week import exercise_names, solved_exercises
from shared.course.notebooks import COPY, Notebooks, notebooks
from shared.course.runs import choose, first_figures, output_root, relative, week_results, weeks
from shared.devices import devices
from shared.runtime import ROOT, clock, table

LAST_WRITTEN = 6
"""The last week whose model a learner writes; the others go on with what week 6 has saved."""
STOPPED = 130
"""The exit status of a script that Ctrl-C ended (see `errors_for_people`)."""


@dataclass(frozen=True)
class Run:
    """Runs weeks one after the other, and ends with a table."""

    weeks: tuple[int, ...] = ()
    """Which; none: all there are."""
    preset: Literal["smoke", "laptop", "gpu"] | None = None
    """None: the one for this machine."""
    mine: bool = False
    """With your own answers, where a week's script can use them."""


def run(settings: Run) -> None:
    """Runs each week in a process of its own, draws the ladder, and prints a table.

    A week that fails is named, the others run all the same, and the exit status is 1.
    """
    preset = settings.preset or ("gpu" if devices()[0].type == "cuda" else "laptop")
    topics = choose(settings.weeks)
    rows = []
    failed = []
    for number, topic in enumerate(topics, 1):
        print(f"\n=== {topic} ({number} of {len(topics)}, preset {preset}) ===", flush=True)
        started = clock()
        exit_status = _run_week(topic, preset, settings.mine)
        if exit_status:
            failed.append(topic)
        row = {"week": topic, "time": f"{clock() - started:.0f} s"}
        rows.append(row | _outcome(topic, preset, exit_status))
    subprocess.run([sys.executable, "-m", "shared.course.report", "--mine"], cwd=ROOT, check=True)
    print("\n" + table(rows))
    if failed:
        again = f"python weeks/{failed[0]}/run.py --preset {preset}"
        print(f"\nfailed: {', '.join(failed)}; run one alone with: {again}", file=sys.stderr)
        raise SystemExit(1)


def _run_week(topic: str, preset: str, mine: bool) -> int:
    """The exit status of a week's script. Raises KeyboardInterrupt where Ctrl-C ended it."""
    command = [sys.executable, str(ROOT / "weeks" / topic / "run.py"), "--preset", preset]
    if mine and int(topic[:2]) <= LAST_WRITTEN:
        command.append("--mine")
    exit_status = subprocess.run(command, cwd=ROOT).returncode
    if exit_status in (STOPPED, -signal.SIGINT):
        raise KeyboardInterrupt
    return exit_status


def _outcome(topic: str, preset: str, exit_status: int) -> dict[str, str]:
    """What the table says of a week that was run."""
    if exit_status:
        return {"result": f"failed with exit status {exit_status}"}
    results = week_results(topic, "mine", preset=preset)
    if results is None:
        return {"result": "no results"}
    plots = relative(output_root() / "reports" / topic / "mine")
    return {"result": first_figures(results["metrics"]), "plots": f"{plots}{os.sep}"}


@dataclass(frozen=True)
class Status:
    """Which exercises are solved, which weeks' scripts were run, and your figures beside the course's."""


def status(settings: Status) -> None:
    """Prints a row a week, and what comes next: the first unsolved exercise, and the first script not run."""
    topics = weeks()
    print(table([_week_status(topic) for topic in topics]))
    for topic in topics:
        folder = ROOT / "weeks" / topic
        unsolved = [name for name in exercise_names(folder) if name not in solved_exercises(folder)]
        if unsolved:
            print(f"\nnext exercise: {unsolved[0]}, in weeks/{topic}/{COPY} (make notebooks)")
            break
    not_run = [topic for topic in topics if week_results(topic, "mine") is None]
    if not_run:
        option = " --mine" if int(not_run[0][:2]) <= LAST_WRITTEN else ""
        print(f"next script: python weeks/{not_run[0]}/run.py{option}")


def _week_status(topic: str) -> dict[str, str]:
    folder = ROOT / "weeks" / topic
    solved = f"{len(solved_exercises(folder))} of {len(exercise_names(folder))}"
    row = {"week": topic, "solved": solved, "run": "no"}
    mine = week_results(topic, "mine")
    if mine is None:
        return row
    name, value = next(iter(mine["metrics"].items()))
    row["run"] = f"{mine['preset']}, {mine['data']}"
    row["yours"] = f"{name.replace('_', ' ')} {value:.3f}"
    course = week_results(topic, "reference", mine["data"])
    if course and name in course["metrics"]:
        row["course"] = f"{course['metrics'][name]:.3f}"
    else:
        row["course"] = "none on this data"
    return row


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "notebooks": (Notebooks, notebooks),
    "run": (Run, run),
    "status": (Status, status),
    "doctor": (Doctor, doctor),
}


def main(argv: list[str]) -> None:
    """Runs the command that `argv` begins with, one of COMMANDS, with settings from the rest."""
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"usage: python -m shared.course {' | '.join(COMMANDS)}")
    settings, command = COMMANDS[argv[0]]
    command(parse_args(settings, argv[1:], settings.__doc__))


if __name__ == "__main__":
    with errors_for_people():
        main(sys.argv[1:])
