"""Week 12. The texts of one HTTP request while the engine writes them: pieces of text, and the events of a
stream.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

from shared.extras import needs
from shared.serving.engine import Engine
from shared.serving.gate import ApiError, Metrics
from shared.serving.generation import Generation, Request, Token
from shared.serving.protocol import AnswerFormat, token_usage
from shared.serving.text import Piece, TextBuilder

with needs("serve"):
    from fastapi.responses import StreamingResponse
    from starlette.requests import Request as HttpRequest
    from starlette.types import Receive, Scope, Send


class Update(NamedTuple):
    """What is new of one of the texts."""

    number: int
    """Which text."""
    piece: Piece
    reason: str | None
    """With the last piece: why the text ended, "stop" or "length"."""


class Answer:
    """The texts of one HTTP request, on their way.

    vocab: the bytes of each id. stops: texts at which to end. echoed: what stands before each of the texts.
    Raises what `Engine.submit` raises, with nothing left running.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        requests: Sequence[Request],
        *,
        vocab: Mapping[int, bytes],
        stops: Sequence[str],
        echoed: Sequence[str] | None = None,
    ):
        self._vocab = vocab
        self._metrics = metrics
        self._echoed = [""] * len(requests) if echoed is None else list(echoed)
        self.texts: Sequence[TextBuilder] = [
            TextBuilder(vocab, stops, len(before)) for before in self._echoed
        ]
        self.generations: list[Generation] = []
        self._events: asyncio.Queue[tuple[int, Token | None]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._started = time.perf_counter()
        self._last_token: list[float | None] = [None] * len(requests)
        try:
            for index, request in enumerate(requests):
                self.generations.append(engine.submit(request, partial(self._receive, index)))
        except BaseException:
            self.cancel()
            raise

    async def updates(self) -> AsyncIterator[Update]:
        """The texts piece by piece, in the order in which the engine writes them.

        Raises ApiError where the engine could not finish a text.
        """
        begun: set[int] = set()
        async for index, piece, reason in self._updates_of_new_text():
            if index not in begun:
                begun.add(index)
                piece = self._opening(index) + piece
            yield Update(index, piece, reason)

    async def collect(self) -> list[tuple[Piece, str | None]]:
        """All of the texts, and why each ended. Raises ApiError like `updates`."""
        pieces = [Piece("")] * len(self.texts)
        reasons: list[str | None] = [None] * len(self.texts)
        async for index, piece, reason in self.updates():
            pieces[index] += piece
            reasons[index] = reason
        return list(zip(pieces, reasons))

    def cancel(self) -> None:
        """Ends the texts that still run."""
        for generation in self.generations:
            generation.cancel()

    def usage(self) -> dict[str, Any]:
        """Tokens so far. A prompt with several texts counts once, as its first text found it."""
        first_of_prompt = {id(g.request.prompt): g for g in reversed(self.generations)}.values()
        return token_usage(
            prompt=sum(len(generation.request.prompt) for generation in first_of_prompt),
            completion=sum(text.count for text in self.texts),
            cached=sum(generation.reused for generation in first_of_prompt),
        )

    def _receive(self, index: int, token: Token | None) -> None:
        """Called in the engine's thread."""
        if token is not None:
            now = time.perf_counter()
            last = self._last_token[index]
            if last is None:
                self._metrics.first_token.observe(now - self._started)
            else:
                self._metrics.between_tokens.observe(now - last)
            self._last_token[index] = now
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, token))

    def _opening(self, index: int) -> Piece:
        """The echoed prompt of a text, with its tokens where they were scored."""
        builder = TextBuilder(self._vocab)
        pieces = [builder.push(token) for token in self.generations[index].prompt]
        scored = sum([*pieces, builder.finish()], Piece(""))
        return Piece(self._echoed[index], scored.tokens)

    async def _updates_of_new_text(self) -> AsyncIterator[Update]:
        left = set(range(len(self.texts)))
        while left:
            index, token = await self._events.get()
            if index not in left:  # drawn before the engine heard that a stop text was found
                continue
            text = self.texts[index]
            generation = self.generations[index]
            if token is None:
                left.remove(index)
                reason = _reason(generation)
                piece = text.finish(generation.ending)
                yield Update(index, piece, "stop" if text.stopped else reason)
                continue
            piece = text.push(token)
            if text.stopped:
                left.remove(index)
                generation.cancel()
                yield Update(index, piece, "stop")
            elif piece.text:
                yield Update(index, piece, None)


def _reason(generation: Generation) -> str:
    """Why a text ended. Raises ApiError where it is not finished."""
    reason = generation.finish_reason
    if reason in ("stop", "length"):
        return reason
    if reason == "timeout":
        seconds = f"{generation.request.timeout:g} s"
        raise ApiError(
            504, f"the text was not finished within {seconds}: ask for fewer tokens", code="timeout"
        )
    if reason == "cancelled":
        raise ApiError(503, "this server is shutting down")
    raise ApiError(500, "the text could not be finished")


class Texts(Protocol):
    """What a response is made from: an `Answer`, or a text that needs no model."""

    texts: Sequence[Any]

    def updates(self) -> AsyncIterator[Update]:
        """See `Answer`."""
        ...

    async def collect(self) -> list[tuple[Piece, str | None]]:
        """See `Answer`."""
        ...

    def cancel(self) -> None:
        """See `Answer`."""
        ...

    def usage(self) -> dict[str, Any]:
        """See `Answer`."""
        ...


async def chunks(
    answer: Texts,
    form: AnswerFormat,
    head: Mapping[str, Any],
    include_usage: bool,
    closing: Mapping[str, Any] | None = None,
) -> AsyncIterator[str]:
    """An answer as server-sent events: chunks, then "[DONE]", or an error where a text was not finished.

    head: the fields that all chunks have. closing: those of the chunk that ends a text.
    """

    def chunk(choices: list[dict[str, Any]], **fields: Any) -> str:
        return _event({**head, "object": form.chunk_kind, "choices": choices, **fields})

    # With `include_usage` every chunk has the field; only the last one has a value in it.
    empty_usage = {"usage": None} if include_usage else {}
    try:
        for index in range(len(answer.texts)):
            opening = form.opening(index)
            if opening is not None:
                yield chunk([opening], **empty_usage)
        async for index, piece, reason in answer.updates():
            for delta in _deltas(form, index, piece, reason):
                last = (closing or {}) if delta["finish_reason"] else {}
                yield chunk([delta], **empty_usage, **last)
        if include_usage:
            yield chunk([], usage=answer.usage())
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status of the response was sent long ago
        yield _event(error.body)


def _deltas(form: AnswerFormat, index: int, piece: Piece, reason: str | None) -> Iterator[dict[str, Any]]:
    """What is sent of a piece, and of the end of its text."""
    parts = [form.delta(index, piece, None)] if piece.text or piece.tokens else []
    if reason:
        parts.append(form.delta(index, Piece("", ending=piece.ending), reason))
    return (part for part in parts if part is not None)


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. `close` is called however the response ends; headers come beside a stream's own."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None], headers: Mapping[str, str]):
        of_streams = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers={**of_streams, **headers})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator of events: it is never begun where the client has gone already.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def collect_unless_gone(answer: Texts, request: HttpRequest) -> list[tuple[Piece, str | None]] | None:
    """All of the texts, and why each ended; None where the client leaves before."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    collecting = asyncio.create_task(answer.collect())
    leaving = asyncio.create_task(disconnect())
    try:
        await asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED)
        return collecting.result() if collecting.done() else None
    finally:
        answer.cancel()
        collecting.cancel()
        leaving.cancel()
