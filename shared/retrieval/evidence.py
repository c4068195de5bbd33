"""Week 11. What an answer rests on: passages, and in each the sentences that support it, marked and scored.

for source in reply.evidence:
    print(source.score, source.chunk.cite)
    print(source.marked())          # the passage, its supporting sentences in [brackets]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.retrieval.documents import Chunk
from shared.retrieval.embedders import Embedder
from shared.retrieval.ranking import holds_answer
from shared.retrieval.stores import measured


class Window(NamedTuple):
    """A sentence of a passage, as it was found."""

    chunk: Chunk
    start: int
    end: int
    score: float
    """Its cosine with the question, or what the embedder's measure is."""

    @property
    def text(self) -> str:
        return self.chunk.text[self.start : self.end]


class Support(NamedTuple):
    """A sentence that supports an answer: its place in the passage's text, in characters."""

    start: int
    end: int
    score: float
    """Its cosine with the question, or what the embedder's measure is."""


@dataclass(frozen=True)
class Source:
    """A passage that an answer rests on."""

    chunk: Chunk
    score: float
    """How well the passage fits the question, as the search says it."""
    sentences: tuple[Support, ...]
    """In the order of the text."""

    @property
    def quotes(self) -> list[str]:
        """The sentences' texts."""
        return [self.chunk.text[sentence.start : sentence.end] for sentence in self.sentences]

    def marked(self, left: str = "[", right: str = "]") -> str:
        """The passage's text with marks around what supports the answer."""
        text, pieces, at = self.chunk.text, [], 0
        for start, end, _ in self.sentences:
            pieces += [text[at:start], left, text[start:end], right]
            at = end
        return "".join([*pieces, text[at:]])

    def as_json(self) -> dict[str, Any]:
        """For the response of a server: plain values."""
        return {
            "document": self.chunk.source,
            "title": self.chunk.place,
            "metadata": self.chunk.metadata,
            "text": self.chunk.text,
            "score": round(self.score, 4),
            "sentences": [
                {"start": s.start, "end": s.end, "score": round(s.score, 4), "text": quote}
                for s, quote in zip(self.sentences, self.quotes)
            ],
        }


def supporting(
    embedder: Embedder, question: str, answer: str, passages: Sequence[tuple[Chunk, float]]
) -> list[Source]:
    """The sources of an answer that a model wrote from these passages, each with its score.

    They are the sentences that hold the answer as whole words. Where none does, because the model put it in
    other words, it is the one that is nearest to question and answer together. Passages without such a
    sentence are no sources, although the model was given them to read.
    """
    windows = [
        (number, window)
        for number, (chunk, _) in enumerate(passages)
        for window in chunk.windows or ((0, len(chunk.text)),)
    ]
    if not windows:
        return []
    texts = [text for chunk, _ in passages for text in chunk.window_texts()]
    questions = embedder.embed_questions([question, f"{question} {answer}"])
    asked, with_answer = measured(questions, embedder.measure)
    vectors = measured(embedder.embed(texts), embedder.measure)
    scores = (vectors @ asked).tolist()
    found = [
        i
        for i, (n, (start, end)) in enumerate(windows)
        if holds_answer(passages[n][0].text[start:end], [answer])
    ]
    found = found or [int((vectors @ with_answer).argmax())]
    sources = []
    for number, (chunk, score) in enumerate(passages):
        sentences = [
            Support(windows[i][1][0], windows[i][1][1], scores[i]) for i in found if windows[i][0] == number
        ]
        if sentences:
            sources.append(Source(chunk, score, tuple(sentences)))
    return sources
