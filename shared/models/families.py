"""Week 6. The families of models that our GPT can be, and how their settings are written at Hugging Face.

Each block of the table below is a family: what its models share, and which of their settings are which of
ours. What our GPT cannot express is refused by name. GGUF's table is in `shared.models.gguf_families`.

>>> config, _ = config_from_hf(hf_config(GPTConfig.preset("gpt2"))[0], where="config.json")
>>> config == GPTConfig.preset("gpt2")
True

Sources: the configurations of transformers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shared.models.config import GPTConfig, LayerKind, RopeScaling
from shared.models.family import (
    Family,
    Part,
    Values,
    alike,
    always,
    exact_family,
    of_layers,
    only,
    optional,
    refuse,
    wrong_kinds,
)
from shared.models.formats import HF_GEMMA, HF_GPT2, HF_LLAMA, HF_OLMO2, HF_PHI3, HF_QWEN3, Layout

# ---- what several families share


def head_sizes(default_head_dim: int | None = None) -> Part:
    """Key/value heads, and the size of a head; absent, they are as many as the heads, and what divides the
    width.
    """

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        n_head, width = values.get("num_attention_heads"), values.get("hidden_size")
        kv_heads = values.get("num_key_value_heads")
        size = values.get("head_dim", default_head_dim)
        if None not in (size, n_head, width) and size * n_head == width:
            size = None
        given = {"n_kv_head": None if kv_heads == n_head else kv_heads, "head_size": size}
        problems += wrong_kinds(given)
        return given

    def write(config: GPTConfig) -> dict[str, Any]:
        return {"num_key_value_heads": config.kv_heads, "head_dim": config.head_dim}

    return Part(read, write)


ROPE_FIELDS = dict(
    factor="factor",
    original_length="original_max_position_embeddings",
    low_freq_factor="low_freq_factor",
    high_freq_factor="high_freq_factor",
    beta_slow="beta_slow",
    beta_fast="beta_fast",
    attention_factor="attention_factor",
    truncate="truncate",
)
"""RopeScaling's fields by Hugging Face's names."""
ROPE_KEYS = {*ROPE_FIELDS.values(), "rope_type", "type", "rope_theta", "partial_rotary_factor"}
SCALED_BY = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_length", "beta_slow", "beta_fast", "attention_factor", "truncate"),
}
"""Which of them a kind of scaling has."""


def rope(default_theta: float = 10000.0, partial: bool = False) -> Part:
    """RoPE's theta and scaling; partial: and the share of a head's channels that it turns."""

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        # As in transformers, the older name goes first: model cards tell people to add it.
        name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        rotary = values.get(name) or {}
        if not isinstance(rotary, dict):
            problems.append(f"{name}={rotary!r} is not a JSON object")
            return {}
        usual_theta = values.get("rope_theta", default_theta)
        usual_share = values.get("partial_rotary_factor", 1.0)
        share = rotary.get("partial_rotary_factor", usual_share) or 1.0
        given = {"rope_theta": rotary.get("rope_theta", usual_theta), "rope_share": share}
        problems += wrong_kinds(given)
        if not partial and share != 1:
            problems.append(f"our GPT cannot express partial_rotary_factor={share} of such a model")
        return given | _scaling(rotary, name, values.get("max_position_embeddings"), problems)

    def write(config: GPTConfig) -> dict[str, Any]:
        settings: dict[str, Any] = {"rope_theta": config.rope_theta}
        if partial and config.rope_share != 1:  # Phi reads it in one place, older programs in the other
            share = {"partial_rotary_factor": config.rope_share}
            settings |= share
            settings["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta} | share
        return settings | _written_scaling(config.rope_scaling)

    return Part(read, write)


def _scaling(rotary: Values, name: str, length: Any, problems: list[str]) -> dict[str, Any]:
    """`rope_scaling`, and for dynamic the block size, from what a config.json calls `name`."""
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    unknown = [key for key in rotary if key not in ROPE_KEYS and rotary[key] is not None]
    problems += [f"our GPT cannot express {key} in {name}" for key in unknown]
    if kind == "default":
        return {}
    if kind not in SCALED_BY:
        problems.append(f"our GPT cannot express RoPE scaling {kind!r} (in {name})")
        return {}
    given: dict[str, Any] = {ours: rotary.get(ROPE_FIELDS[ours]) for ours in SCALED_BY[kind]}
    given = {ours: value for ours, value in given.items() if value is not None}
    more: dict[str, Any] = {}
    try:
        if kind != "linear":
            given.setdefault("original_length", length)
        if kind == "yarn" and "factor" not in given:
            given["factor"] = length / given["original_length"]
        if kind == "dynamic":  # which is for texts longer than this
            more["block_size"] = int(given["factor"] * length)
        return more | {"rope_scaling": RopeScaling(kind=kind, **given)}
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        problems.append(f"the RoPE scaling {dict(rotary)} (in {name}) is not whole: {error}")
        return {}


def _written_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """`rope_scaling` as config.json has it, and what it changes beside it."""
    if scaling is None:
        return {"rope_scaling": None}
    written: dict[str, Any] = {"rope_type": scaling.kind}
    for ours in SCALED_BY[scaling.kind]:
        value = getattr(scaling, ours)
        if value is not None:
            written[ROPE_FIELDS[ours]] = value
    if scaling.kind == "dynamic":
        return {"rope_scaling": written, "max_position_embeddings": scaling.original_length}
    return {"rope_scaling": written}


SLIDING, FULL = "sliding_attention", "full_attention"


def windows(
    is_sliding: Callable[[Values, int], bool], switch: str | None = None, usual: int | None = None
) -> Part:
    """Which layers see a window only.

    is_sliding: whether a layer does, by its number, where the settings have no list of layer types. switch:
    the setting without which no layer does. usual: the window where nothing is said of it.
    """

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        window = values.get("sliding_window", usual)
        if switch is not None and not values.get(switch, False):
            window = None
        problems += wrong_kinds({"window": window})
        types = _layer_types(values, window, is_sliding, problems)
        return of_layers([LayerKind(window=window if kind == SLIDING else None) for kind in types])

    def write(config: GPTConfig) -> dict[str, Any]:
        written = _written_windows(config)
        return written if switch is None else {**written, switch: written["sliding_window"] is not None}

    return Part(read, write)


def _written_windows(config: GPTConfig) -> dict[str, Any]:
    """The window, and which layers have it."""
    kinds = [config.kind_of(layer) for layer in range(config.n_layer)]
    window = next((kind.window for kind in kinds if kind.window), None)
    types = [SLIDING if window and kind.window == window else FULL for kind in kinds]
    return {"sliding_window": window, "layer_types": types}


def _layer_types(
    values: Values, window: int | None, is_sliding: Callable[[Values, int], bool], problems: list[str]
) -> list[str]:
    """The type of each layer; one, of full attention, where their number is missing."""
    count = values.get("num_hidden_layers")
    if not isinstance(count, int) or not 0 < count < 10_000:
        return [FULL]  # another part says what is wrong with it
    types = values.get("layer_types")
    if types is None:
        return [SLIDING if window and is_sliding(values, layer) else FULL for layer in range(count)]
    if not isinstance(types, Sequence) or len(types) != count or not {SLIDING, FULL}.issuperset(types):
        problems.append(f"layer_types={types!r} does not give {SLIDING} or {FULL} for each of {count} layers")
        return [FULL]
    return list(types)


def upper_layers(values: Values, layer: int) -> bool:
    """Those from `max_window_layers` on do, as in Qwen2."""
    return layer >= values.get("max_window_layers", 28)


LLAMA_SIZES = alike(
    vocab_size="vocab_size",
    block_size="max_position_embeddings",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    n_embd="hidden_size",
    mlp_hidden="intermediate_size",
    norm_eps="rms_norm_eps",
)
SWIGLU = only(hidden_act="silu")
TIED, UNTIED = (optional(tied, tie_weights="tie_word_embeddings") for tied in (True, False))
"""What it means where nothing is said of the output layer."""
WINDOW, PHI_WINDOW = (optional(usual, window="sliding_window") for usual in (4096, None))
"""A window of all layers."""
NO_BIASES = only(attention_bias=False, mlp_bias=False)


def llama_like(**different: Any) -> Part:
    """What Llama's children have in common; `different` says what sets one apart."""
    return always(**dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False) | different)


