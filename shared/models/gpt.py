"""Week 4. One decoder-only transformer, GPT-2 and Llama alike, by configuration.

Sources: Radford et al. (GPT-2, 2019); Xiong et al. (pre-norm, 2020); Su et al. (RoPE, 2021); Zhang & Sennrich
(RMSNorm, 2019); Shazeer (SwiGLU, 2020); So et al. (squared ReLU, 2021); Touvron et al. (Llama, 2023).

>>> model = GPT(GPTConfig.preset("nano", vocab_size=65))
>>> model(torch.zeros(2, 10, dtype=torch.int64)).shape
torch.Size([2, 10, 65])
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import checkpoint
from shared.checks import Checks
from shared.models.attention import Cache, CausalSelfAttention, Rotation, causal_mask
from shared.models.layers import Linear, RMSNorm
from shared.registry import LanguageModel, register_model
from shared.sampling.generate import generate
from shared.sampling.text import stream_text
from shared.tokenizers.base import Tokenizer


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
    """The token embedding is also the output layer's weight."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head, before the rotation."""
    window: int | None = None
    """Sliding-window attention: how many positions each one sees, itself included; None means all."""
    dropout: float = 0.0
    zero_init: bool = False
    """Start each block as the identity: the two projections back into the residual stream begin at zero."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        checks.at_least(1, "n_kv_head", "mlp_hidden", "window")
        checks.one_of("norm", ("layernorm", "rmsnorm"))
        checks.one_of("position", ("learned", "rope"))
        checks.one_of("mlp", ("gelu", "gelu_tanh", "relu2", "swiglu"))
        if not checks.problems:  # sizes below 1 divide nothing
            self._check_heads(checks)
        checks.below(1, "dropout")
        checks.finish()

    def _check_heads(self, checks: Checks) -> None:
        """Whether the heads divide the width, the key/value heads the heads, and pairs of channels a head."""
        heads_fit = self.n_embd % self.n_head == 0
        groups_fit = self.n_head % self.kv_heads == 0
        pairs_fit = self.position != "rope" or self.head_dim % 2 == 0
        checks.require(heads_fit, f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        checks.require(groups_fit, f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if heads_fit:
            checks.require(pairs_fit, f"rope needs an even head size, not n_embd/n_head = {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key/value heads: `n_kv_head` with its default filled in."""
        return self.n_kv_head or self.n_head

    @property
    def hidden(self) -> int:
        """Width inside the MLP: `mlp_hidden` with its default filled in."""
        if self.mlp_hidden:
            return self.mlp_hidden
        if self.mlp == "swiglu":
            return 64 * math.ceil(self.n_embd * 8 / 3 / 64)
        return 4 * self.n_embd

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """A named configuration, with `changes` applied. Raises ValueError for a name that doesn't exist."""
        if name not in PRESETS:
            raise ValueError(f"no GPT preset {name!r}; there are: {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)


LLAMA: dict[str, Any] = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, tie_weights=False)
"""What makes a Llama of a GPT-2."""
MODERN: dict[str, Any] = LLAMA | dict(qk_norm=True, zero_init=True)
"""A Llama that also trains well when it is small."""
PRESETS = {
    # nanoGPT's sizes for a CPU
    "nano": GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False),
    "mini": GPTConfig(vocab_size=65, block_size=128, n_layer=5, n_head=4, n_embd=128, **MODERN),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "gpt-1b": GPTConfig(n_layer=24, n_head=12, n_embd=1536, mlp_hidden=6144, **LLAMA),
}


class Rotary(nn.Module):
    """Rotary position embedding, in the layout of Hugging Face's Llama.

    Turns each pair of channels (i, i + head_dim/2) by the angle position · theta^(-2i/head_dim). The score of
    two positions then depends only on their distance.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, block_size: int, theta: float):
        super().__init__()
        cos, sin = self._tables(head_dim, block_size, theta)
        # The tables follow from the configuration, so checkpoints do not keep them.
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @staticmethod
    def _tables(head_dim: int, block_size: int, theta: float) -> tuple[Tensor, Tensor]:
        """The cosines and sines of all angles, fp32 [block_size, head_dim] each."""
        if torch.get_default_device().type == "meta":  # no values (see registry.without_memory)
            return torch.empty(block_size, head_dim), torch.empty(block_size, head_dim)
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # [head_dim / 2]
        position = torch.arange(block_size, dtype=torch.float32)
        angle = torch.outer(position, frequency)  # [block_size, head_dim / 2]
        # Both halves of a head turn by the same angles; the minus of rotate-half is in the sine's table.
        cos = torch.cat([angle.cos(), angle.cos()], dim=-1)
        return cos, torch.cat([-angle.sin(), angle.sin()], dim=-1)

    def at(self, positions: Tensor | slice) -> Rotation:
        """The rotation for tokens at `positions` ([time] or [batch, time]): a function of [batch, head, time,
        head_dim].
        """
        cos = self.cos[positions]
        sin = self.sin[positions]
        half = cos.size(-1) // 2
        if cos.dim() == 3:  # positions differ by row: [batch, time, head_dim] -> [batch, 1, time, head_dim]
            cos = cos.unsqueeze(1)
            sin = sin.unsqueeze(1)

        def rotate(x: Tensor) -> Tensor:
            y = torch.addcmul(x * cos, x.roll(half, dims=-1), sin)
            return y if y.dtype == x.dtype else y.to(x.dtype)  # the tables are fp32, whatever x is

        return rotate


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)². Written as a product: on a CPU the backward of `square` takes three times as long."""
    x = F.relu(x)
    return x * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
    "swiglu": F.silu,
}
"""By `GPTConfig.mlp`. SwiGLU is SiLU with a gate."""


