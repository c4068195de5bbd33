"""Week 6. A GPT filled with the tensors of a file: strictly, and with one of them in memory at a time."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from shared.checkpoint import check_tables, unshared
from shared.models.families import refuse
from shared.models.formats import Layout
from shared.models.gpt import GPT, GPTConfig, Rotary
from shared.registry import unwrapped, without_memory


class StoredTensor(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def build_gpt(config: GPTConfig, layout: Layout, stored: Mapping[str, StoredTensor], where: str) -> GPT:
    """The GPT of `config` with the stored tensors, in eval mode.

    layout: what they are called, and how they lie. Raises ValueError, beginning with `where`, for a tensor
    that is missing, left over, of another shape, or that cannot be read.
    """
    if config.n_layer > len(stored):  # a damaged number of layers would take all memory
        raise ValueError(f"{where}: {len(stored)} tensors are too few for {config.n_layer} layers")
    try:
        model = gpt_without_memory(config)
    except RuntimeError as error:
        raise ValueError(f"{where}: its settings are those of no model ({error})") from None
    parameters = unshared(model)
    expected = layout.theirs(parameters, config.head_dim)
    refuse(_misfits(expected, stored), where)
    check_tables(model, where)
    weights: dict[str, Tensor] = {}
    for theirs, names in layout.groups(parameters).items():
        tensor = _read(theirs, stored[theirs], where)
        shapes = {name: parameters[name].shape for name in names}
        weights |= layout.ours(tensor, shapes, config.head_dim)
    return filled(model, weights)


def _misfits(expected: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in stored]
    left_over = [f"{name} is not in such a model" for name in stored if name not in expected]
    misshapen = [
        f"{name} is {list(stored[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    return missing + left_over + misshapen


def _read(name: str, stored: StoredTensor, where: str) -> Tensor:
    try:
        tensor = stored.read()
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{where}: {name} cannot be read: {error}") from None
    if not tensor.is_floating_point():
        raise ValueError(f"{where}: {name} is of type {tensor.dtype}: load the model before it was quantized")
    return tensor


def gpt_without_memory(config: GPTConfig) -> GPT:
    """The GPT on PyTorch's device "meta": names and shapes, without values."""
    with without_memory():
        return GPT(config)


def filled(model: GPT, weights: Mapping[str, Tensor]) -> GPT:
    """A model of `gpt_without_memory` with these tensors as its parameters, one for each name of `unshared`;
    in eval mode.
    """
    config = model.config
    model.load_state_dict(weights, assign=True, strict=False)  # a tied weight's second name is not in them
    if config.tie_weights:
        model.lm_head.weight = model.token_embedding.weight
    if config.position == "rope":
        model.rotary = Rotary(config.head_dim, config.block_size, config.rope_theta)
    return model.eval()


def plain_tensors(model: GPT) -> dict[str, Tensor]:
    """The parameters of a GPT by name, a tied one once.

    Raises ValueError for another model, and for a GPT whose layers were swapped (adapters, quantization).
    """
    model = unwrapped(model)
    if not isinstance(model, GPT):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported: other programs have an equivalent of our GPT only"
        )
    own = unshared(model)
    shapes = {(name, tensor.shape) for name, tensor in own.items()}
    plain = unshared(gpt_without_memory(model.config))
    differences = shapes ^ {(name, tensor.shape) for name, tensor in plain.items()}
    if differences:
        raise ValueError(
            f"this model is not the GPT of its config ({min(differences)[0]}): merge adapters, or export it"
            " before it is quantized"
        )
    return own


def with_biases(model: GPT) -> GPT:
    """The same function with biases of zero where the model has none: a GPT-2 elsewhere always has some.

    The weights are shared, not copied.
    """
    own = plain_tensors(model)
    biased = gpt_without_memory(replace(model.config, bias=True))
    zeros = {
        name: model.norm.weight.new_zeros(tensor.shape)
        for name, tensor in unshared(biased).items()
        if name not in own
    }
    return filled(biased, own | zeros)
