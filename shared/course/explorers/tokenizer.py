"""Week 0. For week 5: type a text, see what tokens several vocabularies make of it, replay the merges."""

import base64
import re
import zlib
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from shared.course.explorers.page import Explorer
from shared.course.report import char_label

TEXT = "To be, or not to be, that is the question:"
FOLDED = {"s": "ſ", "k": "\u212a"}
"""Characters that are equal to a letter where case does not count, beside its own capital."""
_PARTS = re.compile(
    r"(?P<class>\[\^?(?:\\[pP]\{\w+\}|\\.|[^\]\\])+\])|(?P<escape>\\[pP]\{\w+\}|\\.)"
    r"|(?P<open>\((?:\?(?:i:|:|=|!|<=|<!))?)|(?P<quantifier>[?*+]|\{\d+(?:,\d*)?\})|(?P<other>.)",
    re.DOTALL,
)
_ESCAPES = {
    r"\s": r"\p{White_Space}",
    r"\S": r"\P{White_Space}",
    r"\d": r"\p{Nd}",
    r"\D": r"\P{Nd}",
    r"\Z": "$",
}
_SAME_ESCAPES = re.compile(r"\\(?:[pP]\{\w+\}|[rntfv]|[\^$\\.*+?()\[\]{}|/])")


def tokenizer_explorer(
    tokenizers: Mapping[str, Any], text: str = TEXT, *, title: str = "One text, several vocabularies"
) -> Explorer:
    """A playground: what tokenizers make of a typed text, side by side, and the merges one after another.

    tokenizers: by the names that are shown; `BPETokenizer`s, and `CharTokenizer`s. text: what is in the field
    at first. Raises ValueError for another kind of tokenizer, for what JavaScript cannot do as it does, and
    where all vocabularies together are too large (GPT-2's fits), and for a text with a character that a
    `CharTokenizer` does not know.
    """
    if not tokenizers:
        raise ValueError("no tokenizers: give at least one, by the name that is to be shown")
    entries = [{"name": name, **_entry(name, tokenizer)} for name, tokenizer in tokenizers.items()]
    return Explorer(
        title,
        ("bpe.js", "tokenizer.js"),
        {"text": text, "vocabularies": entries},
        _stand_in(tokenizers, text),
    )


def _entry(name: str, tokenizer: Any) -> dict[str, Any]:
    """A tokenizer as the page reads it."""
    if hasattr(tokenizer, "chars"):
        return {"kind": "characters", "chars": tokenizer.chars, "size": len(tokenizer.chars)}
    if not hasattr(tokenizer, "merges") or not hasattr(tokenizer, "pattern"):
        raise ValueError(
            f"{name}: a {type(tokenizer).__name__} has no merges and no pattern: the explorer shows"
            " BPETokenizers and CharTokenizers"
        )
    if tokenizer.added.plain or tokenizer.ignore_merges:
        raise ValueError(
            f"{name}: the explorer replays merges, and this vocabulary has tokens that need none (Llama 3's,"
            " Qwen's): give it one whose tokens are all made by merges"
        )
    return {
        "kind": "bpe",
        "pattern": javascript_pattern(tokenizer.pattern),
        "nfc": tokenizer.nfc,
        "size": tokenizer.vocab_size,
        **_packed(tokenizer),
    }


def _packed(tokenizer: Any) -> dict[str, str]:
    """Merges and ids as whole numbers, compressed.

    A token's number is its byte, or 256 and its place among the different tokens that merges make. ids: by
    number, -1 for a byte that the vocabulary lacks.
    """
    numbers = {bytes([byte]): byte for byte in range(256)}
    lefts, rights, made = [], [], []
    for left, right in tokenizer.merges:
        lefts.append(numbers[left])
        rights.append(numbers[right])
        made.append(numbers.setdefault(left + right, len(numbers)))
    special = set(tokenizer.special_tokens.values())
    ids = {token: i for i, token in tokenizer.vocab.items() if i not in special}
    return {
        "lefts": in_planes(lefts),
        "rights": in_planes(rights),
        "made": in_planes(_steps(made)),
        "ids": in_planes(_steps([ids.get(token, -1) for token in numbers])),
    }


