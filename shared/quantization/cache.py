"""Week 8. A key/value cache in 8 bits: a quarter of the memory that a long text takes.

Each key and each value, one head's vector of one token, is kept as int8 codes with its largest magnitude as
127; attention reads them unpacked. It saves memory, not time: all that is kept is unpacked at each step.
Source: absmax rounding as in Dettmers et al., "LLM.int8()" (2022); Liu et al., "KIVI" (2024) on keys, whose
channels differ more than values' do, so that fewer bits need a scale for each channel.

>>> from shared.models.gpt import GPT
>>> model = GPT(GPTConfig.preset("nano"))
>>> model.cache_type = Int8Cache  # `new_cache`, and so `generate`, makes such caches from here on
>>> cache = model.new_cache()
>>> model(torch.tensor([[1, 2, 3]]), cache).shape, cache.length
(torch.Size([1, 3, 65]), 3)
>>> cache.num_bytes / KVCache(model.config).num_bytes
0.28125
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.models.gpt import GPTConfig, KVCache
from shared.quantization.packing import absmax_int8


class Int8Cache(KVCache):
    """`KVCache` with int8 codes, and a scale for each head's vector of each token.

    dtype: of what `update` returns. Raises ValueError as `KVCache` does.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(config, batch_size, max_length, device, torch.int8)
        self.dtype = dtype
        self.k_scale = torch.empty(self.k.shape[:-1], device=device)
        self.v_scale = torch.empty(self.v.shape[:-1], device=device)

    @property
    def num_bytes(self) -> int:
        """Bytes that the cache holds."""
        return super().num_bytes + self.k_scale.nbytes + self.v_scale.nbytes

    def _kept(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.k_scale, self.v_scale

    def keep(self, rows: Sequence[int]) -> None:
        """Forgets all rows of the batch but these."""
        super().keep(rows)
        self.k_scale, self.v_scale = self.k_scale[:, rows], self.v_scale[:, rows]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v [batch, n_kv_head, time, head_dim] for `layer`, rounded, and returns that layer's
        keys and values so far, the new ones rounded like the others: [batch, n_kv_head, length + time,
        head_dim] each.
        """
        end = self.length + k.size(2)
        unpacked = []
        for new, all_codes, all_scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            codes, scales = all_codes[layer], all_scales[layer]
            rounded, scale = absmax_int8(new.float().flatten(0, -2))
            codes[:, :, self.length : end] = rounded.view(new.shape)
            scales[:, :, self.length : end] = scale.view(new.shape[:-1])
            unpacked.append((codes[:, :, :end].float() * scales[:, :, :end, None]).to(self.dtype))
        return unpacked[0], unpacked[1]
