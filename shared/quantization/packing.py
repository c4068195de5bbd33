"""Week 8. How weights are packed: the formats int8, int4 and NF4, and matrices in them.

| scheme | a weight is about | bits for each, at the default sizes |
| --- | --- | ---: |
| int8 | scale[row] · code, code from -127 to 127 | 8 (and 32 for a row, or for each group) |
| int4 | scale[row, group] · (code - 8) + zero[row, group], code from 0 to 15 | 5 |
| nf4 | absmax[block] · NF4[code], code from 0 to 15 | 4.13 |

Sources: Dettmers et al., "LLM.int8()" (2022) for absmax by row; "QLoRA" (2023) for NF4 and double
quantization.

>>> packed = Int4Weight(torch.linspace(-1, 1, 64).view(2, 32))
>>> packed.codes.shape, packed.rows(torch.tensor([0]))[0, :3]
(torch.Size([2, 16]), tensor([-0.9980, -0.9980, -0.9326]))
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.quantization import native
from shared.quantization.panels import from_panels, nibbles_from_panels, nibbles_to_panels, to_panels
from shared.quantization.torch_layout import from_torchs_layout, to_torchs_layout

GROUP_SIZES = (32, 64, 128, 256)
PACKED_ROWS = 64
"""Up to this many rows of activations at once go through a kernel for packed weights. For more, unpacking the
weight once is faster.
"""


def absmax_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales fp32 [out] such that weight ≈ scale · code.

    Each row's largest magnitude becomes 127. No weight is off by more than half a scale. A row of zeros has
    the scale 0.
    """
    absmax = weight.abs().amax(-1, keepdim=True)
    steps = weight * (127 / absmax.clamp(min=torch.finfo(weight.dtype).tiny))
    return steps.round_().to(torch.int8), absmax[:, 0] / 127


def group_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int4's scale and zero for each group of `group_size` neighbours in a row: bfloat16 [out, groups] each.

    The smallest weight of a group becomes code 0 and the largest 15. Code 8 stands for `zero`, as in
    PyTorch's kernels.
    """
    groups = weight.unflatten(-1, (-1, group_size))
    low, high = groups.aminmax(dim=-1)
    scale = (high - low) / 15
    return scale.bfloat16(), (low + 8 * scale).bfloat16()


def int4_codes(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes, int32 from 0 to 15. scale, zero: of shapes that broadcast with `weight`'s."""
    scale = scale.float()
    steps = weight - zero.float()
    return steps.div_(torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7).add_(8).int()


# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 levels of QLoRA's appendix E: quantiles of a normal distribution, scaled to [-1, 1], with a 0."""


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of dynamic 8-bit quantization (Dettmers, "8-Bit Approximations for Parallelism", 2015),
    in order: fp32 [256], in [-1, 1].

    Each decade from 10⁻⁷ to 1, in both signs, has twice as many levels as the one below; 0 and 1 are added.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += means
        levels += [-mean for mean in means]
    return torch.tensor(sorted(levels))


