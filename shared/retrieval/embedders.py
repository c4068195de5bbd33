"""Week 11. Finding by meaning: what turns a text into a vector.

    MiniLM()                                         # 22 million parameters, fetched by the course
    SentenceEmbedder("BAAI/bge-small-en-v1.5")       # any sentence-transformers model of the hub, or a folder
    HiddenStates(model, tokenizer, "my-gpt")         # a GPT that was never trained for it

Anything else is a subclass of `Embedder` with a name, a dim and `embed`.

Source: Reimers & Gurevych, "Sentence-BERT" (2019).
"""

import copy
import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from shared.assets import fetch
from shared.devices import device_of, resolve_device
from shared.extras import needs
from shared.models.gpt import GPT
from shared.retrieval.stores import MEASURES, Measure, Vectors
from shared.tokenizers import Tokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# ---- by meaning


class Embedder(ABC):
    """Turns texts into vectors that are near each other where the texts mean similar things. They may have
    any length: a store brings them to length 1 where its measure needs that.
    """

    name: str
    """Which model it is: an index made with one cannot be searched with another."""
    dim: int
    max_tokens: int
    """How many tokens of a text it reads; the rest is not looked at. For /v1/embeddings."""
    measure: Measure = "cosine"
    """By what its vectors are compared."""
    least_score: float = 0.0
    """A question whose best passage has a lower score is about nothing in the documents."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Vectors:
        """Passages as vectors: float32 [len(texts), dim]."""

    def embed_questions(self, questions: Sequence[str]) -> Vectors:
        """As `embed`, for models that read questions otherwise than passages; here they are the same."""
        return self.embed(questions)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text, all of them, with those that the model puts around it. For
        /v1/embeddings.
        """
        raise NotImplementedError(f"{type(self).__name__} has no count_tokens, which /v1/embeddings needs")


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


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Inside, sentence-transformers and transformers are imported and show no progress.

    Raises ModuleNotFoundError where sentence-transformers is not installed.
    """
    with needs("rag"), _import_warnings_hidden():
        import sentence_transformers  # noqa: F401  (takes seconds to import)
        from transformers.utils import logging as transformers_logging
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class SentenceEmbedder(Embedder):
    """Any model of sentence-transformers, by its name on the Hugging Face hub or its folder.

    What the model's files say is kept to: its prompts for queries and documents, how many tokens it reads,
    and how its vectors are compared (cosine or inner product). The name has a sum of weights and settings in
    it, so an index that was made with other weights is noticed.

    device: "auto" takes the best one, and says which. query_prompt, document_prompt: what is put before a
    question and before a passage, for a model whose files do not say it (E5: "query: " and "passage: ").
    max_tokens: to read less of a text. measure: instead of the model's own.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device = "auto",
        *,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        max_tokens: int | None = None,
        measure: Measure | None = None,
        batch_size: int = 32,
    ):
        """Raises ValueError where there is no such model, and for settings that it cannot have."""
        loaded = _loaded(model, str(resolve_device(device)))
        asked = {"query": query_prompt, "document": document_prompt}
        loaded.prompts |= {name: prompt for name, prompt in asked.items() if prompt is not None}
        _limit_tokens(loaded, max_tokens)
        wanted = str(loaded.similarity_fn_name) if measure is None else measure
        if wanted not in MEASURES:
            raise ValueError(f"{model}: no store has the measure {wanted!r}; choose {' or '.join(MEASURES)}")
        self.measure = "dot" if wanted == "dot" else "cosine"
        self.name = f"{Path(model).name} {_sum_of(loaded)}"
        self._use(loaded, batch_size)

    def _use(self, model: "SentenceTransformer", batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self.dim = model.get_embedding_dimension() or model.encode(["a"]).shape[1]
        self.max_tokens = int(min(model.max_seq_length or UNLIMITED, UNLIMITED))

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._encode(texts, "document")

    def embed_questions(self, questions: Sequence[str]) -> Vectors:
        return self._encode(questions, "query")

    def _encode(self, texts: Sequence[str], task: Literal["query", "document"]) -> Vectors:
        if not len(texts):
            return np.empty((0, self.dim), np.float32)
        encode = self._model.encode_query if task == "query" else self._model.encode_document
        vectors = encode(list(texts), batch_size=self._batch_size, show_progress_bar=False)
        return np.asarray(vectors, np.float32)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        prompts = [self._model.prompts.get(name) for name in DOCUMENT_PROMPTS]
        prompt = next((prompt for prompt in prompts if prompt is not None), "")
        texts = [prompt + text for text in texts]
        tokenizer = self._model.tokenizer
        if hasattr(tokenizer, "encode_batch"):  # of static embeddings: no model reads, and nothing is cut
            return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
        ids = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        return [len(text) for text in ids]


DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""The names under which sentence-transformers looks for what to put before a passage."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""A model on the Hugging Face hub: `name` or `owner/name`."""
UNLIMITED = 1 << 30
"""Tokens that a model reads which does not say how many."""


def _loaded(model: str | Path, device: str) -> "SentenceTransformer":
    on_hub = isinstance(model, str) and HUB_NAME.fullmatch(model)
    if not on_hub and not Path(model).exists():
        raise ValueError(f"there is no folder {model}: give one with a model, or a model's name on the hub")
    with needs("rag"), _quiet_libraries():
        from sentence_transformers import SentenceTransformer

        try:
            return SentenceTransformer(str(model), device=device)
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{model} cannot be loaded with sentence-transformers ({reason}): give a folder that its"
                " `save` wrote, or a model's name on the Hugging Face hub, which is fetched"
            ) from None


