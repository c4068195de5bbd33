"""Week 5. Learns the merges of byte-pair encoding from how often each piece of text occurs.

The text is never read again: a merge changes only the pieces that contain its pair, and in those only the
counts of the pairs beside it.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from operator import add

from tqdm import tqdm


def learn_merges(counts: Mapping[str, int], wanted: int, progress: bool) -> list[tuple[bytes, bytes]]:
    """At most `wanted` merges, the most frequent pair first; fewer where no pair is left.

    counts: how often each piece occurs. Of equally frequent pairs the lexicographically greater one comes
    first. progress: shows a bar.
    """
    pairs = _PairCounts(counts)
    count_of = pairs.count_of
    tokens = [bytes([i]) for i in range(256)]
    keys = [_descending(token) for token in tokens]

    def entry(pair: str) -> tuple[int, str, str, str]:
        """What orders pairs in the heap, whose smallest entry is taken first."""
        return -count_of[pair], keys[ord(pair[0])], keys[ord(pair[1])], pair

    heap = [entry(pair) for pair in count_of]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    disable = None if progress else True  # None: tqdm shows the bar where stderr is a terminal
    with tqdm(total=wanted, desc="merges", unit="merge", disable=disable, leave=False) as bar:
        while heap and len(merges) < wanted:
            negative_count, _, _, pair = heapq.heappop(heap)
            count = count_of[pair]
            if count != -negative_count:  # it has become rarer since: back to where it belongs now
                if count > 0:
                    heapq.heappush(heap, entry(pair))
                continue
            left, right = tokens[ord(pair[0])], tokens[ord(pair[1])]
            merges.append((left, right))
            grown = pairs.merge(pair, chr(len(tokens)))
            tokens.append(left + right)
            keys.append(_descending(left + right))
            for new_pair in grown:
                heapq.heappush(heap, entry(new_pair))
            bar.update()
    return merges


class _PairCounts:
    """How often each pair of neighbouring tokens occurs, kept up to date as pairs are merged.

    A word is a str with one character per token, chr(id), and a pair is a str of two, so that merging a pair
    is `str.split` and `str.join`.
    """

    def __init__(self, counts: Mapping[str, int]):
        self.words = [piece.encode().decode("latin-1") for piece in counts]
        self.times = list(counts.values())
        self.count_of: defaultdict[str, int] = defaultdict(int)
        self.words_with: defaultdict[str, set[int]] = defaultdict(set)  # that have, or once had, the pair
        for i, (word, times) in enumerate(zip(self.words, self.times)):
            for pair in map(add, word, word[1:]):
                self.count_of[pair] += times
                self.words_with[pair].add(i)

    def merge(self, pair: str, token: str) -> set[str]:
        """Puts `token` in the place of `pair` everywhere.

        Returns the pairs that have `token`: no other pair can have become more frequent.
        """
        words = self.words
        count_of = self.count_of
        words_with = self.words_with
        with_token: set[str] = set()
        for i in words_with.pop(pair):
            parts = words[i].split(pair)
            if len(parts) == 1:
                continue
            words[i] = token.join(parts)
            times = self.times[i]
            count_of[pair] -= (len(parts) - 1) * times
            gone, new = _pairs_at_the_seams(parts, pair, token)
            for old_pair in gone:
                count_of[old_pair] -= times
            for new_pair in new:
                count_of[new_pair] += times
                words_with[new_pair].add(i)
            with_token.update(new)
        return with_token


def _pairs_at_the_seams(parts: list[str], pair: str, token: str) -> tuple[list[str], list[str]]:
    """The pairs that go, besides `pair` itself, and those that come when `token` is put in its place between
    the parts of a word. Only its neighbours count, so that a long word costs no more than a short one.

    >>> _pairs_at_the_seams(["x", "", "y"], "ab", "C")  # xababy becomes xCCy
    (['xa', 'ba', 'by'], ['xC', 'CC', 'Cy'])
    """
    left, right = pair[0], pair[1]
    gone, new = [], []
    for place, (before, behind) in enumerate(pairwise(parts)):
        if before:
            gone.append(before[-1] + left)
            new.append(before[-1] + token)
        elif place:  # right behind another
            gone.append(right + left)
            new.append(token + token)
        if behind:
            gone.append(right + behind[0])
            new.append(token + behind[0])
    return gone, new


def _descending(token: bytes) -> str:
    """A key that sorts in the opposite order of the tokens: the greatest token has the smallest key."""
    return "".join([chr(255 - b) for b in token]) + chr(256)
