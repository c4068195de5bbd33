"""Week 6. How Hugging Face and GGUF store a GPT and its tokenizer: names, order, settings; and what of it
ours can be.

Nothing here reads or writes a file: `shared.models.pretrained` does, and week 12's export uses the same
tables the other way round.

>>> HF_GPT2.name("blocks.3.attn.q_proj.weight"), GGUF_LLAMA.name("blocks.3.attn.q_proj.weight")
('transformer.h.3.attn.c_attn.weight', 'blk.3.attn_q.weight')

Sources: the configurations of transformers; the GGUF specification in ggml's repository; llama.cpp for the
patterns of tokenizers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from shared.models.gpt import GPTConfig
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.tokenizers.bpe import GPT2_PATTERN, GPT4_PATTERN, PRINTABLE

# ---- tensors


@dataclass(frozen=True)
class Layout:
    """A format's name for each of our modules, and how its tensors differ from ours. `{}` stands for the
    block's number.

    Where several of our modules have one name, that tensor is theirs one after the other.
    """

    names: Mapping[str, str]
    conv1d: bool = False
    """The blocks' weights are [in, out]."""
    neighbours: bool = False
    """RoPE turns channels (2i, 2i + 1) together, where ours turns (i, i + head_dim / 2): queries and keys
    come in another order.
    """

    def name(self, ours: str) -> str:
        """Their name of our parameter."""
        module, kind = ours.rsplit(".", 1)
        block = re.search(r"\d+", module)
        return self.names[re.sub(r"\d+", "{}", module)].format(block and block[0]) + "." + kind

    def groups(self, ours: Iterable[str]) -> dict[str, list[str]]:
        """Our parameters by their name."""
        found: dict[str, list[str]] = {}
        for name in ours:
            found.setdefault(self.name(name), []).append(name)
        return found

    def theirs(self, ours: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
        """Our tensors under their names and in their form."""
        out = {}
        for name, parts in self.groups(ours).items():
            tensors = [self._reordered(p, ours[p], (2, head_dim // 2)) for p in parts]
            tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            out[name] = tensor.T if self._is_transposed(parts[0]) else tensor
        return out

    def ours(self, tensor: Tensor, shapes: Mapping[str, torch.Size], head_dim: int) -> dict[str, Tensor]:
        """One of their tensors as our parameters of these names and shapes, in fp32 and in memory of their
        own.
        """
        if self._is_transposed(next(iter(shapes))):
            tensor = tensor.T
        parts = tensor.split([shape[0] for shape in shapes.values()])
        return {
            name: (
                torch.empty(shape, dtype=torch.float32).copy_(self._reordered(name, part, (head_dim // 2, 2)))
            )
            for (name, shape), part in zip(shapes.items(), parts)
        }

    def _is_transposed(self, ours: str) -> bool:
        return self.conv1d and ours.endswith("_proj.weight")

    def _reordered(self, name: str, tensor: Tensor, channels: tuple[int, int]) -> Tensor:
        """The rows of every head, seen as `channels`, the other way round."""
        if not self.neighbours or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return tensor
        return tensor.reshape(-1, *channels, tensor.size(-1)).transpose(1, 2).reshape(tensor.shape)


def _names(outside: str, block: str, inside: str) -> dict[str, str]:
    pairs = lambda text: (pair.split("=") for pair in text.split())
    return dict(pairs(outside)) | {
        f"blocks.{{}}.{ours}": f"{block}.{{}}.{theirs}" for ours, theirs in pairs(inside)
    }


HF_GPT2 = Layout(
    _names(
        "token_embedding=transformer.wte position_embedding=transformer.wpe norm=transformer.ln_f"
        " lm_head=lm_head",
        "transformer.h",
        "attn_norm=ln_1 attn.q_proj=attn.c_attn attn.k_proj=attn.c_attn attn.v_proj=attn.c_attn"
        " attn.o_proj=attn.c_proj mlp_norm=ln_2 mlp.up_proj=mlp.c_fc mlp.down_proj=mlp.c_proj",
    ),
    conv1d=True,
)
HF_LLAMA = Layout(
    _names(
        "token_embedding=model.embed_tokens norm=model.norm lm_head=lm_head",
        "model.layers",
        "attn_norm=input_layernorm attn.q_proj=self_attn.q_proj attn.k_proj=self_attn.k_proj"
        " attn.v_proj=self_attn.v_proj attn.o_proj=self_attn.o_proj mlp_norm=post_attention_layernorm"
        " mlp.gate_proj=mlp.gate_proj mlp.up_proj=mlp.up_proj mlp.down_proj=mlp.down_proj",
    )
)
GGUF_GPT2 = Layout(
    _names(
        "token_embedding=token_embd position_embedding=position_embd norm=output_norm lm_head=output",
        "blk",
        "attn_norm=attn_norm attn.q_proj=attn_qkv attn.k_proj=attn_qkv attn.v_proj=attn_qkv"
        " attn.o_proj=attn_output mlp_norm=ffn_norm mlp.up_proj=ffn_up mlp.down_proj=ffn_down",
    )
)
GGUF_LLAMA = Layout(
    _names(
        "token_embedding=token_embd norm=output_norm lm_head=output",
        "blk",
        "attn_norm=attn_norm attn.q_proj=attn_q attn.k_proj=attn_k attn.v_proj=attn_v attn.o_proj=attn_output"
        " mlp_norm=ffn_norm mlp.gate_proj=ffn_gate mlp.up_proj=ffn_up mlp.down_proj=ffn_down",
    ),
    neighbours=True,
)
# Qwen3 is a Llama with norms on queries and keys; in GGUF its RoPE turns the same channels as ours.
_qk_norm = lambda block, prefix: {
    f"blocks.{{}}.attn.{n}_norm": f"{block}.{{}}.{prefix}{n}_norm" for n in "qk"
}
HF_QWEN3 = Layout(HF_LLAMA.names | _qk_norm("model.layers", "self_attn."))
GGUF_QWEN3 = Layout(GGUF_LLAMA.names | _qk_norm("blk", "attn_"))


# ---- settings


def refuse(problems: Sequence[str], where: str) -> None:
    """Raises ValueError with the first few problems, if there are any."""
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{where}: {'; '.join(problems[:5])}{more}")


@dataclass(frozen=True)
class Family:
    """How a format's settings become a GPTConfig."""

    layout: Layout
    always: dict[str, Any]
    """Fields of GPTConfig that all models of the family share."""
    fields: dict[str, str]
    """Fields of GPTConfig by their names; each must be there."""
    only: dict[str, Any]
    """Their settings that our GPT has for one value only, which is also what an absent one means."""

    def config(self, values: Mapping[str, Any], where: str, **more: Any) -> GPTConfig:
        """The GPTConfig of these settings; `more`: fields that need more than another name."""
        missing = [theirs for theirs in self.fields.values() if theirs not in values]
        refuse([f"{name} is missing" for name in missing], where)
        given = {ours: values[theirs] for ours, theirs in self.fields.items()} | more
        kinds = {f.name: f.type for f in fields(GPTConfig) if f.type in (int, int | None, float, bool)}
        problems = [
            f"{n}={v!r} is of the wrong kind"
            for n, v in given.items()
            if n in kinds and not _fits(v, kinds[n])
        ]
        problems += [
            f"{name}={values[name]!r} is more than our GPT can express; it has {value!r} only"
            for name, value in self.only.items()
            if values.get(name, value) not in (value, None)
        ]
        refuse(problems, where)
        try:
            return GPTConfig(**self.always, **given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _fits(value: Any, kind: Any) -> bool:
    if kind is bool or isinstance(value, bool):  # a bool is an int to isinstance
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


_PLAIN = dict(qk_norm=False, window=None)
"""What a family has unless its `always` says otherwise."""


def exact_family(config: GPTConfig, families: Mapping[str, Family], where: str) -> str:
    """The name of the family that has everything of `config`. Raises ValueError, naming for each family the
    fields in the way.
    """
    in_the_way = {}
    for kind, family in families.items():
        allowed = {name: (value,) for name, value in (_PLAIN | family.always).items()}
        allowed.setdefault("mlp", tuple(ACTIVATIONS.values()))
        if kind == "gpt2":
            allowed["n_kv_head"] = (None, config.n_head)
        in_the_way[kind] = [
            f"{name}={getattr(config, name)!r}"
            for name, values in allowed.items()
            if getattr(config, name) not in values
        ]
        if not in_the_way[kind]:
            return kind
    ways = "; ".join(f"a {kind} has no {', '.join(names)}" for kind, names in in_the_way.items())
    raise ValueError(f"this GPT has no exact equivalent {where}: {ways}")


ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}
"""Hugging Face's names and ours; of two for one of ours the last is written."""

FAMILIES = {
    "gpt2": Family(
        HF_GPT2,
        dict(norm="layernorm", position="learned", bias=True),
        dict(
            vocab_size="vocab_size",
            block_size="n_positions",
            n_layer="n_layer",
            n_head="n_head",
            n_embd="n_embd",
            norm_eps="layer_norm_epsilon",
        ),
        dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
    ),
    "llama": Family(
        HF_LLAMA,
        dict(norm="rmsnorm", position="rope", mlp="swiglu"),
        dict(
            vocab_size="vocab_size",
            block_size="max_position_embeddings",
            n_layer="num_hidden_layers",
            n_head="num_attention_heads",
            n_embd="hidden_size",
            mlp_hidden="intermediate_size",
            norm_eps="rms_norm_eps",
        ),
        dict(hidden_act="silu", partial_rotary_factor=1.0),
    ),
}
FAMILIES["qwen3"] = Family(
    HF_QWEN3,
    FAMILIES["llama"].always | dict(bias=False, qk_norm=True),
    FAMILIES["llama"].fields | dict(n_kv_head="num_key_value_heads"),
    FAMILIES["llama"].only | dict(attention_bias=False, use_sliding_window=False),
)


def config_from_hf(values: Mapping[str, Any], where: str) -> tuple[GPTConfig, Layout]:
    """The GPT that a config.json describes, and how its tensors are stored. Raises ValueError for what our
    GPT cannot express.
    """
    kind = values.get("model_type")
    if kind not in tuple(FAMILIES):
        ours = (
            ", and this is one of this course's checkpoints: load it with GPT.from_checkpoint"
            if "model" in values
            else ""
        )
        raise ValueError(f"{where}: model_type={kind!r} is not one of {', '.join(FAMILIES)}{ours}")
    family = FAMILIES[kind]
    if kind == "gpt2":
        activation = values.get("activation_function", "gelu_new")
        if activation not in tuple(ACTIVATIONS):
            raise ValueError(
                f"{where}: activation_function={activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        tied = values.get("tie_word_embeddings", True)
        return (
            family.config(
                values, where, mlp=ACTIVATIONS[activation], mlp_hidden=values.get("n_inner"), tie_weights=tied
            ),
            family.layout,
        )

    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: rope_parameters={rope!r} is not a JSON object")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    bias = values.get("attention_bias", False)
    problems = [f"RoPE scaling {scaling!r}"] if scaling != "default" else []
    if rope.get("partial_rotary_factor", 1) != 1:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']}")
    if values.get("mlp_bias", False) != bias:
        problems.append(f"attention_bias={bias} with mlp_bias={values.get('mlp_bias', False)}")
    refuse([f"our GPT cannot express {p}" for p in problems], where)
    theta = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    heads = values.get("num_key_value_heads")
    more = {"n_kv_head": None if heads == values.get("num_attention_heads") else heads} | (
        {} if "bias" in family.always else {"bias": bias}
    )
    config = family.config(
        values, where, rope_theta=theta, tie_weights=values.get("tie_word_embeddings", False), **more
    )
    head_dim = values.get(
        "head_dim", 128 if kind == "qwen3" else None
    )  # what transformers takes where there is none
    if head_dim not in (None, config.head_dim):
        raise ValueError(
            f"{where}: head_dim={head_dim} is more than our GPT can express; it has hidden_size /"
            " num_attention_heads only"
        )
    return config, family.layout


def hf_config(config: GPTConfig) -> tuple[dict[str, Any], Layout]:
    """Hugging Face's config.json for a GPT of ours, and how its tensors are stored. Raises ValueError where
    there is no exact equivalent.

    Dropout is left out: it is a matter of training, and Llama has none.
    """
    kind = exact_family(config, FAMILIES, "at Hugging Face")
    family = FAMILIES[kind]
    settings = {
        "model_type": kind,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    settings |= {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
    if kind == "gpt2":
        activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.mlp]
        settings |= {
            "architectures": ["GPT2LMHeadModel"],
            "n_inner": config.mlp_hidden,
            "activation_function": activation,
        }
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        settings |= {
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "intermediate_size": config.hidden,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rope_theta": config.rope_theta,
            "rope_scaling": None,
            "attention_bias": config.bias,
            **({"use_sliding_window": False} if kind == "qwen3" else {"mlp_bias": config.bias}),
        }
    return settings, family.layout


_GGUF_FIELDS = dict(
    block_size="context_length",
    n_layer="block_count",
    n_head="attention.head_count",
    n_embd="embedding_length",
    mlp_hidden="feed_forward_length",
)
GGUF_FAMILIES = {
    "gpt2": Family(
        GGUF_GPT2,
        dict(norm="layernorm", position="learned", mlp="gelu_tanh", bias=True),
        _GGUF_FIELDS | dict(norm_eps="attention.layer_norm_epsilon"),
        {"attention.causal": True},
    ),
    "llama": Family(
        GGUF_LLAMA,
        dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False),
        _GGUF_FIELDS | dict(norm_eps="attention.layer_norm_rms_epsilon"),
        {"attention.causal": True, "rope.scaling.type": "none", "expert_count": 0},
    ),
}
GGUF_FAMILIES["qwen3"] = replace(
    GGUF_FAMILIES["llama"], layout=GGUF_QWEN3, always=GGUF_FAMILIES["llama"].always | dict(qk_norm=True)
)
_HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_OPTIONAL = {"attention.head_count_kv", "rope.freq_base", "vocab_size", *_HEAD_SIZES}


def config_from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, tied: bool, where: str
) -> tuple[GPTConfig, Layout]:
    """The GPT that a GGUF file's metadata describes, and how its tensors are stored. vocab_size and tied:
    read off its tensors.

    Raises ValueError for what our GPT cannot express.
    """
    arch = metadata.get("general.architecture")
    if arch not in tuple(GGUF_FAMILIES):
        raise ValueError(f"{where}: architecture {arch!r} is not one of {', '.join(GGUF_FAMILIES)}")
    family = GGUF_FAMILIES[arch]
    values = {
        name.removeprefix(f"{arch}."): value
        for name, value in metadata.items()
        if name.startswith(f"{arch}.")
    }
    unknown = values.keys() - family.fields.values() - family.only.keys() - _OPTIONAL
    refuse(
        [f"{arch}.{name}={values[name]!r} is more than our GPT can express" for name in sorted(unknown)],
        where,
    )
    heads, kv_heads = (values.get(f"attention.{name}") for name in ("head_count", "head_count_kv"))
    more = (
        {"rope_theta": values.get("rope.freq_base", 10000.0)} if family.always["position"] == "rope" else {}
    )
    config = family.config(
        values,
        where,
        vocab_size=vocab_size,
        tie_weights=tied,
        n_kv_head=None if kv_heads == heads else kv_heads,
        **more,
    )
    other = [name for name in _HEAD_SIZES if values.get(name, config.head_dim) != config.head_dim]
    refuse(
        [
            f"{arch}.{name}={values[name]!r}: our GPT has embedding_length / head_count = {config.head_dim}"
            " only"
            for name in other
        ],
        where,
    )
    return config, family.layout


# ---- tokenizers

SMOLLM_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""SmolLM2's: every digit on its own, and what lies between digits as GPT-2's pattern cuts it."""
DEFAULT_PATTERN = (
    r"[\p{P}$+<=>^~|]+|'(?:[sdmt]|ll|ve|re)| ?\p{L}+|[0-9]{3}|(?:(?![0-9]{3})\p{N})+|"
    r" ?[^\s\p{L}\p{N}\p{P}$+<=>^~|]+"
    r"|\s+(?![^\s\p{P}$+<=>^~|])|\s+"
)
"""What llama.cpp does for `default`: runs of punctuation, then GPT-2's pattern, then numbers in threes."""
GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN, "default": DEFAULT_PATTERN}
_GGUF_KINDS = NORMAL, CONTROL, UNUSED = 1, 3, 5
# The same rules in the syntax of Hugging Face's regular expressions, which have no possessive {1,3}+ and for
# which $ is a line's end.
SPLITS = {
    GPT4_PATTERN: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    DEFAULT_PATTERN: DEFAULT_PATTERN,
}
EVERY_CHARACTER = r"[\s\S]"
"""Cuts a text into its characters; with a vocabulary of those it is a character tokenizer."""
ESCAPED, _UNESCAPED = re.compile(r"\\(.)"), {"n": "\n", "t": "\t", "r": "\r"}
_MODEL_EXTRAS = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)
"""What a tokenizer.json may ask of its BPE and ours does not have."""


def tokenizer_from_json(values: Mapping[str, Any]) -> BPETokenizer | CharTokenizer | str:
    """A tokenizer.json as one of ours, or why ours cannot be it. Raises KeyError, TypeError, AttributeError,
    IndexError or ValueError for one that is damaged.
    """
    model, added = values["model"], values["added_tokens"]
    if (
        model.get("type") == "WordLevel"
        and not added
        and not values.get("normalizer")
        and _split(values["pre_tokenizer"]) == EVERY_CHARACTER
    ):
        return CharTokenizer("".join(sorted(model["vocab"], key=model["vocab"].__getitem__)))
    pattern = _pattern(values["pre_tokenizer"])
    unlike = [] if model.get("type", "BPE") == "BPE" else [f"its model is {model['type']}"]
    unlike += [f"its model has {name}={model[name]!r}" for name in _MODEL_EXTRAS if model.get(name)]
    unlike += ["it changes the text first (normalizer)"] if values.get("normalizer") else []
    unlike += [] if pattern else ["it cuts the text by another rule (pre_tokenizer)"]
    for token in added:
        if not token["special"] or any(token.get(name) for name in ("lstrip", "rstrip", "single_word")):
            unlike.append(
                f"the token {token['content']!r} is found in plain text, or takes the spaces round it"
            )
            break
    if unlike:
        return "; ".join(unlike)
    special = {token["content"]: token["id"] for token in added}
    return _bpe(
        model["vocab"] | special,
        [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        pattern,
        special,
    )


def tokenizer_from_merges(ids: Mapping[str, int], merges: str) -> BPETokenizer:
    """GPT-2's two files, vocab.json and the text of merges.txt, as our BPETokenizer. What no merge makes is a
    special token.
    """
    pairs = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    made = {*PRINTABLE.values(), *(pair.replace(" ", "") for pair in pairs)}
    return _bpe(ids, pairs, GPT2_PATTERN, {token: i for token, i in ids.items() if token not in made})


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Our pattern for a pre_tokenizer of tokenizer.json, or None where it is another."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not last.get("use_regex", True):
        split = _split(steps[0]) if len(steps) == 2 else None
        return next((ours for ours, theirs in SPLITS.items() if theirs == split), None)
    before = [(step.get("type"), step.get("individual_digits")) for step in steps[:-1]]
    return {(): GPT2_PATTERN, (("Digits", True),): SMOLLM_PATTERN}.get(tuple(before))


def _split(step: dict[str, Any] | None) -> str | None:
    """The regular expression whose every match is a piece, where this is such a step of a pre_tokenizer."""
    step = step or {}
    plain = step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return step["pattern"].get("Regex") if plain else None


def _bpe(
    ids: Mapping[str, int], merges: Iterable[str], pattern: str, special: Mapping[str, int]
) -> BPETokenizer:
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[t] for t in tokens] != list(range(len(tokens))):
        raise ValueError("the tokenizer's ids do not go from 0 up without a gap")
    return BPETokenizer.from_printable(tokens, merges, pattern, special)


def tokenizer_from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, where: str
) -> BPETokenizer | CharTokenizer | None:
    """The tokenizer in a GGUF file's metadata as ours, None where there is none. Raises ValueError for one
    that ours cannot be.
    """
    values = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    if "model" not in values:
        return None
    if values["model"] == "rwkv":
        return _characters(values, where)
    problems = (
        [f"its tokenizer is {values['model']!r}, and ours can only be 'gpt2' (byte-level BPE)"]
        if values["model"] != "gpt2"
        else []
    )
    if values.get("pre") not in tuple(GGUF_PATTERNS):
        problems.append(
            f"its tokenizer's rule for cutting text, tokenizer.ggml.pre={values.get('pre')!r}, is not one of"
            f" {', '.join(GGUF_PATTERNS)}"
        )
    problems += ["its tokenizer puts a space before the text"] if values.get("add_space_prefix") else []
    problems += [
        f"its tokenizer lacks {name}"
        for name in ("tokens", "token_type", "merges")
        if not isinstance(values.get(name), list)
    ]
    refuse(problems, where)
    tokens, kinds = values["tokens"], values["token_type"]
    if len(tokens) != len(kinds) or len(tokens) > vocab_size:
        raise ValueError(
            f"{where}: {len(tokens)} tokens with {len(kinds)} kinds do not fit a model of {vocab_size} tokens"
        )
    strange = next((i for i, kind in enumerate(kinds) if kind not in _GGUF_KINDS), None)
    if strange is not None:
        raise ValueError(
            f"{where}: the token {tokens[strange]!r} is of kind {kinds[strange]!r}, which our tokenizer does"
            " not have"
        )
    special = {token: i for i, token in enumerate(tokens) if kinds[i] != NORMAL}
    try:
        return BPETokenizer.from_printable(tokens, values["merges"], GGUF_PATTERNS[values["pre"]], special)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its tokenizer is damaged: {error}") from None


def _characters(values: Mapping[str, Any], where: str) -> CharTokenizer:
    """A tokenizer that takes the longest token each time, as ours where all tokens are single characters."""
    kinds = values.get("token_type") or []
    tokens = [
        ESCAPED.sub(lambda found: _UNESCAPED.get(found[1], found[1]), token)
        for token, kind in zip(values.get("tokens") or [], kinds)
        if kind == NORMAL
    ]
    if not tokens or any(len(token) != 1 for token in tokens) or NORMAL in kinds[len(tokens) :]:
        raise ValueError(
            f"{where}: its tokenizer is 'rwkv', which ours can only be where each token is one character"
        )
    return CharTokenizer("".join(tokens))
