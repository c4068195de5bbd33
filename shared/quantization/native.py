"""Week 8. The course's kernels in C: products with packed weights, and what `shared.quantization.decoder`
calls.

They are compiled on this machine when they are first needed, in the variant for its processor. Where there is
no compiler, `library` raises with the reason, and `shared.quantization.kernels` takes PyTorch's.
"""

import ctypes
import os
import platform
from ctypes import POINTER, c_int, c_int32, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from shared.compiled import load_compiled
from shared.devices import CPUINFO

SOURCE = Path(__file__).with_name("decoder.c")
HEADERS = (SOURCE.with_name("kernels.h"), SOURCE.with_name("pool.h"))
STANDARD = ["-std=gnu11", "-pthread", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
VARIANTS: dict[str, tuple[list[str], set[str]]] = {
    "avx512": (
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx2", "-mfma"],
        {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma"},
    ),
    "avx2": (["-mavx2", "-mfma"], {"avx2", "fma"}),
    "dotprod": (["-march=armv8.2-a+dotprod"], {"asimd", "asimddp"}),
    "neon": (["-march=armv8-a"], {"asimd"}),
    "plain": (["-DPLAIN"], set()),
}
"""By name, the fastest first: the compiler's flags, and what the processor must have, as Linux calls it."""
CHOICE = "LLM_WEEKS_KERNELS"
"""The environment variable that chooses another variant, or "none"."""


class Change(ctypes.Structure):
    """What an adapter adds to a weight, as kernels.h has it."""

    _fields_ = [("a", c_void_p), ("b", c_void_p), ("r", c_int32)]


class Matrix(ctypes.Structure):
    """A weight, as kernels.h has it."""

    points_to: tuple[Tensor, ...] = ()
    """Tensors that must not be freed before it."""

    _fields_ = [
        ("kind", c_int32),
        ("n_out", c_int32),
        ("n_in", c_int32),
        ("group", c_int32),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("changes", POINTER(Change)),
    ]


KINDS = {"none": 0, "float32": 1, "bfloat16": 2, "int8": 3, "int4": 4, "nf4": 5}
"""What a Matrix may be."""


@cache
def variants() -> list[str]:
    """The variants that this processor runs, the fastest first."""
    known: set[str] = set()
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                known = set(line.partition(":")[2].split())
                break
    elif platform.machine() == "arm64":  # Apple's have it all
        known = {"asimd", "asimddp"}
    return [name for name, (_, needs) in VARIANTS.items() if needs <= known]


def library() -> ctypes.CDLL:
    """The functions of decoder.c, in the variant for this processor, or that of LLM_WEEKS_KERNELS.

    Raises RuntimeError, with the reason, where they cannot be compiled, and for a variant that this processor
    does not run.
    """
    can = variants()
    name = os.environ.get(CHOICE) or can[0]
    if name == "none":
        raise RuntimeError(f"{CHOICE}=none asks for PyTorch")
    if name not in can:
        raise RuntimeError(f"{CHOICE}={name}: this processor runs {', '.join(can)}")
    return load_variant(name)


@cache
def load_variant(name: str) -> ctypes.CDLL:
    """The functions in one of `VARIANTS`."""
    flags = [[*VARIANTS[name][0], *STANDARD]]
    functions = load_compiled(SOURCE, headers=HEADERS, flags=flags)
    functions.product.argtypes = [POINTER(Matrix), c_void_p, c_int, c_void_p, c_int]
    return functions


def product(x: Tensor, weight: Matrix) -> Tensor:
    """x · weightᵀ: [..., in] -> [..., out], in x's type.

    For packed weights each 32 neighbours of x are rounded to int8 with a scale of their own, which moves none
    by more than 1/254 of their largest magnitude.
    """
    rows = x.float().contiguous()
    y = torch.empty(*x.shape[:-1], weight.n_out)
    failed = library().product(
        weight, rows.data_ptr(), x.numel() // x.size(-1), y.data_ptr(), torch.get_num_threads()
    )
    if failed:
        raise MemoryError(f"no memory left for a product with {tuple(x.shape)}")
    return y if x.dtype == torch.float32 else y.to(x.dtype)
