"""Week 12. Which model a program that writes texts takes, and its loading."""

import os
from collections.abc import Sequence
from pathlib import Path

from shared.adapters.files import load_adapter
from shared.course.runs import output_root
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization.modules import quantize
from shared.runtime import pick_device
from shared.tokenizers import Tokenizer


def own_checkpoint() -> tuple[str, Path] | None:
    """The newest week that has a checkpoint, and its folder; None if there is none.

    A smoke run's checkpoint counts only where there is no other.
    """
    root = output_root() / "checkpoints"
    checkpoints = [
        (topic, path)
        for topic, run in (("04_mini_gpt", "headline"), ("06_gpt2", "gpt2"))
        for path in (root / topic).glob(f"*/*/{run}/best")
    ]

    def rank(checkpoint: tuple[str, Path]) -> tuple[bool, str, float]:
        topic, path = checkpoint
        return "smoke" not in path.parts, topic, path.stat().st_mtime

    return max(checkpoints, key=rank, default=None)


def load_served(
    model: str,
    *,
    scheme: str | None = None,
    group_size: int | None = None,
    adapters: Sequence[str] = (),
    device: str = "auto",
) -> tuple[GPT, Tokenizer]:
    """A model, quantized and with its adapters (NAME=FOLDER each), and its tokenizer.

    model: as `shared.models.pretrained.load_model` takes it; scheme, group_size: as
    `shared.quantization.quantize` does. Raises ValueError for a model without a tokenizer, and as they do.
    """
    loaded = load_model(model, pick_device(device))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} comes without a tokenizer of ours: its ids cannot be turned into text")
    if scheme:
        quantize(loaded, scheme, group_size)
    for adapter in adapters:
        name, _, folder = adapter.partition("=")
        load_adapter(folder, loaded, name)
    return loaded, loaded.tokenizer


def name_and_source(model: str) -> tuple[str, str]:
    """What `--model` is called, and what `load_model` takes for it; says which one "own" stands for."""
    if model != "own":
        return os.path.basename(os.path.normpath(model)), model
    checkpoint = own_checkpoint()
    if checkpoint is None:
        print("no checkpoint of weeks 4 and 6 yet: SmolLM2 instead", flush=True)
        return "smollm2", "smollm2"
    topic, path = checkpoint
    print(f"your own model: {path}", flush=True)
    return topic, str(path)
