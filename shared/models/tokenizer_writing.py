"""Week 6. Our tokenizers as others write them: Hugging Face's tokenizer.json, and a GGUF file's metadata.

They give the same ids there: text is cut by the same rule and merged in the same order, and nothing is added
at either end but the token that every text begins with, where the tokenizer has one. What a format cannot
express exactly is refused. One difference remains: Hugging Face and llama.cpp take a special token's text for
the token, as ours do with `allowed_special="all"`.

>>> from shared.tokenizers import CharTokenizer
>>> gguf_tokenizer(CharTokenizer("\\nab"), 3)["tokens"]
['\\\\n', 'a', 'b']

Sources: the file format of the library `tokenizers`; the GGUF specification, and llama.cpp's vocabularies for
what each kind means.
"""

from typing import Any

from shared.models.chat import CHAT_TEMPLATE, IM_END, IM_START, is_chat
from shared.models.tokenizer_files import (
    CONTROL,
    EVERY_CHARACTER,
    GGUF_PATTERNS,
    NORMAL,
    SMOLLM_PATTERN,
    SPLITS,
    UNUSED,
)
from shared.tokenizers import BPETokenizer, CharTokenizer, Tokenizer
from shared.tokenizers.bpe import END_OF_TEXT, GPT2_PATTERN, to_printable

USE_GPT2_PATTERN = "train the tokenizer with GPT2_PATTERN (shared.tokenizers.bpe), which all have"
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


def _printable_tokens(tokenizer: BPETokenizer) -> list[str]:
    """The tokens by id as vocabulary files write them. Raises ValueError where two are written alike."""
    special = set(tokenizer.special_tokens.values())
    tokens = [token.decode() if i in special else to_printable(token) for i, token in tokenizer.vocab.items()]
    for token in sorted(tokenizer.special_tokens):
        if tokens.count(token) > 1:
            raise ValueError(
                f"the special token {token!r} is written like an ordinary one, which no other format can tell"
                " apart: give it another text"
            )
    return tokens


def _merges(tokenizer: BPETokenizer) -> list[str]:
    return [f"{to_printable(a)} {to_printable(b)}" for a, b in tokenizer.merges]


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json.

    One difference remains: a byte that a BPE's vocabulary lacks (SmolLM2's has no 0x04) is an error with
    ours, and left out by theirs. Raises ValueError for a kind of tokenizer, or a rule for cutting text, that
    cannot be expressed exactly.
    """
    if isinstance(tokenizer, CharTokenizer):
        model, pre_tokenizer, decoder = _hf_characters(tokenizer)
    elif isinstance(tokenizer, BPETokenizer):
        model, pre_tokenizer, decoder = _hf_bpe(tokenizer)
    else:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no equivalent at Hugging Face: there are CharTokenizer and"
            " BPETokenizer"
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": _hf_before(tokenizer),
        "added_tokens": _hf_added_tokens(tokenizer),
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": model,
    }


_Section = dict[str, Any]
"""A section of tokenizer.json."""


def _hf_characters(tokenizer: CharTokenizer) -> tuple[_Section, _Section, _Section]:
    """The sections model, pre_tokenizer and decoder."""
    vocab = {char: i for i, char in enumerate(tokenizer.chars)}
    # The model's unknown token is not in the vocabulary: another character is an error, as with ours.
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"}
    return model, _split(EVERY_CHARACTER), {"type": "Fuse"}


def _hf_bpe(tokenizer: BPETokenizer) -> tuple[_Section, _Section, _Section]:
    """The sections model, pre_tokenizer and decoder."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(_printable_tokens(tokenizer))},
        "merges": _merges(tokenizer),
    }
    return model, _hf_cuts(tokenizer.pattern), _byte_level()


def _hf_cuts(pattern: str) -> _Section:
    """The section pre_tokenizer that cuts text as `pattern` does."""
    if pattern == GPT2_PATTERN:
        return _byte_level()
    if pattern == SMOLLM_PATTERN:
        return _in_turn({"type": "Digits", "individual_digits": True}, _byte_level())
    if pattern in SPLITS:
        return _in_turn(_split(SPLITS[pattern]), _byte_level(use_regex=False))
    raise ValueError(
        f"the rule {pattern!r} for cutting text has no known equivalent at Hugging Face: {USE_GPT2_PATTERN}"
    )


