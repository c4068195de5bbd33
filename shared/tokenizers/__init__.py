"""Tokenizers: text to token ids and back."""

from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bpe import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.char import CharTokenizer

__all__ = ["BPETokenizer", "CharTokenizer", "Tokenizer", "gpt2_tokenizer"]
