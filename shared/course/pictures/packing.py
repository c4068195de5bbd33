"""Week 0. Pictures of week 8: weights in four bits, and two of them in a byte."""

from shared.course.pictures.drawing import Box, Picture
from shared.course.pictures.tables import FOUR_BITS

PACKED = "shared.quantization.packing"


def int4_groups() -> Picture:
    """Week 8: a group of weights, the line between its ends, the nearest of 16 steps."""
    four = FOUR_BITS
    picture = Picture(
        "Four bits",
        "A group keeps its ends; a weight takes the nearest of 16 steps",
        f"Eight weights of one group, from {four.low:g} to {four.high:g}. The line between them has 16"
        f" steps, code 0 at the smallest and code 15 at the largest, {four.scale:g} apart. Each weight"
        " becomes the code of the nearest step. Unpacked, code by code, the weights come back, each off"
        " by at most half a step. Kept are the codes, four bits each, and for the whole group its scale"
        " and its zero, which code 8 stands for.",
    )
    x0, cell = 58, 48
    picture.grid(x0, 94, [[f"{w:.2f}" for w in four.weights]], cell=(cell, 28))
    picture.note(24, 84, "the weights of a group (here 8; in the course 32)")
    left, width, y = 60.0, 360.0, 196.0
    picture.line((left, y), (left + width, y))
    for code in range(16):
        at = left + width * code / 15
        picture.line((at, y - 5), (at, y + 5))
        picture.write(at, y + 22, str(code), size=12)
    for weight in four.weights:
        at = left + width * (weight - four.low) / (four.high - four.low)
        picture.dot(at, y - 16)
    picture.write(left, y - 30, f"{four.low:g}".replace("-", "−"), size=12, soft=True)
    picture.write(left + width, y - 30, f"{four.high:g}", size=12, soft=True)
    picture.note(24, y + 22, "code")
    picture.arrow((240, 122), (240, 158))
    picture.name(250, 144, "group_ranges", f"{PACKED}.group_ranges", anchor="start")
    picture.arrow((240, 230), (240, 272))
    picture.name(250, 255, "int4_codes", f"{PACKED}.int4_codes", anchor="start")
    picture.grid(x0, 272, [[str(code) for code in four.codes]], cell=(cell, 28), kind="chosen")
    picture.note(
        24,
        322,
        f"kept: these codes, 4 bits each, and for the whole group\n"
        f"scale = {four.scale:g} and zero = {four.zero:g}, which code 8 stands for",
    )
    picture.arrow((240, 350), (240, 396))
    picture.note(250, 378, "scale · (code − 8) + zero")
    picture.grid(x0, 396, [[f"{w:.2f}" for w in four.back]], cell=(cell, 28))
    worst = max(abs(a - b) for a, b in zip(four.weights, four.back, strict=True))
    picture.note(24, 446, f"no weight is off by more than half a step: here {worst:.3f} at most")
    return picture.close()


def int4_packing() -> Picture:
    """Week 8: two codes share a byte; what a packed matrix has."""
    codes = FOUR_BITS.codes
    pairs = list(zip(codes[::2], codes[1::2], strict=True))
    picture = Picture(
        "Packing",
        "Two codes share a byte: the even column's bits stand low",
        "Eight codes from 0 to 15 in a row, four bits each. Two neighbours become one byte: the code of"
        " the odd column is shifted by four bits to the left, and that of the even column fills the four"
        " on the right. So eight weights take four bytes, where they took 32 in fp32. A packed matrix"
        " has half as many bytes as columns, and scale and zero for each group.",
    )
    x0, cell = 48, 48
    picture.note(24, 84, "codes: an even column, an odd one, ...")
    picture.grid(x0, 94, [[str(code) for code in codes]], cell=(cell, 28), parts=[[0, 1] * 4])
    for i, (even, odd) in enumerate(pairs):
        x = x0 + 96 * i
        low, high = f"{even:04b}", f"{odd:04b}"
        picture.arrow((x + 24, 122), (x + 72, 168))
        picture.arrow((x + 72, 122), (x + 24, 168))
        picture.grid(x + 2, 168, [[high, low]], cell=(46, 28), parts=[[1, 0]], wide=True)
        picture.bracket(x + 4, x + 92, 200)
        picture.write(x + 48, 224, f"{odd << 4 | even}", bold=True)
    picture.note(24, 252, "a byte each: odd · 16 + even")
    picture.write(24, 296, "A matrix", anchor="start", bold=True)
    rows = (
        ("weight", "[O, I]", "int4.weight", 384, "learned", "fp32: 4 bytes each"),
        ("codes", "[O, I/2]", "int4.codes", 48, "chosen", "bytes: half a byte each"),
        ("scale_zero", "[O, I/G, 2]", "int4.scale_zero", 12, "chosen", "bf16: 4 bytes a group"),
    )
    for i, (name, words, of, length, kind, what) in enumerate(rows):
        y = 330 + 58 * i
        picture.bar(Box(24, y + 8, length, 16), kind)
        if name == "weight":
            picture.name(24, y, name, "lora.base.weight", anchor="start")
        else:
            picture.name(24, y, name, f"int4.{name}", anchor="start")
        picture.shape(130, y, words, of, anchor="start")
        picture.note(250, y, what)
    picture.note(
        24,
        502,
        "The bars are as long as the memory is large: 5 bits a weight in place\nof 32, with groups of 32.",
    )
    return picture.close("values", "learned", "chosen")