# ---- what single families have


def _read_all_biases(values: Values, problems: list[str]) -> dict[str, Any]:
    bias, mlp_bias = values.get("attention_bias", False), values.get("mlp_bias", False)
    if mlp_bias != bias:
        problems.append(f"our GPT cannot express attention_bias={bias} with mlp_bias={mlp_bias}")
    return {"bias": bias}


LLAMA_BIASES = Part(
    _read_all_biases,
    lambda config: {"attention_bias": config.bias, "mlp_bias": config.bias},
)

HF_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}
"""GPT-2's activations by Hugging Face's names. Where two stand for one of ours, the last is what we write."""


def _read_activation(values: Values, problems: list[str]) -> dict[str, Any]:
    activation = values.get("activation_function", "gelu_new")
    if activation not in tuple(HF_ACTIVATIONS):
        problems.append(f"activation_function={activation!r} is not one of {', '.join(HF_ACTIVATIONS)}")
        return {}
    return {"mlp": HF_ACTIVATIONS[activation]}


def _write_activation(config: GPTConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}
    return {"activation_function": names.get(config.mlp, "gelu_new")}


GPT2_ACTIVATION = Part(_read_activation, _write_activation)


def _read_nope(values: Values, problems: list[str]) -> dict[str, Any]:
    """SmolLM3's layers: every fourth has no RoPE, and it is these that may see a window only."""
    count = values.get("num_hidden_layers")
    if not isinstance(count, int) or not 0 < count < 10_000:
        return {}
    every = values.get("no_rope_layer_interval", 4)
    turned = values.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in range(count)]
    if len(turned) < count:
        problems.append(f"no_rope_layers has {len(turned)} entries for {count} layers")
        return {}
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    types = _layer_types(values, window, lambda _, layer: not turned[layer], problems)
    kinds = [
        LayerKind(window=window if kind == SLIDING else None, rope=bool(rope))
        for kind, rope in zip(types, turned)
    ]
    return of_layers(kinds)


