"""Our configurations of today's families, small: what the tests of all that is done with a model share."""

from shared.models.config import GPTConfig, LayerKind, RopeScaling
from tests.export.helpers import LLAMA, SMALL

GEMMA = SMALL | LLAMA | dict(norm="rmsnorm_plus_one", norm_place="both", mlp="geglu", embedding_scale=8.0)
LOCAL = LayerKind(window=9, rope_theta=10000.0)
FAMILIES = {
    "GPT-2": GPTConfig(**SMALL),
    "Llama 3": GPTConfig(
        **SMALL, **LLAMA, n_kv_head=2, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192)
    ),
    "Llama, linear scaling": GPTConfig(**SMALL, **LLAMA, rope_scaling=RopeScaling("linear", 3.0)),
    "Llama, YaRN": GPTConfig(**SMALL, **LLAMA, rope_scaling=RopeScaling("yarn", 4.0, 32)),
    "Llama, heads of their own size": GPTConfig(**SMALL, **LLAMA, head_size=32),
    "Qwen2": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, qkv_bias=True),
    "Qwen3": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, qk_norm=True, head_size=32, rope_theta=1e6),
    "SmolLM3": GPTConfig(
        **SMALL | LLAMA | dict(n_layer=4), layers=(*[LayerKind()] * 3, LayerKind(rope=False))
    ),
    "OLMo 2": GPTConfig(
        **SMALL, **LLAMA, tie_weights=False, norm_place="after", qk_norm=True, qk_norm_over="width"
    ),
    "Phi-4 mini": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, rope_share=0.5, window=100, tie_weights=False),
    "Gemma 2": GPTConfig(
        **GEMMA,
        head_size=32,
        attention_softcap=5.0,
        logit_softcap=3.0,
        layers=(LayerKind(window=9), LayerKind()),
    ),
    "Gemma 3": GPTConfig(
        **GEMMA | dict(n_layer=6),
        head_size=32,
        qk_norm=True,
        rope_theta=1e6,
        layers=(*[LOCAL] * 5, LayerKind()),
    ),
}
"""By name. All are exact in GGUF."""
MISTRAL = GPTConfig(**SMALL, **LLAMA, n_kv_head=2, window=9, tie_weights=False)
"""llama.cpp has no window for it."""
DYNAMIC = GPTConfig(**SMALL, **LLAMA, rope_scaling=RopeScaling("dynamic", 4.0, 32))
"""It has no equivalent in GGUF."""
