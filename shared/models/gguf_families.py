"""Week 6. The families of models that our GPT can be, and how their settings are written in GGUF, as
llama.cpp reads them.

What llama.cpp holds fixed for a family is not in the file: it is `always` here, so a GPT with anything else
has no equivalent.

Sources: the GGUF specification in ggml's repository; llama.cpp's loaders.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from shared.models.config import GPTConfig, LayerKind, RopeScaling
from shared.models.families import llama_like
from shared.models.family import (
    Family,
    Part,
    Values,
    alike,
    always,
    exact_family,
    of_layers,
    only_named,
    optional,
    refuse,
    wrong_kinds,
)
from shared.models.formats import (
    GGUF_GEMMA,
    GGUF_GPT2,
    GGUF_LLAMA,
    GGUF_OLMO2,
    GGUF_PHI3,
    GGUF_QWEN2,
    GGUF_QWEN3,
    Layout,
)
from shared.models.rotary import frequencies

# ---- what several families share

SIZES = alike(
    block_size="context_length",
    n_layer="block_count",
    n_head="attention.head_count",
    n_embd="embedding_length",
    mlp_hidden="feed_forward_length",
)
RMS_EPS = alike(norm_eps="attention.layer_norm_rms_epsilon")
CAUSAL = only_named({"attention.causal": True, "expert_count": 0})
VOCABULARY = Part(lambda _, problems: {}, lambda config: {"vocab_size": config.vocab_size}, ("vocab_size",))
"""Written for others; what is read is the embedding's size."""


