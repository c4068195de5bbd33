"""shared/serving/text.py: stop texts are found wherever tokens begin and end."""

import random

from shared.serving.generation import Token
from shared.serving.text import TextBuilder

VOCAB = dict(enumerate([b"a", b"b", b"ab", b"\xe2\x82", b"\xac", b"ba", b"\xff"]))


def shown(ids: list[int], stops: list[str]) -> list:
    """The pieces that a builder shows, up to a stop text."""
    builder, pieces = TextBuilder(VOCAB, stops), []
    for i in ids:
        pieces.append(builder.push(Token(i)))
        if builder.stopped:
            return pieces
    return [*pieces, builder.finish()]


def complete_text(ids: list[int]) -> str:
    """The text of these tokens without a character that is not finished yet."""
    text = b"".join(VOCAB[i] for i in ids)
    while text and text.decode(errors="ignore").encode() != text and text[-1:] in b"\xe2\x82":
        text = text[:-1]
    return text.decode(errors="replace")


def stop_by_plain_search(ids: list[int], stops: list[str]) -> int | None:
    """Where the first stop text that is complete begins, counted in tokens: the earliest among those."""
    for n in range(1, len(ids) + 1):
        text = complete_text(ids[:n])
        ends = [text.find(stop) for stop in stops if stop in text]
        if ends:
            return min(ends)
    return None


def test_random_texts_stop_where_a_plain_search_says():
    draw, stopped = random.Random(0), 0
    for _ in range(500):
        ids = draw.choices(range(7), k=12)
        stops = ["".join(draw.choices("ab€", k=draw.randint(1, 3))) for _ in range(draw.randint(0, 2))]
        pieces = shown(ids, stops)
        text = b"".join(VOCAB[i] for i in ids).decode(errors="replace")
        end = stop_by_plain_search(ids, stops)
        assert "".join(piece.text for piece in pieces) == text[:end], (ids, stops)
        if end is None:
            assert [token.id for piece in pieces for token, _ in piece.tokens] == ids
        else:
            stopped += 1
    assert 100 < stopped < 450
