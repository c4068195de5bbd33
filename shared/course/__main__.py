"""Week 0. The course as a whole, from the command line.

python -m shared.course run --weeks 1 4 --preset smoke
python -m shared.course status
python -m shared.course doctor
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from shared.commandline import errors_for_people, parse_args
from shared.course.doctor import Doctor, doctor
from shared.course.exercise import Week
from shared.course.workspace import choose, headline, output_root, relative, week_results, weeks
from shared.runtime import ROOT, clock, devices, table

# ---- run


@dataclass(frozen=True)
class Run:
    """Runs weeks one after the other, and ends with a table."""

    weeks: tuple[int, ...] = ()
    """Which; none: all there are."""
    preset: Literal["smoke", "laptop", "gpu"] | None = None
    """None: the one for this machine."""


def run(settings: Run) -> None:
    """Each week in a process of its own; a week that fails is named, the others run all the same, and the
    exit status is 1.
    """
    preset = settings.preset or ("gpu" if devices()[0].type == "cuda" else "laptop")
    rows, failed = [], []
    chosen = choose(settings.weeks)
    for number, topic in enumerate(chosen, 1):
        print(f"\n=== {topic} ({number} of {len(chosen)}, preset {preset}) ===", flush=True)
        started = clock()
        code = subprocess.run(
            [sys.executable, str(ROOT / "weeks" / topic / "run.py"), "--preset", preset], cwd=ROOT
        ).returncode
        if code in (130, -2):
            raise KeyboardInterrupt
        row = {"week": topic, "time": f"{clock() - started:.0f} s"}
        if code:
            failed.append(topic)
            row["result"] = f"failed with exit status {code}"
        else:
            metrics = week_results(topic, "mine", preset=preset)["metrics"]
            row |= {
                "result": headline(metrics),
                "plots": f"{relative(output_root() / 'reports' / topic / 'mine')}{os.sep}",
            }
        rows.append(row)
    subprocess.run(
        [sys.executable, "-m", "shared.course.report", "--mine"], cwd=ROOT, check=True
    )  # the ladder, over all weeks
    print("\n" + table(rows))
    if failed:
        print(
            f"\nfailed: {', '.join(failed)}; run one alone with: python weeks/{failed[0]}/run.py --preset"
            f" {preset}",
            file=sys.stderr,
        )
        raise SystemExit(1)


# ---- status


@dataclass(frozen=True)
class Status:
    """Which weeks are done, exercises solved, and your figures beside the course's."""


def status(settings: Status) -> None:
    """Prints a row a week, and what comes next."""
    rows = []
    for topic in weeks():
        mine = week_results(topic, "mine")
        week = Week(int(topic[:2]))
        row = {
            "week": topic,
            "done": "yes" if mine else "no",
            "exercises": f"{len(week.solved())} of {len(week.exercises)}",
        }
        if mine:
            course = week_results(topic, "reference", mine["data"])
            figure = next(iter(mine["metrics"]))
            row["yours"] = (
                f"{figure.replace('_', ' ')} {mine['metrics'][figure]:.3f} ({mine['preset']}, {mine['data']})"
            )
            row["course"] = (
                f"{course['metrics'][figure]:.3f}"
                if course and figure in course["metrics"]
                else "none on this data"
            )
        rows.append(row)
    print(table(rows))
    later = [r["week"] for r in rows if r["done"] == "no"]
    if later:
        print(f"\nnext: open weeks/{later[0]}/notebook.ipynb, or run: python weeks/{later[0]}/run.py")


COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "run": (Run, run),
    "status": (Status, status),
    "doctor": (Doctor, doctor),
}


def main(argv: list[str]) -> None:
    """Runs one of COMMANDS."""
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"usage: python -m shared.course {' | '.join(COMMANDS)}")
    kind, function = COMMANDS[argv[0]]
    function(parse_args(kind, argv[1:], kind.__doc__))


if __name__ == "__main__":
    with errors_for_people():
        main(sys.argv[1:])
