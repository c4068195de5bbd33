"""Week 8. How weights are packed: the formats int8, int4 and NF4, matrices in them, and PyTorch's kernels for
such matrices.

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

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.quantization import native

GROUP_SIZES = (32, 64, 128, 256)
KERNELS = ("native", "torch")
"""What multiplies by packed weights on a CPU, the faster first: `shared.quantization.native`, and PyTorch's
own operations.
"""
PACKED_ROWS = 64
"""Up to so many rows of activations at once go through such a kernel; for more, unpacking the weight once is
faster.
"""
ROW_BLOCK = (
    64  # PyTorch's int4 kernels lay out 64 rows of a weight together, or 32 twice, by the kind of processor
)

# ---- the formats


def _bytes(low: Tensor, high: Tensor) -> Tensor:
    """Two codes from 0 to 15 in a byte."""
    return (low | high << 4).to(torch.uint8)


def _codes(packed: Tensor) -> Tensor:
    """The codes in uint8 [..., n], low nibbles first: uint8 [..., 2 n]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def absmax_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and scales fp32 [out] with weight ≈ scale · code: each row's largest magnitude
    becomes 127.

    No weight is off by more than half a scale. A row of zeros has the scale 0.
    """
    absmax = weight.abs().amax(-1, keepdim=True)
    codes = (weight * (127 / absmax.clamp(min=torch.finfo(weight.dtype).tiny))).round().to(torch.int8)
    return codes, absmax[:, 0] / 127


def group_ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int4's scale and zero for each group of `group_size` neighbours in a row: bfloat16 [out, in /
    group_size] each.

    The smallest weight of a group becomes code 0 and the largest 15. Code 8 stands for `zero`, as PyTorch's
    kernels have it.
    """
    groups = weight.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    return scale.bfloat16(), (low + 8 * scale).bfloat16()


