"""Week 0. Pictures of week 7: number formats, autocast, the scaled loss."""

import math
from typing import NamedTuple

from shared.course.pictures.drawing import Box, Picture, around


class Format(NamedTuple):
    """A floating-point format: bits of the exponent and of the fraction, beside one for the sign."""

    name: str
    exponent: int
    fraction: int
    largest: str
    """As the picture says it."""
    smallest: str
    """The smallest number with all bits of the fraction."""


FORMATS = (
    Format("fp32", 8, 23, "3·10³⁸", "1·10⁻³⁸"),
    Format("tf32", 8, 10, "3·10³⁸", "1·10⁻³⁸"),
    Format("bf16", 8, 7, "3·10³⁸", "1·10⁻³⁸"),
    Format("fp16", 5, 10, "65504", "6·10⁻⁵"),
    Format("fp8, e4m3", 4, 3, "448", "2·10⁻²"),
    Format("fp8, e5m2", 5, 2, "57344", "6·10⁻⁵"),
)


def number_formats() -> Picture:
    """Week 7: where the bits of each format go."""
    picture = Picture(
        "Number formats",
        "Exponent bits give reach, fraction bits give accuracy",
        "Six formats as rows of bits: one for the sign, then those of the exponent, then those of the"
        " fraction. "
        + " ".join(
            f"{f.name}: {f.exponent} and {f.fraction}, from {f.smallest} to {f.largest}." for f in FORMATS
        )
        + " bf16 has the reach of fp32 with a third of its bits for the fraction; fp16 has more of those, and"
        " ends much sooner.",
    )
    size = 13
    for row, f in enumerate(FORMATS):
        y = 108 + 60 * row
        picture.write(24, y - 10, f.name, anchor="start", bold=True)
        parts = [3] + [1] * f.exponent + [0] * f.fraction
        picture.grid(24, y, [[""] * len(parts)], cell=(size, 20), parts=[parts])
        picture.note(128, y - 10, f"{f.smallest} to {f.largest}, steps of 1/{2**f.fraction:,} at 1")
    y = 108 + 60 * len(FORMATS) - 8
    x = 24.0
    for part, words in ((3, "sign"), (1, "exponent: how large"), (0, "fraction: how exact")):
        picture.grid(x, y - 11, [[""]], cell=(size, 14), parts=[[part]])
        picture.note(x + 20, y, words)
        x += 56 if part == 3 else 168
    return picture.close("values")


def autocast() -> Picture:
    """Week 7: which numbers are in which format while a block is computed in bf16."""
    picture = Picture(
        "Autocast",
        "Products in bf16; weights, stream, norms, loss and steps in fp32",
        "One linear layer under autocast. The norm reads the residual stream in fp32 and gives fp32."
        " Before the product both the activations and the weight are rounded to bf16; the weight itself"
        " stays in fp32. The product comes out in bf16, and is added to the stream, which stays in fp32."
        " At the end the logits are bf16, the loss is computed in fp32, the gradient of the weight is"
        " fp32, and so is the optimizer's step.",
    )
    stream, x, right = 60, 200, 388
    top = picture.box(around(stream, 100, 72, 32), "stream", "values")
    norm = picture.box(around(x, 150, 120, 34), "attn_norm", "learned", of="block.attn_norm")
    picture.arrow((stream, 150), norm.left)
    cast = picture.box(around(x, 232, 120, 30), "to bf16")
    picture.arrow(norm.bottom, cast.top, shape=("fp32", "autocast.attn_norm.out"))
    weight = picture.box(
        around(right, 150, 136, 48),
        "q_proj.weight",
        "learned",
        of="block.attn.q_proj.weight",
        shape=("fp32", "autocast.q_proj.weight"),
    )
    cast_weight = picture.box(around(right, 232, 136, 30), "to bf16")
    picture.arrow(weight.bottom, cast_weight.top)
    product = picture.box(around(x, 312, 120, 34), "product")
    picture.arrow(cast.bottom, product.top, shape=("bf16", "autocast.product.in"))
    picture.arrow(cast_weight.bottom, (right, 312), product.right)
    picture.shape(right - 9, 282, "bf16", "autocast.product.weight", anchor="end")
    rest = picture.box(around(x, 382, 180, 34), "attention, o_proj")
    picture.arrow(product.bottom, rest.top, shape=("bf16", "autocast.q_proj.out"))
    plus = picture.plus(stream, 440)
    picture.arrow(rest.bottom, (x, 440), plus.right, shape=("bf16", "autocast.attn.out"), side="above")
    picture.arrow(top.bottom, plus.top, stream=True)
    picture.arrow(plus.bottom, (stream, 500), stream=True, shape=("fp32", "autocast.block.out"))
    picture.write(24, 530, "at the end", size=13, anchor="start", bold=True)
    chain = (
        ("logits", "bf16", "values"),
        ("loss", "fp32", "step"),
        ("gradient", "fp32", "values"),
        ("step", "fp32", "step"),
    )
    before = None
    for i, (words, kind, look) in enumerate(chain):
        here = picture.box(around(70 + 113 * i, 570, 92, 46), words, look, shape=(kind, f"autocast.{words}"))
        if before is not None:
            picture.arrow(before.right, here.left)
        before = here
    return picture.close()


