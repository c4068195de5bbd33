"""shared/retrieval/splitting.py: pieces cover the text, keep to the size, and share what they should; the
work grows with the text's length.
"""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.retrieval.splitting import split
from shared.tokenizers import BPETokenizer, CharTokenizer

TOKENIZER = BPETokenizer.train(
    "the ferry leaves the harbour at noon; the later ferry leaves at night" * 3, 280
)
TEXTS = st.text(st.sampled_from("the ferry\n\tü数😀-."), max_size=120)
SIZES = st.integers(4, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))


@given(TEXTS, SIZES)
@example("e e eü", (4, 1))  # the overlap and the next word do not fit together
def test_pieces_cover_the_text_within_the_limit_and_share_what_they_should(text, sizes):
    size, overlap = sizes

    def count(part):
        return len(TOKENIZER.encode(part))

    pieces = split(text, TOKENIZER, size, overlap)
    covered = {i for start, end in pieces for i in range(start, end)}
    assert [c for i, c in enumerate(text) if i not in covered and not c.isspace()] == []
    for start, end in pieces:
        assert count(text[start:end]) <= size
        assert text[start:end] == text[start:end].strip()
    for (start, end), (after, after_end) in zip(pieces, pieces[1:]):
        assert start < after and end < after_end  # on and on
        assert after >= end or count(text[after:end]) <= overlap


def test_overlap_and_size_by_hand():
    tokenizer = CharTokenizer.train("abc defghij")
    text = "aaa bbb ccc ddd"

    def parts(size, overlap):
        return [text[a:b] for a, b in split(text, tokenizer, size, overlap)]

    assert parts(7, 3) == ["aaa bbb", "bbb ccc", "ccc ddd"]
    assert parts(7, 2) == ["aaa bbb", "ccc ddd"]
    assert parts(11, 7) == ["aaa bbb ccc", "bbb ccc ddd"]
    assert parts(2, 0) == ["aa", "a", "bb", "b", "cc", "c", "dd", "d"]
    assert parts(15, 3) == [text]
    assert split(" \n ", tokenizer, 3, 0) == []


@pytest.mark.parametrize("size, overlap", [(0, 0), (5, 5), (5, -1)])
def test_sizes_that_allow_no_progress_are_refused(size, overlap):
    with pytest.raises(ValueError, match=f"chunks of {size} tokens with {overlap} of overlap"):
        split("a b c", TOKENIZER, size, overlap)


def test_a_character_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="'😀' alone has more than 2 tokens"):
        split("😀", TOKENIZER, 2, 0)


class Counting:
    """A tokenizer of characters that counts those that it is given."""

    def __init__(self):
        self.characters = 0

    def encode(self, text):
        self.characters += len(text)
        return list(text)


@pytest.mark.parametrize("text", ["x", "渡", "one two three ", "a long-winded-word-of-33-characters ", "x\n"])
def test_the_work_grows_with_the_length(text):
    work = []
    for length in (8000, 16_000, 32_000):
        tokenizer = Counting()
        split((text * length)[:length], tokenizer, 256, 32)
        work.append(tokenizer.characters)
    assert work[1] <= 2.1 * work[0] and work[2] <= 2.1 * work[1]
    assert work[2] <= 16 * 32_000


def test_what_has_no_spaces_is_cut_by_its_bytes():
    tokenizer = CharTokenizer.train("ab渡 ")
    text = "aa " + "ab渡" * 6 + " b"
    pieces = [text[a:b] for a, b in split(text, tokenizer, 4, 1)]
    assert pieces == ["aa", *["ab", "b渡"] * 6, "b"]
