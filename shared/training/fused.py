"""Week 2. Parts of a training step on a CPU in C, which is compiled on this machine when it is first needed.

PyTorch carries out each operation by itself: it reads its inputs from memory and writes its result there.
`fused.c` computes what belongs together in one pass. Where there is no compiler, PyTorch's operations compute
the same; results differ by rounding.
"""

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, get_num_threads, nn
from torch.autograd.function import once_differentiable

from shared.compiled import load_compiled

SOURCE = Path(__file__).with_suffix(".c")
HEADERS = tuple(
    SOURCE.with_name(f"fused_{family}.h") for family in ("products", "rows", "attention", "optimizers")
)
CHUNK = 64
"""Rows of which rms_norm_backward adds up the weight's gradient, as in fused.c."""


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


@cache
def fused_library() -> ctypes.CDLL:
    """The functions of fused.c. Raises RuntimeError, with the reason, where they cannot be compiled."""
    functions = load_compiled(SOURCE, headers=HEADERS)
    address, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    functions.is_parallel.argtypes = functions.largest_linear.argtypes = []
    size = ctypes.c_long
    functions.muon.argtypes = [number, address, number, real, real, real, number]
    functions.gated_silu.argtypes = [address, address, size, address, number]
    functions.gated_silu_backward.argtypes = [address, address, address, size, address, address, number]
    for name in ("linear", "linear_backward_input"):
        getattr(functions, name).argtypes = [address, address, size, size, size, address, number, number]
    functions.linear_backward_weight.argtypes = [address, address, size, size, size, address, number]
    functions.rms_norm.argtypes = [address, address, size, size, real, address, number]
    functions.rms_norm_backward.argtypes = [
        *(address, address, address, address, size, size, real),  # x, weight, dy, beside
        *(address, address, number),  # dx, the parts of weight's
    ]
    functions.attention.argtypes = [ctypes.POINTER(AttentionInput), address, address, number]
    functions.attention_backward.argtypes = [
        ctypes.POINTER(AttentionInput),
        ctypes.POINTER(AttentionGradients),
        number,
    ]
    return functions


def why_unfused() -> str | None:
    """Why fused.c is not used here; None where it is."""
    try:
        functions = fused_library()
    except RuntimeError as error:
        return str(error)
    if get_num_threads() > 1 and not functions.is_parallel():
        return "the compiler has no OpenMP, without which one core would compute alone"
    return None


