"""shared/tokenizers/bpe.py against tiktoken (ids), Hugging Face's tokenizers and a plain loop (training)."""

import json
import math
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from shared.assets import fetch
from shared.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, bpe, gpt2_tokenizer, merging
from shared.tokenizers.bpe import END_OF_TEXT
from shared.tokenizers.patterns import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    SMOLLM_PATTERN,
)
from tests.helpers import fuzz, synthetic_text

PATTERNS = {
    "GPT-2": GPT2_PATTERN,
    "GPT-4": GPT4_PATTERN,
    "Llama 3": LLAMA3_PATTERN,
    "Qwen": QWEN2_PATTERN,
    "SmolLM2": SMOLLM_PATTERN,
}


@cache
def gpt2() -> BPETokenizer:
    return gpt2_tokenizer()


@cache
def tiktokens_gpt2() -> tiktoken.Encoding:
    """tiktoken's own loader on the same two files, so that the test needs no network."""
    ranks = data_gym_to_mergeable_bpe_ranks(str(fetch("gpt2-merges")), str(fetch("gpt2-vocabulary")))
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256}
    )


@cache
def shakespeare() -> str:
    return fetch("shakespeare").read_text(encoding="utf-8")


def as_tiktoken(tokenizer: BPETokenizer) -> tiktoken.Encoding:
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
    return tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    )


# ---- ids

# The strings of `fuzz` have only code points that Python's Unicode knows: what became a letter in a newer
# version is one for `regex` and not yet for tiktoken.


@pytest.mark.slow
def test_gpt2s_ids_are_tiktokens_on_100_000_strings():
    ours, theirs = gpt2(), tiktokens_gpt2()
    for text in fuzz(100_000, seed=1):
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text), ascii(text)
        assert ours.decode(ids) == text


@pytest.mark.slow
def test_gpt2s_ids_are_tiktokens_on_shakespeare():
    ids = gpt2().encode(shakespeare())
    assert ids == tiktokens_gpt2().encode_ordinary(shakespeare())
    assert gpt2().decode(ids) == shakespeare()


def test_gpt2s_vocabulary():
    tokenizer = gpt2()
    assert tokenizer.vocab_size == 50257 and len(tokenizer.merges) == 50000
    assert tokenizer.encode(f"Hello world,{END_OF_TEXT}", allowed_special="all") == [15496, 995, 11, 50256]
    assert [bpe.to_printable(tokenizer.vocab[i]) for i in (15496, 995, 198)] == ["Hello", "Ġworld", "Ċ"]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_tokenizer_of_our_own_gives_tiktokens_ids(pattern):
    ours = BPETokenizer.train(shakespeare()[:300_000], 1000, pattern)
    theirs = as_tiktoken(ours)
    for text in [*fuzz(20_000, seed=2), shakespeare()[300_000:600_000]]:
        assert ours.encode(text) == theirs.encode_ordinary(text), ascii(text[:100])


LONG = {"a": "a" * 20_000, "space": " " * 20_000, "ab": "ab" * 10_000, "Chinese": "中文" * 5_000}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_piece_of_any_length_is_encoded_in_no_time(text):
    """The plain way takes n² steps for n bytes: here that would be minutes."""
    assert gpt2().encode(text) == tiktokens_gpt2().encode_ordinary(text)


# ---- laws


@pytest.mark.slow
@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_whole(text):
    for tokenizer in (gpt2(), BPETokenizer([])):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert b"".join(tokenizer.vocab[i] for i in tokenizer.encode(text)) == text.encode()
    assert BPETokenizer([]).encode(text) == list(text.encode())


def test_long_pieces_and_short_ones_are_merged_alike(monkeypatch):
    texts = fuzz(3000, seed=7)
    short = [gpt2()._merge(text) for text in texts]
    monkeypatch.setattr(merging, "LONG_PIECE", 0)
    assert [gpt2()._merge(text) for text in texts] == short


def test_a_forgotten_piece_is_worked_out_again(monkeypatch):
    monkeypatch.setattr(merging, "CACHED_PIECES", 10)
    monkeypatch.setattr(bpe, "FEW_PIECES", math.inf)
    tokenizer = BPETokenizer.train(synthetic_text(), 300)
    expected = as_tiktoken(tokenizer).encode_ordinary(synthetic_text())
    assert tokenizer.encode(synthetic_text()) == expected and len(tokenizer._ids_of_piece) <= 10


def test_a_long_piece_is_not_kept():
    tokenizer = BPETokenizer.train(synthetic_text(), 300)
    tokenizer.encode("a word and " + "x" * 100_000)
    kept = dict(tokenizer._ids_of_piece)
    assert {"a", " word", " and"} == kept.keys()
    long = " " + "y" * 1000
    assert tokenizer.decode(tokenizer.encode(long)) == long and dict(tokenizer._ids_of_piece) == kept


