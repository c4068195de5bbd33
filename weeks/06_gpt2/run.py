"""Week 6: GPT-2. A small one on our own tokens in five minutes; on one GPU or several, the real one.

In the repository's folder:

    python weeks/06_gpt2/run.py --preset laptop
    # the blocks that GPT-2 had, on the same tokens
    python weeks/06_gpt2/run.py --preset laptop --study shape
    # weights that others trained, in our GPT: perplexity, LAMBADA, PIQA, a talk
    python weeks/06_gpt2/run.py --preset laptop --study smollm2
    # OpenAI's GPT-2 from the Hugging Face hub (548 MB), by your own loader, in your own MiniGPT
    python weeks/06_gpt2/run.py --study openai --mine
    # steps of the real GPT-2 on this machine, and what a whole run costs elsewhere
    python weeks/06_gpt2/run.py --preset laptop --study cost
    # the real GPT-2, on eight GPUs
    torchrun --standalone --nproc_per_node=8 weeks/06_gpt2/run.py --preset gpu
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from figures import draw
from shared.commandline import cli
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus, Tokens, token_fingerprint
from shared.data.shards import ShardedTokens
from shared.runtime import write_atomically
from shared.training.base_model import BASE_PRESETS, BaseModelSettings, train_base_model
from shared.training.execution import Precision
from shared.training.precision import precision
from studies import CLASSIC, STUDIES

TRAINING = ("vocab_size", "model", "train", "dtype", "resume")


@dataclass(frozen=True)
class Settings(BaseModelSettings):
    """`data` may also be a folder of shards, as `python -m shared.data.shards` writes it."""

    limit: int | None = 200
    """For --study smollm2 and openai: only the first so many examples of each task; None takes all."""
    blocks: int | None = None
    """Of SmolLM2 only the first so many blocks, to see in seconds that everything runs; None takes all."""
    measured: str = "gpt2"
    """For --study cost: the preset whose steps are measured, one sequence of its block_size at a time (on a
    GPU 16).
    """
    study: Literal["shape", "smollm2", "openai", "cost"] | None = None

    ANSWERS_IN: ClassVar = ("run", "openai", "cost")
    READ_BY: ClassVar = {
        "run": (*TRAINING, "compile_model", "parallel", "recompute", "pad_vocabulary", "sample_tokens"),
        "shape": TRAINING,
        "smollm2": ("limit", "blocks"),
        "openai": ("limit",),
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
    "smoke": _preset("smoke", limit=2, blocks=1, measured="nano"),
    "laptop": _preset("laptop"),
    "gpu": _preset("gpu"),
}


def main(settings: Settings) -> dict[str, float]:
    """Trains a GPT-2, or does a study. Returns the week's metrics."""
    if settings.study:
        return STUDIES[settings.study](settings)
    return train_base_model(settings, draw, through_her_reader, scaled_format)


def scaled_format(dtype: str, device: torch.device) -> Precision:
    """float32, bfloat16, or float16 with week 7's scaled loss."""
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return precision(names[dtype], device)


def through_her_reader(work: Workspace, corpus: Corpus) -> Corpus:
    """With --mine, the corpus whose training tokens are read by the learner's ShardReader, from shards."""
    reader = work.mine("ShardReader", None)
    if reader is None:
        return corpus
    return replace(corpus, train=ReadByHer(reader, corpus.train, work.checkpoints / "shards"))


class ReadByHer:
    """Tokens in shards, as the course's batches index them, read by a ShardReader's `read`."""

    def __init__(self, reader: type, tokens: Tokens, folder: Path):
        """Shards that are there already are used as they are; other tokens are written to `folder` first."""
        self.fingerprint = token_fingerprint(tokens)
        self.length = len(tokens)
        if isinstance(tokens, ShardedTokens):
            paths = [str(part.filename) for part in tokens.parts]
        else:
            paths = write_shards(tokens, folder)
        self.reader = reader(paths, batch_size=1, block_size=1)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slices, and rows of neighbouring tokens: int64 [rows, width]."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.length)
            return self.reader.read(start, stop).numpy()
        return np.stack([self.reader.read(int(row[0]), int(row[-1]) + 1).numpy() for row in index])


def write_shards(tokens: Tokens, folder: Path, count: int = 3) -> list[str]:
    """Writes tokens as `count` shards of about one length, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, part in enumerate(np.array_split(np.asarray(tokens[:], np.uint16), count)):
        path = folder / f"train_{number:05d}.bin"
        write_atomically(path, part.tobytes())
        paths.append(str(path))
    return paths


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
