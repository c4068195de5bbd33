"""Week 5. Rules for cutting text: today's patterns, and how Hugging Face's files write them.

Hugging Face's library runs its regular expressions with Oniguruma, ours with `regex`. Where both read one
alike it is taken as it is; a part that they read differently is translated, or refused.

>>> from_oniguruma(r"\\p{L}+|\\s+$")
'\\\\p{L}+|\\\\s+(?=\\\\n|\\\\Z)'

Sources: Radford et al. (GPT-2, 2019); the file format of the library `tokenizers`; Oniguruma's syntax for
Ruby.
"""

import re
from collections.abc import Mapping
from typing import Any

import regex

from shared.tokenizers.sections import Section, isolated

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Contractions, words and numbers with the space before them, runs of other signs, white space."""
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""As GPT-2's, but contractions in either case, any one sign before a word, at most three digits together, and
line breaks kept with the signs before them.
"""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's, and OLMo 2's: nearly GPT-4's, but line breaks stay together."""
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
"""Qwen's, since Qwen2: as Llama 3's, but every digit on its own."""
SMOLLM_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""SmolLM2's: every digit on its own, and what lies between digits as GPT-2's pattern cuts it."""
COVERING = (GPT2_PATTERN, GPT4_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, SMOLLM_PATTERN)
"""Patterns that every character is in a match of, and no white space, comma or full stop in one with a letter
or digit before it.
"""
GPT4_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
"""GPT-4's pattern for Oniguruma, which has no possessive {1,3}+."""
USE_GPT2_PATTERN = "train the tokenizer with GPT2_PATTERN (shared.tokenizers), which all have"


class UnlikeOurs(ValueError):
    """A tokenizer that ours cannot be; the message is the reason."""


_CATEGORY = r"\\[pP]\{\^?[LMNPSZC][a-z]?\}"
_ESCAPE = r"\\[rntfvsSdD]|\\[^A-Za-z0-9]"
_IN_CLASS = rf"{_CATEGORY}|{_ESCAPE}|[^\\\[\]]"
_ALIKE = re.compile(
    rf"{_CATEGORY}|{_ESCAPE}|"
    rf"\[\^?(?:{_IN_CLASS})+\]|"  # a class of characters
    r"\(\?(?:[:=!]|<[=!]|i:)|\((?!\?)|[)|.]|"
    r"[?*+][?+]?|\{\d+(?:,\d*)?\}(?![?+])|"  # quantifiers: greedy, lazy, possessive
    r"[^\\\[\]{}()|.?*+^$]"
)
_TRANSLATED = {"$": r"(?=\n|\Z)", r"\z": r"\Z"}  # in Oniguruma, $ is the end of any line
_SET_OPERATIONS = ("&&", "||", "--", "~~")
_FOLDED_TOGETHER = ("ff", "fi", "fl", "ss", "st")
"""Letters that are one character in some script, which Oniguruma knows when it disregards case."""


def from_oniguruma(pattern: str) -> str:
    """The same regular expression for `regex`. Raises `UnlikeOurs` for a part that may mean something else
    there.
    """
    parts = []
    at = 0
    while at < len(pattern):
        special = next((text for text in _TRANSLATED if pattern.startswith(text, at)), None)
        match = _ALIKE.match(pattern, at)
        if special is not None:
            parts.append(_TRANSLATED[special])
            at += len(special)
        elif match is not None and not (match[0].startswith("[") and _is_unclear_class(match[0])):
            parts.append(match[0])
            at = match.end()
        else:
            raise UnlikeOurs(
                f"it cuts the text by {pattern!r}, whose part {pattern[at : at + 10]!r} is unclear"
            )
    ignores_case = "(?i:" in pattern
    if ignores_case and (not pattern.isascii() or any(pair in pattern.lower() for pair in _FOLDED_TOGETHER)):
        raise UnlikeOurs(f"it cuts the text by {pattern!r}, with letters whose case is unclear")
    translated = "".join(parts)
    try:
        matches_nothing = regex.compile(translated).search("") is not None
    except regex.error as error:
        raise UnlikeOurs(
            f"it cuts the text by {pattern!r}, which is no regular expression ({error})"
        ) from None
    if matches_nothing:
        raise UnlikeOurs(f"it cuts the text by {pattern!r}, which matches nothing at all")
    return translated


def _is_unclear_class(characters: str) -> bool:
    """Whether a class of characters has operations on sets, or a hyphen that may be a range or not."""
    if any(operation in characters for operation in _SET_OPERATIONS):
        return True
    inside = re.sub(rf"{_CATEGORY}|\\[sSdD]", "\\\\s", characters[1:-1].removeprefix("^"))
    return bool(re.search(r"\\s-.|.-\\s", inside))


def pattern_of(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """Our pattern for the pre_tokenizer of a byte-level tokenizer.json. Raises `UnlikeOurs` for another."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    before, last = steps[:-1], steps[-1] if steps else {}
    unlike = UnlikeOurs("it cuts the text by another rule (pre_tokenizer)")
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        raise unlike
    if not last.get("use_regex", True):
        split = regex_of(before[0]) if before else None
        if split is None:
            raise unlike
        return GPT4_PATTERN if split == GPT4_SPLIT else from_oniguruma(split)
    if not before:
        return GPT2_PATTERN
    if before[0].get("type") == "Digits" and before[0].get("individual_digits") is True:
        return SMOLLM_PATTERN
    raise unlike


def regex_of(step: Mapping[str, Any]) -> str | None:
    """The regular expression whose matches, and what lies between them, are the pieces; None where this is
    not such a step of a pre_tokenizer.
    """
    if step.get("type") != "Split":
        return None
    split = step["pattern"].get("Regex")
    how = (step.get("behavior"), bool(step.get("invert")))
    if how == ("Isolated", False) or (how == ("Removed", True) and split in COVERING):
        return split
    return None


def pre_tokenizer_of(pattern: str) -> Section:
    """The pre_tokenizer that cuts as `pattern` does. Raises ValueError where that cannot be said."""
    if pattern == GPT2_PATTERN:
        return byte_level()
    if pattern == SMOLLM_PATTERN:
        return in_turn({"type": "Digits", "individual_digits": True}, byte_level())
    theirs = GPT4_SPLIT if pattern == GPT4_PATTERN else pattern.replace(r"\Z", r"\z")
    try:
        read_again = pattern if pattern == GPT4_PATTERN else from_oniguruma(theirs)
    except UnlikeOurs:
        read_again = None
    if read_again != pattern:
        raise ValueError(
            f"the rule {pattern!r} for cutting text has no known equivalent at Hugging Face:"
            f" {USE_GPT2_PATTERN}"
        )
    return in_turn(isolated(theirs), byte_level(use_regex=False))


def byte_level(use_regex: bool = True) -> Section:
    """Bytes as printable characters; use_regex: text is cut as by GPT-2 first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def in_turn(*steps: Section) -> Section:
    """One step of a pre_tokenizer after the other."""
    return {"type": "Sequence", "pretokenizers": list(steps)}
