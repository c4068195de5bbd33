"""Week 12. Around the server's app: limits, the API key, errors in OpenAI's form, and Prometheus' metrics."""

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shared.checks import Checks
from shared.extras import needs
from shared.serving.bodies import path_in
from shared.serving.engine import Engine
from shared.serving.generation import REASONS
from shared.serving.protocol import error_body
from shared.serving.sites import SiteRules

with needs("serve"):
    import prometheus_client as prometheus
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the histograms' buckets."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Raises ValueError for values that are not above 0."""

    header_seconds: float = 10
    """Until a request's headers are there, from its first byte on, or from when the connection is made."""
    stalled_seconds: float = 60
    """For which a client may take nothing of what is sent to it."""
    body: int = 1 << 20
    """Bytes of a request's body."""
    body_seconds: float = 30
    """Until the body is there."""
    prompt: int | None = None
    """Tokens of a prompt; none: the model's length."""
    tokens: int | None = None
    """New tokens of a text; none: the model's length."""
    texts: int = 64
    """Texts that one request may ask for: prompts times n."""
    seconds: float = 300
    """From when a request is taken on, its body read and its prompts tokenized, to the end of its texts."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.above(0, *vars(self))
        checks.finish()


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form.

    param: the field of the request that is wrong. code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = error_body(message, _error_type(status), param, code)

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def _error_type(status: int) -> str:
    """The `type` that OpenAI's clients expect for an HTTP status."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


class Metrics:
    """What `/metrics` shows. It has a registry of its own: a process may hold several apps."""

    def __init__(self, engine: Engine):
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "llm_requests", "Answers, by path and status", ("path", "status"), registry=self.registry
        )
        self.first_token = prometheus.Histogram(
            "llm_time_to_first_token_seconds",
            "From when a request is taken on to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.between_tokens = prometheus.Histogram(
            "llm_time_between_tokens_seconds",
            "Between two tokens of a text",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.ignored_fields = prometheus.Counter(
            "llm_ignored_fields", "Fields of requests that were not read", registry=self.registry
        )
        ended = prometheus.Gauge(
            "llm_texts_ended", "Texts that ended, by reason", ("reason",), registry=self.registry
        )
        for reason in REASONS:
            ended.labels(reason).set_function(partial(engine.ended.__getitem__, reason))
        self._gauge("llm_slots_busy", "Texts being written", lambda: engine.busy)
        self._gauge("llm_queue_length", "Requests that wait for a slot", lambda: engine.waiting)
        self._gauge("llm_prompt_tokens", "Tokens of prompts read", lambda: engine.prompt_tokens)
        self._gauge(
            "llm_reused_tokens",
            "Tokens of prompts taken over from earlier ones",
            lambda: engine.reused_tokens,
        )
        self._gauge("llm_generated_tokens", "Tokens drawn", lambda: engine.generated_tokens)
        self._gauge(
            "llm_proposed_tokens", "Tokens looked up to be read at once", lambda: engine.proposed_tokens
        )
        self._gauge("llm_accepted_tokens", "Of these, those drawn too", lambda: engine.accepted_tokens)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        prometheus.Gauge(name, text, registry=self.registry).set_function(read)


class Gate:
    """ASGI middleware around the app: checks which site a request comes from, the API key, and the bodies'
    size and duration, and counts answers.

    paths: those that are counted each by its name; all others are counted as "other".
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        *,
        api_key: str | None,
        sites: SiteRules,
        metrics: Metrics,
        paths: Sequence[str],
    ):
        self.app = app
        self.sites = sites
        self.limits = limits
        self.metrics = metrics
        self.paths = paths
        self._expected_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        error = self._refusal(scope)
        if error:
            await error.response()(scope, receive, send_counted)
            return
        try:
            await self.app(scope, self._limited(receive), send_counted)
        except Exception:  # the server around this app answers it
            self.metrics.requests.labels(path, 500).inc()
            raise

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is refused by its headers alone; None where it is not."""
        headers = dict(scope["headers"])
        foreign = self.sites.refusal(scope, headers)
        if foreign:
            return ApiError(403, foreign, code="foreign_site")
        if scope["path"].startswith("/v1/") and not self._has_key(headers):
            message = "this server wants its API key, as in Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body:
            return self._too_large()
        return None

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        if self._expected_key is None:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._expected_key)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.limits.body} bytes"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, but a body that is too large or too slow is an HTTPException."""
        size = 0
        complete = False
        deadline = time.monotonic() + self.limits.body_seconds

        async def receive_limited() -> Message:
            nonlocal size, complete
            if complete:  # the next message says that the client leaves: it may take any time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0, deadline - time.monotonic()))
            except TimeoutError:
                late = f"the body was not there within {self.limits.body_seconds:g} s"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.limits.body:
                raise HTTPException(413, str(self._too_large()), {"Connection": "close"})
            return message

        return receive_limited


def invalid_body(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, in one line."""
    # Of the errors in a field that may be of several types, the innermost says most.
    first = max(error.errors(), key=_depth)
    kind, reason = first["type"], first["msg"]
    path = path_in(error.body, first["loc"][1:])
    if kind == "json_invalid":
        detail = first.get("ctx", {}).get("error", reason)
        return ApiError(400, f"the body is not JSON: {detail}", code="invalid_json")
    if not path:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    return ApiError(400, f"{path}: {reason.removeprefix('Value error, ')}", path)


def _depth(error: Mapping[str, Any]) -> int:
    return len(error["loc"])
