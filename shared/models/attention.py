"""Week 3. Causal self-attention: every position looks at itself and the positions before it, and takes a
weighted mean of what they offer.

Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; grouped-query attention from Ainslie
et al. (2023); the sliding window from Beltagy et al., "Longformer" (2020), as Mistral uses it; the soft cap
from Gemma 2 (2024).

>>> layer = CausalSelfAttention(n_embd=32, n_head=4)
>>> layer(torch.randn(2, 10, 32)).shape
torch.Size([2, 10, 32])
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import Checks
from shared.models.layers import Linear
from shared.registry import LanguageModel, register_model

Rotation = Callable[[Tensor], Tensor]
"""Turns queries or keys [batch, head, time, head_dim] by their positions (RoPE)."""


class Cache(Protocol):
    """What a model asks of a key/value cache. `shared.models.cache.KVCache` is the ordinary one."""

    def positions(self, time: int) -> Tensor:
        """The positions of the next `time` tokens: int64 [time], or [batch, time] where rows differ."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values of `layer`, and returns all of that layer's, past first."""

    def mask(self, time: int, window: int | None) -> Tensor | None:
        """The keys that each of the `time` new queries may see (True: may), or None where each sees all."""

    def advance(self, time: int) -> None:
        """Counts `time` tokens as read, once all layers have stored theirs."""


def causal_mask(
    time: int, past: int = 0, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Bool [time, past + time]: True where a query may see a key.

    Query i stands at position past + i. It sees the keys up to its own position; with a window only the last
    `window` of them, its own included.

    >>> causal_mask(3).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    >>> causal_mask(2, past=2, window=2).int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    mask = torch.ones(time, past + time, dtype=torch.bool, device=device).tril(past)
    return mask if window is None else mask.triu(past - window + 1)


def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale), with a weight of exactly zero for masked keys.

    q: [..., time, head_dim]. k: [..., keys, head_dim]. mask: bool [time, keys], or None. scale: None means
    1 / √head_dim. softcap: scores become softcap · tanh(score / softcap). Returns the weights [..., time,
    keys]; each row sums to 1.
    """
    scores = q @ k.transpose(-2, -1)
    scores = scores / math.sqrt(q.size(-1)) if scale is None else scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: [batch, time, n_embd] -> [batch, time, n_embd].

    n_kv_head: fewer key/value heads than query heads (grouped-query attention); None gives each query head
    its own. window: a position sees only the last `window` positions, itself included; None sees the whole
    past. qk_norm: makes a norm of a given size, one for queries and one for keys, applied before any
    rotation; None for no norms. norm_over: "head" norms each head by itself (as in Qwen3), "width" all heads
    together (OLMo 2). head_dim: None means n_embd / n_head. qkv_bias: biases of queries, keys and values;
    None means `bias`. scale, softcap: as in `attention_weights`. Raises ValueError for sizes that do not
    divide.
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        window: int | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        norm_over: Literal["head", "width"] = "head",
        head_dim: int | None = None,
        qkv_bias: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ):
        super().__init__()
        n_kv_head = n_kv_head or n_head
        if head_dim is None and n_embd % n_head:
            raise ValueError(
                f"n_embd={n_embd} does not divide into n_head={n_head} heads: choose n_embd a multiple of"
                " n_head"
            )
        if n_head % n_kv_head:
            raise ValueError(
                f"n_head={n_head} query heads cannot share n_kv_head={n_kv_head} evenly: choose a divisor of"
                f" {n_head}"
            )
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.head_dim = head_dim or n_embd // n_head
        self.dropout = dropout
        self.window = window
        self.scale = scale
        self.softcap = softcap
        qkv_bias = bias if qkv_bias is None else qkv_bias
        width, kv_width = n_head * self.head_dim, n_kv_head * self.head_dim
        self.q_proj = Linear(n_embd, width, bias=qkv_bias)
        self.k_proj = Linear(n_embd, kv_width, bias=qkv_bias)
        self.v_proj = Linear(n_embd, kv_width, bias=qkv_bias)
        self.o_proj = Linear(width, n_embd, bias=bias)
        self.norms_heads = norm_over == "head"
        sizes = (self.head_dim, self.head_dim) if self.norms_heads else (width, kv_width)
        self.q_norm = qk_norm(sizes[0]) if qk_norm else None
        self.k_norm = qk_norm(sizes[1]) if qk_norm else None

    def _heads(self, x: Tensor, n_head: int) -> Tensor:
        """[batch, time, n_head * head_dim] -> [batch, n_head, time, head_dim]."""
        batch, time, _ = x.shape
        if time == 1:  # spares a transposition where the model writes token by token
            return x.view(batch, n_head, 1, self.head_dim)
        return x.view(batch, time, n_head, self.head_dim).transpose(1, 2)

    def qkv(self, x: Tensor, rotate: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, n_head, time, head_dim], keys and values [batch, n_kv_head, time, head_dim]."""
        q, k = self.q_proj(x), self.k_proj(x)
        if not self.norms_heads and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self._heads(q, self.n_head)
        k = self._heads(k, self.n_kv_head)
        v = self._heads(self.v_proj(x), self.n_kv_head)
        if self.norms_heads and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q = rotate(q)
            k = rotate(k)
        return q, k, v

    def weights(self, x: Tensor, rotate: Rotation | None = None) -> Tensor:
        """The attention weights themselves, to look at: [batch, n_head, time, time]."""
        q, k, _ = self.qkv(x, rotate)
        mask = causal_mask(x.size(1), window=self.window, device=x.device)
        return self._weights(q, k, mask)

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
        return attention_weights(q, k, mask, self.scale, self.softcap)

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with a soft cap, which PyTorch's does not have: [batch, n_head, time, head_dim]."""
        time = q.size(2)
        if mask is None and time > 1:
            mask = causal_mask(time, device=q.device)
        weights = self._weights(q, k, mask)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)

    def forward(
        self, x: Tensor, rotate: Rotation | None = None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        """rotate: applied to queries and keys. cache: past keys and values, stored under number `layer`."""
        batch, time, _ = x.shape
        q, k, v = self.qkv(x, rotate)
        mask = None
        is_causal = False  # PyTorch takes either a mask or this flag
        if cache is not None:
            k, v = cache.update(layer, k, v)
            mask = cache.mask(time, self.window)
        elif self.window is not None and self.window < time:
            mask = causal_mask(time, window=self.window, device=x.device)
        else:
            is_causal = time > 1
        if self.softcap is not None:
            out = self._capped(q, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=self.n_kv_head != self.n_head,
                scale=self.scale,
            )  # [batch, n_head, time, head_dim]
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))


