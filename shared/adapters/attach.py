"""Week 9. Adapters: a few trainable numbers beside a model that stays as it is.

LoRA (Hu et al., 2021) adds to a weight a product of two thin matrices, W + scale · B A; rsLoRA
(Kalajdzievski, 2023) scales it by alpha / √r; DoRA (Liu et al., 2024) learns each row's length apart from its
direction; QLoRA (Dettmers et al., 2023) is LoRA round a quantized layer, and so needs nothing of its own;
prompt tuning (Lester et al., 2021) learns embeddings that stand before the text. Linear layers are swapped
for ones that hold adapters, and the model does not know. Files are those of the library PEFT.

>>> from shared.models.gpt import GPTConfig
>>> model = add_lora(GPT(GPTConfig.preset("nano")), LoRAConfig(r=4, target_modules=("q_proj", "v_proj")))
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 4 layers of two matrices [128, 128], 4 · (128 + 128) each
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

import torch
from torch import Tensor, nn

from shared.adapters.lora import LoRA, LoRAConfig, LoRALinear
from shared.models.layers import swap_modules
from shared.quantization.modules import QuantizedLinear

OUTPUT = "lm_head"
"""The layer that "all-linear" leaves out."""


# ---- adapters on a model


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by name: plain, quantized, or with adapters (then without what is inside)."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Linear, QuantizedLinear, LoRALinear))
            and name.rpartition(".")[0] not in found
        ):
            found[name] = module
    return found


def base_layer(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, LoRALinear) else layer


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in linear_layers(model).items() if isinstance(m, LoRALinear)}


def adapters_of(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configuration of each adapter on `model`, by name (of its first layer, where a file gave layers
    different ranks).
    """
    found: dict[str, LoRAConfig] = {}
    for layer in adapted_layers(model).values():
        for name, adapter in layer.adapters.items():
            found.setdefault(name, adapter.config)
    return found


def _targets(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    layers = linear_layers(model)
    found: dict[str, None] = {}
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
        found |= dict.fromkeys(matches)
    return list(found)


def check_new(model: nn.Module, names: Iterable[str], adapter: str) -> None:
    """Raises ValueError where an adapter of this name cannot be put on these layers."""
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
    owners = Counter(
        id(t)
        for m in model.modules()
        for t in (*m._parameters.values(), *m._modules.values())
        if t is not None
    )
    for name in names:
        base = base_layer(model.get_submodule(name))
        if any(
            owners[id(t)] > 1
            for t in (getattr(base, "packed", None), base._parameters.get("weight"))
            if t is not None
        ):
            raise ValueError(
                f"{name} shares its weight with another layer, which an adapter would change too once merged:"
                " leave it out"
            )


def put_adapters(model: nn.Module, name: str, adapter: str, config: LoRAConfig) -> LoRA:
    layer = model.get_submodule(name)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer).train(layer.training)
        swap_modules(model, {name: layer})
    layer.adapters[adapter] = LoRA(layer.base, config).train(layer.training)
    return layer.adapters[adapter]


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Puts a new adapter on the layers that `config` names, and returns the same model, which computes what
    it did before.

    All of the model is frozen but this adapter, the only one in use from here on. Its first values come from
    torch's generator. Raises ValueError, the model untouched, for targets that match no linear layer (with
    the names that there are), a layer whose weight is another's too (tied embeddings), and a name that is
    taken.
    """
    names = _targets(model, config.target_modules)
    check_new(model, names, name)
    for target in names:
        put_adapters(model, target, name, config)
    return use_adapters(model, name)


def use_adapters(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> nn.Module:
    """From here on the adapters of these names are in use, their changes added up; a mapping gives each a
    share. () is the base alone.

    Only what is in use is trained. Raises ValueError for a name that no adapter has, and while adapters are
    merged.
    """
    shares = (
        dict(names)
        if isinstance(names, Mapping)
        else dict.fromkeys([names] if isinstance(names, str) else names, 1.0)
    )
    layers = adapted_layers(model)
    check_known(model, shares)
    check_unmerged(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.in_use = {name: share for name, share in shares.items() if name in layer.adapters}
        for name in layer.in_use:
            layer.adapters[name].requires_grad_(True)
    return model


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    known = adapters_of(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no adapter is called {unknown[0]!r}; there are: {', '.join(known) or 'none'}")


def check_unmerged(model: nn.Module) -> None:
    if any(layer.merged is not None for layer in adapted_layers(model).values()):
        raise ValueError("adapters are merged into this model: unmerge_lora it first")


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within `with`, row i of a batch is computed with the adapter names[i] alone, None being the base.

    Raises ValueError for an unknown name, while adapters are merged, and, when the model is called, for a
    batch of another size.
    """
    layers = adapted_layers(model).values()
    check_known(model, [name for name in names if name is not None])
    check_unmerged(model)
    before = [layer.rows for layer in layers]
    for layer in layers:
        layer.rows = tuple(names)
    try:
        yield model
    finally:
        for layer, rows in zip(layers, before):
            layer.rows = rows


