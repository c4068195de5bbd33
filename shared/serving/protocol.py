"""Week 12. OpenAI's protocol: the JSON objects that `/v1/completions` and `/v1/chat/completions` answer with.

What they are asked with is in `shared.serving.bodies`. Source: OpenAI's API reference (completions, chat
completions, streaming, errors).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from shared.serving.text import Piece, token_text


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
    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any] | None:
        """A part of a text in a stream; None for nothing to send. With a reason it is the last one."""

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

    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any] | None:
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
