"""The graded exercises of week 7: rounding to 16 bits, autocast, a 16-bit product, the scaler, memory, batch
size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from shared.course.exercise import Exercise, Mistake, random_int

BF16 = torch.bfloat16
FP16 = torch.float16
FP32 = torch.float32


# ---- 1. rounding to 16 bits


def round_to_bf16(x: Tensor) -> Tensor:
    return _rounded(x, lambda last_bit: 0x7FFF + last_bit)


def _rounded(x: Tensor, increment: Callable[[Tensor], Tensor | int]) -> Tensor:
    """increment: what is added to the 32 bits before the last 16 are cleared, given the last bit that is
    kept.
    """
    bits = x.view(torch.int32)
    last_bit = (bits >> 16) & 1
    return ((bits + increment(last_bit)) & -0x10000).view(FP32)


def _round_cases(generator: Generator) -> list[tuple]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kept_bits = torch.randint(0x3F00, 0x4200, (12,), generator=generator, dtype=torch.int32) << 16
    halves = (kept_bits + 0x8000).view(FP32)  # just between two neighbours
    large = torch.tensor([70000.0, -1e6, 1e30, 3.4e38, -3.4e38, math.inf])
    ties = torch.tensor([0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-8])
    return [
        (draw(8),),
        (ties,),
        (torch.cat([halves, -halves]),),
        (large,),
        (draw(3, 4) * 1e-6,),
        (draw(2, 3, 5) * 300,),
    ]


ROUND_TO_BF16 = Exercise(
    task="""A float32 has 1 bit for the sign, 8 for the exponent and 23 for the fraction. bfloat16 has the
    first 16 of these 32 bits. Round `x`, float32 of any shape, to the nearest bfloat16, and return it as
    float32 of the same shape. A number just between two neighbours goes to the one whose last bit is 0 (round
    to nearest, ties to even). x has no nan. You may let PyTorch round; you learn more on x.view(torch.int32),
    the same bits taken as integers: there, a carry out of the fraction goes into the exponent by itself,
    which is just what it should do.""",
    reference=round_to_bf16,
    cases=_round_cases,
    tolerance=0,
    mistakes=(
        Mistake(
            "truncated",
            lambda x: _rounded(x, lambda last_bit: 0),
            "The 16 last bits were cut off. So every number moves towards 0, by half a step on average, and"
            " sums of many drift. Round to nearest.",
        ),
        Mistake(
            "halves go up",
            lambda x: _rounded(x, lambda last_bit: 0x8000),
            "A number just between two neighbours always went to the one further from 0. Ties go to the one"
            " with an even last bit, up as often as down.",
        ),
        Mistake(
            "halves go down",
            lambda x: _rounded(x, lambda last_bit: 0x7FFF),
            "0x7FFF rounds all but ties: those always went to the neighbour nearer to 0. Add the last bit"
            " that is kept, too: it is 1 where up is even.",
        ),
        Mistake(
            "fp16 in place of bf16",
            lambda x: x.half().float(),
            "This is fp16: 5 bits for the exponent, 10 for the fraction. What is larger than 65504 became"
            " inf, and very small numbers lost their digits.",
        ),
        Mistake(
            "a fixed number of places",
            lambda x: (x * 128).round() / 128,
            "Everything was rounded to multiples of 1/128. That is the step between 1 and 2 only: it doubles"
            " at every power of two.",
        ),
    ),
    hints=(
        (
            "Cutting off is easy: the 16 last bits become 0. What would you have to add first, so that"
            " cutting off rounds?"
        ),
        (
            "Add 0x7FFF, just under half of what is cut off, and the last bit that stays, (bits >> 16) & 1: a"
            " tie then carries only if that bit is 1."
        ),
        (
            "bits = x.view(torch.int32); return ((bits + 0x7FFF + ((bits >> 16) & 1)) &"
            " -0x10000).view(torch.float32)."
        ),
    ),
)


# ---- 2. autocast


def autocast_dtypes(
    program: list[tuple[str, str, list[str]]], inputs: dict[str, torch.dtype], dtype: torch.dtype
) -> list[torch.dtype]:
    return _traced(program, inputs, _always(dtype))


_PRODUCTS = ("linear", "matmul")
_DELICATE = ("softmax", "layer_norm", "cross_entropy", "sum")
_OTHERS = ("embedding", "add", "mul", "gelu")
_TAKE_TWO = ("linear", "matmul", "add", "mul")
_Rule = Callable[[list[torch.dtype]], torch.dtype]
"""The dtype of a result, from those of what went in."""


def _always(dtype: torch.dtype) -> _Rule:
    return lambda dtypes: dtype


_always_fp32 = _always(FP32)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    return FP32 if FP32 in dtypes else dtypes[0]


def _traced(
    program: list[tuple[str, str, list[str]]],
    inputs: dict[str, torch.dtype],
    product: _Rule,
    delicate: _Rule = _always_fp32,
    other: _Rule = _widest,
) -> list[torch.dtype]:
    """The dtypes of a program's results, by a rule for each kind of operation."""
    rules = dict.fromkeys(_PRODUCTS, product) | dict.fromkeys(_DELICATE, delicate)
    known = dict(inputs)
    for result, operation, names in program:
        rule = rules.get(operation, other)
        known[result] = rule([known[name] for name in names])
    return [known[result] for result, _, _ in program]


