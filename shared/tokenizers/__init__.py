"""Tokenizers: text to token ids and back."""

from shared.tokenizers.base import Tokenizer
from shared.tokenizers.char import CharTokenizer

__all__ = ["CharTokenizer", "Tokenizer"]
