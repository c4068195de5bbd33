"""Week 12. OpenAI's forms: what `/v1/completions` and `/v1/chat/completions` take and give, and the text
between tokens and answers.

Source: OpenAI's API reference (completions, chat completions, streaming, errors). What is not supported is
refused, not ignored.
"""

import codecs
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from shared.serving.engine import Token

# ---- requests

STOPS, STOP_LENGTH = 16, 1000
"""How many texts a request may name to stop at, and how long each may be: every one of them is looked for
after every token.
"""


def _check_prompt(value: Any) -> Any:
    all_are = lambda kind, values: bool(values) and all(type(v) is kind for v in values)
    lists = isinstance(value, list)
    if (
        isinstance(value, str)
        or lists
        and (
            all_are(str, value)
            or all_are(int, value)
            or all_are(list, value)
            and all(all_are(int, v) for v in value)
        )
    ):
        return value
    raise ValueError("a prompt is a text, a list of token ids, or a list of such, not empty")


def _check_stop(value: Any) -> Any:
    stops = value if isinstance(value, list) else [value]
    if len(stops) > STOPS or any(isinstance(stop, str) and len(stop) > STOP_LENGTH for stop in stops):
        raise ValueError(f"up to {STOPS} texts of up to {STOP_LENGTH} characters each")
    return value


class StreamOptions(BaseModel):
    """include_usage: a last chunk without choices says how many tokens there were."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of request have. Fields that this server cannot honour may only have the value that
    changes nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
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
        """The texts at which to end."""
        return [s for s in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if s]


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(_check_prompt)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Always as a list."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """Role and text."""
        return {
            "role": self.role,
            "content": (
                self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
            ),
        }


class ResponseFormat(BaseModel):
    """Only plain text."""

    model_config = ConfigDict(extra="forbid", strict=True)
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


# ---- text


@dataclass(frozen=True)
class Piece:
    """Some text, and the tokens it came from with where each begins."""

    text: str
    tokens: tuple[tuple[Token, int], ...] = ()
    ending: tuple[tuple[Token, int], ...] = ()
    """Tokens that ended the text and are not in it."""

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(self.text + other.text, self.tokens + other.tokens, self.ending + other.ending)


class TextBuilder:
    """Turns tokens into text, whole characters at a time, up to where one of `stops` begins; what may be the
    beginning of one is held back.

    offset: where in the whole answer the text begins.

    >>> text = TextBuilder({0: b"a", 1: b"b", 2: b"c"}, ["bc"])
    >>> [text.push(Token(i)).text for i in (0, 1, 1, 2)], text.stopped
    (['a', '', 'b', ''], True)
    """

    def __init__(self, vocab: Mapping[int, bytes], stops: Sequence[str] = (), offset: int = 0):
        self._vocab, self._stops, self._shown = vocab, stops, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._tokens: list[tuple[Token, int]] = []
        self.count = 0
        """Tokens so far."""
        self.stopped = False

    def push(self, token: Token) -> Piece:
        """What can be shown now, perhaps nothing."""
        self.count += 1
        own, at = self._vocab[token.id], self._shown + len(self._held)
        self._held += self._decoder.decode(own)
        with suppress(
            UnicodeDecodeError
        ):  # bytes before it that are no character have become U+FFFD only now
            at = self._shown + len(self._held) - len(own.decode())
        self._tokens.append((token, at))
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found))
        return self._show(
            len(self._held)
            - max((n for s in self._stops for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        )

    def finish(self, ending: Sequence[Token] = ()) -> Piece:
        """What was held back; an unfinished character is U+FFFD. ending: tokens that ended it, and are not in
        it.
        """
        self._held += self._decoder.decode(b"", final=True)
        piece = self._show(len(self._held))
        self.count += len(ending)
        return Piece(
            piece.text, (*piece.tokens, *self._tokens), tuple((token, self._shown) for token in ending)
        )

    def _show(self, length: int) -> Piece:
        text, self._held = self._held[:length], self._held[length:]
        self._shown += length
        count = next((i for i, (_, at) in enumerate(self._tokens) if at >= self._shown), len(self._tokens))
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return Piece(text, tuple(tokens))


# ---- answers


def token_text(vocab: Mapping[int, bytes], i: int) -> str:
    """A token by itself; one that is not text alone (half a character) as OpenAI writes it.

    >>> token_text({0: b"hi", 1: b"\\xe2\\x82"}, 0), token_text({0: b"hi", 1: b"\\xe2\\x82"}, 1)
    ('hi', 'bytes:\\\\xe2\\\\x82')
    """
    try:
        return vocab[i].decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in vocab[i])


def completion_logprobs(vocab: Mapping[int, bytes], piece: Piece) -> dict[str, list]:
    """A completion's `logprobs`. The token itself is named among the likeliest, whether it is one of them or
    not, and what ended the text is one of the tokens.
    """
    placed = piece.tokens + piece.ending
    tops = []
    for token, _ in placed:
        top: dict[str, float] = {}
        for i, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(token_text(vocab, i), logprob)
        tops.append(None if token.logprob is None else top)
    return {
        "tokens": [token_text(vocab, token.id) for token, _ in placed],
        "token_logprobs": [token.logprob for token, _ in placed],
        "top_logprobs": tops,
        "text_offset": [at for _, at in placed],
    }


def chat_logprobs(vocab: Mapping[int, bytes], piece: Piece) -> dict[str, Any]:
    """A chat answer's `logprobs`."""
    entry = lambda i, logprob: {"token": token_text(vocab, i), "logprob": logprob, "bytes": list(vocab[i])}
    return {
        "content": [
            entry(t.id, t.logprob) | {"top_logprobs": [entry(*top) for top in t.top]} for t, _ in piece.tokens
        ],
        "refusal": None,
    }


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """How many tokens there were; `cached` of the prompt's did not have to be read."""
    details = {"cached_tokens": cached}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
    }


def error_form(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class CompletionForms:
    """How texts are wrapped for /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, vocab: Mapping[int, bytes], logprobs: bool):
        self._vocab, self._logprobs = vocab, logprobs

    def choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """All of a text, or a part of it."""
        logprobs = completion_logprobs(self._vocab, piece) if self._logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason}

    delta = choice

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream sends before the text."""
        return None


class ChatForms:
    """How texts are wrapped for /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, vocab: Mapping[int, bytes], logprobs: bool):
        self._vocab, self._logprobs = vocab, logprobs

    def _form(self, index: int, message: dict[str, Any], piece: Piece, reason: str | None) -> dict[str, Any]:
        return {
            "index": index,
            **message,
            "logprobs": chat_logprobs(self._vocab, piece) if self._logprobs else None,
            "finish_reason": reason,
        }

    def choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """All of a text."""
        return self._form(
            index, {"message": {"role": "assistant", "content": piece.text, "refusal": None}}, piece, reason
        )

    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A part of it, empty at the end."""
        return self._form(index, {"delta": {"content": piece.text} if piece.text else {}}, piece, reason)

    def opening(self, index: int) -> dict[str, Any]:
        """What a stream sends before the text: who speaks."""
        return self._form(index, {"delta": {"role": "assistant", "content": ""}}, Piece(""), None)


Forms = CompletionForms | ChatForms
