"""Week 0. Pictures of week 5: how a tokenizer is trained, and how it then cuts a text."""

from collections.abc import Sequence

from shared.course.pictures.drawing import Box, Picture
from shared.course.pictures.tables import ENCODED, MERGES, TEXT, merged

TOKENIZER = "shared.tokenizers.BPETokenizer"


def bpe_merge() -> Picture:
    """Week 5: a text, its most frequent pair, and the text after the merge; twice."""
    picture = Picture(
        "Byte-pair encoding learns",
        "The most frequent pair becomes one token, again and again",
        f"The text {TEXT.replace('␣', ' ')} as {len(TEXT)} single letters and spaces. h and e stand side by"
        " side most often, and become one token everywhere. In the text after that, t and he stand side by"
        " side most often, and become one token in turn.",
    )
    tokens = list(TEXT)
    for step, y in enumerate((108, 214, 320)):
        picture.write(24, y - 14, f"{len(tokens)} tokens", anchor="start", bold=True)
        boxes = _row_of_tokens(picture, tokens, y)
        if step == len(MERGES):
            break
        left, right = MERGES[step]
        places = [i for i, both in enumerate(zip(tokens, tokens[1:])) if both == (left, right)]
        for i in places:
            picture.bracket(boxes[i].x + 3, boxes[i + 1].right[0] - 3, y + 36)
        picture.note(
            24, y + 62, f"{left} and {right} stand side by side {len(places)} times, more than any other pair"
        )
        tokens = merged(tokens, MERGES[step])
    picture.note(24, 376, "␣ is a space")
    return picture.close("values")


def _row_of_tokens(picture: Picture, tokens: Sequence[str], y: float) -> list[Box]:
    """Tokens in one line, each as wide as its letters."""
    boxes = []
    x, letter = 24.0, 432 / sum(len(token) for token in tokens)
    for token in tokens:
        width = letter * len(token)
        kind = "chosen" if len(token) > 1 else "values"
        boxes.append(picture.box(Box(x, y, width - 2, 30), token, kind))
        x += width
    return boxes


def bpe_encode() -> Picture:
    """Week 5: a text, its pieces, their bytes, merges by rank, ids."""
    picture = Picture(
        "Byte-pair encoding reads",
        "Cut into pieces, then merge by rank what training learned",
        "The text lower low is cut by a pattern into two pieces, lower and space low. Each piece becomes its"
        " bytes. Then the learned merges are made in the order of their ranks, first o and w, then l and ow,"
        " inside each piece only, until none fits. What is left are the tokens, and each has an id.",
    )
    left, middle = 24, 240
    for number, (what, y) in enumerate((("text", 100.0), ("pieces", 170.0), ("bytes", 240.0))):
        picture.write(left, y + 5, what, anchor="start", bold=True)
        parts = ENCODED.stages[number]
        _pieces(picture, parts, y)
        if number < 2:
            picture.arrow((middle, y + 18), (middle, y + 50))
    picture.name(middle + 12, 140, "pattern", f"{TOKENIZER}.pattern", anchor="start")
    y = 240.0
    for rank, (a, b) in enumerate(ENCODED.merges):
        picture.arrow((middle, y + 18), (middle, y + 58))
        picture.note(middle + 12, y + 42, f"merge {rank + 1}: {a} + {b}")
        y += 78
        _pieces(picture, ENCODED.stages[3 + rank], y)
    picture.write(left, y + 5, "tokens", anchor="start", bold=True)
    picture.arrow((middle, y + 18), (middle, y + 48))
    picture.write(left, y + 73, "ids", anchor="start", bold=True)
    _pieces(picture, ENCODED.ids, y + 68, kind="chosen")
    picture.note(left, y + 116, "␣ is a space. Ids 0 to 255 are the bytes; merge 1 made the token 256.")
    return picture.close()


def _pieces(picture: Picture, pieces: Sequence[Sequence[str]], y: float, kind: str = "values") -> None:
    """The tokens of each piece side by side, the pieces apart."""
    letter, gap = 32.0, 20.0
    length = sum(len(token) if kind == "values" else 1.5 for piece in pieces for token in piece)
    x = 240 - (letter * length + gap * (len(pieces) - 1)) / 2
    for piece in pieces:
        for token in piece:
            width = letter * (len(token) if kind == "values" else 1.5)
            picture.box(Box(x, y - 15, width - 2, 30), token, kind)
            x += width
        x += gap
