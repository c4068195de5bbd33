"""Week 11. Finding by meaning: what turns a text into a vector.

Source: Reimers & Gurevych, "Sentence-BERT" (2019).
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import nn

from shared.assets import fetch
from shared.devices import device_of
from shared.models.gpt import GPT
from shared.retrieval.stores import Vectors
from shared.tokenizers import Tokenizer

# ---- by meaning


class Embedder(Protocol):
    """Turns texts into vectors of length 1, near each other where the texts mean similar things."""

    name: str
    """Which model it is: an index made with one cannot be searched with another."""
    dim: int
    max_tokens: int
    """How many tokens of a text it reads; the rest is not looked at."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), dim]."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text, all of them, with those that the model puts around it."""
        ...


@contextmanager
def _import_warnings_hidden() -> Iterator[None]:
    """Inside, libraries that transformers tries do not warn of what was not built for this machine.

    The handlers of the root logger and of torch's pass over warnings, and are as they were afterwards.
    """

    def hide(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    handlers = [*logging.getLogger().handlers, *logging.getLogger("torch").handlers]
    if logging.lastResort is not None:
        handlers.append(logging.lastResort)  # where nobody has set logging up
    for handler in handlers:
        handler.addFilter(hide)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hide)


class MiniLM:
    """all-MiniLM-L6-v2 through sentence-transformers: 22 million parameters, trained on a billion pairs.

    Fetched on the first call.
    """

    name = "all-MiniLM-L6-v2"
    dim = 384
    max_tokens = 256
    least_score = 0.39
    """A question whose best passage has a lower cosine is about nothing in the documents: chosen on half of
    week 11's questions, and measured on the other half (`--study domain`).
    """

    def __init__(self, device: torch.device | str = "cpu", batch_size: int = 32):
        folders = {fetch(f"minilm-{part}").parent for part in ("weights", "tokenizer", "config")}
        if len(folders) > 1:
            raise ValueError(
                f"the files of {self.name} lie in several folders: put them all into one of"
                f" {', '.join(map(str, folders))}"
            )
        with _import_warnings_hidden():
            from sentence_transformers import SentenceTransformer  # takes seconds to import
            from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
            from transformers.utils import logging as transformers_logging

        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            reader = Transformer(str(folders.pop()), max_seq_length=self.max_tokens)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        self._model = SentenceTransformer(
            modules=[reader, Pooling(self.dim, "mean"), Normalize()], device=str(device)
        )
        self._batch_size = batch_size

    def embed(self, texts: Sequence[str]) -> Vectors:
        if not len(texts):
            return np.empty((0, self.dim), np.float32)
        vectors = self._model.encode(list(texts), batch_size=self._batch_size, show_progress_bar=False)
        return np.asarray(vectors, np.float32)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        ids = self._model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [len(text) for text in ids]


class HiddenStates:
    """The mean of a GPT's last hidden states over a text's tokens: embeddings of a model that was never
    trained to make any.

    name: which model it is, for the index. The device is the model's.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str, batch_size: int = 32):
        self.name = name
        self.dim = model.config.n_embd
        self.max_tokens = model.config.block_size
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._body = copy.copy(model)  # the same weights, without the head: logits would be most of the work
        self._body._modules = {**model._modules, "lm_head": nn.Identity()}

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Vectors:
        """Raises ValueError for a text without tokens."""
        ids = [self._tokenizer.prompt(text)[: self.max_tokens] for text in texts]
        if not all(ids):
            raise ValueError("an empty text has no hidden states: leave it out")
        device, was_training = device_of(self._body), self._body.training
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = np.empty((len(ids), self.dim), np.float32)
        self._body.eval()
        try:
            for at in range(0, len(ids), self._batch_size):
                batch = by_length[at : at + self._batch_size]
                lengths = torch.tensor([len(ids[i]) for i in batch], device=device)
                # Padding stands behind the text, where no token of a causal model sees it.
                rows = nn.utils.rnn.pad_sequence([torch.tensor(ids[i]) for i in batch], batch_first=True).to(
                    device
                )
                states = self._body(rows).float()  # [batch, time, n_embd]
                real = torch.arange(rows.size(1), device=device) < lengths[:, None]
                mean = (states * real[..., None]).sum(1) / lengths[:, None]
                vectors[batch] = nn.functional.normalize(mean, dim=-1).cpu().numpy()
        finally:
            self._body.train(was_training)
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(self._tokenizer.prompt(text)) for text in texts]
