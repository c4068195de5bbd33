"""Week 6. The families of models that our GPT can be, GPT-2, Llama and Qwen3, and how their settings are
written at Hugging Face and in GGUF.

What our GPT cannot express is refused by name.

>>> config, _ = config_from_hf(hf_config(GPTConfig.preset("gpt2"))[0], where="config.json")
>>> config == GPTConfig.preset("gpt2")
True

Sources: the configurations of transformers; the GGUF specification in ggml's repository.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from shared.models.formats import (
    GGUF_GPT2,
    GGUF_LLAMA,
    GGUF_QWEN3,
    HF_GPT2,
    HF_LLAMA,
    HF_QWEN3,
    Layout,
)
from shared.models.gpt import GPTConfig


def refuse(problems: Sequence[str], where: str) -> None:
    """Raises ValueError with the first few problems, if there are any."""
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{where}: {'; '.join(problems[:5])}{more}")


@dataclass(frozen=True)
class Family:
    """How a format's settings become a GPTConfig."""

    layout: Layout
    always: Mapping[str, Any]
    """Fields of GPTConfig that all models of the family share."""
    fields: Mapping[str, str]
    """Their names of fields of GPTConfig; each must be there."""
    only: Mapping[str, Any]
    """Their settings of which our GPT has one value only, which is also what an absent one means."""

    def config(self, values: Mapping[str, Any], where: str, **more: Any) -> GPTConfig:
        """The GPTConfig of these settings; `more`: fields that need more than another name.

        Raises ValueError, beginning with `where`, for settings that are missing, of a wrong kind, or that our
        GPT does not have.
        """
        missing = [theirs for theirs in self.fields.values() if theirs not in values]
        refuse([f"{name} is missing" for name in missing], where)
        given = {ours: values[theirs] for ours, theirs in self.fields.items()} | more
        refuse(_wrong_kinds(given) + self._inexpressible(values), where)
        try:
            return GPTConfig(**self.always, **given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _inexpressible(self, values: Mapping[str, Any]) -> list[str]:
        return [
            f"{name}={values[name]!r} is more than our GPT can express; it has {value!r} only"
            for name, value in self.only.items()
            if values.get(name, value) not in (value, None)
        ]


def _wrong_kinds(given: Mapping[str, Any]) -> list[str]:
    """Problems with numbers and bools for GPTConfig that are of another type than their fields."""
    kinds = {field.name: field.type for field in fields(GPTConfig)}
    checked = (int, int | None, float, bool)
    return [
        f"{name}={value!r} is of the wrong kind"
        for name, value in given.items()
        if kinds[name] in checked and not _fits(value, kinds[name])
    ]


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # which isinstance takes for an int
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def exact_family(config: GPTConfig, families: Mapping[str, Family], where: str) -> str:
    """The name of the family that has everything of `config`.

    Raises ValueError, naming for each family the fields in the way.
    """
    reasons = []
    for kind, family in families.items():
        lacking = _fields_in_the_way(config, kind, family)
        if not lacking:
            return kind
        reasons.append(f"a {kind} has no {', '.join(lacking)}")
    raise ValueError(f"this GPT has no exact equivalent {where}: {'; '.join(reasons)}")


def _fields_in_the_way(config: GPTConfig, kind: str, family: Family) -> list[str]:
    required = {"qk_norm": False, "window": None, **family.always}
    allowed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in required.items()}
    allowed.setdefault("mlp", tuple(HF_ACTIVATIONS.values()))
    if kind == "gpt2":
        allowed["n_kv_head"] = (None, config.n_head)
    given = {name: getattr(config, name) for name in allowed}
    return [f"{name}={value!r}" for name, value in given.items() if value not in allowed[name]]


HF_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}
"""GPT-2's activations by Hugging Face's names. Where two stand for one of ours, the last is what we write."""

_HF_LLAMA_FAMILY = Family(
    HF_LLAMA,
    always=dict(norm="rmsnorm", position="rope", mlp="swiglu"),
    fields=dict(
        vocab_size="vocab_size",
        block_size="max_position_embeddings",
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        n_embd="hidden_size",
        mlp_hidden="intermediate_size",
        norm_eps="rms_norm_eps",
    ),
    only=dict(hidden_act="silu", partial_rotary_factor=1.0),
)
HF_FAMILIES = {
    "gpt2": Family(
        HF_GPT2,
        always=dict(norm="layernorm", position="learned", bias=True),
        fields=dict(
            vocab_size="vocab_size",
            block_size="n_positions",
            n_layer="n_layer",
            n_head="n_head",
            n_embd="n_embd",
            norm_eps="layer_norm_epsilon",
        ),
        only=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    ),
    "llama": _HF_LLAMA_FAMILY,
    "qwen3": Family(
        HF_QWEN3,
        always={**_HF_LLAMA_FAMILY.always, "bias": False, "qk_norm": True},
        fields={**_HF_LLAMA_FAMILY.fields, "n_kv_head": "num_key_value_heads"},
        only={**_HF_LLAMA_FAMILY.only, "attention_bias": False, "use_sliding_window": False},
    ),
}


def config_from_hf(values: Mapping[str, Any], where: str) -> tuple[GPTConfig, Layout]:
    """The GPT that a config.json describes, and how its tensors are stored.

    Raises ValueError for what our GPT cannot express.
    """
    kind = values.get("model_type")
    if kind not in tuple(HF_FAMILIES):
        hint = ""
        if "model" in values:
            hint = ", and this is one of this course's checkpoints: load it with GPT.from_checkpoint"
        raise ValueError(f"{where}: model_type={kind!r} is not one of {', '.join(HF_FAMILIES)}{hint}")
    family = HF_FAMILIES[kind]
    if kind == "gpt2":
        return _config_of_gpt2(family, values, where), family.layout
    return _config_of_llama(family, values, where), family.layout