def _write_nope(config: GPTConfig) -> dict[str, Any]:
    turned = [int(config.kind_of(layer).rope) for layer in range(config.n_layer)]
    written = _written_windows(config)
    on = written["sliding_window"] is not None
    return {**written, "use_sliding_window": on, "no_rope_layers": turned}


NOPE = Part(_read_nope, _write_nope)


def _read_gemma(values: Values, problems: list[str]) -> dict[str, Any]:
    """What Gemma scales: embeddings by √width, scores by the root of a setting."""
    width, scalar = values.get("hidden_size"), values.get("query_pre_attn_scalar", 256)
    if not isinstance(width, int) or width < 1 or not isinstance(scalar, (int, float)) or scalar <= 0:
        problems.append(f"hidden_size={width!r}, query_pre_attn_scalar={scalar!r}: must be above 0")
        return {}
    return {"embedding_scale": math.sqrt(width), "attention_scale": scalar**-0.5}


def _write_gemma(config: GPTConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    scalar = scale**-2
    return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar}


GEMMA_SCALES = Part(_read_gemma, _write_gemma)


def softcaps(scores: float | None, logits: float | None) -> tuple[Part, ...]:
    """Gemma's soft caps, with what absent ones mean."""
    return (
        optional(scores, attention_softcap="attn_logit_softcapping"),
        optional(logits, logit_softcap="final_logit_softcapping"),
    )


