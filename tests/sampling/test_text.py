"""shared/sampling/text.py: the text up to a stop text, and how much work looking for one is."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sampling.text import TextStream

VOCAB = dict(enumerate([b"a", b"b", b"ab", b"aab", b"aaaa"]))


def pieces(ids: list[int], stops: list[str]) -> tuple[list[str], bool]:
    """What a stream shows after each token, and whether a stop text ended it."""
    stream, shown = TextStream(VOCAB, stops), []
    for i in ids:
        shown.append(stream.push(i))
        if stream.stopped:
            break
    return [*shown, stream.finish()], stream.stopped


def by_trying_all(ids: list[int], stops: list[str]) -> tuple[list[str], bool]:
    """The same, by searching the whole text after each token."""
    shown, text = [], ""
    for i in ids:
        text += VOCAB[i].decode()
        done = len("".join(shown))
        end = min((text.find(stop) for stop in stops if stop in text), default=len(text) + 1)
        begun = len(text) - max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))
        if end <= begun:
            return [*shown, text[done:end], ""], True
        shown.append(text[done:begun])
    return [*shown, text[len("".join(shown)) : end]], end <= len(text)


def test_stop_texts_that_repeat_themselves_are_found_where_trying_all_places_finds_them():
    draw, stopped = random.Random(1), 0
    for _ in range(1500):
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 9))) for _ in range(draw.randint(1, 4))]
        ids = draw.choices(range(5), k=15)
        found = pieces(ids, stops)
        assert found == by_trying_all(ids, stops), (ids, stops)
        stopped += found[1]
    assert 300 < stopped < 1400


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), st.data())
def test_what_is_shown_does_not_depend_on_how_the_text_is_cut(text, stops, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    stream = TextStream(dict(enumerate(part.encode() for part in parts)), stops)
    shown = "".join([*(stream.push(i) for i in range(len(parts))), stream.finish()])
    assert shown == text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def test_after_a_stop_text_nothing_is_shown():
    stream = TextStream(VOCAB, ["ab"])
    assert [stream.push(i) for i in (0, 1, 0, 2)] == ["", "", "", ""] and stream.stopped
    assert stream.finish() == "" and stream.held == "abaab"


class Counted(str):
    """A text that counts how often its characters are looked at."""

    looks = 0

    def __getitem__(self, place):
        Counted.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("last", ["b", "a"], ids=["never found", "found at last"])
def test_sixteen_long_stop_texts_cost_a_few_looks_at_each_character(monkeypatch, last):
    monkeypatch.setattr(Counted, "looks", 0)
    stops = [Counted("a" * (999 - i) + last) for i in range(16)]
    stream, tokens = TextStream(VOCAB, stops), 400
    for _ in range(tokens):
        stream.push(4)
        if stream.stopped:
            break
    assert stream.stopped == (last == "a")
    # Each character is compared, and each comparison that fails takes back one that did not.
    characters = 16 * (1000 + 4 * tokens)
    assert 0 < Counted.looks <= 3 * characters


def test_the_characters_that_were_let_go_are_counted():
    stream = TextStream({0: b"a", 1: b"\xc3", 2: b"\xa9", 3: b"stop"}, ["stop"])
    given = [stream.push(token) for token in (0, 1, 2, 0, 3)]
    assert "".join(given) == "aéa" and stream.shown == 3
