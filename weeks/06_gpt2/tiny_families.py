"""Week 6's tiny members of today's families: configurations of the one class, so small that each is made and
written in a moment.
"""

from dataclasses import fields
from typing import Any

from shared.models.config import LLAMA, GPTConfig, LayerKind, RopeScaling

SIZES: dict[str, Any] = dict(vocab_size=64, block_size=32, n_layer=6, n_head=4, n_embd=32, n_kv_head=2)
GEMMA: dict[str, Any] = LLAMA | dict(
    norm="rmsnorm_plus_one",
    norm_place="both",
    mlp="geglu",
    head_size=16,
    embedding_scale=32**0.5,
    tie_weights=True,
)
LOCAL = LayerKind(window=8, rope_theta=10000.0)
TINY = {
    "Llama 2": GPTConfig(**SIZES, **LLAMA),
    "Llama 3": GPTConfig(
        **SIZES, **LLAMA, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, original_length=8192)
    ),
    "Mistral": GPTConfig(**SIZES, **LLAMA, window=8),
    "Qwen2": GPTConfig(**SIZES, **LLAMA, qkv_bias=True),
    "Qwen3": GPTConfig(**SIZES, **LLAMA, qk_norm=True, head_size=16),
    "SmolLM3": GPTConfig(**SIZES, **LLAMA, layers=(*[LayerKind()] * 3, LayerKind(rope=False))),
    "OLMo 2": GPTConfig(**SIZES, **LLAMA, norm_place="after", qk_norm=True, qk_norm_over="width"),
    "Phi-4 mini": GPTConfig(**SIZES, **LLAMA, rope_share=0.5),
    "Gemma 2": GPTConfig(
        **SIZES,
        **GEMMA,
        layers=(LayerKind(window=8), LayerKind()),
        attention_softcap=50.0,
        logit_softcap=30.0,
    ),
    "Gemma 3": GPTConfig(**SIZES, **GEMMA, qk_norm=True, rope_theta=1e6, layers=(*[LOCAL] * 5, LayerKind())),
}
"""By name. The settings are as in the released models, where their size has no say."""


def differences(config: GPTConfig, usual: GPTConfig) -> dict[str, Any]:
    """The fields in which a configuration differs from another, with its values."""
    given = {field.name: getattr(config, field.name) for field in fields(GPTConfig)}
    return {name: value for name, value in given.items() if value != getattr(usual, name)}


def in_short(value: Any) -> str:
    """A setting as a word: what layers attend to, one after the other, and what a scaling is called."""
    if isinstance(value, RopeScaling):
        return value.kind
    if isinstance(value, tuple):
        return " ".join(_kind(kind) for kind in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _kind(kind: LayerKind) -> str:
    word = "all" if kind.window is None else f"last-{kind.window}"
    return word if kind.rope else f"{word}-unturned"