# ---- training


def plain_training(text: str, merges: int, pattern: str) -> list[tuple[bytes, bytes]]:
    """The textbook's loop: count every pair in the whole text, merge the most frequent one everywhere, start
    again.
    """
    pieces = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(pattern, text)]
    learned = []
    for _ in range(merges):
        counts = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        learned.append(best)
        for k, piece in enumerate(pieces):
            out, i = [], 0
            while i < len(piece):
                if tuple(piece[i : i + 2]) == best:
                    out.append(piece[i] + piece[i + 1])
                    i += 2
                else:
                    out.append(piece[i])
                    i += 1
            pieces[k] = out
    return learned


SMALL = {
    "Shakespeare": lambda: shakespeare()[:20_000],
    "synthetic": lambda: synthetic_text(500),
    "repeats": lambda: "aaaa aaaaa aaaaaaa baaa abababab " * 3 + "banana bananas ananas",
    "Unicode": lambda: "".join(fuzz(600, seed=5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("name", SMALL)
def test_training_equals_the_plain_loop(name, pattern):
    text = SMALL[name]()
    count = {"repeats": 12, "synthetic": 80}.get(name, 120)
    assert BPETokenizer.train(text, 256 + count, pattern).merges == plain_training(text, count, pattern)


def test_of_equally_frequent_pairs_the_greater_is_merged_first():
    assert BPETokenizer.train("ab cd ab cd", 258).merges == [(b"c", b"d"), (b"a", b"b")]
    # A token sorts after those that it begins with: (a, bb) is greater than (a, b).
    merges = BPETokenizer.train("xabb", 259, pattern=r"\S+|\s+").merges
    assert merges == [(b"x", b"a"), (b"xa", b"b"), (b"xab", b"b")]


@pytest.mark.slow
def test_training_agrees_with_hugging_face_where_no_two_pairs_are_equally_frequent():
    text = shakespeare()[:400_000]
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([text], vocab_size=256 + 400, min_frequency=1, show_progress=False)
    state = json.loads(theirs.to_str())["model"]["merges"]
    expected = [tuple(bpe.from_printable(part) for part in pair) for pair in state]
    ours = BPETokenizer.train(text, 256 + 400).merges
    counts = Counter(regex.findall(GPT2_PATTERN, text))
    words = {piece: [bytes([b]) for b in piece.encode()] for piece in counts}
    agreed = 0
    for mine, their in zip(ours, expected, strict=True):
        pairs = Counter()
        for piece, n in counts.items():
            for pair in pairwise(words[piece]):
                pairs[pair] += n
        (_, first), (_, second) = pairs.most_common(2)
        if first == second:
            break
        assert mine == their
        agreed += 1
        for piece, word in words.items():
            if mine[0] in word:
                out = []
                for token in word:
                    joined = out and (out[-1], token) == mine
                    out = [*out[:-1], out[-1] + token] if joined else [*out, token]
                words[piece] = out
    assert agreed >= 50


def test_a_stream_of_documents_is_read_once_and_no_pair_crosses_from_one_to_the_next():
    assert BPETokenizer.train(["ab"] * 9 + ["ba"] * 2, 257, pattern=r"(?s).+").merges == [(b"a", b"b")]
    assert BPETokenizer.train("ab" * 9, 258, pattern=r"(?s).+").merges == [(b"a", b"b"), (b"ab", b"ab")]


@pytest.mark.parametrize(
    ("size", "special", "message"),
    [
        (255, (), "at least 256"),
        (256, ("<s>",), "at least 257"),
        (4000, (), r"has pairs for \d+ tokens only; choose at most that"),
    ],
)
def test_a_size_that_cannot_be_had_is_refused(size, special, message):
    with pytest.raises(ValueError, match=f"vocab_size={size}.*{message}"):
        BPETokenizer.train("to be or not to be", size, special_tokens=special)


def test_the_largest_size_named_can_be_had():
    with pytest.raises(ValueError) as error:
        BPETokenizer.train("to be or not to be", 9999)
    most = int(regex.search(r"for (\d+) tokens", str(error.value))[1])
    assert BPETokenizer.train("to be or not to be", most).vocab_size == most


def test_without_merges_the_tokens_are_the_bytes():
    assert BPETokenizer.train("anything", 256).encode("é") == list("é".encode())


# ---- special tokens

SPECIAL = BPETokenizer.train("aa aa ab", 260, special_tokens=("<|end|>", "<|end|><|x|>"))


def test_special_tokens_come_last_and_only_where_allowed():
    assert SPECIAL.special_tokens == {"<|end|>": 258, "<|end|><|x|>": 259}
    text = "aa<|end|>aa<|end|><|x|>"
    assert 258 not in SPECIAL.encode(text) and SPECIAL.decode(SPECIAL.encode(text)) == text
    aa = SPECIAL.encode("aa")
    assert SPECIAL.encode(text, allowed_special="all") == [*aa, 258, *aa, 259]  # the longest one that fits
    assert SPECIAL.encode(text, allowed_special={"<|end|>"}) == [*aa, 258, *aa, 258, *SPECIAL.encode("<|x|>")]
    assert SPECIAL.decode([259, 258]) == "<|end|><|x|><|end|>"


def test_special_tokens_are_tiktokens():
    ours = BPETokenizer.train("aa aa ab", 260, special_tokens=("<|end|>", "<|pad|>"))
    theirs = as_tiktoken(ours)
    for text in ("<|end|>", "a<|end|>b<|pad|><|end|> <|end|", "", "<|pad|>", "aa <|end|><|end|>aa"):
        for allowed in ({"<|end|>"}, set(), {"<|end|>", "<|pad|>"}):
            expected = theirs.encode(text, allowed_special=allowed, disallowed_special=())
            assert ours.encode(text, allowed_special=allowed) == expected


def test_an_unknown_special_token_is_refused():
    with pytest.raises(ValueError, match=r"no special token '<\|y\|>'; there are: <\|end\|>"):
        SPECIAL.encode("a", allowed_special={"<|y|>"})


# ---- files


@pytest.mark.parametrize(
    "tokenizer",
    [SPECIAL, BPETokenizer.train("1234 x1234 xxx", 258, GPT4_PATTERN), BPETokenizer([])],
    ids=["special", "GPT-4's pattern", "bytes"],
)
def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert type(loaded) is BPETokenizer and loaded.fingerprint == tokenizer.fingerprint
    for name in ("vocab", "merges", "pattern", "special_tokens"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    text = "don't 12345 aa\n\n<|end|>é"
    assert loaded.encode(text, "all") == tokenizer.encode(text, "all")


@pytest.mark.slow
def test_gpt2s_own_order_of_ids_is_saved_too(tmp_path):
    gpt2().save(tmp_path / "tokenizer.json")
    loaded = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == gpt2().fingerprint and loaded.vocab == gpt2().vocab
    assert loaded.encode("Hello world,") == [15496, 995, 11]


def test_fingerprints_differ_where_ids_differ():
    text = "ab ab ac 12345"
    kinds = [
        BPETokenizer.train(text, 258),
        BPETokenizer.train(text, 259),
        BPETokenizer.train(text, 258, GPT4_PATTERN),
        BPETokenizer.train(text, 259, special_tokens=("<s>",)),
        CharTokenizer.train(text),
    ]
    assert len({t.fingerprint for t in kinds}) == len(kinds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": [["a", "bc"]]}, "vocabulary lacks b'bc'"),
        ({"merges": [["a"]]}, "damaged"),
        ({"merges": [["a", "ā"]]}, "damaged"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": None}, "damaged"),
        ({"special_tokens": {"<s>": 7}}, "must be its own"),
        ({"special_tokens": {"": 256}}, "must not be empty"),
        ({"vocab": ["a", "b"]}, "vocabulary lacks"),
        ({"merges": None}, "damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    values = {"kind": "BPETokenizer", "pattern": GPT2_PATTERN, "special_tokens": {}, "merges": [["a", "b"]]}
    path.write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
        BPETokenizer.load(path)


# ---- wrong input


@pytest.mark.parametrize("text", ["\ud800", "fine so far \udfff", "\udc80\ud800 pair the wrong way round"])
def test_half_a_surrogate_pair_is_refused_with_its_place(text):
    at = next(i for i, c in enumerate(text) if 0xD800 <= ord(c) <= 0xDFFF)
    message = rf"half a surrogate pair \(U\+{ord(text[at]):04X}\) at position {at}"
    with pytest.raises(ValueError, match=message):
        gpt2().encode(text)
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(text, 256)
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train(["x", text], 257)


@pytest.mark.parametrize("i", [-1, 50257])
def test_an_id_outside_the_vocabulary_is_refused(i):
    with pytest.raises(ValueError, match=f"id {i} is not in the vocabulary: ids go from 0 to 50256"):
        gpt2().decode([0, i])


def test_half_a_character_is_decoded_as_tiktoken_does():
    ids = gpt2().encode("é😀")
    for n in range(len(ids) + 1):
        assert gpt2().decode(ids[:n]) == tiktokens_gpt2().decode(ids[:n])
    assert gpt2().decode_bytes(ids) == "é😀".encode()


def test_printable_tokens_are_gpt2s():
    theirs = json.loads(fetch("gpt2-vocabulary").read_text(encoding="utf-8"))
    del theirs[END_OF_TEXT]
    for token, i in theirs.items():
        assert bpe.to_printable(bpe.from_printable(token)) == token
        assert gpt2().vocab[i] == bpe.from_printable(token)
