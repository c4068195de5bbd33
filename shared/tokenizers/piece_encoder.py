"""Week 5. The ids of many pieces of text at once, in C, which is compiled on this machine when first needed.

Piece by piece, Python spends most of its time on looking up one pair of tokens after the other.
`piece_encoder.c` does the same as `Merger`, many times as fast. Where there is no compiler, that one gives
the same ids.
"""

import ctypes
from collections.abc import Mapping
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

from shared.compiled import load_compiled
from shared.tokenizers.merging import LONG_PIECE, Merger

SOURCE = Path(__file__).with_suffix(".c")
PLACE = np.dtype([(name, np.int32) for name in ("left", "right", "rank", "merged")])
"""A place of the table of pairs, as in piece_encoder.c."""
FREE = -1
NO_TOKEN = -1
"""The id of a byte that the vocabulary lacks."""


class Vocabulary(ctypes.Structure):
    """What pieces are encoded with, as in piece_encoder.c."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("id_of_byte", ctypes.c_int32 * 256),
    ]


@cache
def encoding_library() -> ctypes.CDLL:
    """The functions of piece_encoder.c.

    Raises RuntimeError, with the reason, where they cannot be compiled.
    """
    functions = load_compiled(SOURCE, flags=(["-march=native"], []))
    vocabulary, address, size = ctypes.POINTER(Vocabulary), ctypes.c_void_p, ctypes.c_int64
    functions.fill_table.argtypes = [vocabulary, address, size]
    functions.fill_table.restype = None
    functions.encode_pieces.argtypes = [vocabulary, ctypes.c_char_p, address, size, address]
    functions.encode_pieces.restype = size
    return functions


class PieceEncoder:
    """Gives many pieces the ids that their bytes become when `merger` has merged them.

    byte_ids: the tokens of single bytes; there may be bytes without one. whole: pieces that become one token,
    whatever merges make of them. Raises RuntimeError, with the reason, where C cannot be compiled.

    >>> merger = Merger({(97, 97): 0, (256, 98): 1}, merged=[256, 257])
    >>> PieceEncoder(merger, {byte: byte for byte in range(256)}).encode(["aaa", "aab"])
    [256, 97, 257]
    """

    def __init__(self, merger: Merger, byte_ids: Mapping[int, int], whole: Mapping[bytes, int] | None = None):
        self._functions = encoding_library()
        count = len(merger.ranks)
        pairs = np.zeros(count, PLACE)
        both = np.fromiter(chain.from_iterable(merger.ranks), np.int32, 2 * count)
        pairs["left"], pairs["right"] = both[0::2], both[1::2]
        pairs["rank"] = np.fromiter(merger.ranks.values(), np.int32, count)
        pairs["merged"] = np.array(merger.merged, np.int32)[pairs["rank"]]
        bits = (2 * count + 1).bit_length()
        self._table = np.full(1 << bits, FREE, PLACE)
        id_of_byte = [byte_ids.get(byte, NO_TOKEN) for byte in range(256)]
        self._vocabulary = Vocabulary(self._table.ctypes.data, bits, tuple(id_of_byte))
        self._functions.fill_table(self._vocabulary, pairs.ctypes.data, count)
        self._unmerged = self._not_reached(whole or {})

    def encode(self, pieces: list[str]) -> list[int] | None:
        """The ids of pieces, one piece after the other.

        None where one of them is not for this class: it has more than LONG_PIECE characters, whose merging
        would take long here, or a byte without a token, or it is a whole token that no merges lead to.
        """
        if self._unmerged and not self._unmerged.isdisjoint(pieces):
            return None
        lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
        if lengths.max(initial=0) > LONG_PIECE:
            return None
        ids = self._encode(pieces, lengths)
        return None if ids.min(initial=0) == NO_TOKEN else ids.tolist()

    def _encode(self, pieces: list[str], lengths: np.ndarray) -> np.ndarray:
        """The ids, NO_TOKEN among them.

        lengths: int32, how many characters a piece has; then, how many ids.
        """
        text = "".join(pieces).encode()
        ids = np.empty(len(text), np.int32)
        count = self._functions.encode_pieces(
            self._vocabulary, text, lengths.ctypes.data, len(pieces), ids.ctypes.data
        )
        return ids[:count]

    def _not_reached(self, whole: Mapping[bytes, int]) -> frozenset[str]:
        """The whole pieces that merges do not make one token of."""
        texts = [token.decode("utf-8", errors="ignore") for token in whole]
        pieces = [text for text in texts if len(text) <= LONG_PIECE]
        counts = np.fromiter(map(len, pieces), np.int32, len(pieces))
        self._encode(pieces, counts)
        return frozenset(piece for piece, count in zip(pieces, counts.tolist()) if count > 1)
