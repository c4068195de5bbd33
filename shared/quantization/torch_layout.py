"""Week 8. The order in which PyTorch's int4 kernel for CPUs reads codes. It is not documented."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_BLOCK = 64
"""PyTorch's int4 kernels lay out 64 rows of a weight together, or 32 twice, depending on the processor."""


def to_torchs_layout(codes: Tensor, scale_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in] and ranges [out, groups, 2] as PyTorch's operation wants them: its rows come in
    whole blocks.
    """
    missing = -len(codes) % ROW_BLOCK
    packed = torch._convert_weight_to_int4pack_for_cpu(F.pad(codes, (0, 0, 0, missing)).int(), 1)
    return packed, F.pad(scale_zero, (0, 0, 0, 0, 0, missing)).transpose(0, 1).contiguous()


def from_torchs_layout(
    packed: Tensor, scale_zero: Tensor, index: Tensor | slice, out: int
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., in] and ranges [..., groups, 2] of the rows at `index`, of `out` rows."""
    places = _torchs_places().to(packed.device)
    block, half = len(places), len(places) // 2
    ranges = scale_zero.transpose(0, 1)[:out]
    rows = scale_zero.size(1)
    n = 2 * packed.numel() // rows
    blocks = packed.view(-1, n, half)  # bytes [blocks, in, half]
    if isinstance(index, slice):
        by_byte = blocks.transpose(1, 2).contiguous()  # [blocks, half, in]
        by_place = torch.cat([by_byte & 15, by_byte >> 4], 1)  # [blocks, block, in]
        codes = by_place[:, places].view(-1, n)[:out]
        return codes[index], ranges[index]
    place = places[index % block]
    pairs = blocks[index // block, :, place % half]  # [..., in]
    shift = (place // half * 4).unsqueeze(-1).to(torch.uint8)
    return pairs >> shift & 15, ranges[index]


@cache
def _torchs_places() -> Tensor:
    """Where PyTorch's int4 kernel keeps the codes of a block of rows on this CPU: int64 [rows].

    The block's bytes are [in_features, rows / 2]. Place p is the low nibble of byte p, or the high one of
    byte p - rows / 2. PyTorch does not document this layout, and it differs between processors, so it is
    found out: the kernel packs codes that are the number of each row, in hexadecimal digits.
    """
    number = torch.arange(ROW_BLOCK).repeat(32, 1).T  # [rows, in_features]: each row's number
    first, second = (
        torch._convert_weight_to_int4pack_for_cpu((number >> shift & 15).int(), 1).flatten().int()
        for shift in (0, 4)
    )
    # The rows whose codes are the low and the high nibble of each byte.
    low = (first & 15) + 16 * (second & 15)
    high = (first >> 4 & 15) + 16 * (second >> 4 & 15)
    # After a column's bytes, the next column's begin with the same row.
    half = next(n for n in range(1, 2 * ROW_BLOCK) if n * 32 == len(low) or low[n] == low[0])
    rows = torch.cat([low[:half], high[:half]])
    if not rows.sort().values.equal(torch.arange(2 * half)):
        raise RuntimeError("the layout of PyTorch's int4 kernel on this processor is a new one")
    return rows.argsort()
