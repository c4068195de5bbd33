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

Maybe = Tensor | None


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
    functions.gelu.argtypes = [address, size, number, address, address, number]
    functions.linear.argtypes = [*(address, address, address, address, size, size, size), address, number]
    functions.linear_backward_input.argtypes = [address, address, size, size, size, address, number, number]
    functions.linear_backward_weight.argtypes = [address, address, size, size, size, address, number]
    functions.linear_backward_bias.argtypes = [address, size, size, address, number]
    functions.norm.argtypes = [address, address, address, size, size, real, number, address, number]
    functions.norm_backward.argtypes = [
        *(address, address, address, address, size, size, real, number),  # x, weight, dy, beside
        *(address, address, address, number),  # dx, and those of weight and bias
    ]
    functions.attention.argtypes = [address, address, address, number]
    functions.attention_backward.argtypes = [address, address, number]
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
    check_memory(failed, "Muon's step")
    torch.autograd.graph.increment_version([*parameters, *buffers])  # autograd does not see what C writes


def has_own_products(inputs: int, outputs: int) -> bool:
    """Whether linear layers of these sizes are computed by fused.c on this machine, and not by PyTorch."""
    return inputs * outputs <= fused_library().largest_linear()


def linear(x: Tensor, weight: Tensor, bias: Maybe = None, *, beside: Maybe = None) -> Tensor:
    """x weightᵀ + bias: [..., inputs] -> [..., outputs]. beside: what is added to it, of its shape."""
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    if not has_own_products(inputs, outputs):
        rows = y.view(-1, outputs)
        _product(x.view(-1, inputs), weight.t(), rows, bias if beside is None else beside.view_as(rows))
        return y if beside is None or bias is None else y.add_(bias)
    failed = fused_library().linear(
        *(x.data_ptr(), weight.data_ptr(), _address(bias), _address(beside)),
        *(x.numel() // inputs, inputs, outputs),
        *(y.data_ptr(), get_num_threads()),
    )
    check_memory(failed, f"a linear layer of {list(x.shape)}")
    return y


def linear_backward_input(dy: Tensor, weight: Tensor, add_to: Tensor | None = None) -> Tensor:
    """The gradient of `linear`'s x, from that of its result: dy weight."""
    outputs, inputs = weight.shape
    dx = dy.new_empty(*dy.shape[:-1], inputs) if add_to is None else add_to
    if not has_own_products(inputs, outputs):
        rows = dx.view(-1, inputs)
        _product(dy.view(-1, outputs), weight, rows, None if add_to is None else rows)
        return dx
    failed = fused_library().linear_backward_input(
        *(dy.data_ptr(), weight.data_ptr()),
        *(dy.numel() // outputs, inputs, outputs),
        *(dx.data_ptr(), add_to is not None, get_num_threads()),
    )
    check_memory(failed, f"a linear layer's backward of {list(dy.shape)}")
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
    check_memory(failed, f"a linear layer's backward of {list(x.shape)}")
    return d_weight


def linear_backward_bias(dy: Tensor) -> Tensor:
    """The gradient of `linear`'s bias: dy's sum over all but the last dimension."""
    outputs = dy.size(-1)
    d_bias = dy.new_empty(outputs)
    fused_library().linear_backward_bias(
        dy.data_ptr(), dy.numel() // outputs, outputs, d_bias.data_ptr(), get_num_threads()
    )
    return d_bias


def _product(a: Tensor, b: Tensor, into: Tensor, beside: Maybe) -> None:
    """a b by PyTorch, and what is added to it, written into a matrix."""
    if beside is None:
        torch.mm(a, b, out=into)
    else:
        torch.addmm(beside, a, b, out=into)


@dataclass(frozen=True)
class Norm:
    """How rows are normed, before they are multiplied by a weight."""

    eps: float
    centered: bool = False
    """Whether their mean is taken off, as LayerNorm does; RMSNorm does not."""


def norm_forward(norm: Norm, x: Tensor, weight: Tensor, bias: Maybe = None) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, of which only the first has a bias, or none."""
    width = x.size(-1)
    y = torch.empty_like(x)
    fused_library().norm(
        *(x.data_ptr(), weight.data_ptr(), _address(bias)),
        *(x.numel() // width, width, norm.eps, norm.centered),
        *(y.data_ptr(), get_num_threads()),
    )
    return y


def norm_backward(
    norm: Norm, x: Tensor, weight: Tensor, dy: Tensor, *, beside: Maybe = None, has_bias: bool = False
) -> tuple[Tensor, Tensor, Maybe]:
    """The gradients of x, weight and bias. beside: what is added to that of x."""
    width = x.size(-1)
    dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
    d_bias = torch.empty_like(weight) if has_bias else None
    failed = fused_library().norm_backward(
        *(x.data_ptr(), weight.data_ptr(), dy.data_ptr(), _address(beside)),
        *(x.numel() // width, width, norm.eps, norm.centered),
        *(dx.data_ptr(), d_weight.data_ptr(), _address(d_bias), get_num_threads()),
    )
    check_memory(failed, f"the backward of a norm over {list(x.shape)}")
    return dx, d_weight, d_bias


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm_forward(Norm(eps), x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx, d_weight, _ = norm_backward(Norm(ctx.eps), x, weight, dy.contiguous())
        return dx, d_weight, None


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


def gelu_and_slope(x: Tensor, by_tanh: bool) -> tuple[Tensor, Tensor]:
    """x Φ(x), and its derivative, which is written into x. by_tanh: GPT-2's approximation of both."""
    y = torch.empty_like(x)
    fused_library().gelu(x.data_ptr(), x.numel(), by_tanh, y.data_ptr(), x.data_ptr(), get_num_threads())
    return y, x


def _address(tensor: Maybe) -> int | None:
    """Where it lies; NULL for none."""
    return None if tensor is None else tensor.data_ptr()


def check_memory(failed: int, what: str) -> None:
    """Raises MemoryError where a function of fused.c said that it had none."""
    if failed:
        raise MemoryError(f"no memory left for {what}")
