"""Week 9. A linear layer with low-rank adapters: LoRA, rsLoRA and DoRA, on a plain or a quantized layer.

Sources: Hu et al., "LoRA" (2021); Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with
LoRA" (2023); Liu et al., "DoRA" (2024); Dettmers et al., "QLoRA" (2023).

>>> layer = LoRALinear(nn.Linear(6, 4))
>>> layer.adapters["default"] = LoRA(layer.base, LoRAConfig(r=2))
>>> layer.in_use = {"default": 1.0}
>>> [tuple(p.shape) for p in layer.adapters["default"].parameters()], layer(torch.ones(3, 6)).shape
([(2, 6), (4, 2)], torch.Size([3, 4]))
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import Checks
from shared.devices import device_of
from shared.models.layers import Linear
from shared.quantization.modules import QuantizedLinear
from shared.registry import without_memory

BaseLayer = nn.Linear | QuantizedLinear
"""What an adapter can be put on."""


def lora_scale(alpha: float, r: int, use_rslora: bool) -> float:
    """The factor of B A: alpha / r (Hu et al., 2021), or with rsLoRA alpha / √r (Kalajdzievski, 2023).

    With rsLoRA the size of the change does not shrink as the rank grows.

    >>> lora_scale(16, 64, False), lora_scale(16, 64, True)
    (0.25, 2.0)
    """
    return alpha / math.sqrt(r) if use_rslora else alpha / r


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is. Raises ValueError for values out of range."""

    r: int = 8
    """The rank: rows of A, columns of B."""
    lora_alpha: float = 16.0
    """The change is lora_alpha / r times B A."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of linear layers, or ends of such names ("attn.o_proj"); ("all-linear",) is all but the output
    layer.
    """
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the thin matrices, by name or its end, as "lm_head" or "norm":
    the adapter brings a copy of each.
    """
    lora_dropout: float = 0.0
    """On the input of A, in training."""
    use_rslora: bool = False
    """lora_alpha / √r instead: the change keeps its size at any rank."""
    use_dora: bool = False
    """Learn the length of each row of the weight too."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        targets: object = self.target_modules  # may be a list, from JSON, or by mistake a single name
        if targets == "all-linear":  # PEFT writes it so
            targets = ("all-linear",)
            object.__setattr__(self, "target_modules", targets)
        checks.require(
            not isinstance(targets, str),
            f"target_modules={targets!r}: must be a tuple of names, as in ({targets!r},)",
        )
        checks.require(bool(targets), "target_modules is empty: name at least one linear layer")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        whole: object = self.modules_to_save
        checks.require(
            not isinstance(whole, str),
            f"modules_to_save={whole!r}: must be a tuple of names, as in ({whole!r},)",
        )
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        checks.at_least(1, "r")
        checks.above(0, "lora_alpha")
        checks.below(1, "lora_dropout")
        checks.finish()

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return lora_scale(self.lora_alpha, self.r, self.use_rslora)


