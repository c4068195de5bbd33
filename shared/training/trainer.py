"""Week 2. The training loop, used to the end of the course.

It has a schedule, clipping, accumulation, evaluation and checkpoints, and can be resumed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared import checkpoint
from shared.data.corpus import Corpus
from shared.registry import LanguageModel, unwrapped
from shared.runtime import RunLog, clock
from shared.training.callbacks import Callback, Callbacks
from shared.training.config import TrainConfig, lr_at
from shared.training.diagnosis import (
    TrainingStopped,
    gradient_to_blame,
    matrices,
    update_ratios,
    where_not_finite,
)
from shared.training.execution import ALONE, FP32, OneProcess, Precision, Share, training_device
from shared.training.fusing import Fusion
from shared.training.optim import describe_optimizers, optimizers_of, own_optimizers
from shared.training.resume import (
    ResumableLoop,
    RunState,
    beside_what_learns,
    fill,
    finite,
    optimizer_tensors,
    restore_optimizer,
)
from shared.training.tasks import NextToken, Task, check_task, take


class Trainer(ResumableLoop[TrainConfig]):
    """Trains any model of the course (ids -> logits) on a corpus, or on another `Task`.

    log: where the curves go; None keeps them in memory only, under `history`. checkpoints: a folder that gets
    `last` (every checkpoint_every steps, on Ctrl-C and at the end) and `best` (the lowest validation loss);
    None keeps nothing. Of a model with frozen parts only what is trained beside them is kept. device: None is
    where the model is, "auto" the best there is. precision: what a step computes in. processes: which
    processes share it. callbacks: what is to happen beside the steps (`callbacks.py`).

    optimizers: one of torch's or several, made of the model's parameters; None makes what the settings say.
    With them, the settings' optimizer, lr, muon_lr, muon_momentum, weight_decay and betas have no effect:
    each group's own learning rate is the peak of the schedule.

    Raises ValueError for what is no task, no optimizer of the model, or no callback.
    """

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus | Task,
        config: TrainConfig,
        log: RunLog | None = None,
        checkpoints: Path | str | None = None,
        *,
        device: torch.device | str | None = None,
        description: str = "training",
        precision: Precision = FP32,
        processes: OneProcess = ALONE,
        callbacks: Sequence[Callback] = (),
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    ):
        self.checkpoints = Path(checkpoints) if checkpoints else None
        last = self.checkpoints / "last" if self.checkpoints else None
        super().__init__(config, last, log, description=description, processes=processes)
        self.callbacks = Callbacks(callbacks)
        self.task: Task = NextToken(corpus) if isinstance(corpus, Corpus) else corpus
        check_task(self.task, config)
        self.model = unwrapped(model)
        self.device = training_device(device, self.model)
        self.model.to(self.device)
        self.precision = precision
        self.share = Share.of(config.grad_accum_steps, processes.rank, processes.world_size)
        precision.prepare(self.model)
        self.call = processes.prepare(model)
        self.fusion = Fusion.of(config, self.model, self.device, precision, processes)
        self._own_optimizers: list[dict[str, Any]] | None = None
        if optimizers is None:
            self.optimizers = optimizers_of(config, self.model, self.fusion.optimizer)
        else:
            self.optimizers = own_optimizers(optimizers, self.model)
            self._own_optimizers = describe_optimizers(self.optimizers)
        self.seconds = 0.0
        """Spent in steps; evaluating and saving are not counted."""
        self.tokens = 0
        """Read so far, by all processes."""
        self._wall_before = 0.0
        self._opened: float | None = None
        self.first_loss = math.nan
        self.last_loss = math.nan
        self.final: dict[str, float] = {}
        """The last evaluation."""
        self.best: dict[str, float] = {}
        """The evaluation with the lowest validation loss, and its step."""
        self.worse = 0
        """Evaluations since then."""

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Trains to the end and returns the summary: last and best evaluation, first training loss, seconds
        of training, tokens/s. With `patience`, or `stop`, the end may come before the last step; why it was
        called is in the summary then, as "stopped".

        resume: go on from `last` as if nothing had happened (on a CPU, bit for bit); without a checkpoint
        there, start anew, said aloud. Ctrl-C ends the present step, saves, and raises KeyboardInterrupt.
        A finished run goes on where the settings have more steps than it had. Raises TrainingStopped for a
        loss or a gradient that is not finite, and ValueError where the task's batches end before the steps
        do, and where another process trains in the folder of the checkpoints.
        """
        with self._alone(), self.fusion.training(self.model):
            self._opened = clock()
            self._open(resume)
            if self.fusion.message:
                self._say(self.fusion.message)
            self.model.train()
            batches = self.task.batches(
                self.config,
                self.step * self.config.grad_accum_steps + self.share.first,
                self.share.rank,
                self.share.world_size,
                every=self.share.every,
            )
            self.callbacks.on_start(self)
            self._run(partial(self._step_and_evaluate, batches))
            self._wall_before, self._opened = self.wall_seconds, None
            self.callbacks.on_end(self)
        return self.summary()

    @property
    def wall_seconds(self) -> float:
        """Everything from the first step to now, or to the end of `fit`: steps, evaluations, checkpoints. Of
        a resumed run also what was spent before.
        """
        return self._wall_before + (clock() - self._opened if self._opened is not None else 0.0)

    def summary(self) -> dict[str, Any]:
        """What `fit` returns, as of the last step."""
        return {
            **self.final,
            **{f"best_{name}": value for name, value in self.best.items()},
            "first_loss": self.first_loss,
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            **({"stopped": self.stopped} if self.stopped else {}),
        }

    def take_best(self) -> LanguageModel:
        """Gives the model the weights that it had at the lowest validation loss, and returns it."""
        if self.checkpoints is None:
            raise ValueError("this Trainer keeps no checkpoints: give it a folder for them")
        weights, _, _ = checkpoint.load_learned(self.model, self.checkpoints / "best", self.task.tokenizer)
        fill(checkpoint.learned(self.model), weights, self.processes)
        return self.model

    # ---- one step

    def train_step(self, batches: Iterator[tuple[Tensor, ...]]) -> None:
        """Takes this process's share of a step's batches, updates the weights once, counts and logs.

        Raises TrainingStopped, before anything is updated, for a loss or a gradient that is not finite.
        """
        started = clock()
        lr = lr_at(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr / self.config.lr
        loss, used = self._accumulate(batches)
        length, skipped = self._clip(loss, used)
        logged = self.step == 0 or (self.step + 1) % self.config.log_every == 0
        before = matrices(self.model) if logged and self.config.log_updates else {}
        self.precision.step([] if skipped else self.optimizers)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        rate = self._rate_at(self.step, self.config.steps)
        row = {"train_loss": loss, "lr": rate, "grad_norm": length, **update_ratios(self.model, before)}
        if self.step == 0:
            self.first_loss = loss
        self.last_loss = loss
        self.step += 1
        self.seconds += clock() - started
        if logged:
            row.update(self.precision.state())
            # In a skipped step, the loss or the gradient's length is not finite.
            self.record({**finite(row), "seconds": self.seconds})

    def _accumulate(self, batches: Iterator[tuple[Tensor, ...]]) -> tuple[float, list[list[Tensor]]]:
        """Adds up the gradients of a step; returns its loss and its batches.

        The loss is the mean over all tokens that are learned in the step, in all batches and processes: each
        batch counts by its share of them. The processes wait for each other, and the device is asked for a
        number, once a step and not once a batch.
        """
        read = take(batches, self.share.micro_batches, f"step {self.step + 1} of {self.config.steps}")
        self.tokens += sum(batch[0].numel() for batch in read) * self.processes.world_size
        tokens = [self.task.learned_tokens(*batch) for batch in read]  # before they are on the device
        step_batches = [[part.to(self.device) for part in batch] for batch in read]
        tokens_of_a_process = self.processes.mean(sum(tokens))  # gradients are averaged over processes
        losses = []
        for number, (batch, count) in enumerate(zip(step_batches, tokens), 1):
            last = number == len(step_batches)
            # Forward and backward: DDP decides in the forward whether gradients will be exchanged.
            with nullcontext() if last else self.processes.accumulating(self.call):
                with self.precision.autocast(self.device):
                    loss = self.task.loss(self.call, *batch) * (count / tokens_of_a_process)
                losses.append(loss.detach())
                self.precision.backward(loss)
        total = self.processes.mean(torch.stack(losses).sum().item())
        if not (math.isfinite(total) or self.precision.skips):
            place = self._where_not_finite(step_batches) or "the loss itself (every layer's output is finite)"
            self._refuse(f"the loss is {total}", place)
        return total, step_batches

    def _clip(self, loss: float, used: list[list[Tensor]]) -> tuple[float, bool]:
        """Shortens the gradient to grad_clip; returns its length before, and whether to skip the step."""
        self.precision.unscale(self.optimizers)
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        total_norm = nn.utils.get_total_norm(gradients.values())
        length = self.processes.full_tensor(total_norm).item()
        if not (math.isfinite(length) and math.isfinite(loss)):
            if not self.precision.skips:
                # Looked at before clipping, which spreads a nan to all gradients.
                name, is_finite = gradient_to_blame(gradients, self.processes.full_tensor)
                problem = "the gradient's length overflows" if is_finite else "a gradient is not finite"
                self._refuse(problem, self._where_not_finite(used) or f"the gradient of {name}")
            return length, True
        if 0 < self.config.grad_clip < length + 1e-6:  # PyTorch would multiply a shorter one by 1
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.grad_clip, total_norm)
        return length, False

    def _where_not_finite(self, used: list[list[Tensor]]) -> str | None:
        """Where numbers stop being finite in a forward pass over these batches; None if nowhere."""

        def forward() -> None:
            with self.precision.autocast(self.device):
                for batch in used:
                    self.task.loss(self.model, *batch)

        place = where_not_finite(self.model, forward, self.processes.full_tensor)
        elsewhere = self.processes.mean(float(place is not None)) > 0
        if place is None and elsewhere:
            return "what another process computed, whose message says where"
        return place

    def _refuse(self, problem: str, place: str) -> None:
        kept = f" The last checkpoint is in {self.state_path}." if self.state_path else ""
        rate = self._rate_at(self.step, self.config.steps)
        raise TrainingStopped(
            f"step {self.step + 1}: {problem}; it began in {place}. Nothing was updated in this step.{kept} A"
            f" lower learning rate (now {rate:.3g}), a longer warmup or clipping"
            f" (grad_clip={self.config.grad_clip}) usually helps"
        )

    def _rate_at(self, step: int, steps: int) -> float:
        """That of the first group of the first optimizer."""
        peak = self.optimizers[0].param_groups[0]["peak_lr"]
        return float(peak * lr_at(step, replace(self.config, steps=steps)) / self.config.lr)

    # ---- evaluation and checkpoints

    def _step_and_evaluate(self, batches: Iterator[tuple[Tensor, ...]]) -> float:
        self.callbacks.on_step_start(self)
        self.train_step(batches)
        self.callbacks.on_step(self)
        if self._is_due(self.config.eval_every):
            self._evaluate()
            if self.processes.rank == 0:
                tqdm.write(
                    f"  {self.description}: step {self.step}, loss {self.last_loss:.3f}, validation"
                    f" {self.final['val_loss']:.4f}"
                )
            self.callbacks.on_evaluation(self)
        return self.last_loss

    def _ends_early(self) -> bool:
        return self.config.patience is not None and self.worse >= self.config.patience

    def _evaluate(self) -> None:
        with self.precision.autocast(self.device):
            self.final = self.task.evaluate(self.model, self.config, self.device)
        if "val_loss" not in self.final:
            raise ValueError(
                f"evaluate of the task {self.task.name} gave {', '.join(self.final) or 'nothing'}: val_loss"
                " must be among its metrics, by which the best checkpoint is chosen"
            )
        self.record({**self.final, "seconds": self.seconds})
        # A nan is worse than any number: one from the first evaluation would otherwise stay for ever.
        best = self.best.get("val_loss", math.nan)
        if not self.best or math.isnan(best) or self.final["val_loss"] < best:
            self.best = {**self.final, "step": self.step}
            self.worse = 0
            self._save_best()
        else:
            self.worse += 1
        if self._ends_early() and self.step < self.config.steps:
            self._say(
                f"stopped early, at step {self.step} of {self.config.steps}: the validation loss was lowest"
                f" at step {self.best['step']}, {self.worse} evaluations ago"
            )

    def _save_best(self) -> None:
        if self.checkpoints is not None:
            self._write(RunState(self._full_weights(), {}, {}), self.checkpoints / "best")

    def _full_weights(self) -> dict[str, Tensor]:
        learned = checkpoint.learned(self.model)
        return {name: self.processes.full_tensor(tensor) for name, tensor in learned.items()}

    def _identity(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "data": self.task.name,
            "dtype": str(self.precision.dtype),
            "optimizers": self._own_optimizers,
        }

    def _fingerprints(self) -> dict[str, Any]:
        return {**self.task.fingerprints, **self._beside}

    @cached_property
    def _beside(self) -> dict[str, Any]:
        return beside_what_learns(self.model, self.processes)

    def _begin(self) -> None:
        torch.manual_seed(self.config.seed + self.processes.rank)

    def _state(self) -> RunState:
        tensors = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        for number, optimizer in enumerate(self.optimizers):
            tensors |= optimizer_tensors(optimizer, self._names(), str(number), self.processes)
        values = {
            "seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "best": self.best,
            "worse": self.worse,
            "final": self.final,
            "tokens": self.tokens,
            "callbacks": self.callbacks.state(),
            "precision": self.precision.state(),
        }
        return RunState(self._full_weights(), tensors, values)

    def _take_up(self, state: RunState) -> None:
        values = state.values
        fill(checkpoint.learned(self.model), state.weights, self.processes)
        for number, optimizer in enumerate(self.optimizers):
            restore_optimizer(optimizer, self._names(), str(number), state.tensors, processes=self.processes)
        if self.processes.rank == 0:
            torch.set_rng_state(state.tensors["random.cpu"].cpu())
        else:  # the state of this process was not saved; any will do that is not another's
            torch.manual_seed(self.config.seed + self.processes.rank + values["step"])
        if "random.cuda" in state.tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(state.tensors["random.cuda"].cpu(), self.device)
        self.precision.restore(values["precision"])
        self.seconds = values["seconds"]
        self._wall_before = values["wall_seconds"]
        self.first_loss = values["first_loss"]
        self.last_loss = values["last_loss"]
        self.best = values["best"]
        self.worse = values["worse"]
        self.final = values["final"]
        self.tokens = values["tokens"]
        self.callbacks.restore(values["callbacks"])

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def _write(self, state: RunState, path: Path) -> None:
        if self.processes.rank > 0:
            return
        partial_model = len(state.weights) < len(checkpoint.unshared(self.model))
        checkpoint.save(
            self.model,
            path,
            self.task.tokenizer,
            self.final,
            tensors=state.tensors,
            state=state.values or None,  # the best weights are kept alone
            weights=state.weights,
            more={"beside": "a frozen model"} if partial_model else {},
        )

    def _read(self, path: Path) -> RunState | None:
        if checkpoint.find(path) is None:
            return None
        weights, tensors, values = checkpoint.load_learned(self.model, path, self.task.tokenizer)
        if not values:
            raise ValueError(f"{path} was saved without training state: it can be used, not resumed")
        earlier = {
            "dtype": str(self.precision.dtype),
            "precision": {},
            "worse": 0,
            "wall_seconds": values.get("seconds"),  # of the steps alone
            "optimizers": None,
            "callbacks": {},
            "tokens": values.get("step", 0) * self.config.tokens_per_step,
        }
        """What the checkpoints of earlier versions lack."""
        # Until hashes were kept, a file's name had none.
        if "training data" not in values and self.task.name.startswith(f"{values.get('data')}-"):
            values["data"] = self.task.name
        if "config" in values:  # earlier versions had no fused operations
            values["config"] = {"fused": self.config.fused, **values["config"]}
        return RunState(weights, tensors, earlier | values)
