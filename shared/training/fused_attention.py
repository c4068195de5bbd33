"""Week 2. Causal attention by `fused.c`: with norms and a rotation of queries and keys, or without."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, get_num_threads
from torch.autograd.function import once_differentiable

from shared.training.fused import Maybe, check_memory, fused_library


class AttentionInput(ctypes.Structure):
    """attention_input in fused.c."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("batch", "time", "n_head", "n_kv_head", "head_dim")),
        *((name, ctypes.c_long) for name in ("rope_dim", "window")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "q_weight", "k_weight", "cosines", "sines")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]


class AttentionGradients(ctypes.Structure):
    """attention_gradients in fused.c."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("out", "log_sums", "d_out", "d_q", "d_k", "d_v", "d_q_weights", "d_k_weights")
    ]


@dataclass(frozen=True)
class Heads:
    """How `causal_attention` reads queries, keys and values."""

    n_head: int
    n_kv_head: int
    """Each is shared by n_head / n_kv_head query heads."""
    head_dim: int
    scale: float
    window: int | None = None
    """A token sees only the last so many, itself included."""
    eps: float = 0.0
    """Of the norms."""


def attention_forward(heads: Heads, *tensors: Maybe) -> tuple[Tensor, Tensor]:
    """What `causal_attention` gives, and the logarithms of the softmax's denominators [batch, n_head, time].

    tensors: q, k, v, the norms' weights of q and k, cosines and sines; the last four may be None.
    """
    q = tensors[0]
    assert q is not None
    out = torch.empty_like(q)
    log_sums = q.new_empty(q.size(0), heads.n_head, q.size(1))
    failed = fused_library().attention(
        ctypes.byref(_attention_input(heads, tensors)), out.data_ptr(), log_sums.data_ptr(), get_num_threads()
    )
    check_memory(failed, f"attention over {list(q.shape)}")
    return out, log_sums


def attention_backward(
    heads: Heads, tensors: Sequence[Maybe], forward: tuple[Tensor, Tensor], d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Maybe]]:
    """The gradients of q, k, v, and of the norms' weights. forward: what `attention_forward` gave."""
    q, k, v, q_weight, *_ = tensors
    assert q is not None and k is not None and v is not None
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # A row for each of the tasks of fused.c.
    parts = q.new_zeros(2, q.size(0) * heads.n_kv_head, heads.head_dim)
    addresses = [x.data_ptr() for x in (*forward, d_out, dq, dk, dv, *parts)]
    failed = fused_library().attention_backward(
        ctypes.byref(_attention_input(heads, tensors)),
        ctypes.byref(AttentionGradients(*addresses)),
        get_num_threads(),
    )
    check_memory(failed, f"the backward of attention over {list(q.shape)}")
    return dq, dk, dv, [None, None] if q_weight is None else list(parts.sum(1))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Heads, *tensors: Maybe) -> Tensor:
        out, log_sums = attention_forward(heads, *tensors)
        ctx.save_for_backward(*tensors, out, log_sums)
        ctx.heads = heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Maybe, ...]:
        *tensors, out, log_sums = ctx.saved_tensors
        *gradients, of_norms = attention_backward(ctx.heads, tensors, (out, log_sums), d_out.contiguous())
        return None, *gradients, *of_norms, None, None


def _attention_input(heads: Heads, tensors: Sequence[Maybe]) -> AttentionInput:
    q, *_, cosines, _ = tensors
    assert q is not None
    batch, time, _ = q.shape
    rope_dim = 0 if cosines is None else cosines.size(1)
    sizes = (batch, time, heads.n_head, heads.n_kv_head, heads.head_dim, rope_dim, heads.window or time)
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return AttentionInput(*sizes, *addresses, heads.eps, heads.scale)


def causal_attention(heads: Heads, q: Tensor, k: Tensor, v: Tensor, *more: Maybe) -> Tensor:
    """Causal attention: queries [batch, time, n_head · head_dim], keys and values [batch, time, n_kv_head ·
    head_dim] -> [batch, time, n_head · head_dim].

    more: the weights [head_dim] of an RMSNorm of each head's queries, and of its keys, or None and None;
    cosines and sines [time, rope_dim] by which they are then rotated, as in `shared.models.rotary`, or None
    and None. Without all these, nothing.
    """
    more = more or (None, None, None, None)
    return _Attention.apply(heads, q, k, v, *more)
