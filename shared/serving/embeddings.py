"""Week 12. Texts as vectors over HTTP: OpenAI's `/v1/embeddings` in front of week 11's embedders.

Source: OpenAI's API reference (embeddings).
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from shared.extras import needs
from shared.serving.bodies import JsonObject
from shared.serving.gate import ApiError

if TYPE_CHECKING:  # a server without embedders needs none of week 11's libraries
    from shared.retrieval.embedders import Embedder
    from shared.retrieval.stores import Vectors

with needs("serve"):
    from fastapi import Request
    from pydantic import AfterValidator

MOST_TEXTS = 2048
"""Of a request, as in OpenAI's API."""
BATCH = 32
"""Texts between two looks at whether the client is still there."""


def _check_input(value: Any) -> Any:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(
            "a text or a list of texts is wanted, none of them empty. Token ids are those of another model's"
            " tokenizer: send the texts (in LangChain: check_embedding_ctx_length=False)"
        )
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        raise ValueError("there is half a surrogate pair in it, which no UTF-8 text has")
    if len(texts) > MOST_TEXTS:
        raise ValueError(f"{len(texts)} texts are more than {MOST_TEXTS}: ask several times")
    return value


class EmbeddingBody(JsonObject):
    """POST /v1/embeddings."""

    model: str
    input: Annotated[Any, AfterValidator(_check_input)]
    encoding_format: Literal["float", "base64"] | None = None
    """base64: the numbers as little-endian float32; OpenAI's client asks for it, and turns it back."""
    dimensions: int | None = None
    """Only as many as the model has."""
    user: str | None = None

    @property
    def texts(self) -> list[str]:
        """What to embed, always as a list."""
        return self.input if isinstance(self.input, list) else [self.input]


class EmbeddingAnswers:
    """Answers the requests for embeddings, one after another.

    embedders: by the names that clients ask for.
    """

    def __init__(self, embedders: Mapping[str, "Embedder"]):
        self.embedders = dict(embedders)
        self._one_at_a_time = asyncio.Lock()

    async def answer(self, body: EmbeddingBody, request: Request) -> dict[str, Any] | None:
        """The response's content; None where the client has gone. Raises ApiError for what cannot be done."""
        embedder = self._chosen(body)
        tokens = await asyncio.to_thread(self._count, embedder, body.texts)
        vectors: list[Vectors] = []
        async with self._one_at_a_time:
            for start in range(0, len(body.texts), BATCH):
                if await request.is_disconnected():
                    return None
                batch = body.texts[start : start + BATCH]
                vectors.append(await asyncio.to_thread(embedder.embed, batch))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(np.concatenate(vectors))
            ],
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _chosen(self, body: EmbeddingBody) -> "Embedder":
        if body.model not in self.embedders:
            there = f"there are: {', '.join(self.embedders)}" if self.embedders else "this server has none"
            message = f"no model for embeddings is called {body.model!r}; {there} (see --embeddings)"
            raise ApiError(404, message, "model", "model_not_found")
        embedder = self.embedders[body.model]
        if body.dimensions not in (None, embedder.dim):
            message = f"dimensions={body.dimensions}: {body.model} makes {embedder.dim} numbers of each text"
            raise ApiError(400, message, "dimensions")
        return embedder

    @staticmethod
    def _count(embedder: "Embedder", texts: Sequence[str]) -> int:
        """The tokens of all texts. Raises ApiError for a text of which the model would not read the end."""
        try:
            counts = embedder.count_tokens(texts)
        except ValueError as error:
            raise ApiError(400, str(error), "input") from None
        for number, count in enumerate(counts):
            if count > embedder.max_tokens:
                message = (
                    f"text {number} has {count} tokens, and the model reads {embedder.max_tokens}: cut it"
                )
                raise ApiError(400, message, "input", "context_length_exceeded")
        return sum(counts)


def _encoded(vector: np.ndarray, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
