"""Week 9. Several texts in one row of a batch, none of which sees another.

Source: Krell et al., "Efficient Sequence Packing without Cross-contamination" (2021).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.evaluation import IGNORED
from shared.models.attention import causal_mask

OPEN_ROWS = 64
"""How many of the last rows are still open while texts are packed: a text goes into the first of them with
room.
"""


class EncodedTalk(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    mask: list[bool]
    """Which of them are learned: the assistant's, answers with their ends."""


def cut_off(talk: EncodedTalk, block_size: int) -> EncodedTalk:
    """The beginning of a conversation, as far as it fits into a row: a row reads one token less than a text
    has, since the last has nothing to predict.

    >>> cut_off(EncodedTalk([5, 6, 7, 8], [False, True, True, True]), 2)
    EncodedTalk(ids=[5, 6, 7], mask=[False, True, True])
    """
    return EncodedTalk(talk.ids[: block_size + 1], talk.mask[: block_size + 1])


class Rows(NamedTuple):
    """A batch of packed texts, int64 [rows, time] each."""

    ids: Tensor
    """What is read."""
    targets: Tensor
    """What is to come next, `IGNORED` where that is not learned."""
    texts: Tensor
    """The number of the text that each token is of, from 1; 0 is padding."""


def pack(lengths: Sequence[int], order: Sequence[int], block_size: int) -> list[list[int]]:
    """Rows of at most `block_size` tokens, as numbers of texts, which are taken in `order`.

    Each text goes into the first row with room for it, of those still open.

    >>> pack([30, 60, 40, 10], order=[0, 1, 2, 3], block_size=100)
    [[0, 1, 3], [2]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in order:
        open_from = max(0, len(rows) - OPEN_ROWS)
        row = next((r for r in range(open_from, len(rows)) if free[r] >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(block_size)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def lay_out(rows: Sequence[Sequence[EncodedTalk]]) -> Rows:
    """Texts side by side in each row; shorter rows end in padding, which is text 0 and not learned."""
    width = max(sum(len(talk.ids) - 1 for talk in row) for row in rows)
    shape = (len(rows), width)
    ids = np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORED)
    texts = np.zeros(shape, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, talk in enumerate(row, 1):
            end = start + len(talk.ids) - 1  # the last token has nothing to predict
            ids[r, start:end] = talk.ids[:-1]
            targets[r, start:end] = np.where(talk.mask[1:], talk.ids[1:], IGNORED)
            texts[r, start:end] = number
            start = end
    return Rows(torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(texts))


class Packed:
    """Keeps the texts of a row apart.

    Given to a GPT in the place of a cache: each text begins at position 0 and sees only itself. texts: int64
    [batch, time], the number of the text that a token belongs to; a text's tokens are adjacent.

    >>> packed = Packed(torch.tensor([[1, 1, 2, 2]]))
    >>> packed.positions(4).tolist(), packed.mask(4, None).int().tolist()
    ([[0, 1, 0, 1]], [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]])
    """

    def __init__(self, texts: Tensor):
        self.texts = texts

    def positions(self, time: int) -> Tensor:
        """The position of each token in its text: int64 [batch, time]."""
        places = torch.arange(time, device=self.texts.device).expand_as(self.texts)
        is_first = torch.ones_like(self.texts, dtype=torch.bool)
        is_first[:, 1:] = self.texts[:, 1:] != self.texts[:, :-1]
        return places - (places * is_first).cummax(dim=1).values

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v as they are: nothing is kept."""
        return k, v

    def mask(self, time: int, window: int | None) -> Tensor:
        """Bool [batch, 1, time, time]: True where a query may see a key."""
        same_text = self.texts.unsqueeze(2) == self.texts.unsqueeze(1)
        causal = causal_mask(time, window=window, device=self.texts.device)
        return (same_text & causal).unsqueeze(1)

    def advance(self, time: int) -> None:
        """Does nothing: nothing is kept."""
