"""Week 0. For week 1: the table of counts, what follows each character, and drawing from it, step by step."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shared.course.explorers.page import Explorer
from shared.course.explorers.pictures import as_image, heat

LARGEST = 128
"""Characters of a table that can still be looked at."""


class IdsToText(Protocol):
    """What an explorer asks of a tokenizer: ids to text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of these ids."""


def bigram_explorer(
    table: Tensor, tokenizer: IdsToText, *, title: str = "The table, and a text drawn from it"
) -> Explorer:
    """A bigram's table to play with: choose a row, see what may follow, draw the next character from it.

    table: [vocab_size, vocab_size]; row a holds how often each token follows a, as counts or as
    probabilities. The temperature divides the logarithms of a row. Raises ValueError for a table that is not
    square, has more than `LARGEST` rows, or numbers below 0 or not finite.
    """
    if table.dim() != 2 or table.size(0) != table.size(1) or not 1 <= table.size(0) <= LARGEST:
        raise ValueError(
            f"a table of shape {list(table.shape)}: the explorer shows [vocab_size, vocab_size], with at most"
            f" {LARGEST} tokens"
        )
    numbers = table.detach().cpu().double()
    if not torch.isfinite(numbers).all() or (numbers < 0).any():
        raise ValueError(
            "the table has numbers below 0, or some that are not finite: give counts or probabilities"
        )
    counted = bool((numbers == numbers.round()).all())
    rows = [[round(n) if counted else float(f"{n:.6g}") for n in row] for row in numbers.tolist()]
    tokens = [tokenizer.decode([i]) for i in range(len(rows))]
    start = tokens.index("\n") if "\n" in tokens else 0
    shares = numbers / numbers.sum(dim=1, keepdim=True).clamp_min(1e-30)
    picture = heat(shares.sqrt(), tokens, "next character", "present character")
    words = "How likely each character is (across) after each (down); the darker, the likelier."
    data = {"tokens": tokens, "table": rows, "counted": counted, "start": start, "seed": 1}
    return Explorer(title, ("bigram.js",), data, as_image(picture, words))
