"""shared/tokenizers/cutting.py against `regex`, which runs every pattern as it is written."""

import random
from itertools import chain

import pytest
import regex

from shared.assets import fetch
from shared.tokenizers import cutting
from shared.tokenizers.cutting import Cutter, in_plain_re
from shared.tokenizers.patterns import COVERING
from tests.helpers import ASSIGNED, fuzz
from tests.tokenizers.test_bpe import PATTERNS


def test_these_are_all_the_patterns_that_are_run_quickly():
    assert set(PATTERNS.values()) == set(COVERING)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_ascii_is_cut_as_regex_does(pattern):
    draw, quick = random.Random(6), in_plain_re(pattern)
    signs = [chr(c) for c in range(128)] + list(" \n\r'sdmtSDMTlLvVeErR '' ")
    for _ in range(50_000):
        text = "".join(draw.choices(signs, k=draw.randint(0, 16)))
        assert quick.findall(text) == regex.findall(pattern, text), ascii(text)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_text_below_u10000_is_cut_as_regex_does(pattern):
    """Beside the strings of `fuzz`, every character once between others; ſ is an s in either case."""
    quick = in_plain_re(pattern)
    known = [c for c in ASSIGNED if c < "\U00010000"]
    texts = [f"a{c}{c}1 {c} '{c}e{c}.{c}\n{c}" for c in known] + ["it'ſ", "'ſ", "weK'll", "'LL'Re"]
    for text in [*texts, *fuzz(20_000, seed=8)]:
        text = "".join(c for c in text if c < "\U00010000")
        assert quick.findall(text) == regex.findall(pattern, text), ascii(text)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_cutting_a_long_text_in_parts_changes_no_piece(pattern, monkeypatch):
    texts = ["".join(fuzz(3000, seed=3)), fetch("shakespeare").read_text(encoding="utf-8")[:50_000]]
    plain = "".join(c for c in texts[0] if c < "\U00010000")
    text = "".join([*texts, plain, "你好，世界。\n再见、朋友", texts[1]])
    whole = regex.findall(pattern, text)
    assert "".join(whole) == text
    for size in (1, 10, 1000):
        monkeypatch.setattr(cutting, "CHUNK", size)
        parts = list(Cutter(pattern)(text))
        assert len(parts) > len(text) / (size + 200) / 2
        assert list(chain.from_iterable(parts)) == whole


def test_a_pattern_of_ones_own_may_leave_gaps():
    assert list(Cutter(r"\d+")("a1b22")) == [["a", "1", "b", "22"]]
