"""Week 11 with a learner's own code: her search by words and her fusion beside the course's index, and what
her `ask` is given to work with.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

import numpy as np

from shared.course.workspace import Workspace
from shared.models.gpt import GPT
from shared.retrieval.bm25 import BM25, terms
from shared.retrieval.documents import Chunk
from shared.retrieval.index import FUSED, Hit, Index, reciprocal_rank_fusion
from shared.retrieval.ranking import holds_answer
from shared.sampling.generate import generate
from shared.tokenizers import Tokenizer

LONGEST_ANSWER = 32
"""Tokens."""
Fuse = Callable[..., list[tuple[int, float]]]
"""From rankings, k and weights to (id, score), the best first."""


class ByWords(Protocol):
    """A search by words: the course's BM25, or hers."""

    def add(self, ids: list[int], texts: list[str]) -> None: ...

    def search(self, question: str, k: int) -> list[tuple[int, float]]: ...


class OwnSearch:
    """The course's index, whose search by words and whose fusion are those that are given. By meaning the
    index itself searches.

    fusion: k and the weights of meaning and of words; None: 60 and 1 each.
    """

    def __init__(
        self,
        index: Index,
        chunks: Sequence[Chunk],
        by_words: ByWords,
        fuse: Fuse,
        fusion: tuple[float, list[float]] | None = None,
    ):
        self.index = index
        self.chunks = list(chunks)
        self.by_words = by_words
        self.by_words.add(list(range(len(self.chunks))), [chunk.passage for chunk in self.chunks])
        self.fuse = fuse
        self.fusion = fusion or (60, [1.0, 1.0])
        self._numbers = {chunk.id: number for number, chunk in enumerate(self.chunks)}

    def search(self, question: str, k: int = 5, by: str = "hybrid") -> list[Hit]:
        """As the index does: the best k chunks, by "dense", "bm25" or "hybrid"."""
        if by == "dense":
            return self.index.search(question, k, "dense")
        if by == "bm25":
            ranked = self.by_words.search(question, k)
        else:
            near = self.index.search(question, max(k, FUSED), "dense")
            words = self.by_words.search(question, max(k, FUSED))
            rankings = [[self._numbers[hit.chunk.id] for hit in near], [number for number, _ in words]]
            ranked = self.fuse(rankings, *self.fusion)[:k]
        return [Hit(self.chunks[number], score) for number, score in ranked]


def own_search(work: Workspace, index: Index, chunks: Sequence[Chunk]) -> Index | OwnSearch:
    """With --mine, the index with her `BM25` and her `reciprocal_rank_fusion`, as far as they are solved;
    else the index.
    """
    hers = work.mine("BM25", None)
    fuse = work.mine("reciprocal_rank_fusion", None)
    if hers is None and fuse is None:
        return index
    by_words = BM25() if hers is None else hers(terms)
    return OwnSearch(index, chunks, by_words, fuse or reciprocal_rank_fusion)


# ---- what `ask` is given


class Passage(NamedTuple):
    """What `ask` is given of a chunk."""

    id: int
    title: str
    text: str
    sentences: list[str]
    cosine: float
    """Of its nearest sentence with the question."""
    score: float
    """Of the ranking that it was found by."""


class Desk:
    """The tools of `ask`: passages, their sentences, and what an answer rests on."""

    def __init__(self, search: OwnSearch, k: int = 10):
        self._search = search
        self._index = search.index
        self._k = k

    def search(self, question: str) -> list[Passage]:
        """The best passages; none where the question names what no document names."""
        if self._index.unknown_names(question):
            return []
        chunks = self._search.chunks
        numbers = {chunk.id: number for number, chunk in enumerate(chunks)}
        cosines = {hit.chunk.id: hit.score for hit in self._index.search(question, len(chunks), "dense")}
        return [
            Passage(numbers[chunk.id], chunk.place, chunk.text, sentences_of(chunk), cosines[chunk.id], score)
            for chunk, score in self._search.search(question, self._k)
        ]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dim], of length 1."""
        return self._index.embedder.embed(texts)

    def holds(self, sentence: str, answer: str) -> bool:
        """Whether the answer's words stand in the sentence, one after the other."""
        return bool(holds_answer(sentence, [answer]))


def sentences_of(chunk: Chunk) -> list[str]:
    """A chunk's sentences, word for word."""
    return [chunk.text[start:end] for start, end in chunk.windows or ((0, len(chunk.text)),)]


def reading_with(model: GPT, tokenizer: Tokenizer) -> Callable[[str], str]:
    """A function from a prompt to the line that the model writes after it, taking the likeliest tokens."""
    ends = {i for i, token in tokenizer.vocab.items() if b"\n" in token}
    ends |= set(tokenizer.special_tokens.values())

    def read(prompt: str) -> str:
        drawn = generate(model, tokenizer.prompt(prompt), LONGEST_ANSWER, temperature=0)
        return tokenizer.decode(list(takewhile(lambda i: i not in ends, drawn)))

    return read


# ---- what `mean_embedding` is given


def token_states(embedder: Any, texts: Sequence[str]) -> tuple[Any, Any]:
    """MiniLM's hidden states for some texts, float32 [batch, time, channel], and the mask of their tokens."""
    model = embedder._model
    tokens = model.tokenizer(list(texts), padding=True, return_tensors="pt")
    states = model[0].auto_model(**tokens).last_hidden_state.detach()
    return states, tokens["attention_mask"].bool()
