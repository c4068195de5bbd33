"""Week 12. Answers from documents through the API: a chat whose body names a collection.

    {"model": "smollm2", "collection": "handbook", "messages": [{"role": "user", "content": "..."}]}

The last message is the question; it is made self-contained with the questions before it. Its nearest
sentences are ranked anew, and the answer is quoted from the best one (week 11): always the likeliest words of
it, whatever temperature, top_p and the like say. The response has a field more, `sources`: the passages that
the answer rests on, with the places of the sentences in them; none where the documents do not answer, which
the message then says. In a stream it stands in the last chunk of the text, which has the finish_reason.

Two fields more say from what to answer: `where`, conditions on what documents say of themselves, as in
`shared.retrieval.filters` (`{"team": "pumps", "year": {">=": 2020}}`), and `least_score`, below which a
question counts as being about nothing in them, in place of the embedder's own.

OpenAI's clients send the fields with `extra_body={"collection": ...}` and have the sources in `model_extra`.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from shared.extras import needs
from shared.retrieval.documents import Chunk
from shared.retrieval.domain import default_threshold, is_outside
from shared.retrieval.evidence import Source, Support, Window, supporting
from shared.retrieval.filters import Where, fields_test
from shared.retrieval.followups import self_contained, title_of_best
from shared.retrieval.index import Hit, Index
from shared.retrieval.quoting import (
    SpanForm,
    ends_of_quotes,
    examples_for,
    quoting_parts,
    relevance,
)
from shared.retrieval.rag import ABSTENTION, REFUSAL, compose
from shared.serving.answer import Answer, Texts, Update
from shared.serving.bodies import ChatBody
from shared.serving.engine import Engine
from shared.serving.gate import ApiError, Limits, Metrics
from shared.serving.generation import Request
from shared.serving.protocol import token_usage
from shared.serving.text import Piece
from shared.tokenizers import Tokenizer

with needs("serve"):
    from pydantic import FiniteFloat, ValidationInfo, field_validator

SENTENCES = 5
"""So many of the nearest sentences are ranked anew (week 11's study of it)."""
SEARCHING = threading.Lock()
"""Held by whoever searches: an embedder is not made for two threads."""
LONGEST_QUOTE = 64
"""Tokens of an answer, at most."""


class CollectionBody(ChatBody):
    """POST /v1/chat/completions, with the fields that name a collection of documents and what is wanted of
    it.
    """

    collection: str | None = None
    where: dict[str, Any] | None = None
    """Only documents whose fields fit, as in `shared.retrieval.filters`."""
    least_score: FiniteFloat | None = None
    """A question whose best passage has a lower score is not answered; None: the embedder's own."""

    @field_validator("collection")
    @classmethod
    def _one_text_of_any_form(cls, value: str | None, other: ValidationInfo) -> str | None:
        if value is None:
            return value
        if (other.data.get("n") or 1) > 1:
            raise ValueError("an answer from documents is always the same: leave out n")
        form = other.data.get("response_format")
        if form is not None and form.wanted is not None:
            raise ValueError("an answer from documents is quoted from them: leave out response_format")
        if other.data.get("tools"):
            raise ValueError("an answer from documents calls no functions: leave out tools")
        return value

    @field_validator("where", "least_score")
    @classmethod
    def _of_a_collection(cls, value: Any, other: ValidationInfo) -> Any:
        if value is not None and other.data.get("collection") is None:
            raise ValueError("it says what is wanted of a collection, and none is named: give collection")
        if isinstance(value, dict):
            fields_test(value)
        return value


class Found(NamedTuple):
    """What a collection has for a question."""

    question: str
    """As it was searched."""
    windows: list[Window]
    """The nearest sentences, best first; none where the documents do not answer."""


class FixedAnswer:
    """A text that no model writes, in the form of an `Answer`."""

    def __init__(self, text: str):
        self.texts: Sequence[Any] = [text]

    async def updates(self) -> AsyncIterator[Update]:
        yield Update(0, Piece(self.texts[0]), "stop")

    async def collect(self) -> list[tuple[Piece, str | None]]:
        return [(Piece(self.texts[0]), "stop")]

    def cancel(self) -> None:
        """There is nothing to end."""

    def usage(self) -> dict[str, Any]:
        return token_usage(0, 0, 0)


class Collections:
    """The documents that a server answers from, by the names that clients use."""

    def __init__(self, indexes: Mapping[str, Index]):
        self.indexes = dict(indexes)

    def index(self, name: str) -> Index:
        """Raises ApiError (404) for a name that no collection has."""
        if name not in self.indexes:
            there = ", ".join(self.indexes) or "none: start the server with --documents FOLDER"
            message = f"no collection is called {name!r}; there are: {there}"
            raise ApiError(404, message, "collection", "collection_not_found")
        return self.indexes[name]

    def find(
        self,
        name: str,
        questions: Sequence[str],
        *,
        where: Where | None = None,
        least_score: float | None = None,
    ) -> Found:
        """What there is for the last of these questions. Called in a thread: it takes time.

        Raises ApiError for an unknown collection, for an empty question, and for a field of `where` that no
        document has.
        """
        index = self.index(name)
        if not questions or not questions[-1].strip():
            raise ApiError(400, "the last message from the user is empty: ask something", "messages")
        with SEARCHING:
            try:
                index.check_where(where)
            except ValueError as error:
                raise ApiError(400, str(error), "where") from None
            question, nearest = nearest_passage(
                index, questions[-1], questions[:-1], where=where, least_score=least_score
            )
            if nearest is None:
                return Found(question, [])
            return Found(question, index.nearest_windows(question, SENTENCES, where=where))


def nearest_passage(
    index: Index,
    question: str,
    earlier: Sequence[str],
    *,
    where: Where | None = None,
    least_score: float | None = None,
) -> tuple[str, Hit | None]:
    """The question, self-contained, and the best passage for it; None where the documents are about something
    else. where, least_score: as in `CollectionBody`. Called while `SEARCHING` is held.
    """
    earlier = [asked for asked in earlier if asked.strip()]
    asked = self_contained(question, earlier, title_of_best(index, where))
    nearest = next(iter(index.search(asked, 1, where=where)), None)
    least = default_threshold(index) if least_score is None else least_score
    if is_outside(index, asked, nearest, least):
        return asked, None
    return asked, nearest


class Reading(NamedTuple):
    """What a model is given to read for an answer that it writes itself."""

    ids: list[int]
    """None where the documents are about something else."""
    question: str = ""
    """As it was searched."""
    passages: Sequence[tuple[Chunk, float]] = ()
    """With their scores."""


def reading_of(
    index: Index, question: str, earlier: Sequence[str], tokenizer: Tokenizer, budget: int
) -> Reading:
    """The best passage before the question, in at most `budget` tokens. earlier: what was asked before.

    Raises ValueError as `compose` does.
    """
    with SEARCHING:
        asked, nearest = nearest_passage(index, question, earlier)
    if nearest is None:
        return Reading([], asked)
    prompt = compose(asked, [nearest.chunk], tokenizer, budget)  # a small model reads one passage best
    return Reading(prompt.ids, asked, [(chunk, nearest.score) for chunk in prompt.chunks])


def sources_of(index: Index | None, reading: Reading, text: str) -> list[Source]:
    """What an answer rests on that a model wrote from what it was given to read."""
    if index is None or not reading.passages or text == ABSTENTION:
        return []
    with SEARCHING:
        return supporting(index.embedder, reading.question, text, reading.passages)


class QuotingAnswers:
    """Has an engine rank sentences and quote from the best."""

    def __init__(
        self,
        collections: Collections,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        limits: Limits,
        metrics: Metrics,
        vocab: Mapping[int, bytes],
    ):
        self._collections = collections
        self._metrics = metrics
        self._vocab = vocab
        self._engine = engine
        self._tokenizer = tokenizer
        self._limits = limits

    # Made when an answer is first quoted: a vocabulary of single characters need not be able to write them.

    @cached_property
    def _ends(self) -> frozenset[int]:
        return ends_of_quotes(self._tokenizer)

    @cached_property
    def _examples(self) -> list[int]:
        return examples_for(self._tokenizer, self._engine.max_length // 2)

    async def start(
        self, body: CollectionBody, collection: str, questions: Sequence[str], adapter: str | None
    ) -> tuple[Texts, list[dict[str, Any]]]:
        """Starts an answer to the last of these questions; with it, its sources.

        Raises ApiError for what cannot be done, QueueFull, and Draining.
        """
        found = await asyncio.to_thread(
            self._collections.find,
            collection,
            questions,
            where=body.where,
            least_score=body.least_score,
        )
        if not found.windows:
            return FixedAnswer(REFUSAL), []
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = getattr(body, body.length_field)
        try:
            best = await self.best(found, adapter)
            asked = self.request(found.question, best, adapter, max_tokens, logprobs)
            self._engine.check(asked)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None
        answer = QuotedAnswer(self._engine, self._metrics, [asked], vocab=self._vocab, stops=body.stops)
        return answer, [source_from(best).as_json()]

    async def best(self, found: Found, adapter: str | None) -> Window:
        """The most relevant of the sentences that were found. Raises what `Engine.submit` raises."""
        scored = [
            (await self._relevance(found.question, window, adapter), -number)
            for number, window in enumerate(found.windows)
        ]
        return found.windows[-max(scored)[1]]

    async def _relevance(self, question: str, window: Window, adapter: str | None) -> float:
        parts = quoting_parts(question, window, self._tokenizer)
        request = Request(
            [*self._examples, *parts.ids],
            0,
            temperature=0.0,
            adapter=adapter,
            score_prompt=True,
            scored_from=len(self._examples),
            timeout=self._limits.seconds,
        )
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def listen(token: object) -> None:
            if token is None:
                loop.call_soon_threadsafe(done.set)

        generation = self._engine.submit(request, listen)
        try:
            await done.wait()
        finally:
            generation.cancel()
        if generation.finish_reason != "length":
            raise ApiError(503, "the documents could not be read in time: ask again later")
        asked = generation.prompt[: -len(parts.after)][-len(parts.question) :]
        return relevance(window, sum(token.logprob or 0.0 for token in asked) / len(asked))

    def request(
        self, question: str, window: Window, adapter: str | None, max_tokens: int | None, logprobs: int | None
    ) -> Request:
        """Asks the engine for a quote from a sentence. Raises ValueError where it has no word to quote."""
        prompt = [*self._examples, *quoting_parts(question, window, self._tokenizer).ids]
        room = max(1, self._engine.max_length - len(prompt))
        wanted = LONGEST_QUOTE if max_tokens is None else max_tokens
        return Request(
            prompt,
            min(wanted, room, LONGEST_QUOTE),
            temperature=0.0,
            form=SpanForm(window.text, self._tokenizer, self._ends),
            stop=sorted(self._ends),
            adapter=adapter,
            logprobs=logprobs,
            timeout=self._limits.seconds,
        )


def source_from(window: Window) -> Source:
    """A sentence as the source of what was quoted from it."""
    return Source(window.chunk, window.score, (Support(window.start, window.end, window.score),))


class QuotedAnswer(Answer):
    """A quote on its way, without the space before its first word."""

    async def _updates_of_new_text(self) -> AsyncIterator[Update]:
        begun = False
        async for number, piece, reason in super()._updates_of_new_text():
            if not begun and piece.text.strip():
                begun = True
                piece = replace(piece, text=piece.text.lstrip())
            elif not begun:
                piece = replace(piece, text="")
            yield Update(number, piece, reason)
