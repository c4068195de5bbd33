"""Week 2. Training that can be stopped after any step and resumed as if nothing had happened.

The Trainer and the loops of week 10 have this in common.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared import checkpoint
from shared.locks import process_lock
from shared.registry import LanguageModel
from shared.runtime import RunLog, finish_first, plain
from shared.training.execution import ALONE, OneProcess


class StepSettings(Protocol):
    """What a loop's settings have at least; they are a dataclass."""

    @property
    def steps(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...


Settings = TypeVar("Settings", bound=StepSettings)
NUMBERS = {int: torch.int64, float: torch.float64}
"""How an optimizer's plain numbers are kept."""


@dataclass(frozen=True)
class RunState:
    """The state of a run between two steps, as it is saved: all that a resumed run needs."""

    weights: dict[str, Tensor]
    """What is trained, by name."""
    tensors: dict[str, Tensor]
    """The optimizers' moments and the random state, by name."""
    values: dict[str, Any]
    """In JSON: the step, the settings, and what was measured."""


class ResumableLoop(ABC, Generic[Settings]):
    """A training loop: it counts and logs the steps, saves its state, stops on Ctrl-C, and can be resumed.

    The state is saved every `checkpoint_every` steps, after the last one, and after the step in which Ctrl-C
    or SIGTERM came. A finished run can be resumed with more steps. A resumed loop neither repeats nor skips
    anything: on a CPU it equals, bit for bit, one that was left alone. Nothing is saved where `state_path` is
    None.

    A subclass calls `_open` and then `_run`, both inside `_alone`, with what a step does, which advances
    `step` itself. It says what a resumed run must have in common with the saved one (`_identity`,
    `_fingerprints`), and gives its state, takes it up, writes and reads it.
    """

    state_name: ClassVar[str] = "checkpoint"
    """What messages call the saved state."""

    def __init__(
        self,
        config: Settings,
        state_path: Path | None,
        log: RunLog | None,
        *,
        description: str,
        processes: OneProcess = ALONE,
    ):
        self.config = config
        self.state_path = state_path
        self.log = log
        self.description = description
        self.processes = processes
        self.step = 0
        """Steps done."""
        self.history: list[dict[str, float]] = []
        """The rows of metrics, each with its `step`."""
        self.stopped: str | None = None
        """Why `stop` was called."""

    def stop(self, why: str) -> None:
        """Ends the training as if its last step were done: the present step is finished and saved, and `fit`
        returns. Called between two steps, it ends it after the next. A resumed run goes on.
        """
        self.stopped = why

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the saved one, in JSON: `config` and further values."""

    @abstractmethod
    def _fingerprints(self) -> dict[str, Any]:
        """The same of what the run is made from and on: hashes of data and of weights that do not learn.

        States that were saved before these were kept lack them, and are resumed all the same.
        """

    @abstractmethod
    def _state(self) -> RunState:
        """The present state; of the values, those that are neither the step nor the identity."""

    @abstractmethod
    def _take_up(self, state: RunState) -> None:
        """Sets all that `_state` gives to what it was. Raises ValueError for the state of another model."""

    @abstractmethod
    def _write(self, state: RunState, path: Path) -> None:
        """Saves the state, all or nothing."""

    @abstractmethod
    def _read(self, path: Path) -> RunState | None:
        """The saved state, or None if there is none. Raises ValueError for a damaged one."""

    def _begin(self) -> None:
        """Called in place of `_take_up` for a run that starts anew."""

    def _rate_at(self, step: int, steps: int) -> float | None:
        """The learning rate of a step, counted from 0, in a run of so many; None: nothing to say."""
        return None

    def _ends_early(self) -> bool:
        """Whether the steps that are left are not taken; alike in all processes."""
        return False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process trains with the same saved state; ValueError names one that does."""
        with ExitStack() as lock:
            if self.state_path is not None and self.processes.rank == 0:
                folder, name = self.state_path.parent, f".{self.state_path.name}.lock"
                lock.enter_context(process_lock(folder, f"training {self.description}", name=name))
            yield

    def _open(self, resume: bool) -> None:
        """Takes up the saved state, if asked to and there is one, said aloud; else starts anew."""
        self.stopped = None
        if not (resume and self._restore()):
            self._begin()
        if self.log:
            self.log.rewind(self.step)

    def _run(self, take_step: Callable[[], float]) -> None:
        """Takes the steps that are left. take_step: does one, counts it in `step`, and returns its loss.

        Raises KeyboardInterrupt once the step in which Ctrl-C came is done and saved.
        """
        progress = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.description,
            unit="step",
            disable=True if self.processes.rank > 0 else None,  # None: shown on a terminal only
            leave=False,
        )
        ends = False
        with progress, finish_first("the step") as interrupted:
            while self.step < self.config.steps and not self._ends_early():
                loss = take_step()
                progress.update()
                progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                # Asked once, of all processes: a Ctrl-C that comes while saving ends the next step, which is
                # then saved too.
                ends = self.processes.mean(interrupted() or self.stopped is not None) > 0
                if ends or self._is_due(self.config.checkpoint_every) or self._ends_early():
                    self._save()
                if ends:
                    break
            if ends and self.processes.mean(interrupted()) > 0:
                raise KeyboardInterrupt
        if ends:
            self.stopped = self.stopped or "another process asked for it"
            self._say(f"stopped at step {self.step} of {self.config.steps}: {self.stopped}")

    def _is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and after the last one, is to happen now."""
        return self.step % every == 0 or self.step == self.config.steps

    def record(self, row: Mapping[str, float]) -> None:
        """Keeps a row of metrics of the present step in the history; the log gets what is finite, since JSON
        has nothing else.
        """
        self.history.append({"step": self.step, **row})
        if self.log:
            self.log.log(self.step, **finite(row))

    def _save(self) -> None:
        if self.state_path is None:
            return
        state = self._state()
        values = {"step": self.step, **self._identity(), **self._fingerprints(), **state.values}
        self._write(RunState(state.weights, state.tensors, values), self.state_path)
        self.processes.barrier()  # what the first process has written can be read by all

    def _restore(self) -> bool:
        """Takes up the saved state; False if there is none."""
        state = None if self.state_path is None else self._read(self.state_path)
        if state is None:
            self._say(f"no {self.state_name} to resume from, so it starts from the beginning")
            return False
        try:
            self._refuse_changes(self._lengthened(state.values))
            self._take_up(state)
            self.step = state.values["step"]
        except KeyError as missing:
            raise ValueError(
                f"{self.state_path} lacks {missing}, which this run needs to be resumed: it was saved by"
                " another version of the course or by another program. Start anew without --resume"
            ) from missing
        self._say(f"resumed at step {self.step}")
        then = state.values["config"]["steps"]
        if then != self.config.steps:
            self._say_longer(then)
        unchecked = [name for name in self._fingerprints() if name not in state.values]
        if unchecked:
            self._say(
                f"{self.state_path} was saved by an earlier version, which kept no hashes: that these are the"
                f" same as then could not be checked: {', '.join(unchecked)}"
            )
        return True

    def _say_longer(self, then: int) -> None:
        """Says that a run of `then` steps goes on, and what becomes of the learning rate."""
        before, after = self._rate_at(then - 1, then), self._rate_at(then, self.config.steps)
        told = f"it was finished with {then} steps and goes on to {self.config.steps}: what follows from the"
        told += " number of steps follows the new one from here on"
        if before is not None and after is not None and before != after:
            told += (
                f". The learning rate jumps from {before:.3g}, where the schedule ended, to {after:.3g},"
                f" where that of {self.config.steps} steps is by now"
            )
        self._say(told)

    def _lengthened(self, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """The saved values; of a finished run, where this one has more steps, as if it had had these."""
        then = saved["config"]["steps"]
        if saved["step"] < then or self.config.steps < then:
            return saved
        return {**saved, "config": {**saved["config"], "steps": self.config.steps}}

    def _refuse_changes(self, saved: Mapping[str, Any]) -> None:
        """Raises ValueError, with both values of each, for settings that are not those of the saved run, and
        where it is run on other data or beside other weights.
        """
        identity = self._identity()
        changed = _changes(_flat({name: saved[name] for name in identity}), _flat(identity))
        what = "with other settings"
        if not changed:  # with other settings, contents differ too: the settings are the reason
            fingerprints = self._fingerprints()
            changed = _changes({n: saved.get(n, now) for n, now in fingerprints.items()}, fingerprints)
            what = "on other contents"
        if changed:
            raise ValueError(
                f"{self.state_path} cannot be resumed {what}: {'; '.join(changed)}. Restore them, or start"
                " anew without --resume: with another --run-name the saved run is kept"
            )

    def _say(self, message: str) -> None:
        if self.processes.rank == 0:
            print(f"{self.description}: {message}")


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `config` and the values beside it, side by side."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        if name == "config":
            flat.update(value)
        else:
            flat[name] = value
    return flat


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Both values of each entry in which the two differ."""
    return [
        f"{name}={then.get(name)} then, {now.get(name)} now"
        for name in {**now, **then}
        if then.get(name) != now.get(name)
    ]