class LoRA(nn.Module):
    """One adapter of one linear layer.

    A is random and B zero, so the adapter changes nothing until it is trained.
    """

    lora_A: nn.Parameter
    """[r, in_features]"""
    lora_B: nn.Parameter
    """[out_features, r]"""
    magnitude: nn.Parameter | None
    """DoRA's lengths of the weight's rows, [out_features]; None for LoRA."""

    def __init__(self, base: BaseLayer, config: LoRAConfig):
        super().__init__()
        self.config = config
        device = device_of(base)
        self.lora_A = nn.Parameter(torch.empty(config.r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear and PEFT
        self.magnitude = None
        if config.use_dora:
            self.magnitude = nn.Parameter(_row_lengths(base.weight.detach().float()))
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()

    def product(self) -> Tensor:
        """scale · B A: [out_features, in_features]."""
        return self.config.scale * (self.lora_B @ self.lora_A)

    def weight_change(self, weight: Tensor) -> Tensor:
        """What the adapter adds to the base's `weight`: fp32 [out_features, in_features]."""
        if self.magnitude is None:
            return self.product()
        weight = weight.float()
        directed = weight + self.product()
        return (self.magnitude / _row_lengths(directed)).unsqueeze(1) * directed - weight

    def forward(self, x: Tensor, y: Tensor, base: BaseLayer) -> Tensor:
        """What the adapter adds to the base's output.

        x [..., in_features], y = base(x) [..., out_features] -> [..., out_features].
        """
        dropped = self.dropout(x.to(self.lora_A.dtype))
        change = F.linear(F.linear(dropped, self.lora_A) * self.config.scale, self.lora_B)
        if self.magnitude is not None:
            weight = base.weight.to(self.lora_A.dtype)
            with torch.no_grad():  # the length counts as a constant: section 4.3 of the paper
                length = _row_lengths(weight + self.product())
            ratio = self.magnitude / length
            if self.training and self.config.lora_dropout:
                y = F.linear(dropped, weight)
            elif base.bias is not None:
                y = y - base.bias
            change = (ratio - 1) * y + ratio * change
        return change.to(y.dtype)


def _row_lengths(weight: Tensor) -> Tensor:
    """[rows, columns] -> [rows]; at least 1e-12, for the rows of a layer that starts at zero."""
    return weight.norm(dim=1).clamp_min(1e-12)


class LoRALinear(nn.Module):
    """A linear layer, plain or quantized, and its adapters by name.

    It computes base(x) + Σ share · adapter(x), over the adapters in use.
    """

    base: BaseLayer
    in_features: int
    out_features: int
    merged: nn.Module | None
    """What computes in the place of the sum while the adapters are merged."""

    def __init__(self, base: BaseLayer):
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.adapters = nn.ModuleDict()
        self.in_use: dict[str, float] = {}
        """The shares of the adapters in use, by name."""
        self.rows: tuple[str | None, ...] | None = None
        """An adapter for each row of the batch, instead of `in_use`."""
        self.merged = None

    def adapter(self, name: str) -> LoRA:
        """The adapter of this name. Raises KeyError where this layer has none."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LoRA)
        return adapter

    def low_rank(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [r, in_features] and B [out_features, r], scaled, of an adapter; None where this layer has none
        of the name.

        Raises ValueError for DoRA, and while rows of a batch have adapters of their own.
        """
        if name not in self.adapters:
            return None
        adapter = self.adapter(name)
        if adapter.magnitude is not None:
            raise ValueError(f"adapter {name} has lengths of its own for the weight's rows (DoRA)")
        if self.rows is not None:
            raise ValueError("adapters are set for the rows of a batch")
        return adapter.lora_A.detach(), adapter.lora_B.detach() * adapter.config.scale

    @property
    def weight(self) -> Tensor:
        """The weight with the adapters in use: [out_features, in_features].

        Where none is in use it is the base's own.
        """
        base = self.base.weight
        changes = [share * self.adapter(name).weight_change(base) for name, share in self.in_use.items()]
        return (base.float() + sum(changes)).to(base.dtype) if changes else base

    @property
    def bias(self) -> nn.Parameter | None:
        """The base's: adapters do not change it."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; with `rows` the first dimension is the batch."""
        if self.merged is not None:
            return self.merged(x)
        y = self.base(x)
        if self.rows is not None:
            return self._by_row(x, y, self.rows)
        changes = [self.adapters[name](x, y, self.base) * share for name, share in self.in_use.items()]
        return y + sum(changes) if changes else y

    def _by_row(self, x: Tensor, y: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        """y = base(x) with, for each row of the batch, the change by the adapter that `rows` names."""
        if len(x) != len(rows):
            raise ValueError(
                f"adapters are set for {len(rows)} rows, and the batch has {len(x)}: name one (or None)"
                " for each row"
            )
        out = y
        names = {name for name in rows if name is not None and name in self.adapters}
        for name in sorted(names):
            index = torch.tensor([i for i, row in enumerate(rows) if row == name], device=x.device)
            # All rows are computed, though only some are wanted: thin products cost little, and so a row is
            # rounded alike whichever adapters the other rows have.
            change = self.adapters[name](x, y, self.base)
            out = out.index_add(0, index, change[index])
        return out

    @torch.no_grad()
    def merge(self) -> None:
        """Puts a plain layer with `weight` in the place of the sum.

        Where no adapter is in use, the base itself computes.
        """
        if self.merged is not None:
            return
        if not self.in_use:
            self.merged = self.base
            return
        with without_memory():
            merged = Linear(self.in_features, self.out_features, bias=False)
        merged.weight = nn.Parameter(self.weight, requires_grad=False)
        merged.register_parameter("bias", self.base.bias)
        self.merged = merged.train(self.training)
