"""Tokenizers: text to token ids and back."""

from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bpe import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.char import CharTokenizer
from shared.tokenizers.merging import MergingTokenizer
from shared.tokenizers.sentencepiece import SentencePieceTokenizer

__all__ = [
    "BPETokenizer",
    "CharTokenizer",
    "MergingTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "gpt2_tokenizer",
]
