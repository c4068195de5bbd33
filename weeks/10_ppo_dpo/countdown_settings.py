"""How week 10's countdown is set: the problems, the base, and how each method goes on from it."""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from shared.alignment.countdown import END, Countdown
from shared.alignment.expert_iteration import ExpertConfig
from shared.alignment.loops import GRPOConfig, PPOConfig
from shared.checks import Checks
from shared.models.gpt import GPTConfig
from shared.training import TrainConfig

Seeded = TypeVar("Seeded", TrainConfig, ExpertConfig, GRPOConfig, PPOConfig)
PROBLEMS = Countdown(sizes=(2,), largest=50, largest_target=400)
ANSWER_TOKENS = PROBLEMS.answer_tokens
ONLINE: dict[str, Any] = dict(
    beta=0.0,
    max_new_tokens=ANSWER_TOKENS,
    end=END,
    epochs=1,
    minibatches=2,
    final_lr=0.1,
    checkpoint_every=20,
)
"""What the four online methods have in common. beta is 0: a reward that is verified cannot be fooled."""


@dataclass(frozen=True)
class CountdownSettings:
    """The week's main result: a model that knows little more than the form of answers learns right ones."""

    problems: Countdown = PROBLEMS
    model: GPTConfig = GPTConfig.preset("mini", block_size=16, n_layer=2, n_embd=64)
    base: TrainConfig = TrainConfig(
        steps=200,
        batch_size=64,
        block_size=16,
        optimizer="muon",
        lr=0.006,
        muon_lr=0.02,
        muon_momentum=0.9,
        schedule="linear",
        warmup_steps=10,
        final_lr=0.0,
        beta2=0.95,
        weight_decay=0.05,
        grad_clip=0.0,
        eval_every=200,
        checkpoint_every=200,
        fused=False,
    )
    """Supervised training, which teaches the form. PyTorch alone computes it, as it does the other methods,
    since all are compared by processor time.
    """
    base_right: float = 0.2
    """The share of the base's lines whose expression solves its problem; the others' values are chance, which
    solve some too. --study form has none.
    """
    control_steps: int = 180
    """Of more supervised training, on true solutions or on the form again: as long as a method takes."""
    control_rate: float = 0.02
    """Muon's learning rate in it; AdamW's is in the same proportion as the base's."""
    expert: ExpertConfig = ExpertConfig(
        steps=100, lr=1e-3, max_new_tokens=ANSWER_TOKENS, end=END, epochs=2, final_lr=0.1, checkpoint_every=20
    )
    grpo: GRPOConfig = GRPOConfig(steps=54, lr=1e-3, **ONLINE)
    dr_grpo: GRPOConfig = GRPOConfig(steps=54, lr=1e-3, scale="none", loss_type="dr_grpo", **ONLINE)
    rloo: GRPOConfig = GRPOConfig(
        steps=54, lr=1e-3, baseline="others", scale="none", loss_type="dr_grpo", **ONLINE
    )
    ppo: PPOConfig = PPOConfig(steps=35, lr=1e-3, **ONLINE)
    """Its prompts are the same, each as often as a group has answers."""
    rows: int = 128
    """Answers in each batch."""
    held_out: int = 96
    """Problems that results are reported on."""
    samples: int = 8
    """Answers to each of them."""
    measurements: int = 3
    """On other problems, spread over a run, for the curves."""
    seed: int = 1
    """Of a run: it counts the seeds of the base and of every method on."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """For --study methods."""
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """For --study rates, of the online methods and of expert iteration."""
    control_rates: tuple[float, ...] = (0.005, 0.02, 0.05)
    """For --study rates, of the supervised control."""
    rates_share: float = 0.4
    """For --study rates: the share of each method's steps that a trial of a rate takes."""
    longer: int = 12
    """For --study longer: how many times the steps of the control, of expert iteration and of GRPO."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "rows", "measurements", "control_steps", "seed", "longer")
        checks.require(all(seed >= 1 for seed in self.seeds), f"seeds={self.seeds}: must be at least 1")
        checks.at_least(8, "samples")
        checks.at_least(2, "held_out")
        checks.above(0, "control_rate", "rates_share")
        checks.between(0, 1, "base_right")
        for name in ("rates", "control_rates"):
            checks.require(all(rate > 0 for rate in getattr(self, name)), f"{name}: must be above 0")
        sizes = {method: self.group_size(method) for method in ("expert", "grpo", "dr_grpo", "rloo")}
        for method, size in sizes.items():
            checks.require(
                self.rows % size == 0, f"rows={self.rows}: must be a multiple of {method}'s {size}"
            )
        longest = self.problems.prompt_tokens + self.problems.answer_tokens
        for name, length in (("base", self.base.block_size + 1), ("model", self.model.block_size)):
            checks.require(
                length >= longest,
                f"{name}.block_size: a problem with its answer has up to {longest} characters",
            )
        for method in ("expert", "grpo", "dr_grpo", "rloo", "ppo"):
            given, needed = getattr(self, method).max_new_tokens, self.problems.answer_tokens
            checks.require(
                given >= needed, f"{method}.max_new_tokens={given}: an answer has up to {needed} characters"
            )
        checks.finish()

    def group_size(self, method: str) -> int:
        """Answers to each prompt."""
        return (self.grpo if method == "ppo" else getattr(self, method)).group_size

    def seeded(self, config: Seeded) -> Seeded:
        """A part's settings with the seed that it has in this run: moved on by one less than `seed`."""
        return replace(config, seed=config.seed + self.seed - 1)

    def with_rate(self, method: str, rate: float) -> "CountdownSettings":
        """The same for a trial of another learning rate of one method: with `rates_share` of its steps."""
        if method in CONTROLS:
            return replace(self, control_rate=rate, control_steps=self._trial_steps(self.control_steps))
        config = getattr(self, method)
        return replace(self, **{method: replace(config, lr=rate, steps=self._trial_steps(config.steps))})

    def taking_longer(self) -> "CountdownSettings":
        """The same with `longer` times the steps, and as many times the measurements as a plot can show."""
        steps = {name: getattr(self, name).steps * self.longer for name in ("expert", "grpo")}
        configs = {name: replace(getattr(self, name), steps=number) for name, number in steps.items()}
        measurements = self.measurements * min(self.longer, 4)
        return replace(
            self, control_steps=self.control_steps * self.longer, measurements=measurements, **configs
        )

    def _trial_steps(self, steps: int) -> int:
        return math.ceil(self.rates_share * steps)

    def idle_in(self, study: str | None) -> dict[str, str]:
        """The settings that the week's run or a study does not read, with the reason."""
        if study not in (None, "methods", "rates", "form", "longer"):
            return {}  # it reads none of them
        idle = {"countdown.model.vocab_size": "it is that of the problems' characters"}
        if study == "form":
            others = ("expert", "dr_grpo", "rloo", "ppo", "control_steps", "control_rate", "base_right")
            idle |= {f"countdown.{name}": "the study has a base of its own, and GRPO" for name in others}
        if study is None:
            others = ("dr_grpo", "rloo", "ppo")
            idle |= {f"countdown.{name}": "it is for --study methods and --study rates" for name in others}
        if study == "longer":
            others = ("dr_grpo", "rloo", "ppo")
            idle |= {f"countdown.{name}": "the study has expert iteration and GRPO" for name in others}
        else:
            idle["countdown.longer"] = "it is for --study longer"
        if study not in ("methods", "longer"):
            idle["countdown.seeds"] = "it is for --study methods and --study longer"
        else:
            idle["countdown.seed"] = "--countdown.seeds gives it"
        if study != "rates":
            names = ("countdown.rates", "countdown.control_rates", "countdown.rates_share")
            idle |= dict.fromkeys(names, "it is for --study rates")
        return idle

    @property
    def control(self) -> TrainConfig:
        """How the controls go on."""
        proportion = self.control_rate / self.base.muon_lr
        return replace(
            self.seeded(self.base),
            steps=self.control_steps,
            warmup_steps=min(self.base.warmup_steps, self.control_steps),
            lr=self.base.lr * proportion,
            muon_lr=self.control_rate,
            eval_every=math.ceil(self.control_steps / self.measurements),
            checkpoint_every=self.control_steps,
        )


DRAWING = ("expert", "grpo", "dr_grpo", "rloo", "ppo")
"""Those that learn from answers of their own, by the names of their settings."""
CONTROLS = ("solutions", "form")
"""More supervised training from the same base, on true solutions or on lines like the base's."""


def smoke_countdown() -> CountdownSettings:
    """Seconds long."""
    full = CountdownSettings()
    tiny = dict(steps=3, checkpoint_every=1)
    return replace(
        full,
        model=replace(full.model, n_layer=1, n_embd=32),
        base=replace(full.base, steps=30, batch_size=16, eval_every=30),
        control_steps=3,
        rows=16,
        held_out=8,
        samples=8,
        measurements=1,
        seeds=(1, 2),
        rates=(1e-3,),
        control_rates=(0.01,),
        longer=2,
        **{name: replace(getattr(full, name), **tiny) for name in DRAWING},
    )
