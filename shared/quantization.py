"""Week 8. Quantization: the linear layers of a model, and the embedding tied to one, in 8 or 4 bits, in memory and on disk.

`quantize` rounds each weight to the nearest that its scheme can express; `gptq` rounds so that the layers' outputs stay (Frantar et al.,
"GPTQ", 2022). Activations, norms and biases stay as they are. Quantized weights are not trained, but gradients pass to their input.

>>> from shared.models.gpt import GPTConfig
>>> model = quantize(GPT(GPTConfig.preset("nano")), "int8", say=lambda line: None)
>>> type(model.blocks[0].attn.q_proj).__name__, quantization_of(model)
('QuantizedLinear', {'scheme': 'int8'})
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared import checkpoint
from shared.models.gpt import GPT
from shared.packing import (
    GROUP_SIZES,
    KERNELS,
    SCHEMES,
    Int4Weight,
    PackedWeight,
    check_weight,
    group_ranges,
    how_computed,
    int4_codes,
    with_kernel,
)  # fmt: skip
from shared.tokenizers import Tokenizer

# ---- modules


class _Product(torch.autograd.Function):
    """Keeps the packed weight for the backward, not the unpacked one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return packed.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.packed.rows(slice(None)).to(grad.dtype), None


class QuantizedLinear(nn.Module):
    """x · weightᵀ + bias with a packed weight: [..., in_features] -> [..., out_features]. Differentiable in x; the weight is not trained."""

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None):
        super().__init__()
        self.packed, self.bias = packed, bias
        self._product = packed.product  # found without nn.Module.__getattr__, which is slow enough to be seen at batch 1
        self.in_features, self.out_features = packed.in_features, packed.out_features

    @property
    def weight(self) -> Tensor:
        """Unpacked anew at each access: fp32 [out_features, in_features]."""
        return self.packed.rows(slice(None))

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.packed) if x.requires_grad else self._product(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.packed.settings.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {settings}"


class QuantizedEmbedding(nn.Module):
    """Rows of a packed weight by number: int64 [...] -> fp32 [..., embedding_dim]. Where weights are tied, the linear layer has the same one."""

    def __init__(self, packed: PackedWeight):
        super().__init__()
        self.packed = packed
        self.num_embeddings, self.embedding_dim = packed.out_features, packed.in_features

    @property
    def weight(self) -> Tensor:
        """Unpacked anew at each access: fp32 [num_embeddings, embedding_dim]."""
        return self.packed.rows(slice(None))

    def forward(self, idx: Tensor) -> Tensor:
        return self.packed.rows(idx)


# ---- whole models


def quantize(
    model: nn.Module,
    scheme: str,
    group_size: int | None = None,
    double_quant: bool | None = None,
    say: Callable[[str], None] = print,
    kernels: tuple[str, ...] = KERNELS,
) -> nn.Module:
    """Swaps every nn.Linear of `model`, and an embedding that shares one's weight, for its quantized form; returns the same model.

    scheme: "int8", "int4" or "nf4". group_size: how many weights of a row share a scale, 32, 64, 128 or 256; if not given, 32 for int4, 64 for
    nf4 and the whole row for int8. double_quant: nf4 only, True if not given. `say` hears how products with such weights are computed here;
    kernels: what may do that on a CPU, the first that works here (PyTorch's has no int8 in groups).
    Raises ValueError, the model untouched, for another scheme or setting, a group size that does not divide a layer's in_features, weights
    that are not finite, and a model that has no linear layers or is quantized already.
    """
    settings = _settings(scheme, group_size, double_quant)
    _check_model(model, settings.get("group_size", 1))
    if scheme == "int8" and group_size:
        kernels = tuple(kernel for kernel in kernels if kernel != "torch")
    say(how_computed(scheme, next(model.parameters()).device, kernels))
    return _quantize_linears(model, settings, kernels)


def _settings(scheme: str, group_size: int | None, double_quant: bool | None) -> dict[str, Any]:
    if scheme not in SCHEMES:
        raise ValueError(f"no scheme is called {scheme!r}; there are: {', '.join(SCHEMES)}")
    if scheme != "nf4" and double_quant is not None:
        raise ValueError(f"double_quant={double_quant}: only nf4 has it; leave it out, or choose nf4")
    if group_size not in (None, *GROUP_SIZES):
        raise ValueError(f"group_size={group_size}: must be one of {', '.join(map(str, GROUP_SIZES))}")
    settings: dict[str, Any] = {"scheme": scheme}
    if group_size or scheme != "int8":
        settings["group_size"] = group_size or {"int4": 32, "nf4": 64}[scheme]
    if scheme == "nf4":
        settings["double_quant"] = double_quant is None or double_quant
    return settings


def _check_model(model: nn.Module, group_size: int) -> None:
    done = quantization_of(model)
    if done:
        raise ValueError(f"this model is quantized already ({done['scheme']}): quantize the original")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not linears:
        raise ValueError(f"this {type(model).__name__} has no linear layers to quantize")
    for name, module in linears.items():
        check_weight(f"{name}.weight", module.weight, group_size)


def _quantize_linears(model: nn.Module, settings: dict[str, Any], kernels: tuple[str, ...] = KERNELS) -> nn.Module:
    scheme, options = settings["scheme"], {k: v for k, v in settings.items() if k != "scheme"}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for name, linear in linears.items():
        packed = with_kernel(SCHEMES[scheme](linear.weight.detach(), **options), kernels)
        for other in [name, *(n for n, m in embeddings.items() if m.weight is linear.weight)]:
            _swap(model, other, packed)
    return model


def _swap(model: nn.Module, name: str, packed: PackedWeight) -> None:
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    new = QuantizedEmbedding(packed) if isinstance(old, nn.Embedding) else QuantizedLinear(packed, old.bias)
    setattr(model.get_submodule(parent), child, new.train(old.training))


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """What `quantize` was told ("scheme" and the settings that go with it); None for a model that is not quantized."""
    return next((m.settings for m in model.modules() if isinstance(m, PackedWeight)), None)


def num_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of `model` holds, quantized or not, what is shared counted once."""
    return sum(t.numel() * t.element_size() for t in checkpoint.unshared(model).values())


def save_quantized(folder: str | Path, model: nn.Module, tokenizer: Tokenizer | None = None, metrics: dict[str, float] | None = None) -> Path:
    """`checkpoint.save` of a quantized model: packed tensors in model.safetensors, the scheme and its settings in config.json.

    Raises ValueError for a model that is not quantized.
    """
    settings = quantization_of(model)
    if settings is None:
        raise ValueError("this model is not quantized: save it with checkpoint.save, or quantize it first")
    return checkpoint.save(folder, model, tokenizer, metrics, more={"quantization": settings})


def load_quantized(folder: str | Path, scheme: str | None = None, device: torch.device | str = "cpu") -> checkpoint.Checkpoint:
    """The model that `save_quantized` wrote, ready to run, with its tokenizer and metrics; a GPT has its tokenizer under `tokenizer` too.

    scheme: if given, the checkpoint must be of this one. Raises ValueError for one of another scheme, for one that is not quantized, and
    where `checkpoint.load` does.
    """

    def prepare(model: nn.Module, meta: dict[str, Any]) -> nn.Module:
        settings = meta.get("quantization")
        if not isinstance(settings, dict) or not settings.keys() <= {"scheme", "group_size", "double_quant"} or "scheme" not in settings:
            raise ValueError(f"the checkpoint in {folder} is not quantized: load it with checkpoint.load, then quantize it")
        if scheme not in (None, settings["scheme"]):
            raise ValueError(
                f"the checkpoint in {folder} is quantized by {settings['scheme']}, not {scheme}: quantize the original again by {scheme}"
            )
        return quantize(model, **settings, say=lambda line: None)

    loaded = checkpoint.load(folder, device=device, prepare=prepare)
    if isinstance(loaded.model, GPT):
        loaded.model.tokenizer = loaded.tokenizer
    return loaded


# ---- GPTQ


@torch.no_grad()
def gptq(model: GPT, tokens: Tensor, group_size: int = 32, damp: float = 0.01, say: Callable[[str], None] = print) -> GPT:
    """`quantize(model, "int4")` with codes that keep the layers' outputs on `tokens`, rather than each weight (Frantar et al., "GPTQ", 2022).

    tokens: int64 [texts, time], text as the model will meet it; ten thousand are enough for a small model. damp: what is added to the
    diagonal of a layer's Hessian, as a share of its mean. Layers are rounded in the order in which they compute, and each sees what the
    quantized ones before it make of the text. An embedding tied to the output layer gets what is best for that: it is read one row at a
    time, where errors do not add up. Raises ValueError as `quantize` does, and for tokens of another shape and a damp that is not above 0.
    """
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError(f"tokens must be ids of shape [texts, time]; these are {tokens.dtype} of shape {list(tokens.shape)}")
    if not damp > 0:
        raise ValueError(f"damp={damp}: must be above 0; 0.01 is usual")
    _settings("int4", group_size, None)
    _check_model(model, group_size)
    device = model.norm.weight.device
    say(how_computed("int4", device))
    was_training = model.training
    model.eval()
    streams, arguments = _block_inputs(model, tokens.to(device).split(1))

    def round_linears(parent: nn.Module, names: Sequence[str], run: Callable[[], object]) -> dict[str, PackedWeight]:
        linears = {name: parent.get_submodule(name) for name in names}
        packed = {}
        for name, hessian in _hessians(linears, run).items():
            ranges = group_ranges(linears[name].weight, group_size)
            packed[name] = with_kernel(Int4Weight(gptq_round(linears[name].weight, hessian, *ranges, damp), group_size, ranges))
            _swap(parent, name, packed[name])
        return packed

    for block, rest in zip(model.blocks, arguments):
        run = lambda block=block, rest=rest, streams=streams: [block(x, *rest) for x in streams]
        for names in _by_input(block, lambda block=block, rest=rest, x=streams[0]: block(x, *rest)):
            round_linears(block, names, run)
        streams = run()
    packed = round_linears(model, ["lm_head"], lambda: [model.lm_head(model.norm(x)) for x in streams])
    if model.config.tie_weights:
        _swap(model, "token_embedding", packed["lm_head"])
    return model.train(was_training)


@contextmanager
def _inputs_seen(modules: Mapping[str, nn.Module], see: Callable[[str, tuple], None]) -> Iterator[None]:
    """Inside, `see` hears the name and the arguments of each call of one of `modules`."""
    hooks = [m.register_forward_pre_hook(lambda _, args, name=name: see(name, args)) for name, m in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_input(block: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """The block's linear layers in the order in which `run()` calls them, those together that read the same tensor."""
    calls: list[tuple[Tensor, list[str]]] = []

    def note(name: str, x: Tensor) -> None:
        if calls and calls[-1][0] is x:
            calls[-1][1].append(name)
        else:
            calls.append((x, [name]))

    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    with _inputs_seen(linears, lambda name, args: note(name, args[0])):
        run()
    return [names for _, names in calls]


def _block_inputs(model: GPT, texts: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple]]:
    """What the first block reads of each text [1, time, n_embd], and what each block is told besides."""
    calls: dict[str, list[tuple]] = {str(i): [] for i in range(len(model.blocks))}
    with _inputs_seen(dict(model.blocks.named_children()), lambda name, args: calls[name].append(args)):
        for text in texts:
            model(text)
    return [args[0] for args in calls["0"]], [found[0][1:] for found in calls.values()]


