"""Week 8. Products with packed weights, computed by native.c, which is compiled on this machine when it is
first needed.

PyTorch's own kernels for packed weights compute in floating point, and take about twice as long on a CPU with
AVX2. Where there is no compiler, `library` raises with the reason, and `shared.quantization.kernels` takes
PyTorch's.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, get_num_threads

from shared.compiled import compile_c as compile_c
from shared.compiled import find_compiler as find_compiler
from shared.compiled import load_compiled

SOURCE = Path(__file__).with_suffix(".c")


@cache
def library() -> ctypes.CDLL:
    """The functions of native.c. Raises RuntimeError, with the reason, where they cannot be compiled."""
    functions = load_compiled(SOURCE)
    _declare(functions)
    return functions


def _declare(functions: ctypes.CDLL) -> None:
    """Tells ctypes the types of the parameters, in the order of native.c."""
    address = ctypes.c_void_p
    number = ctypes.c_int
    real = ctypes.c_float
    for name in ("product_int8", "product_int4"):
        function = getattr(functions, name)
        function.argtypes = [address, number, number, address, address, number, number, address, number]
    functions.product_nf4.argtypes = [
        *(address, number, number),  # x
        *(address, address, address, address, real),  # codes, and the blocks' absmax
        *(number, number, address, number),  # group size, y, threads
    ]


def product_int8(x: Tensor, codes: Tensor, scale: Tensor, n_out: int, group_size: int) -> Tensor:
    """x · (scale · codes)ᵀ: [..., in] -> [..., n_out], in x's type.

    codes: int8 [n_out, in]. scale: fp32 [n_out, in / group_size]. 32 must divide group_size. Before the
    product, each 32 neighbours of x are rounded to int8 with a scale of their own, which moves none by more
    than 1/254 of their largest magnitude.
    """
    rows = x.float().contiguous()
    n = x.size(-1)
    y = torch.empty(*x.shape[:-1], n_out)
    failed = library().product_int8(
        rows.data_ptr(),
        x.numel() // n,
        n,
        codes.data_ptr(),
        scale.data_ptr(),
        group_size,
        n_out,
        y.data_ptr(),
        get_num_threads(),
    )
    return _result(x, y, failed)


def product_int4(x: Tensor, codes: Tensor, scale_zero: Tensor, n_out: int, group_size: int) -> Tensor:
    """x · weightᵀ for int4's weights: [..., in] -> [..., n_out], in x's type.

    codes: uint8 [n_out, in / 2], low nibbles first. scale_zero: bfloat16 [n_out, in / group_size, 2]. x is
    rounded as in `product_int8`.
    """
    rows = x.float().contiguous()
    n = x.size(-1)
    y = torch.empty(*x.shape[:-1], n_out)
    failed = library().product_int4(
        rows.data_ptr(),
        x.numel() // n,
        n,
        codes.data_ptr(),
        scale_zero.data_ptr(),
        group_size,
        n_out,
        y.data_ptr(),
        get_num_threads(),
    )
    return _result(x, y, failed)


def product_nf4(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    n_out: int,
    group_size: int,
    *,
    double: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """x · weightᵀ for NF4's weights: [..., in] -> [..., n_out], in x's type.

    codes: uint8 [n_out, in / 2], high nibbles first. absmax: fp32 [n_out, in / group_size]; with double
    quantization, uint8 codes of it. double: for those, the levels fp32 [256], the scale fp32 of each 256
    blocks, and the offset. x is rounded as in `product_int8`, and each level by up to 1/65534 of its block's
    absmax.
    """
    rows = x.float().contiguous()
    n = x.size(-1)
    y = torch.empty(*x.shape[:-1], n_out)
    levels = scale = None
    offset = 0.0
    if double is not None:
        levels = double[0].data_ptr()
        scale = double[1].data_ptr()
        offset = double[2]
    failed = library().product_nf4(
        rows.data_ptr(),
        x.numel() // n,
        n,
        codes.data_ptr(),
        absmax.data_ptr(),
        levels,
        scale,
        offset,
        group_size,
        n_out,
        y.data_ptr(),
        get_num_threads(),
    )
    return _result(x, y, failed)


def _result(x: Tensor, y: Tensor, failed: int) -> Tensor:
    if failed:
        raise MemoryError(f"no memory left for a product with {tuple(x.shape)}")
    return y if x.dtype == torch.float32 else y.to(x.dtype)
