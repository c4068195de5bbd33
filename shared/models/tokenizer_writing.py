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

from collections import Counter
from operator import itemgetter
from typing import Any

from shared.models.chat import CHAT_TEMPLATE, IM_END, IM_START, is_chat
from shared.models.tokenizer_files import (
    PREPEND_SPACE,
    REPLACE_SPACES,
    SPLIT_AT_SPACES,
    byte_token,
    decoder_steps,
)
from shared.models.tokenizer_gguf import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from shared.models.tokenizer_patterns import (
    EVERY_CHARACTER,
    byte_level,
    gguf_rule,
    isolated,
    pre_tokenizer_of,
)
from shared.tokenizers import (
    BPETokenizer,
    CharTokenizer,
    MergingTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from shared.tokenizers.bpe import END_OF_TEXT, to_printable
from shared.tokenizers.sentencepiece import SPACE

USE_GPT2_PATTERN = "train the tokenizer with GPT2_PATTERN (shared.tokenizers.bpe), which all have"
UNKNOWN_TOKEN = "<unk>"
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


def _written(tokenizer: MergingTokenizer) -> list[str]:
    """The tokens by id as vocabulary files write them. Raises ValueError where two are written alike."""
    as_texts = {
        i: token for tokens in (tokenizer.added.plain, tokenizer.added.special) for token, i in tokens.items()
    }
    tokens = [
        as_texts[i] if i in as_texts else _write(tokenizer, i, token) for i, token in tokenizer.vocab.items()
    ]
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        kind = "special token" if token in tokenizer.special_tokens else "token"
        raise ValueError(
            f"the {kind} {token!r} is written like an ordinary one, which no other format can tell"
            " apart: give it another text"
        )
    return tokens


def _write(tokenizer: MergingTokenizer, i: int, token: bytes) -> str:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return byte_token(token[0]) if i in tokenizer.byte_ids else _with_marked_spaces(token)
    return to_printable(token)


def _with_marked_spaces(token: bytes) -> str:
    return token.decode().replace(" ", SPACE)


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json.

    Two differences remain. A byte that a byte-level vocabulary lacks (SmolLM2's has no 0x04) is an error with
    ours, and left out by theirs. And where a SentencePiece tokenizer has scores, and two pairs that overlap
    would make the same token (ha|haha|ha), ours merges the left one, and theirs the one whose ids come first.
    Raises ValueError for a kind of tokenizer, or a rule for cutting text, that cannot be expressed exactly.
    """
    normalizer: _Section | None = None
    pre_tokenizer: _Section | None
    if isinstance(tokenizer, CharTokenizer):
        model, pre_tokenizer, decoder = _hf_characters(tokenizer)
    elif isinstance(tokenizer, BPETokenizer):
        model, pre_tokenizer, decoder = _hf_bpe(tokenizer)
        normalizer = {"type": "NFC"} if tokenizer.nfc else None
    elif isinstance(tokenizer, SentencePieceTokenizer):
        model = _hf_sentencepiece(tokenizer)
        normalizer, pre_tokenizer, decoder = _hf_spaces(tokenizer)
    else:
        raise ValueError(
            f"a {type(tokenizer).__name__} has no equivalent at Hugging Face: there are CharTokenizer,"
            " BPETokenizer and SentencePieceTokenizer"
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": normalizer,
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
    return model, isolated(EVERY_CHARACTER), {"type": "Fuse"}


def _hf_model(tokenizer: MergingTokenizer, merges: list[str]) -> _Section:
    """The section model of a BPE."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(_written(tokenizer))},
        "merges": merges,
    }


def _hf_bpe(tokenizer: BPETokenizer) -> tuple[_Section, _Section, _Section]:
    """The sections model, pre_tokenizer and decoder."""
    model = _hf_model(tokenizer, _merges(tokenizer)) | {"ignore_merges": tokenizer.ignore_merges}
    pre_tokenizer = pre_tokenizer_of(tokenizer.pattern)
    if pre_tokenizer is None:
        raise ValueError(
            f"the rule {tokenizer.pattern!r} for cutting text has no known equivalent at Hugging Face:"
            f" {USE_GPT2_PATTERN}"
        )
    return model, pre_tokenizer, byte_level()


def _merges(tokenizer: BPETokenizer) -> list[str]:
    return [f"{to_printable(a)} {to_printable(b)}" for a, b in tokenizer.merges]


def _hf_sentencepiece(tokenizer: SentencePieceTokenizer) -> _Section:
    """The section model."""
    merges = [f"{_with_marked_spaces(a)} {_with_marked_spaces(b)}" for a, b in tokenizer.merges]
    unknown = UNKNOWN_TOKEN if UNKNOWN_TOKEN in tokenizer.special_tokens else None
    return _hf_model(tokenizer, merges) | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}


def _hf_spaces(tokenizer: SentencePieceTokenizer) -> tuple[_Section | None, _Section | None, _Section]:
    """The sections normalizer, pre_tokenizer and decoder."""
    decoder = {"type": "Sequence", "decoders": decoder_steps(with_prefix=tokenizer.prefix != "never")}
    if tokenizer.prefix in ("first", "parts") or tokenizer.each_space:
        if tokenizer.prefix == "always":
            raise ValueError("prefix='always' with each_space has no equivalent at Hugging Face: use 'parts'")
        scheme = "always" if tokenizer.prefix == "parts" else tokenizer.prefix
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme}
        return None, metaspace | {"split": tokenizer.each_space}, decoder
    if tokenizer.prefix == "always":
        return {"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]}, None, decoder
    return REPLACE_SPACES, SPLIT_AT_SPACES, decoder


def _hf_before(tokenizer: Tokenizer) -> _Section | None:
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


def _hf_added_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The special and added tokens, by id. They are found whatever stands around them."""
    if not isinstance(tokenizer, MergingTokenizer):
        return []
    added = tokenizer.added
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": token in added.lstrip,
            "rstrip": token in added.rstrip,
            "normalized": False,
            "special": token in added.special,
        }
        for token, i in sorted({**added.plain, **added.special}.items(), key=itemgetter(1))
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
        "tokens": _written(tokenizer),
        "merges": _merges(tokenizer),
    }
    return values | _gguf_roles(tokenizer)


def _gguf_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    if tokenizer.prefix not in ("never", "always") or tokenizer.each_space:
        how = f"prefix={tokenizer.prefix!r}" + (" with each_space" if tokenizer.each_space else "")
        raise ValueError(f"llama.cpp has no {how}: its tokenizers put a space before every part, or none")
    values: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": _written(tokenizer),
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