SCALE = 16
"""The loss is multiplied by 2 to the power of this, as GradScaler does at first."""
FP16 = (-24, 15)
"""The powers of two that fp16 can hold: its smallest number, and the last below its largest, 65504."""


def gradients_by_size() -> dict[int, float]:
    """How many gradients there are of each power of two: made up, a bell round 2⁻²³."""
    return {power: math.exp(-(((power + 23) / 4) ** 2) / 2) for power in range(-32, -12)}


def loss_scaling() -> Picture:
    """Week 7: fp16 loses small gradients, unless the loss is multiplied before the backward."""
    sizes = gradients_by_size()
    lost = sum(many for power, many in sizes.items() if power < FP16[0]) / sum(sizes.values())
    picture = Picture(
        "Loss scaling",
        "fp16 has no numbers that small: move the gradients into its reach",
        "Two rows of bars over the powers of two from 2 to the -34 to 2 to the 18: how many gradients"
        f" are of each size. fp16 reaches from 2 to the -24 to 2 to the 15. Above, {lost:.0%} of the"
        " gradients are smaller, and become zero. Below, the loss was multiplied by 2 to the 16, and"
        " with it every gradient: all are within reach. Then the way of a step: scale the loss,"
        " backward, divide the gradients by the scale, and step; where one has overflowed, leave the"
        " step out and halve the scale.",
    )
    left, cell = 24.0, 432 / 52
    for y, shift, words in (
        (170, 0, "gradients of the loss"),
        (304, SCALE, "gradients of the loss · 65,536"),
    ):
        picture.note(left, y - 62, words, bold=True)
        for power, many in sizes.items():
            inside = power + shift >= FP16[0]
            place = Box(left + cell * (power + shift + 34), y - 52 * many, cell - 1.5, max(52 * many, 0.8))
            picture.bar(place, "values" if inside else "frozen")
        start, end = left + cell * (FP16[0] + 34), left + cell * (FP16[1] + 35)
        picture.bracket(start, end, y + 4)
        picture.note((start + end) / 2, y + 26, "fp16: 2⁻²⁴ to 2¹⁵", anchor="middle")
    picture.note(left, 196, f"{lost:.0%} lost")
    scale = picture.box(around(90, 384, 128, 34), "scale", of="torch.amp.GradScaler.scale")
    back = picture.box(around(240, 384, 128, 34), "backward", of="torch.Tensor.backward")
    down = picture.box(around(390, 384, 128, 34), "unscale_", of="torch.amp.GradScaler.unscale_")
    picture.arrow(scale.right, back.left)
    picture.arrow(back.right, down.left)
    picture.note(90, 422, "loss · 65,536", anchor="middle")
    picture.note(390, 422, "gradients / 65,536", anchor="middle")
    step = picture.box(around(300, 492, 150, 34), "step", "chosen")
    skip = picture.box(around(110, 492, 170, 34), "no step, scale / 2")
    picture.arrow((390, 430), (390, 492), step.right)
    picture.note(398, 468, "all finite")
    picture.arrow((240, 401), (240, 452), (110, 452), skip.top)
    picture.note(120, 444, "one overflowed")
    return picture.close("values", "frozen")
