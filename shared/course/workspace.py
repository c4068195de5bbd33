"""Week 0. Where a week keeps its things: its settings, its folders of logs, plots and checkpoints, and the
runs found there.

A week writes `logs/NN_topic/mine/PRESET/DATA/RUN`, `reports/NN_topic/mine/` and
`checkpoints/NN_topic/PRESET/DATA/RUN`, none of which git tracks. The runs that the course ships are in
`logs/NN_topic/reference/DATA/RUN`, their plots in `reports/NN_topic/`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from shared.runtime import (
    ROOT,
    RunLog,
    clock,
    table,
    write_json,
)

TOPICS = (
    "01_bigram",
    "02_mlp",
    "03_attention",
    "04_mini_gpt",
    "05_bpe",
    "06_gpt2",
    "07_amp",
    "08_quantization",
    "09_lora",
    "10_ppo_dpo",
    "11_rag",
    "12_deploy",
)
PRESETS = ("smoke", "laptop", "gpu")


@dataclass(frozen=True)
class WeekSettings:
    """What every week's script takes; a week adds its own."""

    preset: tyro.conf.Suppress[str] = "laptop"
    data: str = "tinyshakespeare"
    """tinyshakespeare, shakespeare, or the path of a text file."""
    device: str = "auto"
    resume: bool = False
    """Go on with an interrupted run."""
    tensorboard: bool = False
    """Also write TensorBoard files beside each run's log."""
    reference: bool = False
    """Keep this as the reference run that the course ships (for the course's authors)."""


def output_root() -> Path:
    """Where logs, reports and checkpoints go: the repository, or the folder that LLM_WEEKS_OUTPUT names."""
    return Path(os.environ.get("LLM_WEEKS_OUTPUT") or ROOT)


class Workspace:
    """A week's folders for one script run. `data` is the name of the data set that is really used."""

    def __init__(self, script: str | Path, settings: WeekSettings, data: str, device: torch.device):
        self.topic, self.settings, self.data, self.device = (
            Path(script).resolve().parent.name,
            settings,
            data,
            device,
        )
        root = output_root()
        owner = Path("reference", data) if settings.reference else Path("mine", settings.preset, data)
        self.logs = root / "logs" / self.topic / owner
        self.reports = root / "reports" / self.topic / ("" if settings.reference else "mine")
        if settings.reference and data != "tinyshakespeare":
            self.reports /= data
        self.checkpoints = root / "checkpoints" / self.topic / settings.preset / data
        self._started = clock()

    def log(self, run: str, settings: Any = None) -> RunLog:
        """The run log called `run`."""
        s = self.settings
        return RunLog(self.logs / run, settings or s, self.device, resume=s.resume, tensorboard=s.tensorboard)

    def finish(self, metrics: dict[str, float], draw: Callable[[Path, Path], list[Path]]) -> dict[str, float]:
        """Writes the week's figures, draws its plots from the logs, and prints both."""
        metrics = {k: v for k, v in metrics.items() if v is not None}
        seconds = clock() - self._started
        write_json(
            self.logs / "week.json",
            {
                "preset": self.settings.preset,
                "data": self.data,
                "seconds": round(seconds, 1),
                "metrics": metrics,
            },
        )
        plots = draw(self.logs, self.reports)
        print("\n" + table([{"metric": k, "value": v} for k, v in metrics.items()]))
        print(
            f"\n{self.topic}: {seconds:.0f} s; logs in {relative(self.logs)}, {len(plots)} plots in"
            f" {relative(self.reports)}"
        )
        return metrics


def relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def weeks() -> list[str]:
    """The topics whose script exists."""
    return [t for t in TOPICS if (ROOT / "weeks" / t / "run.py").exists()]


def choose(numbers: tuple[int, ...]) -> list[str]:
    """Topics by week number, all that exist if none is given. Raises ValueError for a week that doesn't
    exist.
    """
    there = {int(t[:2]): t for t in weeks()}
    missing = [n for n in numbers if n not in there]
    if missing:
        raise ValueError(f"no week {', '.join(map(str, missing))}; there are: {', '.join(map(str, there))}")
    return [there[n] for n in sorted(set(numbers))] if numbers else list(there.values())


def newest_logs(topic: str, owner: str, data: str | None = None, preset: str | None = None) -> Path | None:
    """The folder with the logs of a week's newest run; None if there is none. owner: "reference" (the
    course's) or "mine".

    data, preset: only runs with these. Smoke runs count only where nothing else is there: they prove that a
    week runs, no more.
    """
    root = (ROOT if owner == "reference" else output_root()) / "logs" / topic / owner
    found = [
        p
        for p in root.rglob("week.json")
        if data in (None, p.parent.name) and preset in (None, p.parent.parent.name)
    ]
    newest = max(
        found, key=lambda p: ("smoke" not in p.relative_to(root).parts, p.stat().st_mtime), default=None
    )
    return newest and newest.parent


def week_results(topic: str, owner: str, data: str | None = None, preset: str | None = None) -> dict | None:
    """What the run of `newest_logs` came to (its `week.json`)."""
    logs = newest_logs(topic, owner, data, preset)
    return logs and json.loads((logs / "week.json").read_text(encoding="utf-8"))


def headline(metrics: dict[str, float]) -> str:
    """A week's first figures in words."""
    return ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in list(metrics.items())[:2])