def _read_gemma3_layers(values: Values, problems: list[str]) -> dict[str, Any]:
    """Gemma 3's layers: five of six see a window and have a RoPE of their own; the model's is the others'."""
    every = values.get("sliding_window_pattern", values.get("_sliding_window_pattern")) or 6
    window = values.get("sliding_window", 4096)
    parameters = values.get("rope_parameters") or {}
    local, shared_rope = dict(parameters.get(SLIDING) or {}), dict(parameters.get(FULL) or {})
    given = rope(1_000_000.0).read(
        {**values, "rope_parameters": shared_rope, "rope_scaling": values.get("rope_scaling")}, problems
    )
    theta = local.pop("rope_theta", values.get("rope_local_base_freq", 10000.0))
    if local.pop("rope_type", "default") != "default" or any(v is not None for v in local.values()):
        problems.append(f"our GPT cannot express a scaled RoPE of layers with a window ({local})")
    types = _layer_types(values, window, lambda _, layer: (layer + 1) % every != 0, problems)
    problems += wrong_kinds({"window": window, "rope_theta": theta})
    if problems:
        return given
    kinds = [LayerKind(window=window, rope_theta=theta) if t == SLIDING else LayerKind() for t in types]
    return given | of_layers(kinds)


def _write_gemma3_layers(config: GPTConfig) -> dict[str, Any]:
    kinds = [config.kind_of(layer) for layer in range(config.n_layer)]
    local = next((kind for kind in kinds if kind.window and kind.rope_theta), LayerKind(4096, True, 10000.0))
    written = _written_windows(config) | {"sliding_window": local.window}
    return written | rope().write(config) | {"rope_local_base_freq": local.rope_theta}


GEMMA3_LAYERS = Part(_read_gemma3_layers, _write_gemma3_layers)

# ---- the table


