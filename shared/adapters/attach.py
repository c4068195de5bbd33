"""Week 9. Adapters on a model: a few trainable numbers beside weights that stay as they are.

LoRA (Hu et al., 2021) adds to a weight a product of two thin matrices, W + scale · B A; rsLoRA
(Kalajdzievski, 2023) scales it by alpha / √r; DoRA (Liu et al., 2024) learns each row's length apart from its
direction; QLoRA (Dettmers et al., 2023) is LoRA on a quantized layer, and needs no code of its own. Linear
layers are swapped for `LoRALinear`, which holds the adapters; the rest of the model stays the same.

>>> from shared.models.gpt import GPT, GPTConfig
>>> model = add_lora(GPT(GPTConfig.preset("nano")), LoRAConfig(r=4, target_modules=("q_proj", "v_proj")))
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 4 layers, 2 matrices, 4 · (128 + 128)
8192
>>> type(merge_lora(model).blocks[0].attn.q_proj).__name__
'Linear'
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from shared.adapters.lora import BaseLayer, LoRA, LoRAConfig, LoRALinear
from shared.adapters.whole import WholeModule, whole_modules
from shared.models.layers import swap_modules
from shared.quantization.modules import QuantizedEmbedding, QuantizedLinear, dequantize

WITH_WEIGHTS = (QuantizedLinear, QuantizedEmbedding, WholeModule)
"""Modules whose weights are in a module inside of them."""
OUTPUT = "lm_head"
"""The layer that "all-linear" leaves out."""

Module = TypeVar("Module", bound=nn.Module)


# ---- the layers of a model


def linear_layers(model: nn.Module) -> dict[str, BaseLayer | LoRALinear]:
    """The linear layers by name: plain, quantized, or with adapters (then without what is inside). A layer
    that an adapter trains whole is none of them.
    """
    layers: dict[str, BaseLayer | LoRALinear] = {}
    whole = tuple(f"{name}." for name in whole_modules(model))
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name.startswith(whole):
            continue
        if isinstance(module, (nn.Linear, QuantizedLinear, LoRALinear)) and parent not in layers:
            layers[name] = module
    return layers


def base_layer(layer: BaseLayer | LoRALinear) -> BaseLayer:
    """The layer itself, without adapters."""
    return layer.base if isinstance(layer, LoRALinear) else layer


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have adapters, by name."""
    layers = linear_layers(model)
    return {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}


def adapters_of(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configuration of each adapter on `model`, by name.

    Where a file gave layers different ranks, it is that of the first layer.
    """
    configs: dict[str, LoRAConfig] = {}
    for layer in adapted_layers(model).values():
        for name in layer.adapters:
            configs.setdefault(name, layer.adapter(name).config)
    return configs


def _targets(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The names of the layers that `wanted` matches, each once. Raises ValueError where one matches none."""
    layers = linear_layers(model)
    targets: list[str] = []
    for target in wanted:
        if target == "all-linear":
            matches = [name for name in layers if name != OUTPUT and not name.endswith(f".{OUTPUT}")]
        else:
            matches = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matches:
            existing = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"target_modules: no linear layer is called {target!r}; there are:"
                f" {', '.join(existing) or 'none'}"
            )
        targets += matches
    return list(dict.fromkeys(targets))


def _whole_targets(model: nn.Module, wanted: Sequence[str], adapted: Sequence[str]) -> list[str]:
    """The names of the modules that an adapter is to train whole.

    Raises ValueError for a name that matches no module with weights of its own, one that gets thin matrices
    too, and a module whose weight is another's as well (tied embeddings).
    """
    inside = tuple(f"{name}." for name in (*whole_modules(model), *adapted_layers(model)))
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and (module._parameters or isinstance(module, WITH_WEIGHTS))
    }
    owners = _count_owners(model)
    targets: list[str] = []
    for target in wanted:
        matches = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matches:
            existing = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
            raise ValueError(f"modules_to_save: no module is called {target!r}; there are: {existing}")
        targets += matches
    for name in targets:
        if name in adapted or isinstance(modules[name], LoRALinear):
            raise ValueError(f"{name} is in target_modules and in modules_to_save: leave it out of one")
        base = modules[name]
        members = base._modules.values() if isinstance(base, WITH_WEIGHTS) else base._parameters.values()
        if any(owners[id(member)] > 1 for member in members if member is not None):
            raise ValueError(
                f"modules_to_save: {name} shares its weight with another layer (tied embeddings), of which"
                " PEFT would train one and leave the other: leave it out"
            )
    return list(dict.fromkeys(targets))