@dataclass(frozen=True)
class AttentionLMConfig:
    """The shape of an `AttentionLM`."""

    vocab_size: int
    block_size: int = 64
    """Longest sequence, in tokens."""
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 64
    n_hidden: int = 256

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "vocab_size", "block_size", "n_layer")
        checks.at_least(1, "n_head", "n_embd", "n_hidden")
        checks.finish()


@register_model(AttentionLMConfig)
class AttentionLM(LanguageModel):
    """Week 2's model with attention in the place of the fixed window: int64 [batch, time] -> [batch, time,
    vocab_size].

    Embeddings, layers of `CausalSelfAttention` that add to a residual stream, and at the end one tanh layer
    and logits. What week 4 adds is an MLP after every attention layer. First values: embeddings N(0, 0.02²),
    linear weights N(0, 1/inputs), lm_head N(0, 0.01²), so that the first loss is ln(vocab_size); biases 0.
    """

    config: AttentionLMConfig

    def __init__(self, config: AttentionLMConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer))
        self.layers = nn.ModuleList(
            CausalSelfAttention(config.n_embd, config.n_head) for _ in range(config.n_layer)
        )
        self.norm = nn.LayerNorm(config.n_embd)
        self.hidden = nn.Linear(config.n_embd, config.n_hidden)
        self.lm_head = nn.Linear(config.n_hidden, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The first values, as the class says."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                std = 0.01 if name == "lm_head" else module.in_features**-0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor) -> Tensor:
        """int64 [batch, time] -> [batch, time, vocab_size]. Raises ValueError beyond block_size tokens."""
        time = idx.size(1)
        block_size = self.config.block_size
        if time > block_size:
            raise ValueError(
                f"{time} tokens do not fit in block_size={block_size}: pass the last {block_size}"
            )
        x = self.token_embedding(idx) + self.position_embedding.weight[:time]  # [batch, time, n_embd]
        for norm, layer in zip(self.norms, self.layers):
            x = x + layer(norm(x))
        return self.lm_head(torch.tanh(self.hidden(self.norm(x))))


@torch.no_grad()
def attention_maps(model: nn.Module, idx: Tensor) -> list[Tensor]:
    """The attention weights of every `CausalSelfAttention` in `model` on `idx`, in order: [batch, n_head,
    time, time] each.
    """
    maps: list[Tensor] = []

    def record(module: CausalSelfAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        maps.append(module.weights(args[0], kwargs.get("rotate")))

    layers = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return maps
