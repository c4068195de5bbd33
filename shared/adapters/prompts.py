"""Week 9. Prompt tuning (Lester et al., "The Power of Scale", 2021): learned embeddings before the text.

The model itself stays as it is.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from shared.devices import device_of
from shared.models.gpt import GPT, GPTConfig, KVCache
from shared.models.layers import swap_modules
from shared.quantization.modules import QuantizedEmbedding
from shared.sampling.text_model import TextModel


class SoftPrompt(nn.Module):
    """A token embedding with further rows: int64 [...] -> [..., n_embd].

    Token num_embeddings + i is row i of `prompt`.
    """

    base: nn.Embedding | QuantizedEmbedding

    def __init__(self, base: nn.Embedding | QuantizedEmbedding, prompt: Tensor):
        super().__init__()
        self.base = base
        self.prompt = nn.Parameter(prompt)

    def forward(self, idx: Tensor) -> Tensor:
        """int64 [...] -> [..., n_embd], in the type of the base's rows."""
        beyond = idx - self.base.num_embeddings
        rows = self.base(idx.where(beyond < 0, 0))
        return torch.where(beyond.unsqueeze(-1) < 0, rows, self.prompt[beyond.clamp(min=0)].to(rows.dtype))


class PromptTuned(TextModel):
    """A GPT with trained embeddings before every text.

    It is called as the GPT is, and returns logits for the text only. prompt: their first values,
    [num_virtual_tokens, n_embd]. Raises ValueError for a prompt that fills block_size, and for a model that
    has one already.
    """

    config: GPTConfig

    def __init__(self, model: GPT, prompt: Tensor):
        super().__init__()
        length = len(prompt)
        if length >= model.config.block_size:
            raise ValueError(
                f"a prompt of {length} tokens leaves no room for text in"
                f" block_size={model.config.block_size}: make it shorter"
            )
        if isinstance(model.token_embedding, SoftPrompt):
            raise ValueError("this model has a soft prompt already: take it from the plain model")
        self.model = model.requires_grad_(False)
        self.config = replace(model.config, block_size=model.config.block_size - length)
        self.tokenizer = model.tokenizer
        swap_modules(model, {"token_embedding": SoftPrompt(model.token_embedding, prompt)})
        self.train(model.training)

    @property
    def embedding(self) -> SoftPrompt:
        """The model's token embedding, which holds the prompt."""
        embedding = self.model.token_embedding
        assert isinstance(embedding, SoftPrompt)
        return embedding

    @property
    def prompt(self) -> nn.Parameter:
        """[num_virtual_tokens, n_embd], the only thing that is trained."""
        return self.embedding.prompt

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """int64 [batch, time] -> float [batch, time, vocab_size].

        Raises ValueError when the text does not fit beside the prompt.
        """
        if cache is not None and cache.length:
            return self.model(idx, cache)
        if idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{idx.size(1)} tokens do not fit in block_size={self.config.block_size}, which is the"
                " model's without the prompt"
            )
        virtual = torch.arange(len(self.prompt), device=idx.device) + self.config.vocab_size
        with_prompt = torch.cat([virtual.expand(len(idx), -1), idx], dim=1)
        return self.model(with_prompt, cache)[:, len(virtual) :]

    def new_cache(self, batch_size: int = 1, max_length: int | None = None) -> KVCache:
        """An empty cache of the model's, for max_length tokens of text: the prompt takes the places before
        them.
        """
        length = None if max_length is None else max_length + len(self.prompt)
        cache = self.model.new_cache(batch_size, length)
        cache.padding_begins = len(self.prompt)
        return cache


def add_prompt(model: GPT, num_virtual_tokens: int, ids: Sequence[int] | None = None) -> PromptTuned:
    """Freezes `model`, and puts that many trainable embeddings before every text.

    ids: tokens whose embeddings are the first values, repeated or cut to length (a text that says what to
    do); if not given, random ones of the vocabulary. `result.model` is the same model, and without the prompt
    computes what it did. Raises ValueError for a prompt without tokens, one that fills block_size, and ids
    that are not in the vocabulary.
    """
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens={num_virtual_tokens}: must be at least 1")
    vocab_size = model.config.vocab_size
    if ids is None:
        first = torch.randint(vocab_size, (num_virtual_tokens,))
    elif len(ids) and all(0 <= i < vocab_size for i in ids):
        repeats = math.ceil(num_virtual_tokens / len(ids))
        first = torch.tensor(ids).repeat(repeats)[:num_virtual_tokens]
    else:
        raise ValueError(f"ids must be tokens from 0 to {vocab_size - 1}, at least one")
    prompt = model.token_embedding(first.to(device_of(model))).detach().float().clone()
    return PromptTuned(model, prompt)
