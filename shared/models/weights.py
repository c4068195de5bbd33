"""Week 6. A GPT filled with the tensors of a file: strictly, and with one of them in memory at a time."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from shared.checkpoint import check_tables, unshared
from shared.models.family import refuse
from shared.models.formats import Layout
from shared.models.gpt import GPT, GPTConfig
from shared.registry import unwrapped, without_memory


class StoredTensor(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32


KEPT = (torch.float32, torch.bfloat16, torch.float16)
"""The types in which a model may stay as it was stored."""
Each = Callable[[GPT], None]
"""Called while a model is loaded, each time that a part's weights have come: first what stands outside of the
blocks, then block by block. What has not come is on PyTorch's device "meta". It may swap layers that have:
`shared.quantization.quantizing` is one.
"""


def build_gpt(
    config: GPTConfig,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    where: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    each: Each | None = None,
) -> GPT:
    """The GPT of `config` with the stored tensors, in eval mode.

    They are read block by block, so that beside the model only one tensor is in memory. layout: what they are
    called, and how they lie. dtype: None keeps that of the embedding. Raises ValueError, beginning with
    `where`, for a tensor that is missing, left over, of another shape, or that cannot be read.
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
    if dtype is None:
        kept = stored[layout.name("token_embedding.weight")].dtype
        dtype = kept if kept in KEPT else torch.float32
    shapes = {name: tensor.shape for name, tensor in parameters.items()}
    model.make_rotaries()  # with their values
    for groups in _parts(layout.groups(shapes)):
        for theirs, names in groups.items():
            tensor = _read(theirs, stored[theirs], where)
            ours = layout.ours(tensor, {name: shapes[name] for name in names}, config.head_dim, dtype)
            model.load_state_dict(ours, assign=True, strict=False)
        if config.tie_weights and isinstance(model.lm_head, nn.Linear):
            model.lm_head.weight = model.token_embedding.weight
        if each is not None:
            each(model)
    return model.eval()


def _parts(groups: Mapping[str, list[str]]) -> list[dict[str, list[str]]]:
    """The tensors outside of the blocks, then those of each block."""
    parts: dict[str, dict[str, list[str]]] = {"": {}}
    for theirs, names in groups.items():
        block = re.match(r"blocks\.\d+", names[0])
        parts.setdefault(block[0] if block else "", {})[theirs] = names
    return list(parts.values())


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
    if tensor.dtype not in (*KEPT, torch.float64):
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
    model.make_rotaries()  # with their values
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
