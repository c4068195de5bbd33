"""Clean solutions of week 8's exercises, each with a word on why; `week.solution(name)` shows them."""

import threading
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class QuantizedLinear(nn.Module):
    """The ranges are rounded first, and the codes found with what is kept of them; a product unpacks the
    weight, uses it and lets it go, so that the codes are all that the memory holds.
    """

    def __init__(self, linear: nn.Linear, group_size: int):
        super().__init__()
        groups = linear.weight.detach().unflatten(1, (-1, group_size))
        low, high = groups.aminmax(dim=2)
        scale = (high - low) / 15
        zero = low + 8 * scale
        self.register_buffer("scale", scale.bfloat16())
        self.register_buffer("zero", zero.bfloat16())
        step = self.scale.float().unsqueeze(2)
        step = torch.where(step == 0, 1.0, step)
        codes = ((groups - self.zero.float().unsqueeze(2)) / step).round() + 8
        codes = codes.clamp(0, 15).to(torch.uint8).flatten(1)
        self.register_buffer("codes", codes[:, 0::2] | codes[:, 1::2] << 4)
        self.bias = linear.bias

    def unpacked(self) -> Tensor:
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=2).flatten(1)
        groups = codes.float().unflatten(1, (self.scale.size(1), -1))
        return (self.scale.float().unsqueeze(2) * (groups - 8) + self.zero.float().unsqueeze(2)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked(), self.bias)


def swap_linears(
    model: nn.Module,
    make: Callable[[nn.Linear], nn.Module],
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """What is replaced is an attribute of the parent, so the name is cut in two; the list is made before
    anything changes, so that nothing new is met on the way.
    """
    for name, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear) or any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(old).train(old.training))
    return model


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


def int8_dot_source() -> str:
    """A product of two int8 is an int in C, so only the sum needs a type of its own; the compiler makes
    instructions of the inner loop that multiply many codes at once, since whole numbers may be added in any
    order.
    """
    return """
#include <stddef.h>
#include <stdint.h>

void int8_matvec(const int8_t *w, const float *scale, const int8_t *x,
                 float x_scale, float *y, int rows, int columns) {
    for (int row = 0; row < rows; row++) {
        const int8_t *codes = w + (size_t)row * columns;
        int32_t sum = 0;
        for (int i = 0; i < columns; i++)
            sum += codes[i] * x[i];
        y[row] = scale[row] * x_scale * sum;
    }
}
"""


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


def gptq_matrix(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float) -> Tensor:
    """The step of the exercise before, for each column in turn. U is computed once: it depends on the inputs
    alone, and its row j has already forgotten the columns before j.
    """
    columns = weight.size(1)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    group_size = columns // scale.size(1)
    new = weight.clone()
    for j in range(columns):
        step, middle = scale[:, j // group_size], zero[:, j // group_size]
        code = ((new[:, j] - middle) / step).round().clamp(-8, 7)
        rounded = code * step + middle
        error = (new[:, j] - rounded) / upper[j, j]
        new[:, j] = rounded
        new[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return new


def grouped_dot_source() -> str:
    """The scales differ from group to group, so whole numbers end with their group, and floats go on from
    there: 32 products for each multiplication by scales.
    """
    return """
#include <stddef.h>
#include <stdint.h>

void grouped_matvec(const int8_t *w, const float *w_scale, const int8_t *x,
                    const float *x_scale, float *y, int rows, int columns) {
    int groups = columns / 32;
    for (int row = 0; row < rows; row++) {
        float total = 0;
        for (int g = 0; g < groups; g++) {
            const int8_t *codes = w + (size_t)row * columns + 32 * g;
            int32_t sum = 0;
            for (int i = 0; i < 32; i++)
                sum += codes[i] * x[32 * g + i];
            total += w_scale[(size_t)row * groups + g] * x_scale[g] * sum;
        }
        y[row] = total;
    }
}
"""


def share(pieces: int, work: Callable[[int], None], threads: int) -> None:
    """The lock makes one step of looking and taking, and is free while a piece is worked on; the joins are
    the barrier, behind which every piece is finished, or given up with an error that is known.
    """
    lock = threading.Lock()
    left = iter(range(pieces))
    errors: list[Exception] = []

    def worker() -> None:
        try:
            while not errors:
                with lock:
                    piece = next(left, None)
                if piece is None:
                    return
                work(piece)
        except Exception as error:
            errors.append(error)

    helpers = [threading.Thread(target=worker) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    worker()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
