"""Week 10: PPO, DPO and GRPO. A small GPT that knows little more than an answer's form learns to solve
problems from a reward that is verified; more supervised training and expert iteration take the same time.

    python weeks/10_ppo_dpo/run.py --preset laptop
    # GRPO by the update that you wrote
    python weeks/10_ppo_dpo/run.py --preset laptop --mine
    # all methods and controls, three seeds
    python weeks/10_ppo_dpo/run.py --preset laptop --study methods
    python weeks/10_ppo_dpo/run.py --preset laptop --study rates           # three for each
    python weeks/10_ppo_dpo/run.py --preset laptop --study form     # GRPO, no true solution seen before
    python weeks/10_ppo_dpo/run.py --preset laptop --study longer   # twelve times as long, three of them
    # week 6's model learns to exclaim: preferences, a reward model, PPO, GRPO and DPO
    python weeks/10_ppo_dpo/run.py --preset laptop --study exclaim
    # each of the three at further betas: reward against KL
    python weeks/10_ppo_dpo/run.py --preset laptop --study frontier
    python weeks/10_ppo_dpo/run.py --preset laptop --study hacking         # without the KL term
    # DPO on a real model, SmolLM2 or another chat model, which learns to be brief
    python weeks/10_ppo_dpo/run.py --preset laptop --study real
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from countdown_settings import CountdownSettings, smoke_countdown
from figures import draw
from own_update import problems_with_yours
from preferences import prepare
from shared.alignment.base_loop import LoopConfig
from shared.alignment.loops import DPOConfig, GRPOConfig, OnlineConfig, PPOConfig
from shared.checks import Checks
from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import read_text
from shared.devices import pick_device
from shared.models.names import ModelName
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, trained_base_model
from solving import SOLVING
from studies import STUDIES, study_brief

ALIGNING = (
    *("mark", "min_words", "prompt_tokens", "prompts", "answers", "held_out", "rows", "train"),
    *("reward", "ppo", "grpo", "measurements"),
)
BRIEF = ("brief_rows", "brief_questions", "brief_held_out", "brief_tokens")


@dataclass(frozen=True)
class Settings(WeekSettings):
    countdown: CountdownSettings = CountdownSettings()
    """Of the week's run, and of --study methods, rates, form and longer. What follows is for the others."""
    mark: str = "!"
    """What a phrase must end in to earn a point."""
    min_words: int = 3
    """How many words the phrase must have."""
    prompt_tokens: int = 16
    prompts: int = 768
    """Taken from the training text, each behind a line break; all methods use the same."""
    answers: int = 8
    """Drawn from the untouched model to each prompt. The best and the worst are a pair."""
    held_out: int = 256
    """Prompts from the validation text, on which everything is measured."""
    rows: int = 64
    """Answers in each batch: rows / 2 pairs, rows / group_size prompts for GRPO."""
    train: TrainConfig = BASE_PRESETS["laptop"].train
    """How week 6's model is trained, where its checkpoint is not there yet."""
    reward: LoopConfig = LoopConfig(steps=48, lr=1e-3)
    ppo: PPOConfig = PPOConfig(steps=32, lr=3e-4, beta=0.1, max_new_tokens=48, epochs=2, checkpoint_every=8)
    grpo: GRPOConfig = GRPOConfig(
        steps=32,
        lr=3e-4,
        beta=0.1,
        max_new_tokens=48,
        epochs=2,
        checkpoint_every=8,
        scale="none",
        loss_type="dr_grpo",
        kl="reward",
    )
    dpo: DPOConfig = DPOConfig(steps=64, lr=3e-4, beta=0.3, checkpoint_every=16)
    """Its steps are twice those of the others, which take two for each batch: the same number of answers goes
    backward through the policy.
    """
    measurements: int = 6
    """On held-out prompts, spread over each method's run."""
    keep: Literal["ppo", "grpo", "dpo"] = "ppo"
    """Whose model gets the card."""
    online_betas: tuple[float, ...] = (0.05, 0.1, 0.3)
    """For --study frontier, of PPO and GRPO."""
    dpo_betas: tuple[float, ...] = (0.1, 0.3, 1.0)
    """The same for DPO."""
    hacking_lr: float = 1e-3
    """For --study hacking: GRPO at this learning rate, with its beta and with none."""
    brief: DPOConfig = DPOConfig(steps=40, lr=3e-4, beta=0.1, checkpoint_every=10)
    """For --study real."""
    brief_rows: int = 8
    """Answers in each batch, two for each pair."""
    brief_questions: int = 100
    """How many of questions.txt are learned from."""
    brief_held_out: int = 40
    """How many of the others are measured on."""
    brief_tokens: int = 64
    """Longest answer, in tokens. Most of its usual answers are longer, and cut off here."""
    model: ModelName = "smollm2"
    blocks: int | None = None
    """Of --model only the first so many blocks, to see in seconds that everything runs; None takes all."""
    study: Literal["methods", "rates", "form", "longer", "exclaim", "frontier", "hacking", "real"] | None = (
        None
    )

    ANSWERS_IN: ClassVar = ("run",)
    READ_BY: ClassVar = {
        **dict.fromkeys(("run", "methods", "rates", "form", "longer"), ("countdown",)),
        "exclaim": (*ALIGNING, "keep", "dpo"),
        "frontier": (*ALIGNING, "online_betas", "dpo_betas", "dpo"),
        "hacking": (*ALIGNING, "hacking_lr"),
        "real": ("model", "blocks", "brief", *BRIEF),
    }

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        idle |= self.countdown.idle_in(self.study)
        if self.study == "hacking":
            idle["grpo.lr"] = "--hacking-lr gives it"
            names = [field.name for field in fields(self.ppo) if field.name != "max_new_tokens"]
            idle |= {f"ppo.{name}": "the study has GRPO only" for name in names}
        return idle

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = Checks(self)
        checks.at_least(1, "min_words", "prompt_tokens", "prompts", "measurements")
        checks.at_least(1, "brief_questions", "brief_held_out")
        checks.at_least(2, "answers", "held_out", "brief_tokens")
        for name in ("rows", "brief_rows"):
            rows = getattr(self, name)
            checks.require(rows >= 2 and rows % 2 == 0, f"{name}={rows}: must be even, a pair has two")
        group = self.grpo.group_size
        checks.require(
            group >= 2 and self.rows % group == 0,
            f"rows={self.rows}: must be a multiple of grpo.group_size={group}, which is at least 2",
        )
        lengths = self.ppo.max_new_tokens, self.grpo.max_new_tokens
        checks.require(
            lengths[0] == lengths[1],
            f"ppo.max_new_tokens={lengths[0]}, grpo.max_new_tokens={lengths[1]}: must be the same",
        )
        for name in ("online_betas", "dpo_betas"):
            above_0 = all(beta > 0 for beta in getattr(self, name))
            checks.require(above_0, f"{name}: betas must be above 0")
        if self.mine and self.study is None:
            checks.problems += problems_with_yours(self.countdown.grpo)
        is_mark = len(self.mark) == 1 and not self.mark.isalnum() and not self.mark.isspace()
        checks.require(is_mark, f"mark={self.mark!r}: must be one punctuation mark")
        checks.finish()

    @property
    def answer_tokens(self) -> int:
        """The length of an answer, which PPO and GRPO have in common."""
        return self.ppo.max_new_tokens

    @property
    def judges(self) -> dict[str, Any]:
        """The rule by which answers are judged: a reward model is good for no other."""
        return {"mark": self.mark, "min_words": self.min_words}

    def config_of(self, method: str) -> OnlineConfig | DPOConfig:
        """A method's settings."""
        return {"ppo": self.ppo, "grpo": self.grpo, "dpo": self.dpo}[method]


