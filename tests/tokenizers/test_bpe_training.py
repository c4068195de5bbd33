"""shared/tokenizers/bpe_training.py: counts that are kept up to date are those of a new count, with work that
does not grow with the length of a piece.
"""

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.tokenizers.bpe_training import _PairCounts


def counted(pairs: _PairCounts) -> Counter:
    """A new count of the words as they are."""
    fresh = Counter()
    for word, times in zip(pairs.words, pairs.times, strict=True):
        for pair in zip(word, word[1:]):
            fresh["".join(pair)] += times
    return fresh


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=40), st.integers(1, 3), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_counts_are_those_of_a_new_count_after_each_merge(pieces, draw):
    pairs = _PairCounts(pieces)
    token = 256
    while fresh := counted(pairs):
        assert {pair: n for pair, n in pairs.count_of.items() if n} == fresh
        pair = draw.choice(sorted(fresh))  # whichever it is, not only the most frequent
        expected = [word.replace(pair, chr(token)) for word in pairs.words]
        with_token = pairs.merge(pair, chr(token))
        assert pairs.words == expected
        assert with_token == {pair for pair in counted(pairs) if chr(token) in pair}
        token += 1
    assert not any(pairs.count_of.values())


class Counting(defaultdict):
    """Counts how often a value is set."""

    sets = 0

    def __setitem__(self, key, value):
        self.sets += 1
        super().__setitem__(key, value)


def test_a_merge_changes_only_the_counts_beside_it_however_long_a_piece_is():
    text = "".join(random.Random(4).choices("abcdefgh", k=20_000))
    pairs = _PairCounts({text: 1})
    pairs.count_of = Counting(int, pairs.count_of)
    for token in range(256, 320):
        pair = max(pairs.count_of, key=lambda pair: (pairs.count_of[pair], pair))
        pairs.merge(pair, chr(token))
    merged = len(text) - len(pairs.words[0])
    # For each pair that is merged two counts fall and two rise, and a new one is first set to 0. To count the
    # whole text each time would set more than a million.
    assert merged > 5_000 and pairs.count_of.sets <= 6 * merged + 64
