"""Week 6. What others' tokenizer files ask for beside ids of a plain text: tokens before and after it, a chat
template, a rule for decoding.

Of these ours has one special token before a text (`Tokenizer.begins_with`), those at which a text ends
(`ends`), and the chat template (`chat`). All else is left out, and named, so that whoever loads a model can
say so: of a file's fields, those count as read that are listed here, and any other that is set is named as
left out.

Sources: the file format of the library `tokenizers`; transformers' tokenizer_config.json; the GGUF
specification, and llama.cpp for what its defaults are.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from shared.models.chat import IM_END, is_known_template
from shared.tokenizers.base import Chat
from shared.tokenizers.bpe import END_OF_TEXT

READ_OF_JSON = {
    "version",
    "truncation",
    "padding",
    "added_tokens",
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
}
"""The sections of tokenizer.json; another one is named as left out."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
READ_OF_CONFIG = {
    *ROLES,
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "chat_template",
}
WITHOUT_EFFECT = {
    "auto_map",
    "backend",
    "errors",
    "is_local",
    "legacy",
    "local_files_only",
    "max_length",
    "model_input_names",
    "model_max_length",
    "model_specific_special_tokens",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding_side",
    "processor_class",
    "special_tokens_map_file",
    "stride",
    "tokenizer_class",
    "tokenizer_file",
    "truncation_side",
    "truncation_strategy",
    "use_fast",
    "vocab_size",
}
"""Fields of tokenizer_config.json that change neither the ids of one text nor what they decode to."""
READ_OF_GGUF = {
    "model",
    "pre",
    "tokens",
    "token_type",
    "merges",
    "scores",  # of other kinds of tokenizers; some files have them all the same
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
}
"""Fields of tokenizer.ggml; ids of roles (…_token_id) are read too."""


class Ends(NamedTuple):
    """What is to stand before a text and at its end, how conversations are written, and what is left out."""

    begins_with: str | None
    ends: tuple[str, ...]
    chat: Chat | None
    left_out: list[str]

    @property
    def of_tokenizer(self) -> dict[str, Any]:
        """What `BPETokenizer` takes of it, beside `begins_with`."""
        return {"ends": self.ends, "chat": self.chat}


def content(token: Any) -> str | None:
    """The text of a token that a file gives as a text, or as an object with more about it."""
    return token.get("content") if isinstance(token, dict) else token


def named_special(config: Mapping[str, Any]) -> list[str]:
    """The special tokens that a tokenizer_config.json names, each once."""
    tokens = [config.get(role) for role in ROLES if role != "unk_token"]  # of bytes none is unknown
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or []
        tokens += more.values() if isinstance(more, dict) else more
    return [token for token in dict.fromkeys(map(content, tokens)) if token is not None]


def ends_of_json(
    values: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    special: Mapping[str, int],
    template: str | None,
) -> Ends:
    """What a tokenizer.json, and the tokenizer_config.json beside it, ask for round a text.

    values: None where there is no tokenizer.json; only then transformers heeds the configuration's
    `add_bos_token`. special: the special tokens by their texts. template: the chat template of a file of its
    own.
    """
    left_out: list[str] = []
    roles = {role: text for role in ROLES if (text := content(config.get(role))) is not None}
    if values is None:
        before, after, unclear = _added_by_config(config, special)
    else:
        left_out += [
            f"{name} (tokenizer.json)" for name in values if name not in READ_OF_JSON and values[name]
        ]
        left_out += [f"{name} of texts" for name in ("truncation", "padding") if values.get(name)]
        left_out += _decoding(values.get("decoder"))
        before, after, unclear = _added_around(values.get("post_processor"))
    begins_with, more = _one_before(before, after, special)
    left_out += unclear + more + _left_out_of_config(config, special)
    chat = _chat(template or config.get("chat_template"), roles)
    return Ends(begins_with, _own_ends([roles.get("eos_token")], special), chat, left_out)


def _added_by_config(
    config: Mapping[str, Any], special: Mapping[str, int]
) -> tuple[list[int], list[int], list[str]]:
    ids: dict[str, list[int]] = {"bos": [], "eos": []}
    unclear = []
    for role, added in ids.items():
        if not config.get(f"add_{role}_token"):
            continue
        token = content(config.get(f"{role}_token", END_OF_TEXT))  # transformers' default for a GPT-2
        if token is not None and token in special:
            added.append(special[token])
        elif token is not None:
            unclear.append(f"{role}_token={token!r}, which is to be added to texts and is no special token")
    return ids["bos"], ids["eos"], unclear


