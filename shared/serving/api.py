"""Week 12. A server that OpenAI's clients can talk to: FastAPI in front of the engine.

    app = create_app(model, tokenizer)          # python -m shared.serving --model smollm2 does this and serves it

`/v1/models`, `/v1/completions`, `/v1/chat/completions` (with `stream`, server-sent events), `/health` (the
process answers), `/ready` (it takes requests), `/metrics` (Prometheus). A model's LoRA adapters are models of
their own, by the adapter's name.

A client that goes away takes its texts with it, before the engine's next step. What is too much is refused at
once: 413 for a body, 400 for a prompt, 429 when the queue is full, 503 while the server shuts down, 504 when
a text takes longer than it may.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import prometheus_client as prometheus
import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from shared.models.gpt import GPT
from shared.models.pretrained import IM_END, chat_prompt
from shared.quantization.modules import quantization_of
from shared.serving import engine
from shared.serving.engine import Draining, Engine, Generation, QueueFull, Token
from shared.serving.gate import ApiError, Gate, Limits, Metrics, invalid
from shared.serving.protocol import (
    Body,
    ChatBody,
    ChatForms,
    CompletionBody,
    CompletionForms,
    Forms,
    Piece,
    TextBuilder,
    usage,
)
from shared.tokenizers import Tokenizer
from shared.tokenizers.bpe import END_OF_TEXT


def describe_size(model: GPT) -> str:
    """How large a model is, in words: the parameters of its configuration, whatever they are stored in and
    whatever adapters stand beside.
    """
    with torch.device("meta"):
        parameters = GPT(model.config).num_parameters()
    stored = quantization_of(model)
    return f"{parameters:,} parameters" + (f" in {stored['scheme']}" if stored else "")


class Answer:
    """The texts of one HTTP request. echoed: what stands before each of them. Raises what `Engine.submit`
    raises, with nothing left running.
    """

    def __init__(
        self,
        served: Engine,
        metrics: Metrics,
        requests: Sequence[engine.Request],
        vocab: Mapping[int, bytes],
        stops: Sequence[str],
        echoed: Sequence[str] | None = None,
    ):
        self._vocab, self._echoed = vocab, list(echoed or [""] * len(requests))
        self.texts = [TextBuilder(vocab, stops, len(before)) for before in self._echoed]
        self.generations: list[Generation] = []
        self._events: asyncio.Queue[tuple[int, Token | None]] = asyncio.Queue()
        self._loop, self._metrics = asyncio.get_running_loop(), metrics
        self._last: list[float | None] = [None] * len(requests)
        self._started = time.perf_counter()
        try:
            for index, request in enumerate(requests):
                self.generations.append(served.submit(request, partial(self._hear, index)))
        except BaseException:
            self.cancel()
            raise

    def _hear(self, index: int, token: Token | None) -> None:
        """In the engine's thread."""
        if token is not None:
            now, last = time.perf_counter(), self._last[index]
            (self._metrics.first if last is None else self._metrics.between).observe(
                now - (self._started if last is None else last)
            )
            self._last[index] = now
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, token))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece, str | None]]:
        """(text's number, what is new of it, and with its last piece the reason). Raises ApiError where the
        engine gave up.
        """
        begun: set[int] = set()
        async for index, piece, reason in self._new_pieces():
            yield index, piece if index in begun else self._opening(index) + piece, reason
            begun.add(index)

    def _opening(self, index: int) -> Piece:
        """The prompt, where it is echoed."""
        text = TextBuilder(self._vocab)
        parts = [text.push(token) for token in self.generations[index].prompt] + [text.finish()]
        return Piece(self._echoed[index], sum(parts, Piece("")).tokens)

    async def _new_pieces(self) -> AsyncIterator[tuple[int, Piece, str | None]]:
        left = set(range(len(self.texts)))
        while left:
            index, token = await self._events.get()
            if index not in left:  # a stop text was found; the engine had not heard of it yet
                continue
            text, generation = self.texts[index], self.generations[index]
            if token is not None:
                piece = text.push(token)
                if text.stopped:
                    generation.cancel()
                    left.remove(index)
                if piece.text or text.stopped:
                    yield index, piece, "stop" if text.stopped else None
                continue
            left.remove(index)
            reason = generation.finish_reason
            if reason == "timeout":
                raise ApiError(
                    504,
                    f"the text was not finished within {generation.request.timeout:g} s: ask for fewer"
                    " tokens",
                    code="timeout",
                )
            if reason not in ("stop", "length"):
                raise ApiError(
                    *(
                        (503, "this server is shutting down")
                        if reason == "cancelled"
                        else (500, "the text could not be finished")
                    )
                )
            yield index, text.finish(generation.ending), reason

    def cancel(self) -> None:
        """Ends what still runs."""
        for generation in self.generations:
            generation.cancel()

    def usage(self) -> dict[str, Any]:
        """Tokens so far; a prompt that several texts go on from counts once, as its first text found it."""
        prompts = {id(g.request.prompt): g for g in reversed(self.generations)}.values()
        return usage(
            sum(len(g.request.prompt) for g in prompts),
            sum(text.count for text in self.texts),
            sum(g.reused for g in prompts),
        )


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, `close` is called."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:  # and not in the generator of events, which is never begun where the client is gone already
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def create_app(
    model: GPT,
    tokenizer: Tokenizer,
    name: str = "model",
    slots: int = 8,
    max_length: int | None = None,
    chunk: int = 32,
    queue: int = 64,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """The app, its engine running under `app.state.engine`; it is closed when the app shuts down.

    name: what clients call the model; its adapters go by their own names. slots, max_length, chunk, queue: as
    `Engine`. api_key: if given, `/v1/` is only for those who send it. Raises ValueError as `Engine` does, and
    for an adapter that is called like the model.
    """
    served = Engine(model, slots, max_length, chunk, queue)
    if name in served.adapters:
        served.close()
        raise ValueError(
            f"an adapter and the model are both called {name!r}: choose another name for one of them"
        )
    limits, metrics, created = limits or Limits(), Metrics(served), int(time.time())
    models = {name: None} | {adapter: adapter for adapter in served.adapters}
    specials = getattr(tokenizer, "special_tokens", {})
    ends = [specials[token] for token in (END_OF_TEXT, IM_END) if token in specials]
    longest_token = max(map(len, tokenizer.vocab.values()))
    # A model may have more ids than its tokenizer (rows that were added for speed): they are no text.
    vocab = dict.fromkeys(range(model.config.vocab_size), b"") | dict(tokenizer.vocab)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.close)

    app = FastAPI(
        title="llm-weeks", lifespan=lifespan, docs_url=None, redoc_url=None
    )  # those pages fetch scripts from elsewhere
    app.state.engine, app.state.tokenizer, app.state.models, app.state.limits, app.state.api_key = (
        served,
        tokenizer,
        models,
        limits,
        api_key,
    )

    # ---- what was asked

    async def encode(text: str) -> list[int]:
        limit = limits.prompt or served.max_length
        if len(text) > limit * longest_token:  # not worth the time
            raise ApiError(
                400, f"the prompt is longer than {limit} tokens", "prompt", "context_length_exceeded"
            )
        try:
            return await asyncio.to_thread(tokenizer.encode, text)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from None

    def check(body: Body, count: int = 1) -> None:
        """What can be said before `count` prompts are tokenized, which takes time."""
        if body.model not in models:
            raise ApiError(
                404,
                f"no model is called {body.model!r}; there are: {', '.join(models)}",
                "model",
                "model_not_found",
            )
        if count * (body.n or 1) > limits.texts:
            raise ApiError(
                400, f"{count} prompts times n={body.n or 1} are more than {limits.texts} texts", "n"
            )

    def plan(
        body: Body, prompts: list[list[int]], wanted: int | None, **options: Any
    ) -> list[engine.Request]:
        """A request for each text. wanted: new tokens, None for as many as there may be."""
        if limits.tokens and (wanted or 0) > limits.tokens:
            raise ApiError(
                400, f"max_tokens={wanted} is more than this server gives: {limits.tokens}", "max_tokens"
            )
        requests = []
        for prompt in prompts:
            longest = min(limits.prompt or served.max_length, served.max_length)
            new = (
                max(0, min(limits.tokens or served.max_length, served.max_length - len(prompt)))
                if wanted is None
                else wanted
            )
            if len(prompt) > longest or len(prompt) + new > served.max_length:
                message = (
                    f"{len(prompt)} tokens of prompt and {new} new ones: a prompt may have {longest}, and"
                    f" both together {served.max_length}"
                )
                raise ApiError(400, message, "prompt", "context_length_exceeded")
            for i in range(body.n or 1):
                try:
                    requests.append(
                        engine.Request(
                            prompt,
                            new,
                            1.0 if body.temperature is None else body.temperature,
                            body.top_k,
                            body.top_p,
                            None if body.seed is None else body.seed + i,
                            () if body.ignore_eos else ends,
                            models[body.model],
                            timeout=limits.seconds,
                            **options,
                        )
                    )
                    served.check(requests[-1])
                except ValueError as error:
                    raise ApiError(400, str(error)) from None
        return requests

    # ---- what is answered

    async def whole(answer: Answer, request: Request) -> tuple[list[Piece], list[str]] | None:
        """All of the texts, and why each ended; None for a client that has gone."""

        async def collect() -> None:
            async for index, piece, reason in answer.pieces():
                found[index], reasons[index] = found[index] + piece, reason

        async def leaves() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        found, reasons = [Piece("")] * len(answer.texts), [""] * len(answer.texts)
        tasks = [asyncio.create_task(collect()), asyncio.create_task(leaves())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                return None
            tasks[0].result()
            return found, reasons
        finally:
            answer.cancel()
            for task in tasks:
                task.cancel()

    async def respond(body: Body, request: Request, answer: Answer, forms: Forms) -> Response:
        head = {"id": f"{forms.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        if body.stream:
            include = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(_events(answer, forms, head, include), answer.cancel)
        done = await whole(answer, request)
        if done is None:
            return Response(status_code=499)  # nobody reads it; the count of answers shows it
        choices = [forms.choice(index, piece, reason) for index, (piece, reason) in enumerate(zip(*done))]
        return JSONResponse({**head, "object": forms.kind, "choices": choices, "usage": answer.usage()})

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(model) for model in models]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        if model not in models:
            raise ApiError(
                404,
                f"no model is called {model!r}; there are: {', '.join(models)}",
                "model",
                "model_not_found",
            )
        return describe(model)

    def describe(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": created, "owned_by": "llm-weeks"}

    async def complete(body: CompletionBody) -> Answer:
        check(body, len(body.prompts))
        prompts = [prompt if isinstance(prompt, list) else await encode(prompt) for prompt in body.prompts]
        scored = body.echo and body.logprobs is not None
        requests = plan(
            body,
            prompts,
            16 if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            score_prompt=bool(scored),
        )
        echoed = (
            [b"".join(vocab[i] for i in r.prompt).decode(errors="replace") for r in requests]
            if body.echo
            else None
        )
        return Answer(served, metrics, requests, vocab, body.stops, echoed)

    app.state.complete = complete  # for the page

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await respond(
            body, request, await complete(body), CompletionForms(vocab, body.logprobs is not None)
        )

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        check(body)
        messages = [message.plain() for message in body.messages]
        if sum(len(m["content"]) for m in messages) > served.max_length * longest_token:
            raise ApiError(
                400,
                f"the messages are longer than {served.max_length} tokens",
                "messages",
                "context_length_exceeded",
            )
        try:
            prompt = await asyncio.to_thread(chat_prompt, tokenizer, messages)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        requests = plan(body, [prompt], wanted, logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        answer = Answer(served, metrics, requests, vocab, body.stops)
        return await respond(body, request, answer, ChatForms(vocab, bool(body.logprobs)))

    # ---- for those who run it

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return (
            JSONResponse({"status": "draining"}, 503)
            if served.draining
            else JSONResponse({"status": "ready"})
        )

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(
            prometheus.generate_latest(metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST
        )

    # ---- errors

    def handle(kind: type[Exception], answer: Callable[[Any], ApiError]) -> None:
        async def handler(request: Request, error: Exception) -> JSONResponse:
            return answer(error).response()

        app.add_exception_handler(kind, handler)

    again = {"Retry-After": "1"}
    handle(ApiError, lambda error: error)
    handle(QueueFull, lambda error: ApiError(429, str(error), code="queue_full", headers=again))
    handle(Draining, lambda error: ApiError(503, str(error), code="shutting_down", headers=again))
    handle(RequestValidationError, invalid)
    handle(HTTPException, lambda error: ApiError(error.status_code, str(error.detail), headers=error.headers))
    handle(Exception, lambda error: ApiError(500, "the server made a mistake: its log says which"))
    app.add_middleware(
        Gate, limits=limits, api_key=api_key, metrics=metrics, paths=[route.path for route in app.routes]
    )
    return app


async def _events(
    answer: Answer, forms: Forms, head: Mapping[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    event = lambda values: f"data: {json.dumps(values)}\n\n"
    chunk = lambda choices: event(
        {**head, "object": forms.chunk_kind, "choices": choices} | ({"usage": None} if include_usage else {})
    )
    try:
        for index in range(len(answer.texts)):
            if opening := forms.opening(index):
                yield chunk([opening])
        async for index, piece, reason in answer.pieces():
            if piece.text or piece.tokens:
                yield chunk([forms.delta(index, piece, None)])
            if reason:
                yield chunk([forms.delta(index, Piece("", ending=piece.ending), reason)])
        if include_usage:
            yield event({**head, "object": forms.chunk_kind, "choices": [], "usage": answer.usage()})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status was sent long ago
        yield event(error.form)
