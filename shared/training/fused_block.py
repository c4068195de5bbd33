"""Week 4. The two branches of a block, each one operation of autograd, forward and backward by hand: with
RMSNorm or LayerNorm, a SiLU with a gate or a GELU, and biases or none.

What autograd would do between the parts falls away: it adds up three gradients of one tensor, one pass each,
and calls a function for every part. The parts, and their formulas, are in `fused.c`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.training.fused import (
    Maybe,
    Norm,
    gated_silu_backward,
    gated_silu_forward,
    gelu_and_slope,
    linear,
    linear_backward_bias,
    linear_backward_input,
    linear_backward_weight,
    norm_backward,
    norm_forward,
)
from shared.training.fused_attention import Heads, attention_backward, attention_forward


def of_linear(x: Tensor, dy: Tensor, bias: Maybe) -> tuple[Tensor, Maybe]:
    """The gradients of a linear layer's weight and bias, from its input and the gradient of what it gave."""
    return linear_backward_weight(dy, x), None if bias is None else linear_backward_bias(dy)


class AttentionBranch(torch.autograd.Function):
    """x + o(attention(q(n), k(n), v(n))), n = norm(x)."""

    @staticmethod
    def forward(ctx: Any, heads: Heads, norm: Norm, x: Tensor, *tensors: Maybe) -> Tensor:
        """tensors: weight and bias of the norm, of q, k, v and o; then the weights of the norms of q and k,
        cosines and sines. Biases and the last four may be None.
        """
        of_norm, (wq, bq, wk, bk, wv, bv, wo, bo), rest = tensors[:2], tensors[2:10], tensors[10:]
        assert of_norm[0] is not None
        assert wq is not None and wk is not None and wv is not None and wo is not None
        n = norm_forward(norm, x, of_norm[0], of_norm[1])
        q, k, v = linear(n, wq, bq), linear(n, wk, bk), linear(n, wv, bv)
        out, log_sums = attention_forward(heads, q, k, v, *rest)
        ctx.save_for_backward(*(x, n), *(out, log_sums, q, k, v), *tensors)
        ctx.heads, ctx.norm = heads, norm
        return linear(out, wo, bo, beside=x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        """For y = x w: dx = dy wᵀ, dw = xᵀ dy, from the last part to the first; x's own dy is added last."""
        x, n, out, log_sums, q, k, v, *tensors = ctx.saved_tensors
        of_norm, (wq, bq, wk, bk, wv, bv, wo, bo), rest = tensors[:2], tensors[2:10], tensors[10:]
        dy = dy.contiguous()
        d_out = linear_backward_input(dy, wo)
        dq, dk, dv, d_norms = attention_backward(ctx.heads, (q, k, v, *rest), (out, log_sums), d_out)
        dn = linear_backward_input(dq, wq)
        linear_backward_input(dk, wk, add_to=dn)
        linear_backward_input(dv, wv, add_to=dn)
        dx, *d_norm = norm_backward(ctx.norm, x, of_norm[0], dn, beside=dy, has_bias=of_norm[1] is not None)
        of_q, of_k, of_v = of_linear(n, dq, bq), of_linear(n, dk, bk), of_linear(n, dv, bv)
        return None, None, dx, *d_norm, *of_q, *of_k, *of_v, *of_linear(out, dy, bo), *d_norms, None, None


class GatedMLPBranch(torch.autograd.Function):
    """x + down(silu(gate(n)) · up(n)), n = norm(x)."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, x: Tensor, *tensors: Maybe) -> Tensor:
        """tensors: weight and bias of the norm, of gate, up and down. Biases may be None."""
        of_norm, (w_gate, b_gate, w_up, b_up, w_down, b_down) = tensors[:2], tensors[2:]
        assert of_norm[0] is not None and w_gate is not None and w_up is not None and w_down is not None
        n = norm_forward(norm, x, of_norm[0], of_norm[1])
        gate, up = linear(n, w_gate, b_gate), linear(n, w_up, b_up)
        hidden = gated_silu_forward(gate, up)
        ctx.save_for_backward(x, n, gate, up, hidden, *tensors)
        ctx.norm = norm
        return linear(hidden, w_down, b_down, beside=x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        """As in `AttentionBranch`."""
        x, n, gate, up, hidden, *tensors = ctx.saved_tensors
        of_norm, (w_gate, b_gate, w_up, b_up, w_down, b_down) = tensors[:2], tensors[2:]
        dy = dy.contiguous()
        d_gate, d_up = gated_silu_backward(gate, up, linear_backward_input(dy, w_down))
        dn = linear_backward_input(d_up, w_up, add_to=linear_backward_input(d_gate, w_gate))
        dx, *d_norm = norm_backward(ctx.norm, x, of_norm[0], dn, beside=dy, has_bias=of_norm[1] is not None)
        of_gate, of_up = of_linear(n, d_gate, b_gate), of_linear(n, d_up, b_up)
        return None, dx, *d_norm, *of_gate, *of_up, *of_linear(hidden, dy, b_down)


class GELUBranch(torch.autograd.Function):
    """x + down(gelu(up(n))), n = norm(x)."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, by_tanh: bool, x: Tensor, *tensors: Maybe) -> Tensor:
        """by_tanh: as in `gelu_and_slope`. tensors: weight and bias of the norm, of up and down. Biases may
        be None.
        """
        of_norm, (w_up, b_up, w_down, b_down) = tensors[:2], tensors[2:]
        assert of_norm[0] is not None and w_up is not None and w_down is not None
        n = norm_forward(norm, x, of_norm[0], of_norm[1])
        hidden, slope = gelu_and_slope(linear(n, w_up, b_up), by_tanh)
        ctx.save_for_backward(x, n, slope, hidden, *tensors)
        ctx.norm = norm
        return linear(hidden, w_down, b_down, beside=x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        """As in `AttentionBranch`."""
        x, n, slope, hidden, *tensors = ctx.saved_tensors
        of_norm, (w_up, b_up, w_down, b_down) = tensors[:2], tensors[2:]
        dy = dy.contiguous()
        d_up = linear_backward_input(dy, w_down).mul_(slope)
        dn = linear_backward_input(d_up, w_up)
        dx, *d_norm = norm_backward(ctx.norm, x, of_norm[0], dn, beside=dy, has_bias=of_norm[1] is not None)
        return None, None, dx, *d_norm, *of_linear(n, d_up, b_up), *of_linear(hidden, dy, b_down)
