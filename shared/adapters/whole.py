"""Week 9. Modules that an adapter brings whole: PEFT's `modules_to_save`.

Beside thin matrices, an adapter may train some modules with all their weights, such as the output layer or a
norm. It has a copy of each; the base keeps its own, and is what it was when the adapter is switched off.
"""

from copy import deepcopy

from torch import Tensor, nn

from shared.quantization.modules import dequantize


class WholeModule(nn.Module):
    """A module of the base, and a copy of it for each adapter that trains it whole.

    It computes what the copy of the adapter in use does, and without one what the base does.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.in_use: str | None = None

    def add(self, name: str) -> nn.Module:
        """A new copy for the adapter `name`, as the base is now, in fp32; of packed weights, what they stand
        for.
        """
        plain = dequantize(nn.Sequential(deepcopy(self.base)))[0]
        self.copies[name] = plain.float().requires_grad_(True)
        return self.copies[name]

    @property
    def current(self) -> nn.Module:
        """What computes."""
        return self.base if self.in_use is None else self.copies[self.in_use]

    @property
    def weight(self) -> Tensor:
        """The weight of what computes."""
        weight = self.current.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the copy in use makes of the inputs, or the base."""
        result: Tensor = self.current(*inputs)
        return result


def whole_modules(model: nn.Module) -> dict[str, WholeModule]:
    """The modules that some adapter on `model` trains whole, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WholeModule)}