class MLP(nn.Module):
    """The position-wise network of a block: up, an activation (gated for swiglu), down."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.up_proj = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.gate_proj: Linear | None = None
        if config.mlp == "swiglu":
            self.gate_proj = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.down_proj = Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, n_embd] -> [batch, time, n_embd]."""
        if self.gate_proj is None:
            hidden = self.activation(self.up_proj(x))
        else:
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden)


def make_norm(config: GPTConfig) -> nn.LayerNorm | RMSNorm:
    """A norm over the model's width."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def make_dropout(config: GPTConfig) -> nn.Module:
    """Dropout, or nothing where it is 0."""
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm, the residual stream itself is never normed."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = CausalSelfAttention(
            config.n_embd,
            config.n_head,
            config.n_kv_head,
            bias=config.bias,
            dropout=config.dropout,
            window=config.window,
            qk_norm=partial(RMSNorm, eps=config.norm_eps) if config.qk_norm else None,
        )
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = make_dropout(config)

    def forward(self, x: Tensor, rotate: Rotation | None, cache: Cache | None, layer: int) -> Tensor:
        """[batch, time, n_embd] -> [batch, time, n_embd]. layer: the block's number, for the cache."""
        x = x + self.dropout(self.attn(self.attn_norm(x), rotate=rotate, cache=cache, layer=layer))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class KVCache:
    """Keys and values of the tokens that a model has read. It is preallocated and belongs to the caller; a
    forward pass advances it once.

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


@register_model(GPTConfig)
class GPT(LanguageModel):
    """The model: int64 [batch, time] -> logits [batch, time, vocab_size].

    Losses, sampling and adapters live outside. `tokenizer` is None until what loads the model
    (`from_checkpoint`, for one) sets it.
    """

    config: GPTConfig
    cache_type: type[KVCache] = KVCache
    """What `new_cache` makes."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        else:
            self.rotary = Rotary(config.head_dim, config.block_size, config.rope_theta)
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
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
        | o_proj and down_proj, which write into the residual stream | N(0, (0.02 / √(2 n_layer))²) |
        | the same with zero_init | 0: each block starts as the identity |
        | biases | 0 |
        | norms | weight 1, bias 0 |

        √(2 n_layer) keeps the variance of the residual stream from growing with depth (GPT-2).
        """
        std_into_stream = 0.02 / math.sqrt(2 * self.config.n_layer)
        if self.config.zero_init:
            std_into_stream = 0.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_stream = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std_into_stream if into_stream else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()

    def forward(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """int64 [batch, time] -> float [batch, time, vocab_size]: position t scores the token that comes
        after it.

        With a cache, `idx` is what follows the tokens already in it. Raises ValueError when the sequence is
        longer than block_size.
        """
        positions = self._positions(idx.size(1), cache)
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
            cache.advance(idx.size(1))
        return self.lm_head(self.norm(x))  # [batch, time, vocab_size]

    def _positions(self, time: int, cache: Cache | None) -> Tensor | slice:
        if cache is not None:
            return cache.positions(time)
        block_size = self.config.block_size
        if time > block_size:
            raise ValueError(
                f"{time} tokens do not fit in block_size={block_size}: pass the last {block_size}"
            )
        return slice(0, time)

    def new_cache(self, batch_size: int = 1, max_length: int | None = None) -> KVCache:
        """An empty cache on the model's device and in its type."""
        weight = self.norm.weight  # a quantized embedding has no weight tensor of its own
        return self.cache_type(self.config, batch_size, max_length, weight.device, weight.dtype)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, device: torch.device | str = "cpu") -> "GPT":
        """The model in a checkpoint's folder, in eval mode, with its tokenizer under `tokenizer`.

        Raises ValueError where `checkpoint.load` does, and for a model that is not a GPT.
        """
        loaded = checkpoint.load(folder, device=device)
        if not isinstance(loaded.model, cls):
            raise ValueError(f"{folder} holds a {type(loaded.model).__name__}, not a GPT")
        loaded.model.tokenizer = loaded.tokenizer
        return loaded.model

    def generate(self, prompt: str, max_new_tokens: int = 200, **sampling: Any) -> str:
        """`prompt` and the text that the model adds to it.

        sampling: as in `shared.sampling.generate`, but `stop` is a text or several, which may begin and end
        inside of tokens. Raises ValueError without a tokenizer.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: load it with GPT.from_checkpoint, or set model.tokenizer"
            )
        stop = sampling.pop("stop", ())
        stops = [stop] if isinstance(stop, str) else stop
        with closing(generate(self, tokenizer.prompt(prompt), max_new_tokens, **sampling)) as ids:
            return prompt + "".join(stream_text(tokenizer, ids, stops))

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters, a tied one counted once.

        Without `embeddings` the position embedding is left out, as nanoGPT counts.
        """
        total = sum(p.numel() for p in self.parameters())
        if not embeddings and self.config.position == "learned":
            total -= self.position_embedding.weight.numel()
        return total

    def flops_per_token(self, time: int) -> int:
        """Floating-point operations that training needs for each token of sequences of `time` tokens.

        6 for each weight of a linear layer (2 forward, 4 backward), and 12 · n_layer · n_embd · time for the
        attention scores and the means they weight (Chowdhery et al., PaLM, 2022, appendix B).
        """
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * time
