"""Week 2. What a training step computes in, and which processes take part in it: the Trainer is handed one of
each.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """What a step computes in. Other than fp32: operations that bear it are done in `dtype`, the weights stay
    fp32 (autocast).

    Week 7's `precision.py` has the one for fp16, which scales the loss.
    """

    dtype: torch.dtype = torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def skips(self) -> bool:
        """Whether a step with a gradient that is not finite is left out. If not, it stops the training."""
        return False

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Gives the gradients their true size, before they are measured and clipped."""

    def step(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Updates the weights; `optimizers` is empty for a step that is left out."""
        for optimizer in optimizers:
            optimizer.step()

    def state(self) -> dict[str, float]:
        """Logged, and saved for a run that goes on."""
        return {}

    def restore(self, state: dict[str, float]) -> None:
        """Takes up what `state` gave."""


class OneProcess:
    """Who takes part in a step: this process alone. Week 6's `distributed.py` has the others; they are handed
    to the Trainer.
    """

    rank, world_size = 0, 1

    def prepare(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """What a step calls instead of the model. The model's own parameters go on being those that are
        trained.
        """
        return model

    def accumulating(self, call: Callable) -> AbstractContextManager:
        """Round the batches before a step's last one: their gradients need not be exchanged yet."""
        return nullcontext()

    def mean(self, value: float) -> float:
        """The mean over all processes."""
        return value

    def wait(self) -> None:
        """Until all processes have come here."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which this process may have a part only, put together."""
        return tensor

    def placed(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of a whole tensor, laid out as `like`."""
        return tensor.to(like.device)


FP32, ALONE = Precision(), OneProcess()
