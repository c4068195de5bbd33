"""Week 6. The tokenizers in others' files as ours: tokenizer.json, vocab.json with merges.txt, and GGUF.

Ours cuts text by a pattern and merges bytes, or takes single characters. A tokenizer that does something else
is refused with the reason. `shared.models.tokenizer_writing` writes the same formats.

Sources: the file format of the library `tokenizers`; the GGUF specification; llama.cpp for its patterns.
"""

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from shared.models.families import refuse
from shared.models.tokenizer_ends import Ends, ends_of_gguf, ends_of_json, named_special
from shared.tokenizers.bpe import GPT2_PATTERN, GPT4_PATTERN, PRINTABLE, BPETokenizer
from shared.tokenizers.char import CharTokenizer

SMOLLM_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""SmolLM2's: every digit on its own, and what lies between digits as GPT-2's pattern cuts it."""
DEFAULT_PATTERN = (
    r"[\p{P}$+<=>^~|]+|'(?:[sdmt]|ll|ve|re)| ?\p{L}+|[0-9]{3}|(?:(?![0-9]{3})\p{N})+|"
    r" ?[^\s\p{L}\p{N}\p{P}$+<=>^~|]+"
    r"|\s+(?![^\s\p{P}$+<=>^~|])|\s+"
)
"""What llama.cpp does for `default`: runs of punctuation, then GPT-2's pattern, then numbers in threes."""
GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": SMOLLM_PATTERN, "default": DEFAULT_PATTERN}
"""Our patterns by the name that GGUF has for them (tokenizer.ggml.pre)."""
SPLITS = {
    GPT4_PATTERN: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    DEFAULT_PATTERN: DEFAULT_PATTERN,
}
"""Our patterns as Hugging Face's regular expressions, which have no possessive {1,3}+ and take $ for a line's
end.
"""
EVERY_CHARACTER = r"[\s\S]"
"""Cuts a text into its characters; with a vocabulary of those it is a character tokenizer."""

# GGUF's kinds of tokens (tokenizer.ggml.token_type).
NORMAL = 1
CONTROL = 3
UNUSED = 5


class UnlikeOurs(ValueError):
    """A tokenizer that ours cannot be; the message is the reason."""


class TokenizerFound(NamedTuple):
    """A tokenizer of a file's, and what the file asks for and ours does not do."""

    tokenizer: BPETokenizer | CharTokenizer | None
    left_out: list[str]


def tokenizer_from_json(
    values: Mapping[str, Any], config: Mapping[str, Any] | None = None, template: str | None = None
) -> TokenizerFound:
    """A tokenizer.json as one of ours.

    config: the tokenizer_config.json beside it. template: the chat template, where it has a file of its own.
    Raises `UnlikeOurs` where ours cannot be it; KeyError, TypeError, AttributeError, IndexError or ValueError
    for one that is damaged.
    """
    config = config or {}
    model = values["model"]
    if _is_of_characters(values):
        characters = CharTokenizer("".join(_in_order(model["vocab"])))
        return TokenizerFound(characters, ends_of_json(values, config, {}, template).left_out)
    known = {token["content"] for token in values["added_tokens"]}
    added = values["added_tokens"] + [t for t in _added_in_config(config) if t["content"] not in known]
    merges = _merges(model)
    problems = _what_ours_lacks(model, added, values.get("normalizer"), config)
    pattern = _pattern(values["pre_tokenizer"])
    if pattern is None:
        raise UnlikeOurs("; ".join([*problems, "it cuts the text by another rule (pre_tokenizer)"]))
    if problems:
        raise UnlikeOurs("; ".join(problems))
    special = {token["content"]: token["id"] for token in added}
    ends = ends_of_json(values, config, special, template)
    tokenizer = _bpe(model["vocab"] | special, merges, pattern, special, ends)
    return TokenizerFound(tokenizer, ends.left_out)