def finite(row: Mapping[str, float]) -> dict[str, float]:
    """The entries of a row that are finite numbers."""
    return {name: value for name, value in row.items() if math.isfinite(value)}


@torch.no_grad()
def fill(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], processes: OneProcess = ALONE) -> None:
    """Copies saved tensors into a model's own of the same names. Raises KeyError for one that is missing."""
    for name, tensor in own.items():
        tensor.copy_(processes.placed(saved[name], tensor))


def beside_what_learns(model: LanguageModel, processes: OneProcess = ALONE) -> dict[str, Any]:
    """Of a model with frozen parts: a hash of these, and the configurations of what was put on it."""
    learned = checkpoint.learned(model)
    frozen = {n: t for n, t in checkpoint.unshared(model).items() if n not in learned}
    if not frozen:
        return {}
    configs = [config for m in model.modules() if is_dataclass(config := getattr(m, "config", None))]
    parts = {json.dumps(plain(config), sort_keys=True) for config in configs if config != model.config}
    weights = {name: processes.full_tensor(tensor) for name, tensor in frozen.items()}
    return {"frozen weights": checkpoint.fingerprint(weights), "added parts": sorted(parts)}


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    prefix: str,
    processes: OneProcess = ALONE,
) -> dict[str, Tensor]:
    """An optimizer's state by `{prefix}.{name of the parameter}.{name of the moment}`.

    A plain number is kept as a tensor, with its type behind the name. Raises ValueError for what is neither.
    """
    tensors = {}
    for parameter in _parameters(optimizer):
        for moment, value in optimizer.state.get(parameter, {}).items():
            name = f"{prefix}.{names[parameter]}.{moment}"
            if isinstance(value, Tensor):
                tensors[name] = processes.full_tensor(value)
            elif type(value) in NUMBERS:
                tensors[f"{name}:{type(value).__name__}"] = torch.tensor(value, dtype=NUMBERS[type(value)])
            elif value is not None:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} under {moment!r}, and only"
                    " tensors and numbers can be saved: take another optimizer, or train without checkpoints"
                )
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    prefix: str,
    tensors: Mapping[str, Tensor],
    processes: OneProcess = ALONE,
) -> None:
    """Takes up what `optimizer_tensors` gave; the settings of the optimizer stay as they are."""
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        start = f"{prefix}.{names[parameter]}."
        moments: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if name.startswith(start):
                moment, _, is_number = name.removeprefix(start).partition(":")
                # A scalar counts steps: it has no parts that several processes could have.
                placed = processes.placed(tensor, parameter) if tensor.dim() else tensor
                moments[moment] = tensor.item() if is_number else placed
        if moments:
            state[number] = moments
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
