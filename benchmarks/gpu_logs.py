"""One line of what a week's script has logged, for `benchmarks/gpu.sh`.

    LLM_WEEKS_OUTPUT=runs/gpu/table python benchmarks/gpu_logs.py --topic 07_amp --metrics speedup fp8_ms
    # two trainings, each with its --run-name: their losses must be the same, step by step
    LLM_WEEKS_OUTPUT=runs/gpu/fsdp python benchmarks/gpu_logs.py --topic 06_gpt2 --alike alone fsdp

Of the newest run under LLM_WEEKS_OUTPUT. What the script could not measure there is named, behind "not on
this device:".
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from shared.commandline import errors_for_people, parse_args
from shared.course.report import LoggedRun, read_runs
from shared.course.runs import newest_logs, output_root
from shared.runtime import read_json
from shared.training.tricks import NOT_MEASURED

LOSSES_APART = 1e-3
"""By how much, as a share of them, losses of the same steps may differ: processes sum in another order."""


@dataclass(frozen=True)
class Settings:
    """Prints a line."""

    topic: str
    """Of the week, such as 07_amp."""
    metrics: tuple[str, ...] = ()
    """Those of the week's figures to show; one that was not measured is left out."""
    alike: tuple[str, ...] = ()
    """Names of two runs whose losses must be the same."""


def week_line(settings: Settings) -> str:
    """The metrics of the week's newest run; what it could not measure is printed first."""
    logs = newest_logs(settings.topic, "mine")
    if logs is None:
        raise ValueError(f"no run of {settings.topic} has ended in {output_root()}: run its script first")
    for run in read_runs(logs).values():
        note = run.summary.get("note") or ""
        if note.startswith(NOT_MEASURED):
            print(f"not on this device: {run.summary['step']}: {note.removeprefix(NOT_MEASURED)}")
    metrics = read_json(logs / "week.json")["metrics"]
    found = [name for name in settings.metrics if name in metrics]
    if not found:
        raise ValueError(f"{logs} has none of {', '.join(settings.metrics)}; it has: {', '.join(metrics)}")
    return ", ".join(f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in found)


def losses_of(topic: str, name: str) -> dict[tuple[int, str], float]:
    """The losses of the training that was run under a name, by step and kind."""
    root = output_root() / "logs" / topic / "mine"
    folders = [path.parent for path in root.rglob("metrics.jsonl") if name in path.relative_to(root).parts]
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} trainings called {name!r} in {root}, and there must be one")
    losses = {}
    for row in LoggedRun(Path(folders[0])).rows:
        for kind in ("train_loss", "val_loss"):
            if kind in row:
                losses[row["step"], kind] = row[kind]
    return losses


def alike_line(settings: Settings) -> str:
    """That two trainings have the same losses, or ValueError."""
    if len(settings.alike) != 2:
        raise ValueError(f"--alike {' '.join(settings.alike)}: give the names of two runs")
    first, second = (losses_of(settings.topic, name) for name in settings.alike)
    if first.keys() != second.keys() or not first:
        raise ValueError(f"{' and '.join(settings.alike)} have logged losses of other steps")
    apart = [abs(second[key] / first[key] - 1) for key in first]
    if not all(share <= LOSSES_APART for share in apart):  # nor is a NaN
        found = ", ".join(f"{share:.1e}" for share in apart)
        raise ValueError(
            f"losses of {' and '.join(settings.alike)} differ by {found} of them, and {LOSSES_APART:g} is"
            " allowed"
        )
    return f"{len(first)} losses of {' and '.join(settings.alike)} differ by at most {max(apart):.1e} of them"


def main(settings: Settings) -> None:
    """Prints the line."""
    print(f"summary: {alike_line(settings) if settings.alike else week_line(settings)}")


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
