"""The graded exercises of week 7: rounding to 16 bits, a 16-bit product, the scaler as a step and as an
object, autocast, memory, batch size, and the output layer with its loss in chunks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Generator, Tensor, nn

from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.training import memory
from shared.training.kernels import fused_cross_entropy
from shared.training.linear_loss import LinearCrossEntropy, linear_cross_entropy
from shared.training.memory import LiveTensors

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
_OPERATIONS = (*_PRODUCTS, *_DELICATE, *_OTHERS)
_TAKE_TWO = ("linear", "matmul", "add", "mul")
_Rule = Callable[[list[torch.dtype]], torch.dtype]
"""The dtype of a result, from those of what went in."""


def _always(dtype: torch.dtype) -> _Rule:
    return lambda dtypes: dtype


_always_fp32 = _always(FP32)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    return FP32 if FP32 in dtypes else dtypes[0]


def _narrowest(dtypes: list[torch.dtype]) -> torch.dtype:
    return next((dtype for dtype in dtypes if dtype != FP32), FP32)


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


def _is_a_program(
    program: list[tuple[str, str, list[str]]], inputs: dict[str, torch.dtype], dtype: torch.dtype
) -> bool:
    """Whether every operation is one of the task's, with as many names as it takes, all known by then."""
    known = set(inputs)
    for result, operation, names in program:
        count = 2 if operation in _TAKE_TWO else 1
        is_known = operation in _OPERATIONS and known.issuperset(names)
        if not is_known or len(names) != count or not result or result in known:
            return False
        known.add(result)
    return bool(program)


def _autocast_cases(generator: Generator) -> list[tuple]:
    def case(dtype: torch.dtype) -> tuple:
        names = ["w", "x"]
        program = []
        for i in range(8):
            operation = _OPERATIONS[random_int(generator, 0, len(_OPERATIONS))]
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
    forbids=(torch.autocast,),
    valid=_is_a_program,
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
            "16 bits win",
            lambda program, inputs, dtype: _traced(program, inputs, _always(dtype), other=_narrowest),
            "Where 16 bits and float32 met, the result got 16. The wider one wins: the residual stream,"
            " float32 plus a layer's 16 bits, keeps its digits.",
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
    float32, and rounds only the result. `a` [m, k] and `b` [k, n] are float32, as a layer has them. Return
    what such a unit, here one for bfloat16, makes of a @ b: bfloat16 [m, n]. x.bfloat16() rounds, .float()
    goes back without any loss.""",
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
            "Only b was rounded. The unit reads 16 bits of both factors, of what flows through the layer as"
            " well as of its weights.",
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


def _clipped_alone(*case: Any) -> _Step:
    """Each tensor is clipped by its own length."""
    gradients, dtype, scale, _, max_norm, _ = case
    right, new_scale, new_good_steps = scaler_step(*case)
    if not right:
        return right, new_scale, new_good_steps
    true = _unscaled(gradients, scale) if dtype == FP16 else gradients
    return [_clipped([g], max_norm)[0] for g in true], new_scale, new_good_steps


def _one_step_late(*case: Any) -> _Step:
    """The scale doubles when there are more than `growth_interval` good steps."""
    gradients, dtype, scale, good_steps, max_norm, growth_interval = case
    return scaler_step(gradients, dtype, scale, good_steps, max_norm, growth_interval + 1)


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
    forbids=(torch.amp.GradScaler,),
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
            "each tensor is clipped alone",
            _clipped_alone,
            "Each tensor was cut to max_norm by its own length. The limit is for the length over all of them"
            " together, and one factor for all keeps the direction of the step.",
        ),
        Mistake(
            "it grows one step late",
            _one_step_late,
            "The scale doubled one good step after growth_interval of them. Count the present step first,"
            " then compare.",
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


# ---- 5. the scaler as PyTorch has it


class LossScaler:
    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000):
        self.factor = scale
        self.growth_interval = growth_interval
        self.good_steps = 0
        self.is_finite: bool | None = None
        """Of the gradients of this step; None before they were unscaled."""

    def get_scale(self) -> float:
        return self.factor

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = self._gradients(optimizer)
        for gradient in gradients:
            gradient /= self.factor
        self.is_finite = self._all_finite(gradients)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_finite is None:
            self.unscale_(optimizer)
        if self.is_finite:
            optimizer.step()

    def update(self) -> None:
        if self.is_finite:
            self._after_a_good_step()
        else:
            self._after_an_overflow()
        self.is_finite = None

    # The parts that mistakes exchange.

    def _gradients(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _all_finite(self, gradients: list[Tensor]) -> bool:
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def _after_a_good_step(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.factor *= 2
            self.good_steps = 0

    def _after_an_overflow(self) -> None:
        self.factor /= 2
        self.good_steps = 0


LOSS_SCALER_STUB = """class LossScaler:
    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000):
        # self.good_steps: how many good steps there were in a row
        # your code here
        ...

    def get_scale(self) -> float:
        # your code here
        ...

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        # loss: a scalar; so is the result
        # your code here
        ...

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        # the parameters: p for group in optimizer.param_groups for p in group["params"]
        # your code here
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        # your code here
        ...

    def update(self) -> None:
        # your code here
        ...
