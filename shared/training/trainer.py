"""Week 2. The training loop, used to the end of the course: schedule, clipping, accumulation, evaluation,
checkpoints, resume.

>>> config = TrainConfig(steps=100, warmup_steps=10, lr=1e-3, schedule="linear", final_lr=0.0)
>>> [round(lr_at(step, config), 6) for step in (0, 9, 55, 100)]
[0.0001, 0.001, 0.0005, 0.0]
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared import checkpoint
from shared.data.corpus import Corpus, batches
from shared.evaluation import cross_entropy, evaluate
from shared.runtime import RunLog, check_seed, clock, finish_first
from shared.training.execution import ALONE, FP32, OneProcess, Precision
from shared.training.optim import build_optimizers


@dataclass(frozen=True)
class TrainConfig:
    """How to train. A step reads grad_accum_steps · batch_size · block_size tokens."""

    steps: int = 1000
    batch_size: int = 32
    """Sequences at a time."""
    block_size: int = 64
    """Tokens in a sequence."""
    grad_accum_steps: int = 1
    """Batches whose gradients are averaged into one step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the matrices inside the model, AdamW on the rest."""
    lr: float = 1e-3
    """AdamW's peak learning rate."""
    muon_lr: float = 0.02
    """Muon's peak learning rate."""
    muon_momentum: float = 0.95
    """How much of the past Muon's direction keeps; short runs do better with less."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warmup. wsd: stay at the peak, then fall linearly during the last decay_fraction of the
    steps.
    """
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final_lr: float = 0.1
    """Where the schedule ends, as a fraction of the peak."""
    weight_decay: float = 0.1
    """On matrices only."""
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    """Longest gradient; longer ones are shortened to it. 0: never."""
    seed: int = 1337
    log_every: int = 10
    eval_every: int = 250
    eval_windows: int | None = None
    """Windows of the validation split to measure on, spread evenly; none takes the whole split."""
    checkpoint_every: int = 250
    log_updates: bool = False
    """Log each matrix's update-to-data ratio, log10(std of update / std of weight)."""

    def __post_init__(self) -> None:
        problems = []
        for name in (
            "steps",
            "batch_size",
            "block_size",
            "grad_accum_steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("lr", "muon_lr"):
            if not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("final_lr", "decay_fraction", "beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name}={getattr(self, name)}: must be from 0 to 1")
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            if not getattr(self, name) >= 0:  # nan is refused too
                problems.append(f"{name}={getattr(self, name)}: must not be negative")
        if self.eval_windows is not None and self.eval_windows < 1:
            problems.append(
                f"eval_windows={self.eval_windows}: must be at least 1, or none for the whole split"
            )
        if self.optimizer not in ("adamw", "muon"):
            problems.append(f"optimizer={self.optimizer!r}: must be adamw or muon")
        if self.schedule not in ("cosine", "linear", "wsd", "constant"):
            problems.append(f"schedule={self.schedule!r}: must be cosine, linear, wsd or constant")
        try:
            check_seed(self.seed)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("TrainConfig: " + "; ".join(problems))


def lr_at(step: int, config: TrainConfig) -> float:
    """AdamW's learning rate at a step, counted from 0; Muon's follows the same curve. Warmup reaches the peak
    at step warmup_steps - 1; the decay reaches final_lr · lr at step `steps`, one past the last.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    if config.schedule == "constant":
        fall = 0.0
    elif config.schedule == "linear":
        fall = done
    elif config.schedule == "cosine":
        fall = 0.5 * (1 - math.cos(math.pi * done))
    else:
        start = config.steps * (1 - config.decay_fraction)
        fall = min(1.0, max(0.0, (step - start) / max(1.0, config.steps - start)))
    return config.lr * (1 - fall * (1 - config.final_lr))


class NextToken:
    """What there is to learn, and how it is measured: each next token of a corpus. Week 9's `instructions.py`
    has the one for answers only.
    """

    def __init__(self, corpus: Corpus):
        self.corpus, self.name, self.tokenizer = corpus, corpus.name, corpus.tokenizer

    def batches(
        self, config: TrainConfig, start_step: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """What `loss` takes, batch by batch from the `start_step`-th on; of each batch this process's part."""
        return batches(
            self.corpus.train, config.block_size, config.batch_size, config.seed, start_step, rank, world_size
        )

    def loss(self, call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """The mean over a batch, in nats per token. call: the model, or what stands for it in a step."""
        x, y = batch
        return cross_entropy(call(x), y)

    def evaluate(self, model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, float]:
        """On what is held out: `val_loss`, which decides what is best, and what else there is to say."""
        token_bytes, windows = self.corpus.token_bytes, config.eval_windows
        return evaluate(
            model, self.corpus.val, config.block_size, token_bytes, max_windows=windows, device=device
        ).as_metrics()


class TrainingStopped(ValueError):
    """The loss or a gradient is not a finite number; the message names the step and where it began."""


class Trainer:
    """Trains any model of the course (ids -> logits) on a corpus, or on another task with `NextToken`'s
    methods.

    checkpoints: a folder that gets `last` (every checkpoint_every steps, on Ctrl-C and at the end) and `best`
    (the lowest validation loss); None keeps nothing. Of a model with frozen parts only what is trained beside
    them is kept. log: where the curves go; None keeps them in memory only, under `history`. precision,
    processes: what a step computes in, and who takes part in it.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus | NextToken,
        config: TrainConfig,
        log: RunLog | None = None,
        checkpoints: Path | str | None = None,
        device: torch.device | str = "cpu",
        description: str = "training",
        precision: Precision = FP32,
        processes: OneProcess = ALONE,
    ):
        self.precision, self.processes = precision, processes
        self.model, self.config, self.log = model.to(device), config, log
        self.task = NextToken(corpus) if isinstance(corpus, Corpus) else corpus
        self.checkpoints = Path(checkpoints) if checkpoints else None
        self.device, self.description = torch.device(device), description
        self.call = processes.prepare(self.model)
        self.optimizers = build_optimizers(
            model,
            config.optimizer,
            config.lr,
            config.muon_lr,
            config.weight_decay,
            (config.beta1, config.beta2),
            config.muon_momentum,
        )
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Trains to the end and returns the summary: last and best evaluation, first training loss, seconds
        of training, tokens/s.

        resume: go on from `last` as if nothing had happened (on a CPU, bit for bit); without a checkpoint
        there, start anew, said aloud. Ctrl-C ends the present step, saves, and raises KeyboardInterrupt.
        Raises TrainingStopped for a loss that is not finite.
        """
        if not (resume and self._restore()):
            torch.manual_seed(self.config.seed + self.processes.rank)
            if self.log:
                self.log.rewind(0)
        self.model.train()
        start, who = self.step * self.config.grad_accum_steps, self.processes
        stream = self.task.batches(self.config, start, who.rank, who.world_size)
        progress = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.description,
            unit="step",
            disable=self.processes.rank > 0 or None,
            leave=False,
        )
        with progress, finish_first("the step") as interrupted:
            while self.step < self.config.steps:
                self._step(stream)
                progress.update()
                progress.set_postfix_str(f"loss {self.last_loss:.3f}", refresh=False)
                done = self.step == self.config.steps
                if self.step % self.config.eval_every == 0 or done:
                    self._evaluate()
                    if self.processes.rank == 0:
                        progress.write(
                            f"  {self.description}: step {self.step}, loss {self.last_loss:.3f}, validation"
                            f" {self.final['val_loss']:.4f}"
                        )
                # Asked once, of all processes: a Ctrl-C that comes while saving ends the next step, which is
                # then saved too.
                stop = self.processes.mean(interrupted()) > 0
                if self.step % self.config.checkpoint_every == 0 or done or stop:
                    self._save("last")
                    self.processes.wait()  # what the first process has written can be read by all
                if stop:
                    raise KeyboardInterrupt
        return self.summary()

    def summary(self) -> dict[str, Any]:
        tokens = self.step * self.config.batch_size * self.config.block_size * self.config.grad_accum_steps
        return {
            **self.final,
            **{f"best_{k}": v for k, v in self.best.items()},
            "first_loss": self.first_loss,
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
        }

    # ---- one step

    def _step(self, stream: Iterator[tuple[Tensor, Tensor]]) -> None:
        started = clock()
        c, total = self.config, 0.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_at(self.step, c) / c.lr
        for i in range(c.grad_accum_steps):
            batch = [part.to(self.device) for part in next(stream)]
            with nullcontext() if i == c.grad_accum_steps - 1 else self.processes.accumulating(self.call):
                with self.precision.autocast(self.device):
                    loss = self.task.loss(self.call, *batch) / c.grad_accum_steps
                total += self.processes.mean(loss.item())
                if not (math.isfinite(total) or self.precision.skips):
                    with self.precision.autocast(self.device):
                        self._stop(
                            f"the loss is {total}",
                            culprit(self.model, partial(self.task.loss, self.model, *batch)),
                        )
                self.precision.backward(loss)
        self.precision.unscale(self.optimizers)
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        length = nn.utils.get_total_norm(grads.values())
        norm = self.processes.whole(length).item()
        skipped = not (math.isfinite(norm) and math.isfinite(total))
        if (
            skipped and not self.precision.skips
        ):  # looked at before clipping, which spreads a nan to all of them
            bad = next((n for n, g in grads.items() if not g.isfinite().all()), None)
            longest = max(grads, key=lambda n: grads[n].abs().max().item())
            self._stop(
                "a gradient is not finite" if bad else "the gradient's length overflows",
                f"the gradient of {bad or longest}",
            )
        if c.grad_clip and not skipped:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), c.grad_clip, length)
        row = {"train_loss": total, "lr": lr_at(self.step, c), "grad_norm": norm}
        logged = self.step == 0 or (self.step + 1) % c.log_every == 0
        before = (
            {n: p.detach().clone() for n, p in self.model.named_parameters() if p.dim() >= 2}
            if c.log_updates and logged
            else {}
        )
        self.precision.step([] if skipped else self.optimizers)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for name, old in before.items():
            new = self.model.get_parameter(name).detach()
            row[f"update/{name}"] = math.log10(((new - old).std() / old.std()).item() + 1e-12)
        if self.step == 0:
            self.first_loss = total
        self.step += 1
        self.last_loss = total
        self.seconds += clock() - started
        if logged:
            row |= self.precision.state()
            self._record(
                **{k: v for k, v in row.items() if math.isfinite(v)}, seconds=self.seconds
            )  # in a skipped step some are not

    def _stop(self, what: str, where: str) -> None:
        kept = f" The last checkpoint is in {self.checkpoints / 'last'}." if self.checkpoints else ""
        raise TrainingStopped(
            f"step {self.step + 1}: {what}; it began in {where}. Nothing was updated in this step.{kept} A"
            f" lower learning rate (now {lr_at(self.step, self.config):.3g}), a longer warmup or clipping"
            f" (grad_clip={self.config.grad_clip}) usually helps"
        )

    def _record(self, **values: float) -> None:
        self.history.append({"step": self.step, **values})
        if self.log:
            self.log.log(self.step, **values)

    def _evaluate(self) -> None:
        with self.precision.autocast(self.device):
            self.final = self.task.evaluate(self.model, self.config, self.device)
        self._record(**self.final, seconds=self.seconds)
        if not self.best or self.final["val_loss"] < self.best["val_loss"]:
            self.best = {**self.final, "step": self.step}
            self._save("best")

    # ---- checkpoints

    def _save(self, name: str) -> None:
        if self.checkpoints is None:
            return
        own = checkpoint.learned(self.model)
        weights = {n: self.processes.whole(t) for n, t in own.items()}
        more = {"beside": "a frozen model"} if len(own) < len(checkpoint.unshared(self.model)) else {}
        if name == "best":
            if self.processes.rank == 0:
                checkpoint.save(
                    self.checkpoints / name,
                    self.model,
                    self.task.tokenizer,
                    self.final,
                    weights=weights,
                    more=more,
                )
            return
        tensors = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        for i, parameter, _, moments in self._optimizer_states():
            tensors |= {f"{i}.{parameter}.{key}": self.processes.whole(t) for key, t in moments.items()}
        if self.processes.rank > 0:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "best": self.best,
            "final": getattr(self, "final", {}),
            "config": asdict(self.config),
            "data": self.task.name,
            "dtype": str(self.precision.dtype),
            "precision": self.precision.state(),
        }
        checkpoint.save(
            self.checkpoints / name,
            self.model,
            self.task.tokenizer,
            getattr(self, "final", {}),
            tensors,
            state,
            weights,
            more,
        )

    def _optimizer_states(self) -> Iterator[tuple[int, str, nn.Parameter, dict[str, Tensor]]]:
        """(optimizer's number, parameter's name, the parameter, its state) for each parameter."""
        names = {p: n for n, p in self.model.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    yield i, names[p], p, optimizer.state[p]

    def take_best(self) -> nn.Module:
        """Gives the model the weights that it had at the lowest validation loss, and returns it."""
        if self.checkpoints is None:
            raise ValueError("this Trainer keeps no checkpoints: give it a folder for them")
        self._fill(checkpoint.load_learned(self.checkpoints / "best", self.model, self.task.tokenizer)[0])
        return self.model

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in checkpoint.learned(self.model).items():
            tensor.copy_(self.processes.placed(weights[name], tensor))

    def _restore(self) -> bool:
        """Takes up the state in `last`; False if there is none."""
        if self.checkpoints is None or checkpoint.find(self.checkpoints / "last") is None:
            print(f"{self.description}: no checkpoint to resume from, so it starts from the beginning")
            return False
        weights, tensors, saved = checkpoint.load_learned(
            self.checkpoints / "last", self.model, self.task.tokenizer
        )
        if not saved:
            raise ValueError(
                f"{self.checkpoints / 'last'} was saved without training state: it can be used, not resumed"
            )
        now = asdict(self.config) | {"data": self.task.name, "dtype": str(self.precision.dtype)}
        then = saved["config"] | {
            "data": saved["data"],
            "dtype": saved.get("dtype", str(self.precision.dtype)),
        }
        changed = [
            f"{k}={then.get(k)} then, {now.get(k)} now" for k in now | then if then.get(k) != now.get(k)
        ]
        if changed:
            raise ValueError(
                f"{self.checkpoints / 'last'} cannot be resumed with other settings: {'; '.join(changed)}."
                " Restore them, or start anew without --resume"
            )
        self._fill(weights)
        for i, name, p, state in self._optimizer_states():
            prefix = f"{i}.{name}."
            for key, t in tensors.items():
                if key.startswith(prefix):  # Adam's step counter is one number, and the same for all
                    state[key.removeprefix(prefix)] = (
                        self.processes.placed(t, p) if t.dim() else t.to(self.device)
                    )
        if self.processes.rank == 0:
            torch.set_rng_state(tensors["random.cpu"].cpu())
        else:  # its own was not saved: any that is unlike the others' will do
            torch.manual_seed(self.config.seed + self.processes.rank + saved["step"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"].cpu(), self.device)
        self.precision.restore(saved.get("precision", {}))
        for key in ("step", "seconds", "first_loss", "last_loss", "best", "final"):
            setattr(self, key, saved[key])
        if self.log:
            self.log.rewind(self.step)
        if self.processes.rank == 0:
            print(f"{self.description}: resumed at step {self.step}")
        return True


@torch.no_grad()
def culprit(model: nn.Module, run: Callable[[], Any]) -> str:
    """Where the first number that isn't finite comes from: a parameter, or else the first module whose output
    has one when `run` calls the model.
    """
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            return f"the parameter {name}"
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name or type(model).__name__)

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in model.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return f"the output of {found[0]}" if found else "the loss itself (every layer's output is finite)"