def _hessians(linears: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """xᵀx over all inputs that each of `linears` gets in `run()`: [in_features, in_features] each."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + x.T @ x

    with _inputs_seen(linears, lambda name, args: add(name, args[0])):
        run()
    return sums


@torch.no_grad()
def gptq_round(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float = 0.01) -> Tensor:
    """`weight` [out, in] rounded to what int4 with these scales and zeros can express, so that its products change little: fp32 [out, in].

    hessian [in, in]: xᵀx summed over inputs x. Column after column is rounded to nearest, and the columns not yet rounded make up for what
    that did to the products. The columns of the largest inputs come first, while many are left to make up for them; the groups stay where
    they are (act-order with static groups, in the authors' code).
    """
    order = hessian.diag().argsort(descending=True)
    group = order // (weight.size(1) // scale.size(1))
    h = hessian[order][:, order].double()
    mean = h.diag().mean()
    h.diagonal().add_(damp * mean if mean > 0 else 1.0)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    w, scale, zero = weight.float()[:, order], scale.float(), zero.float()
    for start in range(0, len(order), 128):  # what lies behind these columns waits for the sum of their corrections
        end = min(start + 128, len(order))
        errors = w.new_empty(len(w), end - start)
        for i in range(start, end):
            s, z = scale[:, group[i]], zero[:, group[i]]
            value = (int4_codes(w[:, i], s, z) - 8) * s + z
            errors[:, i - start] = (w[:, i] - value) / upper[i, i]
            w[:, i] = value
            w[:, i + 1 : end] -= errors[:, i - start, None] * upper[i, i + 1 : end]
        w[:, end:] -= errors @ upper[start:end, end:]
    return w[:, order.argsort()]