def _autocast_cases(generator: Generator) -> list[tuple]:
    operations = (*_PRODUCTS, *_DELICATE, *_OTHERS)

    def case(dtype: torch.dtype) -> tuple:
        names = ["w", "x"]
        program = []
        for i in range(8):
            operation = operations[random_int(generator, 0, len(operations))]
            count = 2 if operation in _TAKE_TWO else 1
            taken = [names[random_int(generator, 0, len(names))] for _ in range(count)]
            program.append((f"t{i}", operation, taken))
            names.append(f"t{i}")
        return program, {"w": FP32, "x": FP32}, dtype

    attention = [
        ("x", "embedding", ["w"]),
        ("normed", "layer_norm", ["x"]),
        ("q", "linear", ["normed", "w"]),
        ("k", "linear", ["normed", "w"]),
        ("scores", "matmul", ["q", "k"]),
        ("shares", "softmax", ["scores"]),
        ("mixed", "matmul", ["shares", "k"]),
        ("out", "linear", ["mixed", "w"]),
        ("stream", "add", ["out", "x"]),
        ("logits", "linear", ["stream", "w"]),
        ("loss", "cross_entropy", ["logits"]),
    ]
    gated = [
        ("up", "linear", ["x", "w"]),
        ("gate", "gelu", ["up"]),
        ("h", "mul", ["gate", "up"]),
        ("y", "add", ["x", "h"]),
        ("total", "sum", ["h"]),
    ]
    return [
        (attention, {"w": FP32}, BF16),
        (gated, {"x": FP32, "w": FP32}, FP16),
        (gated, {"x": BF16, "w": FP32}, BF16),
        case(BF16),
        case(FP16),
        case(BF16),
    ]


AUTOCAST_DTYPES = Exercise(
    task="""Autocast chooses for each operation, not for the whole model. On a GPU it has three rules.
    Products of matrices, linear and matmul, cast their inputs to `dtype` and answer in it. softmax,
    layer_norm, cross_entropy and sum cast theirs to float32: exponentials and long sums need the digits. All
    others, here embedding, add, mul and gelu, take their inputs as they are, and where these differ, answer
    in the wider one: float32 beside 16 bits gives float32. `program` is a list of (result, operation, names
    of what goes in), done in order. `inputs` maps the names there are before, such as the weights', to their
    dtypes. Return the dtypes of all results, a list in the order of the program.""",
    reference=autocast_dtypes,
    cases=_autocast_cases,
    mistakes=(
        Mistake(
            "everything in 16 bits",
            lambda program, inputs, dtype: [dtype] * len(program),
            "This is model.to(dtype). Autocast leaves float32 what needs it: the residual stream, softmax,"
            " norms and the loss.",
        ),
        Mistake(
            "products follow their inputs",
            lambda program, inputs, dtype: _traced(program, inputs, _widest),
            "A product of float32 weights was done in float32, so nothing got faster. Autocast casts the"
            " weights for the product; they stay as they are.",
        ),
        Mistake(
            "softmax and norms follow their inputs",
            lambda program, inputs, dtype: _traced(program, inputs, _always(dtype), delicate=_widest),
            "softmax, norms, losses and sums kept 16 bits where 16 bits went in. A CPU does so for some of"
            " them; on a GPU all four answer in float32.",
        ),
        Mistake(
            "the rest in 16 bits",
            lambda program, inputs, dtype: _traced(program, inputs, _always(dtype), other=_always(dtype)),
            "add, mul, gelu and embedding were cast to 16 bits. They are left alone: so the residual stream,"
            " float32 plus 16 bits, stays float32.",
        ),
        Mistake(
            "the rest in float32",
            lambda program, inputs, dtype: _traced(program, inputs, _always(dtype), other=_always(FP32)),
            "add, mul, gelu and embedding were cast to float32. They are left alone: gelu of a 16-bit tensor"
            " has 16 bits, half the memory to move.",
        ),
        Mistake(
            "the first input decides",
            lambda program, inputs, dtype: _traced(
                program, inputs, _always(dtype), other=lambda dtypes: dtypes[0]
            ),
            "The dtype of the first input was taken. a + b and b + a must agree: the wider one wins, so that"
            " no digits are lost.",
        ),
    ),
    hints=(
        (
            "Three kinds of operation, and a dictionary that knows the dtype of every name so far. Which kind"
            " has to look into it?"
        ),
        (
            "Start with known = dict(inputs). For each line: dtype for a product, torch.float32 for the four,"
            " else the widest of known[name]."
        ),
        (
            "For the third kind: found = [known[n] for n in names]; torch.float32 if torch.float32 in found"
            " else found[0]. Then known[result] = it."
        ),
    ),
)


