"""Week 2. Parts of a training step on a CPU in C, which is compiled on this machine when it is first needed.

PyTorch carries out each operation by itself: it reads its inputs from memory and writes its result there.
`fused.c` computes what belongs together in one pass. Where there is no compiler, PyTorch's operations compute
the same; results differ by rounding.
"""

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.compiled import load_compiled

SOURCE = Path(__file__).with_suffix(".c")


@cache
def library() -> ctypes.CDLL:
    """The functions of fused.c. Raises RuntimeError, with the reason, where they cannot be compiled."""
    functions = load_compiled(SOURCE)
    address, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    functions.is_parallel.argtypes = []
    functions.muon.argtypes = [number, address, number, real, real, real, number]
    return functions


def why_unfused() -> str | None:
    """Why fused.c is not used here; None where it is."""
    try:
        functions = library()
    except RuntimeError as error:
        return str(error)
    if torch.get_num_threads() > 1 and not functions.is_parallel():
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
    failed = library().muon(
        len(parameters),
        fields.buffer_info()[0],
        ns_steps,
        lr,
        momentum,
        weight_decay,
        torch.get_num_threads(),
    )
    _check(failed, "Muon's step")
    torch.autograd.graph.increment_version([*parameters, *buffers])  # autograd does not see what C writes


def _check(failed: int, what: str) -> None:
    if failed:
        raise MemoryError(f"no memory left for {what}")