"""


class _NeverUnscaled(LossScaler):
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_finite is None:
            self.is_finite = self._all_finite(self._gradients(optimizer))
        if self.is_finite:
            optimizer.step()


class _UnscaledTwice(LossScaler):
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.unscale_(optimizer)
        if self.is_finite:
            optimizer.step()


class _OverflowApplied(LossScaler):
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_finite is None:
            self.unscale_(optimizer)
        optimizer.step()


class _StepWithZeros(LossScaler):
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.is_finite is None:
            self.unscale_(optimizer)
        if not self.is_finite:
            for gradient in self._gradients(optimizer):
                gradient.zero_()
        optimizer.step()


class _OnlyInf(LossScaler):
    def _all_finite(self, gradients: list[Tensor]) -> bool:
        return not any(bool(gradient.isinf().any()) for gradient in gradients)


class _LastParameterDecides(LossScaler):
    def _all_finite(self, gradients: list[Tensor]) -> bool:
        return super()._all_finite(gradients[-1:])


class _FirstGroupOnly(LossScaler):
    def _gradients(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]


class _EveryParameterHasAGradient(LossScaler):
    def _gradients(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        found = [p.grad for group in optimizer.param_groups for p in group["params"]]
        for gradient in found:
            gradient /= 1
        return found


class _NeverBacksOff(LossScaler):
    def _after_an_overflow(self) -> None:
        self.good_steps = 0


class _CountsOnAfterASkip(LossScaler):
    def _after_an_overflow(self) -> None:
        self.factor /= 2


class _CountsOnAfterGrowing(LossScaler):
    def _after_a_good_step(self) -> None:
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.factor *= 2


class _OneStepLate(LossScaler):
    def _after_a_good_step(self) -> None:
        if self.good_steps == self.growth_interval:
            self.factor *= 2
            self.good_steps = 0
        else:
            self.good_steps += 1


class _GrowsByASmallFactor(LossScaler):
    def _after_a_good_step(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.factor *= 1.5
            self.good_steps = 0


class _NeverForgets(LossScaler):
    was_finite = True

    def _all_finite(self, gradients: list[Tensor]) -> bool:
        self.was_finite = self.was_finite and super()._all_finite(gradients)
        return self.was_finite


class _StaysUnscaled(LossScaler):
    was_unscaled = False

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        self.was_unscaled = True

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.was_unscaled:
            self.unscale_(optimizer)
        if self.is_finite is not False:
            optimizer.step()

    def update(self) -> None:
        self.is_finite = self.is_finite is not False
        super().update()


class _LossDetached(LossScaler):
    def scale(self, loss: Tensor) -> Tensor:
        return torch.tensor(loss.item() * self.factor)


_Gradients = list[Tensor | None]
"""Of a step, one for each parameter; None for one that the loss does not use."""


def _scaler_runs(generator: Generator) -> list[tuple]:
    def gradients(*broken: float | None) -> _Gradients:
        """broken: what is added to a number of each parameter's gradient; None leaves the gradient out."""
        row: _Gradients = []
        for shape, value in zip(((2, 3), (3,), (4,)), broken):
            gradient = torch.randint(1, 9, shape, generator=generator) / 4.0
            gradient.view(-1)[random_int(generator, 0, gradient.numel())] += value or 0.0
            row.append(None if value is None else gradient)
        return row

    good = (0.0, 0.0, 0.0)
    inf, nan = math.inf, math.nan

    def run(scale: float, growth_interval: int, *steps: tuple) -> tuple:
        return scale, growth_interval, [gradients(*broken) for broken in steps]

    power = 2.0 ** random_int(generator, 5, 12)
    return [
        run(8.0, 100, good),
        run(4.0, 100, good, good),
        run(power, 100, good, (inf, 0.0, 0.0), good),
        run(power, 100, (0.0, nan, 0.0), good),
        run(16.0, 2, *[good] * 5),
        run(2.0, 3, good, good, (0.0, 0.0, -inf), *[good] * 3),
        run(1.0, 100, (0.0, inf, nan), (inf, 0.0, 0.0), (nan, nan, nan)),
        run(power, 2, good, (None, 0.0, 0.0), (0.0, inf, None), good),
        run(2.0**20, 1, good, good, (0.0, -inf, 0.0), good),
    ]