def int4_codes(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes, from 0 to 15, for given scales and zeros, each of a shape that broadcasts with
    `weight`'s. int32.
    """
    scale = scale.float()
    steps = (weight - zero.float()) / torch.where(scale == 0, 1.0, scale)
    return steps.round().clamp(-8, 7).int() + 8


NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 levels of QLoRA's appendix E: quantiles of a normal distribution, scaled to [-1, 1], 0 among them.
"""


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of dynamic 8-bit quantization (Dettmers, "8-Bit Approximations for Parallelism", 2015),
    in order, in [-1, 1].

    Of each decade from 10⁻⁷ to 1, in both signs, twice as many levels as of the one below; and 0 and 1.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += means + [-m for m in means]
    return torch.tensor(sorted(levels))


def nearest_levels(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (the number of the nearest of `levels`) of values over their block's absmax, uint8, and each
    block's absmax, fp32 [blocks].

    A block is `block_size` values in the order of memory; the last one may be shorter.
    """
    flat = values.flatten().float()
    blocks = F.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)
    return codes.flatten()[: len(flat)].view(values.shape).to(torch.uint8), absmax


def gguf_blocks(weight: Tensor, kind: str) -> Tensor:
    """A weight [rows, columns] as llama.cpp's blocks of 32, "q8_0" or "q4_0": uint8 [rows, bytes], the bytes
    of a GGUF file.

    A block is a float16 scale d and its codes: 32 times int8 for d · code, or 16 bytes for d · (code - 8),
    the codes of the first half in the low nibbles. The format is ggml's (`block_q8_0`, `block_q4_0`). Raises
    ValueError for another kind, for columns that 32 does not divide, and for weights that are not finite.
    """
    if kind not in ("q8_0", "q4_0"):
        raise ValueError(f"no kind of block is called {kind!r}; there are: q8_0, q4_0")
    check_weight("the weight", weight, 32)
    blocks = weight.detach().float().unflatten(-1, (-1, 32))  # [rows, blocks, 32]
    if kind == "q8_0":
        d = blocks.abs().amax(-1, keepdim=True) / 127
    else:
        d = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    steps = blocks * torch.where(d == 0, 0.0, 1 / d)
    if kind == "q8_0":
        whole = steps.trunc()
        codes = (
            (whole + (2 * (steps - whole)).trunc()).to(torch.int8).view(torch.uint8)
        )  # halves away from zero, as C's roundf
    else:
        codes = (steps + 8.5).trunc().clamp(0, 15).to(torch.uint8)
        codes = _bytes(codes[..., :16], codes[..., 16:])
    return torch.cat([d.half().view(torch.uint8), codes], -1).flatten(-2)


def check_weight(name: str, weight: Tensor, group_size: int) -> None:
    """Raises ValueError, with `name`, for a weight whose columns `group_size` does not divide, or that is not
    finite.
    """
    if weight.size(-1) % group_size:
        fitting = [str(g) for g in GROUP_SIZES if weight.size(-1) % g == 0]
        advice = f"choose {' or '.join(fitting)}" if fitting else "its in_features must be a multiple of 32"
        raise ValueError(
            f"{name} has {weight.size(-1)} columns, which groups of {group_size} do not divide: {advice}"
        )
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} values that are NaN or inf: this model is damaged, or its training diverged;"
            " use another checkpoint"
        )


# ---- packed weights


class PackedWeight(nn.Module):
    """A matrix [out_features, in_features] in few bits. The tensors of its format are its buffers; `settings`
    is what `quantize` was told.
    """

    def __init__(self, weight: Tensor, **settings: Any):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.settings = settings
        self.dtype = weight.dtype
        self.kernel: str | None = None  # of KERNELS

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        """`model.to`, `.half` and the like: packed tensors go to another device, but only what is unpacked
        takes another type.
        """
        for name, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[name] = tensor.to(fn(tensor.new_empty(0)).device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def rows(self, index: Tensor | slice) -> Tensor:
        """The weight's rows at `index`, unpacked: [..., in_features], in `dtype`."""
        return self._unpack(index).to(self.dtype)

    def _unpack(self, index: Tensor | slice) -> Tensor:
        raise NotImplementedError

    def use_kernel(self, kernel: str) -> None:
        """From here on, few rows at a time go through this one of `KERNELS`."""
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
        if (
            self.kernel is None
            or x.numel() > PACKED_ROWS * self.in_features
            or not x.is_cpu
            or torch.compiler.is_compiling()
        ):
            return F.linear(x, self.rows(slice(None)).to(x.dtype))
        if self.kernel == "native":
            return self.native_product(x)
        # With activations in fp32 or float16 these operations are five to ten times slower.
        return (
            self.torch_product(x.reshape(-1, self.in_features).bfloat16()).type_as(x).view(*x.shape[:-1], -1)
        )


class Int8Weight(PackedWeight):
    """`absmax_int8` of each row, or of each `group_size` neighbours in one."""

    def __init__(self, weight: Tensor, group_size: int | None = None):
        super().__init__(weight, scheme="int8", **({"group_size": group_size} if group_size else {}))
        self.group_size = group_size or self.in_features
        codes, scale = absmax_int8(weight.float().reshape(-1, self.group_size))
        self.register_buffer("codes", codes.view(weight.shape))
        self.register_buffer("scale", scale.view(self.out_features, -1))  # [out, groups]

    def _unpack(self, index: Tensor | slice) -> Tensor:
        return (
            self.codes[index].unflatten(-1, (-1, self.group_size)) * self.scale[index].unsqueeze(-1)
        ).flatten(-2)

    def native_product(self, x: Tensor) -> Tensor:
        tensors = (
            self._buffers
        )  # `self.codes` is found through nn.Module.__getattr__, slow enough to be seen at batch 1
        return native.product_int8(x, tensors["codes"], tensors["scale"], self.out_features, self.group_size)

    def torch_product(self, x: Tensor) -> Tensor:
        # It wants its scales in bfloat16, which would move whole rows by up to 0.4 %: they are applied in
        # fp32 behind it.
        tensors = self._buffers
        scale = tensors["scale"][:, 0]
        return (
            torch._weight_int8pack_mm(x, tensors["codes"], torch.ones_like(scale, dtype=torch.bfloat16))
            * scale
        )


@cache
def _kernel_places() -> Tensor:
    """Where PyTorch's int4 kernel on this CPU keeps the codes of a block of rows: int64 [rows]. The block's
    bytes are [in_features, rows / 2]; place p is the low nibble of byte p, or the high one of byte p - rows /
    2.

    The layout is the kernel's own affair, and differs between processors. So it is asked: it packs the number
    of each row in hexadecimal.
    """
    number = torch.arange(ROW_BLOCK).repeat(32, 1).T  # [rows, in_features]
    digits = [
        torch._convert_weight_to_int4pack_for_cpu((number >> shift & 15).int(), 1).flatten().int()
        for shift in (0, 4)
    ]
    low, high = (
        (digits[0] >> nibble & 15) + 16 * (digits[1] >> nibble & 15) for nibble in (0, 4)
    )  # the rows of each byte's two codes
    half = next(
        n for n in range(1, 2 * ROW_BLOCK) if n * 32 == len(low) or low[n] == low[0]
    )  # after a column comes the next one
    found = torch.cat([low[:half], high[:half]])
    if not found.sort().values.equal(torch.arange(2 * half)):
        raise RuntimeError("the layout of PyTorch's int4 kernel on this processor is a new one")
    return found.argsort()


class Int4Weight(PackedWeight):
    """`group_ranges` and `int4_codes`; the code of an even column in the low nibble.

    ranges: scale and zero, where they are known. For PyTorch's operation the codes lie in an order of its
    own, which differs between processors; a state dict has them in the order of the columns.
    """

    def __init__(self, weight: Tensor, group_size: int = 32, ranges: tuple[Tensor, Tensor] | None = None):
        super().__init__(weight, scheme="int4", group_size=group_size)
        self.group_size, weight = group_size, weight.float()
        scale, zero = ranges or group_ranges(weight, group_size)
        codes = int4_codes(weight.unflatten(-1, (-1, group_size)), scale[..., None], zero[..., None]).flatten(
            1
        )
        self.register_buffer("codes", _bytes(codes[:, ::2], codes[:, 1::2]))
        self.register_buffer("scale_zero", torch.stack([scale, zero], -1))  # [out, groups, 2]

    def native_product(self, x: Tensor) -> Tensor:
        tensors = self._buffers
        return native.product_int4(
            x, tensors["codes"], tensors["scale_zero"], self.out_features, self.group_size
        )

    def torch_product(self, x: Tensor) -> Tensor:
        tensors = self._buffers
        y = torch._weight_int4pack_mm_for_cpu(x, tensors["codes"], self.group_size, tensors["scale_zero"])
        return y if y.size(1) == self.out_features else y[:, : self.out_features]

    def _unpack(self, index: Tensor | slice) -> Tensor:
        codes, scale_zero = (
            self._rows_for_torch(index)
            if self.kernel == "torch"
            else (_codes(self.codes[index]), self.scale_zero[index])
        )
        scale, zero = scale_zero.float().unsqueeze(-1).unbind(-2)  # [..., groups, 1]
        return (
            codes.float().unflatten(-1, (-1, self.group_size)).mul_(scale).add_(zero - 8 * scale).flatten(-2)
        )

    # How PyTorch's operation wants codes and ranges, and back. Its rows come in whole blocks.

    def use_kernel(self, kernel: str) -> None:
        super().use_kernel(kernel)
        if kernel == "torch":
            self.codes, self.scale_zero = self._for_torch(self.codes, self.scale_zero)

    def _for_torch(self, codes: Tensor, scale_zero: Tensor) -> tuple[Tensor, Tensor]:
        missing = -len(codes) % ROW_BLOCK
        packed = torch._convert_weight_to_int4pack_for_cpu(F.pad(_codes(codes), (0, 0, 0, missing)).int(), 1)
        return packed, F.pad(scale_zero, (0, 0, 0, 0, 0, missing)).transpose(0, 1).contiguous()

    def _rows_for_torch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        places = _kernel_places().to(self.codes.device)
        ranges, half = self.scale_zero.transpose(0, 1)[: self.out_features], len(places) // 2
        if isinstance(index, slice):
            by_row = self.codes.view(-1, self.in_features, half).transpose(1, 2).contiguous()
            return (
                torch.cat([by_row & 15, by_row >> 4], 1)[:, places].view(-1, self.in_features)[
                    : self.out_features
                ][index],
                ranges[index],
            )
        place = places[index % len(places)]
        pairs = self.codes.view(-1, self.in_features, half)[
            index // len(places), :, place % half
        ]  # [..., in_features]
        return pairs >> (place // half * 4).unsqueeze(-1).to(torch.uint8) & 15, ranges[index]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel == "torch":
            codes, scale_zero = self._rows_for_torch(slice(None))
            destination |= {
                prefix + "codes": _bytes(codes[:, ::2], codes[:, 1::2]),
                prefix + "scale_zero": scale_zero.contiguous(),
            }

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        names = prefix + "codes", prefix + "scale_zero"
        if self.kernel == "torch" and state_dict.keys() >= set(names):
            state_dict = state_dict | dict(zip(names, self._for_torch(*(state_dict[name] for name in names))))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class NF4Weight(PackedWeight):
    """`nearest_levels` of `NF4`, the code of an even column in the high nibble, as bitsandbytes has them.

    double_quant: each block's absmax is kept in 8 bits too, as its difference from the mean (`offset`) by
    `nearest_levels` of `dynamic_levels` in blocks of 256.
    """

    def __init__(self, weight: Tensor, group_size: int = 64, double_quant: bool = True):
        super().__init__(weight, scheme="nf4", group_size=group_size, double_quant=double_quant)
        self.group_size = group_size
        codes, absmax = nearest_levels(weight, torch.tensor(NF4, device=weight.device), group_size)
        self.register_buffer("codes", _bytes(codes[:, 1::2], codes[:, ::2]))
        offset = absmax.mean() if double_quant else None
        scale = None
        if double_quant:
            absmax, scale = nearest_levels(absmax - offset, dynamic_levels().to(weight.device), 256)
        self.register_buffer("absmax", absmax.view(self.out_features, -1))
        self.register_buffer("absmax_scale", scale)
        self.register_buffer("offset", offset)

    def native_product(self, x: Tensor) -> Tensor:
        tensors = self._buffers
        double = (
            None
            if self.offset is None
            else (dynamic_levels(), tensors["absmax_scale"], tensors["offset"].item())
        )
        return native.product_nf4(
            x, tensors["codes"], tensors["absmax"], self.out_features, self.group_size, double
        )

    def block_absmax(self) -> Tensor:
        """fp32 [out_features, blocks]."""
        if self.offset is None:
            return self.absmax
        scale = self.absmax_scale.repeat_interleave(256)[: self.absmax.numel()].view_as(self.absmax)
        return dynamic_levels().to(scale.device)[self.absmax.int()] * scale + self.offset

    def _unpack(self, index: Tensor | slice) -> Tensor:
        pairs = torch.take(
            _nf4_pairs().to(self.codes.device), self.codes[index].long()
        )  # [..., in_features / 2]
        blocks = pairs.view(torch.float32).unflatten(-1, (-1, self.group_size))
        return blocks.mul_(self.block_absmax()[index].unsqueeze(-1)).flatten(-2)


@cache
def _nf4_pairs() -> Tensor:
    """The two weights that each of the 256 bytes stands for, before its absmax: float64 [256], in whose 8
    bytes two fp32 lie.
    """
    byte = torch.arange(256)
    return torch.tensor(NF4)[torch.stack([byte >> 4, byte & 15], -1)].view(torch.float64).flatten()


SCHEMES: dict[str, type[PackedWeight]] = {"int8": Int8Weight, "int4": Int4Weight, "nf4": NF4Weight}


@cache
def find_kernel(scheme: str, kernels: tuple[str, ...] = KERNELS) -> tuple[str | None, str]:
    """The first of `kernels` that multiplies by weights packed in this way on this CPU, tried on small ones,
    or None; and why not another.
    """
    weight = torch.linspace(-1, 1, 64 * 64).sin().view(64, 64)
    x, reasons = torch.linspace(-1, 1, 128).view(2, 64), []
    for kernel in kernels:
        packed = SCHEMES[scheme](weight)
        rows = packed.rows(slice(None))
        expected = F.linear(x, rows)
        try:
            packed.use_kernel(kernel)
            right = torch.allclose(
                packed.product(x), expected, rtol=0.02, atol=0.02 * expected.abs().max().item()
            )
            if right and torch.equal(packed.rows(slice(None)), rows):
                return kernel, "; ".join(reasons)
            reasons.append(f"{kernel}: it computes something else here")
        except NotImplementedError:
            reasons.append(f"{kernel}: it does not know {scheme}")
        except (
            AttributeError,
            RuntimeError,
        ) as error:  # no compiler; this PyTorch has no such operation, or not for this processor
            reasons.append(f"{kernel}: {str(error).splitlines()[0]}")
    return None, "; ".join(reasons)


def with_kernel(packed: PackedWeight, kernels: tuple[str, ...] = KERNELS) -> PackedWeight:
    """The same weight, using the first of `kernels` that works, if one does."""
    found, _ = find_kernel(packed.settings["scheme"], kernels)
    if found and packed.codes.is_cpu and packed.in_features % 32 == 0:
        packed.use_kernel(found)
    return packed


def how_computed(scheme: str, device: torch.device, kernels: tuple[str, ...] = KERNELS) -> str:
    """A line for people: how products with such weights are computed on `device`."""
    found, why_not = (
        find_kernel(scheme, kernels)
        if device.type == "cpu"
        else (None, f"kernels for packed weights are for CPUs, not {device.type}")
    )
    if found is None:
        return (
            f"{scheme}: no kernel multiplies by such weights here ({why_not}): they are unpacked for each"
            " product: less memory, not more speed"
        )
    how = "the course's kernel in C" if found == "native" else "PyTorch's kernel"
    without = f" (native.c is not used: {why_not})" if why_not else ""
    return (
        f"{scheme}: up to {PACKED_ROWS} rows at a time go through {how}{without}; for more, weights are"
        " unpacked"
    )
