"""Week 1. From logits to text."""

from shared.sampling.completion import Completion, generate_batch, generate_stream
from shared.sampling.generate import generate

__all__ = ["Completion", "generate", "generate_batch", "generate_stream"]
