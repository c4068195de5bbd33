"""Week 8. Quantization: the linear layers of a model, and the embedding tied to one, in 8 or 4 bits, in
memory and on disk.

`quantize` rounds each weight to the nearest that its scheme can express; `shared.quantization.gptq` rounds so
that the layers' outputs stay (Frantar et al., "GPTQ", 2022). Activations, norms and biases stay as they are.
Quantized weights are not trained, but gradients pass to their input.

>>> from shared.models.gpt import GPT, GPTConfig
>>> model = quantize(GPT(GPTConfig.preset("nano")), "int8", say=lambda line: None)
>>> type(model.blocks[0].attn.q_proj).__name__, quantization_of(model)
('QuantizedLinear', {'scheme': 'int8'})
"""

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shared import checkpoint
from shared.devices import device_of
from shared.models import gpt  # noqa: F401  (a checkpoint's model is known once its module is imported)
from shared.models.layers import Linear, swap_modules
from shared.quantization.kernels import KERNELS, how_computed, with_kernel
from shared.quantization.packing import GROUP_SIZES, SCHEMES, PackedWeight, check_weight
from shared.registry import LanguageModel, unwrapped, without_memory
from shared.tokenizers.base import Tokenizer

Module = TypeVar("Module", bound=nn.Module)


class _Product(torch.autograd.Function):
    """x · weightᵀ. Keeps the packed weight for the backward, not the unpacked one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = packed
        return packed.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.packed.rows(slice(None)).to(grad.dtype), None


class QuantizedLinear(nn.Module):
    """x · weightᵀ + bias with a packed weight: [..., in_features] -> [..., out_features].

    Differentiable in x; the weight is not trained.
    """

    packed: PackedWeight

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None = None):
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        # `self.packed` goes through nn.Module.__getattr__, which is slow enough to be seen at batch 1.
        self._product = packed.product

    @property
    def weight(self) -> Tensor:
        """Unpacked anew at each access: fp32 [out_features, in_features]."""
        return self.packed.rows(slice(None))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's type."""
        y = _Product.apply(x, self.packed) if x.requires_grad else self._product(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.packed.settings.items())
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {settings}"


class QuantizedEmbedding(nn.Module):
    """Rows of a packed weight by number: int64 [...] -> fp32 [..., embedding_dim].

    Where weights are tied, the linear layer has the same packed weight.
    """

    packed: PackedWeight

    def __init__(self, packed: PackedWeight):
        super().__init__()
        self.packed = packed
        self.num_embeddings = packed.out_features
        self.embedding_dim = packed.in_features

    @property
    def weight(self) -> Tensor:
        """Unpacked anew at each access: fp32 [num_embeddings, embedding_dim]."""
        return self.packed.rows(slice(None))

    def forward(self, idx: Tensor) -> Tensor:
        """int64 [...] -> [..., embedding_dim]."""
        return self.packed.rows(idx)


def quantize(
    model: Module,
    scheme: str,
    group_size: int | None = None,
    double_quant: bool | None = None,
    *,
    skip: Collection[str] = (),
    say: Callable[[str], None] = print,
    kernels: tuple[str, ...] = KERNELS,
) -> Module:
    """Swaps every nn.Linear of `model`, and an embedding that shares one's weight, for its quantized form;
    returns the same model.

    scheme: "int8", "int4" or "nf4". group_size: how many weights of a row share a scale, 32, 64, 128 or 256;
    if not given, 32 for int4, 64 for nf4 and the whole row for int8. double_quant: nf4 only, True if not
    given. skip: linear layers that stay as they are, by name or pattern, such as "lm_head", "blocks.0.*" or
    "*.down_proj". say: gets a line on how products with such weights are computed here. kernels: what may
    compute them on a CPU; the first that works is used (PyTorch's has no int8 in groups). Raises ValueError,
    the model untouched, for another scheme or setting, a group size that does not divide a layer's
    in_features, weights that are not finite, a pattern that fits no layer, and a model that has no linear
    layers (left) or is quantized already.
    """
    settings = check_settings(scheme, group_size, double_quant)
    names = check_model(model, settings.get("group_size", 1), skip)
    kernels = _usable(settings, kernels)
    say(how_computed(scheme, device_of(model), kernels))
    _quantize_linears(model, names, settings, kernels)
    return model


