"""Week 3. PyTorch's linear layer and RMSNorm, faster on a CPU for a single row; and helpers for modules.

A single row is what a model computes that writes token by token.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _is_row(x: Tensor, width: int) -> bool:
    """Whether x is one row in fp32 on a CPU, outside of training, autocast and the compiler."""
    if torch.compiler.is_compiling() or x.numel() != width or not x.is_cpu or x.dtype != torch.float32:
        return False
    return torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """nn.Linear, with a single row's product divided among the cores.

    PyTorch multiplies a single row on one core, which alone cannot read the weight as fast as memory delivers
    it. Here each core computes a part of the outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _is_row(x, self.in_features):
            return super().forward(x)
        parts = torch.get_num_threads()
        weight = self._parameters["weight"]  # `self.weight` goes through nn.Module.__getattr__, which is slow
        if parts == 1 or self.out_features % parts or type(weight) is not nn.Parameter:
            return super().forward(x)
        row = x.reshape(1, 1, -1).expand(parts, 1, -1)
        y = torch.bmm(row, weight.view(parts, -1, self.in_features).transpose(1, 2)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


ZERO = torch.zeros(())


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, with two operations for a single row instead of a dozen."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        if weight is None or self.eps is None or len(self.normalized_shape) > 1:
            return super().forward(x)
        width = self.normalized_shape[0]
        if not _is_row(x, width):
            return super().forward(x)
        row = x.reshape(-1)
        inverse_rms = (torch.dot(row, row).item() / width + self.eps) ** -0.5
        # 0 + inverse_rms * x * weight in one operation: multiplying by a number alone would be a second one.
        return torch.addcmul(ZERO, x, weight, value=inverse_rms)


class RMSNormPlusOne(nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32 (Gemma, 2024): a weight of 0 changes nothing."""

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else 1 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


def swap_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Replaces submodules of `model` in place.

    replacements: the new modules by the names of the old ones, as `named_modules` gives them. Raises
    AttributeError for a name that the model does not have, and ValueError for the model itself (named ""),
    which cannot be replaced in place.
    """
    for name, module in replacements.items():
        if not name:
            raise ValueError(f"a {type(model).__name__} cannot be replaced in itself: name one of its parts")
        model.get_submodule(name)  # or AttributeError
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