def put_whole(model: nn.Module, module_name: str, name: str) -> nn.Module:
    """Gives the adapter `name` a copy of a module, and returns it."""
    module = model.get_submodule(module_name)
    if not isinstance(module, WholeModule):
        module = WholeModule(module).train(module.training)
        swap_modules(model, {module_name: module})
    return module.add(name).train(module.training)


# ---- checks


def check_new(model: nn.Module, names: Iterable[str], adapter: str) -> None:
    """Raises ValueError where an adapter called `adapter` cannot be put on the layers `names`."""
    if not re.fullmatch(r"\w[\w-]*", adapter) or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(
            f"an adapter cannot be called {adapter!r}: choose letters, digits, _ and -, and no name such as"
            " 'keys' that a dict has"
        )
    if adapter in adapters_of(model):
        raise ValueError(
            f"there is an adapter {adapter!r} on this model already: choose another name, or remove_adapter"
            " it first"
        )
    check_unmerged(model)
    layers = linear_layers(model)
    owners = _count_owners(model)
    for name in names:
        base = base_layer(layers[name])
        weight = base.packed if isinstance(base, QuantizedLinear) else base.weight
        if owners[id(weight)] > 1:
            raise ValueError(
                f"{name} shares its weight with another layer, which an adapter would change too once merged:"
                " leave it out"
            )


