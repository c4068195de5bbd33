"""Models. Each takes ids int64 [batch, time] and gives logits [batch, time, vocab_size], and knows its `config`."""

from shared.models.attention import AttentionLM, AttentionLMConfig
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig, KVCache
from shared.models.mlp import WindowMLP, WindowMLPConfig

__all__ = ["GPT", "AttentionLM", "AttentionLMConfig", "BigramConfig", "BigramModel", "GPTConfig", "KVCache", "WindowMLP", "WindowMLPConfig"]
