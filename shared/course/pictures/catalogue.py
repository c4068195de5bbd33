"""Week 0. All pictures of the data flow, in the order of the weeks, and the files that they are in.

The numbers in them are computed where they are drawn, from a few that are given.
"""

from collections.abc import Callable
from pathlib import Path

from shared.course.pictures.adapters import lora, packed_talks, qlora
from shared.course.pictures.drawing import Picture
from shared.course.pictures.early import bigram, window_mlp
from shared.course.pictures.formats import autocast, loss_scaling, number_formats
from shared.course.pictures.later import continuous_batching, dpo, ppo, rag
from shared.course.pictures.packing import int4_groups, int4_packing
from shared.course.pictures.tokens import bpe_encode, bpe_merge
from shared.course.pictures.training import ddp, fsdp, training_loop
from shared.course.pictures.transformer import attention, block, gpt, heads, kv_cache
from shared.runtime import ROOT

PICTURES: tuple[Callable[[], Picture], ...] = (
    *(bigram, window_mlp, training_loop),
    *(attention, heads, block, gpt, kv_cache),
    *(bpe_merge, bpe_encode),
    *(ddp, fsdp),
    *(number_formats, autocast, loss_scaling),
    *(int4_groups, int4_packing),
    *(lora, qlora, packed_talks),
    *(ppo, dpo),
    rag,
    continuous_batching,
)
"""Each is the file of its name."""


def picture_path(draw: Callable[[], Picture]) -> Path:
    """Where a picture is kept."""
    return ROOT / "docs" / "images" / f"{draw.__name__}.svg"
