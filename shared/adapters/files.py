"""Week 9. Adapters saved and loaded in the format of the library PEFT."""

from pathlib import Path

from torch import nn

from shared.adapters import peft_files
from shared.adapters.attach import (
    adapted_layers,
    base_layer,
    check_known,
    check_new,
    linear_layers,
    put_adapters,
    use_adapters,
)
from shared.adapters.lora import LoRAConfig
from shared.adapters.peft_files import Weights
from shared.adapters.prompts import PromptTuned
from shared.models.gpt import GPT
from shared.runtime import device_of

# ---- files


def save_adapter(
    folder: str | Path, model: nn.Module, name: str = "default", base_model: str | None = None
) -> Path:
    """Writes an adapter, apart from the base, as PEFT does: adapter_model.safetensors and
    adapter_config.json. Returns the folder.

    A LoRA is written by `name`, a soft prompt where the model is a `PromptTuned`. Layers get Hugging Face's
    names where the model has an exact equivalent there (GPT-2, Llama, Qwen3), and its own otherwise.
    base_model: the hub's name of the base, for who loads the file. Raises ValueError for an unknown adapter
    and a folder that holds a model.
    """
    folder = Path(folder)
    if isinstance(model, PromptTuned):
        peft_files.write_prompt(folder, model.prompt, model.config, _embedding(model), base_model)
        return folder
    check_known(model, [name])
    layers = {
        path: layer.adapters[name] for path, layer in adapted_layers(model).items() if name in layer.adapters
    }
    weights = {
        path: Weights(a.lora_A.detach(), a.lora_B.detach(), a.config.lora_alpha, a.magnitude)
        for path, a in layers.items()
    }
    config = next(iter(layers.values())).config
    settings = {key: getattr(config, key) for key in ("lora_dropout", "use_rslora", "use_dora")}
    peft_files.write_lora(
        folder,
        model,
        {path: base_layer(m) for path, m in linear_layers(model).items()},
        weights,
        settings,
        base_model,
    )
    return folder


def load_adapter(folder: str | Path, model: nn.Module, name: str = "default") -> nn.Module:
    """Puts an adapter that `save_adapter` or PEFT wrote on its base, uses it, and returns the model; a soft
    prompt returns a `PromptTuned`.

    What PEFT keeps as one (GPT-2's A for queries, keys and values) is one parameter here too. Raises
    ValueError, the model untouched, for files that are missing or damaged, an adapter of another base or
    rank, a name that is taken, and what only PEFT can compute.
    """
    folder = Path(folder)
    linears = {path: base_layer(layer) for path, layer in linear_layers(model).items()}
    if isinstance(model, GPT) and peft_files.is_prompt(folder):
        return PromptTuned(
            model,
            peft_files.read_prompt(folder, model.config, _embedding(model)).to(device_of(model)),
        )
    config, layers = peft_files.read_lora(folder, model, linears)
    check_new(model, layers, name)
    targets = tuple(dict.fromkeys(path.rpartition(".")[2] for path in layers))
    shared: dict[int, nn.Parameter] = {}
    for path, found in layers.items():
        own = LoRAConfig(
            r=len(found.a),
            lora_alpha=found.alpha,
            target_modules=targets,
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config["use_rslora"],
            use_dora=found.magnitude is not None,
        )
        adapter = put_adapters(model, path, name, own)
        device = adapter.lora_A.device
        adapter.lora_A = shared.setdefault(id(found.a), nn.Parameter(found.a.to(device)))
        adapter.lora_B = nn.Parameter(found.b.to(device))
        if found.magnitude is not None:
            adapter.magnitude = nn.Parameter(found.magnitude.to(device).clone())
    return use_adapters(model, name)


def _embedding(model: GPT | PromptTuned) -> nn.Module:
    return model.model.token_embedding.base if isinstance(model, PromptTuned) else model.token_embedding