def _observe_scaler(
    answer: Callable[..., Any], scale: float, growth_interval: int, steps: list[_Gradients]
) -> Iterator[tuple[str, Any]]:
    building.takes(answer, "scale", "growth_interval")
    yield "get_scale() with nothing given", building.method(answer(), "get_scale")()
    scaler = answer(scale=scale, growth_interval=growth_interval)
    yield "get_scale() at the start", scaler.get_scale()
    yield "good_steps at the start", scaler.good_steps
    loss = torch.tensor(0.75, requires_grad=True)
    scaled = building.method(scaler, "scale")(loss)
    yield "scale(loss)", scaled
    if not (isinstance(scaled, Tensor) and scaled.requires_grad):
        raise NotRight(
            "scale(loss) has no graph: what is called backward on is this result, and the gradients have to"
            " come through it. Multiply the tensor itself."
        )
    parameters = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.125}]
    optimizer = torch.optim.AdamW(groups, lr=0.25, weight_decay=0.5, eps=1.0)
    for number, gradients in enumerate(steps, 1):
        yield from _observe_scaled_step(scaler, parameters, optimizer, gradients, number)


def _observe_scaled_step(
    scaler: Any,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradients: _Gradients,
    number: int,
) -> Iterator[tuple[str, Any]]:
    """A step; in each second one the gradients are unscaled and clipped before it."""
    optimizer.zero_grad()
    parts = [(p * g).sum() for p, g in zip(parameters, gradients) if g is not None]
    scaler.scale(torch.stack(parts).sum()).backward()
    before = [p.detach().clone() for p in parameters]
    scaled = [None if p.grad is None else p.grad.clone() for p in parameters]
    is_good = all(g is None or bool(g.isfinite().all()) for g in gradients)
    if number % 2 == 0:
        building.method(scaler, "unscale_")(optimizer)
        if is_good:
            for i, p in enumerate(parameters):
                yield (
                    f"step {number}: gradient {i} after unscale_",
                    None if p.grad is None else p.grad.clone(),
                )
            nn.utils.clip_grad_norm_(parameters, 0.5)
    building.method(scaler, "step")(optimizer)
    are_finite = all(bool(p.isfinite().all()) for p in parameters)
    if not is_good and are_finite and not all(map(torch.equal, before, parameters)):
        raise NotRight(
            "a step whose gradients had inf or nan changed a weight. Such a step is left out whole:"
            " optimizer.step() is not called at all, since AdamW moves the weights even with gradients of 0."
        )
    if is_good:
        _was_done(parameters, before, scaled, scaler.get_scale(), number)
    if not is_good and not are_finite:
        raise NotRight(
            "a step whose gradients had inf or nan was carried out, and weights are no numbers now."
            " `step` may call optimizer.step() only where all gradients of this step are finite."
        )
    for i, p in enumerate(parameters):
        yield f"step {number}: parameter {i}", p.detach().clone()
    counts = [int(optimizer.state[p]["step"]) if optimizer.state[p] else 0 for p in parameters]
    yield f"step {number}: how many steps the optimizer has made", counts
    building.method(scaler, "update")()
    yield f"step {number}: get_scale() after update", scaler.get_scale()
    yield f"step {number}: good_steps after update", scaler.good_steps


def _was_done(
    parameters: list[nn.Parameter], before: list[Tensor], scaled: _Gradients, scale: float, number: int
) -> None:
    """Raises NotRight where a good step was left out, or done with gradients as the backward left them.

    before, scaled: the parameters before it, and their gradients before anything was divided.
    """
    earlier = number > 1
    if all(map(torch.equal, before, parameters)):
        raise NotRight(
            "a step whose gradients are all finite was left out."
            + (" What was found in an earlier step has to be forgotten in `update`." if earlier else "")
        )
    now = [p.grad for p in parameters]
    pairs = [(a, b) for a, b in zip(now, scaled) if a is not None and b is not None]
    if scale != 1 and pairs and number % 2 and all(torch.equal(a, b) for a, b in pairs):
        raise NotRight(
            "nobody called `unscale_` in this step, and `step` did not divide the gradients either: the"
            " optimizer got them scale times too large."
            + (" That an earlier step was unscaled has to be forgotten in `update`." if earlier else "")
        )


