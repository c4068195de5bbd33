"""Week 12. One key/value cache for many requests: slots of one preallocated tensor, read and written a few
rows at a time.

A model takes `SlotCache.rows(...)` in place of its own `KVCache`. Rows of different lengths then share one
forward pass, each with positions and a mask of its own; the model's code does not change. This is all that
continuous batching (Yu et al., "Orca", 2022) asks of a cache.

>>> cache = SlotCache(GPTConfig.preset("nano"), slots=4)
>>> rows = cache.rows(0, [3, 0])  # two slots, the first of which holds three tokens
>>> rows.positions(1).tolist(), rows.mask(1, None)[:, 0, 0, :5].int().tolist()
([[3], [0]], [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.models.cache import checked_length
from shared.models.gpt import GPTConfig

KEYS = 64
"""Attention reads a multiple of this many keys, those beyond a row's end hidden. Complete blocks of hidden
keys add exact zeros to the sums, so a row's result does not depend on the length of its neighbours.
"""


class SlotCache:
    """Keys and values of `slots` texts of up to `max_length` tokens (the model's block_size if not given).

    It does not know which tokens a slot holds: its owner counts them, and passes the counts to `rows`. Raises
    ValueError for a `max_length` that the model cannot have.
    """

    def __init__(
        self,
        config: GPTConfig,
        slots: int,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.max_length = checked_length(config, max_length)
        # One place more than a text needs: idle rows, which only fill a batch, are written there.
        places = KEYS * math.ceil((self.max_length + 1) / KEYS)
        shape = (config.n_layer, slots, config.kv_heads, places, config.head_dim)
        # Hidden keys are read too, and multiplied by zero: they must not be NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def rows(self, first: int, lengths: Sequence[int | None]) -> "SlotRows":
        """The slots from `first` on as the rows of a batch, with `lengths` tokens in each.

        A length of None marks an idle row: its slot is not changed, and its result has no meaning.
        """
        return SlotRows(self, first, lengths)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot to another."""
        for tensor in (self.k, self.v):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]

    def clear(self, slot: int) -> None:
        """Writes zeros over a slot, after values that are not finite: a mask would not hide those."""
        self.k[:, slot] = 0
        self.v[:, slot] = 0


class SlotRows:
    """Some slots of a cache during one forward pass: a `shared.models.attention.Cache` with a length for each
    row.
    """

    def __init__(self, cache: SlotCache, first: int, lengths: Sequence[int | None]):
        self.cache = cache
        self.longest = max(length or 0 for length in lengths)
        self.slots = slice(first, first + len(lengths))
        device = cache.k.device
        self._lengths = torch.tensor([length or 0 for length in lengths], device=device)[:, None]
        self._idle = torch.tensor([length is None for length in lengths], device=device)[:, None]
        self._row = torch.arange(len(lengths), device=device)[:, None]
        self._masks: dict[int | None, Tensor] = {}

    def positions(self, time: int) -> Tensor:
        """Positions of the next `time` tokens of each row: int64 [rows, time].

        Raises ValueError when they do not fit.
        """
        if self.longest + time > self.cache.max_length:
            raise ValueError(
                f"a slot holds {self.longest} of {self.cache.max_length} tokens, and {time} more do not fit"
            )
        self._positions = self._lengths + torch.arange(time, device=self._lengths.device)
        last_place = self.cache.k.size(3) - 1
        self._places = self._positions.masked_fill(self._idle, last_place)
        self._keys = KEYS * math.ceil((self.longest + time) / KEYS)
        return self._positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [rows, n_kv_head, time, head_dim] of `layer`.

        Returns all of that layer's, [rows, n_kv_head, keys, head_dim], up to the end of the longest row.
        """
        past_k = self.cache.k[layer, self.slots]
        past_v = self.cache.v[layer, self.slots]
        past_k[self._row, :, self._places] = k.transpose(1, 2)
        past_v[self._row, :, self._places] = v.transpose(1, 2)
        return past_k.narrow(2, 0, self._keys), past_v.narrow(2, 0, self._keys)

    def mask(self, time: int, window: int | None) -> Tensor:
        """The keys that each query may see (True: may): bool [rows, 1, time, keys], alike in all layers with
        this window.
        """
        if window not in self._masks:
            keys = torch.arange(self._keys, device=self._positions.device)
            distance = self._positions[..., None] - keys  # [rows, time, keys]
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            self._masks[window] = mask.unsqueeze(1)
        return self._masks[window]

    def advance(self, time: int) -> None:
        """Does nothing: the owner of the slots counts their tokens."""
