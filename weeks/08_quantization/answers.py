"""Clean solutions of week 8's exercises, each with a word on why; `week.solution(name)` shows them."""

import torch
from torch import Tensor


def absmax_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A scale for each row: one large weight then coarsens its own row and no other. Round before the cast,
    which would cut off.
    """
    scales = weight.abs().amax(dim=1) / 127
    codes = (weight / scales[:, None]).round().to(torch.int8)
    return codes, scales


def int4_groups(weight: Tensor, group_size: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """16 codes have 15 steps between them, from the group's lowest weight to its highest. What clip leaves
    outside is clamped to the codes at the ends.
    """
    groups = weight.view(len(weight), -1, group_size)
    low = clip * groups.amin(dim=2, keepdim=True)
    high = clip * groups.amax(dim=2, keepdim=True)
    scales = (high - low) / 15
    codes = ((groups - low) / scales).round().clamp(0, 15).to(torch.uint8)
    return codes.view_as(weight), scales.squeeze(2), low.squeeze(2)


def pack_int4(codes: Tensor) -> Tensor:
    """After adding 8 a code needs four bits and no sign; a shift by four puts the second of a pair above the
    first.
    """
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, 0::2] | shifted[:, 1::2] << 4


def nf4_codes(weight: Tensor, block_size: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The levels are not evenly spaced, so no division finds the code: compare with all 16."""
    blocks = weight.view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    distance = (blocks / absmax[:, None])[..., None] - levels
    codes = distance.abs().argmin(dim=-1).to(torch.uint8).flatten()
    return codes, absmax


def int8_linear(x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """In the sum over the inputs both scales are constant, so they come out of it: the products and sums are
    whole numbers.
    """
    sums = x.to(torch.int32) @ codes.to(torch.int32).T
    return sums * x_scales[:, None] * scales + bias


def gptq_step(weight: Tensor, column: int, hessian: Tensor, scales: Tensor) -> Tensor:
    """Rounding a column makes an error in the outputs; the row of U says by how much each later column has to
    move to take most of it back.
    """
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    old = weight[:, column]
    rounded = (old / scales).round().clamp(-8, 7) * scales
    error = (old - rounded) / upper[column, column]
    new = weight.clone()
    new[:, column] = rounded
    new[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return new


def decode_limit(
    block_weights: int,
    vocab_size: int,
    n_embd: int,
    bits: int,
    group_size: int,
    scale_bits: float,
    bandwidth: float,
) -> float:
    """One token reads every weight of the products once; how long that takes is a division of bytes by
    bytes a second.
    """
    weights = block_weights + vocab_size * n_embd
    size = weights * (bits + scale_bits / group_size) / 8
    return bandwidth * 1e9 / size