def _read_partial_heads(values: Values, problems: list[str]) -> dict[str, Any]:
    """Key/value heads, the size of a head, and how many of its channels RoPE turns."""
    n_head, width = values.get("attention.head_count"), values.get("embedding_length")
    kv_heads = values.get("attention.head_count_kv", n_head)
    given: dict[str, Any] = {"n_kv_head": None if kv_heads == n_head else kv_heads}
    problems += wrong_kinds({"n_head": n_head, "n_embd": width})
    if problems or not n_head:
        return given
    size = values.get("attention.key_length", width // n_head)
    if not isinstance(size, int) or size < 1:
        problems.append(f"attention.key_length={size!r} with {n_head} heads is no size of a head")
        return given
    if values.get("attention.value_length", size) != size:
        length = values["attention.value_length"]
        problems.append(f"our GPT cannot express attention.value_length={length!r} with keys of {size!r}")
    given["head_size"] = None if size * n_head == width else size
    given["rope_share"] = values.get("rope.dimension_count", size) / size
    return given


def _read_heads(values: Values, problems: list[str]) -> dict[str, Any]:
    """The same for models whose RoPE turns all channels."""
    given = _read_partial_heads(values, problems)
    if given.pop("rope_share", 1) != 1:
        problems.append(f"our GPT cannot express rope.dimension_count={values['rope.dimension_count']} here")
    return given


def _write_heads(config: GPTConfig) -> dict[str, Any]:
    written = {"attention.head_count_kv": config.kv_heads}
    if config.position == "rope":
        written |= {"rope.dimension_count": config.rope_dim}
        written |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return written


_HEAD_KEYS = ("head_count_kv", "key_length", "value_length")
_HEAD_READS = (*(f"attention.{key}" for key in _HEAD_KEYS), "rope.dimension_count")
HEADS = Part(_read_heads, _write_heads, _HEAD_READS)
PARTIAL_HEADS = Part(_read_partial_heads, _write_heads, _HEAD_READS)
YARN_FIELDS = dict(beta_slow="rope.scaling.yarn_beta_slow", beta_fast="rope.scaling.yarn_beta_fast")


def _read_rope(values: Values, problems: list[str]) -> dict[str, Any]:
    kind = values.get("rope.scaling.type", "none")
    given = {"rope_theta": values.get("rope.freq_base", 10000.0)}
    if kind == "none":
        return given
    scaling: dict[str, Any] = {"factor": values.get("rope.scaling.factor")}
    if kind == "yarn":
        original = values.get("rope.scaling.original_context_length", values.get("context_length"))
        scaling |= {"original_length": original}
        scaling |= {ours: values[theirs] for ours, theirs in YARN_FIELDS.items() if theirs in values}
    try:
        return given | {"rope_scaling": RopeScaling(kind=kind, **scaling)}
    except (TypeError, ValueError):
        problems.append(f"rope.scaling.type={kind!r} with {scaling} is more than our GPT can express")
        return given


def _write_rope(config: GPTConfig) -> dict[str, Any]:
    written: dict[str, Any] = {"rope.freq_base": float(config.rope_theta)}
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("linear", "yarn"):
        return written
    written |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        written["rope.scaling.original_context_length"] = scaling.original_length
        written |= {theirs: float(getattr(scaling, ours)) for ours, theirs in YARN_FIELDS.items()}
    return written


ROPE = Part(
    _read_rope,
    _write_rope,
    (
        *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.original_context_length", *YARN_FIELDS.values()),
    ),
)
PHI_PARTS = (SIZES, RMS_EPS, CAUSAL, VOCABULARY, PARTIAL_HEADS, ROPE)
LLAMA_PARTS = (SIZES, RMS_EPS, CAUSAL, VOCABULARY, HEADS, ROPE)


def layers(every: int, local: LayerKind, whole: LayerKind) -> Part:
    """Layers of which every so-manieth is `whole`; the others are `local`, with the file's window if it has
    one.
    """

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        count = values.get("block_count")
        if not isinstance(count, int) or not 0 < count < 10_000:
            return {}
        window = values.get("attention.sliding_window", local.window)
        problems += wrong_kinds({"window": window})
        few = LayerKind(window=window, rope=local.rope, rope_theta=local.rope_theta)
        return of_layers([whole if layer % every == every - 1 else few for layer in range(count)])

    def write(config: GPTConfig) -> dict[str, Any]:
        window = config.kind_of(0).window
        return {} if window is None else {"attention.sliding_window": window}

    return Part(read, write, ("attention.sliding_window",))


def gemma_scales(largest: int) -> Part:
    """What Gemma scales; its model of 27 billion parameters, with the most layers, has another rule."""

    def read(values: Values, problems: list[str]) -> dict[str, Any]:
        width, n_head = values.get("embedding_length"), values.get("attention.head_count")
        problems += wrong_kinds({"n_embd": width, "n_head": n_head})
        if problems or not n_head or not width:
            return {}
        size = values.get("attention.key_length", width // n_head)
        if values.get("block_count") == largest:
            size = width // n_head
        return {"embedding_scale": math.sqrt(width), "attention_scale": size**-0.5}

    return Part(read, lambda config: {})


# ---- the table

GEMMA = llama_like(norm="rmsnorm_plus_one", norm_place="both", mlp="geglu")
GGUF_FAMILIES = {
    "gpt2": Family(
        GGUF_GPT2,
        (
            always(norm="layernorm", position="learned", mlp="gelu_tanh", bias=True),
            *(SIZES, CAUSAL, VOCABULARY, alike(norm_eps="attention.layer_norm_epsilon")),
            Part(lambda _, problems: {}, _write_heads, ("attention.head_count_kv",)),
        ),
    ),
    "llama": Family(GGUF_LLAMA, (llama_like(), *LLAMA_PARTS)),
    "qwen2": Family(GGUF_QWEN2, (llama_like(qkv_bias=True), *LLAMA_PARTS)),
    "qwen3": Family(GGUF_QWEN3, (llama_like(qk_norm=True), *LLAMA_PARTS)),
    "smollm3": Family(
        GGUF_LLAMA, (llama_like(), *LLAMA_PARTS, layers(4, LayerKind(), LayerKind(rope=False)))
    ),
    "olmo2": Family(
        GGUF_OLMO2,
        (
            llama_like(norm_place="after", qk_norm=True, qk_norm_over="width", tie_weights=False),
            *LLAMA_PARTS,
        ),
    ),
    "phi3": Family(GGUF_PHI3, (llama_like(), *PHI_PARTS, optional(None, window="attention.sliding_window"))),
    "gemma2": Family(
        GGUF_GEMMA,
        (
            *(GEMMA, always(tie_weights=True), *LLAMA_PARTS, gemma_scales(46)),
            layers(2, LayerKind(window=4096), LayerKind()),
            optional(50.0, attention_softcap="attn_logit_softcapping"),
            optional(30.0, logit_softcap="final_logit_softcapping"),
        ),
    ),
    "gemma3": Family(
        GGUF_GEMMA,
        (
            *(GEMMA, always(qk_norm=True), *LLAMA_PARTS, gemma_scales(62)),
            layers(6, LayerKind(window=1024, rope_theta=10000.0), LayerKind()),
        ),
    ),
}
"""By `general.architecture`. A GPT is written as the first that has all of it."""


def config_from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, tied: bool, where: str
) -> tuple[GPTConfig, Layout]:
    """The GPT that a GGUF file's metadata describes, and how its tensors are stored.

    vocab_size, tied: as the file's tensors show them. Raises ValueError for what our GPT cannot express.
    """
    arch = metadata.get("general.architecture")
    if arch not in tuple(GGUF_FAMILIES):
        raise ValueError(f"{where}: architecture {arch!r} is not one of {', '.join(GGUF_FAMILIES)}")
    family = GGUF_FAMILIES[arch]
    prefix = f"{arch}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    unknown = values.keys() - family.reads
    refuse(
        [f"{arch}.{name}={values[name]!r} is more than our GPT can express" for name in sorted(unknown)],
        where,
    )
    return family.config(values, where, vocab_size=vocab_size, tie_weights=tied), family.layout


def gguf_settings(config: GPTConfig) -> tuple[str, dict[str, Any], Layout]:
    """The architecture that a GPT is in GGUF, its metadata, and how its tensors are stored.

    Raises ValueError where there is no exact equivalent.
    """
    in_tensors: dict[str, Any] = dict(vocab_size=config.vocab_size, tie_weights=config.tie_weights)
    factors = llama3_factors(config)
    if factors is not None:
        in_tensors["rope_scaling"] = llama3_scaling(factors, config, "in GGUF").rope_scaling
    arch = exact_family(config, GGUF_FAMILIES, "in GGUF", **in_tensors)
    family = GGUF_FAMILIES[arch]
    settings = {f"{arch}.{name}": value for name, value in family.settings(config).items()}
    return arch, settings, family.layout


# ---- llama3's scaling, which GGUF keeps as a tensor

FACTORS = "rope_freqs.weight"
"""How many times slower each pair of channels turns: [head_dim / 2]."""


def llama3_factors(config: GPTConfig) -> Tensor | None:
    """That tensor for a GPT whose scaling is llama3's; None for another."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    plain = frequencies(config.rope_dim, config.rope_theta)
    return plain / frequencies(config.rope_dim, config.rope_theta, scaling)


def llama3_scaling(factors: Tensor, config: GPTConfig, where: str) -> GPTConfig:
    """The GPT with the scaling that these factors are of, with the borders that every Llama 3 has.

    Raises ValueError where they are of no such scaling.
    """
    scaling = RopeScaling("llama3", factor=float(factors.max()), original_length=8192)
    scaled = replace(config, rope_scaling=scaling)
    expected = llama3_factors(scaled)
    if expected is None or expected.shape != factors.shape or (expected / factors - 1).abs().max() > 1e-4:
        raise ValueError(f"{where}: {FACTORS} is not the RoPE scaling of a Llama 3, which our GPT knows")
    return scaled
