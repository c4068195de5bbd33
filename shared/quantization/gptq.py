"""Week 8. GPTQ (Frantar et al., "GPTQ", 2022): weights in 4 bits, rounded so that the layers' outputs stay as
they were.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shared.devices import device_of
from shared.models.gpt import GPT
from shared.quantization.kernels import how_computed, with_kernel
from shared.quantization.modules import check_model, check_settings, put_packed
from shared.quantization.packing import Int4Weight, PackedWeight, group_ranges, int4_codes


@torch.no_grad()
def gptq(
    model: GPT,
    tokens: Tensor,
    group_size: int = 32,
    damp: float = 0.01,
    *,
    skip: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> GPT:
    """`quantize(model, "int4")` with codes that keep the layers' outputs on `tokens`, rather than each weight
    (Frantar et al., "GPTQ", 2022). Returns the same model.

    tokens: int64 [texts, time], text as the model will meet it; ten thousand are enough for a small model.
    damp: what is added to the diagonal of a layer's Hessian, as a share of its mean. skip: as for `quantize`.
    Layers are rounded in
    the order in which they compute, and each sees what the quantized ones before it make of the text. An
    embedding tied to the output layer gets what is best for that: it is read one row at a time, where errors
    do not add up. Raises ValueError as `quantize` does, and for tokens of another shape and a damp that is
    not above 0.
    """
    if tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError(
            f"tokens must be ids of shape [texts, time]; these are {tokens.dtype} of shape"
            f" {list(tokens.shape)}"
        )
    if not damp > 0:
        raise ValueError(f"damp={damp}: must be above 0; 0.01 is usual")
    check_settings("int4", group_size, None)
    chosen = check_model(model, group_size, skip)
    device = device_of(model)
    say(how_computed("int4", device))
    was_training = model.training
    model.eval()
    streams, arguments = _block_inputs(model, tokens.to(device).split(1))
    for i, (block, rest) in enumerate(zip(model.blocks, arguments)):
        run = partial(_run_block, block, streams, rest)
        for names in _linears_by_input(block, partial(_run_block, block, streams[:1], rest)):
            wanted = [name for name in names if f"blocks.{i}.{name}" in chosen]
            _round_linears(block, wanted, run, group_size, damp)
        streams = run()
    if "lm_head" in chosen:
        packed = _round_linears(model, ["lm_head"], partial(_run_head, model, streams), group_size, damp)
        if model.config.tie_weights:
            put_packed(model, "token_embedding", packed["lm_head"])
    return model.train(was_training)


def _run_block(block: nn.Module, streams: Sequence[Tensor], rest: tuple[Any, ...]) -> list[Tensor]:
    """What the block makes of the residual stream of each text."""
    return [block(x, *rest) for x in streams]


def _run_head(model: GPT, streams: Sequence[Tensor]) -> list[Tensor]:
    return [model.lm_head(model.norm(x)) for x in streams]


def _round_linears(
    parent: nn.Module, names: Sequence[str], run: Callable[[], object], group_size: int, damp: float
) -> dict[str, PackedWeight]:
    """Quantizes these layers of `parent`, which read the same tensor in `run()`. Returns their weights."""
    linears = {name: module for name, module in _linears(parent).items() if name in names}
    packed: dict[str, PackedWeight] = {}
    for name, hessian in _hessians(linears, run).items():
        weight = linears[name].weight
        ranges = group_ranges(weight, group_size)
        rounded = gptq_round(weight, hessian, *ranges, damp)
        packed[name] = with_kernel(Int4Weight(rounded, group_size, ranges))
        put_packed(parent, name, packed[name])
    return packed


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


@contextmanager
def _calls_seen(
    modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Inside, `see` gets the name and the arguments of each call of one of `modules`."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, args)

        return hook

    hooks = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linears_by_input(block: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """The block's linear layers in the order in which `run()` calls them, those together that read the same
    tensor.
    """
    groups: list[tuple[Tensor, list[str]]] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        x = args[0]
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))

    with _calls_seen(_linears(block), note):
        run()
    return [names for _, names in groups]


def _block_inputs(model: GPT, texts: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Any, ...]]]:
    """What the first block reads of each text [1, time, n_embd], and the other arguments of each block."""
    blocks = dict(model.blocks.named_children())
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in blocks}

    def note(name: str, args: tuple[Any, ...]) -> None:
        calls[name].append(args)

    with _calls_seen(blocks, note):
        for text in texts:
            model(text)
    first = next(iter(calls.values()))
    return [args[0] for args in first], [of_block[0][1:] for of_block in calls.values()]


def _hessians(linears: Mapping[str, nn.Linear], run: Callable[[], object]) -> dict[str, Tensor]:
    """xᵀx over all inputs that each of `linears` gets in `run()`: fp32 [in_features, in_features] each."""
    sums: dict[str, Tensor] = {}

    def add(name: str, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        product = x.T @ x
        sums[name] = sums[name] + product if name in sums else product

    with _calls_seen(linears, add):
        run()
    return sums


COLUMNS = 128
"""So many columns are rounded before those behind them are corrected, all at once."""


@torch.no_grad()
def gptq_round(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float = 0.01) -> Tensor:
    """`weight` [out, in] rounded to what int4 with these scales and zeros can express, so that its products
    change little: fp32 [out, in].

    hessian: [in, in], xᵀx summed over inputs x. scale, zero: [out, groups]. Column after column is rounded to
    nearest, and the columns not yet rounded make up for what that did to the products. The columns of the
    largest inputs come first, while many are left to make up for them; the groups stay where they are
    (act-order with static groups, in the authors' code).
    """
    order = hessian.diag().argsort(descending=True)
    group = order // (weight.size(1) // scale.size(1))
    upper = _inverse_root(hessian[order][:, order], damp)
    # Transposed, so that a column lies together in memory: [in, out].
    columns = weight.float().T[order]
    scales = scale.float().T[group]
    zeros = zero.float().T[group]
    for start in range(0, len(order), COLUMNS):
        end = min(start + COLUMNS, len(order))
        errors = columns.new_empty(end - start, len(weight))
        for i in range(start, end):
            rounded = (int4_codes(columns[i], scales[i], zeros[i]) - 8) * scales[i] + zeros[i]
            error = (columns[i] - rounded) / upper[i, i]
            columns[i] = rounded
            columns[i + 1 : end] -= upper[i, i + 1 : end, None] * error
            errors[i - start] = error
        columns[end:] -= upper[start:end, end:].T @ errors
    return columns[order.argsort()].T.contiguous()


def _inverse_root(hessian: Tensor, damp: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian: fp32 [in, in].

    Row i says how much the columns behind i make up for a change of column i.
    """
    h = hessian.to(torch.float64, copy=True)
    mean = h.diag().mean()
    h.diagonal().add_(damp * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()