def merge_lora(model: nn.Module, keep: bool = False) -> nn.Module:
    """Adds the adapters in use to the weights, and returns the same model: plain layers that cost what they
    did without adapters.

    keep=False takes all adapters away, those not in use as well. With keep=True they stay, the base beside
    them, and `unmerge_lora` goes back. A quantized layer becomes one in fp32: rounded again, it would lose
    part of what was learned. Merging again changes nothing.
    """
    for name, layer in adapted_layers(model).items():
        layer.merge()
        if not keep:
            swap_modules(model, {name: layer.merged})
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Undoes `merge_lora(model, keep=True)`: base and adapters are, bit for bit, what they were. Returns the
    same model.
    """
    for layer in adapted_layers(model).values():
        layer.merged = None
    return model


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Takes an adapter away; a layer that has no other is the base again. Returns the same model. Raises
    ValueError for an unknown name.
    """
    check_known(model, [name])
    check_unmerged(model)
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            del layer.adapters[name]
            layer.in_use.pop(name, None)
            if not layer.adapters:
                swap_modules(model, {path: layer.base})
    return model


@torch.no_grad()
def combine_adapters(
    model: nn.Module, shares: Mapping[str, float], name: str, method: str = "cat", rank: int | None = None
) -> nn.Module:
    """Makes a new adapter `name` of LoRA adapters on the model, in the proportions `shares`, and uses it.
    Returns the same model.

    method "cat": A's one below the other, B's side by side. Exactly Σ share · scale · B A, and the ranks add
    up. "svd": of that sum the nearest matrix of rank `rank` (the largest of the ranks, if not given): what is
    lost is the singular values left out, and no matrix of that rank loses less (Eckart & Young, 1936).
    "linear": A and B are added up, each multiplied by √(share · scale). Of (Σ B) (Σ A) only the products of
    the same adapter are wanted; those of one's B with another's A, the cross terms, come in too. Cheap, and
    exact for one adapter alone; two equal ones, at a half each, become one that is twice as strong. Raises
    ValueError for an unknown adapter or method, DoRA (whose changes are no such products), and different
    ranks with "linear".
    """
    configs = adapters_of(model)
    check_known(model, shares)
    if method not in ("cat", "svd", "linear") or not shares:
        raise ValueError(
            f"method={method!r} with {len(shares)} adapters: choose cat, svd or linear, and at least one"
            " adapter"
        )
    if any(configs[other].use_dora for other in shares):
        raise ValueError(
            "DoRA adapters cannot be combined into one: their change of a weight is no product of thin"
            " matrices; use several at once"
        )
    if rank is not None and (method != "svd" or rank < 1):
        raise ValueError(f"rank={rank} with method={method!r}: only svd has it, and it is at least 1")
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in adapted_layers(model).items():
        parts = [(layer.adapters[other], share) for other, share in shares.items() if other in layer.adapters]
        if parts:
            made[path] = _combined(parts, method, rank)
    targets = tuple(dict.fromkeys(chain.from_iterable(configs[other].target_modules for other in shares)))
    check_new(model, made, name)
    for path, (a, b) in made.items():
        adapter = put_adapters(
            model, path, name, LoRAConfig(r=len(a), lora_alpha=len(a), target_modules=targets)
        )
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)
    return use_adapters(model, name)


def _combined(parts: Sequence[tuple[LoRA, float]], method: str, rank: int | None) -> tuple[Tensor, Tensor]:
    """A and B of the combination, whose scale is 1."""
    if method == "linear":
        if len({adapter.config.r for adapter, _ in parts}) > 1:
            raise ValueError("linear adds matrices of the same rank only: combine with cat or svd")
        factors = [share * adapter.config.scale for adapter, share in parts]
        a = sum(
            math.copysign(math.sqrt(abs(f)), f) * adapter.lora_A for (adapter, _), f in zip(parts, factors)
        )
        return a, sum(math.sqrt(abs(f)) * adapter.lora_B for (adapter, _), f in zip(parts, factors))
    a = torch.cat([share * adapter.config.scale * adapter.lora_A for adapter, share in parts])
    b = torch.cat([adapter.lora_B for adapter, _ in parts], dim=1)
    if method == "cat":
        return a, b
    # The singular values of B A are those of the small matrix between two orthogonal ones.
    rank = min(rank or max(adapter.config.r for adapter, _ in parts), *b.shape, a.size(1))
    left, r_left = torch.linalg.qr(b.double())
    right, r_right = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank] @ right.T).float(), (left @ u[:, :rank] * root).float()
