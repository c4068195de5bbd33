"""Week 7. Linear layers whose three products are computed in fp8, on cards that have units for it.

A float of 8 bits comes in two kinds. E4M3 has 4 bits for the exponent and 3 for the fraction, and ends at
448; E5M2 has 5 and 2, and ends at 57344. Inputs and weights need digits, and go in E4M3; gradients need
range, and go in E5M2. Small numbers, gradients above all, would vanish in either. So each tensor is
multiplied by a scale of its own, which brings its largest number to the end of the format, and the product is
divided by both scales: what the scale of the loss is to fp16, for every tensor anew.

The weights, their gradients and the optimizer stay fp32.

On a CPU the same code runs, slowly, for tests. It has not been timed on a card: `benchmarks/gpu.sh` does
that.

Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

from typing import Any

import torch
from torch import Tensor, nn

from shared.models.layers import swap_modules

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
MULTIPLE = 16
"""Both sides of a matrix must divide by it, and so must the number of tokens."""


def fp8_with_scale(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x times a scale, rounded to fp8, and 1 / scale, a float32 scalar: x is nearly their product.

    The largest number of x comes to the end of the format. dtype: E4M3 or E5M2.
    """
    end = torch.finfo(dtype).max
    largest = x.abs().amax().float().clamp(min=1e-30)
    scale = end / largest
    return (x.float() * scale).clamp(-end, end).to(dtype), largest / end


def fp8_product(a: Tensor, b: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> Tensor:
    """a @ b.T in bf16, from factors in fp8. a: [m, k]. b: [n, k]. dtypes: theirs.

    m, n and k must divide by 16. Sums are fp32's.
    """
    a8, a_scale = fp8_with_scale(a, dtypes[0])
    b8, b_scale = fp8_with_scale(b, dtypes[1])
    # The units want the left factor in rows and the right one in columns.
    return torch._scaled_mm(
        a8.contiguous(), b8.contiguous().T, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16
    )


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return fp8_product(x, weight, (E4M3, E4M3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x_grad = fp8_product(grad, weight.T, (E5M2, E4M3))
        weight_grad = fp8_product(grad.T, x.T, (E5M2, E4M3))
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype)


class Float8Linear(nn.Linear):
    """nn.Linear, computed in fp8: [..., in_features] -> bf16 [..., out_features].

    Raises ValueError where the number of rows does not divide by 16 and a gradient is needed.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        missing = -len(rows) % MULTIPLE
        if missing and torch.is_grad_enabled():
            raise ValueError(
                f"fp8 needs a number of tokens that divides by {MULTIPLE}, and this is {len(rows)}: change"
                " batch_size or block_size"
            )
        padded = nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows  # `pad` copies by 0, too
        out = _FP8Linear.apply(padded, self.weight)[: len(rows)]
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], -1)


def to_fp8(model: nn.Module) -> None:
    """Makes Float8Linear of a model's linear layers, in place; their parameters stay the same objects.

    The output layer, `lm_head`, stays as it is, as is usual: its errors go straight into the loss. So do
    layers whose sides do not divide by 16. Raises ValueError where no layer is left.
    """
    replacements = {
        name: _as_fp8(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and _divides(layer) and name != "lm_head"
    }
    if not replacements:
        raise ValueError(f"no linear layer's sides divide by {MULTIPLE}: fp8 has nothing to compute here")
    swap_modules(model, replacements)


def _divides(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def _as_fp8(layer: nn.Linear) -> Float8Linear:
    with torch.device("meta"):
        fp8_layer = Float8Linear(layer.in_features, layer.out_features, bias=False)
    fp8_layer.weight = layer.weight
    fp8_layer.bias = layer.bias
    return fp8_layer
