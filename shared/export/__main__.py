"""Week 12. Exports a model, your own or another, for other programs.

    python -m shared.export --model checkpoints/my-model --out exported
    # what week 8 quantized, its codes as they are
    python -m shared.export --model checkpoints/smollm2-int4 --format gguf --out smollm2-int4.gguf
    # for llama.cpp, in 8 bits
    python -m shared.export --model smollm2 --format gguf --kind Q8_0 --out smollm2.gguf
    # with what week 9 trained beside it, as steward.gguf
    python -m shared.export --model smollm2 --adapter checkpoints/steward --format gguf

A Hugging Face folder and a GGUF file are exact or refused: where the format has no such model, the error
names the fields in the way, and nothing is written. ONNX takes every GPT.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared import checkpoint
from shared.adapters import load_adapter, merge_lora
from shared.adapters.peft_files import rounding_of
from shared.commandline import errors_for_people, parse_args
from shared.export.gguf import to_gguf
from shared.export.huggingface import FILES, Card, push_to_hub, save_hf_folder
from shared.export.onnx import to_onnx, weights_of
from shared.models.gpt import GPT
from shared.models.names import ModelName
from shared.models.pretrained import load_model
from shared.quantization.modules import dequantize, quantization_of, quantize

# ---- from the command line


@dataclass(frozen=True)
class Settings:
    """Exports a model for other programs."""

    model: ModelName
    out: str | None = None
    """The folder (hf) or file (gguf, onnx) to write; none: in this folder, called as the adapter or the model
    is.
    """
    adapter: str | None = None
    """The folder of a LoRA, in PEFT's form, that is merged into the weights first. Where it learned beside a
    quantized base, the base is rounded alike before.
    """
    format: Literal["hf", "gguf", "onnx"] = "hf"
    kind: Literal["F32", "F16", "Q8_0", "Q4_0"] = "F16"
    """gguf: how matrices are stored; those of a quantized checkpoint keep their codes."""
    title: str = "A small language model"
    """hf: the heading of the model's card."""
    license: str | None = None
    """hf: the model's licence, as the hub spells it ("mit")."""
    push: str | None = None
    """hf: also upload the folder to the hub under this name ("someone/my-model"); log in first with `hf auth
    login`.
    """
    public: bool = False
    """With push: a repository that everyone can see."""

    def __post_init__(self) -> None:
        if self.push and self.format != "hf":
            raise ValueError(f"--push uploads a Hugging Face folder, not {self.format}: use --format hf")

    @property
    def written(self) -> Path:
        """What is written, where `out` does not say: steward-hf, steward.gguf, steward.onnx."""
        if self.out is not None:
            return Path(self.out)
        name = Path(self.adapter or self.model).resolve().name.removesuffix(".gguf")
        return Path(f"{name}-hf" if self.format == "hf" else f"{name}.{self.format}")


def with_adapter(model: GPT, folder: str, say: Callable[[str], None]) -> GPT:
    """The model with a LoRA merged into its weights.

    What learned beside a quantized base made up for its rounding too: a plain base is rounded alike before.
    The merged weights are not rounded again. Raises ValueError for a soft prompt.
    """
    rounding = rounding_of(Path(folder))
    if rounding is not None and quantization_of(model) is None:
        model = quantize(model, **rounding, say=lambda line: None)
        say(f"the base is rounded to {rounding['scheme']} first, as it was when the adapter learned")
    adapted = load_adapter(model, folder)
    if not isinstance(adapted, GPT):
        raise ValueError(
            f"{folder} holds a soft prompt, which stands beside the text and is no change of the weights: it"
            " cannot be exported with them"
        )
    return merge_lora(adapted)


def main(settings: Settings, say: Callable[[str], None] = print) -> Path:
    """Loads, exports, and says what was written."""
    model = load_model(settings.model, "cpu")
    tokenizer = model.tokenizer
    metrics = checkpoint.read_metrics(settings.model)
    if settings.adapter is not None:
        model = with_adapter(model, settings.adapter, say)
        metrics = {}  # the adapted model's are others
    quantized = quantization_of(model)
    if quantized and settings.format != "gguf":
        scheme = quantized["scheme"]
        say(f"{settings.format} has no form for {scheme}: its weights are written as 16-bit numbers")
        model = dequantize(model).half()
    out = settings.written
    beside = out.with_name(out.name + ".tokenizer.json")
    if settings.format == "hf":
        figures = [
            {"measured": name.replace("_", " "), "value": f"{value:.4g}"} for name, value in metrics.items()
        ]
        save_hf_folder(model, out, tokenizer, Card(settings.title, figures=figures, license=settings.license))
    elif settings.format == "gguf":
        to_gguf(model, out, tokenizer, settings.kind)
    else:
        to_onnx(model, out)
        if tokenizer is not None:
            tokenizer.save(beside)
    written = {"hf": [out / name for name in FILES], "gguf": [out], "onnx": [out, weights_of(out), beside]}[
        settings.format
    ]
    for path in filter(Path.exists, written):
        say(f"wrote {path} ({path.stat().st_size:,} bytes)")
    if settings.push:
        say(f"uploaded to {push_to_hub(out, settings.push, private=not settings.public)}")
    return out


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
