"""The graded exercises of week 8: what memory allows, int8, int4 in groups, packing, a linear layer with
packed weights and its place in a model, NF4, a product of int8 codes, the same in C, GPTQ, a product in C
with scales for groups, a loop that threads share.
"""

import copy
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from shared.compiled import compile_c, find_compiler
from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.course.exercise.running import files_of
from shared.models.layers import swap_modules
from shared.quantization import native, quantize
from shared.quantization.gptq import gptq_round
from shared.quantization.packing import (
    NF4,
    Int4Weight,
    absmax_int8,
    group_ranges,
    int4_codes,
    nearest_levels,
)

# ---- 1. how fast memory allows


def decode_limit(
    block_weights: int,
    vocab_size: int,
    n_embd: int,
    bits: int,
    group_size: int,
    scale_bits: float,
    bandwidth: float,
) -> float:
    return _tokens_per_second(block_weights + vocab_size * n_embd, bits + scale_bits / group_size, bandwidth)


def _tokens_per_second(weights: int, bits: float, bandwidth: float) -> float:
    return bandwidth * 1e9 / (weights * bits / 8)


def _without_scales(*case: Any) -> float:
    block_weights, vocab_size, n_embd, bits, _, _, bandwidth = case
    return _tokens_per_second(block_weights + vocab_size * n_embd, bits, bandwidth)


def _in_gibibytes(*case: Any) -> float:
    return decode_limit(*case) * 2**30 / 1e9


def _limit_cases(generator: Generator) -> list[tuple]:
    def case(bits: int, group_size: int, scale_bits: float) -> tuple:
        sizes = (
            1000 * random_int(generator, 500, 200000),
            100 * random_int(generator, 10, 500),
            64 * random_int(generator, 2, 30),
        )
        return *sizes, bits, group_size, scale_bits, random_int(generator, 50, 900) / 10

    return [
        (106168320, 49152, 576, 4, 32, 16.0, 19.2),
        (84934656, 50257, 768, 8, 768, 32.0, 40.0),
        case(4, 64, 8 + 32 / 256),
        case(4, 128, 32.0),
        case(8, 32, 16.0),
    ]


DECODE_LIMIT = Exercise(
    task="""Writing one token after another waits for memory: each token needs every weight of the matrix
    products once, and arithmetic is faster than reading. These are the `block_weights` of all blocks together
    and the output layer's, vocab_size times n_embd. Of the embedding a token looks up one row: leave it out,
    and the cache too. (Where both share one table, it is still read once, as the output layer.) Each weight
    has `bits` bits, and each group of `group_size` weights a scale of `scale_bits` bits: 16, or 8 + 32 / 256
    with NF4's double quantization. Memory reads `bandwidth` GB in a second, where 1 GB is 10⁹ bytes. Return
    the tokens per second that it allows at most, a float.""",
    reference=decode_limit,
    cases=_limit_cases,
    mistakes=(
        Mistake(
            "bits for bytes",
            lambda *case: decode_limit(*case) / 8,
            "The bits were not divided by 8. Bandwidth is in bytes, and a weight of 4 bits is half a byte.",
        ),
        Mistake(
            "the scales are forgotten",
            _without_scales,
            "Only the codes were counted. A scale of 16 bits for each 32 weights is half a bit more for each:"
            " 4-bit weights take 4.5.",
        ),
        Mistake(
            "the embedding is read as a whole",
            lambda block, vocab, width, *rest: decode_limit(block, 2 * vocab, width, *rest),
            "vocab_size times n_embd was counted twice. The output layer is read as a whole; of the"
            " embedding, a token needs one row.",
        ),
        Mistake(
            "the output layer is forgotten",
            lambda block, vocab, *rest: decode_limit(block, 0, *rest),
            "Only the blocks were counted. The output layer is a matrix product as well: a fifth of"
            " SmolLM2-135M's weights.",
        ),
        Mistake(
            "2³⁰ bytes in a GB",
            _in_gibibytes,
            "You took a GB for 2³⁰ bytes; that is a GiB. Bandwidth is given in 10⁹ bytes, and the difference"
            " is 7 percent.",
        ),
        Mistake(
            "seconds per token",
            lambda *case: 1 / decode_limit(*case),
            "This is the time that a token takes. The tokens per second are one over it.",
        ),
    ),
    hints=(
        "How many bytes have to come from memory for one token? And how many come in a second?",
        (
            "With its share of a scale, a weight takes bits + scale_bits / group_size bits. There are"
            " block_weights + vocab_size * n_embd of them."
        ),
        (
            "size = (block_weights + vocab_size * n_embd) * (bits + scale_bits / group_size) / 8; return"
            " bandwidth * 1e9 / size."
        ),
    ),
)


# ---- 2. int8, one scale for each output


def _absmax(
    weight: Tensor, largest: Tensor, top: float = 127, rounded: Callable = torch.round, dim: int = 1
) -> tuple[Tensor, Tensor]:
    """largest: what becomes the code `top`, for each row (dim=1) or column (dim=0)."""
    scales = largest / top
    return rounded(weight / scales.unsqueeze(dim)).to(torch.int8), scales


def _int8_cases(generator: Generator) -> list[tuple[Tensor]]:
    def case(*sizes: int) -> tuple[Tensor]:
        return (
            torch.randn(*sizes, generator=generator) * torch.rand(sizes[0], 1, generator=generator).add(0.1),
        )

    return [
        case(2, 3),
        case(4, 6),
        (case(3, 5)[0] * torch.tensor([[1.0], [0.01], [20.0]]),),
        case(6, 2),
        case(5, 8),
        case(1, 4),
        case(4, 1),
        (-case(3, 5)[0].abs(),),
    ]


ABSMAX_INT8 = Exercise(
    task="""Four bytes hold a weight; one is nearly as good. `weight` is float32 [out, in], as nn.Linear has
    it. Return (codes, scales): codes int8 [out, in], scales float32 [out], so that codes[i, j] * scales[i] is
    as near to weight[i, j] as can be. Each output channel, which is a row, has a scale of its own, and its
    weight of the largest absolute value gets the code 127 or -127. No row is all zeros.""",
    reference=absmax_int8,
    cases=_int8_cases,
    forbids=(absmax_int8,),
    valid=lambda weight: weight.dim() == 2 and weight.numel() > 0 and bool(weight.abs().amax(1).all()),
    mistakes=(
        Mistake(
            "one scale for the whole tensor",
            lambda weight: _absmax(weight, weight.abs().amax().expand(len(weight))),
            "All rows share one scale. A row of small weights then gets only a few of the 255 codes, and one"
            " outlier spoils every row.",
        ),
        Mistake(
            "scales per input",
            lambda weight: _absmax(weight, weight.abs().amax(0), dim=0),
            "There is a scale for each column. Columns are inputs: their scales cannot be taken out of the"
            " sum over the inputs, so they would have to be multiplied in before the product. Take the"
            " maximum over dim 1.",
        ),
        Mistake(
            "divided by 128",
            lambda weight: _absmax(weight, weight.abs().amax(1), 128),
            "int8 goes from -128 to 127, so 128 does not fit: it wraps round to -128, and a row's largest"
            " weight changes its sign.",
        ),
        Mistake(
            "divided by 128, then clamped",
            lambda weight: _absmax(weight, weight.abs().amax(1), 128, lambda x: x.round().clamp(max=127)),
            "With absmax / 128 a positive largest weight would need the code 128. Clamped to 127 it comes out"
            " too small; with / 127 it is exact.",
        ),
        Mistake(
            "cut off, not rounded",
            lambda weight: _absmax(weight, weight.abs().amax(1), rounded=torch.trunc),
            "A cast to int8 drops what is behind the point. All weights move towards 0, by half a step on"
            " average. Round first.",
        ),
        Mistake(
            "absolute value forgotten",
            lambda weight: _absmax(weight, weight.amax(1)),
            "The scale comes from the largest weight, not from the largest absolute value. Weights far below"
            " 0 then leave the range and wrap round.",
        ),
    ),
    hints=(
        (
            "Which dimension of weight goes over the inputs of one output? The maximum of the absolute values"
            " is taken along it."
        ),
        (
            "scales = weight.abs().amax(dim=1) / 127. Divide each row by its own scale, round, and only then"
            " cast to int8."
        ),
        (
            "scales = weight.abs().amax(dim=1) / 127; return (weight / scales[:,"
            " None]).round().to(torch.int8), scales."
        ),
    ),
)


# ---- 3. int4 in groups, with a minimum


