"""Week 12. Our tokenizers in the forms of others: Hugging Face's tokenizer.json, and the metadata of a GGUF
file.

Written so that the ids are the same: text is cut by the same rule and merged in the same order, nothing is
added at either end. What cannot be said exactly in a format is refused. One difference is a reader's own:
Hugging Face and llama.cpp take a special token's text for the token, as ours does with
`allowed_special="all"`.

>>> from shared.tokenizers import CharTokenizer
>>> gguf_tokenizer(CharTokenizer("\\nab"), 3)["tokens"]
['\\\\n', 'a', 'b']

Sources: the file format of the library `tokenizers`; the GGUF specification, and llama.cpp's vocabularies for
what each kind means.
"""

from typing import Any

from shared.models.chat import IM_END, IM_START, SMOLLM_SYSTEM, is_chat
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

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{"
    f" '{IM_START}system\\n{SMOLLM_SYSTEM}{IM_END}\\n' }}}}{{% endif %}}{{{{ '{IM_START}' + message['role'] +"
    f" '\\n' + message['content'] + '{IM_END}\\n' }}}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{"
    f" '{IM_START}assistant\\n' }}}}{{% endif %}}"
)
"""What `chat_prompt` does, in Jinja."""
USE_GPT2S = "train the tokenizer with GPT2_PATTERN (shared.tokenizers.bpe), which all have"
NEVER_IN_TEXT = (0xFF, 0xFE, 0xC0, 0xC1, *range(0xF5, 0xFE))
"""Bytes that no UTF-8 text contains."""


def special_roles(tokenizer: Tokenizer) -> dict[str, str]:
    """Which special tokens begin a text, end it and fill up a batch, by role ("bos", "eos", "pad"); none for
    a tokenizer without.
    """
    known = tokenizer.special_tokens
    if is_chat(tokenizer):
        return {"bos": IM_START, "eos": IM_END, "pad": IM_END}
    return dict.fromkeys(("bos", "eos", "pad"), END_OF_TEXT) if END_OF_TEXT in known else {}


def _printable_tokens(tokenizer: BPETokenizer) -> list[str]:
    """The tokens by id as vocabulary files write them. Raises ValueError where two are written alike."""
    special = set(tokenizer.special_tokens.values())
    tokens = [token.decode() if i in special else to_printable(token) for i, token in tokenizer.vocab.items()]
    twice = next((token for token in sorted(tokenizer.special_tokens) if tokens.count(token) > 1), None)
    if twice is not None:
        raise ValueError(
            f"the special token {twice!r} is written like an ordinary one, which no other format can tell"
            " apart: give it another text"
        )
    return tokens


def _merges(tokenizer: BPETokenizer) -> list[str]:
    return [f"{to_printable(a)} {to_printable(b)}" for a, b in tokenizer.merges]


# ---- Hugging Face


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json. Raises ValueError for a kind, or a rule for cutting text, that cannot be
    written exactly.

    One difference is left: a byte that a BPE's vocabulary lacks (SmolLM2's has no 0x04) is an error with
    ours, and left out by theirs.
    """
    if isinstance(tokenizer, CharTokenizer):
        vocab = {char: i for i, char in enumerate(tokenizer.chars)}
        # The model's unknown token is not in the vocabulary: another character is an error, as with ours.
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<|unknown|>"}
        return _hf(model, _split(EVERY_CHARACTER), {"type": "Fuse"}, {})
    if not isinstance(tokenizer, BPETokenizer):
        raise ValueError(
            f"a {type(tokenizer).__name__} has no equivalent at Hugging Face: there are CharTokenizer and"
            " BPETokenizer"
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if tokenizer.pattern == GPT2_PATTERN:
        steps = byte_level
    elif tokenizer.pattern == SMOLLM_PATTERN:
        steps = _in_turn({"type": "Digits", "individual_digits": True}, byte_level)
    elif tokenizer.pattern in SPLITS:
        steps = _in_turn(_split(SPLITS[tokenizer.pattern]), byte_level | {"use_regex": False})
    else:
        raise ValueError(
            f"the rule {tokenizer.pattern!r} for cutting text has no known equivalent at Hugging Face:"
            f" {USE_GPT2S}"
        )
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
    return _hf(model, steps, byte_level, tokenizer.special_tokens)


def _hf(
    model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any], special: dict[str, int]
) -> dict[str, Any]:
    kinds = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": i, "content": token, **kinds} for token, i in sorted(special.items(), key=lambda pair: pair[1])
    ]
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {
        "version": "1.0",
        **nothing,
        "added_tokens": added,
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": model,
    }


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _in_turn(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def hf_tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """The content of tokenizer_config.json: what AutoTokenizer needs beside tokenizer.json."""
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    values |= {f"{role}_token": token for role, token in special_roles(tokenizer).items()}
    return values | ({"chat_template": CHAT_TEMPLATE} if is_chat(tokenizer) else {})


# ---- GGUF


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata under `tokenizer.ggml.` for a model of `vocab_size` tokens, and `chat_template`, which
    stands under `tokenizer.`.

    llama.cpp ends a text at token 11 where a byte-level BPE names no end: without a special token the end is
    then a byte that no UTF-8 text contains. Raises ValueError for a kind, or a rule for cutting text, that
    llama.cpp does not have.
    """
    values: dict[str, Any] = {"add_bos_token": False, "add_eos_token": False}
    if isinstance(tokenizer, CharTokenizer):
        # RWKV's tokenizer takes the longest token each time; with single characters it is ours. It has no end
        # of text unless told.
        escapes = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        values |= {"model": "rwkv", "tokens": [escapes.get(char, char) for char in tokenizer.chars]}
        special: set[int] = set()
    elif isinstance(tokenizer, BPETokenizer):
        pre = next((name for name, pattern in GGUF_PATTERNS.items() if pattern == tokenizer.pattern), None)
        if pre is None:
            raise ValueError(
                f"the rule {tokenizer.pattern!r} for cutting text is none of llama.cpp's: {USE_GPT2S}"
            )
        values |= {
            "model": "gpt2",
            "pre": pre,
            "tokens": _printable_tokens(tokenizer),
            "merges": _merges(tokenizer),
        }
        special = set(tokenizer.special_tokens.values())
        roles = {
            "padding" if role == "pad" else role: tokenizer.special_tokens[t]
            for role, t in special_roles(tokenizer).items()
        }
        values |= {
            f"{role}_token_id": i for role, i in (roles or _end_without_special_token(tokenizer)).items()
        }
    else:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no equivalent in GGUF: there are CharTokenizer and"
            " BPETokenizer"
        )
    left_over = range(len(values["tokens"]), vocab_size)  # rows of the embedding that were added for speed
    values["token_type"] = [CONTROL if i in special else NORMAL for i in range(len(values["tokens"]))] + [
        UNUSED
    ] * len(left_over)
    values["tokens"] += [f"[PAD{i}]" for i in left_over]
    return values | ({"chat_template": CHAT_TEMPLATE} if is_chat(tokenizer) else {})


def _end_without_special_token(tokenizer: BPETokenizer) -> dict[str, int]:
    ids = {token: i for i, token in tokenizer.vocab.items()}
    unused = next((ids[bytes([b])] for b in NEVER_IN_TEXT if bytes([b]) in ids), None)
    if unused is None:
        raise ValueError(
            "llama.cpp needs a token that ends a text, and this tokenizer has none: give it the special"
            f" token {END_OF_TEXT!r}"
        )
    return {"bos": unused, "eos": unused}
