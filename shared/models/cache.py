"""Week 4. The keys and values that a GPT keeps of the tokens that it has read.

>>> from shared.models.gpt import GPT
>>> model = GPT(GPTConfig.preset("nano"))
>>> cache = KVCache(model.config)
>>> model(torch.tensor([[1, 2, 3]]), cache).shape, cache.length
(torch.Size([1, 3, 65]), 3)
>>> model(torch.tensor([[4]]), cache).shape, cache.length
(torch.Size([1, 1, 65]), 4)
"""

from typing import Self

import torch
from torch import Tensor

from shared.models.attention import causal_mask
from shared.models.config import GPTConfig


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
        self.max_length = max_length or config.block_size
        if self.max_length > config.block_size:
            raise ValueError(f"max_length={max_length} is over the model's block_size={config.block_size}")
        shape = (config.n_layer, batch_size, config.kv_heads, self.max_length, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # nothing is read before it is written
        self.v = torch.empty(shape, device=device, dtype=dtype)
        # Views of the layers, made once: a small model's step is short.
        self._layers = [(self.k[layer], self.v[layer]) for layer in range(config.n_layer)]
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache holds."""
        return self.k.nbytes + self.v.nbytes

    def positions(self, time: int) -> Tensor:
        """The positions of the next `time` tokens: int64 [time]. Raises ValueError when they do not fit."""
        if self.length + time > self.max_length:
            raise ValueError(
                f"the cache holds {self.length} of {self.max_length} tokens and {time} more do not fit: "
                "start a new cache from the last part of the text"
            )
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
        """bool [time, length + time], True where a query may look; None when the one new token sees all."""
        if time == 1 and (window is None or self.length < window):
            return None
        return causal_mask(time, past=self.length, window=window, device=self.k.device)

    def advance(self, time: int) -> None:
        """Counts `time` tokens as read, once all layers have stored theirs."""
        self.length += time

    def begin_with(self, other: Self) -> None:
        """Holds what another cache of this kind holds, as the first tokens of a text."""
        for own, tensor in zip(self._kept(), other._kept()):
            own[:, :, :, : other.length] = tensor[:, :, :, : other.length]
        self.length = other.length

    def _kept(self) -> tuple[Tensor, ...]:
        """All that is kept of the tokens: [layer, batch, head, time, ...] each."""
        return self.k, self.v
