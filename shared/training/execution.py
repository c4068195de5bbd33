"""Week 2. What a training step computes in, and which processes share it; the Trainer is handed both."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.devices import device_of, pick_device


def training_device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    """Where to train: None is where the model is, "auto" the best device there is, which is said."""
    if device is None:
        return device_of(model)
    return pick_device("auto") if device == "auto" else torch.device(device)


@dataclass(frozen=True)
class Precision:
    """The number format of a step: fp32, or `dtype` under autocast.

    Autocast carries out matrix products and the like in `dtype`; the weights stay fp32. Week 7's
    `precision.py` has the format for fp16, which scales the loss.
    """

    dtype: torch.dtype = torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context in which the forward pass runs."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def prepare(self, model: nn.Module) -> None:
        """Changes in place what the model computes with, where autocast is not enough. Its parameters stay
        what they are, and have their names.
        """

    @property
    def skips(self) -> bool:
        """Whether a step with a gradient that is not finite is skipped; if not, it stops the training."""
        return False

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those that the parameters have."""
        loss.backward()

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Gives the gradients their true size, before they are measured and clipped."""

    def step(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Updates the weights; `optimizers` is empty for a step that is skipped."""
        for optimizer in optimizers:
            optimizer.step()

    def state(self) -> dict[str, float]:
        """What changes from step to step: logged, and saved for a run that is resumed."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Takes up what `state` returned."""


@dataclass(frozen=True)
class Share:
    """What one of several processes reads of a step.

    Whole micro-batches as far as their number allows it, so that each is as large as it is for one process;
    only where there are more processes than micro-batches to give does one share the rows of a micro-batch
    with others. Together, the processes read what one would.

    >>> Share.of(16, rank=3, world_size=8)  # two whole ones out of 16
    Share(first=3, every=8, micro_batches=2, rank=0, world_size=1)
    >>> Share.of(2, rank=3, world_size=4)  # half of the rows of the second
    Share(first=1, every=2, micro_batches=1, rank=1, world_size=2)
    """

    first: int
    """Number of its first micro-batch, in a step."""
    every: int
    """From there to its next one."""
    micro_batches: int
    """Of a step."""
    rank: int
    """Among those that share the rows of its micro-batches."""
    world_size: int
    """How many do."""

    @classmethod
    def of(cls, grad_accum_steps: int, rank: int, world_size: int) -> "Share":
        """The share of process number `rank` in a step of so many micro-batches."""
        groups = math.gcd(grad_accum_steps, world_size)
        return cls(
            first=rank % groups,
            every=groups,
            micro_batches=grad_accum_steps // groups,
            rank=rank // groups,
            world_size=world_size // groups,
        )


class OneProcess:
    """The processes that share a step: this one alone. Week 6's `distributed.py` has the ones for several."""

    rank: int = 0
    world_size: int = 1
    compile_model: bool = False

    def prepare(self, model: nn.Module) -> Callable[..., Tensor]:
        """What a step calls in place of the model. The parameters that are trained remain the model's own."""
        return model

    def accumulating(self, call: Callable[..., Tensor]) -> AbstractContextManager:
        """The context of all batches but a step's last: their gradients need not be exchanged yet.

        call: what `prepare` returned.
        """
        return nullcontext()

    def mean(self, value: float) -> float:
        """The mean of `value` over all processes."""
        return value

    def barrier(self) -> None:
        """Waits until all processes have come here."""

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """The full tensor, where this process may have only a part of it. All processes must call it."""
        return tensor

    def placed(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of a full tensor, laid out as `like`."""
        return tensor.to(like.device)


FP32 = Precision()
ALONE = OneProcess()
