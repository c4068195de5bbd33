"""Week 1. The simplest tokenizer: one id per character, in the order of their code points.

>>> tokenizer = CharTokenizer.train("hello")
>>> tokenizer.encode("hole"), tokenizer.decode([1, 0, 2, 2, 3])
([1, 3, 2, 0], 'hello')
"""

from typing import Any

from shared.tokenizers.base import Tokenizer
from shared.tokenizers.sections import Section, isolated, tokens_by_id

EVERY_CHARACTER = r"[\s\S]"
"""Cuts a text into its characters, for Hugging Face's library."""


class CharTokenizer(Tokenizer):
    """One token per character; a character's id is its place in `chars`, which has each once."""

    def __init__(self, chars: str):
        if not chars:
            raise ValueError("a character tokenizer needs at least one character: the text is empty")
        if len(set(chars)) != len(chars):
            raise ValueError("a character tokenizer's vocabulary names a character twice")
        self.chars = chars
        self._ids = {c: i for i, c in enumerate(chars)}
        self.vocab = {i: c.encode() for i, c in enumerate(chars)}

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The vocabulary of every character in `text`. Raises ValueError for an empty text."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> list[int]:
        """One id per character.

        Raises ValueError, naming the character and its place, for one that is not in the vocabulary.
        """
        try:
            return [self._ids[c] for c in text]
        except KeyError:
            at, char = next((i, c) for i, c in enumerate(text) if c not in self._ids)
            raise ValueError(
                f"character {char!r} (U+{ord(char):04X}) at position {at} is not in the vocabulary of"
                f" {len(self.chars)} characters: {self.chars!r}"
            ) from None

    def to_json(self) -> dict[str, Any]:
        return {"chars": self.chars}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "CharTokenizer":
        return cls(values["chars"])

    def _hf_sections(self) -> dict[str, Any]:
        # The model's unknown token is not in the vocabulary: another character is an error, as with ours.
        model = {"type": "WordLevel", "vocab": dict(self._ids), "unk_token": "<|unknown|>"}
        return {"pre_tokenizer": isolated(EVERY_CHARACTER), "decoder": {"type": "Fuse"}, "model": model}

    @classmethod
    def _said_in(cls, model: Section, own: dict[str, Any]) -> dict[str, Any]:
        return {"chars": "".join(tokens_by_id(model["vocab"]))}
