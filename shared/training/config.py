"""Week 2. How to train: the Trainer's settings, and the learning rate that follows from them at each step.

>>> config = TrainConfig(steps=100, warmup_steps=10, lr=1e-3, schedule="linear", final_lr=0.0)
>>> [round(lr_at(step, config), 6) for step in (0, 9, 55, 100)]
[0.0001, 0.001, 0.0005, 0.0]
"""

import math
from dataclasses import dataclass
from typing import Literal

from shared.checks import Checks


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
    """After the warmup. wsd: stay at the peak, then fall linearly in the last decay_fraction of the steps."""
    warmup_steps: int = 0
    """Steps in which the learning rate climbs to its peak; at most `steps`."""
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
    patience: int | None = None
    """Stop early, after so many evaluations in a row without a new lowest validation loss; none: never."""
    fused: bool = True
    """On a CPU in fp32: compute what can be fused in C (`fused.c`), where there is a compiler for it. The
    results differ by rounding; `fuse` says which operations.
    """
    log_updates: bool = False
    """Log each matrix's update-to-data ratio, log10(std of update / std of weight)."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "steps", "batch_size", "block_size", "grad_accum_steps")
        checks.at_least(1, "log_every", "eval_every", "checkpoint_every", "patience")
        checks.above(0, "lr", "muon_lr")
        checks.between(0, 1, "final_lr", "decay_fraction")
        checks.between(0, 1, "beta1", "beta2", "muon_momentum")
        checks.not_negative("weight_decay", "grad_clip", "warmup_steps")
        checks.require(
            self.eval_windows is None or self.eval_windows >= 1,
            f"eval_windows={self.eval_windows}: must be at least 1, or none for the whole split",
        )
        checks.require(
            self.warmup_steps <= self.steps,
            f"warmup_steps={self.warmup_steps} of steps={self.steps}: the training would end before the"
            " learning rate is at its peak. Set warmup-steps too, to at most as many"
            f" ({max(0, self.steps) // 10}, a tenth, is usual), or take more steps",
        )
        checks.one_of("optimizer", ("adamw", "muon"))
        checks.one_of("schedule", ("cosine", "linear", "wsd", "constant"))
        checks.seed()
        checks.finish()

    def idle(self) -> dict[str, str]:
        """The settings that the others make pointless, with the reason."""
        idle: dict[str, str] = {}
        if self.optimizer != "muon":
            idle |= dict.fromkeys(("muon_lr", "muon_momentum"), f"optimizer is {self.optimizer}")
        if self.schedule != "wsd":
            idle["decay_fraction"] = f"schedule is {self.schedule}"
        if self.schedule == "constant":
            idle["final_lr"] = "schedule is constant"
        return idle

    @property
    def tokens_per_step(self) -> int:
        """What a step reads."""
        return self.grad_accum_steps * self.batch_size * self.block_size

    def in_words(self) -> str:
        """A line for people: the steps, what each reads, and the learning rate.

        >>> TrainConfig(steps=100, warmup_steps=10).in_words()
        '100 steps of 32 x 64 tokens (204,800 in all), lr 0.001, cosine after 10 steps of warmup'
        """
        rows = f"{self.grad_accum_steps} x " if self.grad_accum_steps > 1 else ""
        rates = f"lr {self.lr:g}" + (f", Muon's {self.muon_lr:g}" if self.optimizer == "muon" else "")
        return (
            f"{self.steps:,} steps of {rows}{self.batch_size} x {self.block_size} tokens"
            f" ({self.steps * self.tokens_per_step:,} in all), {rates}, {self.schedule} after"
            f" {self.warmup_steps} steps of warmup"
        )


def lr_at(step: int, config: TrainConfig) -> float:
    """AdamW's learning rate at a step, counted from 0; Muon's follows the same curve.

    The warmup reaches the peak at step warmup_steps - 1; the decay reaches final_lr · lr at step `steps`, one
    past the last.
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
