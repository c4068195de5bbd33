"""Week 8. AdamW with its two moments in 8 bits: a quarter of the memory that an optimizer's state takes.

Each moment is kept as the numbers of the nearest of 256 levels, with an absmax for each block of 256 values;
a step unpacks them, computes in fp32 what AdamW computes, and rounds them again. Sources: Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization" (2022); Loshchilov & Hutter (2019) for the update.

>>> weight = nn.Parameter(torch.ones(64, 64))
>>> optimizer = AdamW8bit([weight], lr=1e-3)
>>> weight.square().sum().backward()
>>> optimizer.step()
>>> state_bytes(optimizer) / weight.numel()  # of 8 in fp32
2.03125
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shared.quantization.packing import dynamic_levels, nearest_levels

BLOCK_SIZE = 256
"""Values that share an absmax."""
SMALLEST = 4096
"""A parameter with fewer values keeps its moments in fp32: they take no memory worth sparing."""


@cache
def unsigned_levels() -> Tensor:
    """`dynamic_levels` for values that are never below 0, in order: fp32 [256], in [0, 1].

    Each decade from 10⁻⁷ to 1 has twice as many levels as the one below, and twice as many as there.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 1) + 1)
        levels += (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted(levels))


class AdamW8bit(torch.optim.Optimizer):
    """`torch.optim.AdamW` with moments in 8 bits.

    A second moment that is not 0 is never rounded to 0: the update divides by its root. Raises ValueError for
    settings out of range and for parameters that are not in fp32.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: lr and weight_decay must be"
                " at least 0, eps above 0, and betas from 0 to below 1"
            )
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        for group in self.param_groups:
            if any(p.dtype != torch.float32 for p in group["params"]):
                raise ValueError("AdamW8bit is for parameters in fp32: the moments are what it makes small")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a loss is not computed again
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
        state["step"] += 1
        step = state["step"].item()
        beta1, beta2 = group["betas"]
        signed, unsigned = dynamic_levels().to(p.device), unsigned_levels().to(p.device)
        first = _unpacked(state, "exp_avg", signed, p).lerp_(gradient, 1 - beta1)
        second = _unpacked(state, "exp_avg_sq", unsigned, p)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        root = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
        p.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step))
        _pack(state, "exp_avg", first, signed)
        _pack(state, "exp_avg_sq", second, unsigned)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """`Optimizer.load_state_dict`, which would turn the codes into floating-point numbers."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters):
            for name, value in state_dict["state"].get(number, {}).items():
                if value.dtype == torch.uint8:
                    self.state[p][name] = value.to(p.device, copy=True)


def _unpacked(state: dict[str, Tensor], name: str, levels: Tensor, p: Tensor) -> Tensor:
    """A moment in fp32, of the parameter's shape; zeros before the first step."""
    moment = state.get(name)
    if moment is None:
        return torch.zeros_like(p)
    if moment.dtype != torch.uint8:
        return moment
    absmax = state[f"{name}_absmax"].repeat_interleave(BLOCK_SIZE)[: moment.numel()]
    return levels[moment.int()] * absmax.view_as(moment)


def _pack(state: dict[str, Tensor], name: str, moment: Tensor, levels: Tensor) -> None:
    if moment.numel() < SMALLEST:
        state[name] = moment
        return
    codes, state[f"{name}_absmax"] = nearest_levels(moment, levels, BLOCK_SIZE)
    if levels[0] == 0:
        codes.clamp_(min=1).mul_(moment > 0)
    state[name] = codes


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that an optimizer keeps for its parameters, but for its counts of steps."""
    tensors = (value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
