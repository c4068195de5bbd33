"""Week 12. OpenAI's protocol: the bodies that `/v1/completions` and `/v1/chat/completions` take, and the JSON
objects that they answer with.

Source: OpenAI's API reference (completions, chat completions, streaming, errors). What is not supported is
refused, not ignored.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from shared.serving.text import Piece, token_text

MAX_STOPS = 16
"""How many stop texts a request may name: every one of them is searched for after every token."""
MAX_STOP_LENGTH = 1000
"""Characters of a stop text."""


def _is_list_of(kind: type, value: Any) -> bool:
    """Whether it is a list, not empty, of values of exactly this type (a bool is no int)."""
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _check_prompt(value: Any) -> Any:
    several = _is_list_of(list, value) and all(_is_list_of(int, item) for item in value)
    if not (isinstance(value, str) or _is_list_of(str, value) or _is_list_of(int, value) or several):
        raise ValueError("a prompt is a text, a list of token ids, or a list of such, not empty")
    return value


def _check_stop(value: Any) -> Any:
    stops = value if isinstance(value, list) else [value]
    too_long = any(isinstance(stop, str) and len(stop) > MAX_STOP_LENGTH for stop in stops)
    if too_long or len(stops) > MAX_STOPS:
        raise ValueError(f"up to {MAX_STOPS} texts of up to {MAX_STOP_LENGTH} characters each")
    return value


class StrictModel(BaseModel):
    """A JSON object without unknown fields, whose values have their types already."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(StrictModel):
    """include_usage: a last chunk without choices says how many tokens there were."""

    include_usage: bool = False


class Body(StrictModel):
    """The fields that both kinds of request have.

    Fields that this server cannot honour may only have the value that changes nothing.
    """

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """Not OpenAI's: draw only from the k likeliest tokens."""
    ignore_eos: bool | None = None
    """Not OpenAI's: write on to max_tokens, whatever the model says (for measurements)."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Answers to each prompt; with a seed, answer i is drawn with seed + i."""
    seed: int | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_check_stop)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("stream_options")
    @classmethod
    def _only_of_streams(cls, value: StreamOptions | None, other: ValidationInfo) -> StreamOptions | None:
        if value is not None and not other.data.get("stream"):
            raise ValueError("only with stream=true")
        return value

    @property
    def stops(self) -> list[str]:
        """The texts at which to end; empty ones are left out."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def answers(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(_check_prompt)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, always as a list: texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class TextPart(StrictModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as `shared.models.chat.chat_prompt` takes them."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class ResponseFormat(StrictModel):
    """Only plain text."""

    type: Literal["text"]


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, other: ValidationInfo) -> int | None:
        if value is not None and not other.data.get("logprobs"):
            raise ValueError("only with logprobs=true")
        return value


def completion_logprobs(vocab: Mapping[int, bytes], piece: Piece) -> dict[str, list[Any]]:
    """A completion's `logprobs`.

    The token itself is always named among the likeliest, and the tokens that ended the text are listed too.
    """
    placed = piece.tokens + piece.ending
    tops: list[dict[str, float | None] | None] = []
    for token, _ in placed:
        if token.logprob is None:
            tops.append(None)
            continue
        top: dict[str, float | None] = {}
        for i, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(token_text(vocab, i), logprob)
        tops.append(top)
    return {
        "tokens": [token_text(vocab, token.id) for token, _ in placed],
        "token_logprobs": [token.logprob for token, _ in placed],
        "top_logprobs": tops,
        "text_offset": [begin for _, begin in placed],
    }


def chat_logprobs(vocab: Mapping[int, bytes], piece: Piece) -> dict[str, Any]:
    """A chat answer's `logprobs`."""

    def entry(i: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token_text(vocab, i), "logprob": logprob, "bytes": list(vocab[i])}

    content = []
    for token, _ in piece.tokens:
        top = [entry(i, logprob) for i, logprob in token.top]
        content.append({**entry(token.id, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def token_usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """How many tokens there were. cached: those of the prompt that did not have to be read."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class AnswerFormat(ABC):
    """The JSON objects that texts are wrapped in, at once or as the chunks of a stream.

    logprobs: whether they hold log-probabilities.
    """

    kind: str
    """`object` of an answer."""
    chunk_kind: str
    """`object` of a chunk."""
    prefix: str
    """What an answer's id begins with."""

    def __init__(self, vocab: Mapping[int, bytes], logprobs: bool):
        self.vocab = vocab
        self.logprobs = logprobs

    @abstractmethod
    def choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A complete text."""

    @abstractmethod
    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A part of a text in a stream."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream sends before the text; None for nothing."""
        return None


class CompletionFormat(AnswerFormat):
    """The objects of /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A complete text, or a part of one."""
        logprobs = completion_logprobs(self.vocab, piece) if self.logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}

    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """The same as a complete text."""
        return self.choice(index, piece, reason)


class ChatFormat(AnswerFormat):
    """The objects of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A complete text."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message, **self._details(piece, reason)}

    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A part of a text; the last one is empty."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, **self._details(piece, reason)}

    def opening(self, index: int) -> dict[str, Any]:
        """Says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, **self._details(Piece(""), None)}

    def _details(self, piece: Piece, reason: str | None) -> dict[str, Any]:
        logprobs = chat_logprobs(self.vocab, piece) if self.logprobs else None
        return {"logprobs": logprobs, "finish_reason": reason}
