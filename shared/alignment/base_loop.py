"""Week 10. What all loops of the week have in common, PPO's as a reward model's.

That is Adam with a learning rate that falls, metrics, and a state in one file, from which a resumed run
equals an uninterrupted one.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Generator, Tensor, nn

from shared import checkpoint
from shared.checks import Checks
from shared.runtime import RunLog, write_atomically
from shared.training.diagnosis import TrainingStopped
from shared.training.resume import ResumableLoop, RunState, fill, optimizer_tensors, restore_optimizer

HASHED_STEPS = 32
"""Of about so many steps, what they are given is compared when a run is resumed."""


@dataclass(frozen=True)
class LoopConfig:
    """What all loops share, a reward model's (`rewards.py`) too."""

    steps: int = 200
    lr: float = 1e-4
    """Adam's learning rate at the first step; it falls linearly."""
    final_lr: float = 0.0
    """Where it ends, as a fraction of the first."""
    grad_clip: float = 1.0
    """Longest gradient; longer ones are shortened to it. 0: never."""
    seed: int = 1337
    log_every: int = 1
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        checks = Checks(self)
        self._check(checks)
        checks.finish()

    def _check(self, checks: Checks) -> None:
        """Notes what is wrong with the settings; a class with further ones checks these as well."""
        checks.at_least(1, "steps", "log_every", "checkpoint_every")
        checks.above(0, "lr")
        checks.between(0, 1, "final_lr")
        checks.not_negative("grad_clip")
        checks.seed()


Config = TypeVar("Config", bound=LoopConfig)


class AlignmentLoop(ResumableLoop[Config]):
    """What the loops share: the optimizer, the log, saving and resuming. `update` is one step.

    trained: modules by name; they are put in eval mode (no dropout: a ratio of probabilities is to change by
    learning only). file: where the state is kept (`.safetensors`), of what learns; None keeps nothing. Raises
    ValueError where nothing learns.
    """

    state_name: ClassVar[str] = "state"

    def __init__(
        self,
        config: Config,
        trained: Mapping[str, nn.Module],
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, Path(file) if file else None, log, description=type(self).__name__)
        self.trained = {name: module.eval() for name, module in trained.items()}
        learned = self._learned()
        if not learned:
            raise ValueError(f"{', '.join(trained)}: no parameter requires a gradient, so nothing can learn")
        self.parameters = list(learned.values())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, eps=1e-5)
        self.generator = Generator().manual_seed(config.seed)

    def update(self) -> dict[str, float]:
        """One step; returns what is logged, with the `loss`."""
        raise NotImplementedError

    def fit(
        self,
        resume: bool = False,
        measure: Callable[[], dict[str, float]] | None = None,
        measure_every: int = 10,
    ) -> dict[str, float]:
        """Trains to the end and returns the last step's measurements.

        measure: further metrics for the log, taken every so many steps and at the end; it must draw from a
        generator of its own. resume: go on from `file` as if nothing had happened; without it, start anew,
        said aloud. Ctrl-C ends the present step, saves, and raises KeyboardInterrupt. Raises TrainingStopped
        for a loss or a gradient that is not finite.
        """
        with self._alone():
            self._open(resume)
            self._run(partial(self._update_and_log, measure, measure_every))
        return self.history[-1] if self.history else {}

    def _update_and_log(self, measure: Callable[[], dict[str, float]] | None, measure_every: int) -> float:
        metrics = self.update()
        self.step += 1
        measured = measure is not None and self._is_due(measure_every)
        if measure is not None and measured:
            metrics |= measure()
        if measured or self._is_due(self.config.log_every):
            self.record(metrics)
        return metrics["loss"]

    def _descend(self, loss: Tensor) -> dict[str, float]:
        """One step of the optimizer; raises TrainingStopped, before it, for a number that is not finite."""
        config = self.config
        lr = self._rate_at(self.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            raise TrainingStopped(
                f"step {self.step + 1}: the loss is {loss.item()}, the gradient's length {norm}. A lower lr"
                f" (now {lr:.3g}) usually helps"
            )
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm, "lr": lr}

    def _rate_at(self, step: int, steps: int) -> float:
        return self.config.lr * (1 - (1 - self.config.final_lr) * step / steps)

    def _learned(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by the names under which they are saved."""
        return {
            f"{name}.{key}": parameter
            for name, module in self.trained.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def _numbers(self) -> dict[nn.Parameter, str]:
        """The parameters' numbers, under which their moments are saved."""
        return {parameter: str(number) for number, parameter in enumerate(self.parameters)}

    def _identity(self) -> dict[str, Any]:
        return {"loop": type(self).__name__, "config": asdict(self.config)}

    def _given(self, step: int) -> tuple[Tensor, ...]:
        """What the step's batch is made from: the prompts or the pairs."""
        return ()

    def _fixed(self) -> dict[str, Tensor]:
        """The weights that the run has and does not change, by name."""
        learned = self._learned()
        tensors = {
            f"{name}.{key}": tensor
            for name, module in self.trained.items()
            for key, tensor in checkpoint.unshared(module).items()
        }
        return {name: tensor for name, tensor in tensors.items() if name not in learned}

    def _fingerprints(self) -> dict[str, Any]:
        return self._hashes

    @cached_property
    def _hashes(self) -> dict[str, str]:
        """Of what is learned from, in some steps spread over the run, and of the weights that stay."""
        steps = range(0, self.config.steps, max(1, self.config.steps // HASHED_STEPS))
        given = {f"{step}.{i}": t for step in steps for i, t in enumerate(self._given(step))}
        hashes = {"training data": checkpoint.fingerprint(given)}
        fixed = self._fixed()
        if fixed:
            hashes["frozen weights"] = checkpoint.fingerprint(fixed)
        return hashes

    def _state(self) -> RunState:
        tensors = optimizer_tensors(self.optimizer, self._numbers(), "optimizer")
        tensors["generator"] = self.generator.get_state()
        return RunState(dict(self._learned()), tensors, {"history": self.history})

    def _take_up(self, state: RunState) -> None:
        learned = self._learned()
        for name, parameter in learned.items():
            if name not in state.weights or state.weights[name].shape != parameter.shape:
                raise ValueError(
                    f"{self.state_path} is the state of another model: {name} is missing or has another"
                    " shape. Start anew without --resume"
                )
        fill(learned, state.weights)
        restore_optimizer(self.optimizer, self._numbers(), "optimizer", state.tensors)
        self.generator.set_state(state.tensors["generator"])
        self.history = state.values["history"]

    def _write(self, state: RunState, path: Path) -> None:
        tensors = {name: t.detach().cpu().clone() for name, t in (state.weights | state.tensors).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {"state": json.dumps(state.values)}))

    def _read(self, path: Path) -> RunState | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                values = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged, or no state of a run ({error}): delete it, and start anew without"
                " --resume"
            ) from None
        weights = {}
        for name in list(tensors):
            if name != "generator" and not name.startswith("optimizer."):
                weights[name] = tensors.pop(name)
        return RunState(weights, tensors, values)
