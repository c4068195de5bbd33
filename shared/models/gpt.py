"""Week 4. One decoder-only transformer: GPT-2, Llama and their relatives, by configuration.

Sources: Radford et al. (GPT-2, 2019); Xiong et al. (pre-norm, 2020); Zhang & Sennrich (RMSNorm, 2019);
Shazeer (SwiGLU and GEGLU, 2020); So et al. (squared ReLU, 2021); Touvron et al. (Llama, 2023); Gemma Team
(norms on both sides, soft caps, 2024); Team OLMo (norms after, 2024).

>>> model = GPT(GPTConfig.preset("nano", vocab_size=65))
>>> model(torch.zeros(2, 10, dtype=torch.int64)).shape
torch.Size([2, 10, 65])
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import checkpoint
from shared.models.attention import Cache, CausalSelfAttention, Rotation
from shared.models.cache import KVCache
from shared.models.config import GPTConfig
from shared.models.layers import Linear, RMSNorm, RMSNormPlusOne
from shared.models.rotary import Rotary
from shared.registry import register_model
from shared.sampling.text_model import TextModel


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)². Written as a product: on a CPU the backward of `square` takes three times as long."""
    x = F.relu(x)
    return x * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
    "swiglu": F.silu,
    "geglu": partial(F.gelu, approximate="tanh"),
}
"""By `GPTConfig.mlp`. SwiGLU is SiLU with a gate, GEGLU is GELU with one."""


class MLP(nn.Module):
    """The position-wise network of a block: up, an activation (of a gate, for swiglu and geglu), down."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.up_proj = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.gate_proj: Linear | None = None
        if config.gated:
            self.gate_proj = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.down_proj = Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, n_embd] -> [batch, time, n_embd]."""
        if self.gate_proj is None:
            hidden = self.activation(self.up_proj(x))
        else:
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden)


NORMS = {"rmsnorm": RMSNorm, "rmsnorm_plus_one": RMSNormPlusOne}
"""By `GPTConfig.norm`. Queries and keys have the first where the model has LayerNorm."""


def make_norm(config: GPTConfig) -> nn.LayerNorm | nn.RMSNorm:
    """A norm over the model's width."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return NORMS[config.norm](config.n_embd, eps=config.norm_eps)


def make_dropout(config: GPTConfig) -> nn.Module:
    """Dropout, or nothing where it is 0."""
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): pre-norm, the residual stream itself is never normed.

    `norm_place` may move the norms behind attention and MLP, or add such. layer: the block's number.
    """

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        norms_before, norms_after = config.norm_place != "after", config.norm_place != "before"
        self.attn_norm = make_norm(config) if norms_before else None
        self.attn = CausalSelfAttention(
            config.n_embd,
            config.n_head,
            config.n_kv_head,
            bias=config.bias,
            dropout=config.dropout,
            window=config.kind_of(layer).window,
            qk_norm=partial(NORMS.get(config.norm, RMSNorm), eps=config.norm_eps) if config.qk_norm else None,
            norm_over=config.qk_norm_over,
            head_dim=config.head_size,
            qkv_bias=config.qkv_bias,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )
        self.attn_post_norm = make_norm(config) if norms_after else None
        self.mlp_norm = make_norm(config) if norms_before else None
        self.mlp = MLP(config)
        self.mlp_post_norm = make_norm(config) if norms_after else None
        self.dropout = make_dropout(config)

    def forward(self, x: Tensor, rotate: Rotation | None, cache: Cache | None, layer: int) -> Tensor:
        """[batch, time, n_embd] -> [batch, time, n_embd]. layer: the block's number, for the cache."""
        attended = self.attn(normed(self.attn_norm, x), rotate=rotate, cache=cache, layer=layer)
        x = x + self.dropout(normed(self.attn_post_norm, attended))
        return x + self.dropout(normed(self.mlp_post_norm, self.mlp(normed(self.mlp_norm, x))))


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """norm(x), or x where there is no norm."""
    return x if norm is None else norm(x)


@register_model(GPTConfig)
class GPT(TextModel):
    """The model: int64 [batch, time] -> logits [batch, time, vocab_size].

    Losses, sampling and adapters live outside; `generate`, `stream` and `score` are a `TextModel`'s.
    """

    config: GPTConfig
    cache_type: type[KVCache] = KVCache
    """What `new_cache` makes."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.make_rotaries()
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight
        self.init_weights()

    def make_rotaries(self) -> None:
        """RoPE's tables, which follow from the configuration: the model's, and those that kinds of layers
        have of their own.
        """
        config = self.config
        kinds = [config.kind_of(layer) for layer in range(config.n_layer)]
        thetas = dict.fromkeys(kind.rope_theta for kind in kinds if kind.rope)
        if config.position == "learned":
            thetas = {}
        make = partial(Rotary, config.rope_dim, config.block_size)
        self.rotaries = nn.ModuleList(
            make(config.rope_theta, config.rope_scaling) if theta is None else make(theta) for theta in thetas
        )
        places = {theta: place for place, theta in enumerate(thetas)}
        # The last of the rotations in `forward` is none at all.
        self._rotation_of = [places.get(kind.rope_theta, -1) if kind.rope else -1 for kind in kinds]

    @torch.no_grad()
    def init_weights(self) -> None:
        """The one place where parameters get their first values.

        | parameter | value |
        | --- | --- |
        | embeddings, linear weights, lm_head | N(0, 0.02²) |
        | o_proj and down_proj, which write into the residual stream | N(0, (0.02 / √(2 n_layer))²) |
        | the same with zero_init | 0: each block starts as the identity |
        | biases | 0 |
        | norms | weight 1, bias 0; weight 0 for rmsnorm_plus_one |

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
        if self.config.embedding_scale != 1:
            # Made on the device: a copy from the CPU could not be part of a CUDA graph.
            x = x * torch.full((), self.config.embedding_scale, dtype=x.dtype, device=x.device)
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[positions]
        rotations = self._rotations(positions)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotations[self._rotation_of[layer]], cache, layer)
        if cache is not None:
            cache.advance(idx.size(1))
        logits = self.lm_head(self.norm(x))  # [batch, time, vocab_size]
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def _rotations(self, positions: Tensor | slice) -> list[Rotation | None]:
        """Of each of `rotaries`, and at last none."""
        rotations: list[Rotation | None] = []
        for rotary in self.rotaries:
            assert isinstance(rotary, Rotary)
            rotations.append(rotary.at(positions))
        return [*rotations, None]

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
    def from_checkpoint(cls, folder: str | Path, device: torch.device | str = "auto") -> "GPT":
        """The model in a checkpoint's folder, in eval mode, with its tokenizer under `tokenizer`.

        Raises ValueError where `checkpoint.load` does, and for a model that is not a GPT.
        """
        loaded = checkpoint.load(folder, device=device)
        if not isinstance(loaded.model, cls):
            raise ValueError(f"{folder} holds a {type(loaded.model).__name__}, not a GPT")
        return loaded.model

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

        6 for each weight of a linear layer (2 forward, 4 backward), and 12 · n_layer · width · time for the
        attention scores and the means they weight, width being that of all heads, usually n_embd (Chowdhery
        et al., PaLM, 2022, appendix B). A window counts as if it were none.
        """
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        weights = sum(linear.weight.numel() for linear in linears)
        width = self.config.n_head * self.config.head_dim
        return 6 * weights + 12 * self.config.n_layer * width * time
