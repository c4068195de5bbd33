"""Week 0. Pictures of week 9: LoRA, QLoRA, conversations packed into a row."""

from shared.course.pictures.drawing import Box, Picture, around
from shared.course.pictures.tables import PACKED_ROW, sees

BTI, BTR, BTO = "[B, T, I]", "[B, T, R]", "[B, T, O]"


def lora() -> Picture:
    """Week 9: the frozen weight, and two thin ones beside it."""
    picture = Picture(
        "LoRA",
        "The weight stays; two thin matrices beside it learn",
        "The input x goes two ways. On the left through the frozen weight of the linear layer,"
        " out_features by in_features. On the right through lora_A, which has r rows, and lora_B, which"
        " has r columns; both learn. What comes out is multiplied by lora_alpha / r and added. lora_B"
        " begins at zero, so that at first nothing changes; at the end B A can be added to the weight,"
        " and nothing is left beside it.",
    )
    picture.box(around(240, 98, 70, 32), "x", "values")
    base = picture.box(Box(40, 170, 180, 180), "", "frozen")
    picture.name(130, 252, "base", "lora.base")
    picture.shape(130, 274, "[O, I]", "lora.base.weight")
    a = picture.box(Box(270, 182, 180, 42), "lora_A", "learned", of="adapter.lora_A")
    b = picture.box(Box(329, 286, 62, 92), "", "learned")
    picture.name(360, 328, "lora_B", "adapter.lora_B")
    picture.shape(360, 350, "[O, R]", "adapter.lora_B")
    picture.shape(450, 242, "[R, I]", "adapter.lora_A", anchor="end")
    picture.arrow((240, 114), (240, 142), (130, 142), base.top)
    picture.arrow((240, 142), (360, 142), a.top)
    picture.shape(249, 132, BTI, "lora.in", anchor="start")
    picture.arrow(a.bottom, b.top)
    picture.shape(350, 260, BTR, "lora.between", anchor="end")
    scale = picture.box(around(360, 424, 130, 32), "· lora_alpha / r")
    picture.arrow(b.bottom, scale.top)
    plus = picture.plus(240, 480)
    picture.arrow(base.bottom, (130, 480), plus.left, shape=(BTO, "lora.base.out"))
    picture.arrow(scale.bottom, (360, 480), plus.right)
    picture.arrow(plus.bottom, (240, 530), shape=(BTO, "lora.out"))
    picture.note(24, 548, "lora_B begins at 0: at first\nnothing changes.")
    picture.note(280, 548, "At the end B A is added to\nthe base: no extra work.")
    return picture.close()


def qlora() -> Picture:
    """Week 9: the base in four bits, the adapters in full; gradients pass through and learn only there."""
    picture = Picture(
        "QLoRA",
        "A base of four bits is only read; gradients pass through it",
        "Forward, downwards: the base's weight lies in memory as NF4 codes, two to a byte, with a largest"
        " magnitude for each block. For a product it is unpacked and forgotten again. Beside it lora_A and"
        " lora_B, in full numbers. Both results are added. Backward, dashed and upwards: the gradient goes"
        " through both ways to x, but only lora_A and lora_B have gradients, and moments of the optimizer.",
    )
    x = picture.box(around(240, 98, 70, 32), "x", "values")
    picture.group(Box(44, 150, 206, 216))
    picture.note(54, 170, "4 bits a weight", bold=True)
    codes = picture.box(
        Box(66, 184, 162, 46), "codes", "frozen", of="nf4.codes", shape=("[O, I/2]", "nf4.codes")
    )
    absmax = picture.box(
        Box(66, 246, 162, 46), "absmax", "frozen", of="nf4.absmax", shape=("[O, I/G]", "nf4.absmax")
    )
    product = picture.box(Box(66, 316, 162, 34), "unpack, multiply")
    picture.line(codes.bottom, absmax.top)
    picture.arrow(absmax.bottom, product.top)
    a = picture.box(
        Box(290, 186, 160, 44), "lora_A", "learned", of="adapter.lora_A", shape=("[R, I]", "adapter.lora_A")
    )
    b = picture.box(
        Box(290, 306, 160, 44), "lora_B", "learned", of="adapter.lora_B", shape=("[O, R]", "adapter.lora_B")
    )
    picture.arrow(a.bottom, b.top, shape=(BTR, "lora.between"), side="left")
    picture.arrow(x.right, (370, 98), a.top, shape=(BTI, "lora.in"), side="above")
    picture.arrow(x.left, (30, 98), (30, 333), product.left)
    plus = picture.plus(240, 420)
    picture.arrow((147, 350), (147, 420), plus.left)
    picture.shape(156, 392, BTO, "lora.base.out", anchor="start")
    picture.arrow(b.bottom, (370, 420), plus.right)
    picture.arrow(plus.bottom, (240, 466), shape=(BTO, "lora.out"))
    picture.arrow((464, 466), (464, 328), (450, 328), again=True)
    picture.arrow((464, 328), (464, 208), (450, 208), again=True)
    picture.note(456, 484, "gradients: here they stay", anchor="end")

    picture.note(
        24,
        522,
        "The base needs no gradients and no moments: only its codes.\n"
        "lora_A and lora_B have both, in fp32, and are small.",
    )
    return picture.close()


def packed_talks() -> Picture:
    """Week 9: two conversations in one row, which do not see each other; the loss on answers only."""
    row = PACKED_ROW
    picture = Picture(
        "Packed conversations",
        "Two talks share a row, unseen by each other; answers are learned",
        "A row of ten tokens: the first talk has five of them, the second four, and one is padding."
        " Three lines stand over each other: the ids that are read, the targets, which are the next"
        " tokens where these belong to an answer and nothing elsewhere, and the number of the talk."
        " Below is the mask: each position sees the earlier ones of its own talk, so two triangles stand"
        " on the diagonal.",
    )
    x0, cell = 84, 37
    parts = [[number - 1 if number else -1 for number in row.texts]]
    for y, what, cells in (
        (96, "ids", row.ids),
        (138, "targets", row.targets),
        (180, "texts", tuple(map(str, row.texts))),
    ):
        picture.name(x0 - 8, y + 19, what, f"rows.{what}", anchor="end")
        picture.grid(x0, y, [list(cells)], cell=(cell, 28), parts=parts)
    picture.note(x0, 228, "Q a question, A an answer, / the end of one; · is not learned")
    picture.write(24, 268, "the mask", anchor="start", bold=True)
    picture.note(110, 268, "who sees whom: a row looks, a column is looked at")
    size = 26
    table = [["" for _ in row.texts] for _ in row.texts]
    owners = [
        [row.texts[i] - 1 if row.texts[i] and sees(row.texts, i, j) else -1 for j in range(len(row.texts))]
        for i in range(len(row.texts))
    ]
    picture.grid(110, 284, table, cell=(size, size), parts=owners)
    picture.note(110 + size * 1.2, 284 + size * 10 + 18, "talk 1")
    picture.note(110 + size * 6.1, 284 + size * 10 + 18, "talk 2")
    picture.shape(382, 300, "[B, 1, T, T]", "rows.mask", anchor="start")
    picture.shape(382, 322, "[B, T]", "rows.ids", anchor="start")
    picture.note(434, 322, "ids")
    return picture.close("values")