def is_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether fused.c can read all of these: fp32 on a CPU, row by row, and no subclass of Tensor."""
    return all(
        t is None
        or (type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu and t.is_contiguous())
        for t in tensors
    )


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    ns_steps: int,
) -> None:
    """Updates matrices and their momentum buffers in place, all in one call: `optim.Muon` says how.

    All are as `is_plain` says. Each matrix is updated by one thread.
    """
    fields = array("q")  # muon_matrix in fused.c: three addresses and two sizes
    for p, gradient, buffer in zip(parameters, gradients, buffers):
        fields.extend((p.data_ptr(), gradient.data_ptr(), buffer.data_ptr(), p.size(0), p.size(1)))
    failed = fused_library().muon(
        len(parameters),
        fields.buffer_info()[0],
        ns_steps,
        lr,
        momentum,
        weight_decay,
        get_num_threads(),
    )
    _check(failed, "Muon's step")
    torch.autograd.graph.increment_version([*parameters, *buffers])  # autograd does not see what C writes


def has_own_products(inputs: int, outputs: int) -> bool:
    """Whether linear layers of these sizes are computed by fused.c on this machine, and not by PyTorch."""
    return max(inputs, outputs) <= fused_library().largest_linear()


def linear(x: Tensor, weight: Tensor, add_to: Tensor | None = None) -> Tensor:
    """x weightᵀ: [..., inputs] -> [..., outputs]. add_to: what it is added to, in place."""
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs) if add_to is None else add_to
    if not has_own_products(inputs, outputs):
        return _product(x.view(-1, inputs), weight.t(), y, add_to is not None)
    failed = fused_library().linear(
        *(x.data_ptr(), weight.data_ptr()),
        *(x.numel() // inputs, inputs, outputs),
        *(y.data_ptr(), add_to is not None, get_num_threads()),
    )
    _check(failed, f"a linear layer of {list(x.shape)}")
    return y


def linear_backward_input(dy: Tensor, weight: Tensor, add_to: Tensor | None = None) -> Tensor:
    """The gradient of `linear`'s x, from that of its result: dy weight."""
    outputs, inputs = weight.shape
    dx = dy.new_empty(*dy.shape[:-1], inputs) if add_to is None else add_to
    if not has_own_products(inputs, outputs):
        return _product(dy.view(-1, outputs), weight, dx, add_to is not None)
    failed = fused_library().linear_backward_input(
        *(dy.data_ptr(), weight.data_ptr()),
        *(dy.numel() // outputs, inputs, outputs),
        *(dx.data_ptr(), add_to is not None, get_num_threads()),
    )
    _check(failed, f"a linear layer's backward of {list(dy.shape)}")
    return dx


def linear_backward_weight(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of `linear`'s weight: dyᵀ x."""
    outputs, inputs = dy.size(-1), x.size(-1)
    if not has_own_products(inputs, outputs):
        return dy.view(-1, outputs).t() @ x.view(-1, inputs)
    d_weight = dy.new_empty(outputs, inputs)
    failed = fused_library().linear_backward_weight(
        *(dy.data_ptr(), x.data_ptr()),
        *(x.numel() // inputs, inputs, outputs),
        *(d_weight.data_ptr(), get_num_threads()),
    )
    _check(failed, f"a linear layer's backward of {list(x.shape)}")
    return d_weight


def _product(a: Tensor, b: Tensor, into: Tensor, adds: bool) -> Tensor:
    """a b by PyTorch, written into a tensor or added to it."""
    rows = into.view(-1, into.size(-1))
    torch.addmm(rows, a, b, beta=int(adds), out=rows)
    return into


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last dimension."""
    width = x.size(-1)
    y = torch.empty_like(x)
    fused_library().rms_norm(
        x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, y.data_ptr(), get_num_threads()
    )
    return y


def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight. beside: what is added to that of x."""
    width = x.size(-1)
    rows = x.numel() // width
    dx, d_weights = torch.empty_like(x), x.new_zeros(-(-rows // CHUNK), width)
    fused_library().rms_norm_backward(
        x.data_ptr(),
        weight.data_ptr(),
        dy.data_ptr(),
        None if beside is None else beside.data_ptr(),
        rows,
        width,
        eps,
        dx.data_ptr(),
        d_weights.data_ptr(),
        get_num_threads(),
    )
    return dx, d_weights.sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm_forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *rms_norm_backward(x, weight, ctx.eps, dy.contiguous()), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) · weight, over the last dimension: `torch.nn.functional.rms_norm`.

    Both are as `is_plain` says; so are all tensors of the functions below.
    """
    return _RMSNorm.apply(x, weight, eps)


def gated_silu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of two tensors of one shape."""
    y = torch.empty_like(gate)
    fused_library().gated_silu(gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr(), get_num_threads())
    return y


def gated_silu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    fused_library().gated_silu_backward(
        gate.data_ptr(),
        up.data_ptr(),
        dy.data_ptr(),
        gate.numel(),
        d_gate.data_ptr(),
        d_up.data_ptr(),
        get_num_threads(),
    )
    return d_gate, d_up


class _GatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated_silu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gated_silu_backward(gate, up, dy.contiguous())


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of two tensors of one shape."""
    return _GatedSiLU.apply(gate, up)


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


Maybe = Tensor | None


def attention_forward(heads: Heads, *tensors: Maybe) -> tuple[Tensor, Tensor]:
    """What `causal_attention` gives, and the logarithms of the softmax's denominators [batch, n_head, time].

    tensors: q, k, v, the norms' weights of q and k, cosines and sines; the last four may be None.
    """
    q = tensors[0]
    assert q is not None
    out = torch.empty_like(q)
    log_sums = q.new_empty(q.size(0), heads.n_head, q.size(1))
    failed = fused_library().attention(
        _attention_input(heads, tensors), out.data_ptr(), log_sums.data_ptr(), get_num_threads()
    )
    _check(failed, f"attention over {list(q.shape)}")
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
        _attention_input(heads, tensors), AttentionGradients(*addresses), get_num_threads()
    )
    _check(failed, f"the backward of attention over {list(q.shape)}")
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


def _check(failed: int, what: str) -> None:
    if failed:
        raise MemoryError(f"no memory left for {what}")
