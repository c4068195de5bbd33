"""Week 12. A server that OpenAI's clients can talk to: FastAPI in front of the engine.

    app = create_app(model, tokenizer)      # python -m shared.serving --model smollm2 does this and serves it

`/v1/models`, `/v1/completions`, `/v1/chat/completions` (with `stream`, server-sent events; with `tools` where
a model's template has them; with `collection` from documents, see `shared.serving.documents`),
`/v1/embeddings` (where there are embedders), `/health` (the process answers), `/ready` (it takes requests),
`/metrics` (Prometheus). A model's LoRA adapters are models of their own, by the adapter's name.

The texts of a client that goes away are cancelled before the engine's next step. What is too much is refused
at once: 413 for a body, 400 for a prompt, 429 when the queue is full, 503 while the server shuts down, 504
when a text takes longer than it may.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from shared.extras import needs
from shared.models.chat import chat_prompt
from shared.models.gpt import GPT
from shared.quantization.modules import quantization_of
from shared.registry import without_memory
from shared.serving import generation
from shared.serving.answer import Answer, EventStream, Texts, chunks, collect_unless_gone
from shared.serving.bodies import Body, ChatBody, CompletionBody, JsonObject, ResponseFormat
from shared.serving.documents import CollectionBody, Collections, QuotingAnswers
from shared.serving.embeddings import EmbeddingAnswers, EmbeddingBody
from shared.serving.engine import Draining, Engine, QueueFull
from shared.serving.gate import ApiError, Gate, Limits, Metrics, invalid_body
from shared.serving.grammar import Form, Grammars
from shared.serving.protocol import AnswerFormat, ChatFormat, CompletionFormat
from shared.serving.sites import SiteRules
from shared.serving.tools import ToolFormat, ToolRequest, ToolUse, plain_messages
from shared.tokenizers import Tokenizer
from shared.tokenizers.base import ends_of

if TYPE_CHECKING:
    from shared.retrieval.embedders import Embedder
    from shared.retrieval.index import Index

with needs("serve"):
    import prometheus_client as prometheus
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

DEFAULT_MAX_TOKENS = 16
"""New tokens of a completion that asks for no number, as in OpenAI's API."""
MOST_NAMED = 10
"""How many of the fields that are not read an answer's headers name."""
NAMEABLE = re.compile(r"[\w.\[\]-]{1,80}", re.ASCII)
GONE = 499
"""The client has left: nobody reads it, and the count of answers shows it."""
READ = ["GET", "HEAD"]
"""Methods of what only tells something. Probes ask for the head alone."""


def create_app(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    name: str = "model",
    slots: int = 8,
    max_length: int | None = None,
    chunk: int = 32,
    queue: int = 64,
    speculate: bool = True,
    limits: Limits | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    embedders: Mapping[str, "Embedder"] | None = None,
    collections: Mapping[str, "Index"] | None = None,
) -> FastAPI:
    """The app of a `CompletionServer`, which is at `app.state.server`.

    slots, max_length, chunk, queue, speculate: as in `Engine`. All others: as in `CompletionServer`. Raises
    ValueError as both do.
    """
    engine = Engine(model, slots, max_length=max_length, chunk=chunk, queue=queue, speculate=speculate)
    server = CompletionServer(
        engine,
        tokenizer,
        name=name,
        limits=limits,
        api_key=api_key,
        hosts=hosts,
        origins=origins,
        embedders=embedders,
        collections=collections,
    )
    return server.app


def describe_size(model: GPT) -> str:
    """How large a model is, in words: the parameters of its configuration.

    Adapters are not counted, and quantized weights count as the parameters they stand for.
    """
    with without_memory():
        parameters = GPT(model.config).num_parameters()
    stored = quantization_of(model)
    return f"{parameters:,} parameters" + (f" in {stored['scheme']}" if stored else "")


