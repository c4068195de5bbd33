"""Week 12. One key/value cache for many requests: slots of one preallocated tensor, read and written a few
rows at a time.

A model is handed `SlotCache.rows(...)` where it would be handed its own `KVCache`: rows of different lengths
then share a forward pass, each with positions and a mask of its own, and the model does not know. Continuous
batching (Yu et al., "Orca", 2022) needs no more than this.

>>> cache = SlotCache(GPTConfig.preset("nano"), slots=4)
>>> rows = cache.rows(0, [3, 0])  # two slots, the first of which holds three tokens
>>> rows.positions(1).tolist(), rows.mask(1, None)[:, 0, 0, :5].int().tolist()
([[3], [0]], [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.models.gpt import GPTConfig

KEYS = 64
"""Attention looks at a multiple of so many keys, those beyond a row's end hidden. Whole blocks of them add
exact zeros to what is summed, so that a row's result does not depend on how long its neighbours are.
"""


class SlotCache:
    """Keys and values of `slots` texts of up to `max_length` tokens (the model's block_size if not given).
    What a slot holds is the owner's affair: this is memory, and the view of it that a forward pass needs.
    """

    def __init__(
        self,
        config: GPTConfig,
        slots: int,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.max_length = max_length or config.block_size
        if not 1 <= self.max_length <= config.block_size:
            raise ValueError(
                f"max_length={max_length}: must be from 1 to the model's block_size={config.block_size}"
            )
        # One place more than needed, which is written to by rows that are only there to fill a batch.
        shape = (
            config.n_layer,
            slots,
            config.kv_heads,
            KEYS * math.ceil((self.max_length + 1) / KEYS),
            config.head_dim,
        )
        # Hidden keys are read too, and multiplied by zero: they must not be NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def rows(self, first: int, lengths: Sequence[int | None]) -> "SlotRows":
        """The slots from `first` on as the rows of a batch, with `lengths` tokens in each. None: the slot
        stays as it is, and what the row computes means nothing.
        """
        return SlotRows(self, first, lengths)

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one slot, to another."""
        for tensor in (self.k, self.v):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]

    def clear(self, slot: int) -> None:
        """Zeros: after values that are not finite, which would not stay hidden."""
        self.k[:, slot] = 0
        self.v[:, slot] = 0


class SlotRows:
    """Some slots of a cache during one forward pass: what `shared.models.attention.Cache` asks for, with a
    length for each row.
    """

    def __init__(self, cache: SlotCache, first: int, lengths: Sequence[int | None]):
        self.cache, self.longest = cache, max(length or 0 for length in lengths)
        self.slots = slice(first, first + len(lengths))
        device = cache.k.device
        self._lengths = torch.tensor([length or 0 for length in lengths], device=device)[:, None]
        self._idle = torch.tensor([length is None for length in lengths], device=device)[:, None]
        self._row = torch.arange(len(lengths), device=device)[:, None]
        self._mask: Tensor | None = None

    def positions(self, time: int) -> Tensor:
        """Where the next `time` tokens of each row stand: int64 [rows, time]. Raises ValueError when they do
        not fit.
        """
        if self.longest + time > self.cache.max_length:
            raise ValueError(
                f"a slot holds {self.longest} of {self.cache.max_length} tokens, and {time} more do not fit"
            )
        self._positions = self._lengths + torch.arange(time, device=self._lengths.device)
        self._places = self._positions.masked_fill(self._idle, self.cache.k.size(3) - 1)
        self._keys = KEYS * math.ceil((self.longest + time) / KEYS)
        return self._positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [rows, n_kv_head, time, head_dim] for `layer`; returns [rows, n_kv_head, keys, head_dim], as
        far as the longest row goes.
        """
        past_k, past_v = self.cache.k[layer, self.slots], self.cache.v[layer, self.slots]
        past_k[self._row, :, self._places] = k.transpose(1, 2)
        past_v[self._row, :, self._places] = v.transpose(1, 2)
        return past_k.narrow(2, 0, self._keys), past_v.narrow(2, 0, self._keys)

    def mask(self, time: int, window: int | None) -> Tensor:
        """bool [rows, 1, time, keys], the same for every layer."""
        if self._mask is None:
            distance = self._positions[..., None] - torch.arange(
                self._keys, device=self._positions.device
            )  # [rows, time, keys]
            seen = distance >= 0
            self._mask = (seen if window is None else seen & (distance < window)).unsqueeze(1)
        return self._mask

    def advance(self, time: int) -> None:
        """Nothing: who owns the slots counts, and only the rows that had something to say."""
