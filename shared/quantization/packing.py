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

GROUP_SIZES = (32, 64, 128, 256)
PACKED_ROWS = 64
"""Up to this many rows of activations at once go through a kernel for packed weights. For more, unpacking the
weight once is faster.
"""
ROW_BLOCK = 64
"""PyTorch's int4 kernels lay out 64 rows of a weight together, or 32 twice, depending on the processor."""


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


def _codes(packed: Tensor) -> Tensor:
    """The codes in uint8 [..., n], low nibbles first: uint8 [..., 2 n]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


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

    def _register(self, **tensors: Tensor | None) -> None:
        """Makes these tensors buffers."""
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
        """From here on, few rows at a time go through this kernel."""
        self.kernel = kernel

    def native_product(self, x: Tensor) -> Tensor:
        """x · weightᵀ by `shared.quantization.native`: [..., in_features] -> [..., out_features]."""
        raise NotImplementedError

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
            return self.native_product(x)
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

    def _unpack(self, index: Tensor | slice) -> Tensor:
        groups = self.codes[index].unflatten(-1, (-1, self.group_size))  # [..., groups, group_size]
        return groups.float().mul_(self.scale[index].unsqueeze(-1)).flatten(-2)

    def native_product(self, x: Tensor) -> Tensor:
        codes, scale = self._buffer("codes"), self._buffer("scale")
        return native.product_int8(x, codes, scale, self.out_features, self.group_size)

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

    def native_product(self, x: Tensor) -> Tensor:
        codes, scale_zero = self._buffer("codes"), self._buffer("scale_zero")
        return native.product_int4(x, codes, scale_zero, self.out_features, self.group_size)

    def torch_product(self, x: Tensor) -> Tensor:
        codes, scale_zero = self._buffer("codes"), self._buffer("scale_zero")
        y = torch._weight_int4pack_mm_for_cpu(x, codes, self.group_size, scale_zero)
        return y if y.size(1) == self.out_features else y[:, : self.out_features]

    def codes_and_ranges(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The rows at `index`, whatever kernel the codes lie ready for: codes from 0 to 15, uint8 [...,
        in_features], and scale and zero, bfloat16 [..., groups, 2].
        """
        if self.kernel == "torch":
            return self._rows_of_torchs_layout(index)
        return _codes(self.codes[index]), self.scale_zero[index]

    def _unpack(self, index: Tensor | slice) -> Tensor:
        codes, scale_zero = self.codes_and_ranges(index)
        scale, zero = scale_zero.float().unsqueeze(-1).unbind(-2)  # [..., groups, 1] each
        groups = codes.float().unflatten(-1, (-1, self.group_size))
        return groups.mul_(scale).add_(zero - 8 * scale).flatten(-2)

    def use_kernel(self, kernel: str) -> None:
        super().use_kernel(kernel)
        if kernel == "torch":
            self.codes, self.scale_zero = self._in_torchs_layout(self.codes, self.scale_zero)

    def _in_torchs_layout(self, codes: Tensor, scale_zero: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and ranges as PyTorch's operation wants them: its rows come in whole blocks."""
        missing = -len(codes) % ROW_BLOCK
        padded = F.pad(_codes(codes), (0, 0, 0, missing)).int()
        packed = torch._convert_weight_to_int4pack_for_cpu(padded, 1)
        return packed, F.pad(scale_zero, (0, 0, 0, 0, 0, missing)).transpose(0, 1).contiguous()

    def _rows_of_torchs_layout(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Codes uint8 [..., in_features] and ranges [..., groups, 2] of the rows at `index`."""
        places = _torchs_places().to(self.codes.device)
        block, half = len(places), len(places) // 2
        ranges = self.scale_zero.transpose(0, 1)[: self.out_features]
        blocks = self.codes.view(-1, self.in_features, half)  # bytes [blocks, in_features, half]
        if isinstance(index, slice):
            by_byte = blocks.transpose(1, 2).contiguous()  # [blocks, half, in_features]
            by_place = torch.cat([by_byte & 15, by_byte >> 4], 1)  # [blocks, block, in_features]
            codes = by_place[:, places].view(-1, self.in_features)[: self.out_features]
            return codes[index], ranges[index]
        place = places[index % block]
        pairs = blocks[index // block, :, place % half]  # [..., in_features]
        shift = (place // half * 4).unsqueeze(-1).to(torch.uint8)
        return pairs >> shift & 15, ranges[index]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel == "torch":
            codes, scale_zero = self.codes_and_ranges()
            destination[prefix + "codes"] = _bytes(codes[:, ::2], codes[:, 1::2])
            destination[prefix + "scale_zero"] = scale_zero.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        codes, scale_zero = prefix + "codes", prefix + "scale_zero"
        if self.kernel == "torch" and codes in state_dict and scale_zero in state_dict:
            packed, ranges = self._in_torchs_layout(state_dict[codes], state_dict[scale_zero])
            state_dict = state_dict | {codes: packed, scale_zero: ranges}
        super()._load_from_state_dict(state_dict, prefix, *rest)


@cache
def _torchs_places() -> Tensor:
    """Where PyTorch's int4 kernel keeps the codes of a block of rows on this CPU: int64 [rows].

    The block's bytes are [in_features, rows / 2]. Place p is the low nibble of byte p, or the high one of
    byte p - rows / 2. PyTorch does not document this layout, and it differs between processors, so it is
    found out: the kernel packs codes that are the number of each row, in hexadecimal digits.
    """
    number = torch.arange(ROW_BLOCK).repeat(32, 1).T  # [rows, in_features]: each row's number
    first, second = (
        torch._convert_weight_to_int4pack_for_cpu((number >> shift & 15).int(), 1).flatten().int()
        for shift in (0, 4)
    )
    # The rows whose codes are the low and the high nibble of each byte.
    low = (first & 15) + 16 * (second & 15)
    high = (first >> 4 & 15) + 16 * (second >> 4 & 15)
    # After a column's bytes, the next column's begin with the same row.
    half = next(n for n in range(1, 2 * ROW_BLOCK) if n * 32 == len(low) or low[n] == low[0])
    rows = torch.cat([low[:half], high[:half]])
    if not rows.sort().values.equal(torch.arange(2 * half)):
        raise RuntimeError("the layout of PyTorch's int4 kernel on this processor is a new one")
    return rows.argsort()


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

    def native_product(self, x: Tensor) -> Tensor:
        double = None
        if self.offset is not None:
            double = (dynamic_levels(), self._buffer("absmax_scale"), self._buffer("offset").item())
        codes, absmax = self._buffer("codes"), self._buffer("absmax")
        return native.product_nf4(x, codes, absmax, self.out_features, self.group_size, double=double)

    def block_absmax(self) -> Tensor:
        """fp32 [out_features, blocks]."""
        if self.offset is None or self.absmax_scale is None:
            return self.absmax
        scale = self.absmax_scale.repeat_interleave(256)[: self.absmax.numel()].view_as(self.absmax)
        return dynamic_levels().to(scale.device)[self.absmax.int()] * scale + self.offset

    def _unpack(self, index: Tensor | slice) -> Tensor:
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
