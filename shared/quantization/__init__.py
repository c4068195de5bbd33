"""Week 8. Models in 8 and 4 bits."""

from shared.quantization.modules import quantize

__all__ = ["quantize"]