def nearest_levels(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of values divided by their block's absmax, and each block's absmax, fp32 [blocks].

    A code is the number of the nearest of `levels`: uint8, of the shape of `values`. A block is `block_size`
    values in the order of memory; the last one may be shorter.
    """
    flat = values.flatten().float()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return codes.flatten()[: len(flat)].view(values.shape).to(torch.uint8), absmax


def check_weight(name: str, weight: Tensor, group_size: int) -> None:
    """Raises ValueError, with `name`, for a weight whose columns `group_size` does not divide, or that is not
    finite. One without values, on PyTorch's device "meta", is.
    """
    columns = weight.size(-1)
    if columns % group_size:
        fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
        advice = f"choose {' or '.join(fitting)}" if fitting else "its in_features must be a multiple of 32"
        raise ValueError(
            f"{name} has {columns} columns, which groups of {group_size} do not divide: {advice}"
        )
    # A sum with a NaN or an inf in it is none, and takes a fraction of the time that counting takes.
    bad = 0 if weight.is_meta or weight.sum().isfinite() else int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} values that are NaN or inf: this model is damaged, or its training diverged;"
            " use another checkpoint"
        )


def _bytes(low: Tensor, high: Tensor) -> Tensor:
    """Two codes from 0 to 15 in a byte: uint8."""
    return (low | high << 4).to(torch.uint8)


PIECE = 1 << 22
"""So many weights are packed at a time: what is computed on the way takes several times their memory."""


def _in_pieces(pack: Callable[..., tuple[Tensor, ...]], *by_row: Tensor) -> list[Tensor]:
    """What `pack` makes of these rows, some rows at a time."""
    rows = max(1, PIECE // by_row[0].size(1))
    pieces = [pack(*parts) for parts in zip(*(tensor.split(rows) for tensor in by_row))]
    return [torch.cat(parts) for parts in zip(*pieces)]


def _no_values(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _codes(packed: Tensor, high_first: bool = False) -> Tensor:
    """The codes in uint8 [..., n], low nibbles first, or high ones: uint8 [..., 2 n]."""
    halves = [packed >> 4, packed & 15] if high_first else [packed & 15, packed >> 4]
    return torch.stack(halves, -1).flatten(-2)


class PackedWeight(nn.Module):
    """A matrix [out_features, in_features] in few bits.

    The tensors of its format are its buffers. Made of a weight on PyTorch's device "meta" they lie there too,
    types and shapes without values, for a checkpoint to fill; nothing is computed on that device, which would
    import PyTorch's compiler. `settings` is its scheme with the options, as `quantize` takes
    them and checkpoints keep them. `kernel` is what multiplies by it, one of
    `shared.quantization.kernels.KERNELS`, or None where it is unpacked for each product.
    """

    codes: Tensor

    def __init__(self, weight: Tensor, **settings: Any):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.settings = settings
        self.dtype = weight.dtype
        self.kernel: str | None = None
        self.num_bytes = 0
        """Of all that a checkpoint holds of it."""

    def _register(self, **tensors: Tensor | None) -> None:
        """Makes these tensors buffers."""
        if not self._buffers:  # here still in the order in which they are saved
            self.num_bytes = sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        """For `model.to`, `.half` and the like: packed tensors go to another device, but keep their types.

        What takes another type is what `rows` unpacks.
        """
        for name, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[name] = tensor.to(fn(tensor.new_empty(0)).device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _buffer(self, name: str) -> Tensor:
        """A buffer, not by way of nn.Module.__getattr__, which is slow enough to be seen at batch 1."""
        tensor = self._buffers[name]
        assert tensor is not None
        return tensor

    def rows(self, index: Tensor | slice) -> Tensor:
        """The weight's rows at `index`, unpacked: [..., in_features], in `dtype`."""
        return self._unpack(index).to(self.dtype)

    def _unpack(self, index: Tensor | slice) -> Tensor:
        raise NotImplementedError

    def use_kernel(self, kernel: str) -> None:
        """From here on, few rows at a time go through this kernel. The tensors take the order that it wants;
        a state dict has them in the order of the columns.
        """
        plain = dict(self._buffers) | self._in_plain_order()
        self.kernel = kernel
        self._register(**self._in_order_of(kernel, plain))

    def _in_order_of(self, kernel: str, plain: dict[str, Any]) -> dict[str, Any]:
        """Of these buffers in the order of the columns, those that a kernel wants otherwise."""
        return {}

    def _in_plain_order(self) -> dict[str, Tensor]:
        """The buffers that are not in the order of the columns, as they are there."""
        return {}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._in_plain_order().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = [name for name in self._buffers if prefix + name in state_dict]
        if self.kernel is not None and names:
            plain = {name: state_dict[prefix + name] for name in names}
            ordered = self._in_order_of(self.kernel, plain)
            state_dict = state_dict | {prefix + name: tensor for name, tensor in ordered.items()}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def matrix(self) -> native.Matrix:
        """The weight for `shared.quantization.native`, where that is the kernel. It points to the buffers."""
        raise NotImplementedError

    def _as_matrix(self, group_size: int, scale: Tensor) -> native.Matrix:
        codes = self._buffer("codes")
        matrix = native.Matrix(
            kind=native.KINDS[self.settings["scheme"]],
            n_out=self.out_features,
            n_in=self.in_features,
            group=group_size,
            codes=codes.data_ptr(),
            scale=scale.data_ptr(),
        )
        matrix.points_to = (
            codes,
            scale,
        )  # which lie there as long as it does, whatever becomes of the buffers
        return matrix

    def torch_product(self, x: Tensor) -> Tensor:
        """x · weightᵀ by PyTorch's operation for packed weights: bfloat16 [n, in_features] -> [n,
        out_features].
        """
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x · weightᵀ: [..., in_features] -> [..., out_features], in x's type."""
        many = x.numel() > PACKED_ROWS * self.in_features
        if self.kernel is None or many or not x.is_cpu or torch.compiler.is_compiling():
            return F.linear(x, self.rows(slice(None)).to(x.dtype))
        if self.kernel == "native":
            return native.product(x, self.matrix())
        # With activations in fp32 or float16 PyTorch's operations are five to ten times slower.
        y = self.torch_product(x.reshape(-1, self.in_features).bfloat16())
        return y.type_as(x).view(*x.shape[:-1], -1)


class Int8Weight(PackedWeight):
    """`absmax_int8` of each row, or of each `group_size` neighbours in one."""

    scale: Tensor

    def __init__(self, weight: Tensor, group_size: int | None = None):
        options = {"group_size": group_size} if group_size else {}
        super().__init__(weight, scheme="int8", **options)
        self.group_size = group_size or self.in_features
        by_group = (self.out_features, self.in_features // self.group_size)
        if weight.is_meta:
            self._register(
                codes=_no_values(weight.shape, torch.int8), scale=_no_values(by_group, torch.float32)
            )
            return
        codes, scale = _in_pieces(lambda rows: absmax_int8(rows.float()), weight.reshape(-1, self.group_size))
        self._register(codes=codes.view(weight.shape), scale=scale.view(by_group))

    def codes_and_scale(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The rows at `index`, whatever kernel the codes lie ready for: codes int8 [..., in_features], and
        the scale of each group, fp32 [..., groups].
        """
        if self.kernel != "native":
            return self.codes[index], self.scale[index]
        codes = from_panels(self.codes, index, 4, self.out_features) ^ 128
        return codes.view(torch.int8), from_panels(self.scale, index, 1, self.out_features)

    def _unpack(self, index: Tensor | slice) -> Tensor:
        codes, scale = self.codes_and_scale(index)
        groups = codes.unflatten(-1, (-1, self.group_size))  # [..., groups, group_size]
        return groups.float().mul_(scale.unsqueeze(-1)).flatten(-2)

    def _in_order_of(self, kernel: str, plain: dict[str, Any]) -> dict[str, Any]:
        if kernel != "native":
            return {}
        # Plus 128, which turns the highest bit over: no signs.
        codes = to_panels(plain["codes"].view(torch.uint8) ^ 128, 4, filled_with=128)
        return {"codes": codes, "scale": to_panels(plain["scale"], 1)}

    def _in_plain_order(self) -> dict[str, Tensor]:
        if self.kernel != "native":
            return {}
        codes, scale = self.codes_and_scale()
        return {"codes": codes, "scale": scale}

    def matrix(self) -> native.Matrix:
        return self._as_matrix(self.group_size, self._buffer("scale"))

    def torch_product(self, x: Tensor) -> Tensor:
        # The operation wants its scales in bfloat16, which would move whole rows by up to 0.4 %: they are
        # applied in fp32 afterwards.
        scale = self._buffer("scale")[:, 0]
        ones = torch.ones_like(scale, dtype=torch.bfloat16)
        return torch._weight_int8pack_mm(x, self._buffer("codes"), ones) * scale


class Int4Weight(PackedWeight):
    """`group_ranges` and `int4_codes`; the code of an even column in the low nibble.

    ranges: scale and zero, where they are known. For PyTorch's operation the codes lie in an order of its
    own, which differs between processors; a state dict has them in the order of the columns.
    """

    scale_zero: Tensor

    def __init__(self, weight: Tensor, group_size: int = 32, ranges: tuple[Tensor, Tensor] | None = None):
        super().__init__(weight, scheme="int4", group_size=group_size)
        self.group_size = group_size
        if weight.is_meta:
            codes = _no_values((self.out_features, self.in_features // 2), torch.uint8)
            shape = (self.out_features, self.in_features // group_size, 2)
            self._register(codes=codes, scale_zero=_no_values(shape, torch.bfloat16))
            return
        codes, scale_zero = _in_pieces(self._packed, weight, *(ranges or ()))
        self._register(codes=codes, scale_zero=scale_zero)

    def _packed(self, weight: Tensor, *ranges: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, two to a byte, and scale and zero of each group of these rows: [out, groups, 2]."""
        weight = weight.float()
        scale, zero = ranges or group_ranges(weight, self.group_size)
        groups = weight.unflatten(-1, (-1, self.group_size))  # [out, groups, group_size]
        codes = int4_codes(groups, scale[..., None], zero[..., None]).flatten(1).to(torch.uint8)
        return _bytes(codes[:, ::2], codes[:, 1::2]), torch.stack([scale, zero], -1)

    def matrix(self) -> native.Matrix:
        return self._as_matrix(self.group_size, self._buffer("scale_zero"))

    def torch_product(self, x: Tensor) -> Tensor:
        codes, scale_zero = self._buffer("codes"), self._buffer("scale_zero")
        y = torch._weight_int4pack_mm_for_cpu(x, codes, self.group_size, scale_zero)
        return y if y.size(1) == self.out_features else y[:, : self.out_features]

    def codes_and_ranges(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The rows at `index`, whatever kernel the codes lie ready for: codes from 0 to 15, uint8 [...,
        in_features], and scale and zero, bfloat16 [..., groups, 2].
        """
        if self.kernel == "torch":
            return from_torchs_layout(self.codes, self.scale_zero, index, self.out_features)
        if self.kernel == "native":
            ranges = from_panels(self.scale_zero, index, 1, self.out_features).unflatten(-1, (-1, 2))
            return nibbles_from_panels(self.codes, index, self.out_features), ranges
        return _codes(self.codes[index]), self.scale_zero[index]

    def _unpack(self, index: Tensor | slice) -> Tensor:
        codes, scale_zero = self.codes_and_ranges(index)
        scale, zero = scale_zero.float().unsqueeze(-1).unbind(-2)  # [..., groups, 1] each
        groups = codes.float().unflatten(-1, (-1, self.group_size))
        return groups.mul_(scale).add_(zero - 8 * scale).flatten(-2)

    def _in_order_of(self, kernel: str, plain: dict[str, Any]) -> dict[str, Any]:
        codes, scale_zero = plain["codes"], plain["scale_zero"]
        if kernel == "native":
            return {
                "codes": nibbles_to_panels(_codes(codes)),
                "scale_zero": to_panels(scale_zero.flatten(1), 1),
            }
        if kernel == "torch":
            codes, scale_zero = to_torchs_layout(_codes(codes), scale_zero)
            return {"codes": codes, "scale_zero": scale_zero}
        return {}

    def _in_plain_order(self) -> dict[str, Tensor]:
        if self.kernel is None:
            return {}
        codes, scale_zero = self.codes_and_ranges()
        return {"codes": _bytes(codes[:, ::2], codes[:, 1::2]), "scale_zero": scale_zero.contiguous()}


class NF4Weight(PackedWeight):
    """`nearest_levels` of `NF4`, the code of an even column in the high nibble, as in bitsandbytes.

    double_quant: each block's absmax is kept in 8 bits too, as its difference from the mean (`offset`) by
    `nearest_levels` of `dynamic_levels` in blocks of 256.
    """

    absmax: Tensor
    absmax_scale: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: Tensor, group_size: int = 64, double_quant: bool = True):
        super().__init__(weight, scheme="nf4", group_size=group_size, double_quant=double_quant)
        self.group_size = group_size
        self._absmax_panels: Tensor | None = None  # for the native kernel
        by_block = (self.out_features, self.in_features // group_size)
        offset = scale = None
        if weight.is_meta:
            codes = _no_values((self.out_features, self.in_features // 2), torch.uint8)
            absmax = _no_values(by_block, torch.uint8 if double_quant else torch.float32)
            if double_quant:
                scale = _no_values((math.ceil(absmax.numel() / 256),), torch.float32)
                offset = _no_values((), torch.float32)
            self._register(codes=codes, absmax=absmax, absmax_scale=scale, offset=offset)
            return
        codes, absmax = nearest_levels(weight, torch.tensor(NF4, device=weight.device), group_size)
        if double_quant:
            offset = absmax.mean()
            absmax, scale = nearest_levels(absmax - offset, dynamic_levels().to(weight.device), 256)
        packed = _bytes(codes[:, 1::2], codes[:, ::2])
        self._register(codes=packed, absmax=absmax.view(by_block), absmax_scale=scale, offset=offset)

    def _in_order_of(self, kernel: str, plain: dict[str, Any]) -> dict[str, Any]:
        if kernel != "native":
            return {}
        self._absmax_panels = None
        return {"codes": nibbles_to_panels(_codes(plain["codes"], high_first=True))}

    def _in_plain_order(self) -> dict[str, Tensor]:
        if self.kernel != "native":
            return {}
        codes = nibbles_from_panels(self.codes, slice(None), self.out_features)
        return {"codes": _bytes(codes[:, 1::2], codes[:, ::2])}

    def matrix(self) -> native.Matrix:
        if self._absmax_panels is None:  # in full, since it is looked up in every product
            self._absmax_panels = to_panels(self.block_absmax(), 1)
        return self._as_matrix(self.group_size, self._absmax_panels)

    def block_absmax(self) -> Tensor:
        """fp32 [out_features, blocks]."""
        if self.offset is None or self.absmax_scale is None:
            return self.absmax
        scale = self.absmax_scale.repeat_interleave(256)[: self.absmax.numel()].view_as(self.absmax)
        return dynamic_levels().to(scale.device)[self.absmax.int()] * scale + self.offset

    def _unpack(self, index: Tensor | slice) -> Tensor:
        if self.kernel == "native":
            codes = nibbles_from_panels(self.codes, index, self.out_features)
            weights = torch.tensor(NF4, device=codes.device)[codes.int()]
        else:
            pairs = torch.take(_nf4_pairs().to(self.codes.device), self.codes[index].long())
            weights = pairs.view(torch.float32)  # [..., in_features]
        blocks = weights.unflatten(-1, (-1, self.group_size))
        return blocks.mul_(self.block_absmax()[index].unsqueeze(-1)).flatten(-2)


@cache
def _nf4_pairs() -> Tensor:
    """The two weights that each of the 256 bytes stands for, before its absmax.

    float64 [256], each 8 bytes holding two fp32: so one look-up gives both.
    """
    byte = torch.arange(256)
    return torch.tensor(NF4)[torch.stack([byte >> 4, byte & 15], -1)].view(torch.float64).flatten()


SCHEMES: dict[str, type[PackedWeight]] = {"int8": Int8Weight, "int4": Int4Weight, "nf4": NF4Weight}
"""By name: how a weight can be packed."""
