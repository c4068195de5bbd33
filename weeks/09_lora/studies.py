"""Week 9's studies; here: all methods on the same data."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from figures import draw
from fine_tuning import load_base
from names import COLUMNS, kept_under
from rates import study_rates, study_rounding
from shared.commandline import flags, without_idle
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.runtime import clock, table

if TYPE_CHECKING:
    from run import Settings


def study_compare(settings: "Settings", preset: "Settings") -> dict[str, float]:
    """All methods in turn, each in a process of its own: its peak of memory is then its own too.

    preset: what the settings were made from; a process is started with the flags that make the difference.
    """
    rows = {name: without_idle(settings.row(name), preset) for name in settings.compared}
    for row in rows.values():
        run_in_own_process(row, preset)
    # Only the name of the text is needed here, and it is where the runs have just written.
    corpus = load_base(settings)[1]
    work = Workspace(__file__, settings, corpus.name, torch.device("cpu"), name=kept_under(settings))
    runs = read_runs(work.logs)
    summaries = {name: runs[row.run].summary for name, row in rows.items()}
    cells = [
        {"method": name} | {heading: summary.get(key) for key, heading in COLUMNS.items()}
        for name, summary in summaries.items()
    ]
    print("\n" + table(cells))
    draw(work.logs, work.reports)
    return {f"{name}_loss": summary["best_val_loss"] for name, summary in summaries.items()}


def run_in_own_process(settings: "Settings", preset: "Settings") -> None:
    """Starts run.py with these settings and waits for it. Raises ValueError where it fails."""
    print(f"\n=== {settings.run} ===", flush=True)
    script = Path(__file__).with_name("run.py")
    command = [sys.executable, str(script), "--preset", settings.preset, *flags(settings, preset)]
    started = clock()
    status = subprocess.run(command).returncode
    if status in (130, -2):
        raise KeyboardInterrupt
    if status:
        raise ValueError(
            f"{settings.run} ended with exit status {status} after {clock() - started:.0f} s;"
            " the reason stands above"
        )


STUDIES: dict[str, Callable[["Settings", "Settings"], dict[str, float]]] = {
    "compare": study_compare,
    "rates": study_rates,
    "rounding": study_rounding,
}