def _added_around(processor: Mapping[str, Any] | None) -> tuple[list[int], list[int], list[str]]:
    """Ids that a post_processor puts before and after a text, and what of it is not understood."""
    if processor is None:
        return [], [], []
    kind = processor["type"]
    if kind == "ByteLevel":  # changes offsets only
        return [], [], []
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]], []
    if kind == "Sequence":
        adding = [added for added in map(_added_around, processor["processors"]) if any(added)]
        if len(adding) > 1:  # what one does to the tokens of another is not simply to add its own
            return [], [], [f"what {len(adding)} steps of its post_processor do together"]
        return adding[0] if adding else ([], [], [])
    if kind == "TemplateProcessing":
        return _added_by_template(processor)
    return [], [], [f"what its post_processor of type {kind!r} does"]


def _added_by_template(processor: Mapping[str, Any]) -> tuple[list[int], list[int], list[str]]:
    ids: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            ids[min(texts, 1)].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if texts != 1:
        return [], [], [f"a post_processor that writes a text {texts} times"]
    return *ids, []


def _one_before(
    before: list[int], after: list[int], special: Mapping[str, int]
) -> tuple[str | None, list[str]]:
    """The one special token that is to stand first, and what ours cannot add."""
    names = {i: token for token, i in special.items()}
    left_out = []
    begins_with = None
    if len(before) == 1 and before[0] in names:
        begins_with = names[before[0]]
    elif before:
        left_out.append(f"the tokens before a text ({_named(before, names)})")
    if after:
        left_out.append(f"the tokens after a text ({_named(after, names)})")
    return begins_with, left_out


def _named(ids: list[int], names: Mapping[int, str]) -> str:
    return ", ".join(repr(names[i]) if i in names else str(i) for i in ids)


def _decoding(decoder: Mapping[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    steps = decoder.get("decoders", [decoder])
    others = [step["type"] for step in steps if step["type"] not in ("ByteLevel", "Fuse")]
    return [f"its rule for decoding ({', '.join(others)})"] if others else []


def _left_out_of_config(config: Mapping[str, Any], special: Mapping[str, int]) -> list[str]:
    read = READ_OF_CONFIG | WITHOUT_EFFECT
    left_out = [f"{name} (tokenizer_config.json)" for name in config if name not in read and config[name]]
    absent = [repr(token) for token in named_special(config) if token not in special]
    if absent:
        left_out.append(f"special tokens without an id ({', '.join(absent)})")
    return left_out


def _own_ends(tokens: Iterable[str | None], special: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the tokens that are special ones, but for the ends that the course's programs know anyway."""
    named = dict.fromkeys(token for token in tokens if token is not None and token in special)
    return () if set(named) <= {END_OF_TEXT, IM_END} else tuple(named)


def _chat(template: Any, roles: Mapping[str, str]) -> Chat | None:
    """A chat template with what it may name. Of several, the one called "default"."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    if not template or is_known_template(template):
        return None
    return Chat(str(template), dict(roles))


def ends_of_gguf(
    metadata: Mapping[str, Any], special: Mapping[str, int], usual: Mapping[str, Any] = MappingProxyType({})
) -> Ends:
    """What a GGUF file's metadata puts before a text, and what is left out. special: as in `ends_of_json`.
    usual: what holds for fields of tokenizer.ggml that the file does not have.
    """
    left_out = []
    values = dict(usual)
    for key, value in metadata.items():
        name = key.removeprefix("tokenizer.ggml.")
        if name != key:
            values[name] = value
            if name not in READ_OF_GGUF and not name.endswith("_token_id") and value:
                left_out.append(key)
        elif key.startswith("tokenizer.") and key != "tokenizer.chat_template":
            left_out.append(key)
    before = [values.get("bos_token_id", -1)] if values.get("add_bos_token") else []
    after = [values.get("eos_token_id", -1)] if values.get("add_eos_token") else []
    begins_with, more = _one_before(before, after, special)
    tokens = values.get("tokens", [])
    roles = {
        f"{role}_token": tokens[i]
        for role in ("bos", "eos", "eot", "eom")
        if (i := values.get(f"{role}_token_id")) is not None and 0 <= i < len(tokens)
    }
    ends = _own_ends([roles.get(f"{role}_token") for role in ("eos", "eot", "eom")], special)
    chat = _chat(metadata.get("tokenizer.chat_template"), roles)
    return Ends(begins_with, ends, chat, left_out + more)
