"""Clean solutions of week 5's exercises, each with a word on why; `week.solution(name)` shows them."""

import re
from collections import Counter

import regex

from shared.tokenizers.bpe import GPT2_PATTERN


def pair_counts(words: dict[tuple[bytes, ...], int]) -> dict[tuple[bytes, bytes], int]:
    """zip(word, word[1:]) gives the neighbours of a piece, however short it is: one token has none."""
    counts: Counter[tuple[bytes, bytes]] = Counter()
    for word, times in words.items():
        for pair in zip(word, word[1:]):
            counts[pair] += times
    return dict(counts)


def merge_pair(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """After a merge the index goes on by two, so no token is used twice. A slice that reaches over the end is
    merely shorter, so the last token needs no care.
    """
    merged = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def learn_merges(words: dict[str, int], n: int) -> list[tuple[bytes, bytes]]:
    """The key (count, pair) says the whole rule: the count decides, and between equal counts the pair."""
    pieces = {tuple(bytes([b]) for b in word.encode()): times for word, times in words.items()}
    merges = []
    for _ in range(n):
        counts = pair_counts(pieces)
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        pieces = {tuple(merge_pair(list(piece), best)): times for piece, times in pieces.items()}
    return merges


def cut(text: str) -> list[str]:
    """Alternatives are tried in their order. The lookahead (?!\\S) makes a run of white space give back its
    last character, where a word follows.
    """
    return re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text)


def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    """A merge changes only the pieces that contain its pair, so the counts are kept, and only those pieces
    are taken out of them and put back: about three times as fast as counting all of them anew.
    """
    pieces = Counter(regex.findall(GPT2_PATTERN, text))
    words = {tuple(bytes([b]) for b in piece.encode()): times for piece, times in pieces.items()}
    counts = Counter(pair_counts(words))
    merges = []
    while counts and len(merges) < vocab_size - 256:
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        touched = {word: words[word] for word in words if best in zip(word, word[1:])}
        merged = {tuple(merge_pair(list(word), best)): times for word, times in touched.items()}
        words = {word: times for word, times in words.items() if word not in touched} | merged
        counts.update(pair_counts(merged))
        counts.subtract(pair_counts(touched))
        counts = +counts  # without the pairs that are gone
    return merges


def encode_piece(piece: str, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The rank of a pair is its place in `merges`; the lowest rank among the neighbours goes first, as it did
    in training.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    tokens = [bytes([b]) for b in piece.encode()]
    while able := [pair for pair in zip(tokens, tokens[1:]) if pair in ranks]:
        tokens = merge_pair(tokens, min(able, key=ranks.__getitem__))
    return tokens


def decode_ids(ids: list[int], vocab: dict[int, bytes]) -> str:
    """Join first, decode then: a character's bytes may lie in several tokens."""
    return b"".join(vocab[i] for i in ids).decode("utf-8", errors="replace")


class BPE:
    """Encoding looks at the special tokens that are allowed, then at the cuts, then at the merges. Words come
    back so often that a dict of the pieces met before is most of its speed.
    """

    def __init__(self, merges: list[tuple[bytes, bytes]], special_tokens: tuple[str, ...] = ()):
        self.merges = list(merges)
        tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.special_ids = {special: len(tokens) + i for i, special in enumerate(special_tokens)}
        self.vocab = dict(enumerate(tokens + [special.encode() for special in special_tokens]))
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        parts = [text]
        if allowed_special:
            parts = regex.split(f"({'|'.join(map(regex.escape, allowed_special))})", text)
        ids: list[int] = []
        for part in parts:
            if part in allowed_special:
                ids.append(self.special_ids[part])
            else:
                for piece in regex.findall(GPT2_PATTERN, part):
                    ids += self.ids_of(piece)
        return ids

    def ids_of(self, piece: str) -> list[int]:
        if piece not in self.known:
            self.known[piece] = [self.ids[token] for token in encode_piece(piece, self.merges)]
        return self.known[piece]

    def decode(self, ids: list[int]) -> str:
        return decode_ids(ids, self.vocab)
