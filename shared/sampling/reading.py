"""Week 1. What a model reads of texts that grow: of one, or of several that are written side by side."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.devices import device_of
from shared.registry import LanguageModel, SlotReader, fast_reader

READ_AT_ONCE = 1024
"""Tokens of several prompts that share a forward pass: its logits take 4 · vocab_size bytes for each."""


class ForwardReader:
    """Reads texts as a `SlotReader` does, by the model's own forward: each in a pass of its own.

    With a model that has `new_cache` each has a cache, which must have `forget`; without one all of it is
    read again. Raises ValueError for a cache that cannot forget.
    """

    def __init__(self, model: LanguageModel, slots: int, max_length: float, use_cache: bool = True):
        self._model = model
        self._device = device_of(model)
        self._texts: list[list[int]] = [[] for _ in range(slots)]
        self.lengths = [0] * slots
        """As in a `SlotReader`."""
        new_cache = getattr(model, "new_cache", None) if use_cache else None
        self._caches = [] if new_cache is None else [new_cache(1, int(max_length)) for _ in range(slots)]
        if self._caches and not hasattr(self._caches[0], "forget"):
            raise ValueError(
                f"a {type(self._caches[0]).__name__} has no method `forget`, and some of what is read on"
                " speculation has to be forgotten: write without it, or with use_cache=False"
            )

    def read(self, new: Sequence[tuple[int, Sequence[int]]], every: bool = False) -> Tensor:
        """As `SlotReader.read`."""
        logits = []
        for slot, tokens in new:
            text = self._texts[slot]
            forgotten = len(text) - self.lengths[slot]
            text[self.lengths[slot] :] = tokens
            self.lengths[slot] = len(text)
            if self._caches:
                self._caches[slot].forget(forgotten)
                read = self._model(self._tensor(tokens), self._caches[slot])[0]
            else:
                read = self._model(self._tensor(text))[0, -len(tokens) :]
            logits.append(read if every else read[-1:])
        return torch.cat(logits).float().cpu()

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self._device)


class TextReader:
    """Gives the logits of what follows each text: all of it is read, or its end where it has outgrown
    block_size.

    With a model that has `new_cache`, each token is read once, and all texts in one forward pass: by a
    `fast_reader`, or by the model itself, where shorter texts are padded on the left, where nobody looks.
    Without one, each text is read again, by itself. max_new_tokens: for so many the cache has room.
    forgetful: for texts that are read with proposed tokens behind them, which may be dropped again.
    """

    def __init__(
        self, model: LanguageModel, max_new_tokens: int, use_cache: bool = True, forgetful: bool = False
    ):
        self.model = model
        self.device = device_of(model)
        self.limit = getattr(model.config, "block_size", math.inf)
        self.new_cache = getattr(model, "new_cache", None) if use_cache else None
        self.max_new_tokens = max_new_tokens
        self.starts: list[int] = []  # of each text, the first token that is read
        self.cache: Any = None
        self.cached = 0  # places of the cache that are taken, in each row
        self.forgetful = forgetful
        self.reader: SlotReader | ForwardReader | None = None
        self.slots: list[int] = []  # of each text, in the reader

    @torch.inference_mode()
    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """Logits [texts, vocab_size] for what follows each text: those of the call before, each with one more
        token; where the reader is forgetful, with any that are new in place of some proposed ones.
        """
        self._prepare(texts)
        if self.reader is not None:
            return self.reader.read([(slot, self._unread(i, texts[i])) for i, slot in enumerate(self.slots)])
        if self.new_cache is None:
            windows = [text[start:] for text, start in zip(texts, self.starts)]
            return torch.cat([self.model(self._tensor([window]))[:, -1] for window in windows])
        # The longest text of a batch fills the cache: when it starts anew, all are read again.
        if self.cache is None or self.cached == self.limit:
            return self._fill_cache([text[start:] for text, start in zip(texts, self.starts)])
        self.cached += 1
        return self.model(self._tensor([text[-1:] for text in texts]), self.cache)[:, -1]

    def room(self, i: int, text: list[int]) -> float:
        """How many proposed tokens may be read behind text i, in the same pass and window as its last token.

        None where more than its last token is to be read: logits of a whole prompt would take much memory.
        """
        if not self.starts:
            return 0
        assert self.reader is not None
        length = len(text) - self.starts[i]
        if self.reader.lengths[self.slots[i]] < length - 1:
            return 0
        return max(0, self.limit - length)

    @torch.inference_mode()
    def logits_along(self, texts: Sequence[list[int]], proposals: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `next_logits` of a forgetful reader, but of each text [1 + proposed, vocab_size]: what follows
        the text, and what follows each proposed token. No proposal is longer than `room` says.
        """
        if not any(proposals):
            return list(self.next_logits(texts).split(1))
        self._prepare(texts)
        assert self.reader is not None
        unread = [self._unread(i, text) for i, text in enumerate(texts)]
        logits: list[Tensor] = [torch.empty(0)] * len(texts)
        short = [i for i, rest in enumerate(unread) if len(rest) == 1]
        read = self.reader.read([(self.slots[i], [*unread[i], *proposals[i]]) for i in short], every=True)
        for i, rows in zip(short, read.split([1 + len(proposals[i]) for i in short])):
            logits[i] = rows
        for i, rest in enumerate(unread):
            if len(rest) > 1:
                logits[i] = self.reader.read([(self.slots[i], rest)])
        return logits

    def _prepare(self, texts: Sequence[list[int]]) -> None:
        """The place for each text at the first call, and then where each begins that has outgrown it."""
        if self.model.training:  # eval() walks all modules, which takes longer than a small model's step
            self.model.eval()
        if not self.starts:
            self._begin(texts)
        for i, text in enumerate(texts):
            # A text that lost its last tokens may have come to end before its window, where that is small.
            if not 0 < len(text) - self.starts[i] <= self.limit:
                self.starts[i] = max(0, len(text) - max(1, int(self.limit) // 2))
                if self.reader is not None:
                    self.reader.lengths[self.slots[i]] = 0

    def _unread(self, i: int, text: list[int]) -> list[int]:
        """The tokens of text i that the reader has to read: its last one, and all that it does not hold.

        What it holds beyond them was proposed, and is forgotten.
        """
        assert self.reader is not None
        slot, start = self.slots[i], self.starts[i]
        held = min(self.reader.lengths[slot], len(text) - start - 1)
        self.reader.lengths[slot] = held
        return text[start + held :]

    def _begin(self, texts: Sequence[list[int]]) -> None:
        self.starts = [0] * len(texts)
        self.slots = list(range(len(texts)))
        longest = max(len(text) for text in texts)
        max_length = min(self.limit, longest + self.max_new_tokens)
        if self.new_cache is not None:
            self.reader = fast_reader(self.model, len(texts), int(max_length))
        if self.reader is None and self.forgetful:
            self.reader = ForwardReader(self.model, len(texts), max_length, self.new_cache is not None)

    def keep(self, texts: Sequence[int]) -> None:
        """Forgets all texts but these, given by number."""
        self.starts = [self.starts[i] for i in texts]
        self.slots = [self.slots[i] for i in texts]
        if self.cache is not None and texts:
            self.cache.keep(texts)

    def _fill_cache(self, windows: Sequence[list[int]]) -> Tensor:
        """Reads texts from their beginnings; logits as in `next_logits`."""
        assert self.new_cache is not None
        longest = max(len(window) for window in windows)
        self.cache = self.new_cache(len(windows), min(self.limit, longest + self.max_new_tokens))
        self.cached = longest
        padding = [longest - len(window) for window in windows]
        if any(padding):
            self.cache.pad(padding)
        idx = self._tensor([[0] * n + window for n, window in zip(padding, windows)])
        at_once = longest if len(windows) == 1 else max(1, READ_AT_ONCE // len(windows))
        for part in idx.split(at_once, dim=1):
            logits = self.model(part, self.cache)
        return logits[:, -1]

    def _tensor(self, ids: Sequence[list[int]]) -> Tensor:
        return torch.tensor(ids, device=self.device)
