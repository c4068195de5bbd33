"""Clean solutions of week 7's exercises, each with a word on why; `week.solution(name)` shows them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def round_to_bf16(x: Tensor) -> Tensor:
    """bfloat16 is the first half of a float32's bits. Adding just under half of what is cut off, and one more
    where the last kept bit is 1, carries into the kept half exactly where rounding goes up.
    """
    bits = x.view(torch.int32)
    last_kept = (bits >> 16) & 1
    return ((bits + 0x7FFF + last_kept) & -0x10000).view(torch.float32)


def autocast_dtypes(
    program: list[tuple[str, str, list[str]]], inputs: dict[str, torch.dtype], dtype: torch.dtype
) -> list[torch.dtype]:
    """The rule belongs to the operation, so one pass through the program is enough; only the third rule has
    to know what goes in.
    """
    known = dict(inputs)
    results = []
    for result, operation, names in program:
        if operation in ("linear", "matmul"):
            known[result] = dtype
        elif operation in ("softmax", "layer_norm", "cross_entropy", "sum"):
            known[result] = torch.float32
        else:
            types = [known[name] for name in names]
            known[result] = torch.float32 if torch.float32 in types else types[0]
        results.append(known[result])
    return results


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """Digits are lost twice, before the product and after it; in between the sums keep all of float32's."""
    return (a.bfloat16().float() @ b.bfloat16().float()).bfloat16()


def scaler_step(
    gradients: list[Tensor],
    dtype: torch.dtype,
    scale: float,
    good_steps: int,
    max_norm: float,
    growth_interval: int,
) -> tuple[list[Tensor], float, int]:
    """Divide first, then clip: the limit is meant for the true gradient. A step that overflowed teaches
    nothing, so it is left out, and the scale comes down.
    """
    is_scaled = dtype == torch.float16
    unscaled = [g / scale for g in gradients] if is_scaled else gradients
    if is_scaled and not all(g.isfinite().all() for g in unscaled):
        return [], scale / 2, 0
    length = torch.stack([g.square().sum() for g in unscaled]).sum().sqrt()
    factor = (max_norm / length).clamp(max=1)
    clipped = [g * factor for g in unscaled]
    if not is_scaled:
        return clipped, scale, good_steps
    if good_steps + 1 == growth_interval:
        return clipped, scale * 2, 0
    return clipped, scale, good_steps + 1


class LossScaler:
    """A step's finding lives from `unscale_` to `update`, in one attribute: None, then whether all is finite.
    So nothing is divided twice, nothing is forgotten, and the next step starts afresh.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000):
        self.factor = scale
        self.growth_interval = growth_interval
        self.good_steps = 0
        self.is_finite: bool | None = None

    def get_scale(self) -> float:
        return self.factor

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.is_finite = True
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(self.factor)
                    self.is_finite = self.is_finite and bool(parameter.grad.isfinite().all())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_finite is None:
            self.unscale_(optimizer)
        if self.is_finite:
            optimizer.step()

    def update(self) -> None:
        if not self.is_finite:
            self.factor /= 2
            self.good_steps = 0
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.factor *= 2
                self.good_steps = 0
        self.is_finite = None


def state_bytes(parameters: int, precision: str, moments: int) -> tuple[int, int, int]:
    """Autocast casts while it computes and stores nothing: it saves no byte here. A master copy costs what it
    saves, and keeps the digits that small steps need.
    """
    weights, gradients, moment = {
        "float32": (4, 4, 4),
        "autocast": (4, 4, 4),
        "bfloat16": (2, 2, 2),
        "master": (2 + 4, 2, 4),
    }[precision]
    return weights * parameters, gradients * parameters, moment * moments * parameters


def largest_batch(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
    """Doubling finds the order of magnitude, halving the rest: about 2 log2(largest) tries and not `largest`
    of them.
    """
    tried: list[int] = []

    def works(size: int) -> bool:
        tried.append(size)
        return fits(size)

    low, high = 0, 1
    while works(high):
        low = high
        if low == limit:
            return low, tried
        high = min(2 * high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        if works(middle):
            low = middle
        else:
            high = middle
    return low, tried


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's logits needs the chunk alone and the number of targets that count. So both
    gradients are finished where the loss is, and no logits have to wait for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        chunk_size: int,
    ) -> Tensor:
        count = (targets != ignore_index).sum()
        total = torch.zeros(())
        hidden_grad = torch.zeros_like(hidden)
        weight_grad = torch.zeros_like(weight)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            mask = targets[rows] != ignore_index
            x, y = hidden[rows][mask], targets[rows][mask]  # only those that count
            logits = x @ weight.T
            own = torch.arange(len(y))
            total = total + (logits.logsumexp(-1) - logits[own, y]).sum()
            grad = logits.softmax(-1)
            grad[own, y] -= 1
            grad /= count.clamp(min=1)
            hidden_grad[rows][mask] = grad @ weight
            weight_grad += grad.T @ x
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total / count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return upstream * hidden_grad, upstream * weight_grad, None, None, None
