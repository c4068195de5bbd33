"""Week 9. Adapters: a few trainable numbers beside a model that stays as it is.

LoRA (Hu et al., 2021) adds to a weight a product of two thin matrices, W + scale · B A; rsLoRA (Kalajdzievski, 2023) scales it by alpha / √r;
DoRA (Liu et al., 2024) learns each row's length apart from its direction; QLoRA (Dettmers et al., 2023) is LoRA round a quantized layer, and so
needs nothing of its own; prompt tuning (Lester et al., 2021) learns embeddings that stand before the text. Linear layers are swapped for ones
that hold adapters, and the model does not know. Files are those of the library PEFT.

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
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import peft_files
from shared.lora import LoRA, LoRAConfig, LoRALinear
from shared.models.gpt import GPT, KVCache
from shared.peft_files import Weights
from shared.quantization import QuantizedLinear

OUTPUT = "lm_head"
"""The layer that "all-linear" leaves out."""


# ---- adapters on a model


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by name: plain, quantized, or with adapters (then without what is inside)."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantizedLinear, LoRALinear)) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


def _base(layer: nn.Module) -> nn.Module:
    return layer.base if isinstance(layer, LoRALinear) else layer


def _adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in linear_layers(model).items() if isinstance(m, LoRALinear)}


def _set(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def adapters_of(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configuration of each adapter on `model`, by name (of its first layer, where a file gave layers different ranks)."""
    found: dict[str, LoRAConfig] = {}
    for layer in _adapted(model).values():
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
            raise ValueError(f"target_modules: no linear layer is called {target!r}; there are: {', '.join(existing) or 'none'}")
        found |= dict.fromkeys(matches)
    return list(found)


def _check_new(model: nn.Module, names: Iterable[str], adapter: str) -> None:
    """Raises ValueError where an adapter of this name cannot be put on these layers."""
    if not re.fullmatch(r"\w[\w-]*", adapter) or hasattr(nn.ModuleDict(), adapter):
        raise ValueError(f"an adapter cannot be called {adapter!r}: choose letters, digits, _ and -, and no name such as 'keys' that a dict has")
    if adapter in adapters_of(model):
        raise ValueError(f"there is an adapter {adapter!r} on this model already: choose another name, or remove_adapter it first")
    _check_unmerged(model)
    owners = Counter(id(t) for m in model.modules() for t in (*m._parameters.values(), *m._modules.values()) if t is not None)
    for name in names:
        base = _base(model.get_submodule(name))
        if any(owners[id(t)] > 1 for t in (getattr(base, "packed", None), base._parameters.get("weight")) if t is not None):
            raise ValueError(f"{name} shares its weight with another layer, which an adapter would change too once merged: leave it out")


def _put(model: nn.Module, name: str, adapter: str, config: LoRAConfig) -> LoRA:
    layer = model.get_submodule(name)
    if not isinstance(layer, LoRALinear):
        layer = LoRALinear(layer).train(layer.training)
        _set(model, name, layer)
    layer.adapters[adapter] = LoRA(layer.base, config).train(layer.training)
    return layer.adapters[adapter]


def add_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> nn.Module:
    """Puts a new adapter on the layers that `config` names, and returns the same model, which computes what it did before.

    All of the model is frozen but this adapter, the only one in use from here on. Its first values come from torch's generator. Raises
    ValueError, the model untouched, for targets that match no linear layer (with the names that there are), a layer whose weight is
    another's too (tied embeddings), and a name that is taken.
    """
    names = _targets(model, config.target_modules)
    _check_new(model, names, name)
    for target in names:
        _put(model, target, name, config)
    return use_adapters(model, name)


