"""Week 0. Whether gradients flow through an answer to its arguments."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Gradients = dict[str, Tensor | None]
"""By the argument's name; None where no graph leads from the result to the argument."""
DETACHED = (
    "the values are right, but detached from the graph: no gradient reaches {}, and a model would learn"
    " nothing through it. .item(), float(x), .detach(), .numpy(), torch.tensor(x) and torch.no_grad() cut the"
    " graph."
)
OVERWRITES = (
    " One remark: it writes into a tensor that the gradient needs, so no model can be trained through it. An"
    " operation that returns a new tensor (torch.stack, x + y) can be."
)
NOT_FINITE = (
    "the values are right, but the gradient of `{}` is nan or infinite. Something on the way overflows, as"
    " exp of a large number does: 1 / inf is 0, and its gradient is 0 times inf, which is nan."
)


def gradients(answer: Callable[..., Any], parameters: Sequence[str], arguments: tuple) -> Gradients:
    """The gradient of the result's weighted sum at each argument of type float."""
    leaves = [
        value.detach().clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in copy.deepcopy(arguments)
    ]
    inputs = {
        name: leaf
        for name, leaf in zip(parameters, leaves)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    }
    result = answer(*leaves)
    outputs = result if isinstance(result, list | tuple) else [result]
    floats = [part for part in outputs if isinstance(part, Tensor) and part.requires_grad]
    if not floats or not inputs:
        return dict.fromkeys(inputs)
    weights = [torch.linspace(0.5, 1.5, part.numel()).view(part.shape).to(part.dtype) for part in floats]
    total = torch.stack([(part * weight).sum() for part, weight in zip(floats, weights)]).sum()
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values()), allow_unused=True)))


def where_detached(own: Gradients, right: Gradients) -> str | None:
    """A sentence on the arguments that the reference's gradient reaches and the answer's does not."""
    cut = [f"`{name}`" for name, wanted in right.items() if wanted is not None and own[name] is None]
    return DETACHED.format(", ".join(cut)) if cut else None


def where_overflowing(own: Gradients, right: Gradients) -> str | None:
    """A sentence on the first argument whose gradient is finite in the reference alone."""
    for name, wanted in right.items():
        yours = own[name]
        if wanted is None or yours is None or not wanted.isfinite().all():
            continue
        if not yours.isfinite().all():
            return NOT_FINITE.format(name)
    return None
