"""Week 0. A week's settings, and its folders of logs, plots and checkpoints.

A week writes `logs/NN_topic/mine/PRESET/DATA/RUN`, `reports/NN_topic/mine/` and
`checkpoints/NN_topic/PRESET/DATA/RUN`, none of which git tracks; with `--run-name NAME`, NAME stands before
DATA. The runs that the course ships are in `logs/NN_topic/reference/DATA/RUN`, their plots in
`reports/NN_topic/`.
"""

import re
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import tyro

from shared.course.exercise.week import Week
from shared.course.progress_page import write_page
from shared.course.runs import output_root, relative
from shared.course.style import style
from shared.locks import process_lock
from shared.runtime import RunLog, clock, table, write_json
from shared.trackers import TrackerName, check_tracker

PRESETS = ("smoke", "laptop", "gpu")
RUN_NAME = re.compile(r"[^\W_][\w.-]*")


@dataclass(frozen=True)
class WeekSettings:
    """What every week's script takes; a week adds its own."""

    preset: tyro.conf.Suppress[str] = "laptop"
    data: str = "tinyshakespeare"
    """tinyshakespeare, shakespeare, or the path of a text file or of a folder of them."""
    device: str = "auto"
    run_name: str | None = None
    """Keep this run under a name of its own, beside others on the same data. Without one, it takes the place
    of the last run on this data.
    """
    mine: bool = False
    """Use your own answers in place of the course's code, as far as they are solved."""
    resume: bool = False
    """Go on with an interrupted run."""
    tracker: TrackerName = "none"
    """Where each run's metrics go beside its log: none, tensorboard, wandb (offline unless WANDB_MODE says
    online) or trackio.
    """
    reference: bool = False
    """Keep this as the reference run that the course ships (for the course's authors)."""

    def __post_init__(self) -> None:
        if self.run_name is not None and not RUN_NAME.fullmatch(self.run_name):
            raise ValueError(
                f"run_name={self.run_name!r}: give letters, digits, dots, - and _, beginning with a letter or"
                " a digit"
            )
        check_tracker(self.tracker)

    ANSWERS_IN: ClassVar[tuple[str, ...]] = ()
    """The parts of the week that can use a learner's answers ("run", or a study's name)."""
    READ_BY: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The settings that not every part of the week reads: by the part's name, those that it does read."""

    def idle(self) -> dict[str, str]:
        """The settings that this part of the week does not read, with the reason (see `idle_settings`)."""
        study = getattr(self, "study", None)
        own = self.READ_BY.get(study or "run", ())
        idle: dict[str, str] = {}
        for names in self.READ_BY.values():
            for name in names:
                readers = [part for part, read in self.READ_BY.items() if name in read]
                if name not in own:
                    idle[name] = f"it is for {' and '.join(map(_part_label, readers))}"
        if (study or "run") not in self.ANSWERS_IN:
            idle["mine"] = "nothing that this part of the week runs is written by you"
        return idle

    @property
    def part(self) -> str:
        """What of the week is run: the results of two that run the same part at once would be mixed."""
        return getattr(self, "study", None) or "run"


def _part_label(part: str) -> str:
    """A part of a week for people."""
    return "the week without --study" if part == "run" else f"--study {part}"


class Workspace:
    """A week's folders for one run of its script."""

    def __init__(
        self,
        script: str | Path,
        settings: WeekSettings,
        data: str,
        device: torch.device,
        *,
        name: str | None = None,
    ):
        """script: the week's run.py. data: the name of the data set that is really used. name: what the run
        is kept under where `--run-name` does not say; None: under no name.
        """
        self.topic = Path(script).resolve().parent.name
        self.settings = settings
        self.data = data
        self.device = device
        name = settings.run_name or name or ("my-code" if settings.mine else "")
        kept = Path(settings.preset, name, data)
        owner = Path("reference", data) if settings.reference else Path("mine", kept)
        root = output_root()
        self.logs = root / "logs" / self.topic / owner
        self.reports = root / "reports" / self.topic
        if not settings.reference:
            self.reports = self.reports / "mine" / name
        elif data != "tinyshakespeare":
            self.reports /= data
        self.checkpoints = root / "checkpoints" / self.topic / kept
        self.own: list[str] = []
        """The learner's answers that this run used."""
        self._started = clock()
        self._lock = ExitStack()
        self._unlock = weakref.finalize(self, self._lock.close)

    def log(self, run: str, settings: Any = None) -> RunLog:
        """The run log called `run`. settings: what it says of how the run was made; none: the week's.

        From the first one on, this part of the week belongs to this process. Raises ValueError, naming it,
        where another process runs it.
        """
        if self._unlock.alive:
            part = self.settings.part
            what = f"{self.topic}, {part}"
            self._lock.enter_context(process_lock(self.logs, what, name=f".{part}.lock"))
        return RunLog(
            self.logs / run,
            settings or self.settings,
            self.device,
            resume=self.settings.resume,
            tracker=self.settings.tracker,
        )

    def mine(self, name: str, promoted: Any, week_number: int | None = None) -> Any:
        """With --mine, the learner's own answer to the week's exercise `name`, once it is solved; else
        `promoted`, which it must be able to replace. A line says which.

        week_number: of an earlier week that has the exercise; None: this one.
        """
        if not self.settings.mine:
            return promoted
        week = Week(week_number or int(self.topic[:2]))
        if not week.shelf.is_solved(name):
            print(f"{name}: the course's ({week.find(name).name} is not solved)")
            return promoted
        self.own.append(name)
        return week.mine(name)

    def finish(
        self, metrics: Mapping[str, float | None], draw: Callable[[Path, Path], list[Path]]
    ) -> dict[str, float]:
        """Writes the week's figures, draws its plots from the logs, and prints both.

        metrics: those that are None were not measured, and are left out of what is returned.
        """
        measured = {name: value for name, value in metrics.items() if value is not None}
        seconds = clock() - self._started
        write_json(
            self.logs / "week.json",
            {
                "preset": self.settings.preset,
                "data": self.data,
                "seconds": round(seconds, 1),
                "metrics": measured,
                **({"mine": self.own} if self.settings.mine else {}),
            },
        )
        with style():
            plots = draw(self.logs, self.reports)
        print("\n" + table([{"metric": name, "value": value} for name, value in measured.items()]))
        self._unlock()
        print(
            f"\n{self.topic}: {seconds:.0f} s; logs in {relative(self.logs)}, {len(plots)} plots in"
            f" {relative(self.reports)}"
        )
        if not self.settings.reference:
            print(f"all your weeks beside the course's: {relative(write_page())}")
        return measured
