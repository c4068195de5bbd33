"""Week 8. Models in 8 and 4 bits."""

from shared.quantization.modules import quantize, quantizing

__all__ = ["quantize", "quantizing"]
