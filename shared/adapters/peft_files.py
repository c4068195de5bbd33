"""Week 9. The files in which the library PEFT keeps adapters, and soft prompts in them.

`adapter_model.safetensors` has the tensors, `adapter_config.json` the settings. In the header of the tensors'
file, where PEFT does not look, stands further JSON of ours: a sketch of the base's weights, by which an
adapter of another base is recognised. LoRA's part of the format is in `shared.adapters.peft_lora`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shared.models.family import refuse
from shared.models.gpt import GPTConfig
from shared.runtime import read_json, write_atomically, write_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOTES = ("own", "base", "quantization")
"""What the header of the tensors' file has of ours: see `write_lora`, `sketch` and `rounding_of`."""


class AdapterFiles(NamedTuple):
    """What is in an adapter's folder."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """In fp32."""
    notes: dict[str, dict[str, Any]]
    """Ours, by name; {} in files that PEFT wrote."""


def write_files(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], notes: Mapping[str, Any]
) -> None:
    """Writes the two files; notes are JSON for the header of the tensors' file.

    Raises ValueError for a folder that holds a model.
    """
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model: choose another folder for its adapter")
    folder.mkdir(parents=True, exist_ok=True)
    # Without its configuration an adapter is no adapter: so no mixture of an old and a new one can be left.
    (folder / CONFIG).unlink(missing_ok=True)
    metadata = {"format": "pt"}
    metadata.update({name: json.dumps(note) for name, note in notes.items()})
    write_atomically(folder / WEIGHTS, save(tensors, metadata=metadata))
    write_json(folder / CONFIG, config)


def read_files(folder: Path) -> AdapterFiles:
    """What is in an adapter's folder. Raises ValueError for files that are missing or damaged."""
    try:
        config = read_json(folder / CONFIG)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        notes = {name: json.loads(metadata[name]) for name in NOTES if name in metadata}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no adapter, or a damaged one: expected {CONFIG} and {WEIGHTS} ({error})"
        ) from None
    if not isinstance(config, dict) or not all(isinstance(note, dict) for note in notes.values()):
        raise ValueError(f"{folder}: {CONFIG} or the header of {WEIGHTS} is damaged: expected JSON objects")
    # Integers and values that are not finite would be noticed much later, as a loss of NaN.
    where = str(folder / WEIGHTS)
    integers = {name: t.dtype for name, t in tensors.items() if not t.is_floating_point()}
    refuse([f"{name} is of type {dtype}" for name, dtype in integers.items()], where)
    not_finite = [name for name, t in tensors.items() if not t.isfinite().all()]
    refuse([f"{name} has values that are NaN or inf" for name in not_finite], where)
    return AdapterFiles(config, {name: t.float() for name, t in tensors.items()}, notes)


def rounding_of(folder: Path) -> dict[str, Any] | None:
    """How the base was quantized on which the adapter in `folder` was trained: the arguments of `quantize`.

    None for a base that was not, and for adapters that PEFT wrote, which do not say. Raises ValueError where
    the folder holds no adapter.
    """
    return read_files(folder).notes.get("quantization")


# ---- is it the same base?


class HasWeight(Protocol):
    """A linear layer or an embedding, plain or quantized."""

    @property
    def weight(self) -> Tensor:
        """[rows, columns]."""


@torch.no_grad()
def sketch(layers: Mapping[str, HasWeight], rows: int = 8) -> dict[str, list[float]]:
    """A few products of each layer's weight with a fixed vector, to four digits.

    They are enough to tell two bases apart, and nearly the same when a base is rounded.
    """
    products: dict[str, list[float]] = {}
    for name, layer in layers.items():
        weight = layer.weight[:rows].float().cpu()
        values = (weight @ torch.arange(weight.size(1)).cos()).tolist()
        products[name] = [float(f"{value:.4g}") for value in values]
    return products


def check_base(noted: Mapping[str, Any], ours: Mapping[str, list[float]], where: str) -> None:
    """Raises ValueError where two sketches are of different bases.

    They are if they lie further apart than rounding to four bits can move them (by about a tenth). Layers of
    which nothing is noted are not compared.
    """
    names = [name for name in ours if name in noted]
    if not names:
        return
    try:
        theirs = torch.cat([torch.tensor(noted[name], dtype=torch.float32) for name in names])
        here = torch.cat([torch.tensor(ours[name]) for name in names])
        differs = bool((theirs - here).norm() > 0.5 * theirs.norm())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: the header of {WEIGHTS} is damaged ({error})") from None
    if differs:
        raise ValueError(
            f"{where}: this adapter was trained on another base: the weights here are others. Load the model"
            " that it belongs to"
        )


# ---- soft prompts


def write_prompt(
    folder: Path, prompt: Tensor, config: GPTConfig, embedding: HasWeight, base_model: str | None
) -> None:
    """Writes a soft prompt [tokens, n_embd] for a GPT of `config`, whose token embedding is given.

    base_model: the hub's name of the base. Raises ValueError for a folder that holds a model.
    """
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": len(prompt),
        "token_dim": config.n_embd,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.n_head,
        "num_layers": config.n_layer,
        "prompt_tuning_init": "RANDOM",
    }
    notes = {"base": sketch({"token_embedding": embedding})}
    write_files(folder, {"prompt_embeddings": prompt.detach().cpu().contiguous().clone()}, settings, notes)


def is_prompt(folder: Path) -> bool:
    """Whether the folder holds a soft prompt. Raises ValueError where it holds no adapter."""
    return read_files(folder).config.get("peft_type") == "PROMPT_TUNING"


def read_prompt(folder: Path, config: GPTConfig, embedding: HasWeight) -> Tensor:
    """A soft prompt, fp32 [tokens, n_embd], for a GPT of `config`, whose token embedding is given.

    Raises ValueError for damaged files, and a prompt of another width or base.
    """
    settings, tensors, notes = read_files(folder)
    where = str(folder)
    expected = [settings.get("num_virtual_tokens"), config.n_embd]
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"prompt_embeddings": expected}:
        raise ValueError(
            f"{where}: a soft prompt of another base or length: it has {shapes}, where prompt_embeddings of"
            f" {expected} are expected"
        )
    check_base(notes.get("base", {}), sketch({"token_embedding": embedding}), where)
    return tensors["prompt_embeddings"]
