"""Week 12. Quantized weights in GGUF's own blocks: their codes as they are, not rounded a second time.

| ours | GGUF's, for 32 weights | in fp16 |
| --- | --- | --- |
| int8, scale · code | Q8_0, d · code | d = scale |
| int4, scale · (code - 8) + zero | Q4_1, d · code + m | d = scale, m = zero - 8 · scale |

A scale for more than 32 weights is repeated. NF4's levels are those of no GGUF type. Source: the blocks of
ggml-quants.c in ggml's repository.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from shared.quantization.packing import Int4Weight, Int8Weight, PackedWeight

BLOCK = 32
"""Weights of a row that share a scale in Q8_0 and Q4_1."""
HALF = torch.finfo(torch.float16)
Ours = Callable[[Mapping[str, Tensor]], Tensor]
"""Joins and reorders the rows of our tensors as the file has them."""


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed weights of a model by the name that the parameter had."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name.removesuffix('.packed')}.weight": m for name, m in modules if isinstance(m, PackedWeight)}


def gguf_type(packed: Mapping[str, PackedWeight]) -> GGMLQuantizationType:
    """The GGUF type that holds these weights' codes, one file tensor's. Raises ValueError where none does."""
    name, first = next(iter(packed.items()))
    if {type(weight) for weight in packed.values()} == {Int8Weight}:
        return GGMLQuantizationType.Q8_0
    if {type(weight) for weight in packed.values()} == {Int4Weight}:
        return GGMLQuantizationType.Q4_1
    raise ValueError(
        f"{name} is in {first.settings['scheme']}, which GGUF has no type for: quantize the original with"
        " int8 or int4, or export it unquantized with --kind Q4_0 or Q8_0"
    )


def gguf_blocks(packed: Mapping[str, PackedWeight], joined: Ours) -> np.ndarray:
    """The bytes of one tensor of the file: uint8 [rows, bytes of a row].

    packed: the weights that it consists of, by name. Raises ValueError for a scale that fp16 cannot hold.
    """
    parts = {name: _codes_and_scales(name, weight) for name, weight in packed.items()}
    codes, scales = (joined({name: part[i] for name, part in parts.items()}) for i in (0, 1))
    blocks = codes.unflatten(-1, (-1, BLOCK))  # [rows, blocks, 32]
    if gguf_type(packed) == GGMLQuantizationType.Q4_1:
        low, high = blocks[..., : BLOCK // 2], blocks[..., BLOCK // 2 :]
        data = (low | high << 4).to(torch.uint8)
        halves = torch.stack([scales, joined({name: part[2] for name, part in parts.items()})], -1)
    else:
        data = blocks.to(torch.int8).view(torch.uint8)
        halves = scales.unsqueeze(-1)
    head = halves.half().contiguous().view(torch.uint8)  # little-endian, as the file is
    return torch.cat([head, data], -1).flatten(1).numpy()


def _codes_and_scales(name: str, weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, columns], and for each 32 neighbours scale and lowest value [rows, blocks], on the CPU."""
    if isinstance(weight, Int4Weight):
        codes, ranges = weight.codes_and_ranges()
        scale, zero = ranges.float().unbind(-1)
        lowest = zero - 8 * scale
    else:
        assert isinstance(weight, Int8Weight)
        codes, scale = weight.codes_and_scale()
        lowest = torch.zeros_like(scale)
    for values in (scale, lowest):
        if values.abs().max() > HALF.max:
            raise ValueError(
                f"{name} has scales up to {values.abs().max():.3g}, and GGUF's fp16 holds {HALF.max:.0f} at"
                " most: export the unquantized model with --kind F32"
            )
    repeats = weight.in_features // BLOCK // scale.size(1)
    scale, lowest = (values.repeat_interleave(repeats, 1).cpu() for values in (scale, lowest))
    return codes.cpu(), scale, lowest