def int4_groups(weight: Tensor, group_size: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    return _grouped(weight.view(len(weight), -1, group_size), clip)


def _clamped(x: Tensor) -> Tensor:
    return x.round().clamp(0, 15).to(torch.uint8)


def _in_bytes(x: Tensor) -> Tensor:
    return x.round().to(torch.int16).to(torch.uint8)  # what a cast of a negative float is depends on the CPU


def _grouped(
    groups: Tensor,
    clip: float,
    dim: int = 2,
    steps: int = 15,
    fit: Callable = _clamped,
    symmetric: bool = False,
    clip_low: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """groups: the weight in three dimensions, of which `dim` goes over the weights of a group."""
    low, high = groups.amin(dim, keepdim=True), clip * groups.amax(dim, keepdim=True)
    low = low * (clip if clip_low is None else clip_low)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = (high - low) / steps
    return fit((groups - low) / scales).reshape(len(groups), -1), scales.squeeze(dim), low.squeeze(dim)


def _groups_are_valid(weight: Tensor, group_size: int, clip: float) -> bool:
    """As the task has it, and no weight in the middle between two codes, where right answers may differ."""
    groups = weight.view(len(weight), -1, group_size)
    low, high = groups.aminmax(dim=2, keepdim=True)
    steps = 15 * (groups / clip - low) / (high - low)
    return 0 < clip <= 1 and bool((high > low).all()) and bool(((steps % 1 - 0.5).abs() > 1e-3).all())


def _group_cases(generator: Generator) -> list[tuple[Tensor, int, float]]:
    def case(out: int, groups: int, group_size: int, clip: float) -> tuple[Tensor, int, float]:
        return torch.randn(out, groups * group_size, generator=generator) + 0.2, group_size, clip

    return [
        case(4, 2, 4, 1.0),
        case(8, 3, 4, 0.8),
        case(8, 2, 8, 0.9),
        case(16, 4, 8, 0.75),
        case(6, 5, 3, 0.7),
        case(1, 1, 5, 0.9),
        case(3, 4, 2, 1.0),
    ]


INT4_GROUPS = Exercise(
    task="""Four bits have only 16 codes, too few for a whole row, so a row is cut into groups. `weight` is
    float32 [out, in]; a group is `group_size` weights of one row that lie side by side, and group_size
    divides in. The 16 codes, 0 to 15, are spread evenly from `clip` times the group's smallest weight to
    `clip` times its largest, both included. With clip below 1 the steps get finer, and weights further out
    take the code at the end, 0 or 15. Return (codes, scales, minima): codes uint8 [out, in], one to a byte,
    scales and minima float32 [out, in / group_size]. A weight is about code * scale + minimum. In no group
    are all weights equal.""",
    reference=int4_groups,
    cases=_group_cases,
    forbids=(group_ranges, int4_codes, Int4Weight),
    valid=_groups_are_valid,
    mistakes=(
        Mistake(
            "rounding into bytes before clamping",
            lambda weight, group_size, clip: _grouped(
                weight.view(len(weight), -1, group_size),
                clip,
                fit=lambda x: _in_bytes(x).clamp(0, 15),
            ),
            "The codes became bytes before they were clamped. A byte cannot hold -1: it wraps round to 255,"
            " which clamp makes 15, so that the smallest weights become the largest. Clamp first, then cast.",
        ),
        Mistake(
            "the codes are not clamped",
            lambda weight, group_size, clip: _grouped(
                weight.view(len(weight), -1, group_size), clip, fit=_in_bytes
            ),
            "Weights beyond the ends of the range got codes beyond 0 .. 15: 16 and more above it, and below"
            " it -1, which a byte cannot hold and takes for 255. clamp(0, 15) before the cast holds them at"
            " the ends.",
        ),
        Mistake(
            "the lowest is not clipped",
            lambda weight, group_size, clip: _grouped(
                weight.view(len(weight), -1, group_size), clip, clip_low=1.0
            ),
            "Only the upper end of the range was drawn in. The lower one is clip times the group's smallest"
            " weight.",
        ),
        Mistake(
            "the highest is not clipped",
            lambda weight, group_size, clip: _grouped(
                weight.view(len(weight), -1, group_size), 1.0, clip_low=clip
            ),
            "Only the lower end of the range was drawn in. The upper one is clip times the group's largest"
            " weight.",
        ),
        Mistake(
            "sixteen steps",
            lambda weight, group_size, clip: _grouped(
                weight.view(len(weight), -1, group_size), clip, steps=16
            ),
            "16 codes have 15 steps between them, like fence posts. Divided by 16, the end of the range would"
            " need the code 16: five bits.",
        ),
        Mistake(
            "one range for each row",
            lambda weight, group_size, clip: _grouped(weight.unsqueeze(1), clip),
            "The whole row is one group. One outlier in it makes the steps wide for all its weights: that is"
            " what the groups are for.",
        ),
        Mistake(
            "groups along the outputs",
            lambda weight, group_size, clip: tuple(
                part.T for part in int4_groups(weight.T.contiguous(), group_size, clip)
            ),
            "The groups go down the columns. They belong along the inputs: a product reads row after row, and"
            " finds a group's weights together.",
        ),
        Mistake(
            "groups of scattered weights",
            lambda weight, group_size, clip: _grouped(weight.view(len(weight), group_size, -1), clip, dim=1),
            "The view was [out, group_size, groups], so a group takes every n-th weight. Side by side is"
            " [out, groups, group_size].",
        ),
        Mistake(
            "the same range on both sides of zero",
            lambda weight, group_size, clip: _grouped(
                weight.view(len(weight), -1, group_size), clip, symmetric=True
            ),
            "The range goes from -absmax to absmax. Where the weights of a group reach further to one side,"
            " codes on the other are wasted.",
        ),
        Mistake(
            "clip is forgotten",
            lambda weight, group_size, clip: int4_groups(weight, group_size, 1.0),
            "The range is the group's own. It is to be drawn in: multiply smallest and largest by clip before"
            " anything else.",
        ),
    ),
    hints=(
        "Give the groups a dimension of their own with view; then it is amin and amax along that dimension.",
        (
            "groups = weight.view(out, -1, group_size); scale = (high - low) / 15, since 16 codes have 15"
            " steps between them. Round, clamp, then cast."
        ),
        (
            "low = clip * groups.amin(2, keepdim=True), high likewise; codes = ((groups - low) /"
            " scale).round().clamp(0, 15).to(torch.uint8), viewed as weight again; squeeze(2) for scales and"
            " minima."
        ),
    ),
)


# ---- 4. two codes in a byte


def pack_int4(codes: Tensor) -> Tensor:
    return _pair(codes[:, 0::2] + 8, codes[:, 1::2] + 8)


def _pair(low: Tensor, high: Tensor) -> Tensor:
    return low.to(torch.uint8) | high.to(torch.uint8) << 4


def _differing_byte(yours: Any, right: Tensor) -> str | None:
    """The first byte that differs, as the two codes in it."""
    if not isinstance(yours, Tensor) or yours.dtype != torch.uint8 or yours.shape != right.shape:
        return None
    wrong = (yours != right).nonzero().tolist()
    if not wrong:
        return None
    row, byte = wrong[0]
    (low, high), (right_low, right_high) = (
        (int(codes[row, byte]) % 16, int(codes[row, byte]) // 16) for codes in (yours, right)
    )
    return (
        f"Byte {byte} of row {row} has {low} in its low four bits and {high} in its high four; they should be"
        f" {right_low} and {right_high}."
    )


def _explain_packed(yours: Any, codes: Tensor) -> str | None:
    return _differing_byte(yours, pack_int4(codes))


def _pack_cases(generator: Generator) -> list[tuple[Tensor]]:
    sizes = (2, 6), (4, 8), (2, 2), (6, 10), (1, 4), (3, 2)
    small = torch.tensor([[-8, 7, 0, 1], [1, -1, 5, -5]], dtype=torch.int8)
    return [(small,)] + [(torch.randint(-8, 8, size, generator=generator).to(torch.int8),) for size in sizes]


PACK_INT4 = Exercise(
    task="""Memory is addressed in bytes: four bits save it only if two codes share a byte. `codes` is
    int8 [rows, columns], from -8 to 7, and columns is even. Add 8, so that all are from 0 to 15. Then put
    each two neighbours of a row into one byte: the first in the low four bits, the second in the high four.
    Return uint8 [rows, columns / 2].""",
    reference=pack_int4,
    cases=_pack_cases,
    forbids=(Int4Weight,),
    valid=lambda codes: codes.dim() == 2 and codes.numel() > 0 and codes.size(1) % 2 == 0,
    explain=_explain_packed,
    mistakes=(
        Mistake(
            "nibbles swapped",
            lambda codes: _pair(codes[:, 1::2] + 8, codes[:, 0::2] + 8),
            "The first code is in the high bits. bitsandbytes does it so; here it is the low ones. Whoever"
            " unpacks in the other order gets every two weights exchanged, and a model that writes nonsense.",
        ),
        Mistake(
            "halves instead of neighbours",
            lambda codes: _pair(*(codes + 8).chunk(2, dim=1)),
            "A byte holds one code of the left half and one of the right. GGUF packs each of its blocks like"
            " this; here it is neighbours.",
        ),
        Mistake(
            "not offset",
            lambda codes: _pair(codes[:, 0::2] & 15, codes[:, 1::2]),
            "The lowest four bits of a code were kept as they are, so -1 became 15 instead of 7. It is a"
            " format too, but another one: add 8 first.",
        ),
        Mistake(
            "the sign spills over",
            lambda codes: _pair(codes[:, 0::2], codes[:, 1::2]),
            "A negative int8 has ones in its high bits, and they cover the other code. Add 8, and the high"
            " bits are 0.",
        ),
        Mistake(
            "pairs from two rows",
            lambda codes: _pair(codes[0::2] + 8, codes[1::2] + 8),
            "Rows were paired, not columns. Each row is an output channel: to read one, two would have to be"
            " unpacked.",
        ),
    ),
    hints=(
        "codes[:, 0::2] are the first of each pair. How does a number move into the high four bits?",
        (
            "Add 8 and cast to uint8 before shifting: a shift by 4 does not fit into int8. Then join both"
            " with |."
        ),
        "u = (codes + 8).to(torch.uint8); return u[:, 0::2] | (u[:, 1::2] << 4).",
    ),
)


# ---- 5. a linear layer with packed weights


class QuantizedLinear(nn.Module):
    """The reference; what can go wrong has a method of its own, which mistakes override."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, linear: nn.Linear, group_size: int):
        super().__init__()
        weight = linear.weight.detach()
        groups = self.grouped(weight, group_size)
        exact = self.ranges(groups)
        stored = tuple(part.bfloat16() for part in exact)
        codes = self.rounded(groups, exact, stored)
        self.keep(self.pack(codes.reshape(weight.shape)), *stored)
        self.bias = linear.bias

    def grouped(self, weight: Tensor, group_size: int) -> Tensor:
        """[out, groups, group_size]."""
        return weight.unflatten(1, (-1, group_size))

    def ranges(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = groups.aminmax(dim=2)
        scale = (high - low) / 15
        return scale, low + 8 * scale

    def rounded(self, groups: Tensor, exact: tuple, stored: tuple) -> Tensor:
        """The codes, from 0 to 15."""
        scale, zero = (part.float().unsqueeze(2) for part in stored)
        return self.clamped(((groups - zero) / torch.where(scale == 0, 1.0, scale)).round() + 8)

    def clamped(self, codes: Tensor) -> Tensor:
        return codes.clamp(0, 15).to(torch.uint8)

    def pack(self, codes: Tensor) -> Tensor:
        return codes[:, 0::2] | codes[:, 1::2] << 4

    def keep(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def unpack(self) -> Tensor:
        """The codes, from 0 to 15: [out, in]."""
        return torch.stack([self.codes & 15, self.codes >> 4], 2).flatten(1)

    def unpacked(self) -> Tensor:
        groups = self.unpack().float().unflatten(1, (self.scale.size(1), -1))
        return ((groups - 8) * self.scale.float().unsqueeze(2) + self.zero.float().unsqueeze(2)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked(), self.bias)


class _Swapped(QuantizedLinear):
    def pack(self, codes: Tensor) -> Tensor:
        return codes[:, 1::2] | codes[:, 0::2] << 4

    def unpack(self) -> Tensor:
        return torch.stack([self.codes >> 4, self.codes & 15], 2).flatten(1)


class _HalvesPacked(QuantizedLinear):
    def pack(self, codes: Tensor) -> Tensor:
        low, high = codes.chunk(2, dim=1)
        return low | high << 4

    def unpack(self) -> Tensor:
        return torch.cat([self.codes & 15, self.codes >> 4], 1)


class _Unpacked(QuantizedLinear):
    def pack(self, codes: Tensor) -> Tensor:
        return codes

    def unpack(self) -> Tensor:
        return self.codes


class _PlainAttributes(QuantizedLinear):
    def keep(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero


class _KeptAtFirst(QuantizedLinear):
    made: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = self.unpacked()
        return F.linear(x, self.made, self.bias)


class _ExactCodes(QuantizedLinear):
    def rounded(self, groups: Tensor, exact: tuple, stored: tuple) -> Tensor:
        return super().rounded(groups, exact, exact)


class _NotClamped(QuantizedLinear):
    def clamped(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int16).to(torch.uint8) & 15


class _DividedByZero(QuantizedLinear):
    def rounded(self, groups: Tensor, exact: tuple, stored: tuple) -> Tensor:
        scale, zero = (part.float().unsqueeze(2) for part in stored)
        steps = (groups - zero) / scale
        return self.clamped(steps.round().nan_to_num(-8.0) + 8)  # what a cast of NaN is depends on the CPU


class _ZeroIsTheLowest(QuantizedLinear):
    def ranges(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = groups.aminmax(dim=2)
        return (high - low) / 15, low

    def rounded(self, groups: Tensor, exact: tuple, stored: tuple) -> Tensor:
        scale, zero = (part.float().unsqueeze(2) for part in stored)
        return self.clamped(((groups - zero) / torch.where(scale == 0, 1.0, scale)).round())

    def unpacked(self) -> Tensor:
        groups = self.unpack().float().unflatten(1, (self.scale.size(1), -1))
        return (groups * self.scale.float().unsqueeze(2) + self.zero.float().unsqueeze(2)).flatten(1)


class _LowestAsZero(QuantizedLinear):
    """Only the range is that of code 0; all else counts from code 8."""

    def ranges(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = groups.aminmax(dim=2)
        return (high - low) / 15, low


class _HalvesUnpacked(QuantizedLinear):
    def unpack(self) -> Tensor:
        return torch.cat([self.codes & 15, self.codes >> 4], 1)


class _UnpackedInBfloat16(QuantizedLinear):
    def unpacked(self) -> Tensor:
        groups = self.unpack().bfloat16().unflatten(1, (self.scale.size(1), -1))
        return ((groups - 8) * self.scale.unsqueeze(2) + self.zero.unsqueeze(2)).flatten(1).float()


class _ScatteredGroups(QuantizedLinear):
    def grouped(self, weight: Tensor, group_size: int) -> Tensor:
        return weight.unflatten(1, (group_size, -1)).transpose(1, 2)


class _NoBias(QuantizedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked())


class _BiasAsBuffer(QuantizedLinear):
    def __init__(self, linear: nn.Linear, group_size: int):
        super().__init__(linear, group_size)
        if linear.bias is not None:
            bias = linear.bias.detach().clone()
            del self.bias
            self.register_buffer("bias", bias)


class _NoGradient(QuantizedLinear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


def _explain_linear(yours: Any, weight: Tensor, bias: Tensor | None, group_size: int) -> str | None:
    """Of packed codes, which are wrong."""
    linear = nn.Linear(weight.size(1), len(weight))
    linear.weight.data.copy_(weight)
    return _differing_byte(yours, QuantizedLinear(linear, group_size).codes)


def _linear_cases(generator: Generator) -> list[tuple]:
    def case(
        out: int, groups: int, group_size: int, *, bias: bool = True, mean: float = 0.0, spread: float = 1.0
    ) -> tuple:
        weight = mean + spread * torch.randn(out, groups * group_size, generator=generator)
        own = torch.randn(out, generator=generator) if bias else None
        return weight, own, group_size

    constant = case(3, 2, 4, bias=False)
    constant[0][1, 4:] = 0.25
    constant[0][2, :4] = 0.0
    return [
        case(2, 1, 4, bias=False),
        case(3, 2, 4),
        case(1, 3, 2),
        constant,
        case(5, 3, 6),
        case(8, 4, 16),
        case(4, 2, 8, mean=3.0, spread=0.05),
        case(16, 2, 32, bias=False, mean=-0.4),
        case(3, 2, 4, spread=0.001),
    ]


def _tensors_of(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object holds: a module's parameters and buffers, and what hides in attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from _tensors_of(vars(value), seen)
    elif isinstance(value, dict):
        yield from (t for part in list(value.values()) for t in _tensors_of(part, seen))
    elif isinstance(value, list | tuple | set):
        yield from (t for part in list(value) for t in _tensors_of(part, seen))


def _held_bytes(module: nn.Module) -> int:
    """Bytes of the memory that a module's tensors keep, what is shared counted once."""
    storages = {}
    for tensor in _tensors_of(module, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _made(answer: Callable, linear: nn.Linear, group_size: int) -> nn.Module:
    """The learner's layer. Raises NotRight where its tensors are not where they should be."""
    module = answer(linear, group_size)
    if not isinstance(module, nn.Module):
        raise NotRight(f"it makes {type(module).__name__}, and an nn.Module is wanted: class ...(nn.Module).")
    saved = module.state_dict()
    for name in ("codes", "scale", "zero"):
        if name in saved:
            continue
        if isinstance(getattr(module, name, None), Tensor):
            raise NotRight(
                f"`{name}` is a plain attribute, so it is not saved, and does not move with the model:"
                f' self.register_buffer("{name}", ...).'
            )
        raise NotRight(f"it has no buffer `{name}`; the task asks for `codes`, `scale` and `zero`.")
    for name in ("codes", "scale", "zero"):
        if isinstance(getattr(module, name), nn.Parameter):
            raise NotRight(f"`{name}` is a parameter, and the weight is not trained: make it a buffer.")
    if linear.bias is not None and getattr(module, "bias", None) is not linear.bias:
        raise NotRight("`bias` should be the layer's own parameter: self.bias = linear.bias.")
    surplus = saved.keys() - {"codes", "scale", "zero", "bias"}
    if surplus:
        raise NotRight(f"it keeps more than the task names: {', '.join(sorted(surplus))}.")
    return module


def _observe_linear(
    answer: Callable, weight: Tensor, bias: Tensor | None, group_size: int
) -> Iterator[tuple[str, Any]]:
    def layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        linear = nn.Linear(weight.size(1), len(weight), bias=bias is not None)
        linear.weight.data.copy_(weight)
        if bias is not None:
            linear.bias.data.copy_(bias)
        return linear

    linear = layer(weight, bias)
    module = _made(answer, linear, group_size)
    if not torch.equal(linear.weight, weight):
        raise NotRight("it changed the weight of the layer that it was given.")
    yield "codes", module.codes
    yield "scale", module.scale
    yield "zero", module.zero
    yield "the bias", None if module.bias is None else module.bias.detach()
    linear.weight.data.zero_()  # whoever still looks there is found out
    del linear
    yield "unpacked()", building.method(module, "unpacked")()
    x = torch.randn(3, weight.size(1), generator=Generator().manual_seed(weight.size(1)))
    yield "the output", module(x).detach()
    yield "the output for [2, 3, in]", module(torch.stack([x, -x])).detach()
    yield "the output for [in]", module(x[0]).detach()
    x = x.clone().requires_grad_()
    y = module(x)
    if not y.requires_grad:
        raise NotRight("no gradient goes back to the input: the layers before this one could not learn.")
    yield "the gradient of x", torch.autograd.grad(building.weighted(y), x)[0]
    allowed = sum(tensor.nbytes for tensor in module.state_dict().values())
    held = _held_bytes(module)
    if held > allowed + weight.nbytes // 2:
        raise NotRight(
            f"the codes, ranges and bias take {allowed} bytes, and the layer holds {held}: a copy of the"
            f" weight as floats is kept somewhere, and nothing is saved. Unpack it anew at each call."
        )
    other = layer(weight.flip(0) * 2 - 0.1, bias)
    again = _made(answer, other, group_size)
    again(x)
    again.load_state_dict(module.state_dict())
    yield "the output after its state was loaded into another", again(x).detach()


QUANTIZED_LINEAR = Exercise(
    task="""Build a linear layer that holds its weight in 4 bits, and a byte holds two.
    `QuantizedLinear(linear, group_size)` is made from an nn.Linear, whose weight is float32 [out, in]; a
    group is `group_size` weights of a row that lie side by side, and group_size divides in, which is even.

    - For each group, `scale` is (highest - lowest) / 15, and `zero`, for which code 8 stands, lowest + 8
      scale. Both are worked out in float32, then kept as buffers in bfloat16 [out, in / group_size].
    - The code of a weight is (weight - zero) / scale, rounded, plus 8, and held within 0 .. 15; computed in
      float32 from the scale and zero *as they are kept*, since they are what it will be unpacked with. Where
      all weights of a group are equal, scale is 0, and their codes are 8.
    - The buffer `codes` is uint8 [out, in / 2]: column 2j in the low four bits of byte j, column 2j + 1 in
      the high four.
    - `bias` is the linear layer's own parameter, or None.
    - `unpacked()` returns scale (code - 8) + zero for each weight: float32 [out, in].
    - `forward(x)`, with x [..., in], returns what nn.Linear would with that weight, [..., out]. Gradients
      flow to x.

    Nothing else is kept: after a call, too, the layer holds the bytes of these four, and no floats of the
    weight's size. `linear` stays as it is.""",
    reference=QuantizedLinear,
    cases=_linear_cases,
    observe=_observe_linear,
    explain=_explain_linear,
    points=3,
    forbids=(Int4Weight, group_ranges, int4_codes, quantize),
    valid=lambda weight, bias, group_size: (
        weight.dim() == 2
        and group_size > 0
        and weight.size(1) % group_size == 0
        and weight.size(1) % 2 == 0
        and (bias is None or len(bias) == len(weight))
    ),
    stub="""class QuantizedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, group_size: int):
        super().__init__()
        # your code here: the buffers codes, uint8 [out, in / 2], and
        # scale and zero, bfloat16 [out, in / group_size]; and self.bias
        ...

    def unpacked(self) -> Tensor:
        # float32 [out, in]
        # your code here
        ...

    def forward(self, x: Tensor) -> Tensor:
        # [..., in] -> [..., out]
        # your code here
        ...
""",
    mistakes=(
        Mistake(
            "nibbles swapped",
            _Swapped,
            "Each byte has its two codes the other way round. The layer itself unpacks them rightly, but"
            " another program that reads the file would get every two weights exchanged.",
        ),
        Mistake(
            "halves of a row in a byte",
            _HalvesPacked,
            "A byte holds a column of the left half and one of the right. Here neighbours share a byte:"
            " columns 2j and 2j + 1.",
        ),
        Mistake(
            "a byte for each code",
            _Unpacked,
            "Each code has a byte of its own, so 4 bits take as much memory as 8. Shift the second of each"
            " two neighbours up by four bits, and join them with |.",
        ),
        Mistake(
            "no buffers",
            _PlainAttributes,
            "The tensors are plain attributes of the object: state_dict does not see them, so they are"
            " neither saved nor moved to a GPU. register_buffer makes them a part of the module.",
        ),
        Mistake(
            "the weight is kept as floats",
            _KeptAtFirst,
            "A copy of the weight as floats stays: the one that came in, or the one that was unpacked at the"
            " first call. The layer then holds 32 bits for each weight besides the codes, and is larger than"
            " before it was quantized.",
        ),
        Mistake(
            "codes of ranges that are not kept",
            _ExactCodes,
            "The codes were worked out with scale and zero in float32, but unpacked they meet their roundings"
            " to bfloat16. Round scale and zero first, then find the codes that are nearest with them.",
        ),
        Mistake(
            "the codes are not held within 0 .. 15",
            _NotClamped,
            "A code of -1 or 16 has more than four bits, and wraps round to the other end of the range. It"
            " happens, since scale and zero were rounded to bfloat16 and the ends no longer fit exactly.",
        ),
        Mistake(
            "a division by a scale of 0",
            _DividedByZero,
            "In a group of equal weights the scale is 0, and 0 / 0 is NaN, which no code can be. Divide by 1"
            " there; the code is then 8.",
        ),
        Mistake(
            "zero is the lowest weight",
            _ZeroIsTheLowest,
            "Your `zero` is what code 0 stands for. That is a format too, as the minima of int4_groups; here"
            " it is what code 8 stands for, lowest + 8 scale, which PyTorch's kernels want.",
        ),
        Mistake(
            "zero is the lowest weight, and codes count from 8",
            _LowestAsZero,
            "Your `zero` is the lowest weight, and the 8 is still added to the codes. Those of the group's"
            " upper half then end up beyond 15. `zero` is lowest + 8 scale.",
        ),
        Mistake(
            "unpacked as halves",
            _HalvesUnpacked,
            "The codes are packed rightly, but unpacked in another order: first all of the low four bits,"
            " then all of the high ones. Neighbours share a byte, so both have to be interleaved: torch.stack"
            " along a new last dimension, then flatten.",
        ),
        Mistake(
            "unpacked in bfloat16",
            _UnpackedInBfloat16,
            "unpacked() computes in bfloat16, which keeps 8 binary digits, and rounds at each step; what"
            " comes out is float32 in name only. Turn codes, scale and zero into float32 first.",
        ),
        Mistake(
            "groups of scattered weights",
            _ScatteredGroups,
            "A group takes every n-th weight of a row: the row was cut into [group_size, groups]. Side by"
            " side is [groups, group_size].",
        ),
        Mistake(
            "the bias is forgotten",
            _NoBias,
            "The product is right, and the bias is not added.",
        ),
        Mistake(
            "the bias is no parameter",
            _BiasAsBuffer,
            "The bias became a buffer, a copy. It is not quantized, and goes on as the parameter that it was:"
            " self.bias = linear.bias.",
        ),
        Mistake(
            "no gradient to the input",
            _NoGradient,
            "forward computes without gradients. The weight is not trained, but the layers before this one"
            " may be, as with LoRA in week 9: their gradient comes through here.",
        ),
    ),
    hints=(
        (
            "Three steps in `__init__`: ranges of weight.detach().unflatten(1, (-1, group_size)), codes from"
            " the rounded ranges, and packing as in the exercise before, without the offset."
        ),
        (
            "low, high = groups.aminmax(dim=2); scale = (high - low) / 15; zero = low + 8 * scale; both"
            " .bfloat16(). With s and z their floats, [out, groups, 1]: codes = ((groups - z) / s).round() +"
            " 8, where s is 1 if it is 0. Clamp, then .to(torch.uint8)."
        ),
        (
            "unpacked: torch.stack([self.codes & 15, self.codes >> 4], 2).flatten(1).float(), then"
            " unflatten(1, (groups, -1)), and (codes - 8) * scale + zero with .float().unsqueeze(2) of both,"
            " flatten(1). forward: F.linear(x, self.unpacked(), self.bias)."
        ),
    ),
)


# ---- 6. every linear layer of a model


def swap_linears(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], skip: Collection[str] = ()
) -> nn.Module:
    for name in _names_to_swap(model, skip):
        _put(model, name, make)
    return model


def _names_to_swap(model: nn.Module, skip: Collection[str], kind: type = nn.Linear) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kind) and not any(fnmatchcase(name, pattern) for pattern in skip)
    ]


def _put(model: nn.Module, name: str, make: Callable[[nn.Linear], nn.Module], keep_mode: bool = True) -> None:
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    new = make(old)
    setattr(model.get_submodule(parent), child, new.train(old.training) if keep_mode else new)


def _swap_children(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    for name in [name for name in _names_to_swap(model, skip) if "." not in name]:
        _put(model, name, make)
    return model


def _swap_a_copy(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    return swap_linears(copy.deepcopy(model), make, skip)


def _swap_again(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    """The new ones are walked, too."""
    swap_linears(model, make, skip)
    return swap_linears(model, make, skip)


def _skip_whole_names(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    for name in [name for name in _names_to_swap(model, ()) if name not in skip]:
        _put(model, name, make)
    return model


def _skip_last_names(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    """Walked child by child: the patterns meet names without the path to them."""
    for name in _names_to_swap(model, ()):
        if not any(fnmatchcase(name.rpartition(".")[2], pattern) for pattern in skip):
            _put(model, name, make)
    return model


def _swap_in_new_mode(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    for name in _names_to_swap(model, skip):
        _put(model, name, make, keep_mode=False)
    return model


def _swap_and_train(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    return swap_linears(model, make, skip).train(model.training)


def _swap_exact_type(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    for name in _names_to_swap(model, skip):
        if type(model.get_submodule(name)) is nn.Linear:
            _put(model, name, make)
    return model


def _swap_on_the_model(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    for name in _names_to_swap(model, skip):
        old = model.get_submodule(name)
        setattr(model, name, make(old).train(old.training))
    return model


def _swap_quietly(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> None:
    swap_linears(model, make, skip)


def _ignore_skip(model: nn.Module, make: Callable, skip: Collection[str] = ()) -> nn.Module:
    return swap_linears(model, make)


class _OtherLinear(nn.Linear):
    """A subclass, such as the GPT's own."""


class _Wrapped(nn.Module):
    """What a layer is swapped for here: it holds the old one, as LoRA's layers do."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "Linear": lambda n: nn.Linear(n, n),
    "OtherLinear": lambda n: _OtherLinear(n, n),
    "LayerNorm": nn.LayerNorm,
    "ReLU": lambda n: nn.ReLU(),
}
"""What a case's model is made of, by the word for it."""


def _model_of(parts: dict[str, Any], n: int) -> nn.Module:
    """parts: by name a word of LAYERS, or the parts of a module inside."""
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, _model_of(part, n) if isinstance(part, dict) else LAYERS[part](n))
    return model


def _swap_cases(generator: Generator) -> list[tuple]:
    def case(parts: dict, skip: tuple[str, ...] = (), frozen: tuple[str, ...] = ()) -> tuple:
        return parts, random_int(generator, 2, 90), list(skip), list(frozen)

    mlp = {"up_proj": "Linear", "act": "ReLU", "down_proj": "Linear"}
    block = {"norm": "LayerNorm", "attn": {"q_proj": "Linear", "o_proj": "Linear"}, "mlp": mlp}
    gpt = {"blocks": {"0": block, "1": block}, "norm": "LayerNorm", "lm_head": "Linear"}
    return [
        case({"up": "Linear", "act": "ReLU"}),
        case({"act": "ReLU", "mlp": mlp}),
        case({"norm": "LayerNorm", "act": "ReLU"}),
        case({"first": "OtherLinear", "second": "Linear"}),
        case({"first": "Linear", "mlp": mlp}, frozen=("first", "mlp.down_proj")),
        case({"mlp": mlp}, frozen=("", "mlp", "mlp.up_proj", "mlp.act", "mlp.down_proj")),
        case({"up": "Linear", "mlp": {"down_proj": "Linear"}}, skip=("*.down_proj",)),
        case(gpt, skip=("lm_head",)),
        case(gpt, skip=("blocks.0.*", "*.down_proj")),
        case({"up": "Linear", "inner": {"up": "Linear"}}, skip=("up",)),
    ]


def _observe_swap(
    answer: Callable, parts: dict[str, Any], n: int, skip: list[str], frozen: list[str]
) -> Iterator[tuple[str, Any]]:
    model = _model_of(parts, n)
    for name, module in model.named_modules():
        module.training = name not in frozen
    before = dict(model.named_modules())
    given: list[nn.Module] = []

    def make(linear: nn.Linear) -> nn.Module:
        given.append(linear)
        if len(given) > 100:
            raise NotRight("make is called without an end: what it made is looked through again.")
        return _Wrapped(linear)

    result = answer(model, make, tuple(skip)) if skip else answer(model, make)
    if isinstance(result, nn.Module) and result is not model:
        raise NotRight(
            "it returns another model, and the one that it was given should itself be changed: whoever holds"
            " that would not see what was swapped."
        )
    walked = list(model.named_modules())
    inside = {f"{name}.linear" for name, module in walked if isinstance(module, _Wrapped)}
    seen = [(name, m) for name, m in walked if name not in inside or m not in given]
    yield "what the model is made of", [f"{name}: {type(m).__name__}" for name, m in seen if name]
    after = dict(seen)
    names = {module: name for name, module in before.items()}
    yield "what make was given", sorted(names.get(linear, "something new") for linear in given)
    for name, module in after.items():
        if isinstance(module, _Wrapped) and module.linear is not before[name]:
            raise NotRight(f"`{name}` was made from another layer, and should be made from the one there.")
    yield "what it returns", "the model" if result is model else type(result).__name__
    yield "which are in training mode", [name for name, module in after.items() if module.training]
    kept = [name for name, module in after.items() if not isinstance(module, _Wrapped)]
    if any(after[name] is not before[name] for name in kept):
        raise NotRight("a module that is no linear layer was replaced by another.")


SWAP_LINEARS = Exercise(
    task="""Now the surgery: `swap_linears(model, make, skip)` replaces every nn.Linear in `model`, however
    deep inside and subclasses of nn.Linear too, by `make(linear)`, in place, and returns the model. The model
    itself is no nn.Linear, and no layer stands at two places in it.

    - make is called once for each layer that is replaced. What it returns may hold the old layer inside,
      which is not replaced again.
    - A layer whose name, as model.named_modules() gives it, fits a pattern of `skip` stays.
      fnmatch.fnmatchcase(name, pattern) says whether one fits: skip=("lm_head",) or ("blocks.0.*",). With no
      skip given, none stays.
    - Each new module is in training mode or not as the layer was that it replaces. All other modules stay,
      with their modes, and the order of the names too.""",
    reference=swap_linears,
    cases=_swap_cases,
    observe=_observe_swap,
    points=3,
    forbids=(swap_modules,),
    stub="""def swap_linears(
    model: nn.Module,
    make: Callable[[nn.Linear], nn.Module],
    skip: tuple[str, ...] = (),
) -> nn.Module:
    # your code here
    ...
""",
    mistakes=(
        Mistake(
            "only the model's own children",
            _swap_children,
            "Linear layers that stand inside of another module were not found. named_children looks one level"
            " deep; named_modules gives all.",
        ),
        Mistake(
            "a name with dots is set on the model itself",
            _swap_on_the_model,
            'setattr(model, "mlp.up_proj", new) does not go down to mlp: it adds a module to the model, under'
            " a name with a dot in it, and the old layer still stands where it was. The parent is"
            ' model.get_submodule("mlp"), and the attribute "up_proj".',
        ),
        Mistake(
            "what was made is swapped again",
            _swap_again,
            "The new modules were looked through, too, and the old layer inside of each was swapped once"
            " more. Make the list of names first, list(model.named_modules()), and swap then.",
        ),
        Mistake(
            "a copy is swapped",
            _swap_a_copy,
            "The model was copied, and the copy changed. In place means that the model which came in is the"
            " one that is changed; a copy also takes its memory a second time.",
        ),
        Mistake(
            "nothing is returned",
            _swap_quietly,
            "The model is swapped rightly, but the function returns None. `return model` lets one write model"
            " = swap_linears(model, make).",
        ),
        Mistake(
            "skip is forgotten",
            _ignore_skip,
            "Layers whose names fit a pattern of skip were replaced all the same.",
        ),
        Mistake(
            "skip is compared by the whole name",
            _skip_whole_names,
            'A pattern such as "blocks.0.*" stands for many names. `in` finds only names that are written'
            " out; fnmatchcase compares with patterns.",
        ),
        Mistake(
            "skip meets the last part of the name",
            _skip_last_names,
            "The patterns were compared with a layer's name inside of its parent. The whole name is meant,"
            ' with the path: "blocks.0.mlp.up_proj".',
        ),
        Mistake(
            "new modules are always in training mode",
            _swap_in_new_mode,
            "A new module is in training mode, whatever the model is in. In a model that was set to eval(), a"
            " dropout inside would go on dropping. new.train(old.training) takes the mode over.",
        ),
        Mistake(
            "the whole model's mode for all",
            _swap_and_train,
            "model.train(...) set the mode of every module. Some may be frozen in eval mode while the rest"
            " trains: each new one takes over the mode of the layer that it replaces.",
        ),
        Mistake(
            "subclasses are left out",
            _swap_exact_type,
            "type(module) is nn.Linear is false for a subclass, such as the GPT's own linear layer, which"
            " draws its weights differently. isinstance finds both.",
        ),
    ),
    hints=(
        "A module cannot replace itself: it is its parent's attribute that changes. Which parent, which"
        " name?",
        (
            "for name, old in list(model.named_modules()): name.rpartition('.') gives the parent's name and"
            " the child's; model.get_submodule gives the parent, and of '' the model."
        ),
        (
            "if isinstance(old, nn.Linear) and not any(fnmatchcase(name, p) for p in skip): parent, _, child"
            " = name.rpartition('.'); setattr(model.get_submodule(parent), child,"
            " make(old).train(old.training)). At the end, return model."
        ),
    ),
)


# ---- 7. NF4


def nf4_codes(weight: Tensor, block_size: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    return nearest_levels(weight, levels, block_size)


def _leveled(
    weight: Tensor, block_size: int, nearest: Callable, measure: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """nearest: codes from normalised weights; measure: what [blocks, block_size] is divided by, the absmax if
    not given.
    """
    blocks = weight.view(-1, block_size)
    divisors = measure(blocks) if measure else blocks.abs().amax(1)
    return nearest(blocks / divisors[:, None]).to(torch.uint8).flatten(), divisors


def _closest(x: Tensor, levels: Tensor) -> Tensor:
    return (x[..., None] - levels).abs().argmin(-1).to(torch.uint8)


def _nf4_is_valid(weight: Tensor, block_size: int, levels: Tensor) -> bool:
    """As the task has it, and no weight in the middle between two levels, where right answers may differ."""
    is_scale = len(levels) == 16 and bool((levels.diff() > 0.01).all())
    if not is_scale or levels[0] != -1 or levels[-1] != 1:
        return False
    blocks = weight.view(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    middles = (levels[1:] + levels[:-1]) / 2
    near = ((blocks / absmax)[..., None] - middles).abs().amin()
    return bool((absmax > 0).all()) and bool(near > 1e-4)


def _nf4_cases(generator: Generator) -> list[tuple[Tensor, int, Tensor]]:
    def case(blocks: int, block_size: int, levels: Tensor) -> tuple[Tensor, int, Tensor]:
        sizes = 0.02 + torch.rand(blocks, 1, generator=generator)
        return (torch.randn(blocks, block_size, generator=generator) * sizes).flatten(), block_size, levels

    nf4, others = (
        torch.tensor(NF4),
        torch.cat([torch.tensor([-1.0, 1.0]), 2 * torch.rand(14, generator=generator) - 1]).sort().values,
    )
    return [case(2, 4, nf4), case(3, 16, nf4), case(4, 64, nf4), case(6, 8, others), case(2, 32, others)]


NF4_CODES = Exercise(
    task="""Weights are distributed like a bell: many near 0, few far away. NF4's 16 `levels` are dense where
    the weights are; they are float32 [16], sorted, from -1 to 1. `weight` is float32 [n], cut into blocks of
    `block_size`, which divides n; no block is all zeros. Divide each block by its largest absolute value. The
    code of a weight is the number of the level nearest to what comes out, 0 to 15. Return (codes, absmax):
    codes uint8 [n], absmax float32 [n / block_size].""",
    reference=nf4_codes,
    cases=_nf4_cases,
    forbids=(nearest_levels,),
    valid=_nf4_is_valid,
    mistakes=(
        Mistake(
            "not normalised",
            lambda weight, size, levels: (_closest(weight, levels), nf4_codes(weight, size, levels)[1]),
            "The codes are those of the weights as they are. The levels reach from -1 to 1, and small weights"
            " would use only the middle ones.",
        ),
        Mistake(
            "one absmax for everything",
            lambda weight, size, levels: nf4_codes(weight, len(weight), levels),
            "All weights were divided by one number. Each block has its own: an outlier then spoils only the"
            " block that it is in.",
        ),
        Mistake(
            "the next level above",
            lambda weight, size, levels: _leveled(weight, size, lambda x: torch.searchsorted(levels, x)),
            "searchsorted and bucketize find the first level that is not below the value, not the nearest"
            " one. Give them the 15 midpoints between the levels.",
        ),
        Mistake(
            "evenly spaced",
            lambda weight, size, levels: _leveled(weight, size, lambda x: (7.5 * (x + 1)).round()),
            "The code was worked out as if the levels were evenly spaced. They are not: compare with the"
            " values in `levels`.",
        ),
        Mistake(
            "the maximum without the absolute value",
            lambda weight, size, levels: _leveled(
                weight, size, lambda x: _closest(x, levels), lambda blocks: blocks.amax(1)
            ),
            "Blocks were divided by their largest weight. Where the most extreme one is negative, values fall"
            " below -1, where there is no level.",
        ),
        Mistake(
            "divided by the standard deviation",
            lambda weight, size, levels: _leveled(
                weight, size, lambda x: _closest(x, levels), lambda blocks: blocks.std(1)
            ),
            "The levels were made with a normal distribution, but so that the outermost are -1 and 1. The"
            " block is divided by its absmax.",
        ),
    ),
    hints=(
        (
            "weight.view(-1, block_size) has a block in each row. How far is each number from each of the 16"
            " levels?"
        ),
        (
            "Divide by absmax[:, None], then subtract: x[..., None] - levels has a last dimension of 16."
            " Where is the absolute value smallest?"
        ),
        (
            "blocks = weight.view(-1, block_size); absmax = blocks.abs().amax(1); distance = (blocks /"
            " absmax[:, None])[..., None] - levels; codes ="
            " distance.abs().argmin(-1).to(torch.uint8).flatten()."
        ),
    ),
)


# ---- 8. a product of codes


def int8_linear(x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    return _product(x, codes) * x_scales[:, None] * scales + bias


class _FloatWeights(TorchFunctionMode):
    """Notes, inside, whether floats of a weight's shape are made."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shapes = (tuple(shape), tuple(shape)[::-1])
        self.made = False

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.made |= tuple(result.shape[-2:]) in self.shapes
        return result


def _observe_product(
    answer: Callable, x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor
) -> Iterator[tuple[str, Any]]:
    with _FloatWeights(codes.shape) as watch:
        result = answer(x, x_scales, codes, scales, bias)
    yield "", result
    if watch.made and len({*x.shape, len(codes)}) == 3:  # where the shape tells a weight from all else
        raise NotRight(
            "it makes floats of the weight's shape: that is int8 by way of float weights, with four bytes for"
            " each again. Multiply the codes as int32, and scale the sums."
        )


def _product(x: Tensor, codes: Tensor) -> Tensor:
    return (x.to(torch.int32) @ codes.to(torch.int32).T).to(torch.float32)


def _product_cases(generator: Generator) -> list[tuple]:
    def case(tokens: int, inputs: int, outputs: int) -> tuple:
        def draw(rows: int) -> Tensor:
            return torch.randint(-127, 128, (rows, inputs), generator=generator).to(torch.int8)

        def positive(rows: int) -> Tensor:
            return 0.003 + 0.03 * torch.rand(rows, generator=generator)

        return (
            draw(tokens),
            positive(tokens),
            draw(outputs),
            positive(outputs),
            torch.randn(outputs, generator=generator),
        )

    def large_scales(tokens: int, outputs: int) -> tuple:
        """Float weights overflow, though the results are small."""
        sign = torch.tensor([1, -1]).repeat(3)
        x = sign.expand(tokens, 6).to(torch.int8)
        codes = 120 + torch.randint(0, 8, (outputs, 6), generator=generator).to(torch.int8)
        return x, torch.full((tokens,), 1e-36), codes, torch.full((outputs,), 3e36), torch.ones(outputs)

    cases = [case(1, 4, 3), case(2, 6, 4), case(5, 16, 2), case(3, 32, 7), case(4, 64, 4), case(2, 1, 3)]
    return [*cases, large_scales(2, 3), case(1, 900, 1)]


INT8_LINEAR = Exercise(
    task="""Where both inputs and weights are int8, the product can be too. `x` is int8 [tokens, in],
    `x_scales` float32 [tokens]; `codes` is int8 [out, in], `scales` float32 [out]; `bias` is float32 [out].
    An input is x[t, i] * x_scales[t], a weight codes[o, i] * scales[o]. Return what nn.Linear would, float32
    [tokens, out], but multiply and add up the codes as int32, without ever making float weights: scales that
    are the same for a whole sum can wait until it is done. Scales may be of any size.""",
    reference=int8_linear,
    cases=_product_cases,
    observe=_observe_product,
    tolerance=1e-4,
    forbids=(native.product,),
    valid=lambda x, x_scales, codes, scales, bias: (
        x.dim() == codes.dim() == 2
        and x.size(1) == codes.size(1)
        and len(x_scales) == len(x)
        and len(scales) == len(bias) == len(codes)
        and bool((x_scales > 0).all())
        and bool((scales > 0).all())
    ),
    mistakes=(
        Mistake(
            "the sum overflows int8",
            lambda x, x_scales, codes, scales, bias: (x @ codes.T) * x_scales[:, None] * scales + bias,
            "A product of int8 tensors is int8 in PyTorch, and wraps round at 127 without a word. Already 12"
            " * 12 is too much. Cast to int32 first.",
        ),
        Mistake(
            "the sum overflows int16",
            lambda x, x_scales, codes, scales, bias: (
                (x.to(torch.int16) @ codes.to(torch.int16).T) * x_scales[:, None] * scales + bias
            ),
            "A product of int16 tensors is int16 in PyTorch, and ends at 32,767: three products of the"
            " largest codes are too much. Cast to int32 first.",
        ),
        Mistake(
            "float weights",
            lambda x, x_scales, codes, scales, bias: (
                (x * x_scales[:, None]) @ (codes * scales[:, None]).T + bias
            ),
            "Codes were multiplied by their scales before the product. That makes float weights of four bytes"
            " each, which int8 was to save, and here they overflow. Multiply the codes as int32, and scale"
            " the sums.",
        ),
        Mistake(
            "int8 by way of float weights",
            lambda x, x_scales, codes, scales, bias: (
                (x.float() @ codes.float().T) * x_scales[:, None] * scales + bias
            ),
            "The codes became floats before the product. The numbers are right as long as they are small, but"
            " each weight has four bytes again, and the processor multiplies floats: nothing is gained."
            " Multiply the codes as int32.",
        ),
        Mistake(
            "the bias is scaled too",
            lambda x, x_scales, codes, scales, bias: (_product(x, codes) + bias) * x_scales[:, None] * scales,
            "The bias was added before the scales. It is a plain float that belongs to the result, so it"
            " comes last.",
        ),
        Mistake(
            "the bias comes between the scales",
            lambda x, x_scales, codes, scales, bias: (_product(x, codes) * x_scales[:, None] + bias) * scales,
            "The bias was added before the weights' scales, so they shrink it. It is a plain float that"
            " belongs to the result: add it last.",
        ),
        Mistake(
            "the inputs' scales are forgotten",
            lambda x, x_scales, codes, scales, bias: _product(x, codes) * scales + bias,
            "The inputs are codes too. The result of token t has to be multiplied by x_scales[t].",
        ),
        Mistake(
            "the weights' scales are forgotten",
            lambda x, x_scales, codes, scales, bias: _product(x, codes) * x_scales[:, None] + bias,
            "The weights are codes too. Output o has to be multiplied by scales[o].",
        ),
    ),
    hints=(
        "Write out the sum over i for one token and one output. Which factors do not depend on i?",
        (
            "int32 first, then the product with codes.T, then the scales: those of the tokens go down the"
            " rows, those of the outputs along them."
        ),
        "(x.int() @ codes.int().T) * x_scales[:, None] * scales + bias.",
    ),
)


# ---- 9. the same product in C


def _matvec(
    body: str = "sum += w[(size_t)row * columns + i] * x[i];",
    kind: str = "int32_t",
    start: str = "0",
    after: str = "y[row] = (float)sum * scale[row] * x_scale;",
    columns: str = "columns",
) -> str:
    """C source; what can go wrong is an argument."""
    return f"""#include <stddef.h>
#include <stdint.h>

void int8_matvec(const int8_t *w, const float *scale, const int8_t *x,
                 float x_scale, float *y, int rows, int columns) {{
    for (int row = 0; row < rows; row++) {{
        {kind} sum = {start};
        for (int i = 0; i < {columns}; i++)
            {body}
        {after}
    }}
}}
"""


def int8_dot_source() -> str:
    return _matvec()


MAIN = r"""
/* Calls int8_matvec, or with -DGROUPED grouped_matvec, on what is in the file argv[1], and writes y to the
   file argv[2]. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BEHIND 64 /* bytes that follow each array, with a pattern in them */
#define PATTERN 0x4d

#ifdef GROUPED
void grouped_matvec(const int8_t *w, const float *w_scale, const int8_t *x, const float *x_scale, float *y,
                    int rows, int columns);
#else
void int8_matvec(const int8_t *w, const float *scale, const int8_t *x, float x_scale, float *y, int rows,
                 int columns);
#endif

static void *array(FILE *from, size_t size) {
  unsigned char *made = malloc(size + BEHIND);
  memset(made, PATTERN, size + BEHIND);
  if (from && fread(made, 1, size, from) != size)
    exit(2);
  return made;
}

int main(int argc, char **argv) {
  FILE *from = fopen(argv[1], "rb");
  int *sizes = array(from, 4 * sizeof(int)); /* rows, columns, how many scales w has and x */
  size_t rows = (size_t)sizes[0], columns = (size_t)sizes[1];
  int8_t *w = array(from, rows * columns), *x = array(from, columns);
  float *scale = array(from, sizes[2] * sizeof(float)), *x_scale = array(from, sizes[3] * sizeof(float));
  float *y = array(NULL, rows * sizeof(float));
#ifdef GROUPED
  grouped_matvec(w, scale, x, x_scale, y, sizes[0], sizes[1]);
#else
  int8_matvec(w, scale, x, *x_scale, y, sizes[0], sizes[1]);
#endif
  FILE *to = fopen(argv[2], "wb");
  fwrite(y, 1, rows * sizeof(float) + BEHIND, to);
  return fclose(to);
}
"""
C_SECONDS = 10
"""How long a call of the learner's C may take."""


@cache
def _folder_of_programs() -> TemporaryDirectory:
    """Where answers are compiled; it is gone when the process ends."""
    return TemporaryDirectory()


@lru_cache(maxsize=64)
def _program(source: str, *options: str) -> tuple[Path | None, str]:
    """The compiled form of a C source together with MAIN, or None and what the compiler complained of."""
    folder = Path(tempfile.mkdtemp(dir=_folder_of_programs().name))
    answer, main, program = folder / "answer.c", folder / "main.c", folder / "program"
    answer.write_text(source, encoding="utf-8")
    main.write_text(MAIN, encoding="utf-8")
    try:
        compile_c(find_compiler(), [answer, main], program, *options)
    except (RuntimeError, subprocess.SubprocessError) as error:
        return None, str(error).partition("could not compile it: ")[2].replace(f"{folder}/", "")
    return program, ""


def _no_compiler() -> str | None:
    try:
        find_compiler()
    except RuntimeError as error:
        return f"{error}. Without one, go on: everything else works."
    return None


def _observe_matvec(
    answer: Callable, w: Tensor, scale: Tensor, x: Tensor, x_scale: float
) -> Iterator[tuple[str, Any]]:
    yield from _computed_in_c(answer, "int8_matvec", w, x, scale, torch.tensor([x_scale]))


def _computed_in_c(
    answer: Callable, name: str, w: Tensor, x: Tensor, *scales: Tensor, options: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """What the function `name` of an answer's C source writes into y. scales: of w, and of x."""
    source = answer()
    if not isinstance(source, str):
        raise NotRight(f"it returns {type(source).__name__}, and the C source is wanted as a string.")
    if name not in source:
        raise NotRight(f"there is no function {name} in what it returns: its name is in the task.")
    program, complaint = _program(source, *options)
    if program is None:
        raise NotRight(
            f"the compiler does not take it. It says: {complaint} (the line is that of your string)."
        )
    given, made = program.with_name("given"), program.with_name("made")
    sizes = np.array([*w.shape, *(part.numel() for part in scales)], np.int32)
    arrays = [sizes, *(part.numpy() for part in (w, x, *scales))]
    given.write_bytes(b"".join(part.tobytes() for part in arrays))
    made.unlink(missing_ok=True)
    try:
        done = subprocess.run([program, given, made], timeout=C_SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        raise NotRight(f"it was still running after {C_SECONDS} s, and was ended.") from None
    print(done.stdout.decode(errors="replace"), end="")
    if done.returncode < 0:
        signal_name = signal.Signals(-done.returncode).name
        raise NotRight(
            f"the program crashed ({signal_name}): it reads or writes where none of its arrays is, or divides"
            f" by zero. Which indices can i and row have?"
        )
    if done.returncode or not made.exists():
        raise NotRight(f"the program ended before {name} came back: does it call exit?")
    y = torch.frombuffer(bytearray(made.read_bytes()), dtype=torch.float32)
    yield "y", y[: len(w)]
    if not bool((y[len(w) :].view(torch.uint8) == 0x4D).all()):
        raise NotRight("it writes behind the end of y, which has `rows` numbers.")


def _matvec_cases(generator: Generator) -> list[tuple]:
    def codes(*sizes: int) -> Tensor:
        return torch.randint(-127, 128, sizes, generator=generator).to(torch.int8)

    def case(rows: int, columns: int) -> tuple:
        scale = 0.003 + 0.03 * torch.rand(rows, generator=generator)
        return codes(rows, columns), scale, codes(columns), 0.02

    def extreme(rows: int, columns: int) -> tuple:
        signs = torch.randint(0, 2, (rows, 1), generator=generator) * 2 - 1
        w = (127 * signs).expand(rows, columns).to(torch.int8).clone()
        return w, torch.full((rows,), 0.5), torch.full((columns,), -127, dtype=torch.int8), 0.25

    def large_scales(rows: int) -> tuple:
        """Scaled element by element, the products overflow, though the results are small."""
        w = 120 + torch.randint(0, 8, (rows, 6), generator=generator).to(torch.int8)
        x = torch.tensor([1, -1, 1, -1, 1, -1], dtype=torch.int8)
        return w, torch.full((rows,), 3e36), x, 1e-36

    def long(rows: int, columns: int) -> tuple:
        """The sum grows beyond what a float counts one by one, and comes back."""
        w, x = (torch.randint(90, 128, s, generator=generator) for s in ((rows, columns), (columns,)))
        w[:, columns // 2 :] *= -1
        return w.to(torch.int8), torch.ones(rows), x.to(torch.int8), 1.0

    return [
        case(1, 1),
        case(2, 3),
        case(4, 1),
        case(3, 8),
        extreme(3, 5),
        case(7, 4),
        large_scales(2),
        case(5, 33),
        case(2, 100),
        extreme(2, 300),
        long(2, 8001),
    ]


INT8_DOT_SOURCE = Exercise(
    task="""The product again, in the language that a processor's makers have compilers for. Return C
    source, a string, with the function of the stub. `w` has the codes of a weight, row after row, [rows,
    columns]; `scale` has a number for each row; `x` has the codes of one token, [columns], and `x_scale` is
    theirs. Write into y[row], for each row, the sum over i of w[row, i] x[i], times scale[row], times
    x_scale. Add up whole numbers, for which an int32_t is wide enough here, and scale a row's sum once, when
    it is complete.

    Codes are from -127 to 127. rows and columns may be any numbers from 1 on. y holds anything before the
    call, and nothing behind its end may be written. Your source is compiled on this machine, as the course's
    kernels are, and called in a program of its own.""",
    reference=int8_dot_source,
    cases=_matvec_cases,
    observe=_observe_matvec,
    lacks=_no_compiler,
    points=3,
    valid=lambda w, scale, x, x_scale: (
        w.dim() == 2
        and w.numel() > 0
        and scale.shape == w.shape[:1]
        and x.shape == w.shape[1:]
        and bool((scale > 0).all())
        and x_scale > 0
    ),
    stub='''def int8_dot_source() -> str:
    return """
#include <stdint.h>

void int8_matvec(const int8_t *w, const float *scale, const int8_t *x,
                 float x_scale, float *y, int rows, int columns) {
    /* your code here */
}
"""
''',
    mistakes=(
        Mistake(
            "the sum overflows int8",
            lambda: _matvec(kind="int8_t"),
            "The sum is an int8_t, which ends at 127, and wraps round without a word. A single product can be"
            " 16,129. Declare it int32_t.",
        ),
        Mistake(
            "the sum overflows int16",
            lambda: _matvec(kind="int16_t"),
            "The sum is an int16_t, which ends at 32,767: three products of the largest codes are too much."
            " Declare it int32_t.",
        ),
        Mistake(
            "the sum is a float",
            lambda: _matvec(kind="float"),
            "The sum is a float, which counts one by one only up to 2²⁴ = 16,777,216. Beyond that each"
            " addition is rounded, and a long row loses its small part. Declare it int32_t.",
        ),
        Mistake(
            "scaled element by element",
            lambda: _matvec(
                body="sum += (scale[row] * w[(size_t)row * columns + i]) * x[i];",
                kind="float",
                after="y[row] = sum * x_scale;",
            ),
            "Each code was multiplied by its scale before the sum. That is int8 by way of float weights: the"
            " whole numbers are gone, with the speed that they were for, and here the products overflow. Both"
            " scales come once, after the loop.",
        ),
        Mistake(
            "rows and columns exchanged",
            lambda: _matvec(body="sum += w[(size_t)i * rows + row] * x[i];"),
            "w was read as if it lay column after column. Row `row` begins at row * columns, and its numbers"
            " lie side by side.",
        ),
        Mistake(
            "the next row begins at row * rows",
            lambda: _matvec(body="sum += w[(size_t)row * rows + i] * x[i];"),
            "Row `row` was taken to begin at row * rows. Each of the rows before it has `columns` numbers, so"
            " it begins at row * columns.",
        ),
        Mistake(
            "the last columns are left out",
            lambda: _matvec(columns="columns / 8 * 8"),
            "Only whole blocks of 8 columns were added up. What is left at the end of a row, when 8 does not"
            " divide columns, needs a loop of its own.",
        ),
        Mistake(
            "the next row begins too early",
            lambda: _matvec(body="sum += w[(size_t)row * (columns - 1) + i] * x[i];"),
            "Row `row` was taken to begin at row * (columns - 1). A row has `columns` numbers.",
        ),
        Mistake(
            "added to what is in y",
            lambda: _matvec(after="y[row] += (float)sum * scale[row] * x_scale;"),
            "y[row] += adds to whatever was in y before, which is nothing one can count on. Sum in a variable"
            " of your own that begins at 0, then write y[row] = ...",
        ),
        Mistake(
            "the sum goes on from row to row",
            lambda: _matvec(kind="static int32_t"),
            "The sum is not set to 0 for each row, so a row's result has those of all rows before it in it.",
        ),
        Mistake(
            "the input's scale is forgotten",
            lambda: _matvec(after="y[row] = (float)sum * scale[row];"),
            "The input is codes, too: multiply the result by x_scale.",
        ),
        Mistake(
            "the weights' scales are forgotten",
            lambda: _matvec(after="y[row] = (float)sum * x_scale;"),
            "The weight is codes, too: multiply the result of row `row` by scale[row].",
        ),
        Mistake(
            "one scale for all rows",
            lambda: _matvec(after="y[row] = (float)sum * scale[0] * x_scale;"),
            "Every row was multiplied by the first row's scale. Each has its own, scale[row].",
        ),
        Mistake(
            "codes without a sign",
            lambda: _matvec(body="sum += (uint8_t)w[(size_t)row * columns + i] * (uint8_t)x[i];"),
            "The codes were read as numbers from 0 to 255, so that -1 became 255. They are int8_t, with a"
            " sign.",
        ),
    ),
    hints=(
        "Two loops, over the rows and over the columns in them. Where in w does row number `row` begin?",
        (
            "w[row * columns + i] * x[i]: C makes an int of both factors before it multiplies. The sum is an"
            " int32_t that begins at 0 for each row; the scales come when it is complete."
        ),
        (
            "for (int row = 0; row < rows; row++) { int32_t sum = 0; for (int i = 0; i < columns; i++) sum +="
            " w[row * columns + i] * x[i]; y[row] = (float)sum * scale[row] * x_scale; }."
        ),
    ),
)


# ---- 10. a step of GPTQ


def gptq_step(weight: Tensor, column: int, hessian: Tensor, scales: Tensor) -> Tensor:
    return _spread(weight, column, _later(_factor(hessian.inverse())[column], column), scales)


def _factor(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky(matrix, upper=True)


def _other_factor(matrix: Tensor) -> Tensor:
    """Upper triangular as well, but U Uᵀ is the inverse of the matrix, not Uᵀ U."""
    return torch.linalg.inv(torch.linalg.cholesky(matrix)).T


def _later(row: Tensor, column: int, divide: bool = True) -> Tensor:
    """Its part after `column`, the rest 0."""
    return torch.where(torch.arange(len(row)) > column, row / (row[column] if divide else 1), 0)


def _spread(
    weight: Tensor, column: int, shares: Tensor, scales: Tensor, low: int = -8, high: int = 7
) -> Tensor:
    """shares [in]: which part of the column's error is taken from each column."""
    rounded = (weight[:, column] / scales).round().clamp(low, high) * scales
    error = (weight[:, column] - rounded)[:, None]
    return weight.index_copy(1, torch.tensor([column]), rounded[:, None]) - error * shares


def _gptq_step_is_valid(weight: Tensor, column: int, hessian: Tensor, scales: Tensor) -> bool:
    """As the task has it, and no weight in the middle between two codes, where right answers may differ."""
    if weight.dim() != 2 or list(hessian.shape) != [weight.size(1)] * 2 or len(scales) != len(weight):
        return False
    codes = weight[:, column] / scales
    return (
        0 <= column < weight.size(1)
        and torch.equal(hessian, hessian.T)
        and bool((torch.linalg.eigvalsh(hessian) > 0.01).all())
        and bool((scales > 0).all())
        and bool(((codes % 1 - 0.5).abs() > 1e-3).all())
    )


def _gptq_cases(generator: Generator) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    def case(out: int, inputs: int, column: int) -> tuple[Tensor, int, Tensor, Tensor]:
        mixing = torch.eye(inputs) + 0.3 * torch.rand(inputs, inputs, generator=generator)
        x, weight = (
            torch.randn(8 * inputs, inputs, generator=generator) @ mixing,
            torch.randn(out, inputs, generator=generator),
        )
        return (
            weight,
            column,
            x.T @ x / len(x),
            weight.abs().amax(1) / 12,
        )  # so small that some codes are clamped

    return [
        case(2, 4, 0),
        case(8, 5, 2),
        case(4, 8, 3),
        case(6, 6, 4),
        case(12, 10, 5),
        case(3, 4, 3),
        case(1, 3, 0),
    ]


GPTQ_STEP = Exercise(
    task="""GPTQ rounds one column of the weights after another, and lets those still to come make up for the
    error. `weight` is float32 [out, in]; the columns before `column` are done. `hessian` is float32 [in, in],
    the mean of x xᵀ over the layer's inputs x. Let U be the upper Cholesky factor of its inverse: the upper
    triangular matrix with Uᵀ U = hessian⁻¹. Round: where w is the column, its new value is q = c * scales,
    with c = w / scales rounded and clamped to -8 .. 7, and `scales` float32 [out]. Spread: take (w - q) *
    U[column, j] / U[column, column] from each later column j. Return the new weight, float32 [out, in].""",
    reference=gptq_step,
    cases=_gptq_cases,
    forbids=(gptq_round,),
    tolerance=1e-4,
    valid=_gptq_step_is_valid,
    mistakes=(
        Mistake(
            "the error is not spread",
            lambda weight, column, hessian, scales: _spread(
                weight, column, torch.zeros(len(hessian)), scales
            ),
            "The column is rounded and the later ones are as before. Was the rounded column written before"
            " the difference was taken? A slice such as new[:, column] is a view: it changes with new, and"
            " w - q is then 0. Clone it, or take the error first. Or was U the lower factor, which"
            " torch.linalg.cholesky returns unless told otherwise? Right of its diagonal it is 0.",
        ),
        Mistake(
            "U Uᵀ in place of Uᵀ U",
            lambda weight, column, hessian, scales: _spread(
                weight, column, _later(_other_factor(hessian)[column], column), scales
            ),
            "Your U is upper triangular, but it is U Uᵀ that gives the inverse, as with the inverse of the"
            " Hessian's lower factor, transposed. The order matters: invert first, then take"
            " torch.linalg.cholesky(..., upper=True), for which Uᵀ U is the inverse.",
        ),
        Mistake(
            "not divided by the diagonal",
            lambda weight, column, hessian, scales: _spread(
                weight, column, _later(_factor(hessian.inverse())[column], column, divide=False), scales
            ),
            "The error was not divided by U[column, column]. Its shares then depend on how large the inputs"
            " are, which should not matter.",
        ),
        Mistake(
            "the Hessian instead of its inverse",
            lambda weight, column, hessian, scales: _spread(
                weight, column, _later(_factor(hessian)[column], column), scales
            ),
            "U came from the Hessian itself. How far one weight must move to make up for another is what the"
            " inverse says.",
        ),
        Mistake(
            "the inverse without Cholesky",
            lambda weight, column, hessian, scales: _spread(
                weight, column, _later(hessian.inverse()[column], column), scales
            ),
            "The shares are a row of the inverse. That is right for column 0 only: it counts on help from"
            " columns that are done. The rows of the Cholesky factor no longer do.",
        ),
        Mistake(
            "the done columns move too",
            lambda weight, column, hessian, scales: _spread(
                weight,
                column,
                (hessian.inverse()[column] / hessian.inverse()[column, column]).index_fill(
                    0, torch.tensor(column), 0
                ),
                scales,
            ),
            "Columns before this one were changed. They are rounded already, and would leave their 16 codes"
            " again. Only later ones may move.",
        ),
        Mistake(
            "added, not taken away",
            lambda weight, column, hessian, scales: _spread(
                weight, column, -_later(_factor(hessian.inverse())[column], column), scales
            ),
            "The shares were added. The later columns then make the error larger instead of making up"
            " for it.",
        ),
        Mistake(
            "the codes are not clamped",
            lambda weight, column, hessian, scales: _spread(
                weight, column, _later(_factor(hessian.inverse())[column], column), scales, -(10**9), 10**9
            ),
            "A code beyond -8 .. 7 does not fit into four bits. Clamp it before the error is taken, so that"
            " what is cut off is made up for as well.",
        ),
    ),
    hints=(
        (
            "Three parts: U, the rounded column with its error, and one outer product of the error with a row"
            " of U. Work on weight.clone()."
        ),
        (
            "U = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True). Keep the old column: the error"
            " is w - q, divided by U[column, column]."
        ),
        (
            "new[:, column] = q; new[:, column + 1 :] -= (w - q)[:, None] / U[column, column] * U[column,"
            " column + 1 :]."
        ),
    ),
)


# ---- 11. GPTQ's rounding of one matrix


def gptq_matrix(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float) -> Tensor:
    return _gptq_rounded(weight, _upper(hessian, damp), scale, zero)


def _upper(hessian: Tensor, damp: float, of_mean: bool = True) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    h = hessian.double()
    added = damp * h.diagonal().mean() if of_mean else damp
    return torch.linalg.cholesky(torch.linalg.inv(h + added * torch.eye(len(h))), upper=True).float()


def _gptq_rounded(
    weight: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    group_of: Callable[[int, int], int] = lambda column, size: column // size,
    low: int = 0,
    high: int = 15,
    divide: bool = True,
    all_columns: bool = False,
) -> Tensor:
    """group_of: the group of a column, from the column and the group's size. all_columns: whether those that
    are done move, too.
    """
    new = weight.clone()
    size = weight.size(1) // scale.size(1)
    for j in range(weight.size(1)):
        s, z = scale[:, group_of(j, size)], zero[:, group_of(j, size)]
        column = new[:, j]
        rounded = (((column - z) / s).round() + 8).clamp(low, high).sub(8) * s + z
        error = (column - rounded) / (upper[j, j] if divide else 1)
        first = 0 if all_columns else j + 1
        new[:, first:] -= error[:, None] * upper[j, first:]
        new[:, j] = rounded
    return new


def _gptq_by_inverse(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float) -> Tensor:
    """Shares from the inverse's rows, without Cholesky."""
    upper = _upper(hessian, damp)
    inverse = upper.T @ upper
    return _gptq_rounded(weight, inverse, scale, zero)


def _gptq_of_all(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float) -> Tensor:
    upper = _upper(hessian, damp)
    return _gptq_rounded(weight, upper.T @ upper, scale, zero, all_columns=True)


def _gptq_of_hessian(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float) -> Tensor:
    h = hessian.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h))
    return _gptq_rounded(weight, torch.linalg.cholesky(h, upper=True).float(), scale, zero)


def _gptq_of_other_factor(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float
) -> Tensor:
    h = hessian.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h))
    return _gptq_rounded(weight, _other_factor(h).float(), scale, zero)


def _gptq_step_by_step(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float) -> Tensor:
    """The error is spread once, when all columns are rounded: too late."""
    upper = _upper(hessian, damp)
    size = weight.size(1) // scale.size(1)
    s, z = scale.repeat_interleave(size, 1), zero.repeat_interleave(size, 1)
    rounded = ((weight - z) / s).round().clamp(-8, 7) * s + z
    error = (weight - rounded) / upper.diagonal()
    return rounded - error @ upper.triu(1)


def _nearest_on(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return _gptq_rounded(weight, torch.eye(weight.size(1)), scale, zero)


def _margin(weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor) -> float:
    """How near a number that is rounded comes to the middle between two codes, in steps: nearer than its
    rounding errors, and two right answers could differ.
    """
    new, least = weight.clone(), 1.0
    size = weight.size(1) // scale.size(1)
    for j in range(weight.size(1)):
        s, z = scale[:, j // size], zero[:, j // size]
        steps = (new[:, j] - z) / s
        least = min(least, float((steps - steps.floor() - 0.5).abs().min()))
        rounded = steps.round().clamp(-8, 7) * s + z
        new[:, j + 1 :] -= ((new[:, j] - rounded) / upper[j, j])[:, None] * upper[j, j + 1 :]
    return least


def _gptq_matrix_cases(generator: Generator) -> list[tuple]:
    def case(
        out: int,
        inputs: int,
        groups: int,
        *,
        mixing: float = 0.6,
        damp: float = 0.01,
        dead: int | None = None,
        sizes: tuple[int, ...] = (),
    ) -> tuple:
        while True:
            x = torch.randn(6 * inputs, inputs, generator=generator)
            x = x @ (torch.eye(inputs) + mixing * torch.rand(inputs, inputs, generator=generator))
            if dead is not None:
                x[:, dead] = 0
            if sizes:
                x = x * torch.tensor(sizes)
            weight = torch.randn(out, inputs, generator=generator)
            low, high = (0.9 * weight).unflatten(1, (groups, -1)).aminmax(dim=2)
            scale = (high - low).clamp(min=0.3) / 15
            parts = weight, x.T @ x, scale, low + 8 * scale
            if _margin(weight, _upper(parts[1], damp), *parts[2:]) > 1e-3:
                return *parts, damp

    def diagonal(out: int, inputs: int) -> tuple:
        weight, _, scale, zero, damp = case(out, inputs, 1)
        return weight, torch.diag(1 + 9 * torch.rand(inputs, generator=generator)), scale, zero, damp

    return [
        case(1, 2, 1),
        case(2, 3, 1),
        case(3, 4, 2),
        diagonal(2, 4),
        case(4, 6, 3, damp=0.5, sizes=(1, 2, 1, 4, 1, 1)),
        case(2, 6, 2, dead=2),
        case(5, 8, 2, mixing=1.5),
        case(3, 1, 1),
        case(8, 12, 4, damp=0.05),
    ]


def _gptq_is_valid(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float) -> bool:
    return (
        weight.dim() == 2
        and list(hessian.shape) == [weight.size(1)] * 2
        and torch.equal(hessian, hessian.T)
        and scale.shape == zero.shape
        and len(scale) == len(weight)
        and weight.size(1) % scale.size(1) == 0
        and bool((scale > 0.01).all())
        and damp > 0
        and bool((torch.linalg.eigvalsh(hessian) > -1e-3).all())
        and _margin(weight, _upper(hessian, damp), scale, zero) > 1e-3
    )


def _explain_gptq(
    yours: Any, weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, damp: float
) -> str | None:
    """Which law a result breaks."""
    if not isinstance(yours, Tensor) or yours.shape != weight.shape:
        return None
    size = weight.size(1) // scale.size(1)
    codes = (yours - zero.repeat_interleave(size, 1)) / scale.repeat_interleave(size, 1) + 8
    off = ((codes - codes.round()).abs() > 0.01) | (codes < -0.01) | (codes > 15.01)
    if bool(off.any()):
        column = int(off.any(0).int().argmax())
        return (
            f"Column {column} is not on its grid: no code from 0 to 15 stands for some of its numbers. A"
            f" column that is rounded must not change any more, and every one has to be rounded."
        )
    nearest = _nearest_on(weight, scale, zero)
    if torch.equal(hessian, torch.diag(hessian.diagonal())) and not torch.allclose(yours, nearest):
        return (
            "This Hessian is diagonal: no two inputs go together, so nothing can make up for anything, and"
            " the result should be rounding to nearest."
        )
    before, after = (float(((q - weight) @ hessian * (q - weight)).sum()) for q in (nearest, yours))
    if after > 1.001 * before:
        return (
            f"The outputs are further off than with rounding to nearest (the squared error is"
            f" {after / before:.2f} times as large), and to bring them nearer is what it is for."
        )
    return None


GPTQ_MATRIX = Exercise(
    task="""Now the whole matrix, column after column, from the first to the last. `weight` is float32 [out,
    in]; `hessian` is x xᵀ summed over the layer's inputs, float32 [in, in]; `scale` and `zero` are float32
    [out, groups], where a group is in / groups columns side by side, and every scale is above 0. Code c, from
    0 to 15, stands for scale (c - 8) + zero.

    - Add damp times the mean of the Hessian's diagonal to each number of its diagonal. (An input may be 0
      always, and without this there is no inverse.) Let U be the upper Cholesky factor of the inverse, Uᵀ U =
      hessian⁻¹; it is computed once.
    - For each column j: round it, *as it is by then*, to what the nearest of the 16 codes of its own group
      stands for. Divide the error, column minus rounded column, by U[j, j], and take that times U[j, k] from
      each later column k.

    Return the rounded weight, float32 [out, in]; every number in it is one that a code stands for.""",
    reference=gptq_matrix,
    cases=_gptq_matrix_cases,
    tolerance=1e-4,
    points=3,
    forbids=(gptq_round,),
    valid=_gptq_is_valid,
    explain=_explain_gptq,
    mistakes=(
        Mistake(
            "the error is not spread",
            lambda weight, hessian, scale, zero, damp: _nearest_on(weight, scale, zero),
            "This is rounding to nearest: no column makes up for another. Was the rounded column written"
            " before the difference was taken? A slice such as new[:, j] is a view: it changes with new, and"
            " the error is then 0. Clone it, or take the error first. Or was each column rounded as it was at"
            " first, in `weight`? Or was U the lower factor, which torch.linalg.cholesky returns unless told"
            " otherwise? Right of its diagonal it is 0.",
        ),
        Mistake(
            "U Uᵀ in place of Uᵀ U",
            _gptq_of_other_factor,
            "Your U is upper triangular, but it is U Uᵀ that gives the inverse, as with the inverse of the"
            " Hessian's lower factor, transposed. The order matters: invert first, then take"
            " torch.linalg.cholesky(..., upper=True), for which Uᵀ U is the inverse.",
        ),
        Mistake(
            "the errors are spread at the end",
            _gptq_step_by_step,
            "All columns were rounded first, and their errors spread afterwards. The result is no longer made"
            " of codes. A column takes its part of the errors before it is rounded.",
        ),
        Mistake(
            "not divided by the diagonal",
            lambda weight, hessian, scale, zero, damp: _gptq_rounded(
                weight, _upper(hessian, damp), scale, zero, divide=False
            ),
            "The error was not divided by U[j, j]. The shares then depend on how large the inputs are, which"
            " should not matter.",
        ),
        Mistake(
            "the Hessian instead of its inverse",
            _gptq_of_hessian,
            "U came from the Hessian itself. How far one weight must move to make up for another is what the"
            " inverse says.",
        ),
        Mistake(
            "the inverse without Cholesky",
            _gptq_by_inverse,
            "The shares are the rows of the inverse. That is right for the first column only: later ones"
            " would count on help from columns that are done. The rows of the Cholesky factor do not.",
        ),
        Mistake(
            "the done columns move too",
            _gptq_of_all,
            "Columns before j were changed. They are rounded already, and leave their codes again. Only later"
            " ones may move.",
        ),
        Mistake(
            "damping is forgotten",
            lambda weight, hessian, scale, zero, damp: gptq_matrix(weight, hessian, scale, zero, 0.0),
            "Nothing was added to the diagonal. An input that is always 0 leaves a row of zeros, which has no"
            " inverse; and inputs that nearly go together get enormous shares.",
        ),
        Mistake(
            "damping without the mean",
            lambda weight, hessian, scale, zero, damp: _gptq_rounded(
                weight, _upper(hessian, damp, of_mean=False), scale, zero
            ),
            "damp itself was added. It is a share of the diagonal's mean, so that it means the same however"
            " large the inputs are and however many were summed.",
        ),
        Mistake(
            "every group has the first one's scale",
            lambda weight, hessian, scale, zero, damp: _gptq_rounded(
                weight, _upper(hessian, damp), scale, zero, group_of=lambda column, size: 0
            ),
            "scale[:, 0] and zero[:, 0] served for all columns. Column j belongs to group j // (in /"
            " groups).",
        ),
        Mistake(
            "groups in turn",
            lambda weight, hessian, scale, zero, damp: _gptq_rounded(
                weight,
                _upper(hessian, damp),
                scale,
                zero,
                group_of=lambda column, size: column % scale.size(1),
            ),
            "Column j was given to group j % groups. A group's columns lie side by side: j // (in / groups).",
        ),
        Mistake(
            "the codes are not clamped",
            lambda weight, hessian, scale, zero, damp: _gptq_rounded(
                weight, _upper(hessian, damp), scale, zero, low=-(10**6), high=10**6
            ),
            "Codes beyond 0 .. 15 came out: they do not fit into four bits. Clamp before the error is taken,"
            " so that what is cut off is made up for as well.",
        ),
        Mistake(
            "clamped to 0 .. 15 without the 8",
            lambda weight, hessian, scale, zero, damp: _gptq_rounded(
                weight, _upper(hessian, damp), scale, zero, low=8, high=23
            ),
            "(weight - zero) / scale is from -8 to 7; clamp(0, 15) fits only after 8 was added. Without it"
            " everything below `zero` becomes `zero`.",
        ),
        Mistake(
            "codes from -8, as if zero were 0",
            lambda weight, hessian, scale, zero, damp: _gptq_rounded(
                weight, _upper(hessian, damp), scale, torch.zeros_like(zero)
            ),
            "`zero` was left out: the grid of a group is not centred on 0. A code is (weight - zero) / scale"
            " + 8, and back again with + zero.",
        ),
    ),
    hints=(
        (
            "Your step of the last exercise is the inside of the loop, with another grid. U does not depend"
            " on the weights: compute it before the loop."
        ),
        (
            "h = hessian + damp * hessian.diagonal().mean() * torch.eye(n); U ="
            " torch.linalg.cholesky(torch.linalg.inv(h), upper=True). Work on new = weight.clone(); column j"
            " has scale[:, j // size] with size = in // groups."
        ),
        (
            "for j in range(n): s, z = scale[:, j // size], zero[:, j // size]; q = ((new[:, j] - z) /"
            " s).round().clamp(-8, 7) * s + z; error = (new[:, j] - q) / U[j, j]; new[:, j] = q; new[:, j + 1"
            " :] -= error[:, None] * U[j, j + 1 :]."
        ),
    ),
)


# ---- 12. a product in C, with scales for groups


def _grouped_matvec(
    body: str = "sum += codes[i] * inputs[i];",
    kind: str = "int32_t",
    before: str = "float total = 0;",
    group: str = "total += w_scale[(size_t)row * groups + g] * x_scale[g] * (float)sum;",
    after: str = "y[row] = total;",
    inputs: str = "x + 32 * g",
    groups: str = "columns / 32",
    start: str = "0",
) -> str:
    """C source; what can go wrong is an argument."""
    return f"""#include <stddef.h>
#include <stdint.h>

void grouped_matvec(const int8_t *w, const float *w_scale, const int8_t *x,
                    const float *x_scale, float *y, int rows, int columns) {{
    int groups = columns / 32;
    for (int row = 0; row < rows; row++) {{
        {before}
        for (int g = 0; g < {groups}; g++) {{
            const int8_t *codes = w + (size_t)row * columns + 32 * g;
            const int8_t *inputs = {inputs};
            {kind} sum = {start};
            for (int i = 0; i < 32; i++)
                {body}
            {group}
        }}
        {after}
    }}
}}
"""


def grouped_dot_source() -> str:
    return _grouped_matvec()


def _observe_grouped(
    answer: Callable, w: Tensor, w_scale: Tensor, x: Tensor, x_scale: Tensor
) -> Iterator[tuple[str, Any]]:
    yield from _computed_in_c(answer, "grouped_matvec", w, x, w_scale, x_scale, options=("-DGROUPED",))


def _grouped_product_cases(generator: Generator) -> list[tuple]:
    def codes(*sizes: int) -> Tensor:
        return torch.randint(-127, 128, sizes, generator=generator).to(torch.int8)

    def scales(*sizes: int) -> Tensor:
        return 0.003 + 0.03 * torch.rand(sizes, generator=generator)

    def case(rows: int, groups: int) -> tuple:
        return codes(rows, 32 * groups), scales(rows, groups), codes(32 * groups), scales(groups)

    def large_scales(rows: int, groups: int) -> tuple:
        """Scaled element by element, the products overflow, though the results are small."""
        w, x = torch.zeros(rows, groups, 32), torch.zeros(groups, 32)
        w[..., :6] = 120 + torch.randint(0, 8, (rows, groups, 6), generator=generator)
        x[:, :6] = torch.tensor([1, -1]).repeat(3)
        tiny = torch.full((groups,), 1e-36)
        return w.flatten(1).to(torch.int8), torch.full((rows, groups), 3e36), x.flatten().to(torch.int8), tiny

    def extreme(rows: int, groups: int) -> tuple:
        w, _, x, _ = case(rows, groups)
        return torch.full_like(w, 127), scales(rows, groups), torch.full_like(x, -127), scales(groups)

    return [
        case(1, 1),
        case(3, 1),
        case(1, 3),
        case(4, 2),
        large_scales(2, 2),
        extreme(2, 3),
        case(5, 4),
        case(3, 9),
    ]


def _is_grouped(w: Tensor, w_scale: Tensor, x: Tensor, x_scale: Tensor) -> bool:
    """As the task has it."""
    groups = len(x_scale)
    return (
        w.dim() == 2
        and groups > 0
        and w.shape == (len(w_scale), 32 * groups)
        and w_scale.shape == (len(w), groups)
        and len(w) > 0
        and x.shape == (32 * groups,)
        and bool((w_scale > 0).all())
        and bool((x_scale > 0).all())
    )


GROUPED_DOT_SOURCE = Exercise(
    task="""The product in C once more, as the decoder computes it: with a scale for each 32 neighbours, of a
    row of the weight and of the activations as well. `w` has the codes of the weight, [rows, columns], row
    after row, and `w_scale` is [rows, columns / 32]; `x` has the codes of one token's activations, [columns],
    and `x_scale` is [columns / 32]. 32 divides columns. Group g has the columns from 32 g to 32 g + 31. Write
    into y[row] the sum over the groups of w_scale[row, g] times x_scale[g] times what the group's own
    products add up to.

    Within a group add up whole numbers, for which an int32_t is wide enough; multiply by the two scales once,
    when a group is complete, and add that up as a float. Codes are from -127 to 127. y holds anything before
    the call, and nothing behind its end may be written.""",
    reference=grouped_dot_source,
    cases=_grouped_product_cases,
    observe=_observe_grouped,
    tolerance=1e-4,
    lacks=_no_compiler,
    points=3,
    valid=_is_grouped,
    stub='''def grouped_dot_source() -> str:
    return """
#include <stdint.h>

void grouped_matvec(const int8_t *w, const float *w_scale, const int8_t *x,
                    const float *x_scale, float *y, int rows, int columns) {
    /* your code here */
}
"""
''',
    mistakes=(
        Mistake(
            "the sum overflows int8",
            lambda: _grouped_matvec(kind="int8_t"),
            "A group's sum is an int8_t, which ends at 127, and wraps round without a word. A single product"
            " can be 16,129. Declare it int32_t.",
        ),
        Mistake(
            "the sum overflows int16",
            lambda: _grouped_matvec(kind="int16_t"),
            "A group's sum is an int16_t, which ends at 32,767: three products of the largest codes are too"
            " much. Declare it int32_t.",
        ),
        Mistake(
            "a product is kept in a byte",
            lambda: _grouped_matvec(body="sum += (int8_t)(codes[i] * inputs[i]);"),
            "Each product of two codes was put into an int8_t, which ends at 127, before it was added. A"
            " product of two int8_t is an int in C: add it to the sum as it is.",
        ),
        Mistake(
            "scaled element by element",
            lambda: _grouped_matvec(
                body="sum += (w_scale[(size_t)row * groups + g] * codes[i]) * inputs[i];",
                kind="float",
                group="total += sum * x_scale[g];",
            ),
            "Each code was multiplied by its scale before the sum. The whole numbers are gone, with the speed"
            " that they were for, and here the products overflow. A group's scales come after its loop.",
        ),
        Mistake(
            "the sum goes on from group to group",
            lambda: _grouped_matvec(before="float total = 0; int32_t sum = 0;", kind="", start="sum"),
            "The whole number is not set to 0 for each group, so a group's sum has those of all groups before"
            " it in it, and is multiplied by a scale that is not theirs.",
        ),
        Mistake(
            "one scale for a whole row",
            lambda: _grouped_matvec(
                group="total += w_scale[(size_t)row * groups] * x_scale[g] * (float)sum;",
            ),
            "All groups of a row were multiplied by the scale of its first one. Each has its own:"
            " w_scale[row * (columns / 32) + g].",
        ),
        Mistake(
            "one scale for all activations",
            lambda: _grouped_matvec(
                group="total += w_scale[(size_t)row * groups + g] * x_scale[0] * (float)sum;",
            ),
            "All groups of the activations were multiplied by the scale of the first one. Each has its own,"
            " x_scale[g].",
        ),
        Mistake(
            "one scale for everything",
            lambda: _grouped_matvec(
                group="total += (float)sum;",
                after="y[row] = total * w_scale[(size_t)row * groups] * x_scale[0];",
            ),
            "The sums of all groups were added up first, and multiplied by one pair of scales. Whole numbers"
            " of different scales cannot be added: scale each group's sum before it goes into the total.",
        ),
        Mistake(
            "every row has the first row's scales",
            lambda: _grouped_matvec(group="total += w_scale[g] * x_scale[g] * (float)sum;"),
            "w_scale[g] is the scale of row 0. The scales of row `row` begin at row * (columns / 32).",
        ),
        Mistake(
            "the scales lie group after group",
            lambda: _grouped_matvec(
                group="total += w_scale[(size_t)g * rows + row] * x_scale[g] * (float)sum;",
            ),
            "w_scale was read as [columns / 32, rows]. It is [rows, columns / 32]: the scales of one row lie"
            " side by side.",
        ),
        Mistake(
            "the activations' scales are forgotten",
            lambda: _grouped_matvec(group="total += w_scale[(size_t)row * groups + g] * (float)sum;"),
            "The activations are codes, too: multiply a group's sum by x_scale[g] as well.",
        ),
        Mistake(
            "the weights' scales are forgotten",
            lambda: _grouped_matvec(group="total += x_scale[g] * (float)sum;"),
            "The weights are codes, too: multiply the sum of a row's group g by w_scale[row * (columns / 32)"
            " + g] as well.",
        ),
        Mistake(
            "only the last group is left",
            lambda: _grouped_matvec(
                group="y[row] = w_scale[(size_t)row * groups + g] * x_scale[g] * (float)sum;", after=""
            ),
            "y[row] = is written anew for each group, so that the last one remains. Add the groups up in a"
            " float of your own, and write it when the row is complete.",
        ),
        Mistake(
            "added to what is in y",
            lambda: _grouped_matvec(
                group="y[row] += w_scale[(size_t)row * groups + g] * x_scale[g] * (float)sum;", after=""
            ),
            "y[row] += adds to whatever was in y before, which is nothing one can count on. Add up in a float"
            " of your own that begins at 0, then write y[row] = ...",
        ),
        Mistake(
            "the total goes on from row to row",
            lambda: _grouped_matvec(before="static float total = 0;"),
            "The total is not set to 0 for each row, so a row's result has those of all rows before in it.",
        ),
        Mistake(
            "each group reads the first activations",
            lambda: _grouped_matvec(inputs="x"),
            "x[i] with i from 0 to 31 is the first group, each time. Group g begins at x[32 * g], as it does"
            " in the row of w.",
        ),
        Mistake(
            "the last group is left out",
            lambda: _grouped_matvec(groups="groups - 1"),
            "The loop over the groups ends before the last one: there are columns / 32, from 0 on.",
        ),
    ),
    hints=(
        (
            "Three loops: over the rows, over the groups of a row, over the 32 columns of a group. Which"
            " numbers have to begin anew in which of them?"
        ),
        (
            "A float `total` begins at 0 for each row, an int32_t `sum` for each group. Group g of row `row`"
            " begins at w[row * columns + 32 * g] and at x[32 * g]; its scale is w_scale[row * (columns / 32)"
            " + g]."
        ),
        (
            "for each row: float total = 0; for (int g = 0; g < columns / 32; g++) { int32_t sum = 0; for"
            " (int i = 32 * g; i < 32 * g + 32; i++) sum += w[row * columns + i] * x[i]; total += w_scale[row"
            " * (columns / 32) + g] * x_scale[g] * (float)sum; } y[row] = total;."
        ),
    ),
)


# ---- 13. a loop that threads share


class _Sharing:
    """`share`, in parts; what can go wrong is a part of its own."""

    def __init__(self, pieces: int, work: Callable[[int], None], threads: int):
        self.pieces = pieces
        self.work = work
        self.threads = threads
        self.next = 0
        self.errors: list[Exception] = []
        self.helpers: list[threading.Thread] = []
        self.lock = threading.Lock()

    def take(self) -> int | None:
        with self.lock:
            if self.next == self.pieces:
                return None
            self.next += 1
            return self.next - 1

    def go_on(self, number: int) -> None:
        """Works until no piece is left. number: of this worker; the caller is 0."""
        while not self.errors and (piece := self.take()) is not None:
            self.work(piece)

    def help(self, number: int) -> None:
        try:
            self.go_on(number)
        except Exception as error:
            self.errors.append(error)

    def start(self, count: int) -> None:
        for number in range(1, count + 1):
            self.helpers.append(threading.Thread(target=self.help, args=(number,), daemon=True))
            self.helpers[-1].start()

    def wait(self) -> None:
        for helper in self.helpers:
            helper.join()

    def run(self) -> None:
        self.start(self.threads - 1)
        self.help(0)
        self.wait()
        self.end()

    def end(self) -> None:
        if self.errors:
            raise self.errors[0]


def share(pieces: int, work: Callable[[int], None], threads: int) -> None:
    _Sharing(pieces, work, threads).run()


class _CutBefore(_Sharing):
    def go_on(self, number: int) -> None:
        for piece in range(number, self.pieces, self.threads):
            if not self.errors:
                self.work(piece)


class _NobodyWaits(_Sharing):
    def run(self) -> None:
        self.start(self.threads)


class _TakenIsEnough(_Sharing):
    def run(self) -> None:
        self.all_taken = threading.Event()
        if not self.pieces:
            self.all_taken.set()
        self.start(self.threads)
        self.all_taken.wait()
        self.end()

    def take(self) -> int | None:
        piece = super().take()
        if self.next == self.pieces:
            self.all_taken.set()
        return piece


class _OthersGoOn(_Sharing):
    def wait(self) -> None:
        pass


class _WithoutLock(_Sharing):
    def take(self) -> int | None:
        piece = self.next
        if piece >= self.pieces:
            return None
        self.next = piece + 1
        return piece


class _OneAtATime(_Sharing):
    def go_on(self, number: int) -> None:
        while not self.errors:
            with self.lock:
                if self.next == self.pieces:
                    return
                self.next += 1
                self.work(self.next - 1)


class _InRounds(_Sharing):
    def run(self) -> None:
        self.round = threading.Barrier(self.threads)
        super().run()

    def go_on(self, number: int) -> None:
        for begin in range(0, self.pieces, self.threads):
            if begin + number < self.pieces:
                self.work(begin + number)
            self.round.wait()

    def help(self, number: int) -> None:
        try:
            self.go_on(number)
        except threading.BrokenBarrierError:
            return
        except Exception as error:
            self.errors.append(error)
            self.round.abort()


class _OneTooFew(_Sharing):
    def run(self) -> None:
        self.start(self.threads - 1)
        self.wait()
        self.end()


class _OneTooMany(_Sharing):
    def run(self) -> None:
        self.start(self.threads)
        self.help(0)
        self.wait()
        self.end()


class _ThreadForEach(_Sharing):
    def run(self) -> None:
        self.start(self.pieces)
        self.wait()
        self.end()

    def go_on(self, number: int) -> None:
        self.work(number - 1)


class _AllDoAll(_Sharing):
    def go_on(self, number: int) -> None:
        for piece in range(self.pieces):
            if not self.errors:
                self.work(piece)


class _FromOne(_Sharing):
    def take(self) -> int | None:
        piece = super().take()
        return None if piece is None else piece + 1


class _ErrorsStay(_Sharing):
    """Errors of helpers end their threads; the caller's own comes out at once."""

    def help(self, number: int) -> None:
        self.go_on(number)


class _ErrorsComeEarly(_Sharing):
    def run(self) -> None:
        self.start(self.threads - 1)
        self.go_on(0)
        self.wait()
        self.end()


LOOK = 0.002
LOOKS = 30
"""How often it is looked, so many seconds apart, whether something happens that should not. A machine that is
busy makes a look longer, not the number of looks smaller.
"""
PATIENT = 120
"""Looks for what should happen: a right answer needs few of them, and a busy machine refuses none."""
MEETING_SECONDS = 0.5
"""How long threads that take turns wait for each other, where not all of them come."""
TURN_SECONDS = 0.02
"""How long a thread waits for its turn where nobody takes a step: the others wait for something else then."""


def _comes(event: threading.Event, looks: int = LOOKS) -> bool:
    """Whether it is set before all looks are over. Where it is, nothing is waited for."""
    return any(event.wait(LOOK) for _ in range(looks))


class _Work:
    """What a loop's pieces are worked on by: it counts. during: called with the piece, and with the number of
    pieces that had begun by then, this one included.
    """

    def __init__(self, pieces: int, during: Callable[[Any, int], None] | None = None):
        self.pieces = pieces
        self.during = during
        self.counts = [0] * pieces
        self.no_pieces: list[Any] = []
        """What it was called with besides pieces."""
        self.begun = self.finished = self.most_at_once = 0
        self.reached = {count: threading.Event() for count in range(pieces + 1)}
        """By number: set once so many pieces are finished."""
        self.reached[0].set()
        self.lock = threading.Lock()

    def __call__(self, piece: int) -> None:
        with self.lock:
            if isinstance(piece, int) and 0 <= piece < self.pieces:
                self.counts[piece] += 1
            else:
                self.no_pieces.append(piece)
            self.begun += 1
            number = self.begun
            self.most_at_once = max(self.most_at_once, self.begun - self.finished)
        try:
            if self.during is not None:
                self.during(piece, number)
        finally:
            with self.lock:
                self.finished += 1
                if self.finished in self.reached:
                    self.reached[self.finished].set()

    def end(self) -> None:
        """Waits for pieces that are still being worked on. Raises NotRight where there were others than the
        loop's.
        """
        _comes(self.reached[self.pieces], PATIENT)
        if self.no_pieces:
            raise NotRight(
                f"it calls work with {self.no_pieces[0]!r}: the pieces of a loop of {self.pieces} are 0 to"
                f" {self.pieces - 1}."
            )


class _Meeting:
    """Where so many threads wait for each other, a moment at most."""

    def __init__(self, count: int):
        self.count = count
        self.here: list[threading.Thread] = []
        self.full = threading.Event()
        self.given_up = False

    def place(self) -> int:
        """Waits until all are here. Returns the number of this thread in the order in which they began."""
        self.here.append(threading.current_thread())
        if len(self.here) >= self.count:
            self.full.set()
        if not _comes(self.full, PATIENT):
            self.given_up = True
            self.full.set()
        return self.in_order().index(threading.current_thread())

    def in_order(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread in self.here]


class _Turns:
    """Inside `taken`, the threads of an answer take turns after each instruction of its code: what happens to
    a program once in a while happens to it at once.

    files: those of the answer. Only one thread is `running` at a time; one that takes no step for a while
    waits for something else, such as a lock, and is not waited for.
    """

    def __init__(self, files: set[str]):
        self.files = files
        self.changed = threading.Condition()
        self.queue: deque[int] = deque()
        self.running: set[int] = set()
        self.elsewhere: set[int] = set()
        self.over = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        before, before_of_threads = sys.gettrace(), threading.gettrace()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)
            threading.settrace(before_of_threads)  # type: ignore[arg-type]  # None is allowed
            self.over = True

    def leave(self) -> None:
        """From here on this thread takes no turns."""
        me = threading.get_ident()
        with self.changed:
            self.elsewhere.add(me)
            self.running.discard(me)
            self.changed.notify_all()

    def come_back(self) -> None:
        """All that have left take turns again, at once."""
        with self.changed:
            self.running |= self.elsewhere
            self.elsewhere.clear()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code: CodeType = frame.f_code
        if event == "call":
            is_answers = code.co_filename in self.files and code is not _Work.__call__.__code__
            if self.over or not is_answers or threading.get_ident() in self.elsewhere:
                return None
            frame.f_trace_opcodes = True
        elif event == "opcode" and not self.over:
            self._step()
        return self._trace

    def _step(self) -> None:
        me = threading.get_ident()
        with self.changed:
            self.queue.append(me)
            self.running.discard(me)
            self.changed.notify_all()
            try:
                while self.queue[0] != me or self.running:
                    if not self.changed.wait(TURN_SECONDS) and self.queue[0] == me:
                        self.running.clear()
            finally:
                self.queue.remove(me)
            self.running.add(me)


def _two_loops(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    for which in ("first", "second"):
        work = _Work(pieces)
        answer(pieces, work, threads)
        work.end()
        yield f"how often each piece of the {which} loop was worked on", work.counts


def _in_turns(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    turns = _Turns(files_of(answer))
    meeting = threading.Barrier(threads, action=turns.come_back)

    def leave_together(piece: Any, number: int) -> None:
        turns.leave()
        try:
            meeting.wait(MEETING_SECONDS)
        except threading.BrokenBarrierError:
            turns.come_back()

    work = _Work(pieces, leave_together)
    with turns.taken():
        answer(pieces, work, threads)
    work.end()
    for piece, count in enumerate(work.counts):
        if count != 1:
            raise NotRight(
                f"piece {piece} was worked on {count} times where the threads took turns after each step of"
                " your code: between the look at what is next and the note that it is taken, another thread"
                " looked, too. It happens seldom by itself, and then to nobody's notice."
            )
    yield "how often each piece was worked on", work.counts


def _all_at_once(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    full, all_begun, opened = threading.Event(), threading.Event(), threading.Event()

    def hold(piece: Any, number: int) -> None:
        if number == threads:
            full.set()
        if number == pieces:
            all_begun.set()
        if not opened.is_set():
            if _comes(full, PATIENT):
                _comes(all_begun)
            opened.set()
            full.set()  # those that come one at a time do not wait again

    work = _Work(pieces, hold)
    answer(pieces, work, threads)
    work.end()
    yield "how many pieces were worked on at the same time, at most", work.most_at_once


def _one_is_held(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    finished: list[int] = []

    def hold(piece: Any, number: int) -> None:
        if piece == 0:
            _comes(work.reached[pieces - 1], PATIENT)
            finished.append(work.finished)

    work = _Work(pieces, hold)
    answer(pieces, work, threads)
    work.end()
    others = min(finished, default=0)
    while_held = (
        f"while one worker was held at piece 0, the others finished {others} of the other {pieces - 1}"
    )
    if others == 0:
        raise NotRight(f"{while_held}: nobody but that one worker did anything.")
    if others == threads - 1:
        raise NotRight(f"{while_held}, one each, and then waited for the slow one before they took the next.")
    if others < pieces - 1:
        raise NotRight(
            f"{while_held}. The rest lay with the slow one, who could not do them. Whoever is free has to"
            " take the next piece, whichever it is."
        )
    yield "pieces that the others finished while one worker was held", others


def _all_are_slow(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    returned, early, opened = threading.Event(), threading.Event(), threading.Event()

    def hold(piece: Any, number: int) -> None:
        if number > threads:
            _comes(work.reached[threads], PATIENT)
        elif _comes(returned) and not opened.is_set():
            early.set()
        opened.set()  # who comes back now does so after the first worker

    work = _Work(pieces, hold)
    answer(pieces, work, threads)
    returned.set()
    work.end()
    if early.is_set() and pieces > threads:
        raise NotRight("it came back when no piece was finished, and some were not even taken.")
    if early.is_set():
        raise NotRight("it came back when all pieces were taken, but none was finished.")
    yield "whether it came back before any piece was finished", False


def _one_is_slow(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    """Each worker in turn, since an answer may wait for some of them."""
    for slow in range(threads):
        returned, early, meeting = threading.Event(), threading.Event(), _Meeting(threads)
        work = _Work(pieces, partial(_hold_one, slow, meeting, returned, early))
        answer(pieces, work, threads)
        returned.set()
        work.end()
        if early.is_set():
            raise NotRight(
                "it came back while one piece was still being worked on. The next loop would read what this"
                " one has not written yet."
            )
        if meeting.given_up:  # there are not so many workers: it has been seen elsewhere
            break
    yield "whether it came back before the last piece was finished", False


def _hold_one(
    slow: int, meeting: _Meeting, returned: threading.Event, early: threading.Event, *piece: Any
) -> None:
    """Holds worker number `slow` until the call is over or a moment has passed."""
    if meeting.place() == slow and _comes(returned):
        early.set()


def _a_helpers_error(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    caller, meeting, raised = threading.current_thread(), _Meeting(threads), threading.Event()

    def stumble(piece: Any, number: int) -> None:
        meeting.place()
        if threading.current_thread() is not caller:
            raised.set()
            raise ArithmeticError("this piece went wrong")
        _comes(work.reached[threads - 1], PATIENT)

    work = _Work(pieces, stumble)
    reached: Exception | None = None
    try:
        answer(pieces, work, threads)
    except Exception as error:
        reached = error
    work.end()
    if raised.is_set() and reached is None:
        raise NotRight(
            "work raised an error in a thread that it was called in, and share came back as if nothing had"
            " happened. A thread's error ends the thread, and nobody else hears of it, unless it is kept and"
            " raised again in the caller."
        )
    if raised.is_set() and not isinstance(reached, ArithmeticError):
        raise NotRight(f"work raised an ArithmeticError, and what reaches the caller is {reached!r}.")
    yield "whether a helper's error was lost", False


def _all_but_one_stumble(answer: Callable, pieces: int, threads: int) -> Iterator[tuple[str, Any]]:
    caller, meeting = threading.current_thread(), _Meeting(threads)
    returned, early = threading.Event(), threading.Event()

    def hold_or_stumble(piece: Any, number: int) -> None:
        meeting.place()
        helpers = [thread for thread in meeting.in_order() if thread is not caller]
        if threading.current_thread() not in helpers[:1]:
            raise ArithmeticError("this piece went wrong")
        if _comes(returned):
            early.set()

    work = _Work(pieces, hold_or_stumble)
    try:
        answer(pieces, work, threads)
    except ArithmeticError:
        pass
    returned.set()
    work.end()
    if early.is_set():
        raise NotRight(
            "it ended by an error while another piece was still being worked on. Whoever catches the error"
            " goes on, and the piece writes into what is no longer its own: wait for all, then raise."
        )
    yield "whether it ended before all pieces were finished or given up", False


SCENES: dict[str, tuple[Callable, Callable[[int, int], bool]]] = {
    "two loops, one after the other": (_two_loops, lambda pieces, threads: pieces >= 0 and threads > 0),
    "the threads take turns after each step": (
        _in_turns,
        lambda pieces, threads: pieces >= 2 * threads > 2 and pieces % threads == 0,
    ),
    "all workers meet at their first pieces": (
        _all_at_once,
        lambda pieces, threads: pieces > threads + 1 > 2,
    ),
    "one worker is held at piece 0": (
        _one_is_held,
        lambda pieces, threads: pieces >= 3 * threads > 3 and pieces % threads == 0,
    ),
    "all workers are slow at their first pieces": (
        _all_are_slow,
        lambda pieces, threads: pieces >= threads > 1,
    ),
    "one worker is slow, each in turn": (_one_is_slow, lambda pieces, threads: pieces == threads > 1),
    "all helpers stumble": (_a_helpers_error, lambda pieces, threads: pieces == threads > 1),
    "all but one worker stumble": (_all_but_one_stumble, lambda pieces, threads: pieces == threads > 1),
}
"""What happens in a case, and which numbers of pieces and threads it is made for."""


def _observe_share(answer: Callable, pieces: int, threads: int, scene: str) -> Iterator[tuple[str, Any]]:
    before = threading.excepthook
    threading.excepthook = _say_nothing
    try:
        yield from SCENES[scene][0](answer, pieces, threads)
    finally:
        threading.excepthook = before


def _say_nothing(arguments: Any) -> None:
    """For a thread that ends with an error: the grader says what it means."""


def _share_cases(generator: Generator) -> list[tuple[int, int, str]]:
    two_loops, turns, at_once, held, slow, one_slow, error, all_but_one = SCENES
    few = random_int(generator, 2, 4)
    return [
        (random_int(generator, 5, 30), 2, two_loops),
        (random_int(generator, 1, 4), 4, two_loops),
        (random_int(generator, 3, 9), 1, two_loops),
        (0, 3, two_loops),
        (2 * random_int(generator, 2, 5), 2, turns),
        (random_int(generator, 10, 20), 3, at_once),
        (few * random_int(generator, 3, 6), few, held),
        (random_int(generator, 7, 12), 3, slow),
        (3, 3, slow),
        (few, few, one_slow),
        (3, 3, error),
        (few, few, all_but_one),
    ]


SHARE = Exercise(
    task="""Write what the decoder's threads do: `share(pieces, work, threads)` goes through a loop with
    several threads. It calls work(piece) once for each piece from 0 to pieces - 1, and comes back when all of
    them are finished.

    - `threads` workers take the pieces, the caller's thread may be one of them. A worker takes one piece, in
      order, works on it, and takes the next that is left. So `threads` pieces are worked on at the same time,
      never more, and a worker that is held at a piece holds nobody up: the others do all the rest.
    - When share comes back, no piece is being worked on any more: the next loop may read what this one wrote.
    - Where work raises an Exception in any thread, share raises that error in the caller, after the pieces
      that are being worked on have ended. Those that nobody has taken by then may be left out. Where several
      raise, any one of the errors will do.

    pieces may be 0, and fewer than threads. `import threading` inside; two calls must not disturb each other.
    Not with multiprocessing.""",
    reference=share,
    cases=_share_cases,
    observe=_observe_share,
    forbids=(ThreadPoolExecutor, ThreadPool),
    valid=lambda pieces, threads, scene: SCENES[scene][1](pieces, threads),
    points=3,
    mistakes=(
        Mistake(
            "shares that are cut beforehand",
            lambda *case: _CutBefore(*case).run(),
            "Each worker has its share before the loop begins. Where one is held (its core does something"
            " else for a moment), its share waits for it, and all others wait at the end. Let a worker take"
            " one piece at a time, the next that is left.",
        ),
        Mistake(
            "nobody waits for the threads",
            lambda *case: _NobodyWaits(*case).run(),
            "share starts the threads and comes back at once. Nothing may be written by then of what the next"
            " loop reads: come back when all pieces are finished. thread.join() waits until a thread ends.",
        ),
        Mistake(
            "pieces are counted when they are taken",
            lambda *case: _TakenIsEnough(*case).run(),
            "share comes back when the last piece is taken. It is being worked on then, and perhaps others"
            " are. What has to reach `pieces` is the number of those that are finished.",
        ),
        Mistake(
            "not every worker's last piece is waited for",
            lambda *case: _OthersGoOn(*case).run(),
            "When no piece is left to take, other workers are still busy with theirs, and share came back"
            " before they were. Wait for each of them; a join after the loop over the threads waits for one.",
        ),
        Mistake(
            "a race on the counter",
            lambda *case: _WithoutLock(*case).run(),
            "To look at the counter and to move it on are two steps. When another thread looks between them,"
            " both take the same piece. Here the threads took turns after each instruction; by itself it"
            " happens once in a million loops. With a lock round both steps nobody comes between:"
            " with lock: ...",
        ),
        Mistake(
            "one piece at a time",
            lambda *case: _OneAtATime(*case).run(),
            "Only one piece is worked on at a time, as by a single thread. Is the lock held during work(...)?"
            " It is for taking a piece only. Or is each thread joined before the next one is started?",
        ),
        Mistake(
            "all wait for each other after each piece",
            lambda *case: _InRounds(*case).run(),
            "After each piece all workers wait for the slowest. A barrier belongs between two loops, where"
            " one reads what the other wrote; pieces of one loop do not need each other.",
        ),
        Mistake(
            "one worker too few",
            lambda *case: _OneTooFew(*case).run(),
            "One worker is missing: with threads - 1 helpers, the caller has to take pieces as well. With"
            " threads=1 nobody works.",
        ),
        Mistake(
            "one worker too many",
            lambda *case: _OneTooMany(*case).run(),
            "There are `threads` helpers, and the caller takes pieces as well: one worker more than cores."
            " Start threads - 1, or let the caller only wait.",
        ),
        Mistake(
            "a thread for each piece",
            lambda *case: _ThreadForEach(*case).run(),
            "There is a thread for each piece. A loop of the decoder has hundreds of pieces, and the"
            " processor has as many cores as before: start `threads` workers, each of which takes piece after"
            " piece.",
        ),
        Mistake(
            "every worker does all pieces",
            lambda *case: _AllDoAll(*case).run(),
            "Every worker goes through all pieces, so each is worked on several times. The workers need one"
            " counter in common, which says what is taken.",
        ),
        Mistake(
            "pieces from 1 on",
            lambda *case: _FromOne(*case).run(),
            "The pieces were counted from 1 to `pieces`. They are 0 to pieces - 1.",
        ),
        Mistake(
            "a helper's error is lost",
            lambda *case: _ErrorsStay(*case).run(),
            "An error in a thread ends that thread, and the caller does not hear of it: share comes back as"
            " if all pieces were done. Catch it in the worker, keep it, and raise it in the caller after all"
            " workers have ended.",
        ),
        Mistake(
            "the caller's own error comes out at once",
            lambda *case: _ErrorsComeEarly(*case).run(),
            "Where the piece that goes wrong is the caller's, the error leaves share while others are still"
            " working: they write into what is no longer theirs. Keep the error, wait for all workers, then"
            " raise it.",
        ),
    ),
    hints=(
        (
            "Which of the workers' variables do they have in common? What could another thread do between any"
            " two lines that touch it?"
        ),
        (
            "A counter with a lock says which piece is next. A worker's loop: take a number under the lock,"
            " stop if none is left, and call work outside of the lock. The caller starts threads - 1 such"
            " workers, is one itself, and joins them all; a list keeps errors."
        ),
        (
            "def worker(): try: while True: with lock: if state['next'] == pieces: return; piece ="
            " state['next']; state['next'] += 1; then, outside of the lock, work(piece); except Exception as"
            " error: errors.append(error). helpers = [threading.Thread(target=worker) for _ in range(threads"
            " - 1)]; start each; worker(); join each; if errors: raise errors[0]."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    DECODE_LIMIT,
    ABSMAX_INT8,
    INT4_GROUPS,
    PACK_INT4,
    QUANTIZED_LINEAR,
    SWAP_LINEARS,
    NF4_CODES,
    INT8_LINEAR,
    INT8_DOT_SOURCE,
    GPTQ_STEP,
    GPTQ_MATRIX,
    GROUPED_DOT_SOURCE,
    SHARE,
)
