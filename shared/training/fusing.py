"""Week 2. What of a training `fused.c` computes: the optimizer's step, and what modules can be given to it.

The Trainer knows no model. Which modules there are that compute with `fused.c` is registered from outside, as
week 4's `fused_modules.py` does. Only while it trains do they have another `forward`: parameters, names and
checkpoints are the model's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from shared.training.config import TrainConfig
from shared.training.execution import OneProcess, Precision
from shared.training.fused import why_unfused

FORMS: dict[type[nn.Module], tuple[str, Callable[..., Any]]] = {}
"""By class: the method that is exchanged, and a function (module, *its arguments). Filled by
`register_fused`.
"""
REASONS: dict[type[nn.Module], Callable[[nn.Module], bool]] = {}
"""By class: whether a model is fused for such a module. One that has no reason would gain nothing."""


def register_fused(
    kind: type[nn.Module],
    method: str,
    function: Callable[..., Any],
    *,
    is_reason: Callable[[nn.Module], bool] | None = None,
) -> None:
    """Makes a function known that computes what `method` of modules of exactly this class does. It calls that
    method where it cannot. is_reason: whether a model is fused for a module of this class alone; None for no.
    """
    FORMS[kind] = (method, function)
    if is_reason is not None:
        REASONS[kind] = is_reason


def is_a_reason(module: nn.Module) -> bool:
    """Whether a model is fused for this module alone."""
    asked = REASONS.get(type(module))
    return asked is not None and asked(module)


@contextmanager
def fuse(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the modules of `model` that have a fused form compute with it, where they can: with gradients,
    in fp32, on a CPU. It gives what they give, up to rounding, but cannot be differentiated twice.

    Raises RuntimeError where fused.c does not work.
    """
    reason = why_unfused()
    if reason is not None:
        raise RuntimeError(f"a model cannot be fused here: {reason}")
    exchanged = []
    for module in model.modules():
        method, function = FORMS.get(type(module), ("", None))
        if function is not None and method not in vars(module):  # somebody else may have exchanged it
            setattr(module, method, partial(function, module))
            exchanged.append((module, method))
    try:
        yield model
    finally:
        for module, method in exchanged:
            delattr(module, method)


@dataclass(frozen=True)
class Fusion:
    """What of a training is computed by `fused.c`."""

    optimizer: bool = False
    modules: bool = False
    message: str | None = None
    """A line about it, for people; None where there is nothing to say."""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        model: nn.Module,
        device: torch.device,
        precision: Precision,
        processes: OneProcess,
    ) -> "Fusion":
        """As the settings and the machine allow it. A compiled model is the compiler's to fuse."""
        muon = config.optimizer == "muon"
        plain = precision.dtype == torch.float32 and not processes.compile_model
        modules = plain and any(map(is_a_reason, model.modules()))
        if not config.fused or device.type != "cpu" or not (muon or modules):
            return cls()
        reason = why_unfused()
        if reason is not None:
            return cls(message=f"PyTorch alone computes the steps, since fused.c is not used: {reason}")
        parts = " and ".join(["Muon"] * muon + ["parts of the model"] * modules)
        return cls(muon, modules, f"steps compute {parts} in C; fused=False leaves that to PyTorch")

    @contextmanager
    def training(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's modules are fused if they are to be."""
        if not self.modules:
            yield
            return
        with fuse(model):
            yield
