"""Week 1. From logits to text."""

from shared.sampling.generate import generate

__all__ = ["generate"]
