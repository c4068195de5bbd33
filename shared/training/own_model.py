"""Week 6. The learner's own newest model, which commands take where they are told of no other."""

import os
from pathlib import Path

from shared.course.runs import output_root


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
