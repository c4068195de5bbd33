"""Week 4. The two branches of a Llama's block, each one operation of autograd, forward and backward by hand.

What autograd would do between the parts falls away: it adds up three gradients of one tensor, one pass each,
and calls a function for every part. The parts, and their formulas, are in `fused.c`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.training.fused import (
    Heads,
    Maybe,
    attention_backward,
    attention_forward,
    gated_silu_backward,
    gated_silu_forward,
    linear,
    linear_backward_input,
    linear_backward_weight,
    rms_norm_backward,
    rms_norm_forward,
)


class AttentionBranch(torch.autograd.Function):
    """x + o(attention(q(n), k(n), v(n))), n = rms_norm(x)."""

    @staticmethod
    def forward(ctx: Any, heads: Heads, eps: float, x: Tensor, *weights: Maybe) -> Tensor:
        """weights: of the norm, q, k, v and o; then of the norms of q and k, cosines and sines, or None."""
        norm, wq, wk, wv, wo, *rest = weights
        assert norm is not None and wq is not None and wk is not None and wv is not None and wo is not None
        n = rms_norm_forward(x, norm, eps)
        q, k, v = linear(n, wq), linear(n, wk), linear(n, wv)
        out, log_sums = attention_forward(heads, q, k, v, *rest)
        ctx.save_for_backward(*(x, n, norm, wq, wk, wv, wo), *(out, log_sums, q, k, v), *rest)
        ctx.heads, ctx.eps = heads, eps
        return linear(out, wo, add_to=x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        """For y = x w: dx = dy wᵀ, dw = xᵀ dy, from the last part to the first; x's own dy is added last."""
        x, n, norm, wq, wk, wv, wo, out, log_sums, *tensors = ctx.saved_tensors
        dy = dy.contiguous()
        d_out = linear_backward_input(dy, wo)
        dq, dk, dv, d_norms = attention_backward(ctx.heads, tensors, (out, log_sums), d_out)
        dn = linear_backward_input(dq, wq)
        linear_backward_input(dk, wk, add_to=dn)
        linear_backward_input(dv, wv, add_to=dn)
        dx, d_norm = rms_norm_backward(x, norm, ctx.eps, dn, beside=dy)
        d_weights = [linear_backward_weight(d, n) for d in (dq, dk, dv)]
        d_weights.append(linear_backward_weight(dy, out))
        return None, None, dx, d_norm, *d_weights, *d_norms, None, None


class MLPBranch(torch.autograd.Function):
    """x + down(silu(gate(n)) · up(n)), n = rms_norm(x)."""

    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, *weights: Tensor) -> Tensor:
        """weights: of the norm, gate, up and down."""
        norm, w_gate, w_up, w_down = weights
        n = rms_norm_forward(x, norm, eps)
        gate, up = linear(n, w_gate), linear(n, w_up)
        hidden = gated_silu_forward(gate, up)
        ctx.save_for_backward(x, n, gate, up, hidden, *weights)
        ctx.eps = eps
        return linear(hidden, w_down, add_to=x.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Maybe, ...]:
        """As in `AttentionBranch`."""
        x, n, gate, up, hidden, norm, w_gate, w_up, w_down = ctx.saved_tensors
        dy = dy.contiguous()
        d_gate, d_up = gated_silu_backward(gate, up, linear_backward_input(dy, w_down))
        dn = linear_backward_input(d_up, w_up, add_to=linear_backward_input(d_gate, w_gate))
        dx, d_norm = rms_norm_backward(x, norm, ctx.eps, dn, beside=dy)
        d_weights = [linear_backward_weight(d, n) for d in (d_gate, d_up)]
        return None, dx, d_norm, *d_weights, linear_backward_weight(dy, hidden)
