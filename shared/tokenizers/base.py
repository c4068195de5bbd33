"""Week 1. What every tokenizer can do: encode, decode, be saved as JSON, and be told apart from another.

A saved tokenizer is a tokenizer.json of Hugging Face's, from which `load` has ours back exactly. What that
form does not say (the ends of a text, a chat template) is beside the model in its section, where the library
`tokenizers` overlooks it. A tokenizer that cannot be said there is saved in the course's own form alone: an
object with the field "kind", which `load` reads as well.

Source: the file format of the library `tokenizers`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from shared.processes import in_groups, in_processes
from shared.runtime import read_json, write_atomically
from shared.tokenizers.sections import Section, first_token


@dataclass(frozen=True)
class Chat:
    """How a model was trained to read conversations, as its files say it."""

    template: str
    """In Jinja; `shared.models.chat` runs it, in a sandbox."""
    tokens: Mapping[str, str]
    """What the template may call by name, such as {"bos_token": "<s>", "eos_token": "</s>"}."""


KINDS: dict[str, type["Tokenizer"]] = {}
"""The kinds of tokenizer that `Tokenizer.load` can open, by name. A subclass enters itself."""

OWN = "llm_weeks"
"""The field of a tokenizer.json's section "model" with what of our tokenizer the rest does not say."""


