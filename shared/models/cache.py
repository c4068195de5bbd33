"""Week 4. The keys and values that a GPT keeps of the tokens that it has read.

>>> from shared.models.gpt import GPT
>>> model = GPT(GPTConfig.preset("nano"))
>>> cache = KVCache(model.config)
>>> model(torch.tensor([[1, 2, 3]]), cache).shape, cache.length
(torch.Size([1, 3, 65]), 3)
>>> model(torch.tensor([[4]]), cache).shape, cache.length
(torch.Size([1, 1, 65]), 4)
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from shared.models.attention import causal_mask
from shared.models.config import GPTConfig


def checked_length(config: GPTConfig, max_length: int | None) -> int:
    """How many tokens a text may have: `max_length`, or the model's block_size where it is not given.

    Raises ValueError for a length that the model cannot have.
    """
    length = max_length or config.block_size
    if not 1 <= length <= config.block_size:
        raise ValueError(
            f"max_length={max_length}: must be from 1 to the model's block_size={config.block_size}"
        )
    return length


class KVCache:
    """Keys and values of the tokens that a model has read. It is preallocated and belongs to the caller; a
    forward pass advances it once.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.max_length = checked_length(config, max_length)
        shape = (config.n_layer, batch_size, config.kv_heads, self.max_length, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # nothing is read before it is written
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self._layers = self._views()
        self.length = 0
        self.padding_begins = 0
        """Where `pad` puts what means nothing: behind what all rows have in common."""
        self._padding: Tensor | None = None  # [batch, 1]
        self._masks: dict[int | None, Tensor] = {}  # of padded rows, alike in all layers with this window

    def _views(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values; made once, as a small model's step is short."""
        return [(self.k[layer], self.v[layer]) for layer in range(len(self.k))]

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache holds."""
        return self.k.nbytes + self.v.nbytes

    def positions(self, time: int) -> Tensor:
        """The positions of the next `time` tokens: int64 [time], or [batch, time] where rows are padded.

        Raises ValueError when they do not fit.
        """
        if self.length + time > self.max_length:
            raise ValueError(
                f"the cache holds {self.length} of {self.max_length} tokens and {time} more do not fit: "
                "start a new cache from the last part of the text"
            )
        if self._padding is not None:
            return self._padded_positions(self._padding, time)[:, self.length :]
        return torch.arange(self.length, self.length + time, device=self.k.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [batch, n_kv_head, time, head_dim] for `layer`, and returns that layer's keys and
        values so far: [batch, n_kv_head, length + time, head_dim] each.
        """
        time = k.size(2)
        end = self.length + time
        all_k, all_v = self._layers[layer]
        all_k.narrow(2, self.length, time).copy_(k)  # `narrow` takes half the time of slicing
        all_v.narrow(2, self.length, time).copy_(v)
        return all_k.narrow(2, 0, end), all_v.narrow(2, 0, end)

    def mask(self, time: int, window: int | None) -> Tensor | None:
        """bool [time, length + time], True where a query may look; None when the one new token sees all.

        Where rows are padded: [batch, 1, time, length + time].
        """
        if self._padding is not None:
            if window not in self._masks:
                self._masks[window] = self._padded_mask(self._padding, time, window)
            return self._masks[window]
        if time == 1 and (window is None or self.length < window):
            return None
        return causal_mask(time, past=self.length, window=window, device=self.k.device)

    def advance(self, time: int) -> None:
        """Counts `time` tokens as read, once all layers have stored theirs."""
        self.length += time
        self._masks.clear()

    def forget(self, count: int) -> None:
        """Forgets the last `count` tokens: the next ones take their places. Raises ValueError for more than
        it holds.
        """
        if not 0 <= count <= self.length:
            raise ValueError(f"the cache holds {self.length} tokens: {count} cannot be forgotten")
        self.length -= count
        self._masks.clear()

    def pad(self, counts: Sequence[int]) -> None:
        """Of the tokens to come, the first `counts[i]` of row i mean nothing: no other token sees them, and
        the positions of what follows do not count them. So texts of different lengths end at one place.

        Raises ValueError where something has been read.
        """
        if self.length:
            raise ValueError(f"the cache holds {self.length} tokens: padding comes before the first")
        self._padding = torch.tensor(counts, device=self.k.device)[:, None]

    def _padded_positions(self, padding: Tensor, time: int) -> Tensor:
        """The positions of all tokens up to the `time` new ones: int64 [batch, length + time]."""
        places = torch.arange(self.length + time, device=self.k.device)
        moved = (places - padding).clamp(min=self.padding_begins)
        return torch.where(places < self.padding_begins, places, moved)

    def _padded_mask(self, padding: Tensor, time: int, window: int | None) -> Tensor:
        positions = self._padded_positions(padding, time)
        places = torch.arange(self.length + time, device=self.k.device)
        hidden = (places >= self.padding_begins) & (places < self.padding_begins + padding)  # [batch, keys]
        distance = positions[:, self.length :, None] - positions[:, None]  # [batch, time, keys]
        mask = (distance >= 0) & ~hidden[:, None]
        if window is not None:
            mask &= distance < window
        # What is padding itself sees itself: a mean over nothing would not be a number.
        mask |= places[self.length :, None] == places
        return mask.unsqueeze(1)

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all rows of the batch but these."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self._layers = self._views()
        if self._padding is not None:
            self._padding = self._padding[rows]

    def begin_with(self, other: Self) -> None:
        """Holds what another cache of this kind holds, as the first tokens of a text."""
        for own, tensor in zip(self._kept(), other._kept()):
            own[:, :, :, : other.length] = tensor[:, :, :, : other.length]
        self.length = other.length

    def _kept(self) -> tuple[Tensor, ...]:
        """All that is kept of the tokens: [layer, batch, head, time, ...] each."""
        return self.k, self.v
