"""Tokenizers: text to token ids and back."""

from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bpe import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.char import CharTokenizer
from shared.tokenizers.merging import MergingTokenizer
from shared.tokenizers.patterns import GPT2_PATTERN, GPT4_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN
from shared.tokenizers.sentencepiece import SentencePieceTokenizer

__all__ = [
    "BPETokenizer",
    "CharTokenizer",
    "GPT2_PATTERN",
    "GPT4_PATTERN",
    "LLAMA3_PATTERN",
    "MergingTokenizer",
    "QWEN2_PATTERN",
    "SentencePieceTokenizer",
    "Tokenizer",
    "gpt2_tokenizer",
]