class CompletionServer:
    """OpenAI's API on an engine, which is closed when the app shuts down.

    name: what clients call the model; its adapters go by their own names. api_key: if given, `/v1/` is only
    for those who send it. hosts, origins: as in `SiteRules`. Raises ValueError for an adapter that is called
    like the model, and as `SiteRules` does.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        limits: Limits | None = None,
        api_key: str | None = None,
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        embedders: Mapping[str, "Embedder"] | None = None,
        collections: Mapping[str, "Index"] | None = None,
    ):
        try:
            if name in engine.adapters:
                raise ValueError(
                    f"an adapter and the model are both called {name!r}: choose another name for one of them"
                )
            self._sites = SiteRules(hosts, origins, has_key=bool(api_key))
        except ValueError:
            engine.close()
            raise
        self.engine = engine
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.api_key = api_key
        self.metrics = Metrics(engine)
        self.embeddings = EmbeddingAnswers(embedders or {})
        self.collections = Collections(collections or {})
        self.models: dict[str, str | None] = {name: None, **{adapter: adapter for adapter in engine.adapters}}
        """The names that clients may ask for, the model's own first, and the adapter behind each."""
        self._ends = ends_of(tokenizer)
        self.vocab = {**dict.fromkeys(range(engine.model.config.vocab_size), b""), **tokenizer.vocab}
        """The bytes of each id of the model; none for ids that only the model has (rows added for speed)."""
        self._tools = ToolUse(tokenizer, self.vocab, lambda: self._grammars)
        self._quoting = QuotingAnswers(
            self.collections, engine, tokenizer, limits=self.limits, metrics=self.metrics, vocab=self.vocab
        )
        self._longest_token = max(len(token) for token in tokenizer.vocab.values())
        self._created = int(time.time())
        self.app = self._make_app()

    @cached_property
    def _grammars(self) -> Grammars:
        """Made when it is first asked for: a large vocabulary takes a moment."""
        return Grammars(self.tokenizer, self.vocab, self._ends)

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt may have."""
        return min(self.limits.prompt or self.engine.max_length, self.engine.max_length)

    def surely_exceeds(self, length: int, tokens: int) -> bool:
        """Whether a text of `length` characters has more than so many tokens, whatever it says.

        Such a text is refused without encoding it, which takes time.
        """
        return length > tokens * self._longest_token

    # The endpoints.

    async def list_models(self) -> dict[str, Any]:
        """GET /v1/models."""
        names = dict.fromkeys([*self.models, *self.embeddings.embedders])
        return {"object": "list", "data": [self._describe(name) for name in names]}

    async def one_model(self, model: str) -> dict[str, Any]:
        """GET /v1/models/{model}."""
        if model not in self.embeddings.embedders:
            self._check_model(model)
        return self._describe(model)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """POST /v1/completions."""
        form = CompletionFormat(self.vocab, body.logprobs is not None)
        return await self._respond(body, request, await self.complete(body), form)

    async def chat(self, body: CollectionBody, request: Request) -> Response:
        """POST /v1/chat/completions."""
        form: AnswerFormat = ChatFormat(self.vocab, bool(body.logprobs))
        if body.collection is not None:
            quoted, sources = await self.quote(body, body.collection)
            return await self._respond(body, request, quoted, form, {"sources": sources})
        self._check(body)
        tools = await asyncio.to_thread(self._tools.read, body)
        if tools is not None:
            form = ToolFormat(self.vocab, bool(body.logprobs), tools)
        return await self._respond(body, request, await self.complete_chat(body, tools), form)

    async def embed(self, body: EmbeddingBody, request: Request) -> Response:
        """POST /v1/embeddings."""
        _refuse_slips(body)
        content = await self.embeddings.answer(body, request)
        if content is None:
            return Response(status_code=GONE)
        return JSONResponse(content, headers=self._say_what_is_ignored(body))

    async def health(self) -> dict[str, str]:
        """GET /health: the process answers."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """GET /ready: whether requests are taken."""
        if self.engine.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ready"})

    async def show_metrics(self) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type=prometheus.CONTENT_TYPE_LATEST)

    # From a body to an answer.

    async def complete(self, body: CompletionBody) -> Answer:
        """Starts the texts of a completion.

        Raises ApiError for what cannot be done, QueueFull, and Draining.
        """
        self._check(body, len(body.prompts))
        prompts = [
            prompt if isinstance(prompt, list) else await self._encode(prompt) for prompt in body.prompts
        ]
        requests = self._requests(
            body,
            prompts,
            DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            score_prompt=bool(body.echo) and body.logprobs is not None,
        )
        echoed = [self._decode(request.prompt) for request in requests] if body.echo else None
        return Answer(self.engine, self.metrics, requests, vocab=self.vocab, stops=body.stops, echoed=echoed)

    async def complete_chat(self, body: ChatBody, tools: ToolRequest | None = None) -> Answer:
        """Starts the texts that answer a conversation, with the tools that may be called.

        Raises what `complete` raises.
        """
        self._check(body)
        messages = plain_messages(body.messages)
        described = None if tools is None else tools.described
        most = self.engine.max_length
        length = sum(len(message["content"]) for message in messages)
        if self.surely_exceeds(length if tools is None else length + tools.length, most):
            message = f"the messages are longer than {most} tokens"
            raise ApiError(400, message, "messages", "context_length_exceeded")
        try:
            prompt = await asyncio.to_thread(chat_prompt, self.tokenizer, messages, described)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None
        max_tokens = getattr(body, body.length_field)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        form = await self._form(body.response_format) if tools is None else tools.form
        requests = self._requests(body, [prompt], max_tokens, logprobs=logprobs, form=form)
        return Answer(self.engine, self.metrics, requests, vocab=self.vocab, stops=body.stops)

    async def quote(self, body: CollectionBody, collection: str) -> tuple[Texts, list[dict[str, Any]]]:
        """Starts an answer from a collection; with it, its sources. Raises what `complete` raises."""
        self._check(body)
        questions = [message.plain()["content"] for message in body.messages if message.role == "user"]
        if self.surely_exceeds(sum(map(len, questions[-1:])), self.engine.max_length):
            message = f"the question is longer than {self.engine.max_length} tokens"
            raise ApiError(400, message, "messages", "context_length_exceeded")
        return await self._quoting.start(body, collection, questions, self.models[body.model])

    async def _form(self, asked: ResponseFormat | None) -> Form | None:
        schema = None if asked is None else asked.wanted
        if schema is None:
            return None
        try:
            return await asyncio.to_thread(lambda: self._grammars.json(schema))
        except ValueError as error:
            raise ApiError(400, str(error), "response_format") from None

    def _check(self, body: Body, prompts: int = 1) -> None:
        """Raises ApiError for what can be refused before so many prompts are tokenized, which takes time."""
        self._check_model(body.model)
        _refuse_slips(body)
        if prompts * body.answers > self.limits.texts:
            message = f"{prompts} prompts times n={body.answers} are more than {self.limits.texts} texts"
            raise ApiError(400, message, "n")

    def _check_model(self, model: str) -> None:
        if model not in self.models:
            message = f"no model is called {model!r}; there are: {', '.join(self.models)}"
            raise ApiError(404, message, "model", "model_not_found")

    async def _encode(self, text: str) -> list[int]:
        most = self.limits.prompt or self.engine.max_length
        if self.surely_exceeds(len(text), most):
            message = f"the prompt is longer than {most} tokens"
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        try:
            return await asyncio.to_thread(self.tokenizer.prompt, text)
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from None

    def _decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.vocab[i] for i in ids).decode(errors="replace")

    def _requests(
        self,
        body: Body,
        prompts: list[list[int]],
        max_new_tokens: int | None,
        *,
        logprobs: int | None,
        score_prompt: bool = False,
        form: Form | None = None,
    ) -> list[generation.Request]:
        """A request for each text. max_new_tokens: None for as many as there may be.

        Raises ApiError for what cannot be done.
        """
        limit = self.limits.tokens
        if limit is not None and max_new_tokens is not None and max_new_tokens > limit:
            message = f"{body.length_field}={max_new_tokens} is more than this server gives: {limit}"
            raise ApiError(400, message, body.length_field)
        requests = []
        for prompt in prompts:
            new = self._new_tokens(prompt, max_new_tokens, body.source)
            for number in range(body.answers):
                try:
                    request = generation.Request(
                        prompt,
                        new,
                        temperature=1.0 if body.temperature is None else body.temperature,
                        top_k=body.top_k,
                        top_p=body.top_p,
                        penalties=body.penalties,
                        form=form,
                        seed=None if body.seed is None else generation.later_seed(body.seed, number),
                        stop=() if body.ignore_eos else self._ends,
                        adapter=self.models[body.model],
                        logprobs=logprobs,
                        score_prompt=score_prompt,
                        timeout=self.limits.seconds,
                    )
                    self.engine.check(request)
                except ValueError as error:
                    # It begins with the name of a setting that is out of range; all else is the prompt's.
                    name, _, _ = str(error).partition("=")
                    param = name if name in type(body).model_fields else body.source
                    raise ApiError(400, str(error), param) from None
                requests.append(request)
        return requests

    def _new_tokens(self, prompt: list[int], wanted: int | None, source: str) -> int:
        """How many tokens to write after a prompt, which came in the field `source`.

        Raises ApiError where both together are too many.
        """
        total = self.engine.max_length
        if wanted is None:
            wanted = max(0, min(self.limits.tokens or total, total - len(prompt)))
        if len(prompt) > self.longest_prompt or len(prompt) + wanted > total:
            message = (
                f"{len(prompt)} tokens of prompt and {wanted} new ones: a prompt may have"
                f" {self.longest_prompt}, and both together {total}"
            )
            raise ApiError(400, message, source, "context_length_exceeded")
        return wanted

    # From an answer to a response.

    async def _respond(
        self,
        body: Body,
        request: Request,
        answer: Texts,
        form: AnswerFormat,
        closing: dict[str, Any] | None = None,
    ) -> Response:
        """closing: fields of the whole answer, and of the chunk that ends a stream's text."""
        head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        headers = self._say_what_is_ignored(body)
        if body.stream:
            return EventStream(
                chunks(answer, form, head, body.include_usage, closing), answer.cancel, headers
            )
        texts = await collect_unless_gone(answer, request)
        if texts is None:
            return Response(status_code=GONE)
        choices = [form.choice(index, piece, reason) for index, (piece, reason) in enumerate(texts)]
        content = {**head, "object": form.kind, "choices": choices, "usage": answer.usage()}
        content |= closing or {}
        return JSONResponse(content, headers=headers)

    def _say_what_is_ignored(self, body: JsonObject) -> dict[str, str]:
        """Counts the fields of a request that are not read; returns the header that names them."""
        paths = list(body.ignored())
        self.metrics.ignored_fields.inc(len(paths))
        # The names are the client's: not all of them are fit for a header.
        named = [path if NAMEABLE.fullmatch(path) else "?" for path in paths[:MOST_NAMED]]
        more = [f"and {len(paths) - MOST_NAMED} more"] if len(paths) > MOST_NAMED else []
        return {"X-Ignored-Fields": ", ".join([*named, *more])} if paths else {}

    def _describe(self, model: str) -> dict[str, Any]:
        """As OpenAI does, and how many tokens a text may have, as other servers say it."""
        if model in self.models:
            longest = self.engine.max_length
        else:
            longest = self.embeddings.embedders[model].max_tokens
        described = {"id": model, "object": "model", "created": self._created, "owned_by": "llm-weeks"}
        return {**described, "max_model_len": longest}

    def _make_app(self) -> FastAPI:
        # Without the pages that document an API: their scripts come from other servers.
        app = FastAPI(title="llm-weeks", lifespan=self._lifespan, docs_url=None, redoc_url=None)
        app.state.server = self
        app.add_api_route("/v1/models", self.list_models, methods=READ)
        app.add_api_route("/v1/models/{model:path}", self.one_model, methods=READ)
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/embeddings", self.embed, methods=["POST"])
        app.add_api_route("/health", self.health, methods=READ)
        app.add_api_route("/ready", self.ready, methods=READ)
        app.add_api_route("/metrics", self.show_metrics, methods=READ)
        for kind in (ApiError, QueueFull, Draining, RequestValidationError, HTTPException, Exception):
            app.add_exception_handler(kind, answer_error)
        paths = [route.path for route in app.routes if isinstance(route, Route)]
        app.add_middleware(
            Gate,
            limits=self.limits,
            api_key=self.api_key,
            sites=self._sites,
            metrics=self.metrics,
            paths=paths,
        )
        # Around the gate: a page of a configured origin may read why it was refused. It also keeps Gradio
        # from allowing every origin.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=self._sites.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.close)


def _refuse_slips(body: JsonObject) -> None:
    slip = body.slip()
    if slip:
        raise ApiError(400, f"{slip[0]}: this server does not know it: is {slip[1]} meant?", slip[0])


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The response to an exception."""
    return as_api_error(error).response()


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an exception."""
    retry = {"Retry-After": "1"}
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers=retry)
    if isinstance(error, Draining):
        return ApiError(503, str(error), code="shutting_down", headers=retry)
    if isinstance(error, RequestValidationError):
        return invalid_body(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server made a mistake: its log says which")
