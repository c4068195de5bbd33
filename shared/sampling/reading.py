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


class TextReader:
    """Gives the logits of what follows each text: all of it is read, or its end where it has outgrown
    block_size.

    With a model that has `new_cache`, each token is read once, and all texts in one forward pass: by a
    `fast_reader`, or by the model itself, where shorter texts are padded on the left, where nobody looks.
    Without one, each text is read again, by itself. max_new_tokens: for so many the cache has room.
    """

    def __init__(self, model: LanguageModel, max_new_tokens: int, use_cache: bool = True):
        self.model = model
        self.device = device_of(model)
        self.limit = getattr(model.config, "block_size", math.inf)
        self.new_cache = getattr(model, "new_cache", None) if use_cache else None
        self.max_new_tokens = max_new_tokens
        self.starts: list[int] = []  # of each text, the first token that is read
        self.cache: Any = None
        self.cached = 0  # places of the cache that are taken, in each row
        self.reader: SlotReader | None = None
        self.slots: list[int] = []  # of each text, with a reader

    @torch.inference_mode()
    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """Logits [texts, vocab_size] for what follows each text: those of the call before, each with one more
        token.
        """
        if self.model.training:  # eval() walks all modules, which takes longer than a small model's step
            self.model.eval()
        if not self.starts:
            self._begin(texts)
        for i, text in enumerate(texts):
            if len(text) - self.starts[i] > self.limit:
                self.starts[i] = len(text) - max(1, int(self.limit) // 2)
                if self.reader is not None:
                    self.reader.lengths[self.slots[i]] = 0
        if self.reader is not None:
            read = [self.reader.lengths[slot] for slot in self.slots]
            rest = [text[start + length :] for text, start, length in zip(texts, self.starts, read)]
            return self.reader.read(list(zip(self.slots, rest)))
        if self.new_cache is None:
            windows = [text[start:] for text, start in zip(texts, self.starts)]
            return torch.cat([self.model(self._tensor([window]))[:, -1] for window in windows])
        # The longest text of a batch fills the cache: when it starts anew, all are read again.
        if self.cache is None or self.cached == self.limit:
            return self._fill_cache([text[start:] for text, start in zip(texts, self.starts)])
        self.cached += 1
        return self.model(self._tensor([text[-1:] for text in texts]), self.cache)[:, -1]

    def _begin(self, texts: Sequence[list[int]]) -> None:
        self.starts = [0] * len(texts)
        if self.new_cache is None:
            return
        longest = max(len(text) for text in texts)
        max_length = min(self.limit, longest + self.max_new_tokens)
        self.reader = fast_reader(self.model, len(texts), int(max_length))
        self.slots = list(range(len(texts)))

    def keep(self, texts: Sequence[int]) -> None:
        """Forgets all texts but these, given by number."""
        self.starts = [self.starts[i] for i in texts]
        self.slots = [self.slots[i] for i in texts] if self.reader is not None else []
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
