"""Week 4. The settings of a GPT: its sizes, and what sets GPT-2, Llama and their relatives apart.

>>> config = GPTConfig.preset("mini", layers=(LayerKind(window=8), LayerKind(window=8), LayerKind()))
>>> [config.kind_of(layer).window for layer in range(config.n_layer)]
[8, 8, None, 8, 8]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from shared.checks import Checks


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is slowed down, so that a model reads texts longer than those that it first learned from.

    Sources: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation"
    (linear, 2023); Peng et al., "YaRN" (dynamic and yarn, 2023); Grattafiori et al., "The Llama 3 Herd of
    Models" (2024), with the reference in transformers.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    """linear: all angles / factor. dynamic: theta grows with the text, beyond `original_length`; what a cache
    holds keeps the angles that it was turned by, as in transformers. llama3 and yarn: fast channels turn as
    before, slow ones by 1 / factor, those in between by something in between.
    """
    factor: float
    original_length: int | None = None
    """Longest text of the first training, in tokens; linear needs none."""
    low_freq_factor: float = 1.0
    """llama3: channels with fewer turns than this in `original_length` are slow."""
    high_freq_factor: float = 4.0
    """llama3: channels with more turns than this are fast."""
    beta_slow: float = 1.0
    """yarn: as low_freq_factor."""
    beta_fast: float = 32.0
    """yarn: as high_freq_factor."""
    attention_factor: float | None = None
    """yarn: what queries and keys are multiplied by; None means 0.1 ln(factor) + 1."""
    truncate: bool = True
    """yarn: the border between fast and slow is moved outwards to whole channels."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.one_of("kind", ("linear", "dynamic", "llama3", "yarn"))
        checks.above(0, "factor", "low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast")
        checks.at_least(1, "original_length")
        needed = self.kind == "linear" or self.original_length is not None
        checks.require(needed, f"RopeScaling of kind {self.kind} needs an original_length")
        ordered = self.low_freq_factor < self.high_freq_factor and self.beta_slow < self.beta_fast
        checks.require(ordered, "low_freq_factor and beta_slow must be below high_freq_factor and beta_fast")
        checks.finish()


