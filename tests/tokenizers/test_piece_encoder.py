"""shared/tokenizers/piece_encoder.py and .c: the ids of the plain loop, and tiktoken's."""

import os
import random
from functools import cache

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import compiled
from shared.assets import fetch
from shared.tokenizers import BPETokenizer, bpe, piece_encoder
from shared.tokenizers.merging import LONG_PIECE, Merger
from shared.tokenizers.piece_encoder import PieceEncoder
from tests.helpers import fuzz

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="piece_encoder.c is compiled on Linux and macOS only; elsewhere Python merges"
)


def as_tiktoken(tokenizer: BPETokenizer) -> tiktoken.Encoding:
    ranks = {token: i for i, token in tokenizer.vocab.items()}
    return tiktoken.Encoding("ours", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={})


def one_by_one(tokenizer: BPETokenizer) -> BPETokenizer:
    """The same tokenizer as where there is no compiler."""
    copy = BPETokenizer.from_json(tokenizer.to_json())
    vars(copy)["_piece_encoder"] = None
    return copy


@pytest.fixture
def every_piece(monkeypatch):
    """Short texts are encoded in C, too."""
    monkeypatch.setattr(bpe, "FEW_PIECES", 0)


@cache
def shakespeare() -> str:
    return fetch("shakespeare").read_text(encoding="utf-8")[:300_000]


@cache
def trained() -> BPETokenizer:
    return BPETokenizer.train(shakespeare()[:100_000], 1000)


# ---- pieces


@pytest.mark.parametrize("seed", range(20))
def test_many_pieces_are_encoded_as_one_by_one(seed):
    """With any ranks whatever, two pairs of one rank among them, and any tokens for bytes."""
    draw = random.Random(seed)
    ids = draw.choice([2, 5, 40, 50_000])
    byte_ids = {byte: draw.randrange(ids) for byte in range(256)}
    tokens = [*byte_ids.values(), *range(min(ids, 1000))]
    pairs = {(draw.choice(tokens), draw.choice(tokens)) for _ in range(draw.choice([0, 1, 30, 3000]))}
    ranks = {
        pair: rank // draw.choice([1, 2]) for rank, pair in enumerate(draw.sample(sorted(pairs), len(pairs)))
    }
    merger = Merger(ranks, [draw.choice(tokens) for _ in pairs])
    characters = draw.choice(["ab", "abcdefg ", "aéß中文😀\0"])
    pieces = ["".join(draw.choices(characters, k=draw.choice([1, 2, 3, 7, 25, 200]))) for _ in range(300)]
    expected = [merger.merge([byte_ids[byte] for byte in piece.encode()]) for piece in pieces]
    encoded = PieceEncoder(merger, byte_ids).encode(pieces)
    assert encoded == [i for piece in expected for i in piece]


def test_no_pieces_have_no_ids():
    assert PieceEncoder(Merger({}, []), {}).encode([]) == []


def test_pieces_that_are_not_for_it_are_handed_back():
    byte_ids = {byte: byte for byte in range(256) if byte != 4}
    encoder = PieceEncoder(
        Merger({(97, 98): 0}, [256]), byte_ids, whole={b"ab": 256, b"abc": 257, b"\xe4": 258}
    )
    assert encoder.encode(["ab", "abd", "é" * LONG_PIECE]) == [256, 256, 100, *[0xC3, 0xA9] * LONG_PIECE]
    assert encoder.encode(["ab", "é" * (LONG_PIECE + 1)]) is None
    assert encoder.encode(["ab", "abc"]) is None
    assert encoder.encode(["ab", "\x04"]) is None


# ---- texts


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_any_text_has_the_ids_of_the_plain_loop(text):
    """More than FEW_PIECES of them, so that they are encoded in C."""
    text = (text + " ") * 40
    ids = trained().encode(text)
    assert ids == one_by_one(trained()).encode(text)
    assert trained().decode(ids) == text


@pytest.mark.slow
def test_the_ids_are_tiktokens(every_piece):
    theirs = as_tiktoken(trained())
    for text in [shakespeare(), *fuzz(20_000, seed=10), "".join(fuzz(20_000, seed=11))]:
        assert trained().encode(text) == theirs.encode_ordinary(text), ascii(text[:100])


@pytest.mark.parametrize("character", ["a", "é", "中", "😀"])
def test_a_long_piece_among_others_has_tiktokens_ids(every_piece, character):
    theirs = as_tiktoken(trained())
    for length in (LONG_PIECE, LONG_PIECE + 1, 5000):
        text = f"to be {character * length} or not {character * length}"
        assert trained().encode(text) == theirs.encode_ordinary(text)


def test_whole_pieces_are_tokens_where_merges_are_ignored(every_piece):
    vocab = dict(enumerate([*(bytes([i]) for i in range(256)), b"ab", b"abc", b" abc"]))
    tokenizer = BPETokenizer([(b"a", b"b")], vocab=vocab, ignore_merges=True)
    for text in ("abc abc abd ab", "abd ab"):
        assert tokenizer.encode(text) == one_by_one(tokenizer).encode(text)
    assert tokenizer.encode("abc abc abd ab") == [257, 258, 32, 256, 100, 32, 256]


def test_a_missing_byte_is_named(every_piece):
    vocab = dict(enumerate(bytes([i]) for i in range(256) if i != 4))
    with pytest.raises(ValueError, match="no token for the byte 0x04 in '.*x04'"):
        BPETokenizer([], vocab=vocab).encode("a b\x04 c")


def test_a_text_of_many_pieces_is_encoded_in_c():
    """Otherwise the tests above would be of something that is never used."""
    tokenizer = BPETokenizer.train("ab ab", 258)
    tokenizer.encode("ab " * 10)
    assert "_piece_encoder" not in vars(tokenizer)
    tokenizer.encode("ab " * 100)
    assert tokenizer._piece_encoder is not None and tokenizer._ids_of_piece.keys() == {"ab", " ab", " "}


def test_without_a_compiler_the_ids_are_the_same(monkeypatch):
    expected = trained().encode(shakespeare())
    piece_encoder.encoding_library.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    try:
        tokenizer = BPETokenizer.from_json(trained().to_json())
        assert tokenizer._piece_encoder is None
        assert tokenizer.encode(shakespeare()) == expected
    finally:
        piece_encoder.encoding_library.cache_clear()