def _config_of_gpt2(family: Family, values: Mapping[str, Any], where: str) -> GPTConfig:
    activation = values.get("activation_function", "gelu_new")
    if activation not in tuple(HF_ACTIVATIONS):
        raise ValueError(
            f"{where}: activation_function={activation!r} is not one of {', '.join(HF_ACTIVATIONS)}"
        )
    return family.config(
        values,
        where,
        mlp=HF_ACTIVATIONS[activation],
        mlp_hidden=values.get("n_inner"),
        tie_weights=values.get("tie_word_embeddings", True),
    )


def _config_of_llama(family: Family, values: Mapping[str, Any], where: str) -> GPTConfig:
    # As in transformers, the older name goes first: model cards tell people to add it.
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rotary = values.get(name) or {}
    if not isinstance(rotary, dict):
        raise ValueError(f"{where}: {name}={rotary!r} is not a JSON object")
    scaling = rotary.get("rope_type", rotary.get("type", "default"))
    bias = values.get("attention_bias", False)
    mlp_bias = values.get("mlp_bias", False)
    problems = []
    if scaling != "default":
        problems.append(f"RoPE scaling {scaling!r} (in {name})")
    problems += [f"{key} in {name}" for key, value in rotary.items() if isinstance(value, dict)]
    if rotary.get("partial_rotary_factor", 1) != 1:
        problems.append(f"partial_rotary_factor={rotary['partial_rotary_factor']}")
    if mlp_bias != bias:
        problems.append(f"attention_bias={bias} with mlp_bias={mlp_bias}")
    refuse([f"our GPT cannot express {problem}" for problem in problems], where)

    kv_heads = values.get("num_key_value_heads")
    more = {
        "n_kv_head": None if kv_heads == values.get("num_attention_heads") else kv_heads,
        "rope_theta": rotary.get("rope_theta", values.get("rope_theta", 10000.0)),
        "tie_weights": values.get("tie_word_embeddings", False),
    }
    if "bias" not in family.always:
        more["bias"] = bias
    config = family.config(values, where, **more)
    default_head_dim = 128 if family.layout is HF_QWEN3 else None  # transformers' own
    head_dim = values.get("head_dim", default_head_dim)
    if head_dim not in (None, config.head_dim):
        raise ValueError(
            f"{where}: head_dim={head_dim} is more than our GPT can express; it has hidden_size /"
            " num_attention_heads only"
        )
    return config


def hf_config(config: GPTConfig) -> tuple[dict[str, Any], Layout]:
    """Hugging Face's config.json for a GPT of ours, and how its tensors are stored.

    Dropout is left out: it is a matter of training, and Llama has none. Raises ValueError where there is no
    exact equivalent.
    """
    kind = exact_family(config, HF_FAMILIES, "at Hugging Face")
    family = HF_FAMILIES[kind]
    settings: dict[str, Any] = {
        "model_type": kind,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    for ours, theirs in family.fields.items():
        settings[theirs] = getattr(config, ours)
    if kind == "gpt2":
        names = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}
        settings |= {
            "architectures": ["GPT2LMHeadModel"],
            "n_inner": config.mlp_hidden,
            "activation_function": names[config.mlp],
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        return settings, family.layout
    settings |= {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "intermediate_size": config.hidden,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": config.bias,
    }
    if kind == "qwen3":
        settings["use_sliding_window"] = False
    else:
        settings["mlp_bias"] = config.bias
    return settings, family.layout


_GGUF_FIELDS = dict(
    block_size="context_length",
    n_layer="block_count",
    n_head="attention.head_count",
    n_embd="embedding_length",
    mlp_hidden="feed_forward_length",
)
_GGUF_LLAMA_FAMILY = Family(
    GGUF_LLAMA,
    always=dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False),
    fields={**_GGUF_FIELDS, "norm_eps": "attention.layer_norm_rms_epsilon"},
    only={"attention.causal": True, "rope.scaling.type": "none", "expert_count": 0},
)
GGUF_FAMILIES = {
    "gpt2": Family(
        GGUF_GPT2,
        always=dict(norm="layernorm", position="learned", mlp="gelu_tanh", bias=True),
        fields={**_GGUF_FIELDS, "norm_eps": "attention.layer_norm_epsilon"},
        only={"attention.causal": True},
    ),
    "llama": _GGUF_LLAMA_FAMILY,
    "qwen3": replace(
        _GGUF_LLAMA_FAMILY, layout=GGUF_QWEN3, always={**_GGUF_LLAMA_FAMILY.always, "qk_norm": True}
    ),
}
_HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_OPTIONAL = {"attention.head_count_kv", "rope.freq_base", "vocab_size", *_HEAD_SIZES}


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
    unknown = values.keys() - family.fields.values() - family.only.keys() - _OPTIONAL
    refuse(
        [f"{arch}.{name}={values[name]!r} is more than our GPT can express" for name in sorted(unknown)],
        where,
    )
    heads = values.get("attention.head_count")
    kv_heads = values.get("attention.head_count_kv")
    more: dict[str, Any] = {
        "vocab_size": vocab_size,
        "tie_weights": tied,
        "n_kv_head": None if kv_heads == heads else kv_heads,
    }
    if family.always["position"] == "rope":
        more["rope_theta"] = values.get("rope.freq_base", 10000.0)
    config = family.config(values, where, **more)
    own = config.head_dim
    other_sizes = [name for name in _HEAD_SIZES if values.get(name, own) != own]
    refuse(
        [
            f"{arch}.{name}={values[name]!r}: our GPT has embedding_length / head_count = {own} only"
            for name in other_sizes
        ],
        where,
    )
    return config, family.layout