def _steps(numbers: Iterable[int]) -> list[int]:
    """From each number to the next, the first from 0: mostly 1, and so nearly nothing when compressed."""
    return np.diff(list(numbers), prepend=0).tolist()


def in_planes(numbers: Iterable[int]) -> str:
    """int32 numbers, compressed (zlib), in base64: the lowest bytes of all, then the next, to the highest.

    >>> zlib.decompress(base64.b64decode(in_planes([1, 258])))
    b'\\x01\\x02\\x00\\x01\\x00\\x00\\x00\\x00'
    """
    planes = np.array(list(numbers), dtype="<i4").view(np.uint8).reshape(-1, 4).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")


def javascript_pattern(pattern: str) -> str:
    """The same regular expression for JavaScript, with the flag u.

    White space is Unicode's, as for `regex`; (?i:...) is written out; a possessive quantifier, which
    JavaScript lacks, becomes a lookahead that is taken as a whole. Raises ValueError for a part whose meaning
    there is not known.

    >>> javascript_pattern(r"(?i:'s)|\\s+")
    "(?:'[sSſ])|\\\\p{White_Space}+"
    """
    written: list[str] = []
    starts: list[tuple[int, bool]] = []  # of the groups that are open: where, and whether case counted before
    atom = 0  # where what a quantifier belongs to begins
    groups = 0
    ignores_case = False
    parts = [(match.lastgroup, match[0]) for match in _PARTS.finditer(pattern)]
    for place, (kind, part) in enumerate(parts):
        before = parts[place - 1] if place else (None, "")
        if kind == "quantifier":
            if part == "+" and before[0] == "quantifier":
                groups += 1
                written[atom:] = [f"(?=({''.join(written[atom:])}))\\{groups}"]
            else:
                written.append(part)
            continue
        if part == ")":
            atom, ignores_case = starts.pop()
            written.append(part)
            continue
        atom = len(written)
        if kind == "open":
            starts.append((atom, ignores_case))
            ignores_case = ignores_case or part == "(?i:"
            written.append("(?:" if part in ("(", "(?i:") else part)
        else:
            written.append(_translated(part, kind, ignores_case))
    return "".join(written)


def _translated(part: str, kind: str | None, ignores_case: bool) -> str:
    """A character, an escape or a class of characters for JavaScript."""
    if kind == "escape":
        return _escape(part)
    if kind == "class":
        if ignores_case and re.search("[a-z]", re.sub(r"\\[pP]\{\w+\}|\\.", "", part), re.IGNORECASE):
            inside = re.sub("[A-Za-z]", lambda letter: _cases(letter[0]), part)
            return re.sub(r"\\[pP]\{\w+\}|\\.", lambda found: _escape(found[0]), inside)
        return re.sub(r"\\[pP]\{\w+\}|\\.", lambda found: _escape(found[0]), part)
    if part == "$":
        return r"(?=\n?$)"  # as in Python: before a line break at the end, too
    if part == ".":
        return r"[^\n]"
    return f"[{_cases(part)}]" if ignores_case and part.isalpha() else part


def _escape(part: str) -> str:
    if part in _ESCAPES:
        return _ESCAPES[part]
    if _SAME_ESCAPES.fullmatch(part):
        return part
    if not part[1].isalnum() and part[1] != "_":
        return part if part == r"\-" else part[1]
    raise ValueError(f"the pattern's part {part!r} is not known to mean the same in JavaScript")


def _cases(letter: str) -> str:
    return letter.lower() + letter.upper() + FOLDED.get(letter.lower(), "")


def _stand_in(tokenizers: Mapping[str, Any], text: str) -> str:
    """The tokens of the text as a table, a row for each vocabulary."""
    rows = []
    for name, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        tokens = [tokenizer.vocab[i].decode("utf-8", "backslashreplace") for i in ids]
        shown = " ".join(f"<code>{escape(''.join(map(char_label, token)))}</code>" for token in tokens)
        rows.append(f"<tr><th>{escape(name)}</th><td>{len(ids)} tokens</td><td>{shown}</td></tr>")
    return f"<table><tbody>{''.join(rows)}</tbody></table>"
