"""Week 11. Answers from documents: passages are put before the question, the model goes on from there, and
its sources are named.

    rag = RAG(index, Reader(load_model("smollm2")))
    reply = rag.ask("When does the last ferry leave?")
    for piece in reply:                         # as it is written
        print(piece, end="", flush=True)
    print(reply.sources)                        # ['ferry-timetable.md, Summer sailings']
    print(reply.evidence[0].quotes)             # the sentences that the answer rests on
    rag.ask("And in winter?", earlier=[reply.question])
    rag.ask("Who may fish?", where={"year": {">=": 2020}})   # only from these documents

A question that is about nothing in the documents is refused. With a `Quoter` in the reader's place the answer
is a span of the best sentence, word for word.

Source: Lewis et al., "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks" (2020), here without
training.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import Literal

import regex
import torch

from shared.devices import device_of
from shared.registry import LanguageModel
from shared.retrieval.bm25 import UNSPACED
from shared.retrieval.documents import Chunk
from shared.retrieval.domain import default_threshold, is_outside
from shared.retrieval.evidence import Source, Support, supporting
from shared.retrieval.filters import Where
from shared.retrieval.followups import self_contained, title_of_best
from shared.retrieval.index import Hit, Index
from shared.retrieval.quoting import Quoter
from shared.sampling.generate import generate
from shared.sampling.speculation import Lookup
from shared.sampling.text import stream_text
from shared.tokenizers import Tokenizer
from shared.tokenizers.base import tokenizer_of

ABSTENTION = "I don't know."
REFUSAL = "Nothing in the documents answers this."
"""The answer to a question that no passage is near enough to."""
WORD = regex.compile(rf"{UNSPACED}\p{{M}}*|(?:(?!{UNSPACED})\S)+", regex.V1)
"""Where a passage may be cut: behind a word, or behind a letter where a script has no spaces."""


@dataclass(frozen=True)
class Prompt:
    """What the model is given to read."""

    ids: list[int]
    chunks: tuple[Chunk, ...]
    """Those that fitted, as far as they fitted."""


def compose(question: str, chunks: Sequence[Chunk], tokenizer: Tokenizer, budget: int) -> Prompt:
    """The passages, best first, then the question, in at most `budget` tokens.

    A passage that does not fit whole is cut at the end of a `WORD`, and those after it are left out. Raises
    ValueError for an empty question and for one that does not fit by itself.
    """
    question = " ".join(question.split())
    if not question:
        raise ValueError("there is no question: give one")

    def encode(chunks: Sequence[Chunk]) -> list[int]:
        passages = "".join(f"{chunk.passage}\n\n" for chunk in chunks)
        return tokenizer.prompt(f"{passages}Question: {question}\nAnswer:")

    used: list[Chunk] = []
    ids = encode(used)
    if len(ids) > budget:
        raise ValueError(
            f"the question has {len(ids)} tokens with its frame, but only {budget} fit before the answer: ask"
            " a shorter one"
        )
    for chunk in chunks:
        longer = encode([*used, chunk])
        if len(longer) > budget:
            beginning = _longest_beginning(chunk, partial(_fits, encode, tuple(used), budget))
            if beginning is not None:
                used.append(beginning)
            return Prompt(encode(used), tuple(used))
        used.append(chunk)
        ids = longer
    return Prompt(ids, tuple(used))


def _fits(
    encode: Callable[[Sequence[Chunk]], list[int]], used: Sequence[Chunk], budget: int, chunk: Chunk
) -> bool:
    return len(encode([*used, chunk])) <= budget


def _longest_beginning(chunk: Chunk, fits: Callable[[Chunk], bool]) -> Chunk | None:
    """The chunk with as many of its words as fit; None if not even one does."""
    ends = [word.end() for word in WORD.finditer(chunk.text)]

    def first(words: int) -> Chunk:
        return replace(chunk, text=chunk.text[: ends[words - 1]], windows=())

    # Numbers of words from 1 up: the first that does not fit, less one.
    words = bisect_left(range(1, len(ends)), True, key=lambda n: not fits(first(n)))
    return first(words) if words else None


class Reply:
    """An answer that is being written: iterate over it for its pieces, or take `text`, in any order.

    support: finds the sources of the whole answer; None where there are none to find.
    """

    def __init__(
        self,
        pieces: Iterator[str],
        chunks: Sequence[Chunk],
        question: str = "",
        support: Callable[[str], list[Source]] | None = None,
        nearest: Hit | None = None,
    ):
        self._coming = pieces
        self._written: list[str] = []
        self._support = support
        self.chunks = tuple(chunks)
        """What the model was given to read."""
        self.question = question
        """As it was searched: a follow-up question is self-contained here."""
        self.nearest = nearest
        """The passage that fits the question best, also where the question is refused."""

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            if at == len(self._written):
                piece = next(self._coming, None)
                if piece is None:
                    return
                self._written.append(piece)
            yield self._written[at]
            at += 1

    @property
    def text(self) -> str:
        """The whole answer; waits for its end."""
        return "".join(self).strip()

    @property
    def abstained(self) -> bool:
        """Whether it is no answer. Waits for its end."""
        return self.text in (ABSTENTION, REFUSAL)

    @cached_property
    def evidence(self) -> list[Source]:
        """The passages that the answer rests on, the sentences in them marked; none for no answer. Waits for
        its end.
        """
        if self.abstained or self._support is None:
            return []
        return self._support(self.text)

    @property
    def sources(self) -> list[str]:
        """Where what the answer rests on can be looked up; none for no answer. Waits for its end."""
        if self.abstained:
            return []
        chunks = self.chunks if self._support is None else [source.chunk for source in self.evidence]
        return list(dict.fromkeys(chunk.cite for chunk in chunks))


class Reader:
    """A language model that answers from passages: greedily, in one line.

    tokenizer: None takes the model's. min_gain: answers that the passages make less likely than this, in nats
    for each token (see `gain`), are not given. The answer is then shown when it is whole, and not piece by
    piece. speculate: answers repeat their passage, so they are written in fewer steps (see
    `shared.sampling.speculation`), the same ones.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        max_new_tokens: int = 32,
        min_gain: float | None = None,
        *,
        speculate: bool = True,
    ):
        tokenizer = tokenizer_of(model, tokenizer)
        self.budget: int = model.config.block_size - max_new_tokens
        if max_new_tokens < 1 or self.budget < 1:
            raise ValueError(
                f"max_new_tokens={max_new_tokens}: must be at least 1, and below the model's"
                f" block_size={model.config.block_size}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.min_gain = min_gain
        self.speculate = Lookup() if speculate else None
        ends = set(tokenizer.special_tokens.values())
        self.ends = ends | {i for i, token in tokenizer.vocab.items() if b"\n" in token}
        """What ends an answer: any token with a line break in it, and those that stand for no text."""

    def read(self, question: str, chunks: Sequence[Chunk] = ()) -> Reply:
        """The answer from these chunks; without any, what the model believes.

        An empty answer counts as an abstention.
        """
        prompt = compose(question, chunks, self.tokenizer, self.budget)
        if self.min_gain is not None and prompt.chunks:
            return Reply(self._if_supported(question, prompt, self.min_gain), prompt.chunks)
        return Reply(_or_abstain(stream_text(self.tokenizer, self._ids(prompt))), prompt.chunks)

    def _ids(self, prompt: Prompt) -> Iterator[int]:
        drawn = generate(self.model, prompt.ids, self.max_new_tokens, temperature=0, speculate=self.speculate)
        return takewhile(lambda i: i not in self.ends, drawn)

    def draft(self, question: str, chunks: Sequence[Chunk]) -> tuple[Prompt, list[int]]:
        """The prompt, and the answer's ids whatever their gain: what `gain` takes."""
        prompt = compose(question, chunks, self.tokenizer, self.budget)
        return prompt, list(self._ids(prompt))

    def _if_supported(self, question: str, prompt: Prompt, min_gain: float) -> Iterator[str]:
        """The answer in one piece, or an abstention where its gain is below `min_gain`."""
        answer = list(self._ids(prompt))
        pieces = []
        if answer and self.gain(question, prompt, answer) >= min_gain:
            pieces.append(self.tokenizer.decode(answer))
        yield from _or_abstain(iter(pieces))

    def gain(self, question: str, prompt: Prompt, answer: Sequence[int]) -> float:
        """How much likelier the passages make the answer than the question alone does, in nats per token."""
        alone = compose(question, (), self.tokenizer, self.budget).ids
        return self._log_probability(prompt.ids, answer) - self._log_probability(alone, answer)

    @torch.inference_mode()
    def _log_probability(self, ids: list[int], answer: Sequence[int]) -> float:
        device = device_of(self.model)
        logits = self.model(torch.tensor([[*ids, *answer[:-1]]], device=device))[0, len(ids) - 1 :].float()
        targets = torch.tensor(answer, device=device)[:, None]
        return logits.log_softmax(-1).gather(1, targets).mean().item()


def _or_abstain(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces without white space at the beginning; `ABSTENTION` where nothing comes."""
    started = False
    for piece in pieces:
        if not started:
            piece = piece.lstrip()
            started = bool(piece)
        if piece:
            yield piece
    if not started:
        yield ABSTENTION


class RAG:
    """Finds `k` chunks for a question and lets a reader answer from them; a `Quoter` takes the nearest
    sentences instead, wherever they stand.

    A question is refused where the best chunk has a score below `least_score`, where none is found, and where
    it names what no document names. None: the embedder's own threshold (see `default_threshold`).
    """

    def __init__(
        self,
        index: Index,
        reader: Reader | Quoter,
        k: int = 1,
        by: Literal["dense", "bm25", "hybrid"] = "dense",
        *,
        least_score: float | None = None,
    ):
        self.index = index
        self.reader = reader
        self.k = k
        self.by = by
        self.least_score = default_threshold(index, by) if least_score is None else least_score

    def ask(self, question: str, earlier: Sequence[str] = (), *, where: Where | None = None) -> Reply:
        """earlier: what was asked before in this conversation, oldest first. where: answers from documents
        that fit this only, as in `Index.search`.

        Raises ValueError for an empty question, for one that is too long, and as `Index.search` does.
        """
        if earlier:
            question = self_contained(question, earlier, title_of_best(self.index, where))
        hits = self.index.search(question, self.k, self.by, where=where)
        nearest = hits[0] if hits else None
        if nearest is None or is_outside(self.index, question, nearest, self.least_score):
            return Reply(iter([REFUSAL]), (), question, nearest=nearest)
        if isinstance(self.reader, Quoter):
            return self._quoted(self.reader, question, nearest, where)
        reply = self.reader.read(question, [hit.chunk for hit in hits])
        passages = [(chunk, hit.score) for chunk, hit in zip(reply.chunks, hits)]

        def support(text: str) -> list[Source]:
            return supporting(self.index.embedder, question, text, passages)

        return Reply(iter(reply), reply.chunks, question, support, nearest)

    def _quoted(self, quoter: Quoter, question: str, nearest: Hit, where: Where | None) -> Reply:
        best = quoter.quote(question, self.index.nearest_windows(question, quoter.sentences, where=where))
        if best is None:
            return Reply(iter([ABSTENTION]), (), question, nearest=nearest)
        sentence = Support(best.window.start, best.window.end, best.window.score)
        sources = [Source(best.window.chunk, best.window.score, (sentence,))]
        return Reply(iter([best.text]), (best.window.chunk,), question, lambda _: sources, nearest)
