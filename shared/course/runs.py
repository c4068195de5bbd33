"""Week 0. The weeks, and the runs that are found in their folders of logs (workspace.py makes those)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.runtime import ROOT, read_json

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


def output_root() -> Path:
    """Where logs, reports and checkpoints go: the repository, or the folder that LLM_WEEKS_OUTPUT names."""
    return Path(os.environ.get("LLM_WEEKS_OUTPUT") or ROOT)


def relative(path: Path) -> Path:
    """The path as seen from the repository, where it lies inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def weeks() -> list[str]:
    """The topics whose script exists."""
    return [t for t in TOPICS if (ROOT / "weeks" / t / "run.py").exists()]


def choose(numbers: Sequence[int]) -> list[str]:
    """Topics by week number, all if none is given. Raises ValueError for a week that doesn't exist."""
    available = {int(topic[:2]): topic for topic in weeks()}
    missing = [number for number in numbers if number not in available]
    if missing:
        unknown = ", ".join(map(str, missing))
        raise ValueError(f"no week {unknown}; there are: {', '.join(map(str, available))}")
    chosen = sorted(set(numbers)) or list(available)
    return [available[number] for number in chosen]


def newest_logs(topic: str, owner: str, data: str | None = None, preset: str | None = None) -> Path | None:
    """The folder with the logs of a week's newest run; None if there is none.

    owner: "reference" (the course's) or "mine". data, preset: only runs with these. Smoke runs count only
    where nothing else is there: they show that a week runs, no more.
    """
    root = (ROOT if owner == "reference" else output_root()) / "logs" / topic / owner

    def wanted(folder: Path) -> bool:
        return data in (None, folder.name) and preset in (None, folder.relative_to(root).parts[0])

    def rank(folder: Path) -> tuple[bool, float]:
        is_smoke = folder.relative_to(root).parts[0] == "smoke"
        return not is_smoke, (folder / "week.json").stat().st_mtime

    folders = [path.parent for path in root.rglob("week.json")]
    return max(filter(wanted, folders), key=rank, default=None)


def week_results(
    topic: str, owner: str, data: str | None = None, preset: str | None = None
) -> dict[str, Any] | None:
    """The `week.json` of the run that `newest_logs` finds: its preset, data, seconds and metrics."""
    logs = newest_logs(topic, owner, data, preset)
    if logs is None:
        return None
    return read_json(logs / "week.json")


def first_figures(metrics: Mapping[str, float]) -> str:
    """A week's first two figures in words."""
    first = list(metrics.items())[:2]
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in first)
