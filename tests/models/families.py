"""Tiny random models of today's families, as transformers makes them: what the tests of the families compare
with.
"""

from collections.abc import Callable

import torch
import transformers
from torch import nn

from tests.helpers import shake

VOCAB, BLOCK = 96, 64
SIZES = dict(
    vocab_size=VOCAB,
    max_position_embeddings=BLOCK,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_size=64,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
THETA = dict(rope_theta=500.0)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)


def made(name: str, **changes: object) -> Callable[[], nn.Module]:
    """How to make a model of this family with these settings."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**SIZES | changes)
        family = name.removesuffix("Text")
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return make


def rope(**scaling: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": "default", **THETA, **scaling}}


def gpt2() -> nn.Module:
    sizes = dict(vocab_size=VOCAB, n_positions=BLOCK, n_layer=3, n_head=4, n_embd=64)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    )


GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, **THETA},
}
DYNAMIC = made("Llama", **rope(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 24})
"""Reads up to 48 tokens; its keys in a cache keep their angles, so it stands outside of `FAMILIES`."""
FAMILIES = {
    "GPT-2": gpt2,
    "Llama 3, with its scaling": made("Llama", **rope(**LLAMA3), tie_word_embeddings=True),
    "Llama, linear scaling": made("Llama", **rope(rope_type="linear", factor=2.0)),
    "Llama, YaRN": made("Llama", **rope(**YARN)),
    "Llama, YaRN set by hand": made(
        "Llama", **rope(**YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3, truncate=False)
    ),
    "Llama with heads of a size of their own": made("Llama", head_dim=8, **rope()),
    "Mistral, with a window": made("Mistral", sliding_window=9, head_dim=32, **rope()),
    "Mistral without one": made("Mistral", sliding_window=None, **rope()),
    "Qwen2": made("Qwen2", **rope()),
    "Qwen2, a window above": made(
        "Qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1, **rope()
    ),
    "Qwen3, heads of a size of their own": made("Qwen3", head_dim=32, **rope()),
    "SmolLM3": made("SmolLM3", no_rope_layer_interval=2, **rope()),
    "SmolLM3, with a window": made(
        "SmolLM3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=9, **rope()
    ),
    "OLMo 2": made("Olmo2", **rope()),
    "Phi-3": made("Phi3", **rope()),
    "Phi-4 mini, a part of RoPE": made("Phi3", **rope(partial_rotary_factor=0.5), sliding_window=9),
    "Gemma 2": made("Gemma2", head_dim=32, query_pre_attn_scalar=24, sliding_window=9, **rope()),
    "Gemma 3": made(
        "Gemma3Text",
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=9,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters=GEMMA3_ROPE,
    ),
}
"""By name: how to make it."""


def build(name: str) -> nn.Module:
    """The model, with weights that are no first values, in eval mode."""
    return as_trained(FAMILIES[name])


def as_trained(make: Callable[[], nn.Module]) -> nn.Module:
    """The same for a model that is not in `FAMILIES`."""
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation("eager")  # the only one that has Gemma 2's soft cap
    return shake(model).eval()


def ids(rows: int = 2, time: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, time), generator=torch.Generator().manual_seed(seed))
