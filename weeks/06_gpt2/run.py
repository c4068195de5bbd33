"""Week 6: GPT-2. A small one on our own tokens in five minutes; on one GPU or several, the real one.

In the repository's folder:

    python weeks/06_gpt2/run.py --preset laptop
    # the blocks that GPT-2 had, on the same tokens
    python weeks/06_gpt2/run.py --preset laptop --study shape
    # weights that others trained, in our GPT: perplexity, LAMBADA, PIQA, a talk
    python weeks/06_gpt2/run.py --preset laptop --study smollm2
    # steps of the real GPT-2 on this machine, and what a whole run costs elsewhere
    python weeks/06_gpt2/run.py --preset laptop --study cost
    # the real GPT-2, on eight GPUs
    torchrun --standalone --nproc_per_node=8 weeks/06_gpt2/run.py --preset gpu
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from figures import draw
from shared.commandline import cli
from shared.training.base_model import BASE_PRESETS, BaseModelSettings, train_base_model
from studies import CLASSIC, STUDIES

TRAINING = ("vocab_size", "model", "train", "dtype", "resume")


@dataclass(frozen=True)
class Settings(BaseModelSettings):
    """`data` may also be a folder of shards, as `python -m shared.data.shards` writes it."""

    limit: int | None = 200
    """For --study smollm2: only the first so many examples of each task; None takes all."""
    measured: str = "gpt2"
    """For --study cost: the preset whose steps are measured, one sequence of its block_size at a time (on a
    GPU 16).
    """
    study: Literal["shape", "smollm2", "cost"] | None = None

    READ_BY: ClassVar = {
        "run": (*TRAINING, "compile_model", "parallel", "recompute"),
        "shape": TRAINING,
        "smollm2": ("limit",),
        "cost": ("measured",),
    }

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.study == "shape":
            idle |= {f"model.{field}": "the study gives GPT-2's" for field in CLASSIC}
        return idle


def _preset(name: str, **changes: Any) -> Settings:
    """The course's settings for its model at this preset, with what the studies add."""
    return Settings(**vars(BASE_PRESETS[name]), **changes)


PRESETS = {
    "smoke": _preset("smoke", limit=2, measured="nano"),
    "laptop": _preset("laptop"),
    "gpu": _preset("gpu"),
}


def main(settings: Settings) -> dict[str, float]:
    """Trains a GPT-2, or does a study. Returns the week's metrics."""
    if settings.study:
        return STUDIES[settings.study](settings)
    return train_base_model(settings, draw)


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
