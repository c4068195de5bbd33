"""Week 6. Our tokenizers as others write them: what stands beside Hugging Face's tokenizer.json, and a GGUF
file's metadata. The tokenizer.json itself each tokenizer writes (`shared.tokenizers.base`).

They give the same ids there: text is cut by the same rule and merged in the same order, and nothing is added
at either end but the token that every text begins with, where the tokenizer has one. What a format cannot
express exactly is refused. One difference remains: Hugging Face and llama.cpp take a special token's text for
the token, as ours do with `allowed_special="all"`.

>>> from shared.tokenizers import CharTokenizer
>>> gguf_tokenizer(CharTokenizer("\\nab"), 3)["tokens"]
['\\\\n', 'a', 'b']

Sources: transformers' tokenizer_config.json; the GGUF specification, and llama.cpp's vocabularies for what
each kind means.
"""

from typing import Any

from shared.models.chat import CHAT_TEMPLATE, IM_END, IM_START, is_chat
from shared.models.tokenizer_gguf import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, gguf_rule
from shared.tokenizers import (
    BPETokenizer,
    CharTokenizer,
    MergingTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from shared.tokenizers.bpe import END_OF_TEXT
from shared.tokenizers.patterns import USE_GPT2_PATTERN
from shared.tokenizers.sentencepiece import UNKNOWN_TOKEN

NO_SCORE = -1e4
"""Of tokens that are not made by merging: below all others."""
NEVER_IN_TEXT = (0xFF, 0xFE, 0xC0, 0xC1, *range(0xF5, 0xFE))
"""Bytes that no UTF-8 text contains."""


def special_roles(tokenizer: Tokenizer) -> dict[str, str]:
    """Which special tokens begin a text, end it and fill up a batch, by role ("bos", "eos", "pad").

    Those that its model's files named, or else SmolLM2's or GPT-2's, where it has them.
    """
    roles = {}
    if tokenizer.chat is not None or tokenizer.ends:
        named = {} if tokenizer.chat is None else tokenizer.chat.tokens
        roles = {role: named[f"{role}_token"] for role in ("bos", "eos", "pad") if f"{role}_token" in named}
        for role in ("eos", "pad"):
            if tokenizer.ends:
                roles.setdefault(role, tokenizer.ends[0])
    elif is_chat(tokenizer):
        roles = {"bos": IM_START, "eos": IM_END, "pad": IM_END}
    elif END_OF_TEXT in tokenizer.special_tokens:
        roles = dict.fromkeys(("bos", "eos", "pad"), END_OF_TEXT)
    if tokenizer.begins_with is not None:
        roles["bos"] = tokenizer.begins_with
    return roles


def chat_template_of(tokenizer: Tokenizer) -> str:
    """The chat template to write beside a model that converses."""
    return CHAT_TEMPLATE if tokenizer.chat is None else tokenizer.chat.template


def hf_tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """The content of tokenizer_config.json: what AutoTokenizer needs beside tokenizer.json."""
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        # Else transformers 4 makes token_type_ids, which GPT-2 adds to its input and Llama refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for role, token in special_roles(tokenizer).items():
        values[f"{role}_token"] = token
    if is_chat(tokenizer):
        values["chat_template"] = chat_template_of(tokenizer)
    return values


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A GGUF file's metadata for a model of `vocab_size` tokens, by key without its prefix.

    The prefix is `tokenizer.` for `chat_template`, and `tokenizer.ggml.` for all else. llama.cpp ends a text
    at token 11 where a byte-level BPE names no end: without a special token, the end is then a byte that no
    UTF-8 text contains. Two differences remain: llama.cpp does not bring text into the form NFC (Qwen's), and
    of two pairs that overlap and would make the same token it merges the left one, where a SentencePiece
    tokenizer with merges takes the one that it lists first. Raises ValueError for a kind of tokenizer, or a
    rule for cutting text, that llama.cpp does not have.
    """
    if isinstance(tokenizer, MergingTokenizer) and (tokenizer.added.lstrip or tokenizer.added.rstrip):
        token = min(tokenizer.added.lstrip | tokenizer.added.rstrip)
        raise ValueError(f"the token {token!r} takes the white space beside it, which GGUF cannot say")
    if isinstance(tokenizer, CharTokenizer):
        values = _gguf_characters(tokenizer)
    elif isinstance(tokenizer, BPETokenizer):
        values = _gguf_bpe(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        values = _gguf_sentencepiece(tokenizer)
    else:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no equivalent in GGUF: there are CharTokenizer, BPETokenizer"
            " and SentencePieceTokenizer"
        )
    tokens = values["tokens"]
    padding = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]  # rows of the embedding beyond the tokens
    values["token_type"] = _gguf_kinds(tokenizer) + [UNUSED] * len(padding)
    values["tokens"] = tokens + padding
    if "scores" in values:
        values["scores"] = values["scores"] + [NO_SCORE] * len(padding)
    values["add_bos_token"] = tokenizer.begins_with is not None
    values["add_eos_token"] = False
    if is_chat(tokenizer):
        values["chat_template"] = chat_template_of(tokenizer)
    return values


def _gguf_kinds(tokenizer: Tokenizer) -> list[int]:
    """The kind of each token."""
    kinds = dict.fromkeys(tokenizer.vocab, NORMAL)
    if isinstance(tokenizer, SentencePieceTokenizer):
        kinds |= dict.fromkeys(tokenizer.byte_ids, BYTE)
    if isinstance(tokenizer, MergingTokenizer):
        kinds |= dict.fromkeys(tokenizer.added.plain.values(), USER_DEFINED)
    kinds |= dict.fromkeys(tokenizer.special_tokens.values(), CONTROL)
    return list(kinds.values())


def _gguf_characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    """RWKV's tokenizer takes the longest token each time: with single characters it is ours.

    It ends a text at no token unless told.
    """
    escapes = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return {"model": "rwkv", "tokens": [escapes.get(char, char) for char in tokenizer.chars]}


def _gguf_bpe(tokenizer: BPETokenizer) -> dict[str, Any]:
    rule = gguf_rule(tokenizer.pattern, tokenizer.ignore_merges)
    if rule is None:
        how = " with ignore_merges" if tokenizer.ignore_merges else ""
        raise ValueError(
            f"the rule {tokenizer.pattern!r}{how} for cutting text is none of llama.cpp's: {USE_GPT2_PATTERN}"
        )
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": rule,
        "tokens": tokenizer.written_vocab(),
        "merges": tokenizer.written_merges(tokenizer.merges),
    }
    return values | _gguf_roles(tokenizer)


def _gguf_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    if tokenizer.prefix not in ("never", "always") or tokenizer.each_space:
        how = f"prefix={tokenizer.prefix!r}" + (" with each_space" if tokenizer.each_space else "")
        raise ValueError(f"llama.cpp has no {how}: its tokenizers put a space before every part, or none")
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": tokenizer.written_vocab(),
        "scores": _scores(tokenizer),
        "add_space_prefix": tokenizer.prefix == "always",
    }
    if UNKNOWN_TOKEN in tokenizer.special_tokens:
        values["unknown_token_id"] = tokenizer.special_tokens[UNKNOWN_TOKEN]
    return values | _gguf_roles(tokenizer)


def _scores(tokenizer: SentencePieceTokenizer) -> list[float]:
    """The scores of a tokenizer, or those that lead to its merges. Raises ValueError where none do."""
    if tokenizer.scores is not None:
        return tokenizer.scores
    made = dict.fromkeys(left + right for left, right in tokenizer.merges)
    rank = {token: -float(i) for i, token in enumerate(made)}
    not_text = {*tokenizer.byte_ids, *tokenizer.special_tokens.values(), *tokenizer.added.plain.values()}
    scores = [
        NO_SCORE if i in not_text else rank.get(token, NO_SCORE) for i, token in tokenizer.vocab.items()
    ]
    by_scores = SentencePieceTokenizer(
        list(tokenizer.vocab.values()),
        tokenizer.byte_ids,
        tokenizer.special_tokens,
        scores=scores,
        added_tokens=tokenizer.added.plain,
    )
    in_groups = sorted(tokenizer.merges, key=lambda pair: -rank[pair[0] + pair[1]])
    if in_groups != tokenizer.merges or set(by_scores.merges) != set(tokenizer.merges):
        raise ValueError(
            "llama.cpp merges any two tokens that together are one, by its score, and this tokenizer only"
            " those that its merges name"
        )
    return scores


def _gguf_roles(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of special tokens by GGUF's names of their roles.

    Without special tokens for them, a byte that no UTF-8 text contains begins a text and ends it.
    """
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    roles = special_roles(tokenizer)
    ids = {names[role]: tokenizer.special_tokens[token] for role, token in roles.items()}
    if "eos_token_id" in ids:
        return ids
    byte_ids = {token: i for i, token in tokenizer.vocab.items()}
    for byte in NEVER_IN_TEXT:
        unused = byte_ids.get(bytes([byte]))
        if unused is not None:
            return {"bos_token_id": unused, "eos_token_id": unused} | ids
    raise ValueError(
        "llama.cpp needs a token that ends a text, and this tokenizer has none: give it the special"
        f" token {END_OF_TEXT!r}"
    )