def quantizing(
    scheme: str,
    group_size: int | None = None,
    double_quant: bool | None = None,
    *,
    skip: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> Callable[[nn.Module], None]:
    """What `load_model` takes as `each`, so that a model is quantized while it is loaded: beside what is
    packed no more than a block is there in full.

        load_model("smollm2", each=quantizing("int4"))

    Arguments as for `quantize`. It raises ValueError as that does, once the fault is met.
    """
    settings = check_settings(scheme, group_size, double_quant)
    kernels = _usable(settings, KERNELS)

    def swap(model: nn.Module) -> None:
        here = {name: linear for name, linear in _linears(model).items() if not linear.weight.is_meta}
        chosen = [name for name in here if not any(fnmatchcase(name, pattern) for pattern in skip)]
        for name in chosen:
            check_weight(f"{name}.weight", here[name].weight, settings.get("group_size", 1))
        _quantize_linears(model, chosen, settings, kernels)
        if any(parameter.is_meta for parameter in model.parameters()):
            return
        for pattern in skip:
            if not any(fnmatchcase(name, pattern) for name in here):
                raise ValueError(f"skip={pattern!r} fits no linear layer that was left out")
        say(how_computed(scheme, device_of(model), kernels))

    return swap


def _usable(settings: dict[str, Any], kernels: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `kernels` that know these settings."""
    if settings["scheme"] == "int8" and "group_size" in settings:
        return tuple(kernel for kernel in kernels if kernel != "torch")
    return kernels


def check_settings(scheme: str, group_size: int | None, double_quant: bool | None) -> dict[str, Any]:
    """The scheme and its settings with their defaults filled in, as checkpoints keep them.

    Raises ValueError for a scheme that does not exist, or a setting that it does not have.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"no scheme is called {scheme!r}; there are: {', '.join(SCHEMES)}")
    if scheme != "nf4" and double_quant is not None:
        raise ValueError(f"double_quant={double_quant}: only nf4 has it; leave it out, or choose nf4")
    if group_size not in (None, *GROUP_SIZES):
        raise ValueError(f"group_size={group_size}: must be one of {', '.join(map(str, GROUP_SIZES))}")
    if scheme == "int8":
        return {"scheme": scheme, "group_size": group_size} if group_size else {"scheme": scheme}
    if scheme == "int4":
        return {"scheme": scheme, "group_size": group_size or 32}
    return {"scheme": scheme, "group_size": group_size or 64, "double_quant": double_quant is not False}


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def check_model(model: nn.Module, group_size: int, skip: Collection[str] = ()) -> list[str]:
    """The names of the linear layers to quantize: all that no pattern of `skip` fits.

    Raises ValueError for a model that cannot be quantized in groups of this size, for a pattern that fits no
    linear layer, and where none is left.
    """
    done = quantization_of(model)
    if done:
        raise ValueError(f"this model is quantized already ({done['scheme']}): quantize the original")
    linears = _linears(model)
    if not linears:
        raise ValueError(f"this {type(model).__name__} has no linear layers to quantize")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"skip={pattern!r} fits no linear layer; there are: {', '.join(linears)}")
    chosen = [name for name in linears if not any(fnmatchcase(name, pattern) for pattern in skip)]
    if not chosen:
        raise ValueError(f"skip={', '.join(skip)} leaves no linear layer to quantize")
    for name in chosen:
        check_weight(f"{name}.weight", linears[name].weight, group_size)
    return chosen


def _quantize_linears(
    model: nn.Module, names: Collection[str], settings: dict[str, Any], kernels: tuple[str, ...]
) -> None:
    scheme = SCHEMES[settings["scheme"]]
    options = {name: value for name, value in settings.items() if name != "scheme"}
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    linears = _linears(model)
    for name in names:
        weight = linears[name].weight
        packed = with_kernel(scheme(weight.detach(), **options), kernels)
        put_packed(model, name, packed)
        for other, embedding in embeddings.items():
            if embedding.weight is weight:
                put_packed(model, other, packed)


def put_packed(model: nn.Module, name: str, packed: PackedWeight) -> None:
    """Puts a packed weight in the place of the linear layer or embedding called `name`."""
    old = model.get_submodule(name)
    new: QuantizedLinear | QuantizedEmbedding
    if isinstance(old, nn.Linear):
        new = QuantizedLinear(packed, old.bias)
    else:
        new = QuantizedEmbedding(packed)
    swap_modules(model, {name: new.train(old.training)})


