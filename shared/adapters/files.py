"""Week 9. Adapters saved and loaded, in the format of the library PEFT."""

from pathlib import Path
from typing import TypeVar

from torch import nn

from shared.adapters import peft_files
from shared.adapters.attach import (
    adapted_layers,
    base_layer,
    check_known,
    check_new,
    linear_layers,
    put_adapter,
    put_whole,
    use_adapters,
)
from shared.adapters.lora import LoRAConfig
from shared.adapters.peft_lora import Weights, read_lora, write_lora
from shared.adapters.prompts import PromptTuned
from shared.adapters.whole import whole_modules
from shared.devices import device_of
from shared.models.gpt import GPT
from shared.quantization.modules import quantization_of
from shared.registry import unwrapped

Module = TypeVar("Module", bound=nn.Module)


def save_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", base_model: str | None = None
) -> Path:
    """Writes an adapter, apart from the base, as PEFT does; returns the folder.

    The files are adapter_model.safetensors and adapter_config.json. A LoRA is written by `name`, a soft
    prompt where the model is a `PromptTuned`. Layers get Hugging Face's names where the model has an exact
    equivalent there (`shared.models.families`), and its own otherwise. base_model: the base's name on the
    hub, or its folder, for who loads the file. How a quantized base is rounded is noted (see `rounding_of`).
    Raises ValueError for an unknown adapter and a folder that holds a model.
    """
    folder = Path(folder)
    model = unwrapped(model)
    if isinstance(model, PromptTuned):
        peft_files.write_prompt(folder, model.prompt, model.config, model.embedding.base, base_model)
        return folder
    check_known(model, [name])
    weights: dict[str, Weights] = {}
    configs: list[LoRAConfig] = []
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            adapter = layer.adapter(name)
            configs.append(adapter.config)
            alpha = adapter.config.lora_alpha
            weights[path] = Weights(
                adapter.lora_A.detach(), adapter.lora_B.detach(), alpha, adapter.magnitude
            )
    whole = {
        f"{path}.{field}": tensor.detach()
        for path, module in whole_modules(model).items()
        if name in module.copies
        for field, tensor in module.copies[name].named_parameters()
    }
    write_lora(
        model,
        folder,
        linears={path: base_layer(layer) for path, layer in linear_layers(model).items()},
        layers=weights,
        whole=whole,
        settings={key: getattr(configs[0], key) for key in ("lora_dropout", "use_rslora", "use_dora")},
        base_model=base_model,
        quantization=quantization_of(model),
    )
    return folder


def load_adapter(model: Module, folder: str | Path, name: str = "default") -> Module | PromptTuned:
    """Puts an adapter that `save_adapter` or PEFT wrote on its base, uses it, and returns the model.

    A soft prompt returns a `PromptTuned`. What PEFT keeps as one (GPT-2's A for queries, keys and values) is
    one parameter here too. Raises ValueError, the model untouched, for files that are missing or damaged, an
    adapter of another base or rank, a name that is taken, and what only PEFT can compute.
    """
    folder = Path(folder)
    if isinstance(model, GPT) and peft_files.is_prompt(folder):
        prompt = peft_files.read_prompt(folder, model.config, model.token_embedding)
        return PromptTuned(model, prompt.to(device_of(model)))
    linears = {path: base_layer(layer) for path, layer in linear_layers(model).items()}
    config, layers, whole = read_lora(model, folder, linears)
    check_new(model, layers, name)
    modules = tuple(dict.fromkeys(parameter.rpartition(".")[0] for parameter in whole))
    targets = tuple(dict.fromkeys(path.rpartition(".")[2] for path in layers))
    shared_a: dict[int, nn.Parameter] = {}
    for path, weights in layers.items():
        lora_config = LoRAConfig(
            r=len(weights.a),
            lora_alpha=weights.alpha,
            target_modules=targets,
            modules_to_save=modules,
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config["use_rslora"],
            use_dora=weights.magnitude is not None,
        )
        adapter = put_adapter(model, path, name, lora_config)
        device = adapter.lora_A.device
        adapter.lora_A = shared_a.setdefault(id(weights.a), nn.Parameter(weights.a.to(device)))
        adapter.lora_B = nn.Parameter(weights.b.to(device))
        if weights.magnitude is not None:
            adapter.magnitude = nn.Parameter(weights.magnitude.to(device).clone())
    for path in modules:
        copy = put_whole(model, path, name)
        for field, parameter in copy.named_parameters():
            parameter.data = whole[f"{path}.{field}"].to(parameter.device)
    return use_adapters(model, name)