def _byte_level(use_regex: bool = True) -> _Section:
    """Bytes as printable characters; use_regex: text is cut as by GPT-2 first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _hf_before(tokenizer: CharTokenizer | BPETokenizer) -> _Section | None:
    """The section post_processor: the token that every text begins with, where there is one."""
    token = tokenizer.begins_with
    if token is None:
        return None
    first, second = (
        [{"SpecialToken": {"id": token, "type_id": i}}, {"Sequence": {"id": name, "type_id": i}}]
        for i, name in enumerate("AB")
    )
    own = {"id": token, "ids": [tokenizer.special_tokens[token]], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {token: own},
    }


def _split(regex: str) -> _Section:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _in_turn(*steps: _Section) -> _Section:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _hf_added_tokens(tokenizer: CharTokenizer | BPETokenizer) -> list[dict[str, Any]]:
    """The special tokens, by id. They are found in any text, whatever stands around them."""
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, i in sorted(tokenizer.special_tokens.items(), key=lambda pair: pair[1])
    ]


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
    UTF-8 text contains. Raises ValueError for a kind of tokenizer, or a rule for cutting text, that llama.cpp
    does not have.
    """
    if isinstance(tokenizer, CharTokenizer):
        values = _gguf_characters(tokenizer)
    elif isinstance(tokenizer, BPETokenizer):
        values = _gguf_bpe(tokenizer)
    else:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no equivalent in GGUF: there are CharTokenizer and"
            " BPETokenizer"
        )
    tokens = values["tokens"]
    special = set(tokenizer.special_tokens.values())
    kinds = [CONTROL if i in special else NORMAL for i in range(len(tokens))]
    padding = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]  # rows of the embedding beyond the tokens
    values["token_type"] = kinds + [UNUSED] * len(padding)
    values["tokens"] = tokens + padding
    values["add_bos_token"] = tokenizer.begins_with is not None
    values["add_eos_token"] = False
    if is_chat(tokenizer):
        values["chat_template"] = chat_template_of(tokenizer)
    return values


def _gguf_characters(tokenizer: CharTokenizer) -> dict[str, Any]:
    """RWKV's tokenizer takes the longest token each time: with single characters it is ours.

    It ends a text at no token unless told.
    """
    escapes = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return {"model": "rwkv", "tokens": [escapes.get(char, char) for char in tokenizer.chars]}


def _gguf_bpe(tokenizer: BPETokenizer) -> dict[str, Any]:
    rule = next((name for name, pattern in GGUF_PATTERNS.items() if pattern == tokenizer.pattern), None)
    if rule is None:
        raise ValueError(
            f"the rule {tokenizer.pattern!r} for cutting text is none of llama.cpp's: {USE_GPT2_PATTERN}"
        )
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": rule,
        "tokens": _printable_tokens(tokenizer),
        "merges": _merges(tokenizer),
    }
    for role, i in _gguf_roles(tokenizer).items():
        values[f"{role}_token_id"] = i
    return values


def _gguf_roles(tokenizer: BPETokenizer) -> dict[str, int]:
    """Ids of special tokens by GGUF's names of their roles.

    Without special tokens for them, a byte that no UTF-8 text contains begins a text and ends it.
    """
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    roles = special_roles(tokenizer)
    ids = {names[role]: tokenizer.special_tokens[token] for role, token in roles.items()}
    if "eos" in ids:
        return ids
    byte_ids = {token: i for i, token in tokenizer.vocab.items()}
    for byte in NEVER_IN_TEXT:
        unused = byte_ids.get(bytes([byte]))
        if unused is not None:
            return {"bos": unused, "eos": unused} | ids
    raise ValueError(
        "llama.cpp needs a token that ends a text, and this tokenizer has none: give it the special"
        f" token {END_OF_TEXT!r}"
    )
