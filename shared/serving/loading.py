"""Week 12. Which model a program that writes texts takes, and its loading."""

from collections.abc import Sequence

from shared.adapters.files import load_adapter
from shared.devices import pick_device
from shared.models.gpt import GPT
from shared.models.pretrained import load_model
from shared.quantization.modules import quantize
from shared.tokenizers import Tokenizer


def load_served(
    model: str,
    *,
    scheme: str | None = None,
    group_size: int | None = None,
    adapters: Sequence[str] = (),
    device: str = "auto",
) -> tuple[GPT, Tokenizer]:
    """A model, quantized and with its adapters (NAME=FOLDER each), and its tokenizer.

    model: as `shared.models.pretrained.load_model` takes it; scheme, group_size: as
    `shared.quantization.quantize` does. Raises ValueError for a model without a tokenizer, and as they do.
    """
    loaded = load_model(model, pick_device(device))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} comes without a tokenizer of ours: its ids cannot be turned into text")
    if scheme:
        quantize(loaded, scheme, group_size)
    for adapter in adapters:
        name, _, folder = adapter.partition("=")
        load_adapter(loaded, folder, name)
    return loaded, loaded.tokenizer
