"""The graded exercises of week 8: int8, int4 in groups, packing, NF4, a product of int8 codes, a step of
GPTQ, what memory allows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake, random_int
from shared.quantization.packing import NF4, absmax_int8, nearest_levels

# ---- 1. int8, one scale for each output


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
    ]


ABSMAX_INT8 = Exercise(
    task="""Four bytes hold a weight; one is nearly as good. `weight` is float32 [out, in], as nn.Linear has
    it. Return (codes, scales): codes int8 [out, in], scales float32 [out], so that codes[i, j] * scales[i] is
    as near to weight[i, j] as can be. Each output channel, which is a row, has a scale of its own, and its
    weight of the largest absolute value gets the code 127 or -127. No row is all zeros.""",
    reference=absmax_int8,
    cases=_int8_cases,
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


# ---- 2. int4 in groups, with a minimum


def int4_groups(weight: Tensor, group_size: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    return _grouped(weight.view(len(weight), -1, group_size), clip)


def _clamped(x: Tensor) -> Tensor:
    return x.round().clamp(0, 15).to(torch.uint8)


def _grouped(
    groups: Tensor,
    clip: float,
    dim: int = 2,
    steps: int = 15,
    fit: Callable = _clamped,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """groups: the weight in three dimensions, of which `dim` goes over the weights of a group."""
    low, high = clip * groups.amin(dim, keepdim=True), clip * groups.amax(dim, keepdim=True)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = (high - low) / steps
    return fit((groups - low) / scales).reshape(len(groups), -1), scales.squeeze(dim), low.squeeze(dim)


def _group_cases(generator: Generator) -> list[tuple[Tensor, int, float]]:
    def case(out: int, groups: int, group_size: int, clip: float) -> tuple[Tensor, int, float]:
        return torch.randn(out, groups * group_size, generator=generator) + 0.2, group_size, clip

    return [
        case(4, 2, 4, 1.0),
        case(8, 3, 4, 0.8),
        case(8, 2, 8, 0.9),
        case(16, 4, 8, 0.75),
        case(6, 5, 3, 0.7),
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
    mistakes=(
        Mistake(
            "rounding into bytes before clamping",
            lambda weight, group_size, clip: _grouped(
                weight.view(len(weight), -1, group_size),
                clip,
                fit=lambda x: x.round().to(torch.int16).to(torch.uint8).clamp(0, 15),
            ),
            "The codes became bytes before they were clamped. A byte cannot hold -1: it wraps round to 255,"
            " which clamp makes 15, so that the smallest weights become the largest. Clamp first, then cast.",
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


# ---- 3. two codes in a byte


def pack_int4(codes: Tensor) -> Tensor:
    return _pair(codes[:, 0::2] + 8, codes[:, 1::2] + 8)


def _pair(low: Tensor, high: Tensor) -> Tensor:
    return low.to(torch.uint8) | high.to(torch.uint8) << 4


def _pack_cases(generator: Generator) -> list[tuple[Tensor]]:
    sizes = (2, 6), (4, 8), (2, 2), (6, 10)
    small = torch.tensor([[-8, 7, 0, 1], [1, -1, 5, -5]], dtype=torch.int8)
    return [(small,)] + [(torch.randint(-8, 8, size, generator=generator).to(torch.int8),) for size in sizes]


PACK_INT4 = Exercise(
    task="""Memory is addressed in bytes: four bits save it only if two codes share a byte. `codes` is
    int8 [rows, columns], from -8 to 7, and columns is even. Add 8, so that all are from 0 to 15. Then put
    each two neighbours of a row into one byte: the first in the low four bits, the second in the high four.
    Return uint8 [rows, columns / 2].""",
    reference=pack_int4,
    cases=_pack_cases,
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


# ---- 4. NF4


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


# ---- 5. a product of codes


def int8_linear(x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    return _product(x, codes) * x_scales[:, None] * scales + bias


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

    cases = [case(1, 4, 3), case(2, 6, 4), case(5, 16, 2), case(3, 32, 7), case(4, 64, 4)]
    return [*cases, large_scales(2, 3)]


INT8_LINEAR = Exercise(
    task="""Where both inputs and weights are int8, the product can be too. `x` is int8 [tokens, in],
    `x_scales` float32 [tokens]; `codes` is int8 [out, in], `scales` float32 [out]; `bias` is float32 [out].
    An input is x[t, i] * x_scales[t], a weight codes[o, i] * scales[o]. Return what nn.Linear would, float32
    [tokens, out], but multiply and add up the codes as int32, without ever making float weights: scales that
    are the same for a whole sum can wait until it is done. Scales may be of any size.""",
    reference=int8_linear,
    cases=_product_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "the sum overflows int8",
            lambda x, x_scales, codes, scales, bias: (x @ codes.T) * x_scales[:, None] * scales + bias,
            "A product of int8 tensors is int8 in PyTorch, and wraps round at 127 without a word. Already 12"
            " * 12 is too much. Cast to int32 first.",
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


# ---- 6. a step of GPTQ


def gptq_step(weight: Tensor, column: int, hessian: Tensor, scales: Tensor) -> Tensor:
    return _spread(weight, column, _later(_factor(hessian.inverse())[column], column), scales)


def _factor(matrix: Tensor) -> Tensor:
    return torch.linalg.cholesky(matrix, upper=True)


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

    return [case(2, 4, 0), case(8, 5, 2), case(4, 8, 3), case(6, 6, 4), case(12, 10, 5)]


GPTQ_STEP = Exercise(
    task="""GPTQ rounds one column of the weights after another, and lets those still to come make up for the
    error. `weight` is float32 [out, in]; the columns before `column` are done. `hessian` is float32 [in, in],
    the mean of x xᵀ over the layer's inputs x. Let U be the upper Cholesky factor of its inverse: the upper
    triangular matrix with Uᵀ U = hessian⁻¹. Round: where w is the column, its new value is q = c * scales,
    with c = w / scales rounded and clamped to -8 .. 7, and `scales` float32 [out]. Spread: take (w - q) *
    U[column, j] / U[column, column] from each later column j. Return the new weight, float32 [out, in].""",
    reference=gptq_step,
    cases=_gptq_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "the error is not spread",
            lambda weight, column, hessian, scales: _spread(
                weight, column, torch.zeros(len(hessian)), scales
            ),
            "The column is rounded and the later ones are as before. Was U the lower factor, which"
            " torch.linalg.cholesky returns unless told otherwise? Right of its diagonal it is 0.",
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


# ---- 7. how fast memory allows


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
    and the output layer's, vocab_size times n_embd. The embedding is a table of its own, of which one row is
    looked up; leave it out, and the cache too. Each weight has `bits` bits, and each group of `group_size`
    weights a scale of `scale_bits` bits: 16, or 8 + 32 / 256 with NF4's double quantization. Memory reads
    `bandwidth` GB in a second, where 1 GB is 10⁹ bytes. Return the tokens per second that it allows at most,
    a float.""",
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


EXERCISES: tuple[Exercise, ...] = (
    ABSMAX_INT8,
    INT4_GROUPS,
    PACK_INT4,
    NF4_CODES,
    INT8_LINEAR,
    GPTQ_STEP,
    DECODE_LIMIT,
)