def identity(kind: str) -> dict[str, Any]:
    """What a config.json has to say who it is."""
    return {"architectures": [kind], "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


HF_FAMILIES = {
    # LayerNorm, learned positions, biases everywhere (Radford et al., 2019).
    "gpt2": Family(
        HF_GPT2,
        (
            always(norm="layernorm", position="learned", bias=True),
            alike(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head"),
            alike(n_embd="n_embd", norm_eps="layer_norm_epsilon"),
            optional(None, mlp_hidden="n_inner"),
            GPT2_ACTIVATION,
            TIED,
            only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
        ),
        identity("GPT2LMHeadModel") | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    ),
    # RMSNorm, RoPE, SwiGLU, shared key/value heads (Touvron et al., 2023). SmolLM2 is one, and many more.
    "llama": Family(
        HF_LLAMA,
        (llama_like(), LLAMA_SIZES, head_sizes(), rope(), LLAMA_BIASES, UNTIED, SWIGLU),
        identity("LlamaForCausalLM"),
    ),
    # A Llama that sees a window (Jiang et al., 2023), without biases.
    "mistral": Family(
        HF_LLAMA,
        (llama_like(), LLAMA_SIZES, head_sizes(), rope(), WINDOW, UNTIED, SWIGLU),
        identity("MistralForCausalLM"),
    ),
    # A Llama with biases of queries, keys and values (Yang et al., 2024); upper layers may have a window.
    "qwen2": Family(
        HF_LLAMA,
        (
            llama_like(qkv_bias=True),
            *(LLAMA_SIZES, head_sizes(), rope(), windows(upper_layers, "use_sliding_window"), UNTIED, SWIGLU),
        ),
        identity("Qwen2ForCausalLM"),
    ),
    # No biases, norms on each head's queries and keys, heads of a size of their own (Yang et al., 2025).
    "qwen3": Family(
        HF_QWEN3,
        (
            llama_like(qk_norm=True),
            *(
                LLAMA_SIZES,
                head_sizes(128),
                rope(),
                windows(upper_layers, "use_sliding_window"),
                UNTIED,
                SWIGLU,
            ),
            only(attention_bias=False),
        ),
        identity("Qwen3ForCausalLM"),
    ),
    # A Llama of which every fourth layer has no RoPE (Bakouch et al., 2025).
    "smollm3": Family(
        HF_LLAMA,
        (llama_like(), LLAMA_SIZES, head_sizes(), rope(2_000_000.0), NOPE, TIED, SWIGLU, NO_BIASES),
        identity("SmolLM3ForCausalLM"),
    ),
    # Norms after attention and MLP, and one over all queries, one over all keys (Team OLMo, 2024).
    "olmo2": Family(
        HF_OLMO2,
        (
            llama_like(norm_place="after", qk_norm=True, qk_norm_over="width"),
            *(LLAMA_SIZES, head_sizes(), rope(), UNTIED, SWIGLU, only(attention_bias=False)),
        ),
        identity("Olmo2ForCausalLM"),
    ),
    # Queries, keys and values in one tensor, gate and up in another; part of RoPE (Abdin et al., 2024).
    "phi3": Family(
        HF_PHI3,
        (llama_like(), LLAMA_SIZES, head_sizes(), rope(partial=True), PHI_WINDOW, UNTIED, SWIGLU),
        identity("Phi3ForCausalLM") | dict(resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    ),
    # Norms before and after, 1 + weight; GEGLU; soft caps; some layers with a window (Gemma Team, 2024).
    "gemma2": Family(
        HF_GEMMA,
        (
            llama_like(norm="rmsnorm_plus_one", norm_place="both", mlp="geglu"),
            *(
                LLAMA_SIZES,
                head_sizes(256),
                rope(),
                windows(lambda _, layer: layer % 2 == 0, usual=4096),
                TIED,
            ),
            *(GEMMA_SCALES, *softcaps(50.0, 30.0), only(attention_bias=False)),
            only(hidden_activation="gelu_pytorch_tanh"),
        ),
        identity("Gemma2ForCausalLM"),
    ),
    # Norms on queries and keys in the place of soft caps; five local layers to a global one (2025).
    "gemma3_text": Family(
        HF_GEMMA,
        (
            llama_like(norm="rmsnorm_plus_one", norm_place="both", mlp="geglu", qk_norm=True),
            *(LLAMA_SIZES, head_sizes(256), GEMMA3_LAYERS, TIED),
            *(GEMMA_SCALES, *softcaps(None, None), only(attention_bias=False)),
            only(hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False),
        ),
        identity("Gemma3ForCausalLM"),
    ),
}
"""By `model_type`. A GPT is written as the first that has all of it."""


def config_from_hf(values: Mapping[str, Any], where: str) -> tuple[GPTConfig, Layout]:
    """The GPT that a config.json describes, and how its tensors are stored.

    Raises ValueError for what our GPT cannot express.
    """
    kind = values.get("model_type")
    if kind not in tuple(HF_FAMILIES):
        hint = ""
        if "model" in values:
            hint = ", and this is one of this course's checkpoints: load it with GPT.from_checkpoint"
        elif "text_config" in values:
            hint = ": it is a model with more than text (text_config), of which our GPT could only be a part"
        raise ValueError(f"{where}: model_type={kind!r} is not one of {', '.join(HF_FAMILIES)}{hint}")
    family = HF_FAMILIES[kind]
    experts = [key for key in ("num_local_experts", "num_experts", "n_routed_experts") if values.get(key)]
    refuse([f"our GPT cannot express {key}={values[key]!r}: a mixture of experts" for key in experts], where)
    return family.config(values, where), family.layout


def hf_config(config: GPTConfig) -> tuple[dict[str, Any], Layout]:
    """Hugging Face's config.json for a GPT of ours, and how its tensors are stored.

    Dropout is left out: it is a matter of training, and Llama has none. Raises ValueError where there is no
    exact equivalent.
    """
    kind = exact_family(config, HF_FAMILIES, "at Hugging Face")
    family = HF_FAMILIES[kind]
    return {"model_type": kind} | family.settings(config), family.layout
