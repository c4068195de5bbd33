"""Week 1. What every tokenizer can do: encode, decode, be saved as JSON, and be told apart from another."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shared.runtime import read_json, write_atomically


@dataclass(frozen=True)
class Chat:
    """How a model was trained to read conversations, as its files say it."""

    template: str
    """In Jinja; `shared.models.chat` runs it, in a sandbox."""
    tokens: Mapping[str, str]
    """What the template may call by name, such as {"bos_token": "<s>", "eos_token": "</s>"}."""


KINDS: dict[str, type["Tokenizer"]] = {}
"""The kinds of tokenizer that `Tokenizer.load` can open, by name. A subclass enters itself."""


class Tokenizer(ABC):
    """Turns text into ids from 0 to vocab_size - 1 and back."""

    vocab: dict[int, bytes]
    """The bytes that each id stands for."""
    special_tokens: Mapping[str, int] = MappingProxyType({})
    """Ids of tokens that are no text, such as <|endoftext|>, by their names; a kind may have none."""
    begins_with: str | None = None
    """The special token that a model has seen before every text (a Llama's <s>), where there is one."""
    ends: tuple[str, ...] = ()
    """Special tokens at which a text or an answer ends, as the model's files name them. Those of the course's
    own models are known without it.
    """
    chat: Chat | None = None
    """The model's own chat template; None where it has none, or SmolLM2's."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "from_json" in vars(cls):  # else it is what several kinds have in common
            KINDS[cls.__name__] = cls

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Raises ValueError for a text that the vocabulary cannot spell."""

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to go on from: the token that every text begins with, where there is
        one, and those of `encode`.

        Raises ValueError where `encode` does.
        """
        first = [] if self.begins_with is None else [self.special_tokens[self.begins_with]]
        return first + self.encode(text)

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one: those of `encode`, less what that puts before a text.

        Raises ValueError where `encode` does.
        """
        return self.encode(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises ValueError for an id outside the vocabulary."""
        try:
            return b"".join([self.vocab[i] for i in ids])
        except KeyError as error:
            raise ValueError(
                f"id {error.args[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (half a character, say) become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs to build this tokenizer again."""

    @classmethod
    @abstractmethod
    def from_json(cls, values: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_json` described. Raises KeyError or TypeError for other values."""

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over all that decides ids: two tokenizers with the same fingerprint are the same."""
        return hashlib.sha256(self._dump().encode()).hexdigest()

    def _dump(self) -> str:
        return json.dumps({"kind": type(self).__name__, **self.to_json()}, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer as one JSON file."""
        write_atomically(Path(path), self._dump() + "\n")

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """The tokenizer that `save` wrote, of whatever kind. Raises ValueError for a file that isn't one."""
        try:
            values = read_json(Path(path))
            kind = values.pop("kind")
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{path} is not a tokenizer file: expected JSON with a field 'kind'") from None
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"{path} holds a tokenizer of kind {kind!r}; known are: {', '.join(KINDS)}")
        try:
            return KINDS[kind].from_json(values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: it does not describe a {kind} ({error!r})") from None


USUAL_ENDS = ("<|endoftext|>", "<|im_end|>")
"""Special tokens at which a text ends whose tokenizer names no `ends`: the course's, and SmolLM2's."""


def ends_of(tokenizer: Tokenizer) -> list[int]:
    """The special tokens at which a text of the tokenizer's model ends: those that its files name, and of
    `USUAL_ENDS` those that it has.
    """
    special = tokenizer.special_tokens
    return [special[end] for end in dict.fromkeys([*tokenizer.ends, *USUAL_ENDS]) if end in special]


def tokenizer_of(model: object, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer that is given, else the model's own. Raises ValueError where there is none."""
    found = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if found is None:
        raise ValueError(
            "this model has no tokenizer: load it with load_model or GPT.from_checkpoint, or set"
            " model.tokenizer"
        )
    return found
