"""Week 2. What a training step computes in, and which processes share it; the Trainer is handed both."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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


class OneProcess:
    """The processes that share a step: this one alone. Week 6's `distributed.py` has the ones for several."""

    rank: int = 0
    world_size: int = 1

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