def _limit_tokens(model: "SentenceTransformer", max_tokens: int | None) -> None:
    """Has the model read fewer tokens. Raises ValueError for more than it can."""
    if max_tokens is None:
        return
    most = model.max_seq_length or UNLIMITED
    if not 1 <= max_tokens <= most:
        raise ValueError(f"max_tokens={max_tokens}: must be from 1 to {most:g}, which the model reads")
    try:
        model.max_seq_length = max_tokens
    except AttributeError:
        raise ValueError(f"max_tokens={max_tokens}: this model reads all of a text, leave it out") from None


def _sum_of(model: "SentenceTransformer") -> str:
    """A short sum of all that the vectors depend on: weights, modules, prompts, how much is read."""
    settings: dict[str, Any] = {"prompts": model.prompts, "tokens": str(model.max_seq_length)}
    settings["modules"] = [f"{type(module).__name__} {_config_of(module)}" for module in model]
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:8]


def _config_of(module: nn.Module) -> str:
    """What a module of sentence-transformers was made with, as JSON."""
    names = getattr(module, "config_keys", [])
    return json.dumps({name: getattr(module, name, None) for name in names}, sort_keys=True, default=str)


class MiniLM(SentenceEmbedder):
    """all-MiniLM-L6-v2 through sentence-transformers: 22 million parameters, trained on a billion pairs.

    Fetched on the first call, with its sums checked. device: "auto" takes the best one, and says which.
    """

    name = "all-MiniLM-L6-v2"
    dim = 384
    max_tokens = 256
    least_score = 0.39
    """Chosen on half of week 11's questions, and measured on the other half (`--study domain`)."""

    def __init__(self, device: str | torch.device = "auto", batch_size: int = 32):
        folders = {fetch(f"minilm-{part}").parent for part in ("weights", "tokenizer", "config")}
        if len(folders) > 1:
            raise ValueError(
                f"the files of {self.name} lie in several folders: put them all into one of"
                f" {', '.join(map(str, folders))}"
            )
        with needs("rag"), _quiet_libraries():
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

            reader = Transformer(str(folders.pop()), max_seq_length=self.max_tokens)
        modules = [reader, Pooling(self.dim, "mean"), Normalize()]
        self._use(SentenceTransformer(modules=modules, device=str(resolve_device(device))), batch_size)


class HiddenStates(Embedder):
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