def _is_of_characters(values: Mapping[str, Any]) -> bool:
    vocab = values["model"]["vocab"]
    return (
        values["model"].get("type") == "WordLevel"
        and all(len(token) == 1 for token in vocab)
        and not values["added_tokens"]
        and not values.get("normalizer")
        and _split(values["pre_tokenizer"]) == EVERY_CHARACTER
    )


def _merges(model: Mapping[str, Any]) -> list[str]:
    """A BPE's merges as "a b"; raises KeyError for one without. None of another model."""
    if model.get("type", "BPE") != "BPE":
        return []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _in_order(ids: Mapping[str, int]) -> list[str]:
    """The tokens by id. Raises `UnlikeOurs` unless the ids go from 0 up without a gap."""
    tokens = sorted(ids, key=ids.__getitem__)
    for expected, token in enumerate(tokens):
        if ids[token] != expected:
            fault = f"no token has the id {expected}"
            if expected and ids[token] == expected - 1:
                fault = f"{tokens[expected - 1]!r} and {token!r} have one id, {ids[token]}"
            raise UnlikeOurs(f"its ids do not go from 0 up without a gap: {fault}")
    return tokens


def _added_in_config(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens that a tokenizer_config.json adds, as tokenizer.json would list them."""
    return [token | {"id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]


_MODEL_FIELDS = {"type", "vocab", "merges", "fuse_unk"}
"""What our BPE has of a tokenizer.json's; where no token is unknown, none are fused."""
_ADDED_FIELDS = {"id", "content", "normalized", "special", "__type"}
"""What our special tokens have; without a normalizer, all are as if normalized."""


def _what_ours_lacks(
    model: Mapping[str, Any], added: Iterable[Mapping[str, Any]], normalizer: Any, config: Mapping[str, Any]
) -> list[str]:
    """What a file asks for besides a rule for cutting text, which changes ids and ours does not have."""
    problems = []
    if model.get("type", "BPE") != "BPE":
        problems.append(f"its model is {model['type']}")
    problems += [
        f"its model has {name}={reprlib.repr(model[name])}"
        for name in model
        if model[name] and name not in _MODEL_FIELDS
    ]
    if normalizer:
        problems.append("it changes the text first (normalizer)")
    if config.get("add_prefix_space"):
        problems.append("it puts a space before the text (add_prefix_space)")
    for token in added:
        if not token["special"] or any(token[name] for name in token.keys() - _ADDED_FIELDS):
            problems.append(
                f"the token {token['content']!r} is found in plain text, or takes the spaces round it"
            )
            break
    return problems


def tokenizer_from_merges(
    ids: Mapping[str, int],
    merges: str,
    added: Mapping[str, int] | None = None,
    config: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> TokenizerFound:
    """GPT-2's two files, vocab.json and the text of merges.txt, as our BPETokenizer.

    added: what added_tokens.json, where there is one, adds to them. config, template: as in
    `tokenizer_from_json`. A token of vocab.json that no merge makes is a special one; one that is added must
    be said to be special. Raises as `tokenizer_from_json` does.
    """
    config = config or {}
    pairs = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    made = {*PRINTABLE.values(), *(pair.replace(" ", "") for pair in pairs)}
    special = {token: i for token, i in ids.items() if token not in made}
    roles = named_special(config)
    listed = _added_in_config(config)
    known = {token["content"] for token in listed}
    for token, i in (added or {}).items():
        if token not in known:
            listed.append({"id": i, "content": token, "special": token in roles or token in special})
    problems = _what_ours_lacks({}, listed, None, config)
    if problems:
        raise UnlikeOurs("; ".join(problems))
    special |= {token["content"]: token["id"] for token in listed}
    ends = ends_of_json(None, config, special, template)
    return TokenizerFound(_bpe({**ids, **special}, pairs, GPT2_PATTERN, special, ends), ends.left_out)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Our pattern for a pre_tokenizer of tokenizer.json, or None where it is another."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    before, last = steps[:-1], steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not last.get("use_regex", True):
        split = _split(before[0]) if len(before) == 1 else None
        return next((ours for ours, theirs in SPLITS.items() if theirs == split), None)
    if not before:
        return GPT2_PATTERN
    digits = before[0].get("type") == "Digits" and before[0].get("individual_digits") is True
    return SMOLLM_PATTERN if digits and len(before) == 1 else None


def _split(step: dict[str, Any] | None) -> str | None:
    """The regular expression whose every match is a piece, where this is such a step of a pre_tokenizer."""
    if step is None or step.get("type") != "Split":
        return None
    if step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    return step["pattern"].get("Regex")


def _bpe(
    ids: Mapping[str, int],
    merges: Iterable[str],
    pattern: str,
    special: Mapping[str, int],
    ends: Ends,
) -> BPETokenizer:
    tokens = _in_order(ids)
    return BPETokenizer.from_printable(
        tokens, merges, pattern, special, ends.begins_with, **ends.of_tokenizer
    )


def tokenizer_from_gguf(metadata: Mapping[str, Any], vocab_size: int, where: str) -> TokenizerFound:
    """The tokenizer in a GGUF file's metadata as ours, None where there is none.

    vocab_size: the model's. Raises ValueError for one that ours cannot be.
    """
    prefix = "tokenizer.ggml."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if "model" not in values:
        return TokenizerFound(None, [])
    if values["model"] == "rwkv":
        return TokenizerFound(_characters(values, where), [])
    refuse(_what_ours_lacks_in_gguf(values), where)
    tokens, kinds = values["tokens"], values["token_type"]
    if len(tokens) != len(kinds) or len(tokens) > vocab_size:
        raise ValueError(
            f"{where}: {len(tokens)} tokens with {len(kinds)} kinds do not fit a model of {vocab_size} tokens"
        )
    for token, kind in zip(tokens, kinds):
        if kind not in (NORMAL, CONTROL, UNUSED):
            raise ValueError(
                f"{where}: the token {token!r} is of kind {kind!r}, which our tokenizer does not have"
            )
    special = {token: i for i, token in enumerate(tokens) if kinds[i] != NORMAL}
    try:
        ends = ends_of_gguf(metadata, special)
        pattern = GGUF_PATTERNS[values["pre"]]
        tokenizer = BPETokenizer.from_printable(
            tokens, values["merges"], pattern, special, ends.begins_with, **ends.of_tokenizer
        )
        return TokenizerFound(tokenizer, ends.left_out)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its tokenizer is damaged: {error}") from None


def _what_ours_lacks_in_gguf(values: Mapping[str, Any]) -> list[str]:
    problems = []
    if values["model"] != "gpt2":
        problems.append(f"its tokenizer is {values['model']!r}, and ours can only be 'gpt2' (byte-level BPE)")
    if values.get("pre") not in tuple(GGUF_PATTERNS):
        problems.append(
            f"its tokenizer's rule for cutting text, tokenizer.ggml.pre={values.get('pre')!r}, is not one of"
            f" {', '.join(GGUF_PATTERNS)}"
        )
    if values.get("add_space_prefix"):
        problems.append("its tokenizer puts a space before the text")
    for name in ("tokens", "token_type", "merges"):
        if not isinstance(values.get(name), list):
            problems.append(f"its tokenizer lacks {name}")
    return problems


_ESCAPED = re.compile(r"\\(.)")
_UNESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


def _characters(values: Mapping[str, Any], where: str) -> CharTokenizer:
    """RWKV's tokenizer, which takes the longest token each time: ours where each token is one character."""
    kinds = values.get("token_type") or []
    tokens = [
        _ESCAPED.sub(lambda match: _UNESCAPED.get(match[1], match[1]), token)
        for token, kind in zip(values.get("tokens") or [], kinds)
        if kind == NORMAL
    ]
    if not tokens or any(len(token) != 1 for token in tokens) or NORMAL in kinds[len(tokens) :]:
        raise ValueError(
            f"{where}: its tokenizer is 'rwkv', which ours can only be where each token is one character"
        )
    return CharTokenizer("".join(tokens))
