"""C in the notebook: the learner's, compiled and called, and the course's, to read."""

import ctypes
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shared.compiled import compile_c, find_compiler
from shared.runtime import ROOT

Matvec = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
"""From codes int8 [rows, columns] and scales float32 [rows], codes int8 [columns] and their scale: float32
[rows].
"""


GroupedMatvec = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From codes int8 [rows, columns] and scales float32 [rows, columns / 32], codes int8 [columns] and their
scales [columns / 32]: float32 [rows].
"""


def compiled_matvec(source: str) -> Matvec | None:
    """The function int8_matvec of a C source; None, after saying so, where there is no compiler.

    Raises RuntimeError with what the compiler complained of.
    """
    function = _compiled(source, "int8_matvec")
    if function is None:
        return None
    address, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    function.argtypes = [address, address, address, real, address, number, number]

    def matvec(codes: np.ndarray, scales: np.ndarray, x: np.ndarray, x_scale: float) -> np.ndarray:
        codes, x = np.ascontiguousarray(codes, np.int8), np.ascontiguousarray(x, np.int8)
        scales = np.ascontiguousarray(scales, np.float32)
        y = np.empty(len(codes), np.float32)
        given = codes.ctypes.data, scales.ctypes.data, x.ctypes.data, x_scale, y.ctypes.data
        function(*given, *codes.shape)
        return y

    return matvec


def compiled_grouped_matvec(source: str) -> GroupedMatvec | None:
    """The function grouped_matvec of a C source; None, after saying so, where there is no compiler.

    Raises RuntimeError with what the compiler complained of.
    """
    function = _compiled(source, "grouped_matvec")
    if function is None:
        return None
    function.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int, ctypes.c_int]

    def matvec(codes: np.ndarray, scales: np.ndarray, x: np.ndarray, x_scales: np.ndarray) -> np.ndarray:
        parts = [np.ascontiguousarray(part, np.int8) for part in (codes, x)]
        factors = [np.ascontiguousarray(part, np.float32) for part in (scales, x_scales)]
        y = np.empty(len(codes), np.float32)
        given = (parts[0], factors[0], parts[1], factors[1], y)
        function(*(array.ctypes.data for array in given), *codes.shape)
        return y

    return matvec


def _compiled(source: str, name: str) -> Callable | None:
    """A function without a result of a C source, or None where there is no compiler."""
    try:
        compiler = find_compiler()
    except RuntimeError as error:
        print(f"{name} is not compiled: {error}")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder, f"{name}.c"), Path(folder, f"{name}.so")
        path.write_text(source, encoding="utf-8")
        compile_c(compiler, [path], library, "-shared", "-fPIC")
        function = getattr(ctypes.CDLL(str(library)), name)
    function.restype = None
    return function


def c_function(file: str, name: str) -> str:
    """A function of the course's C, with the comment above it. file: in shared/quantization.

    Raises ValueError where there is none of that name.
    """
    source = (ROOT / "shared/quantization" / file).read_text(encoding="utf-8")
    comment = r"(?:^/\*(?:(?!\*/)[\s\S])*\*/\n)?"
    head = rf"^[A-Za-z][\w *]*\b{name}\([^;{{]*\) \{{\n"
    found = re.search(rf"{comment}{head}[\s\S]*?^\}}", source, re.MULTILINE)
    if found is None:
        raise ValueError(f"{file} has no function {name}: look it up there")
    return found[0]