def use_adapters(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> nn.Module:
    """From here on the adapters of these names are in use, their changes added up; a mapping gives each a share. () is the base alone.

    Only what is in use is trained. Raises ValueError for a name that no adapter has, and while adapters are merged.
    """
    shares = dict(names) if isinstance(names, Mapping) else dict.fromkeys([names] if isinstance(names, str) else names, 1.0)
    layers = _adapted(model)
    _check_known(model, shares)
    _check_unmerged(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.in_use = {name: share for name, share in shares.items() if name in layer.adapters}
        for name in layer.in_use:
            layer.adapters[name].requires_grad_(True)
    return model


def _check_known(model: nn.Module, names: Iterable[str]) -> None:
    known = adapters_of(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no adapter is called {unknown[0]!r}; there are: {', '.join(known) or 'none'}")


def _check_unmerged(model: nn.Module) -> None:
    if any(layer.merged is not None for layer in _adapted(model).values()):
        raise ValueError("adapters are merged into this model: unmerge_lora it first")


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within `with`, row i of a batch is computed with the adapter names[i] alone, None being the base.

    Raises ValueError for an unknown name, while adapters are merged, and, when the model is called, for a batch of another size.
    """
    layers = _adapted(model).values()
    _check_known(model, [name for name in names if name is not None])
    _check_unmerged(model)
    before = [layer.rows for layer in layers]
    for layer in layers:
        layer.rows = tuple(names)
    try:
        yield model
    finally:
        for layer, rows in zip(layers, before):
            layer.rows = rows


def merge_lora(model: nn.Module, keep: bool = False) -> nn.Module:
    """Adds the adapters in use to the weights, and returns the same model: plain layers that cost what they did without adapters.

    keep=False takes all adapters away, those not in use as well. With keep=True they stay, the base beside them, and `unmerge_lora` goes
    back. A quantized layer becomes one in fp32: rounded again, it would lose part of what was learned. Merging again changes nothing.
    """
    for name, layer in _adapted(model).items():
        layer.merge()
        if not keep:
            _set(model, name, layer.merged)
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Undoes `merge_lora(model, keep=True)`: base and adapters are, bit for bit, what they were. Returns the same model."""
    for layer in _adapted(model).values():
        layer.merged = None
    return model


def remove_adapter(model: nn.Module, name: str) -> nn.Module:
    """Takes an adapter away; a layer that has no other is the base again. Returns the same model. Raises ValueError for an unknown name."""
    _check_known(model, [name])
    _check_unmerged(model)
    for path, layer in _adapted(model).items():
        if name in layer.adapters:
            del layer.adapters[name]
            layer.in_use.pop(name, None)
            if not layer.adapters:
                _set(model, path, layer.base)
    return model


@torch.no_grad()
def combine_adapters(model: nn.Module, shares: Mapping[str, float], name: str, method: str = "cat", rank: int | None = None) -> nn.Module:
    """Makes a new adapter `name` of LoRA adapters on the model, in the proportions `shares`, and uses it. Returns the same model.

    method "cat": A's one below the other, B's side by side. Exactly Σ share · scale · B A, and the ranks add up.
    "svd": of that sum the nearest matrix of rank `rank` (the largest of the ranks, if not given): what is lost is the singular values left
    out, and no matrix of that rank loses less (Eckart & Young, 1936).
    "linear": A and B are added up, each multiplied by √(share · scale). Of (Σ B) (Σ A) only the products of the same adapter are wanted;
    those of one's B with another's A, the cross terms, come in too. Cheap, and exact for one adapter alone; two
    equal ones, at a half each, become one that is twice as strong.
    Raises ValueError for an unknown adapter or method, DoRA (whose changes are no such products), and different ranks with "linear".
    """
    configs = adapters_of(model)
    _check_known(model, shares)
    if method not in ("cat", "svd", "linear") or not shares:
        raise ValueError(f"method={method!r} with {len(shares)} adapters: choose cat, svd or linear, and at least one adapter")
    if any(configs[other].use_dora for other in shares):
        raise ValueError("DoRA adapters cannot be combined into one: their change of a weight is no product of thin matrices; use several at once")
    if rank is not None and (method != "svd" or rank < 1):
        raise ValueError(f"rank={rank} with method={method!r}: only svd has it, and it is at least 1")
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in _adapted(model).items():
        parts = [(layer.adapters[other], share) for other, share in shares.items() if other in layer.adapters]
        if parts:
            made[path] = _combined(parts, method, rank)
    targets = tuple(dict.fromkeys(chain.from_iterable(configs[other].target_modules for other in shares)))
    _check_new(model, made, name)
    for path, (a, b) in made.items():
        adapter = _put(model, path, name, LoRAConfig(r=len(a), lora_alpha=len(a), target_modules=targets))
        adapter.lora_A.copy_(a)
        adapter.lora_B.copy_(b)
    return use_adapters(model, name)


def _combined(parts: Sequence[tuple[LoRA, float]], method: str, rank: int | None) -> tuple[Tensor, Tensor]:
    """A and B of the combination, whose scale is 1."""
    if method == "linear":
        if len({adapter.config.r for adapter, _ in parts}) > 1:
            raise ValueError("linear adds matrices of the same rank only: combine with cat or svd")
        factors = [share * adapter.config.scale for adapter, share in parts]
        a = sum(math.copysign(math.sqrt(abs(f)), f) * adapter.lora_A for (adapter, _), f in zip(parts, factors))
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


# ---- soft prompts


class SoftPrompt(nn.Module):
    """A token embedding with further rows: token num_embeddings + i is row i of `prompt`. int64 [...] -> [..., n_embd]."""

    def __init__(self, base: nn.Module, prompt: Tensor):
        super().__init__()
        self.base, self.prompt = base, nn.Parameter(prompt)

    def forward(self, idx: Tensor) -> Tensor:
        beyond = idx - self.base.num_embeddings
        rows = self.base(idx.where(beyond < 0, 0))
        return torch.where(beyond.unsqueeze(-1) < 0, rows, self.prompt[beyond.clamp(min=0)].to(rows.dtype))


class PromptTuned(nn.Module):
    """A GPT with trained embeddings before every text. It is called as the GPT is, and returns logits for the text only."""

    def __init__(self, model: GPT, prompt: Tensor):
        super().__init__()
        length = len(prompt)
        if length >= model.config.block_size:
            raise ValueError(f"a prompt of {length} tokens leaves no room for text in block_size={model.config.block_size}: make it shorter")
        if isinstance(model.token_embedding, SoftPrompt):
            raise ValueError("this model has a soft prompt already: take it from the plain model")
        self.model = model.requires_grad_(False)
        self.config = replace(model.config, block_size=model.config.block_size - length)
        self.tokenizer = model.tokenizer
        model.token_embedding = SoftPrompt(model.token_embedding, prompt)
        self.train(model.training)

    @property
    def prompt(self) -> nn.Parameter:
        """[num_virtual_tokens, n_embd], the only thing that is trained."""
        return self.model.token_embedding.prompt

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """int64 [batch, time] -> float [batch, time, vocab_size]. Raises ValueError when the text does not fit beside the prompt."""
        if cache is not None and cache.length:
            return self.model(idx, cache)
        if idx.size(1) > self.config.block_size:
            raise ValueError(f"{idx.size(1)} tokens do not fit in block_size={self.config.block_size}, which is the model's without the prompt")
        virtual = torch.arange(len(self.prompt), device=idx.device) + self.config.vocab_size
        return self.model(torch.cat([virtual.expand(len(idx), -1), idx], dim=1), cache)[:, len(virtual) :]

    def new_cache(self, batch_size: int = 1, max_length: int | None = None) -> KVCache:
        """An empty cache of the model's: the prompt takes its first places."""
        return self.model.new_cache(batch_size, max_length)

    generate = GPT.generate


def add_prompt(model: GPT, num_virtual_tokens: int, ids: Sequence[int] | None = None) -> PromptTuned:
    """Freezes `model`, and puts that many trainable embeddings before every text (Lester et al., "The Power of Scale", 2021).

    ids: tokens whose embeddings are the first values, repeated or cut to length (a text that says what to do); if not given, random ones
    of the vocabulary. `result.model` is the same model, and without the prompt computes what it did. Raises ValueError for a prompt
    without tokens, one that fills block_size, and ids that are not in the vocabulary.
    """
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens={num_virtual_tokens}: must be at least 1")
    if ids is not None and not (len(ids) and all(0 <= i < model.config.vocab_size for i in ids)):
        raise ValueError(f"ids must be tokens from 0 to {model.config.vocab_size - 1}, at least one")
    chosen = torch.randint(model.config.vocab_size, (num_virtual_tokens,)) if ids is None else torch.tensor(ids)
    chosen = chosen.repeat(math.ceil(num_virtual_tokens / len(chosen)))[:num_virtual_tokens]
    return PromptTuned(model, model.token_embedding(chosen.to(model.norm.weight.device)).detach().float().clone())


# ---- files


def save_adapter(folder: str | Path, model: nn.Module, name: str = "default", base_model: str | None = None) -> Path:
    """Writes an adapter, apart from the base, as PEFT does: adapter_model.safetensors and adapter_config.json. Returns the folder.

    A LoRA is written by `name`, a soft prompt where the model is a `PromptTuned`. Layers get Hugging Face's names where the model has an
    exact equivalent there (GPT-2, Llama, Qwen3), and its own otherwise. base_model: the hub's name of the base, for who loads the file. Raises
    ValueError for an unknown adapter and a folder that holds a model.
    """
    folder = Path(folder)
    if isinstance(model, PromptTuned):
        peft_files.write_prompt(folder, model.prompt, model.config, _embedding(model), base_model)
        return folder
    _check_known(model, [name])
    layers = {path: layer.adapters[name] for path, layer in _adapted(model).items() if name in layer.adapters}
    weights = {path: Weights(a.lora_A.detach(), a.lora_B.detach(), a.config.lora_alpha, a.magnitude) for path, a in layers.items()}
    config = next(iter(layers.values())).config
    settings = {key: getattr(config, key) for key in ("lora_dropout", "use_rslora", "use_dora")}
    peft_files.write_lora(folder, model, {path: _base(m) for path, m in linear_layers(model).items()}, weights, settings, base_model)
    return folder


def load_adapter(folder: str | Path, model: nn.Module, name: str = "default") -> nn.Module:
    """Puts an adapter that `save_adapter` or PEFT wrote on its base, uses it, and returns the model; a soft prompt returns a `PromptTuned`.

    What PEFT keeps as one (GPT-2's A for queries, keys and values) is one parameter here too. Raises ValueError, the model untouched, for
    files that are missing or damaged, an adapter of another base or rank, a name that is taken, and what only PEFT can compute.
    """
    folder = Path(folder)
    linears = {path: _base(layer) for path, layer in linear_layers(model).items()}
    if isinstance(model, GPT) and peft_files.is_prompt(folder):
        return PromptTuned(model, peft_files.read_prompt(folder, model.config, _embedding(model)).to(model.norm.weight.device))
    config, layers = peft_files.read_lora(folder, model, linears)
    _check_new(model, layers, name)
    targets = tuple(dict.fromkeys(path.rpartition(".")[2] for path in layers))
    shared: dict[int, nn.Parameter] = {}
    for path, found in layers.items():
        own = LoRAConfig(
            r=len(found.a), lora_alpha=found.alpha, target_modules=targets, lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config["use_rslora"], use_dora=found.magnitude is not None,
        )  # fmt: skip
        adapter = _put(model, path, name, own)
        device = adapter.lora_A.device
        adapter.lora_A = shared.setdefault(id(found.a), nn.Parameter(found.a.to(device)))
        adapter.lora_B = nn.Parameter(found.b.to(device))
        if found.magnitude is not None:
            adapter.magnitude = nn.Parameter(found.magnitude.to(device).clone())
    return use_adapters(model, name)


def _embedding(model: GPT | PromptTuned) -> nn.Module:
    return model.model.token_embedding.base if isinstance(model, PromptTuned) else model.token_embedding
