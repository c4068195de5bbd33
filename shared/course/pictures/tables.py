"""Week 0. Numbers that the pictures show, computed from a few that are given."""

import math
from collections.abc import Sequence
from typing import NamedTuple


def softmax(logits: Sequence[float]) -> list[float]:
    """Probabilities from logits."""
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


LETTERS = ("e", "h", "l", "o", "␣")
TABLE = (
    (0.3, -2.0, 0.4, -0.9, 1.6),
    (2.1, -1.8, -1.5, 0.9, 0.4),
    (1.2, -1.6, 1.0, 0.7, 0.1),
    (-0.8, -1.2, 0.5, -0.3, 0.8),
    (-0.5, 0.9, -0.4, 0.6, -2.2),
)
"""A bigram's logits of LETTERS: a row for the present one, a column for the next."""

WORDS = ("the", "cat", "sat", "down")
QUERIES = ((1.0, 0.4), (0.2, 1.6), (1.8, -0.4), (0.6, 1.2))
KEYS = ((1.2, 0.2), (0.4, 1.8), (1.3, 0.6), (-0.4, 1.0))
"""With these the weights that are printed follow from the scores that are, with one digit."""


def attention_scores() -> list[list[float]]:
    """The scores of the picture: q kᵀ / √head_dim."""
    return [
        [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)) for k in KEYS] for q in QUERIES
    ]


def causal_softmax(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each row's weights: a softmax over the positions up to its own, 0 after it."""
    return [[*softmax(row[: i + 1]), *[0.0] * (len(row) - i - 1)] for i, row in enumerate(scores)]


TEXT = "the␣hen␣then␣the"
MERGES = (("h", "e"), ("t", "he"))
"""The most frequent pairs of neighbours in TEXT, one after the other; no other pair is as frequent."""


def merged(tokens: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Tokens in which each place of the pair has become one."""
    made: list[str] = []
    for token in tokens:
        if made and (made[-1], token) == pair:
            made[-1] += token
        else:
            made.append(token)
    return made


class Encoded(NamedTuple):
    """How a text becomes ids."""

    merges: tuple[tuple[str, str], ...]
    """In the order in which they were learned."""
    stages: tuple[Sequence[Sequence[str]], ...]
    """The text, its pieces, their bytes, and the tokens after each merge; tokens by piece."""
    ids: Sequence[Sequence[str]]


def encoded(text: str, pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> Encoded:
    """The stages of encoding `text`, which is cut into `pieces`; spaces are written ␣."""
    stages: list[Sequence[Sequence[str]]] = [[[text]], [[piece] for piece in pieces]]
    now = [list(piece) for piece in pieces]
    stages.append(now)
    for pair in merges:
        now = [merged(tokens, pair) for tokens in now]
        stages.append(now)
    numbers = {a + b: 256 + rank for rank, (a, b) in enumerate(merges)}
    ids = [[str(numbers.get(t, ord(t.replace("␣", " ")[0]))) for t in tokens] for tokens in now]
    return Encoded(tuple(merges), tuple(stages), ids)


ENCODED = encoded("lower␣low", ("lower", "␣low"), (("o", "w"), ("l", "ow"), ("low", "e")))


class FourBits(NamedTuple):
    """A group of weights in four bits."""

    weights: tuple[float, ...]
    low: float
    high: float
    scale: float
    zero: float
    codes: tuple[int, ...]
    back: tuple[float, ...]
    """The weights as they are unpacked."""


def four_bits(weights: tuple[float, ...]) -> FourBits:
    """Codes from 0, the smallest weight, to 15, the largest. Scale and zero are as they come: the weights are
    such that they are exact in bfloat16, too.
    """
    low, high = min(weights), max(weights)
    scale = (high - low) / 15
    zero = low + 8 * scale
    codes = tuple(min(max(round((w - zero) / scale), -8), 7) + 8 for w in weights)
    back = tuple(scale * (code - 8) + zero for code in codes)
    return FourBits(weights, low, high, scale, zero, codes=codes, back=back)


FOUR_BITS = four_bits((0.62, -1.75, 0.14, 2.0, -0.84, 1.32, -0.3, 1.06))


class PackedRow(NamedTuple):
    """Conversations in one row of a batch."""

    ids: tuple[str, ...]
    targets: tuple[str, ...]
    """"·" where nothing is learned."""
    texts: tuple[int, ...]
    """The number of the talk of each token; 0 is padding."""


def packed_row(talks: Sequence[Sequence[tuple[str, bool]]], width: int) -> PackedRow:
    """Talks side by side. Of each token: what it is, and whether it is learned; the last one is only a"
    " target."""
    ids, targets, texts = [], [], []
    for number, talk in enumerate(talks, 1):
        for (token, _), (after, learned) in zip(talk, talk[1:]):
            ids.append(token)
            targets.append(after if learned else "·")
            texts.append(number)
    short = width - len(ids)
    return PackedRow((*ids, *[""] * short), (*targets, *["·"] * short), (*texts, *[0] * short))


def sees(texts: Sequence[int], i: int, j: int) -> bool:
    """Whether position i looks at position j: not a later one, and of the same talk."""
    return j <= i and texts[i] == texts[j]


TALKS = (
    (("Q1", False), ("Q2", False), ("A1", True), ("A2", True), ("A3", True), ("/", True)),
    (("Q3", False), ("Q4", False), ("Q5", False), ("A4", True), ("/", True)),
)
PACKED_ROW = packed_row(TALKS, 10)


SLOTS = 4
TEXT_LENGTHS = (3, 9, 2, 5, 6, 2, 4, 3, 5, 4)
"""Tokens of the texts that are to be written, in the order in which they are asked for."""


def in_batches(lengths: Sequence[int], slots: int) -> list[list[int]]:
    """Of each slot and step, the number of the text that is written, or -1.

    So many texts as there are slots begin together, and the next when the longest of them has ended.
    """
    rows: list[list[int]] = [[] for _ in range(slots)]
    for first in range(0, len(lengths), slots):
        batch = range(first, min(first + slots, len(lengths)))
        longest = max(lengths[text] for text in batch)
        for slot, row in enumerate(rows):
            text = first + slot
            count = lengths[text] if text in batch else 0
            row += [text] * count + [-1] * (longest - count)
    return rows


def continuous(lengths: Sequence[int], slots: int) -> list[list[int]]:
    """The same, where the next text begins in the slot that is free first."""
    rows: list[list[int]] = [[] for _ in range(slots)]
    for text, length in enumerate(lengths):
        row = min(rows, key=len)
        row += [text] * length
    steps = max(len(row) for row in rows)
    return [row + [-1] * (steps - len(row)) for row in rows]