LOSS_SCALER = Exercise(
    task="""Now make of that step an object that a training can keep, with the methods that PyTorch's scaler
    has. A step of the training calls, in this order: `scale(loss).backward()`, `unscale_(optimizer)` where
    it wants to clip, `step(optimizer)`, `update()`.

    - `get_scale()` is the present scale, a float, at first the one that was given; `good_steps` counts the
      good steps since the scale last changed or a step was skipped.
    - `scale(loss)` is the loss times the scale; gradients flow through it.
    - `unscale_(optimizer)` divides the gradients of all the optimizer's parameters by the scale, in place,
      and looks whether inf or nan is in any of them. A parameter's `.grad` may be None.
    - `step(optimizer)` unscales if that has not been done in this step, and only then. It calls
      optimizer.step() if all gradients are finite; otherwise it leaves weights and optimizer as they are.
    - `update()`, once at the end of a step: after a skipped step the scale is halved and good_steps is 0.
      After a good one good_steps grows by 1; where it reaches `growth_interval`, the scale doubles and
      good_steps is 0 again. Then the next step begins, which knows nothing of this one's inf.""",
    reference=LossScaler,
    cases=_scaler_runs,
    stub=LOSS_SCALER_STUB,
    observe=_observe_scaler,
    forbids=(torch.amp.GradScaler,),
    valid=lambda scale, growth_interval, steps: (
        scale > 0 and growth_interval >= 1 and all(_is_a_step(gradients) for gradients in steps)
    ),
    points=3,
    mistakes=(
        Mistake(
            "unscaled only where unscale_ is called",
            _NeverUnscaled,
            "Where nobody clips, nobody calls `unscale_`, and the optimizer got gradients that are scale"
            " times too large. `step` has to unscale them then.",
        ),
        Mistake(
            "unscaled twice",
            _UnscaledTwice,
            "`step` divided by the scale again after `unscale_` had done so: the gradients are scale times"
            " too small. Remember in `unscale_` that it was done, and forget it in `update`.",
        ),
        Mistake(
            "an overflow is applied",
            _OverflowApplied,
            "A step with inf or nan was carried out. One such step makes the weights nan, and nothing mends"
            " them again.",
        ),
        Mistake(
            "a step with gradients of 0",
            _StepWithZeros,
            "The gradients were set to 0, and the optimizer stepped. AdamW then still decays the weights,"
            " moves on by its old mean, and counts a step. A skipped step calls nothing.",
        ),
        Mistake(
            "nan is not seen",
            _OnlyInf,
            "Only inf was looked for. inf - inf in a backward pass leaves nan; isfinite() finds both.",
        ),
        Mistake(
            "the last parameter decides",
            _LastParameterDecides,
            "The finding was written anew for each parameter, so only the last one counted. One inf anywhere"
            " is enough.",
        ),
        Mistake(
            "only the first group",
            _FirstGroupOnly,
            "Only param_groups[0] was looked at. Week 6's decay groups are two: biases and gains are in the"
            " second.",
        ),
        Mistake(
            "every parameter has a gradient",
            _EveryParameterHasAGradient,
            "A parameter that the loss does not use has None for its gradient. Pass over it.",
        ),
        Mistake(
            "the scale is not lowered",
            _NeverBacksOff,
            "The step was skipped, but the scale stayed. The next step will most likely overflow as well.",
        ),
        Mistake(
            "good steps are not in a row",
            _CountsOnAfterASkip,
            "good_steps went on after an overflow. The scale may grow after so many good steps in a row:"
            " begin again at 0.",
        ),
        Mistake(
            "it grows at every step",
            _CountsOnAfterGrowing,
            "good_steps was not set to 0 when the scale doubled. It should wait for another growth_interval"
            " of good steps.",
        ),
        Mistake(
            "it grows one step late",
            _OneStepLate,
            "The scale doubled one good step after growth_interval of them. Count the present step first,"
            " then compare.",
        ),
        Mistake(
            "it does not double",
            _GrowsByASmallFactor,
            "The scale grew by another factor than 2. A power of two changes only the exponents of the"
            " gradients: multiplying and dividing by it rounds nothing away.",
        ),
        Mistake(
            "an overflow is never forgotten",
            _NeverForgets,
            "After the first overflow every later step was skipped too. `update` ends the step: what was"
            " found in it must not reach the next one.",
        ),
        Mistake(
            "that it was unscaled is never forgotten",
            _StaysUnscaled,
            "Only the first step was unscaled by `step`: that it had been done was still remembered in the"
            " next one, whose gradients are new and scaled again. `update` ends the step, and forgets it.",
        ),
        Mistake(
            "the loss is taken out of its tensor",
            _LossDetached,
            "The scaled loss is a new tensor made of a number (.item(), torch.tensor), and has no graph:"
            " backward has nothing to go through. Multiply the loss itself.",
        ),
    ),
    hints=(
        (
            "What has to be remembered between the methods of one step? Whether the gradients were unscaled"
            " yet, and whether they are finite."
        ),
        (
            "One attribute can hold both: self.is_finite is None before `unscale_`, then True or False;"
            " `step` and `update` read it, and `update` sets it to None."
        ),
        (
            "`unscale_`: for each p.grad that is not None, p.grad.div_(self.factor); self.is_finite = all of"
            " p.grad.isfinite().all(). `step`: unscale_ if is_finite is None; optimizer.step() if is_finite."
            " `update`: as in scaler_step, then is_finite = None."
        ),
    ),
)


