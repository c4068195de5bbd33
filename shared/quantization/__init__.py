"""Week 8. Models in 8 and 4 bits, and a decoder in C."""

from shared.quantization.decoder import Decoder
from shared.quantization.modules import quantize, quantizing

__all__ = ["Decoder", "quantize", "quantizing"]
