"""Week 8. GPTQ (Frantar et al., "GPTQ", 2022): weights in 4 bits, rounded so that the layers' outputs stay as
they were.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shared.models.gpt import GPT
from shared.quantization.modules import check_model, check_settings, put_packed
from shared.quantization.packing import (
    Int4Weight,
    PackedWeight,
    group_ranges,
    how_computed,
    int4_codes,
    with_kernel,
)
from shared.runtime import device_of

# ---- GPTQ


@torch.no_grad()
def gptq(
    model: GPT, tokens: Tensor, group_size: int = 32, damp: float = 0.01, say: Callable[[str], None] = print
) -> GPT:
    """`quantize(model, "int4")` with codes that keep the layers' outputs on `tokens`, rather than each weight
    (Frantar et al., "GPTQ", 2022).

    tokens: int64 [texts, time], text as the model will meet it; ten thousand are enough for a small model.
    damp: what is added to the diagonal of a layer's Hessian, as a share of its mean. Layers are rounded in
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
    check_model(model, group_size)
    device = device_of(model)
    say(how_computed("int4", device))
    was_training = model.training
    model.eval()
    streams, arguments = _block_inputs(model, tokens.to(device).split(1))

    def round_linears(
        parent: nn.Module, names: Sequence[str], run: Callable[[], object]
    ) -> dict[str, PackedWeight]:
        linears = {name: parent.get_submodule(name) for name in names}
        packed = {}
        for name, hessian in _hessians(linears, run).items():
            ranges = group_ranges(linears[name].weight, group_size)
            packed[name] = with_kernel(
                Int4Weight(gptq_round(linears[name].weight, hessian, *ranges, damp), group_size, ranges)
            )
            put_packed(parent, name, packed[name])
        return packed

    for block, rest in zip(model.blocks, arguments):
        run = lambda block=block, rest=rest, streams=streams: [block(x, *rest) for x in streams]
        for names in _by_input(block, lambda block=block, rest=rest, x=streams[0]: block(x, *rest)):
            round_linears(block, names, run)
        streams = run()
    packed = round_linears(model, ["lm_head"], lambda: [model.lm_head(model.norm(x)) for x in streams])
    if model.config.tie_weights:
        put_packed(model, "token_embedding", packed["lm_head"])
    return model.train(was_training)


@contextmanager
def _inputs_seen(modules: Mapping[str, nn.Module], see: Callable[[str, tuple], None]) -> Iterator[None]:
    """Inside, `see` hears the name and the arguments of each call of one of `modules`."""
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: see(name, args)) for name, m in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _by_input(block: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """The block's linear layers in the order in which `run()` calls them, those together that read the same
    tensor.
    """
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
    """`weight` [out, in] rounded to what int4 with these scales and zeros can express, so that its products
    change little: fp32 [out, in].

    hessian [in, in]: xᵀx summed over inputs x. Column after column is rounded to nearest, and the columns not
    yet rounded make up for what that did to the products. The columns of the largest inputs come first, while
    many are left to make up for them; the groups stay where they are (act-order with static groups, in the
    authors' code).
    """
    order = hessian.diag().argsort(descending=True)
    group = order // (weight.size(1) // scale.size(1))
    h = hessian[order][:, order].double()
    mean = h.diag().mean()
    h.diagonal().add_(damp * mean if mean > 0 else 1.0)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    w, scale, zero = weight.float()[:, order], scale.float(), zero.float()
    for start in range(
        0, len(order), 128
    ):  # what lies behind these columns waits for the sum of their corrections
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