def _is_a_step(gradients: _Gradients) -> bool:
    """Whether it has the three shapes, and a gradient at all."""
    shapes = [(2, 3), (3,), (4,)]
    if len(gradients) != len(shapes) or all(g is None for g in gradients):
        return False
    return all(g is None or tuple(g.shape) == shape for g, shape in zip(gradients, shapes))


# ---- 6. what training holds in memory


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


# ---- 7. the largest batch


@dataclass(frozen=True)
class UpTo:
    """A machine that runs batches of up to `most` rows."""

    most: int

    def __call__(self, size: int) -> bool:
        return size <= self.most


LARGEST_BATCH_STUB = """def largest_batch(fits: "Callable[[int], bool]", limit: int) -> tuple[int, list[int]]:
    # your code here
    ...
"""
"""The annotation is a string, since nothing called Callable may be imported where it is filled in."""


def largest_batch(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
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


def _limit_untried(fits: Callable[[int], bool], limit: int) -> tuple[int, list[int]]:
    """The search ends where doubling would pass the limit."""
    power = 1
    while 2 * power <= limit:
        power *= 2
    if not fits(power):
        return largest_batch(fits, limit)
    low, _, tried = _doubled(fits, power)
    return low, tried


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
    stub=LARGEST_BATCH_STUB,
    cases=_batch_cases,
    forbids=(memory.largest_batch,),
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
            "the limit is not tried",
            _limit_untried,
            "Where doubling would pass the limit, the search ended. Larger sizes up to the limit may fit:"
            " double to min(2 * size, limit), so that the limit itself is tried.",
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


# ---- 8. output layer and loss, in chunks


LINEAR_CROSS_ENTROPY_STUB = """class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # float32 [tokens, channel]
        weight: torch.Tensor,  # float32 [vocab_size, channel]
        targets: torch.Tensor,  # int64 [tokens]
        ignore_index: int,
        chunk_size: int,
    ) -> torch.Tensor:
        # ctx.save_for_backward(...) keeps tensors that backward will need
        # your code here
        ...

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        # upstream: the gradient that arrives at the loss, a scalar
        # returns a gradient for each argument of forward; None for the last three
        # your code here
        ...
"""

_Chunk = tuple[Tensor, Tensor, Tensor]
"""Of a chunk: its losses [rows], the gradient of its logits [rows, vocab_size], which rows count [rows]."""


def _chunk(logits: Tensor, targets: Tensor, ignore_index: int) -> _Chunk:
    """The losses and the gradient of their sum; 0 in rows that do not count."""
    counts = targets != ignore_index
    picked = torch.where(counts, targets, 0)[:, None]
    log_sums = logits.logsumexp(-1, keepdim=True)
    losses = (log_sums - logits.gather(1, picked))[:, 0]
    gradient = (logits - log_sums).exp().scatter_add(1, picked, -torch.ones_like(log_sums))
    return losses * counts, gradient * counts[:, None], counts


def _without_one_hot(logits: Tensor, targets: Tensor, ignore_index: int) -> _Chunk:
    losses, _, counts = _chunk(logits, targets, ignore_index)
    return losses, logits.softmax(-1) * counts[:, None], counts


def _ignored_rows_push(logits: Tensor, targets: Tensor, ignore_index: int) -> _Chunk:
    losses, _, counts = _chunk(logits, targets, ignore_index)
    picked = torch.where(counts, targets, 0)
    return losses, logits.softmax(-1) - nn.functional.one_hot(picked, logits.size(-1)), counts


def _overflowing_softmax(logits: Tensor, targets: Tensor, ignore_index: int) -> _Chunk:
    counts = targets != ignore_index
    picked = torch.where(counts, targets, 0)[:, None]
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    losses = -probabilities.gather(1, picked)[:, 0].log()
    gradient = probabilities.scatter_add(1, picked, -torch.ones(len(logits), 1))
    return losses * counts, gradient * counts[:, None], counts


def _log_of_softmax(logits: Tensor, targets: Tensor, ignore_index: int) -> _Chunk:
    _, gradient, counts = _chunk(logits, targets, ignore_index)
    picked = torch.where(counts, targets, 0)[:, None]
    losses = -logits.softmax(-1).gather(1, picked)[:, 0].log()
    return losses.where(counts, 0), gradient, counts


@dataclass(frozen=True)
class _Way:
    """A loss in chunks with some of its parts wrong."""

    chunk: Callable[[Tensor, Tensor, int], _Chunk] = _chunk
    mean_of_means: bool = False
    """Each chunk's mean, and their mean."""
    gradient_by_chunk: bool = False
    """The gradients are divided by the number of rows in their chunk."""
    at_least_one: bool = False
    """Where no token counts, the number of those that do is taken for 1."""
    ignored_count: bool = False
    """The mean is taken over all rows."""
    rest_is_dropped: bool = False
    """What is left behind the last full chunk is not looked at."""
    last_chunk_only: bool = False
    """The weight's gradient is that of the last chunk."""
    upstream: bool = True
    kept_is_changed: bool = False
    """backward multiplies what it keeps, in place."""
    whole: bool = False
    """All logits at once."""
    at_minus_100: bool = False
    """Takes -100 for the ignore_index."""

    def forward(self, ctx: Any, *case: Any) -> Tensor:
        hidden, weight, targets, ignore_index, chunk_size = case
        if self.at_minus_100:
            ignore_index = -100
        end = len(targets)
        if self.whole:
            chunk_size = end
        if self.rest_is_dropped:
            end -= end % chunk_size
        total = end if self.ignored_count else (targets[:end] != ignore_index).sum()
        if self.at_least_one:
            total = max(int(total), 1)
        parts = []
        hidden_grad, weight_grad = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in range(0, end, chunk_size):
            rows = slice(start, min(start + chunk_size, end))
            losses, grad, counts = self.chunk(hidden[rows] @ weight.T, targets[rows], ignore_index)
            share = counts.sum() if self.mean_of_means or self.gradient_by_chunk else total
            grad /= max(int(share), 1)
            parts.append(losses.sum() / (counts.sum() if self.mean_of_means else total))
            hidden_grad[rows] = grad @ weight
            if self.last_chunk_only:
                weight_grad.zero_()
            weight_grad += grad.T @ hidden[rows]
        number = len(parts) if self.mean_of_means else 1
        ctx.save_for_backward(hidden_grad / number, weight_grad / number)
        return torch.stack(parts).sum() / number if parts else torch.zeros(())

    def backward(self, ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if not self.upstream:
            return *gradients, None, None, None
        if self.kept_is_changed:
            return *(g.mul_(upstream) for g in gradients), None, None, None
        return *(upstream * g for g in gradients), None, None, None


def _loss_made(**wrong: Any) -> type[torch.autograd.Function]:
    """The loss as a Function, with these parts of `_Way`."""
    way = _Way(**wrong)
    methods = {"forward": staticmethod(way.forward), "backward": staticmethod(way.backward)}
    return type("LinearCrossEntropy", (torch.autograd.Function,), methods)


def _linear_cases(generator: Generator) -> list[tuple]:
    def case(
        tokens: int,
        channel: int,
        vocab_size: int,
        chunk_size: int,
        *,
        ignored: Sequence[int] = (),
        ignore_index: int = -100,
        spread: float = 1.0,
    ) -> tuple:
        """ignored: the numbers of the tokens that do not count."""
        hidden = torch.randn(tokens, channel, generator=generator)
        weight = spread * torch.randn(vocab_size, channel, generator=generator)
        targets = torch.randint(max(ignore_index + 1, 0), vocab_size, (tokens,), generator=generator)
        targets[list(ignored)] = ignore_index
        return hidden, weight, targets, ignore_index, chunk_size

    far = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    apart = torch.tensor([[200.0, 0.0], [0.0, 0.0], [0.0, 200.0]])
    return [
        case(1, 2, 3, 1),
        case(4, 2, 3, 2),
        case(5, 3, 4, 2),
        case(6, 3, 4, 6, ignored=[1, 4]),
        case(6, 2, 5, 4, ignored=[0, 1, 2]),
        case(7, 3, 4, 3, ignored=[0, 1, 2, 6], ignore_index=0),
        case(4, 3, 5, 9),
        (far, apart, torch.tensor([1, 0, 2]), -100, 2),
        case(3, 2, 4, 2, ignored=[0, 1, 2]),
        case(5, 4, 6, 2, spread=300.0, ignored=[3]),
        case(96, 4, 300, 4, ignored=[10, 11]),
    ]


def _observe_linear(
    answer: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int
) -> Iterator[tuple[str, Any]]:
    if not (isinstance(answer, type) and issubclass(answer, torch.autograd.Function)):
        raise NotRight("a class is wanted that inherits from torch.autograd.Function.")
    rest = targets, ignore_index, chunk_size

    def graph(factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        h = (factor * hidden).requires_grad_()
        w = weight.clone().requires_grad_()
        return answer.apply(h, w, *rest), h, w

    with _by_hand():
        yield "the loss", answer.apply(hidden, weight, *rest)
        if not bool((targets != ignore_index).any()):
            return
        loss, h, w = graph()
        yield from _named_gradients(_gradient(loss, h, w, keep=True), "the gradient")
        _same_again(loss, h, w)
        loss, h, w = graph()
        yield from _named_gradients(_gradient(-2.5 * loss, h, w), "times -2.5: the gradient")
        yield from _observe_two_losses(graph)
    # Outside: watching tensors may import PyTorch's compiler, which looks at every function of autograd.
    _stays_small(graph, targets.numel() * len(weight))


def _observe_two_losses(graph: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[str, Any]]:
    """Two batches in one loss, as accumulated: each has a backward of its own."""
    first, h, w = graph()
    second, other_h, other_w = graph(factor=0.5)
    found = _gradient(first + 3 * second, h, w, other_h, other_w)
    yield from _named_gradients(found[:2], "first of two losses: the gradient")
    yield from _named_gradients(found[2:], "second of two losses, times 3: the gradient")


def _named_gradients(found: Sequence[Tensor], what: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{what} of hidden", found[0]
    yield f"{what} of weight", found[1]


_autograd = torch.autograd.grad


def _gradient(loss: Tensor, *inputs: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
    if not loss.requires_grad:
        raise NotRight("the loss has no graph: call the loss by LinearCrossEntropy.apply.")
    return tuple(g.clone() for g in _autograd(loss, inputs, retain_graph=keep))


@contextmanager
def _by_hand() -> Iterator[None]:
    """Inside, autograd works out nothing but what the engine itself is asked for by `_gradient`."""

    def refuse(*args: Any, **options: Any) -> None:
        raise NotRight(
            "the gradient was left to autograd. Derive it: for the logits of a token that counts it is"
            " (softmax - one-hot) over the number of targets that count; from there to hidden and to weight"
            " it is one product of matrices each."
        )

    with patch.object(torch.autograd, "grad", refuse), patch.object(torch.autograd, "backward", refuse):
        yield


def _same_again(loss: Tensor, h: Tensor, w: Tensor) -> None:
    first, second = (_gradient(4 * loss, h, w, keep=True) for _ in range(2))
    if not all(map(torch.equal, first, second)):
        raise NotRight(
            "a second backward through the same loss gives other gradients: backward changed in place what"
            " forward had kept. Make new tensors: upstream * kept."
        )


def _stays_small(graph: Callable[..., tuple[Tensor, Tensor, Tensor]], logits: int) -> None:
    """Raises NotRight where all logits were in memory at once. Only large cases tell."""
    if logits < 20_000:
        return
    with LiveTensors() as live:
        loss, h, w = graph()
        _gradient(loss, h, w)
    if live.peak > 4 * logits / 2:
        raise NotRight(
            f"the values are right, but {live.peak // 4} numbers were in memory at once, and all logits are"
            f" {logits}: the logits of all tokens were whole, or the chunks were all kept. Go through the"
            " tokens chunk_size at a time, take from a chunk its loss and its part of both gradients, and let"
            " it go."
        )


LINEAR_CROSS_ENTROPY = Exercise(
    tolerance=1e-3,  # sums in another order, of logits that are hundreds apart
    task="""For each token there are as many logits as the vocabulary has tokens, and the usual loss holds
    them three times: the logits, their log-softmax, their gradient. Write the output layer and its loss in
    one, so that they are never whole. `hidden` [tokens, channel] goes into the output layer, whose `weight`
    is [vocab_size, channel]: logits = hidden @ weight.T. The loss is the mean of
    $-\\ln \\mathrm{softmax}(logits)_{target}$ in nats over the tokens whose target is not `ignore_index`;
    where there is none, it is nan, as PyTorch's.

    - Go through the tokens `chunk_size` at a time; the last chunk may be shorter. Never have the logits of
      more tokens at once, and keep no logits for later.
    - Derive both gradients, those of hidden and of weight, without autograd. forward may compute them, chunk
      by chunk, and keep them for backward.
    - backward gets `upstream`, the gradient that arrives at the loss. It is 1 for loss.backward(), and
      another number where the loss was multiplied. Leave unchanged what forward has kept: backward may run
      again.
    - A token that is ignored has no part in the loss, nor in any gradient. ignore_index may be any number,
      one in the vocabulary too.
    - Logits may be above 100, and 200 apart.""",
    reference=LinearCrossEntropy,
    cases=_linear_cases,
    stub=LINEAR_CROSS_ENTROPY_STUB,
    observe=_observe_linear,
    forbids=(
        linear_cross_entropy,
        nn.functional.linear_cross_entropy,
        nn.functional.cross_entropy,
        fused_cross_entropy,
    ),
    valid=lambda hidden, weight, targets, ignore_index, chunk_size: (
        hidden.dim() == weight.dim() == 2
        and len(hidden) == len(targets) > 0
        and hidden.size(1) == weight.size(1) > 0
        and chunk_size >= 1
        and bool(((targets == ignore_index) | ((targets >= 0) & (targets < len(weight)))).all())
    ),
    points=3,
    mistakes=(
        Mistake(
            "the mean of the chunks' means",
            _loss_made(mean_of_means=True),
            "Each chunk's mean was taken, and then the mean of these. A short last chunk, or one with many"
            " ignored tokens, then counts too much. Add up sums, and divide once by the number of all that"
            " count.",
        ),
        Mistake(
            "the gradient is divided by the chunk",
            _loss_made(gradient_by_chunk=True),
            "The loss is right, but its gradient was divided by the number of tokens in the chunk. The mean"
            " runs over the targets of all chunks that count: count them before the loop.",
        ),
        Mistake(
            "the upstream gradient is dropped",
            _loss_made(upstream=False),
            "backward returned the gradients as they were, whatever arrived. With a scaled or an accumulated"
            " loss `upstream` is not 1: multiply by it.",
        ),
        Mistake(
            "the kept gradients are changed",
            _loss_made(kept_is_changed=True),
            "backward multiplied in place what forward had kept. A second backward through the same loss then"
            " multiplies again. Return new tensors: upstream * kept.",
        ),
        Mistake(
            "softmax without the one-hot",
            _loss_made(chunk=_without_one_hot),
            "The gradient is the softmax alone: it lowers every logit and raises none. The target's own has 1"
            " less.",
        ),
        Mistake(
            "ignored tokens are counted",
            _loss_made(ignored_count=True),
            "The sum was divided by the number of all tokens. Ignored ones have no loss, and must not be"
            " counted either.",
        ),
        Mistake(
            "0 where no token counts",
            _loss_made(at_least_one=True),
            "Where all tokens are ignored, the loss was 0: the count was held at 1 or more. It is a mean of"
            " nothing, 0 / 0, so nan, as PyTorch's. A 0 would look like a perfect batch. In the gradient the"
            " 1 is fine: its rows are 0.",
        ),
        Mistake(
            "ignored tokens have a gradient",
            _loss_made(chunk=_ignored_rows_push),
            "The loss leaves ignored tokens out, and the gradient does not: their rows must be 0, or they"
            " push hidden and weight all the same.",
        ),
        Mistake(
            "only -100 is ignored",
            _loss_made(at_minus_100=True),
            "-100 was left out, and not `ignore_index`. A padding token, 0 for instance, is a usual choice"
            " too.",
        ),
        Mistake(
            "exp overflows",
            _loss_made(chunk=_overflowing_softmax),
            "exp of a logit above 88 is inf in float32, and inf / inf is nan. logsumexp takes the largest"
            " logit away first, and so does softmax.",
        ),
        Mistake(
            "the log of a softmax",
            _loss_made(chunk=_log_of_softmax),
            "A probability 200 below the largest logit rounds to 0, and its logarithm is -inf. The loss is"
            " logsumexp(logits) - logits[target], without a softmax.",
        ),
        Mistake(
            "the last chunk is dropped",
            _loss_made(rest_is_dropped=True),
            "Only full chunks were looked at. Where chunk_size does not divide the number of tokens, the rest"
            " is a shorter chunk.",
        ),
        Mistake(
            "the last chunk's gradient only",
            _loss_made(last_chunk_only=True),
            "The gradient of weight was written anew in each chunk. Every token uses every row of weight: the"
            " chunks' gradients add up.",
        ),
        Mistake(
            "all logits at once",
            _loss_made(whole=True),
            "The values are right, but the logits of all tokens were in memory, which is what the chunks are"
            " to avoid.",
        ),
    ),
    hints=(
        (
            "Week 2's gradient of the logits, (softmax - one-hot) over the number of targets, is half of it."
            " How does it go on to hidden, and to weight, through logits = hidden @ weight.T?"
        ),
        (
            "In the loop over chunks: logits, log_sums = logits.logsumexp(-1), the losses log_sums -"
            " logits[target] added up where they count; grad = (softmax - one-hot) / count, 0 in ignored"
            " rows; then grad @ weight is the chunk's gradient of hidden."
        ),
        (
            "weight_grad += grad.T @ hidden[rows], hidden_grad[rows] = grad @ weight. After the loop:"
            " ctx.save_for_backward(hidden_grad, weight_grad); return total / count. backward: upstream *"
            " hidden_grad, upstream * weight_grad, None, None, None."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    ROUND_TO_BF16,
    BF16_PRODUCT,
    SCALER_STEP,
    LOSS_SCALER,
    AUTOCAST_DTYPES,
    STATE_BYTES,
    LARGEST_BATCH,
    LINEAR_CROSS_ENTROPY,
)
