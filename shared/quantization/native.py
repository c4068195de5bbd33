"""Week 8. Products with packed weights, computed by native.c, which is compiled on this machine the first
time it is needed.

PyTorch's own kernels for packed weights compute in floating point, and take about twice as long on a CPU with
AVX2. No compiler, no harm: `library` says why it has none, and `packing` goes on with PyTorch's.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, get_num_threads

from shared.assets import cache_folder
from shared.runtime import CPUINFO

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = (["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], [])
"""Tried in this order: not every compiler knows the processor it runs on, or comes with OpenMP, without which
one core does it all.
"""


@cache
def library() -> ctypes.CDLL:
    """The functions of native.c. They are compiled into the folder that assets are kept in, once for each
    version, user and kind of processor.

    Raises RuntimeError, with the reason, where that does not work.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if os.name != "posix" or compiler is None:
        raise RuntimeError("it needs a C compiler (cc, gcc or clang) on Linux or macOS")
    flags_of_cpu = (
        [line for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
        if CPUINFO.exists()
        else []
    )
    version = repr(
        (
            SOURCE.read_text(),
            compiler,
            FLAGS,
            platform.platform(),
            platform.machine(),
            platform.node(),
            os.getuid(),
            flags_of_cpu,
        )
    )
    try:
        path = cache_folder() / "native" / f"{hashlib.sha256(version.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            _compile(compiler, path)
        if path.stat().st_uid not in (
            0,
            os.getuid(),
        ):  # assets may be shared; code is run only where we or root wrote it
            raise OSError(f"{path} belongs to another user")
        found = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"its compiled form could not be written or read: {error}") from None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    found.product_int8.argtypes = [pointer, number, number, pointer, pointer, number, number, pointer, number]
    found.product_int4.argtypes = [pointer, number, number, pointer, pointer, number, number, pointer, number]
    found.product_nf4.argtypes = [
        pointer,
        *[number] * 2,
        *[pointer] * 4,
        ctypes.c_float,
        number,
        number,
        pointer,
        number,
    ]
    return found


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        for flags in FLAGS:
            command = [compiler, "-O3", *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(new), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                return os.replace(new, path)  # whole or not at all, whoever else compiles it at this moment
    raise RuntimeError(f"{compiler} could not compile it: {done.stderr.strip()[:300]}")


def product_int8(x: Tensor, codes: Tensor, scale: Tensor, n_out: int, group_size: int) -> Tensor:
    """x · (scale · codes)ᵀ: x [..., in], codes int8 [n_out, in], scale fp32 [n_out, in / group_size] -> [...,
    n_out] in x's type. 32 must divide group_size.

    Every 32 neighbours of x are rounded to int8 over their largest magnitude first, which moves none by more
    than 1/254 of that.
    """
    rows, n, y = x.float().contiguous(), x.size(-1), torch.empty(*x.shape[:-1], n_out)
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
    return y if not failed and x.dtype == torch.float32 else _finish(x, y, failed)


def product_int4(x: Tensor, codes: Tensor, scale_zero: Tensor, n_out: int, group_size: int) -> Tensor:
    """x · weightᵀ for int4's weights: codes uint8 [n_out, in / 2], low nibbles first; scale_zero bfloat16
    [n_out, in / group_size, 2].

    Shapes, and how x is rounded: as in `product_int8`.
    """
    rows, n, y = x.float().contiguous(), x.size(-1), torch.empty(*x.shape[:-1], n_out)
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
    return y if not failed and x.dtype == torch.float32 else _finish(x, y, failed)


def product_nf4(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    n_out: int,
    group_size: int,
    double: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """x · weightᵀ for NF4's weights, up to 1/65534 of a block's absmax in each level: codes uint8 [n_out, in
    / 2], high nibbles first; absmax fp32 [n_out, in / group_size], or, with double = (levels fp32 [256],
    scale fp32 for each 256 blocks, offset), uint8.

    Shapes, and how x is rounded: as in `product_int8`.
    """
    rows, n, y = x.float().contiguous(), x.size(-1), torch.empty(*x.shape[:-1], n_out)
    levels, scale, offset = (
        (double[0].data_ptr(), double[1].data_ptr(), double[2]) if double else (None, None, 0.0)
    )
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
    return y if not failed and x.dtype == torch.float32 else _finish(x, y, failed)


def _finish(x: Tensor, y: Tensor, failed: int) -> Tensor:
    if failed:
        raise MemoryError(f"no memory left for a product with {tuple(x.shape)}")
    return y.to(x.dtype)
