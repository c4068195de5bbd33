"""Week 3. PyTorch's linear layer and RMSNorm, quicker on a CPU for a single row: what a model that writes
token by token computes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def _is_row(x: Tensor, width: int) -> bool:
    """Whether x is one row in fp32 on a CPU, outside of training, autocast and the compiler."""
    if torch.compiler.is_compiling() or x.numel() != width or not x.is_cpu or x.dtype != torch.float32:
        return False
    return torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """nn.Linear. PyTorch multiplies a single row on one core, which alone cannot read the weight as fast as
    memory gives it; here each core has a product of its own, with a part of the outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _is_row(x, self.in_features):
            return super().forward(x)
        # Found like this, and not as `self.weight`, whose way through nn.Module is long enough to be seen in
        # a row's time.
        parts, weight = torch.get_num_threads(), self._parameters["weight"]
        if parts == 1 or self.out_features % parts or type(weight) is not nn.Parameter:
            return super().forward(x)
        row = x.reshape(1, 1, -1).expand(parts, 1, -1)
        y = torch.bmm(row, weight.view(parts, -1, self.in_features).transpose(1, 2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def swap_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Puts other modules in the places that these names (as `named_modules` gives them) have in `model`, which changes."""
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


NOTHING = torch.zeros(())


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, in two operations for a single row rather than in a dozen."""

    def forward(self, x: Tensor) -> Tensor:
        width = self.normalized_shape[0]
        if len(self.normalized_shape) > 1 or self.eps is None or not _is_row(x, width):
            return super().forward(x)
        row = x.reshape(-1)
        # x · weight · number: a product with a number alone would take longer than this.
        return torch.addcmul(
            NOTHING,
            x,
            self._parameters["weight"],
            value=(torch.dot(row, row).item() / width + self.eps) ** -0.5,
        )