def own_part(values: Any) -> dict[str, Any] | None:
    """What a tokenizer file says of ours alone: its kind, and what `from_json` needs beside "model".

    None where `Tokenizer.save` did not write the file.
    """
    if not isinstance(values, dict):
        return None
    if "kind" in values:
        return values
    model = values.get("model")
    own = model.get(OWN) if isinstance(model, dict) else None
    return own if isinstance(own, dict) and "kind" in own else None


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

    def encode_batch(self, texts: Iterable[str], processes: int = 1) -> list[list[int]]:
        """The ids of each text, as `encode` gives them: lists of different lengths, in the texts' order.

        processes: how many share the work. Each takes seconds to start, and sending texts and ids to and fro
        costs this one about half of what encoding them would: only many idle processors and hundreds of
        megabytes gain something. A script must call this under `if __name__ == "__main__":` then. Raises
        ValueError where `encode` does, with the number of the text, and for one text instead of several.
        """
        if isinstance(texts, str):
            raise ValueError("encode_batch takes several texts, and was given one: use encode, or [text]")
        if processes < 1:
            raise ValueError(f"processes={processes}: must be at least 1")
        if processes == 1:
            return [_encode_numbered(self, i, text) for i, text in enumerate(texts)]
        groups = in_groups(enumerate(texts), _characters, GROUP)
        with closing(in_processes(_encode_group, groups, processes, (_use, self))) as encoded:
            return [ids.tolist() for ids in encoded]

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        """The text of each list of ids, as `decode` gives it. Raises ValueError where that does."""
        return [self.decode(ids) for ids in batch]

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
        return json.dumps(self._own(), ensure_ascii=False)

    def _own(self) -> dict[str, Any]:
        """All of this tokenizer, in the course's own form."""
        return {"kind": type(self).__name__, **self.to_json()}

    # ---- Hugging Face's form

    def to_hf_json(self) -> dict[str, Any]:
        """The content of Hugging Face's tokenizer.json for this tokenizer.

        The library `tokenizers` then gives the same ids, with `encode_special_tokens` where ours are allowed
        no special tokens; without it, as ours with `allowed_special="all"`. It adds at either end of a text
        nothing but `begins_with`. Two differences remain. A byte that a byte-level vocabulary lacks
        (SmolLM2's has no 0x04) is an error here, and left out there. And where a SentencePiece tokenizer has
        scores, pairs that make the same token have one rank here, and there one after the other: should two
        of them overlap (ha|haha|ha), ours would merge the left one, and theirs the one whose ids come first.
        No text with other ids was found among millions of random ones for random vocabularies; that there
        is none is not proven. Raises ValueError for a tokenizer that cannot be said there.
        """
        first = self.begins_with
        sections = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "post_processor": None if first is None else first_token(first, self.special_tokens[first]),
            "added_tokens": self._hf_added_tokens(),
            "pre_tokenizer": None,
            "decoder": None,
        }
        return sections | self._hf_sections()

    def _hf_sections(self) -> dict[str, Any]:
        """The sections of tokenizer.json in which kinds of tokenizers differ, "model" among them.

        Raises ValueError where there is no equivalent.
        """
        raise ValueError(f"a {type(self).__name__} has no equivalent at Hugging Face")

    def _hf_added_tokens(self) -> list[Section]:
        """The section added_tokens."""
        return []

    @classmethod
    def _said_in(cls, model: Section, own: dict[str, Any]) -> dict[str, Any]:
        """What of `to_json` the section "model" says; own: what is beside it."""
        return {}

    # ---- files

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer as one JSON file: a tokenizer.json that the library `tokenizers` loads.

        Where that form cannot say this tokenizer (`to_hf_json` raises, and says why), the file is in the
        course's own form, which only `load` and `shared.models.pretrained.load_tokenizer` read.
        """
        write_atomically(Path(path), json.dumps(self._file(), ensure_ascii=False) + "\n")

    def _file(self) -> dict[str, Any]:
        own = self._own()
        try:
            values = self.to_hf_json()
        except ValueError:
            return own
        model = values["model"]
        said = self._said_in(model, own)
        rest = {name: value for name, value in own.items() if name not in said or said[name] != value}
        return {**values, "model": {**model, OWN: rest}}

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """The tokenizer that `save` wrote, of whatever kind, now or in an earlier version of the course.

        Raises ValueError for a file that isn't one. Others' tokenizer.json are read by
        `shared.models.pretrained.load_tokenizer`.
        """
        try:
            values = read_json(Path(path))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"{path} is not a tokenizer file, or it is damaged: it is no JSON") from None
        return Tokenizer.from_file_json(values, str(path))

    @staticmethod
    def from_file_json(values: Any, where: str) -> "Tokenizer":
        """The tokenizer of a file's content. where: the file, for messages. Raises ValueError as `load`."""
        own = own_part(values)
        if own is None and isinstance(values, dict) and "model" in values:
            raise ValueError(
                f"{where} is a tokenizer.json that this course did not write: read it with"
                " shared.models.pretrained.load_tokenizer, and save what that gives"
            )
        if own is None:
            raise ValueError(f"{where} is not a tokenizer file: expected JSON with a field 'kind'")
        kind = own["kind"]
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"{where} holds a tokenizer of kind {kind!r}; known are: {', '.join(KINDS)}")
        try:
            said = {} if own is values else KINDS[kind]._said_in(values["model"], own)
            tokenizer = KINDS[kind].from_json(said | {name: own[name] for name in own if name != "kind"})
            added = values.get("added_tokens", [])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is damaged: it does not describe a {kind} ({error!r})") from None
        if own is not values and added != tokenizer._hf_added_tokens():
            raise ValueError(
                f"{where}: its added_tokens are not those of the {kind} that was saved in it. If they were"
                f" changed on purpose, take {OWN!r} out of its section model, and read it with"
                " shared.models.pretrained.load_tokenizer"
            )
        return tokenizer


# ---- several processes

GROUP = 1 << 18
"""Characters that a process is handed at a time."""
_tokenizer_here: Tokenizer
"""In a process that encodes for another one: the tokenizer that it was given."""


def _use(tokenizer: Tokenizer) -> None:
    global _tokenizer_here
    _tokenizer_here = tokenizer


def _characters(numbered: tuple[int, str]) -> int:
    return len(numbered[1]) + 1


def _encode_group(group: list[tuple[int, str]]) -> list[np.ndarray]:
    """The ids of numbered texts; as arrays they go from process to process faster than as lists."""
    return [np.array(_encode_numbered(_tokenizer_here, i, text), np.uint32) for i, text in group]


def _encode_numbered(tokenizer: Tokenizer, number: int, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"texts[{number}]: {error}") from None


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
