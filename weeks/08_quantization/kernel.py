"""The learner's C, compiled and called from the notebook."""

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shared.compiled import compile_c, find_compiler

Matvec = Callable[[np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]
"""From codes int8 [rows, columns] and scales float32 [rows], codes int8 [columns] and their scale: float32
[rows].
"""


def compiled_matvec(source: str) -> Matvec | None:
    """The function int8_matvec of a C source; None, after saying so, where there is no compiler.

    Raises RuntimeError with what the compiler complained of.
    """
    try:
        compiler = find_compiler()
    except RuntimeError as error:
        print(f"int8_matvec is not compiled: {error}")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder, "int8_matvec.c"), Path(folder, "int8_matvec.so")
        path.write_text(source, encoding="utf-8")
        compile_c(compiler, [path], library, "-shared", "-fPIC")
        function = ctypes.CDLL(str(library)).int8_matvec
    address, number, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    function.argtypes = [address, address, address, real, address, number, number]
    function.restype = None

    def matvec(codes: np.ndarray, scales: np.ndarray, x: np.ndarray, x_scale: float) -> np.ndarray:
        codes, x = np.ascontiguousarray(codes, np.int8), np.ascontiguousarray(x, np.int8)
        scales = np.ascontiguousarray(scales, np.float32)
        y = np.empty(len(codes), np.float32)
        given = codes.ctypes.data, scales.ctypes.data, x.ctypes.data, x_scale, y.ctypes.data
        function(*given, *codes.shape)
        return y

    return matvec
