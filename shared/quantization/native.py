"""Week 8. Products with packed weights, computed by native.c, which is compiled on this machine when it is
first needed.

PyTorch's own kernels for packed weights compute in floating point, and take about twice as long on a CPU with
AVX2. Where there is no compiler, `library` raises with the reason, and `shared.quantization.kernels` takes
PyTorch's.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, get_num_threads

from shared.assets import cache_folder
from shared.devices import CPUINFO
from shared.runtime import write_atomically

SOURCE = Path(__file__).with_suffix(".c")
FLAGS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], [])
"""Tried in this order. Not every compiler knows the processor it runs on, or comes with OpenMP, without which
one core computes alone.
"""


@cache
def library() -> ctypes.CDLL:
    """The functions of native.c.

    They are compiled into the folder that assets are kept in, once for each version, user and kind of
    processor, and anew where the file is no longer what was written: one that was cut short would end the
    process. Raises RuntimeError, with the reason, where that does not work.
    """
    compiler = find_compiler()
    try:
        folder, version = cache_folder() / "native", _version(compiler)
        path = _whole(folder, version) or _compile(compiler, folder, version)
        # The folder may be shared with other users: only code that we or root wrote is run.
        if path.stat().st_uid not in (0, os.getuid()):
            raise OSError(f"{path} belongs to another user")
        functions = ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"its compiled form could not be written or read: {error}") from None
    _declare(functions)
    return functions


def find_compiler() -> str:
    """The path of a C compiler: that of the environment variable CC, else cc, gcc or clang.

    Raises RuntimeError where there is none.
    """
    for name in (os.environ.get("CC", "cc"), "gcc", "clang"):
        path = shutil.which(name)
        if path and os.name == "posix":
            return path
    raise RuntimeError("it needs a C compiler (cc, gcc or clang) on Linux or macOS")


def _version(compiler: str) -> str:
    """A hash of all that decides what the compiled form is."""
    features: list[str] = []
    if CPUINFO.exists():
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
        features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    machine = (platform.platform(), platform.machine(), platform.node(), os.getuid(), features)
    version = repr((SOURCE.read_text(encoding="utf-8"), compiler, FLAGS, *machine))
    return hashlib.sha256(version.encode()).hexdigest()[:16]


def _file_name(version: str, content: bytes) -> str:
    """What a compiled form is called: its own hash is in its name."""
    return f"{version}.{hashlib.sha256(content).hexdigest()[:16]}.so"


def _whole(folder: Path, version: str) -> Path | None:
    """The compiled form of this version, if it is there as it was written. One that is not is removed."""
    for path in sorted(folder.glob(f"{version}.*.so")):
        with suppress(FileNotFoundError):  # another process removed it first
            if path.name == _file_name(version, path.read_bytes()):
                return path
            path.unlink()
    return None


def _compile(compiler: str, folder: Path, version: str) -> Path:
    """Compiles native.c, and returns the file. Raises RuntimeError with what the compiler complained of."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary) / "native.so"
        compile_c(compiler, [SOURCE], new, "-shared", "-fPIC")
        content = new.read_bytes()
        path = folder / _file_name(version, content)
        # Synced, then renamed: another process may compile it at the same moment.
        write_atomically(path, content)
        return path


def compile_c(compiler: str, sources: Sequence[Path], to: Path, *options: str) -> None:
    """Compiles C files into one, with the first of FLAGS that works.

    options: such as -shared, for a library. Raises RuntimeError with what the compiler complained of last.
    """
    complaint = ""
    for flags in FLAGS:
        command = [compiler, "-O3", *flags, *options, *map(str, sources), "-o", str(to), "-lm"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, encoding="utf-8", errors="replace"
        )
        if done.returncode == 0:
            return
        complaint = done.stderr.strip()[:300]
    raise RuntimeError(f"{compiler} could not compile it: {complaint}")


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
