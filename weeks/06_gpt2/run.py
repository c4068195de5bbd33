"""Week 6: GPT-2. A small one on our own tokens in five minutes; on one GPU or several, the real one.

python weeks/06_gpt2/run.py --preset laptop
python weeks/06_gpt2/run.py --preset laptop --study shape       # the blocks that GPT-2 had, on the same tokens
python weeks/06_gpt2/run.py --preset laptop --study smollm2     # weights that others trained, in our GPT: perplexity, LAMBADA, PIQA, a talk
python weeks/06_gpt2/run.py --preset laptop --study cost        # steps of the real GPT-2 on this machine, and what a whole run costs elsewhere
torchrun --standalone --nproc_per_node=8 weeks/06_gpt2/run.py --preset gpu
"""

from dataclasses import dataclass
from typing import Any, Literal

from figures import draw
from shared.commandline import cli
from shared.training.base_model import (
    BASE_PRESETS,
    BaseModelSettings,
    train_base_model,
)
from studies import study_cost, study_shape, study_smollm2


@dataclass(frozen=True)
class Settings(BaseModelSettings):
    """`data` may also be a folder of shards, as `python -m shared.data.shards` writes it."""

    limit: int | None = 200
    """For --study smollm2: only the first so many examples of each task; none takes all."""
    measured: str = "gpt2"
    """For --study cost: the preset whose steps are measured, one sequence of its block_size at a time (on a
    GPU 16).
    """
    study: Literal["shape", "smollm2", "cost"] | None = None


def preset(name: str, **changes: Any) -> Settings:
    """The course's settings for its model at this preset, with what the studies add."""
    return Settings(**vars(BASE_PRESETS[name]), **changes)


PRESETS = {
    "smoke": preset("smoke", limit=2, measured="nano"),
    "laptop": preset("laptop"),
    "gpu": preset("gpu"),
}


def main(settings: Settings) -> dict[str, float]:
    """Trains a GPT-2, or runs a study. Returns the week's figures."""
    if settings.study:
        return {"shape": study_shape, "smollm2": study_smollm2, "cost": study_cost}[settings.study](settings)
    return train_base_model(settings, draw)


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
