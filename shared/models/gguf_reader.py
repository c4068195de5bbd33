"""Week 6. What is in a GGUF file: its metadata, and its tensors, which are read and dequantized on demand.

Source: the GGUF specification in ggml's repository. The parsing is the library gguf's.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from shared.models.weights import StoredTensor

ROWS_AT_ONCE = 16
"""The library dequantizes 16 rows at a time; of a small model's rows, NumPy is several times as fast with so
many times as many.
"""


class _Reader(GGUFReader):
    """The library's reader, made faster and strict.

    A vocabulary is an array of some fifty thousand tokens, with as many merges, and the library takes several
    slices of a memmap for each. A slice beyond the file's end is an error here: the library goes on with
    empty ones, for as long as a damaged length says.
    """

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None
    ) -> np.ndarray[Any, Any]:
        if self.byte_order != "I":
            raise ValueError("its bytes are in the order of another kind of machine")
        plain = self.data.view(np.ndarray)
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(plain):
            raise ValueError(f"it ends before byte {end}")
        return plain[offset:end].view(dtype)

    def _get_field_parts(
        self, offset: int, kind: int
    ) -> tuple[int, list[np.ndarray[Any, Any]], list[int], list[GGUFValueType]]:
        """A field's bytes, its parts, which of them are data, and their kinds.

        An array's numbers are one part here, where the library has a part for each.
        """
        if kind != GGUFValueType.ARRAY:
            return super()._get_field_parts(offset, kind)
        item_kind = self._get(offset, np.uint32)
        count = self._get(offset + 4, np.uint64)
        start = offset + 12
        number = self.gguf_scalar_to_np.get(item_kind[0])
        if number is not None:
            items = [self._get(start, number, count[0])]
            end = start + items[0].nbytes
        elif item_kind[0] == GGUFValueType.STRING:
            items = list(self._strings(start, int(count[0])))
            end = start + sum(8 + text.nbytes for text in items)
        else:
            return super()._get_field_parts(offset, kind)
        parts = [item_kind, count, *items]
        kinds = [GGUFValueType.ARRAY, GGUFValueType(item_kind[0])]
        return end - offset, parts, list(range(2, len(parts))), kinds

    def _strings(self, offset: int, count: int) -> Iterator[np.ndarray[Any, Any]]:
        """The bytes of `count` strings that lie one behind the other, each behind its length in 8 bytes."""
        plain = self.data.view(np.ndarray)
        for _ in range(count):
            start = offset + 8
            if start > len(plain):
                raise ValueError(f"it ends before byte {start}")
            offset = start + int.from_bytes(plain[offset:start].tobytes(), "little")
            if offset > len(plain):
                raise ValueError(f"it ends before byte {offset}")
            yield plain[start:offset]


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata by key and the tensors by name.

    Shapes are in the order of PyTorch. Raises ValueError for a file that is cut, damaged or no GGUF file.
    """
    try:
        reader = _Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, OSError) as error:
        raise ValueError(
            f"{path} is cut, damaged or no GGUF file that the library gguf can read ({error}): download it"
            " again"
        ) from None
    tensors = {
        tensor.name: StoredTensor(tuple(map(int, reversed(tensor.shape))), partial(_dequantized, tensor))
        for tensor in reader.tensors
    }
    return metadata, tensors


def _dequantized(tensor: ReaderTensor) -> Tensor:
    """A tensor's values in fp32. Raises ValueError for a type that the library gguf does not know."""
    *rows, width = tensor.data.shape
    joined = math.gcd(math.prod(rows), ROWS_AT_ONCE)
    try:
        values = dequantize(tensor.data.reshape(-1, joined * width), tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{tensor.name} is of type {tensor.tensor_type.name}, which the library gguf cannot dequantize"
        ) from None
    values = values.reshape(*rows, -1)
    return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
