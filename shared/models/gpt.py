"""Week 4. One decoder-only transformer, GPT-2 and Llama alike, by configuration.

Sources: Radford et al. (GPT-2, 2019); Xiong et al. (pre-norm, 2020); Su et al. (RoPE, 2021); Zhang & Sennrich
(RMSNorm, 2019); Shazeer (SwiGLU, 2020); So et al. (squared ReLU, 2021); Touvron et al. (Llama, 2023).

>>> model = GPT(GPTConfig.preset("nano", vocab_size=65))
>>> model(torch.zeros(2, 10, dtype=torch.int64)).shape
torch.Size([2, 10, 65])
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import checkpoint
from shared.models.attention import CausalSelfAttention, causal_mask
from shared.models.layers import Linear, RMSNorm
from shared.registry import LanguageModel, register_model
from shared.sampling.generate import generate


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 124M's; `GPTConfig.preset` has the named ones."""

    vocab_size: int = 50257
    block_size: int = 1024
    """Longest sequence, in tokens."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int | None = None
    """Key/value heads (grouped-query attention); None means n_head."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10000.0
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu_tanh"
    mlp_hidden: int | None = None
    """Width inside the MLP; None means 4 n_embd, or for swiglu 8/3 n_embd rounded up to a multiple of 64."""
    bias: bool = True
    """Biases in the linear layers and in LayerNorm."""
    tie_weights: bool = True
    """The token embedding doubles as the output layer."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head, before the rotation."""
    window: int | None = None
    """Sliding-window attention: how many positions back one sees, itself included."""
    dropout: float = 0.0
    zero_init: bool = False
    """Start each block as the identity: the two projections back into the residual stream begin at zero."""

    def __post_init__(self) -> None:
        problems = []
        for name in (
            "vocab_size",
            "block_size",
            "n_layer",
            "n_head",
            "n_embd",
            "n_kv_head",
            "mlp_hidden",
            "window",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}={value}: must be at least 1")
        for name, allowed in (
            ("norm", ("layernorm", "rmsnorm")),
            ("position", ("learned", "rope")),
            ("mlp", ("gelu", "gelu_tanh", "relu2", "swiglu")),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if not problems and self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if not problems and self.n_head % self.kv_heads:
            problems.append(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if not problems and self.position == "rope" and self.head_dim % 2:
            problems.append(f"rope needs an even head size, not n_embd/n_head = {self.head_dim}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout}: must be from 0 up to, not including, 1")
        if problems:
            raise ValueError("GPTConfig: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        if self.mlp_hidden:
            return self.mlp_hidden
        return 64 * math.ceil(self.n_embd * 8 / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """A named configuration, with `changes` applied. Raises ValueError for a name that doesn't exist."""
        if name not in PRESETS:
            raise ValueError(f"no GPT preset {name!r}; there are: {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)


MODERN = dict(
    norm="rmsnorm", position="rope", mlp="swiglu", bias=False, tie_weights=False, qk_norm=True, zero_init=True
)
PRESETS = {
    "nano": GPTConfig(
        vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False
    ),  # nanoGPT's CPU sizes
    "mini": GPTConfig(vocab_size=65, block_size=128, n_layer=5, n_head=4, n_embd=128, **MODERN),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "gpt-1b": GPTConfig(
        n_layer=24,
        n_head=12,
        n_embd=1536,
        mlp_hidden=6144,
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
        tie_weights=False,
    ),
}


class Rotary(nn.Module):
    """Rotary position embedding: turns pairs of channels (i, i + head_dim/2) by position ·
    theta^(-2i/head_dim), the layout of Hugging Face's Llama. The score of two positions then depends only on
    their distance.
    """

    def __init__(self, head_dim: int, block_size: int, theta: float):
        super().__init__()
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # [head_dim / 2]
        angle = torch.outer(
            torch.arange(block_size, dtype=torch.float32), frequency
        )  # [block_size, head_dim / 2]
        # Derived, so not saved. Both halves of a head turn by the same angles; the sign of the sine belongs
        # to rotate-half.
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], dim=-1), persistent=False)

    def at(self, positions: Tensor | slice) -> Callable[[Tensor], Tensor]:
        """The rotation for tokens at `positions` ([time] or [batch, time]), as a function of [batch, head,
        time, head_dim].
        """
        cos, sin, half = self.cos[positions], self.sin[positions], self.cos.size(-1) // 2
        if cos.dim() == 3:  # positions differ by row: [batch, time, head_dim] -> [batch, 1, time, head_dim]
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

        def rotate(x: Tensor) -> Tensor:
            # The rotation is done in the tables' fp32 and handed back in the input's type.
            y = torch.addcmul(x * cos, x.roll(half, dims=-1), sin)
            return y if y.dtype == x.dtype else y.to(x.dtype)

        return rotate


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)². Written as a product: on a CPU the backward of `square` takes three times as long."""
    x = F.relu(x)
    return x * x


class MLP(nn.Module):
    """The position-wise network of a block: up, an activation (gated for swiglu), down."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.gate_proj = (
            Linear(config.n_embd, config.hidden, bias=config.bias) if config.mlp == "swiglu" else None
        )
        self.down_proj = Linear(config.hidden, config.n_embd, bias=config.bias)
        self.activation: Callable[[Tensor], Tensor] = {
            "gelu": F.gelu,
            "gelu_tanh": partial(F.gelu, approximate="tanh"),
            "relu2": relu2,
            "swiglu": F.silu,
        }[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj
        return self.down_proj(
            self.activation(self.up_proj(x)) if gate is None else self.activation(gate(x)) * self.up_proj(x)
        )


def make_norm(config: GPTConfig) -> Callable[[int], nn.Module]:
    """The configuration's norm, as a constructor that takes the size."""
    if config.norm == "rmsnorm":
        return partial(RMSNorm, eps=config.norm_eps)
    return partial(nn.LayerNorm, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the stream itself is never normed (pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        norm = make_norm(config)
        self.attn_norm = norm(config.n_embd)
        self.attn = CausalSelfAttention(
            config.n_embd,
            config.n_head,
            config.n_kv_head,
            bias=config.bias,
            dropout=config.dropout,
            window=config.window,
            qk_norm=partial(RMSNorm, eps=config.norm_eps) if config.qk_norm else None,
        )
        self.mlp_norm = norm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def forward(
        self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None, cache: "KVCache | None", layer: int
    ) -> Tensor:
        change = self.attn(self.attn_norm(x), rotate=rotate, cache=cache, layer=layer)
        x = x + (change if self.dropout is None else self.dropout(change))
        change = self.mlp(self.mlp_norm(x))
        return x + (change if self.dropout is None else self.dropout(change))


class KVCache:
    """Keys and values of the tokens a model has read, preallocated; it belongs to the caller, and a forward
    advances it once.

    >>> model = GPT(GPTConfig.preset("nano"))
    >>> cache = KVCache(model.config)
    >>> model(torch.tensor([[1, 2, 3]]), cache).shape, cache.length
    (torch.Size([1, 3, 65]), 3)
    >>> model(torch.tensor([[4]]), cache).shape, cache.length
    (torch.Size([1, 1, 65]), 4)
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
        self._layers = [
            (self.k[layer], self.v[layer]) for layer in range(config.n_layer)
        ]  # taken once: a step has time for little
        self.length = 0

    def positions(self, time: int) -> Tensor:
        """Where the next `time` tokens stand: int64 [time]. Raises ValueError when they do not fit."""
        if self.length + time > self.max_length:
            raise ValueError(
                f"the cache holds {self.length} of {self.max_length} tokens and {time} more do not fit: "
                "start a new cache from the last part of the text"
            )
        return torch.arange(self.length, self.length + time, device=self.k.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [batch, n_kv_head, time, head_dim] for `layer`, and returns that layer's keys and values so
        far.
        """
        end = self.length + k.size(2)
        past_k, past_v = self._layers[layer]
        past_k.narrow(2, self.length, k.size(2)).copy_(k)  # `narrow` takes half the time of slicing
        past_v.narrow(2, self.length, k.size(2)).copy_(v)
        return past_k.narrow(2, 0, end), past_v.narrow(2, 0, end)

    def mask(self, time: int, window: int | None) -> Tensor | None:
        """bool [time, length + time], or None when the one new token sees all there is."""
        if time == 1 and (window is None or self.length < window):
            return None
        return causal_mask(time, past=self.length, window=window, device=self.k.device)

    def advance(self, time: int) -> None:
        self.length += time


@register_model(GPTConfig)
class GPT(LanguageModel):
    """The model: int64 [batch, time] -> logits [batch, time, vocab_size]. Losses, sampling and adapters live
    outside.

    `tokenizer` is None until what loads the model (`from_checkpoint`, for one) sets it.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokenizer: Any = None
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.rotary = Rotary(config.head_dim, config.block_size, config.rope_theta)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)(config.n_embd)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The one place where parameters get their first values.

        | parameter | value |
        | --- | --- |
        | embeddings, linear weights, lm_head | N(0, 0.02²) |
        | o_proj and down_proj | N(0, (0.02 / √(2 n_layer))²), so that the stream's variance does not grow with depth |
        | o_proj and down_proj with zero_init | 0: each block starts as the identity |
        | biases | 0 |
        | norms | weight 1, bias 0 |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 0.02
                if name.endswith(("o_proj", "down_proj")):
                    std = 0.0 if self.config.zero_init else 0.02 / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """int64 [batch, time] -> float [batch, time, vocab_size]: position t scores the token that comes
        after it.

        With a cache, `idx` is what follows the tokens already in it. Raises ValueError when the sequence is
        longer than block_size.
        """
        time = idx.size(1)
        if cache is not None:
            positions = cache.positions(time)
        elif time > self.config.block_size:
            raise ValueError(
                f"{time} tokens do not fit in block_size={self.config.block_size}: pass the last"
                f" {self.config.block_size}"
            )
        else:
            positions = slice(0, time)
        x = self.token_embedding(idx)  # [batch, time, n_embd]
        rotate = None
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[positions]
        else:
            rotate = self.rotary.at(positions)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotate, cache, layer)
        if cache is not None:
            cache.advance(time)
        return self.lm_head(self.norm(x))  # [batch, time, vocab_size]

    def new_cache(self, batch_size: int = 1, max_length: int | None = None) -> KVCache:
        """An empty cache on the model's device and in its type."""
        weight = self.norm.weight  # the embedding may be packed (quantization)
        return KVCache(self.config, batch_size, max_length, weight.device, weight.dtype)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, device: torch.device | str = "cpu") -> "GPT":
        """The model in a checkpoint's folder, its tokenizer under `tokenizer`. Raises ValueError when that is
        not a GPT.
        """
        loaded = checkpoint.load(folder, device=device)
        if not isinstance(loaded.model, cls):
            raise ValueError(f"{folder} holds a {type(loaded.model).__name__}, not a GPT")
        loaded.model.tokenizer = loaded.tokenizer
        return loaded.model

    def generate(self, prompt: str, max_new_tokens: int = 200, **sampling: Any) -> str:
        """`prompt` and what the model makes of it; `sampling` as in `shared.sampling.generate`, with a text
        or several for `stop`.
        """
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: load it with GPT.from_checkpoint, or set model.tokenizer"
            )
        stop = sampling.get("stop", ())
        sampling["stop"] = [self.tokenizer.encode(s) for s in ([stop] if isinstance(stop, str) else stop)]
        ids = self.tokenizer.encode(prompt)
        return prompt + self.tokenizer.decode(list(generate(self, ids, max_new_tokens, **sampling)))

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters, a tied one counted once; without `embeddings`, the position table's are left
        out as nanoGPT does.
        """
        total = sum(p.numel() for p in self.parameters())
        if not embeddings and self.config.position == "learned":
            total -= self.position_embedding.weight.numel()
        return total

    def flops_per_token(self, time: int) -> int:
        """Floating-point operations that training needs for each token of sequences of `time`: 6 for each
        weight of a linear layer (2 forward, 4 backward), and 12 · n_layer · n_embd · time for the scores
        (Chowdhery et al., PaLM, 2022, appendix B).
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * time