@dataclass(frozen=True)
class LayerKind:
    """What a layer attends to, where not all are alike."""

    window: int | None = None
    """How many positions each one sees, itself included; None means all."""
    rope: bool = True
    """False: queries and keys are not turned by their positions (NoPE, Kazemnejad et al., 2023)."""
    rope_theta: float | None = None
    """Of a RoPE of this kind's own, without scaling; None means the model's."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "window")
        checks.above(0, "rope_theta")
        checks.finish()


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
    head_size: int | None = None
    """Channels of one head; None means n_embd / n_head."""

    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plus_one"] = "layernorm"
    """rmsnorm_plus_one multiplies by 1 + weight (Gemma)."""
    norm_eps: float = 1e-5
    norm_place: Literal["before", "after", "both"] = "before"
    """before: x + f(norm(x)). after: x + norm(f(x)) (OLMo 2). both: x + norm(f(norm(x))) (Gemma)."""
    qk_norm: bool = False
    """RMSNorm on queries and keys before the rotation."""
    qk_norm_over: Literal["head", "width"] = "head"
    """Whether it norms each head by itself (Qwen3), or all heads together (OLMo 2)."""

    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10000.0
    rope_share: float = 1.0
    """The share of a head's channels that RoPE turns, the first of them (Phi)."""
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    """Sliding-window attention: how many positions each one sees, itself included; None means all."""
    layers: tuple[LayerKind, ...] = ()
    """What the layers attend to, repeated as often as needed; () means all alike, with `window`."""

    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu"] = "gelu_tanh"
    """swiglu and geglu have a gate: SiLU's, or that of GELU by its tanh formula."""
    mlp_hidden: int | None = None
    """Width inside the MLP; None means 4 n_embd, or with a gate 8/3 n_embd rounded up to a multiple of 64."""
    bias: bool = True
    """Biases in the linear layers and in LayerNorm."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values (Qwen2 has no others); None means `bias`."""
    tie_weights: bool = True
    """The token embedding is also the output layer's weight."""
    dropout: float = 0.0
    zero_init: bool = False
    """Start each block as the identity: the two projections back into the residual stream begin at zero."""

    embedding_scale: float = 1.0
    """What token embeddings are multiplied by (Gemma: √n_embd)."""
    attention_scale: float | None = None
    """What queries · keys are multiplied by; None means 1 / √head_dim."""
    attention_softcap: float | None = None
    """Attention scores become cap · tanh(score / cap) (Gemma 2)."""
    logit_softcap: float | None = None
    """The same for the logits."""

    def __post_init__(self) -> None:
        self._from_json()
        checks = Checks(self)
        checks.at_least(1, "vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        checks.at_least(1, "n_kv_head", "head_size", "mlp_hidden", "window")
        for name in ("norm", "norm_place", "qk_norm_over", "position", "mlp"):
            checks.one_of(name, CHOICES[name])
        checks.above(0, "norm_eps", "rope_theta", "rope_share", "embedding_scale")
        checks.above(0, "attention_scale", "attention_softcap", "logit_softcap")
        if not checks.problems:  # sizes below 1 divide nothing
            self._check_heads(checks)
            self._check_layers(checks)
        checks.below(1, "dropout")
        checks.finish()

    def _from_json(self) -> None:
        """Puts dataclasses in the place of what JSON has for them."""
        scaling: Any = self.rope_scaling
        if isinstance(scaling, dict):
            object.__setattr__(self, "rope_scaling", RopeScaling(**scaling))
        given: Sequence[Any] = self.layers
        kinds = tuple(LayerKind(**kind) if isinstance(kind, dict) else kind for kind in given)
        object.__setattr__(self, "layers", kinds)

    def _check_heads(self, checks: Checks) -> None:
        """Whether the heads divide the width, the key/value heads the heads, and pairs of channels a head."""
        heads_fit = self.head_size is not None or self.n_embd % self.n_head == 0
        groups_fit = self.n_head % self.kv_heads == 0
        checks.require(heads_fit, f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        checks.require(groups_fit, f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}")
        if heads_fit and self.position == "rope":
            size = "head_size" if self.head_size is not None else "n_embd/n_head"
            checks.require(
                self.head_dim % 2 == 0, f"rope needs an even head size, not {size} = {self.head_dim}"
            )
            pairs_fit = self.rope_share <= 1 and self.rope_dim >= 2 and self.rope_dim % 2 == 0
            checks.require(
                pairs_fit,
                f"rope_share={self.rope_share} of {self.head_dim} channels: must be an even number of them",
            )

    def _check_layers(self, checks: Checks) -> None:
        """Whether what is said of the layers agrees with the rest."""
        checks.require(
            not (self.layers and self.window is not None),
            f"window={self.window} beside layers: give the window of each kind in layers",
        )
        if self.position == "learned":
            turned = self.rope_scaling or any(kind.rope_theta or not kind.rope for kind in self.layers)
            checks.require(not turned, "rope_scaling, and rope of a kind of layers, need position='rope'")

    def kind_of(self, layer: int) -> LayerKind:
        """What this layer attends to."""
        if not self.layers:
            return LayerKind(window=self.window)
        return self.layers[layer % len(self.layers)]

    @property
    def head_dim(self) -> int:
        """Channels of one head: `head_size` with its default filled in."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def rope_dim(self) -> int:
        """The channels of a head that RoPE turns."""
        return int(self.head_dim * self.rope_share)

    @property
    def kv_heads(self) -> int:
        """Key/value heads: `n_kv_head` with its default filled in."""
        return self.n_kv_head or self.n_head

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def hidden(self) -> int:
        """Width inside the MLP: `mlp_hidden` with its default filled in."""
        if self.mlp_hidden:
            return self.mlp_hidden
        if self.gated:
            return 64 * math.ceil(self.n_embd * 8 / 3 / 64)
        return 4 * self.n_embd

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """A named configuration, with `changes` applied. Raises ValueError for a name that doesn't exist."""
        if name not in PRESETS:
            raise ValueError(f"no GPT preset {name!r}; there are: {', '.join(PRESETS)}")
        return replace(PRESETS[name], **changes)


CHOICES: dict[str, tuple[str, ...]] = {
    field.name: get_args(field.type) for field in fields(GPTConfig) if get_origin(field.type) is Literal
}
"""The values that a setting may have, by its name."""
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
