"""Week 6. The tokenizers in GGUF files as ours.

Those of kind `gpt2` are byte-level BPE, those of kind `llama` SentencePiece's, which has no merges there:
two tokens are merged where together they are one, by its score. All else is refused with the reason.

Sources: the GGUF specification; llama.cpp for what its kinds mean, and for what holds where a file is silent.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.models.family import refuse
from shared.models.tokenizer_ends import ends_of_gguf
from shared.models.tokenizer_files import TokenizerFound
from shared.tokenizers.bpe import BPETokenizer
from shared.tokenizers.char import CharTokenizer
from shared.tokenizers.patterns import GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, SMOLLM_PATTERN
from shared.tokenizers.sentencepiece import SentencePieceTokenizer, byte_token, in_plain_bytes

DEFAULT_PATTERN = (
    r"[\p{P}$+<=>^~|]+|'(?:[sdmt]|ll|ve|re)| ?\p{L}+|[0-9]{3}|(?:(?![0-9]{3})\p{N})+|"
    r" ?[^\s\p{L}\p{N}\p{P}$+<=>^~|]+"
    r"|\s+(?![^\s\p{P}$+<=>^~|])|\s+"
)
"""What llama.cpp does for `default`: runs of punctuation, then GPT-2's pattern, then numbers in threes."""


class GGUFRule(NamedTuple):
    """What a value of tokenizer.ggml.pre stands for."""

    pattern: str
    ignore_merges: bool = False
    begins: bool = False
    """Whether a text begins with the token bos_token_id unless the file says otherwise."""


GGUF_RULES = {
    "gpt-2": GGUFRule(GPT2_PATTERN),
    "olmo": GGUFRule(GPT2_PATTERN),
    "smollm": GGUFRule(SMOLLM_PATTERN),
    "default": GGUFRule(DEFAULT_PATTERN),
    "llama-bpe": GGUFRule(LLAMA3_PATTERN, ignore_merges=True, begins=True),
    "smaug-bpe": GGUFRule(LLAMA3_PATTERN),
    "dbrx": GGUFRule(LLAMA3_PATTERN),
    "qwen2": GGUFRule(QWEN2_PATTERN),
}
"""By the names of tokenizer.ggml.pre; of several that are alike, the first is written."""


def gguf_rule(pattern: str, ignore_merges: bool) -> str | None:
    """llama.cpp's name for a rule; None where it has none."""
    for name, rule in GGUF_RULES.items():
        if (rule.pattern, rule.ignore_merges) == (pattern, ignore_merges):
            return name
    return None


# GGUF's kinds of tokens (tokenizer.ggml.token_type).
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
OF_BPE = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED)
OF_SENTENCEPIECE = (*OF_BPE, BYTE)
USUAL_OF_SENTENCEPIECE = {
    "add_bos_token": True,
    "add_space_prefix": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What llama.cpp takes where a file of kind `llama` does not say otherwise."""


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
    refuse(_what_ours_lacks(values), where)
    tokens, kinds = values["tokens"], values["token_type"]
    if len(tokens) != len(kinds) or len(tokens) > vocab_size:
        raise ValueError(
            f"{where}: {len(tokens)} tokens with {len(kinds)} kinds do not fit a model of {vocab_size} tokens"
        )
    known = OF_SENTENCEPIECE if values["model"] == "llama" else OF_BPE
    for token, kind in zip(tokens, kinds):
        if kind not in known:
            raise ValueError(
                f"{where}: the token {token!r} is of kind {kind!r}, which our tokenizer does not have"
            )
    try:
        if values["model"] == "llama":
            return _sentencepiece(metadata, values)
        return _bpe(metadata, values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its tokenizer is damaged: {error}") from None


def _what_ours_lacks(values: Mapping[str, Any]) -> list[str]:
    kind = values["model"]
    if kind not in ("gpt2", "llama"):
        ours = "'gpt2' (byte-level BPE) and 'llama' (SentencePiece)"
        return [f"its tokenizer is {kind!r}, and ours can only be {ours}"]
    problems = []
    needed = ["tokens", "token_type", "scores" if kind == "llama" else "merges"]
    if kind == "gpt2" and values.get("pre") not in tuple(GGUF_RULES):
        problems.append(
            f"its tokenizer's rule for cutting text, tokenizer.ggml.pre={values.get('pre')!r}, is not one of"
            f" {', '.join(GGUF_RULES)}"
        )
    if kind == "gpt2" and values.get("add_space_prefix"):
        problems.append("its tokenizer puts a space before the text")
    problems += [f"its tokenizer lacks {name}" for name in needed if not isinstance(values.get(name), list)]
    return problems


def _bpe(metadata: Mapping[str, Any], values: Mapping[str, Any]) -> TokenizerFound:
    """Byte-level BPE."""
    rule = GGUF_RULES[values["pre"]]
    special = _of_kinds(values, UNKNOWN, CONTROL, UNUSED)
    ends = ends_of_gguf(metadata, special, {"add_bos_token": rule.begins})
    tokenizer = BPETokenizer.from_printable(
        values["tokens"],
        values["merges"],
        rule.pattern,
        special,
        ends.begins_with,
        added_tokens=_of_kinds(values, USER_DEFINED),
        rstrip=_rstrip(metadata, special),
        ignore_merges=rule.ignore_merges,
        **ends.of_tokenizer,
    )
    return TokenizerFound(tokenizer, ends.left_out)


def _sentencepiece(metadata: Mapping[str, Any], values: Mapping[str, Any]) -> TokenizerFound:
    special = _of_kinds(values, UNKNOWN, CONTROL)
    added = _of_kinds(values, USER_DEFINED)
    byte_ids = _of_kinds(values, BYTE)
    missing = [name for name in map(byte_token, range(256)) if name not in byte_ids]
    if missing:
        raise ValueError(f"it has no token {missing[0]} for a byte")
    as_written = {*special.values(), *added.values()}
    vocab = [
        token.encode() if i in as_written else in_plain_bytes(token)
        for i, token in enumerate(values["tokens"])
    ]
    for byte in range(256):
        vocab[byte_ids[byte_token(byte)]] = bytes([byte])
    ends = ends_of_gguf(metadata, special, USUAL_OF_SENTENCEPIECE)
    prefix = values.get("add_space_prefix", USUAL_OF_SENTENCEPIECE["add_space_prefix"])
    tokenizer = SentencePieceTokenizer(
        vocab,
        [byte_ids[byte_token(byte)] for byte in range(256)],
        special,
        scores=values["scores"],
        prefix="always" if prefix else "never",
        begins_with=ends.begins_with,
        added_tokens=added,
        rstrip=_rstrip(metadata, special),
        **ends.of_tokenizer,
    )
    return TokenizerFound(tokenizer, ends.left_out)


def _of_kinds(values: Mapping[str, Any], *kinds: int) -> dict[str, int]:
    pairs = enumerate(zip(values["tokens"], values["token_type"]))
    return {token: i for i, (token, kind) in pairs if kind in kinds}


def _rstrip(metadata: Mapping[str, Any], special: Mapping[str, int]) -> list[str]:
    """The special tokens that take the white space behind them.

    The format cannot say it; llama.cpp knows Phi-3 by the model's name.
    """
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return []
    return [token for token in special if token not in ("<unk>", "<s>", "<|endoftext|>")]


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