def _count_owners(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter or module, by its id, as their own."""
    owners: Counter[int] = Counter()
    for module in model.modules():
        members = chain(module._parameters.values(), module._modules.values())
        owners.update(id(member) for member in members if member is not None)
    return owners


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError for a name that no adapter on `model` has."""
    known = adapters_of(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no adapter is called {unknown[0]!r}; there are: {', '.join(known) or 'none'}")


def check_unmerged(model: nn.Module) -> None:
    """Raises ValueError while adapters are merged into `model`."""
    if any(layer.merged is not None for layer in adapted_layers(model).values()):
        raise ValueError("adapters are merged into this model: unmerge_lora it first")


# ---- adding and using


def put_adapter(model: nn.Module, layer_name: str, name: str, config: LoRAConfig) -> LoRA:
    """Puts a new adapter `name` on one layer of `model`, and returns it."""
    layer = model.get_submodule(layer_name)
    if not isinstance(layer, LoRALinear):
        assert isinstance(layer, (nn.Linear, QuantizedLinear)), f"{layer_name} is no linear layer"
        layer = LoRALinear(layer).train(layer.training)
        swap_modules(model, {layer_name: layer})
    adapter = LoRA(layer.base, config).train(layer.training)
    layer.adapters[name] = adapter
    return adapter


def add_lora(model: Module, config: LoRAConfig, name: str = "default") -> Module:
    """Puts a new adapter on the layers that `config` names, and returns the same model.

    It computes what it did before. All of the model is frozen but this adapter, the only one in use from here
    on. Its first values come from torch's generator. Raises ValueError, the model untouched, for targets that
    match no linear layer (with the names that there are), a layer whose weight is another's too (tied
    embeddings), and a name that is taken.
    """
    names = _targets(model, config.target_modules)
    whole = _whole_targets(model, config.modules_to_save, names)
    check_new(model, names, name)
    for target in names:
        put_adapter(model, target, name, config)
    for target in whole:
        put_whole(model, target, name)
    return use_adapters(model, name)


def use_adapters(model: Module, names: str | Sequence[str] | Mapping[str, float]) -> Module:
    """From here on the adapters of these names are in use, their changes added up; returns the same model.

    A mapping gives each a share; () is the base alone. Only what is in use is trained. Raises ValueError for
    a name that no adapter has, and while adapters are merged.
    """
    if isinstance(names, str):
        shares = {names: 1.0}
    elif isinstance(names, Mapping):
        shares = dict(names)
    else:
        shares = dict.fromkeys(names, 1.0)
    check_known(model, shares)
    check_unmerged(model)
    bringing = _bringing_whole(model, shares)
    if len(bringing) > 1 or any(shares[name] != 1 for name in bringing):
        raise ValueError(
            f"{', '.join(bringing)}: an adapter that trains modules whole (modules_to_save) is used alone of"
            " its kind, and with a share of 1"
        )
    model.requires_grad_(False)
    for module in whole_modules(model).values():
        module.in_use = next((name for name in bringing if name in module.copies), None)
        if module.in_use is not None:
            module.copies[module.in_use].requires_grad_(True)
    for layer in adapted_layers(model).values():
        layer.in_use = {name: share for name, share in shares.items() if name in layer.adapters}
        for name in layer.in_use:
            layer.adapters[name].requires_grad_(True)
    return model


def _bringing_whole(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of these adapters that train modules whole."""
    copies = {name for module in whole_modules(model).values() for name in module.copies}
    return [name for name in names if name in copies]


def _refuse_whole(model: nn.Module, names: Iterable[str], what: str) -> None:
    """Raises ValueError where one of these adapters trains modules whole."""
    bringing = _bringing_whole(model, names)
    if bringing:
        raise ValueError(
            f"{bringing[0]} trains modules whole (modules_to_save), and cannot be {what}: use it alone"
        )


@contextmanager
def adapters_by_row(model: Module, names: Sequence[str | None]) -> Iterator[Module]:
    """Within `with`, row i of a batch is computed with the adapter names[i] alone, None being the base.

    Raises ValueError for an unknown name, while adapters are merged, and, when the model is called, for a
    batch of another size.
    """
    layers = adapted_layers(model).values()
    check_known(model, [name for name in names if name is not None])
    check_unmerged(model)
    _refuse_whole(model, [name for name in names if name is not None], "used for some rows of a batch")
    before = [layer.rows for layer in layers]
    for layer in layers:
        layer.rows = tuple(names)
    try:
        yield model
    finally:
        for layer, rows in zip(layers, before):
            layer.rows = rows


def remove_adapter(model: Module, name: str) -> Module:
    """Removes an adapter; a layer that has no other is the base again. Returns the same model.

    Raises ValueError for an unknown name, and while adapters are merged.
    """
    check_known(model, [name])
    check_unmerged(model)
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            del layer.adapters[name]
            layer.in_use.pop(name, None)
            if not layer.adapters:
                swap_modules(model, {path: layer.base})
    for path, module in whole_modules(model).items():
        if name in module.copies:
            del module.copies[name]
            module.in_use = None if module.in_use == name else module.in_use
            if not module.copies:
                swap_modules(model, {path: module.base})
    return model


# ---- merging


def merge_lora(model: Module, keep: bool = False) -> Module:
    """Adds the adapters in use to the weights, and returns the same model.

    Its layers are then plain, and cost what they did without adapters. keep=False removes all adapters, those
    not in use as well. With keep=True they stay, the base beside them, and `unmerge_lora` goes back. A
    quantized layer becomes one in fp32: rounded again, it would lose part of what was learned. With
    keep=False so do the quantized layers without an adapter: the model is then a plain one, which can be
    saved, exported, and quantized anew. Merging again changes nothing.
    """
    changed = False
    for name, layer in adapted_layers(model).items():
        layer.merge()
        changed = changed or layer.merged is not layer.base
        if not keep and layer.merged is not None:
            swap_modules(model, {name: layer.merged})
    if not keep:
        for name, module in whole_modules(model).items():
            swap_modules(model, {name: module.current.requires_grad_(False)})
    return dequantize(model) if changed and not keep else model


def unmerge_lora(model: Module) -> Module:
    """Undoes `merge_lora(model, keep=True)`; returns the same model.

    Base and adapters are, bit for bit, what they were.
    """
    for layer in adapted_layers(model).values():
        layer.merged = None
    return model


# ---- several adapters made one


@torch.no_grad()
def combine_adapters(
    model: Module, shares: Mapping[str, float], name: str, method: str = "cat", rank: int | None = None
) -> Module:
    """Makes one new adapter, `name`, of LoRA adapters in the proportions `shares`, and uses it.

    Returns the same model. method:

    - "cat": the A's one below the other, the B's side by side. Exactly Σ share · scale · B A; the ranks add
      up.
    - "svd": the nearest matrix of rank `rank` to that sum (the largest of the ranks, if not given). The
      singular values left out are lost, and no matrix of that rank loses less (Eckart & Young, 1936).
    - "linear": A and B are added up, each multiplied by √(share · scale). In (Σ B) (Σ A) only the products of
      one adapter's B with its own A are wanted; the cross terms, of one's B with another's A, come in too. It
      is cheap, and exact for a single adapter; two equal ones, at a half each, become one that is twice as
      strong.

    Raises ValueError for an unknown adapter or method, for DoRA (whose changes are no such products), and for
    different ranks with "linear".
    """
    configs = adapters_of(model)
    check_known(model, shares)
    _refuse_whole(model, shares, "combined with others")
    _check_combination([configs[part] for part in shares], method, rank)
    combined: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in adapted_layers(model).items():
        parts = [(layer.adapter(part), share) for part, share in shares.items() if part in layer.adapters]
        if parts:
            combined[path] = _combine(parts, method, rank)
    targets = tuple(dict.fromkeys(chain.from_iterable(configs[part].target_modules for part in shares)))
    check_new(model, combined, name)
    for path, (a, b) in combined.items():
        config = LoRAConfig(r=len(a), lora_alpha=len(a), target_modules=targets)  # a scale of 1
        adapter = put_adapter(model, path, name, config)
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)
    return use_adapters(model, name)


def _check_combination(configs: Sequence[LoRAConfig], method: str, rank: int | None) -> None:
    """Raises ValueError where adapters of these configurations cannot be combined by this method."""
    if method not in ("cat", "svd", "linear") or not configs:
        raise ValueError(
            f"method={method!r} with {len(configs)} adapters: choose cat, svd or linear, and at least one"
            " adapter"
        )
    if any(config.use_dora for config in configs):
        raise ValueError(
            "DoRA adapters cannot be combined into one: their change of a weight is no product of thin"
            " matrices; use several at once"
        )
    if rank is not None and (method != "svd" or rank < 1):
        raise ValueError(f"rank={rank} with method={method!r}: only svd has it, and it is at least 1")


def _combine(parts: Sequence[tuple[LoRA, float]], method: str, rank: int | None) -> tuple[Tensor, Tensor]:
    """A and B of the combination of one layer's adapters, each with its share; its scale is 1."""
    if method == "linear":
        return _added(parts)
    a = torch.cat([share * adapter.config.scale * adapter.lora_A for adapter, share in parts])
    b = torch.cat([adapter.lora_B for adapter, _ in parts], dim=1)
    if method == "cat":
        return a, b
    return _truncated(a, b, rank or max(adapter.config.r for adapter, _ in parts))


def _added(parts: Sequence[tuple[LoRA, float]]) -> tuple[Tensor, Tensor]:
    """Σ √|f| A, signed, and Σ √|f| B, where f = share · scale."""
    if len({adapter.config.r for adapter, _ in parts}) > 1:
        raise ValueError("linear adds matrices of the same rank only: combine with cat or svd")
    first, _ = parts[0]
    a = torch.zeros_like(first.lora_A)
    b = torch.zeros_like(first.lora_B)
    for adapter, share in parts:
        factor = share * adapter.config.scale
        root = math.sqrt(abs(factor))
        a += math.copysign(root, factor) * adapter.lora_A
        b += root * adapter.lora_B
    return a, b


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the nearest matrix to B A that has this rank.

    B A's singular values are those of a small matrix: with QR decompositions B = Q₁ R₁ and Aᵀ = Q₂ R₂ it is
    Q₁ (R₁ R₂ᵀ) Q₂ᵀ.
    """
    rank = min(rank, *b.shape, a.size(1))
    left, r_left = torch.linalg.qr(b.double())
    right, r_right = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    root = s[:rank].sqrt()
    thin_a = root[:, None] * v[:rank] @ right.T
    thin_b = left @ u[:, :rank] * root
    return thin_a.float(), thin_b.float()
