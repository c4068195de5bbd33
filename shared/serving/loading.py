"""Week 12. Which model a program that writes texts takes, and its loading."""

from collections.abc import Sequence
from typing import Literal

from shared.adapters.files import load_adapter
from shared.devices import pick_device
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization.modules import check_model, quantization_of, quantize
from shared.quantization.packing import GROUP_SIZES
from shared.tokenizers import Tokenizer

Scheme = Literal["none", "auto", "int8", "int4", "nf4"]
"""How the weights of a model that is served are rounded; auto: to 8 bits on a CPU."""
GROUP = 64
"""Weights that share a scale with "auto", or the next smaller number that divides all rows."""


def load_served(
    model: str,
    *,
    scheme: Scheme = "none",
    group_size: int | None = None,
    adapters: Sequence[str] = (),
    device: str = "auto",
) -> tuple[GPT, Tokenizer]:
    """A model, quantized and with its adapters (NAME=FOLDER each), and its tokenizer.

    model: as `shared.models.pretrained.load_model` takes it; group_size: as `shared.quantization.quantize`
    does. With "auto", a line says what is done. Raises ValueError for a model without a tokenizer, and as
    they do.
    """
    loaded = load_model(model, pick_device(device))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} comes without a tokenizer of ours: its ids cannot be turned into text")
    if scheme == "auto":
        _quantize_for_speed(loaded)
    elif scheme != "none":
        quantize(loaded, scheme, group_size)
    for adapter in adapters:
        name, _, folder = adapter.partition("=")
        load_adapter(loaded, folder, name)
    return loaded, loaded.tokenizer


def _quantize_for_speed(model: GPT) -> None:
    """Rounds to 8 bits what lies on a CPU, and is not rounded yet; says so."""
    if model.norm.weight.device.type != "cpu" or quantization_of(model):
        return
    for size in (size for size in reversed(GROUP_SIZES) if size <= GROUP):
        try:
            check_model(model, size)
        except ValueError:
            continue
        print(f"weights are rounded to 8 bits, in groups of {size}; --quantize none keeps them as they are")
        quantize(model, "int8", size)
        return
    print("weights stay as they are: not all rows divide into groups of 32")
