"""Week 12. Around the server's app: limits, the key, errors in OpenAI's form, and what Prometheus is told."""

import asyncio
import hmac
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import prometheus_client as prometheus
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.serving.engine import REASONS, Engine
from shared.serving.protocol import error_form


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Raises ValueError for values that are not above 0."""

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
        problems = [
            f"{name}={value}: must be above 0"
            for name, value in vars(self).items()
            if value is not None and not value > 0
        ]
        if problems:
            raise ValueError("Limits: " + "; ".join(problems))


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        self.status, self.headers = status, headers
        self.form = error_form(
            message,
            kinds.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            param,
            code,
        )

    def response(self) -> JSONResponse:
        return JSONResponse(self.form, self.status, self.headers)


class Metrics:
    """What `/metrics` tells. A registry of its own, so that there may be several apps in a process."""

    def __init__(self, served: Engine):
        self.registry = prometheus.CollectorRegistry()
        make = lambda kind, name, text, **options: kind(name, text, registry=self.registry, **options)
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.requests = make(
            prometheus.Counter, "llm_requests", "Answers, by path and status", labelnames=("path", "status")
        )
        self.first = make(
            prometheus.Histogram,
            "llm_time_to_first_token_seconds",
            "From when a request is taken on to its first token",
            buckets=seconds,
        )
        self.between = make(
            prometheus.Histogram,
            "llm_time_between_tokens_seconds",
            "Between two tokens of a text",
            buckets=seconds,
        )
        ended = make(
            prometheus.Gauge, "llm_texts_ended", "Texts that ended, by reason", labelnames=("reason",)
        )
        for reason in REASONS:
            ended.labels(reason).set_function(partial(served.ended.get, reason))
        for name, text, read in (
            ("llm_slots_busy", "Texts being written", lambda: served.busy),
            ("llm_queue_length", "Requests that wait for a slot", lambda: served.waiting),
            ("llm_prompt_tokens", "Tokens of prompts read", lambda: served.prompt_tokens),
            (
                "llm_reused_tokens",
                "Tokens of prompts taken over from earlier ones",
                lambda: served.reused_tokens,
            ),
            ("llm_generated_tokens", "Tokens drawn", lambda: served.generated_tokens),
        ):
            make(prometheus.Gauge, name, text).set_function(read)


class Gate:
    """Around the app: the key, the size of bodies and the time they take, and the count of answers."""

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None, metrics: Metrics, paths: Sequence[str]
    ):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.expected = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        error = None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        known = (
            not self.expected
            or scheme.lower() == b"bearer"
            and hmac.compare_digest(key.strip(), self.expected)
        )
        if scope["path"].startswith("/v1/") and not known:
            message = "this server wants its API key, as in Authorization: Bearer KEY"
            error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        elif (
            headers.get(b"content-length", b"0").isdigit()
            and int(headers.get(b"content-length", b"0")) > self.limits.body
        ):
            error = self._too_large()
        if error:
            return await error.response()(scope, receive, counted)
        try:
            await self.app(scope, self._limited(receive), counted)
        except Exception:  # answered further out
            self.metrics.requests.labels(path, 500).inc()
            raise

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.limits.body} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _limited(self, receive: Receive) -> Receive:
        size, whole, deadline = 0, False, time.monotonic() + self.limits.body_seconds

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is that the client leaves
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0, deadline - time.monotonic()))
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"the body was not there within {self.limits.body_seconds:g} s",
                    {"Connection": "close"},
                ) from None
            size, whole = size + len(message.get("body", b"")), not message.get("more_body", False)
            if size > self.limits.body:
                raise HTTPException(413, self._too_large().form["error"]["message"], {"Connection": "close"})
            return message

        return limited


def invalid(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, in one line."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return ApiError(
            400,
            f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}",
            code="invalid_json",
        )
    if not where:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    message = (
        "this server does not know it"
        if first["type"] == "extra_forbidden"
        else first["msg"].removeprefix("Value error, ")
    )
    return ApiError(400, f"{where[0]}: {message}", where[0])