def dequantize(model: Module) -> Module:
    """Swaps every packed layer of `model` for a plain one with the weight that it stands for, and returns the
    same model: the inverse of `quantize`, but for what rounding lost.

    A weight that is shared (tied embeddings) is one parameter again. A model without packed layers stays as
    it is.
    """
    weights: dict[PackedWeight, nn.Parameter] = {}
    for name, old in list(model.named_modules()):
        if not isinstance(old, (QuantizedLinear, QuantizedEmbedding)):
            continue
        if old.packed not in weights:
            weights[old.packed] = nn.Parameter(old.weight, requires_grad=False)
        with without_memory():
            new: nn.Linear | nn.Embedding
            if isinstance(old, QuantizedLinear):
                new = Linear(old.in_features, old.out_features, bias=False)
                new.register_parameter("bias", old.bias)
            else:
                new = nn.Embedding(old.num_embeddings, old.embedding_dim)
        new.weight = weights[old.packed]
        swap_modules(model, {name: new.train(old.training)})
    return model


def quantization_of(model: nn.Module) -> dict[str, Any] | None:
    """The scheme of a quantized model and its settings; None for a model that is not quantized."""
    packed = (module for module in model.modules() if isinstance(module, PackedWeight))
    first = next(packed, None)
    return None if first is None else first.settings


def num_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of `model` holds, a shared one counted once."""
    sizes: dict[int, int] = {}  # by where they lie, as tied ones do in one place
    for module in model.modules():
        if isinstance(module, PackedWeight):
            sizes[id(module)] = module.num_bytes
            continue
        kept: dict[str, Tensor | None] = dict(module._parameters)
        kept |= {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        sizes |= {id(tensor): tensor.nbytes for tensor in kept.values() if tensor is not None}
    return sum(sizes.values())


def save_quantized(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    metrics: dict[str, float] | None = None,
) -> Path:
    """`checkpoint.save` of a quantized model: packed tensors in model.safetensors, the scheme, its settings
    and the layers that were skipped in config.json.

    Raises ValueError for a model that is not quantized.
    """
    model = unwrapped(model)
    settings = quantization_of(model)
    if settings is None:
        raise ValueError("this model is not quantized: save it with checkpoint.save, or quantize it first")
    skipped = list(_linears(model))
    entry = settings | {"skip": skipped} if skipped else settings
    return checkpoint.save(model, folder, tokenizer, metrics, more={ENTRY: entry})


def load_quantized(
    folder: str | Path, scheme: str | None = None, device: torch.device | str = "auto"
) -> checkpoint.Checkpoint:
    """`checkpoint.load` of a quantized model, and of no other.

    scheme: if given, the checkpoint must be of this one. Raises ValueError for one of another scheme, for one
    that is not quantized, and where `checkpoint.load` does.
    """
    loaded = checkpoint.load(folder, device=device)
    settings = quantization_of(loaded.model)
    if settings is None:
        raise ValueError(
            f"the checkpoint in {folder} is not quantized: load it with checkpoint.load, then quantize it"
        )
    if scheme not in (None, settings["scheme"]):
        raise ValueError(
            f"the checkpoint in {folder} is quantized by {settings['scheme']}, not {scheme}: quantize the"
            f" original again by {scheme}"
        )
    return loaded


ENTRY = "quantization"
"""Where a checkpoint's config.json has the scheme and its settings."""


def _quantized_form(model: Module, settings: Any) -> Module:
    """A new model in the form that `save_quantized` saved. Its packed weights have no memory until they are
    loaded, and get their kernels then.
    """
    known = {"scheme", "group_size", "double_quant", "skip"}
    if not isinstance(settings, dict) or "scheme" not in settings or not settings.keys() <= known:
        raise ValueError(
            "a checkpoint's quantization must give scheme, and may give group_size, double_quant and skip,"
            f" not {settings!r}"
        )
    skip = settings.get("skip", [])
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise ValueError(f"a checkpoint's quantization must give skip as a list of names, not {skip!r}")
    complete = check_settings(settings["scheme"], settings.get("group_size"), settings.get("double_quant"))
    names = check_model(model, complete.get("group_size", 1), skip)
    _quantize_linears(model, names, complete, kernels=())
    model.register_load_state_dict_post_hook(_choose_kernels)
    return model


def _choose_kernels(model: nn.Module, missing: Any) -> None:
    """A hook that PyTorch calls once tensors were loaded."""
    for module in model.modules():
        if isinstance(module, PackedWeight) and module.kernel is None:
            with_kernel(module, _usable(module.settings, KERNELS))


checkpoint.register_form(ENTRY, _quantized_form)  # from here on `checkpoint.load` opens such checkpoints