# ---- 3. a product in 16 bits


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    return (_in_bf16(a) @ _in_bf16(b)).bfloat16()


def _in_bf16(x: Tensor) -> Tensor:
    """Rounded to bfloat16, and float32 again."""
    return x.bfloat16().float()


def _products(a: Tensor, b: Tensor) -> Tensor:
    """bfloat16 [m, n, k]: what is to be added up over k."""
    return a.bfloat16()[:, None] * b.bfloat16().T


def _summed_in_bf16(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(len(a), b.size(1), dtype=BF16)
    for product in _products(a, b).unbind(-1):
        total = total + product
    return total


def _product_cases(generator: Generator) -> list[tuple]:
    def draw(*shape: int) -> Tensor:
        # few bits, so that float32 sums are exact in any order; then a little longer, to be rounded away
        return torch.randint(-20, 60, shape, generator=generator) / 16 * (1 + 3 * 2**-11)

    def case(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
        return draw(m, k), draw(k, n)

    return [
        (torch.ones(1, 600), torch.ones(600, 1)),
        case(4, 8, 5),
        case(3, 200, 6),
        case(8, 33, 8),
        case(10, 64, 12),
    ]


BF16_PRODUCT = Exercise(
    task="""What does a 16-bit matrix unit compute? It takes inputs of 16 bits, but multiplies and adds up in
    float32, and rounds only the result. `a` is float32 [m, k], `b` is float32 [k, n]. Return a @ b as such a
    unit gives it under autocast, bfloat16 [m, n]: inputs rounded to bfloat16, products and sums in float32,
    the result rounded to bfloat16. x.bfloat16() rounds, .float() goes back without any loss.""",
    reference=bf16_product,
    cases=_product_cases,
    mistakes=(
        Mistake(
            "the inputs are not rounded",
            lambda a, b: (a @ b).bfloat16(),
            "Only the result was rounded. The speed comes from inputs of 16 bits: half the bytes to read, and"
            " smaller multipliers.",
        ),
        Mistake(
            "one factor is rounded",
            lambda a, b: (a @ _in_bf16(b)).bfloat16(),
            "Only b was rounded. Autocast casts both factors, what flows through the layer as well as its"
            " weights.",
        ),
        Mistake(
            "the sum has 16 bits",
            _summed_in_bf16,
            "The running sum was kept in bfloat16. It stalls: from 256 on, adding 1 changes nothing, so 600"
            " ones make 256. Add up in float32.",
        ),
        Mistake(
            "the products are rounded",
            lambda a, b: _products(a, b).float().sum(-1).bfloat16(),
            "Each product was rounded to bfloat16 before it was added. Two fractions of 8 bits make one of"
            " 16, and float32 holds it whole.",
        ),
        Mistake(
            "the result stays float32",
            lambda a, b: _in_bf16(a) @ _in_bf16(b),
            "The values are right up to the last step: the result is written in 16 bits. What comes after"
            " then reads half the bytes.",
        ),
    ),
    hints=(
        "Where are digits lost, and where not? Twice on the way: once before the product, once after.",
        "Round both factors, go back to float32, multiply there, and round what comes out.",
        "return (a.bfloat16().float() @ b.bfloat16().float()).bfloat16().",
    ),
)


# ---- 4. the gradient scaler


def scaler_step(
    gradients: list[Tensor],
    dtype: torch.dtype,
    scale: float,
    good_steps: int,
    max_norm: float,
    growth_interval: int,
) -> tuple[list[Tensor], float, int]:
    if dtype != FP16:
        return _clipped(gradients, max_norm), scale, good_steps
    if not all(g.isfinite().all() for g in gradients):
        return [], scale / 2, 0
    received = _clipped(_unscaled(gradients, scale), max_norm)
    if good_steps + 1 == growth_interval:
        return received, scale * 2, 0
    return received, scale, good_steps + 1


def _unscaled(gradients: list[Tensor], scale: float) -> list[Tensor]:
    return [g / scale for g in gradients]


def _clipped(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    factor = (max_norm / nn.utils.get_total_norm(gradients)).clamp(max=1)
    return [g * factor for g in gradients]


_Step = tuple[list[Tensor], float, int]
"""What a step gives back: what the optimizer received, the scale, and the good steps."""


def _handing_on(received: Callable[[list[Tensor], float, float], list[Tensor]]) -> Callable[..., _Step]:
    """The right step, but in fp16 the optimizer gets `received(gradients, scale, max_norm)`."""

    def step(*case: Any) -> _Step:
        gradients, dtype, scale, _, max_norm, _ = case
        right, new_scale, new_good_steps = scaler_step(*case)
        if right and dtype == FP16:
            return received(gradients, scale, max_norm), new_scale, new_good_steps
        return right, new_scale, new_good_steps

    return step


def _skipping_where(overflows: Callable[[Tensor], bool]) -> Callable[..., _Step]:
    """A step that is skipped only where `overflows` says so; elsewhere it goes on with what there is."""

    def step(*case: Any) -> _Step:
        gradients, dtype, scale, good_steps, max_norm, growth_interval = case
        if dtype != FP16 or any(overflows(g) for g in gradients):
            return scaler_step(*case)
        finite = [g.nan_to_num(0, 0, 0) for g in gradients]
        _, new_scale, new_good_steps = scaler_step(
            finite, dtype, scale, good_steps, max_norm, growth_interval
        )
        return _clipped(_unscaled(gradients, scale), max_norm), new_scale, new_good_steps

    return step


def _scale_stays(*case: Any) -> _Step:
    """The scale is not halved where the step is skipped."""
    scale = case[2]
    received, new_scale, new_good_steps = scaler_step(*case)
    if not received:
        return received, scale, new_good_steps
    return received, new_scale, new_good_steps


def _counts_over_overflows(*case: Any) -> _Step:
    """The good steps are not counted anew where the step is skipped."""
    good_steps = case[3]
    received, new_scale, new_good_steps = scaler_step(*case)
    if not received:
        return received, new_scale, good_steps
    return received, new_scale, new_good_steps


def _counts_over_growth(*case: Any) -> _Step:
    """The good steps are not counted anew where the scale has doubled."""
    scale, good_steps = case[2:4]
    received, new_scale, new_good_steps = scaler_step(*case)
    if new_scale > scale:
        return received, new_scale, good_steps + 1
    return received, new_scale, new_good_steps


def _scaler_cases(generator: Generator) -> list[tuple]:
    def case(dtype: torch.dtype, good_steps: int, length: float, broken: float = 0.0) -> tuple:
        scale = 2.0 ** random_int(generator, 6, 14)
        gradients = [torch.randn(3, 4, generator=generator) + 2, torch.randn(4, generator=generator) + 2]
        factor = length * scale if dtype == FP16 else length
        gradients = [g * factor for g in gradients]
        gradients[1][random_int(generator, 0, 4)] += broken
        return gradients, dtype, scale, good_steps, 5.0, 10

    return [
        case(FP16, 3, 0.25),
        case(FP16, 4, 8.0),
        case(FP16, 5, 0.5, math.inf),
        case(FP16, 6, 0.5, math.nan),
        case(FP16, 9, 0.25),
        case(FP16, 9, 0.25, -math.inf),
        case(BF16, 2, 0.25),
        case(BF16, 9, 8.0),
        case(FP32, 9, 0.5),
    ]


SCALER_STEP = Exercise(
    task="""In fp16 small gradients become 0. So the loss is multiplied by a large `scale` before the backward
    pass, and with it every gradient. `gradients` is a list of float32 tensors, as the backward pass left
    them. If `dtype` is torch.float16 they are too large by `scale`. Return (received, scale, good_steps): the
    list that the optimizer gets, its length over all tensors at most `max_norm`, and the other two for the
    next step. With inf or nan anywhere, the step is skipped: received is [], the scale is halved, and
    good_steps begins again at 0. Otherwise there is one more good step; when there are `growth_interval` of
    them, the scale is doubled and good_steps begins again. In other dtypes the loss was not scaled: the
    gradients are only clipped, and scale and good_steps come back as they were. Do not change
    `gradients`.""",
    reference=scaler_step,
    cases=_scaler_cases,
    mistakes=(
        Mistake(
            "clipped before unscaling",
            _handing_on(lambda gradients, scale, max_norm: _unscaled(_clipped(gradients, max_norm), scale)),
            "Gradients were clipped while still scaled, then divided: nearly all are cut, and come out scale"
            " times too short. Unscale first.",
        ),
        Mistake(
            "never unscaled",
            _handing_on(lambda gradients, scale, max_norm: _clipped(gradients, max_norm)),
            "The scale was never divided out. Clipping hides it: every gradient now has the length max_norm,"
            " however small it was.",
        ),
        Mistake(
            "an overflow is applied",
            _skipping_where(lambda g: False),
            "Nothing was skipped. Clipping turns an inf into nan, the optimizer writes it into a weight, and"
            " every loss from then on is nan.",
        ),
        Mistake(
            "nan is not seen",
            _skipping_where(lambda g: bool(g.isinf().any())),
            "Only inf was looked for. inf - inf or 0 * inf in the backward pass leaves nan: isfinite() finds"
            " both.",
        ),
        Mistake(
            "the scale is not lowered",
            _scale_stays,
            "The step was skipped, but the scale stayed. The next one will most likely overflow as well, and"
            " nothing is learned any more.",
        ),
        Mistake(
            "good steps are not in a row",
            _counts_over_overflows,
            "good_steps went on after an overflow. The scale should grow after that many steps in a row:"
            " begin again at 0.",
        ),
        Mistake(
            "it grows at every step",
            _counts_over_growth,
            "good_steps was not set to 0 when the scale doubled. It should wait for another growth_interval"
            " of good steps.",
        ),
        Mistake(
            "scaler used with bf16",
            lambda gradients, dtype, *rest: scaler_step(gradients, FP16, *rest),
            "bfloat16 has float32's range, so nothing underflows and nothing was scaled. Dividing by the"
            " scale made these gradients vanish.",
        ),
    ),
    hints=(
        "Three ways out: not fp16 at all, an overflow, a good step. Each returns three things.",
        (
            "In fp16: look for inf and nan, then divide by the scale, then clip by min(1, max_norm / length),"
            " and count last. The order matters."
        ),
        (
            "skip: return [], scale / 2, 0. Else g / scale, clipped; if good_steps + 1 == growth_interval:"
            " scale * 2, 0, otherwise scale, good_steps + 1."
        ),
    ),
)


# ---- 5. what training holds in memory


def state_bytes(parameters: int, precision: str, moments: int) -> tuple[int, int, int]:
    return _bytes(parameters, precision, moments)


_BYTES = {
    "float32": (4, 4, 4),
    "autocast": (4, 4, 4),
    "bfloat16": (2, 2, 2),
    "master": (6, 2, 4),
}
"""By precision: the bytes of a weight, of its gradient, and of one of its moments."""


def _bytes(
    parameters: int, precision: str, moments: int, **other: tuple[int, int, int]
) -> tuple[int, int, int]:
    """other: the bytes of a precision, where they are not those of `_BYTES`."""
    weight, gradient, moment = other.get(precision, _BYTES[precision])
    return parameters * weight, parameters * gradient, parameters * moments * moment


def _bytes_cases(generator: Generator) -> list[tuple[int, str, int]]:
    def case(precision: str, moments: int) -> tuple[int, str, int]:
        return random_int(generator, 1000, 10**9), precision, moments

    gpt2 = 124_439_808
    return [
        *((gpt2, precision, 2) for precision in _BYTES),
        case("autocast", 2),
        case("bfloat16", 1),
        case("master", 1),
        case("float32", 0),
    ]


STATE_BYTES = Exercise(
    task="""How much memory does training hold besides the activations? A model has `parameters` weights, and
    its optimizer keeps `moments` numbers for each: 2 for AdamW, 1 for SGD with momentum, 0 for plain SGD.
    `precision` is "float32"; "autocast" (torch.autocast to bfloat16 round a float32 model); "bfloat16"
    (model.bfloat16(), and the moments have the weights' dtype); or "master" (weights and gradients are
    bfloat16, and the optimizer has a float32 copy of the weights, and float32 moments). Return (weights,
    gradients, moments), the bytes of each when the optimizer steps, three ints. A float32 copy counts with
    the weights.""",
    reference=state_bytes,
    cases=_bytes_cases,
    mistakes=(
        Mistake(
            "autocast stores 16-bit weights",
            lambda *case: _bytes(*case, autocast=(2, 4, 4)),
            "Autocast changes operations, not what is stored: in 16 bits small updates would be lost. Copies"
            " of 16 bits are made for the products only.",
        ),
        Mistake(
            "autocast's gradients have 16 bits",
            lambda *case: _bytes(*case, autocast=(4, 2, 4)),
            "A gradient has the dtype of its weight, and under autocast that is float32. The backward pass of"
            " the cast goes back to float32.",
        ),
        Mistake(
            "autocast halves everything",
            lambda *case: _bytes(*case, autocast=(2, 2, 2)),
            "This is model.bfloat16(). Autocast saves memory in the activations only; weights, gradients and"
            " moments stay float32.",
        ),
        Mistake(
            "one moment for all",
            lambda parameters, precision, moments: _bytes(parameters, precision, min(moments, 1)),
            "The moments were counted once. AdamW keeps two, the mean of the gradient and that of its square:"
            " in float32, half of all that is held.",
        ),
        Mistake(
            "moments are always float32",
            lambda *case: _bytes(*case, bfloat16=(2, 2, 4)),
            "In a pure bfloat16 model PyTorch makes the moments like the weights, in bfloat16. It is small,"
            " and less exact than one would wish.",
        ),
        Mistake(
            "the master copy is forgotten",
            lambda *case: _bytes(*case, master=(2, 2, 4)),
            "The float32 copy of the weights is missing in master: 4 bytes more for each. All in all, it"
            " holds as much as float32 does.",
        ),
        Mistake(
            "the 16-bit weights are forgotten",
            lambda *case: _bytes(*case, master=(4, 2, 4)),
            "In master the float32 copy was counted alone. The model itself computes with weights of 16 bits,"
            " 2 bytes more for each.",
        ),
    ),
    hints=(
        (
            "Bytes for one weight first: the weight itself, its gradient, each moment. A float32 has 4 bytes,"
            " a bfloat16 has 2."
        ),
        (
            "float32 and autocast store the same: 4, 4, and 4 for each moment. What does master have twice,"
            " in two dtypes?"
        ),
        (
            "For one weight: float32 and autocast 4, 4, 4 * moments; bfloat16 2, 2, 2 * moments; master 2 +"
            " 4, 2, 4 * moments."
        ),
    ),
)


# ---- 6. the largest batch


@dataclass(frozen=True)
class UpTo:
    """A machine that runs batches of up to `most` rows."""

    most: int

    def __call__(self, size: int) -> bool:
        return size <= self.most


# The annotation is a string because the stub, where nothing called Callable is imported, repeats it.
def largest_batch(fits: "Callable[[int], bool]", limit: int) -> tuple[int, list[int]]:
    return _bisected(fits, *_doubled(fits, limit))


def _doubled(fits: Callable[[int], bool], limit: float) -> tuple[int, int, list[int]]:
    """The largest size found to fit, the smallest found (or not allowed) not to, and the sizes tried."""
    low = 0
    high = 1
    tried = [high]
    while fits(high):
        if high == limit:
            return high, high + 1, tried
        low = high
        high = min(2 * high, limit)
        tried.append(high)
    return low, high, tried


def _bisected(fits: Callable[[int], bool], low: int, high: int, tried: list[int]) -> tuple[int, list[int]]:
    """Goes on from `_doubled`, between the two sizes; returns the largest that fits, and the sizes tried."""
    tried = list(tried)
    while high - low > 1:
        middle = (low + high) // 2
        tried.append(middle)
        if fits(middle):
            low = middle
        else:
            high = middle
    return low, tried


def _only_doubled(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
    low, _, tried = _doubled(fits, limit)
    return low, tried


def _from_zero(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
    _, high, tried = _doubled(fits, limit)
    return _bisected(fits, 0, high, tried)


def _one_too_many(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
    largest, tried = largest_batch(fits, limit)
    if fits(limit):
        return largest, tried
    return largest + 1, tried


def _one_by_one(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
    largest, _ = largest_batch(fits, limit)
    last = min(largest + 1, limit)
    return largest, list(range(1, last + 1))


def _at_least_one(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
    largest, tried = largest_batch(fits, limit)
    return max(1, largest), tried


def _batch_cases(generator: Generator) -> list[tuple[UpTo, int]]:
    def case(most: tuple[int, int], limit: tuple[int, int]) -> tuple[UpTo, int]:
        """most, limit: each drawn from a range."""
        return UpTo(random_int(generator, *most)), random_int(generator, *limit)

    return [
        (UpTo(11), 1000),
        (UpTo(32), 512),
        (UpTo(500), 100),
        (UpTo(0), 8),
        (UpTo(90), 100),
        case((130, 250), (300, 900)),
        case((17, 31), (40, 60)),
        (UpTo(9999), random_int(generator, 5, 7)),
    ]


LARGEST_BATCH = Exercise(
    task="""Whether a batch fits in memory is found out by running a step, and each try takes its time.
    `fits(size)` says whether a batch of `size` rows fits; if one does, so do all smaller ones. Try 1, then
    double until a size does not fit. Then, of the sizes between the largest that fitted and the smallest that
    did not, try the middle one, (low + high) // 2, until none is left between. Never try a size above
    `limit`: where doubling would pass it, try `limit` itself, and stop if it fits. Return (largest, tried):
    the largest size that fits, 0 if not even 1 does, and the list of the sizes tried, in order.""",
    reference=largest_batch,
    cases=_batch_cases,
    mistakes=(
        Mistake(
            "stops at a power of two",
            _only_doubled,
            "The search ended with the doubling. The largest batch may be nearly twice as large: bisect"
            " between the last two sizes.",
        ),
        Mistake(
            "the first that does not fit",
            _one_too_many,
            "This is the smallest size that does not fit, one too many. The answer is low, the side on which"
            " every try went well.",
        ),
        Mistake(
            "the limit is passed",
            lambda fits, limit: largest_batch(fits, math.inf),
            "Sizes above the limit were tried. Double to min(2 * size, limit), and stop if the limit itself"
            " fits.",
        ),
        Mistake(
            "one by one",
            _one_by_one,
            "The answer is right, but every size was tried in turn. For a batch of 200 that is 201 steps;"
            " doubling and bisecting take 16.",
        ),
        Mistake(
            "bisects from 0",
            _from_zero,
            "The bisecting began at 0 again, though half of that range is known to fit. Keep the last size"
            " that fitted as the lower end.",
        ),
        Mistake(
            "1 where nothing fits",
            _at_least_one,
            "Where not even one row fits, the answer was 1. Begin with low = 0: nothing is known to fit"
            " before the first try.",
        ),
    ),
    hints=(
        (
            "Keep two numbers: low, the largest size known to fit (at first 0), and high, the smallest known"
            " not to."
        ),
        (
            "First loop: while high fits, low = high and high = min(2 * high, limit); return at once if low"
            " is the limit. Second: while high - low > 1."
        ),
        (
            "In the second loop: middle = (low + high) // 2, tried.append(middle), then low = middle if"
            " fits(middle), else high = middle. Return low."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    ROUND_TO_BF16,
    AUTOCAST_DTYPES,
    BF16_PRODUCT,
    SCALER_STEP,
    STATE_BYTES,
    LARGEST_BATCH,
)
