"""Week 2. What a step did: how much it changed each matrix, and where numbers stopped being finite."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class TrainingStopped(ValueError):
    """The loss or a gradient is not a finite number; the message names the step and where it began."""


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def where_not_finite(
    model: nn.Module, forward: Callable[[], object], full_tensor: Callable[[Tensor], Tensor] = _as_it_is
) -> str | None:
    """The first place in a forward pass with a number that is not finite; None if there is none.

    Parameters are looked at first, then the outputs of the modules, in the order of the pass.

    forward: calls the model, on the batches that are to be looked at. Attention is computed there as matrix
    products and a softmax: some of the fused kernels turn a nan in a key into finite numbers. full_tensor:
    gives the full parameter, where the model's is a part of it.
    """
    for name, parameter in model.named_parameters():
        if not full_tensor(parameter).isfinite().all():
            return f"the parameter {name}"

    outputs: list[str] = []

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                outputs.append(name or type(model).__name__)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return f"the output of {outputs[0]}" if outputs else None


def gradient_to_blame(
    gradients: Mapping[str, Tensor], full_tensor: Callable[[Tensor], Tensor] = _as_it_is
) -> tuple[str, bool]:
    """The name of the first gradient that is not finite, and False.

    Where all are finite: the name of the one with the largest number, and True.
    """
    largest_name = ""
    largest = -1.0
    for name, gradient in gradients.items():
        full = full_tensor(gradient)
        if not full.isfinite().all():
            return name, False
        size = full.abs().max().item()
        if size > largest:
            largest_name = name
            largest = size
    return largest_name, True


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter of two or more dimensions."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() >= 2}


def update_ratios(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """How much a step changed each matrix: log10(std of update / std of weight), by `update/{name}`.

    before: what `matrices` gave before the step.
    """
    ratios = {}
    for name, old in before.items():
        new = model.get_parameter(name).detach()
        ratios[f"update/{name}"] = math.log10(((new - old).std() / old.std()).item() + 1e-12)
    return ratios