def _smoke() -> Settings:
    laptop = Settings()
    tiny = dict(steps=4, checkpoint_every=1)
    return replace(
        laptop,
        preset="smoke",
        countdown=smoke_countdown(),
        mark=".",
        min_words=1,
        prompt_tokens=4,
        prompts=24,
        answers=8,
        held_out=12,
        rows=8,
        train=BASE_PRESETS["smoke"].train,
        reward=replace(laptop.reward, **tiny),
        ppo=replace(laptop.ppo, **tiny, max_new_tokens=24),
        dpo=replace(laptop.dpo, **tiny),
        grpo=replace(laptop.grpo, **tiny, max_new_tokens=24, group_size=4),
        measurements=2,
        online_betas=(0.1, 0.3),
        dpo_betas=(0.1,),
        brief=replace(laptop.brief, **tiny),
        brief_rows=2,
        brief_questions=12,
        brief_held_out=3,
        brief_tokens=4,
        blocks=1,
    )


def _gpu() -> Settings:
    laptop, week_6 = Settings(), BASE_PRESETS["gpu"]
    return replace(
        laptop,
        preset="gpu",
        data=week_6.data,
        train=week_6.train,
        prompts=8192,
        held_out=1024,
        rows=512,
        reward=replace(laptop.reward, lr=1e-4),
        ppo=replace(laptop.ppo, steps=200, lr=3e-5),
        grpo=replace(laptop.grpo, steps=200, lr=3e-5),
        dpo=replace(laptop.dpo, steps=400, lr=3e-5),
        hacking_lr=1e-4,
        measurements=10,
    )


PRESETS = {"smoke": _smoke(), "laptop": Settings(), "gpu": _gpu()}


def main(settings: Settings) -> dict[str, float]:
    """The week's run, or a study. Returns its metrics."""
    device = pick_device(settings.device)
    if settings.study == "real":
        return study_brief(settings)
    if settings.study in SOLVING:
        work = Workspace(__file__, settings, read_text(settings.data)[0], device)
        metrics = SOLVING[settings.study](settings, work)
        if settings.study is None:
            return work.finish(metrics, draw)
        draw(work.logs, work.reports)
        return metrics
    base, corpus = trained_base_model(
        settings.preset,
        data=settings.data,
        device=settings.device,
        train=settings.train,
        resume=settings.resume,
    )
    base.to(device)
    work = Workspace(__file__, settings, corpus.name, device)
    return STUDIES[settings.study](settings, prepare(settings, base, corpus, work), work)


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
