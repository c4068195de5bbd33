"""Week 0. Pictures of weeks 1 and 2: the bigram and the fixed window."""

from collections.abc import Sequence

from shared.course.pictures.drawing import Box, Picture, around
from shared.course.pictures.tables import LETTERS, TABLE, softmax


def bigram() -> Picture:
    """Week 1: a token picks its row, softmax, a draw."""
    present, drawn = 2, 0
    p = softmax(TABLE[present])
    picture = Picture(
        "The bigram",
        "A token picks its row of the table; the next one is drawn from it",
        "The token l picks its row of a table of logits, one row and one column for each of the letters e, h,"
        f" l, o and space. A softmax turns the row into probabilities ({_listed(LETTERS, p)}). The next token"
        " is drawn from them, here e, and picks its own row in turn.",
    )
    top, cell = 108, (44, 26)
    middle = top + 2.5 * cell[1]
    for i, letter in enumerate(LETTERS):
        picture.write(166, top + 26 * i + 17.5, letter, bold=True)
        picture.write(202 + 44 * i, top - 8, letter, bold=True)
    token = picture.box(around(82, middle, 88, 36), LETTERS[present], "values")
    picture.note(38, middle - 26, "present token")
    table = picture.grid(180, top, TABLE, cell=cell, kind="learned", largest=2.2)
    picture.frame(Box(180, top + 52, 220, 26))
    picture.arrow(token.right, (156, middle))
    picture.name(180, 264, "table", "bigram.table", anchor="start")
    picture.shape(232, 264, "[V, V]", "bigram.table.weight", anchor="start")
    picture.note(290, 264, "of logits")
    step = picture.box(around(290, 310, 100, 34), "softmax")
    picture.arrow((table.right[0] + 3, middle), (440, middle), (440, 310), step.right)
    picture.shape(431, 290, "[V]", "bigram.row", anchor="end")
    for i, letter in enumerate(LETTERS):
        y = 366 + 24 * i
        picture.write(196, y + 4.5, letter, bold=True)
        bar = Box(210, y - 8, max(150 * p[i] / max(p), 2), 16)
        picture.bar(bar)
        picture.write(bar.right[0] + 22, y + 4.5, f"{p[i]:.2f}", size=12)
    picture.arrow(step.bottom, (290, 350))
    picture.note(182, 332, "probabilities,", anchor="end")
    picture.note(182, 348, "sum 1", anchor="end")
    result = picture.box(around(290, 524, 88, 38), LETTERS[drawn], "chosen")
    picture.arrow((290, 474), result.top)
    picture.note(300, 494, "draw")
    picture.arrow(result.left, (82, 524), token.bottom, again=True)
    picture.note(92, 546, "and again, with the token\nthat was drawn")
    return picture.close()


def _listed(letters: Sequence[str], p: Sequence[float]) -> str:
    return ", ".join(
        f"{letter.replace('␣', 'space')} {share:.2f}" for letter, share in zip(letters, p, strict=True)
    )


def window_mlp() -> Picture:
    """Week 2: a window of ids, their embeddings side by side, a hidden layer, logits."""
    picture = Picture(
        "The fixed window",
        "Embeddings stand side by side, a hidden layer reads them all",
        "The last three tokens, t, h and e, each pick a row of the embedding table, and the vector of their"
        " place in the window is added. The three vectors stand one after the other as one long vector. A"
        " linear layer with tanh makes the hidden values of it, and another linear layer the logits of the"
        " next token.",
    )
    vectors = [[0.2, -0.7, 1.1, 0.4], [0.9, -1.2, 0.1, -0.3], [-0.6, 0.8, 0.5, 0.3]]
    picture.box(Box(48, 146, 384, 40), "token_embedding", "learned", of="window.token_embedding")
    picture.name(252, 232, "position_embedding", "window.position_embedding")
    picture.write(166, 232, "+", bold=True)
    long = picture.grid(
        54,
        316,
        [[value for vector in vectors for value in vector]],
        cell=(31, 26),
        parts=[[i // 4 for i in range(12)]],
    )
    for i, (letter, vector) in enumerate(zip("the", vectors, strict=True)):
        x = 110 + 130 * i
        token = picture.box(around(x, 98, 50, 32), letter, "values")
        picture.arrow(token.bottom, (x, 146))
        grid = picture.grid(x - 62, 248, [vector], cell=(31, 26), parts=[[i] * 4])
        picture.arrow((x, 186), (x, 218) if i == 1 else (x, 248))
        picture.arrow(grid.bottom, (x, 316))
    return _layers_above_window(picture, long)


def _layers_above_window(picture: Picture, long: Box) -> Picture:
    picture.shape(300, 296, "[B, T, W, C]", "window.token_embedding.out")
    hidden = picture.box(around(240, 398, 160, 34), "hidden", "learned", of="window.hidden")
    picture.arrow(long.bottom, hidden.top, shape=("[B, T, WC]", "window.hidden.in"))
    bend = picture.box(around(240, 446, 160, 30), "tanh")
    picture.arrow(hidden.bottom, bend.top)
    head = picture.box(around(240, 516, 160, 34), "lm_head", "learned", of="window.lm_head")
    picture.arrow(bend.bottom, head.top, shape=("[B, T, N]", "window.hidden.out"))
    logits = picture.box(around(240, 590, 160, 36), "logits", "chosen")
    picture.arrow(head.bottom, logits.top, shape=("[B, T, V]", "window.out"))
    return picture.close()
