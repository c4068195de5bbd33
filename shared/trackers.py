"""Week 0. Where a run's numbers can go beside its own log: TensorBoard, Weights & Biases, trackio.

A tracker shows many runs in one page. Nothing is sent anywhere unless somebody asks for it: TensorBoard and
trackio keep files of their own, and W&B runs offline unless the environment variable WANDB_MODE says online.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

TrackerName = Literal["none", "tensorboard", "wandb", "trackio"]
PROJECT = "llm-weeks"
"""What the course's runs are kept under, where a tracker sorts runs by project."""


class Tracker(Protocol):
    """Takes the rows of a run's metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of one step; a step may have several such rows."""
        ...

    def close(self) -> None:
        """Writes what is still held back, and ends the run there."""
        ...


def check_tracker(name: str) -> None:
    """Raises ValueError for a tracker that there is not, or whose package is not installed."""
    if name not in TRACKERS and name != "none":
        raise ValueError(f"tracker={name!r}: must be one of none, {', '.join(TRACKERS)}")
    if name != "none" and find_spec(name) is None:
        raise ValueError(f"tracker={name!r} needs a package that is not installed: pip install {name}")


def open_tracker(
    name: str, folder: Path, settings: Mapping[str, Any], rows: Iterable[Mapping[str, float]] = ()
) -> Tracker:
    """A tracker for the run whose log is in `folder`.

    settings: the run's, in JSON. rows: those that the log has already, each with its `step`. A run that is
    resumed begins anew in the tracker, with the rows that the log kept: so the tracker never has a step that
    the log dropped. Raises ValueError where `check_tracker` does.
    """
    check_tracker(name)
    remove_tracked(folder)
    tracker = TRACKERS[name](folder, settings)
    for row in rows:
        tracker.log(int(row["step"]), {key: value for key, value in row.items() if key != "step"})
    return tracker


def remove_tracked(folder: Path) -> None:
    """Removes the files of an earlier run in `folder`: TensorBoard would draw both as one curve, and `wandb
    sync` upload both. What W&B has online and trackio in its database stays, as a run of its own.
    """
    for name in ("tensorboard", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir logs` shows them."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Weights & Biases: a folder `wandb` in the run's, which `wandb sync` uploads, or directly, with
    WANDB_MODE=online after `wandb login`. WANDB_PROJECT names another project.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            mode=mode,
            config=dict(settings),
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        how = f"wandb sync {folder / 'wandb'}/offline-run-*" if mode == "offline" else self._run.url
        print(f"tracker: wandb, {mode} ({how})")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """W&B's counterpart on this machine: a database in TRACKIO_DIR, which `trackio show` shows."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import trackio

        self._run = trackio.init(
            PROJECT, folder.name, config=dict(settings), auto_log_gpu=False, auto_log_cpu=False, embed=False
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
"""By name, which is the package's too."""
