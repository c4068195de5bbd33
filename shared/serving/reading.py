"""Week 12. How the engine's model reads where PyTorch computes: slots of a cache as the rows of a batch.

Floating-point sums are rounded differently in tensors of another shape, so two rules keep the shapes alike: a
prompt is read in a batch of its own, and texts are written in batches of a multiple of `ROWS` rows, some of
them idle. (Keys come in blocks, too: `shared.serving.slots.KEYS`.) The remaining difference is what the
matrix products of the CPU do with the same row at another place of the batch. Intel's MKL, which computes
them on most CPUs, gives every row the same bits in the mode that `same_bits_in_every_row` sets; without it
the last bit of attention may differ.
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from shared.adapters.attach import adapters_by_row, adapters_of
from shared.models.cache import checked_length
from shared.models.gpt import GPT
from shared.registry import SlotReader, fast_reader
from shared.serving.slots import SlotCache

ROWS = 4
"""Texts are written in batches of a multiple of this many rows: smaller batches are computed by other
kernels, which round differently.
"""


def same_bits_in_every_row() -> None:
    """Asks MKL for results that do not depend on memory addresses or on the thread that computes them.

    MKL reads the setting before its first product only. A value that the environment already has is kept.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


class TorchReader:
    """A `SlotReader` for any GPT, on any device, with an adapter for each slot.

    Raises ValueError for a `max_length` that the model cannot have.
    """

    batch_invariant = False
    """Several tokens of a text are another shape than one."""

    def __init__(self, model: GPT, slots: int, max_length: int):
        self.model = model
        weight = model.norm.weight
        rows = ROWS * math.ceil(slots / ROWS)
        self.cache = SlotCache(model.config, rows, max_length, weight.device, weight.dtype)
        self.lengths = [0] * rows
        self.adapters: list[str | None] = [None] * rows
        """Of each slot; None: the model alone."""
        self._has_adapters = bool(adapters_of(model))
        self._row_adapters: tuple[str | None, ...] = ()  # what the model is set to
        self._row_adapters_set = ExitStack()

    def read(self, new: Sequence[tuple[int, Sequence[int]]], every: bool = False) -> Tensor:
        """As `SlotReader.read`, of a part of one prompt, or of one token of each of some texts."""
        ((slot, tokens), *more) = new
        if more or len(tokens) == 1:
            logits = self._one_of_each(new)
        else:
            logits = self._forward([tokens], slot, [self.lengths[slot]])[0]
            logits = logits if every else logits[-1:]
        for slot, tokens in new:
            self.lengths[slot] += len(tokens)
        return logits

    def _one_of_each(self, new: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        last = max(slot for slot, _ in new)
        rows = ROWS * math.ceil((last + 1) / ROWS)
        ids: list[Sequence[int]] = [[0] for _ in range(rows)]
        lengths: list[int | None] = [None] * rows
        for slot, tokens in new:
            ids[slot] = tokens
            lengths[slot] = self.lengths[slot]
        return self._forward(ids, 0, lengths)[[slot for slot, _ in new], 0]

    def _forward(self, ids: list[Sequence[int]], first_slot: int, lengths: Sequence[int | None]) -> Tensor:
        """Logits [rows, time, vocab_size], fp32, on the CPU; row i is slot `first_slot` + i."""
        rows = enumerate(lengths, first_slot)
        adapters = tuple(None if length is None else self.adapters[slot] for slot, length in rows)
        if self._has_adapters and adapters != self._row_adapters:  # setting them walks through all modules
            self._row_adapters_set.close()
            self._row_adapters_set.enter_context(adapters_by_row(self.model, adapters))
            self._row_adapters = adapters
        inputs = torch.tensor(ids, device=self.cache.k.device)
        logits = self.model(inputs, self.cache.rows(first_slot, lengths))
        return logits.float().cpu()

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes `target` hold the first `length` tokens of `source`."""
        self.cache.copy(source, target, length)
        self.lengths[target] = length

    def use_adapter(self, slot: int, name: str | None) -> None:
        """From here on this slot's tokens go through the adapter of this name, None being the model alone."""
        self.adapters[slot] = name

    def clear(self, slot: int) -> None:
        """Forgets all that a slot holds, also values that are not finite."""
        self.cache.clear(slot)
        self.lengths[slot] = 0

    def close(self) -> None:
        """Leaves the model as it was."""
        self._row_adapters_set.close()


def slot_reader(model: GPT, slots: int, max_length: int | None) -> SlotReader:
    """The fastest reader that there is for this model. Raises ValueError for a `max_length` that the model
    cannot have.
    """
    max_length = checked_length(model.config, max_length)
    fast = fast_reader(model, slots, max_length, tuple(adapters_of(model)))
    return fast or TorchReader(model, slots, max_length)
