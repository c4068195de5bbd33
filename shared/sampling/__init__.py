"""Week 1. From logits to text."""

from shared.sampling.completion import Completion, generate_batch, generate_stream
from shared.sampling.generate import generate
from shared.sampling.speculation import Draft, Lookup

__all__ = ["Completion", "Draft", "Lookup", "generate", "generate_batch", "generate_stream"]
