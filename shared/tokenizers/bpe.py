"""Week 5. Byte-level byte-pair encoding, the tokenizer of GPT-2 and of nearly everything after it.

A pattern cuts the text into pieces (words, numbers, runs of signs), each piece becomes its UTF-8 bytes, and
then pairs of tokens that stand side by side are merged, in the order in which training found them to be
frequent. No text is ever "unknown".

Sources: Sennrich, Haddow & Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016);
Radford et al. (GPT-2, 2019) for the bytes and the pattern.

>>> tokenizer = BPETokenizer.train("low lower lowest", vocab_size=260)
>>> tokenizer.merges
[(b'o', b'w'), (b'l', b'ow'), (b'low', b'e'), (b' ', b'lowe')]
>>> tokenizer.encode("lowly"), tokenizer.decode([259, 114])
([257, 108, 121], ' lower')
"""

import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from operator import add
from typing import Any, Literal

import regex
from tqdm import tqdm

from shared.assets import fetch
from shared.tokenizers.base import Tokenizer

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Contractions, words and numbers with the space before them, runs of other signs, white space."""
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""As GPT-2's, but contractions in either case, any one sign before a word, at most three digits together, and
line breaks kept with the signs before them.
"""
END_OF_TEXT = "<|endoftext|>"
CACHED_PIECES = 1 << 20
LONG_PIECE = 200  # longer ones are merged in another way (bytes are counted), and not kept (characters are)
NEVER = 1 << 62  # the rank of a pair that is not merged


class BPETokenizer(Tokenizer):
    """merges: pairs of tokens, in the order in which they are merged. pattern: what cuts text into pieces, in
    the syntax of `regex`.

    special_tokens: texts that stand for one token each, where the caller of `encode` allows it; a mapping
    gives their ids. vocab: the tokens by id, special ones among them; None means the 256 bytes, then what
    each merge makes, then the special tokens. A given vocab may lack bytes (SmolLM2's has no 0x04): text with
    them cannot be encoded. Raises ValueError for parts that don't fit together.
    """

    def __init__(
        self,
        merges: Iterable[tuple[bytes, bytes]],
        pattern: str = GPT2_PATTERN,
        special_tokens: Sequence[str] | Mapping[str, int] = (),
        vocab: Mapping[int, bytes] | None = None,
    ):
        self.merges = list(merges)
        self.pattern = pattern
        self._cut = _cutter(pattern)
        plain = list(dict.fromkeys(chain((bytes([i]) for i in range(256)), (a + b for a, b in self.merges))))
        specials = list(special_tokens)
        usual = dict(enumerate(plain + [s.encode() for s in specials]))
        self.vocab: dict[int, bytes] = dict(sorted(vocab.items())) if vocab else usual
        if not isinstance(special_tokens, Mapping):
            special_tokens = {s: len(plain) + i for i, s in enumerate(specials)}
        self.special_tokens: dict[str, int] = dict(special_tokens)
        self._has_own_order = self.vocab != usual

        ids = {token: i for i, token in self.vocab.items() if i not in self.special_tokens.values()}
        problems = []
        if list(self.vocab) != list(range(len(self.vocab))):
            problems.append("ids must go from 0 up without a gap")
        if len(set(specials)) != len(specials) or "" in specials:
            problems.append("special tokens must be different from each other and not empty")
        if any(self.vocab.get(i) != s.encode() for s, i in self.special_tokens.items()):
            problems.append("a special token's id must be its own in the vocabulary")
        problems += [
            f"the vocabulary lacks {token!r}"
            for token in [*plain[256:], *chain.from_iterable(self.merges)]
            if token not in ids
        ][:1]
        if problems:
            raise ValueError("BPETokenizer: " + "; ".join(problems))
        self._byte_ids = [ids.get(bytes([i])) for i in range(256)]
        self._ranks = {(ids[a], ids[b]): rank for rank, (a, b) in enumerate(self.merges)}
        self._merged = [ids[a + b] for a, b in self.merges]
        self._ids_of_piece = _Memory(self._merge)

    def __reduce__(self) -> tuple:
        """Other processes are handed what the tokenizer is made of."""
        return BPETokenizer, (self.merges, self.pattern, self.special_tokens, self.vocab)

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        pattern: str = GPT2_PATTERN,
        special_tokens: Sequence[str] = (),
        progress: bool = False,
    ) -> "BPETokenizer":
        """Learns `vocab_size` tokens (the bytes and special tokens among them) from a text, or from a stream
        of documents.

        Memory grows with the number of different pieces, not with the text. Of equally frequent pairs the
        lexicographically greater one is merged first. Raises ValueError for a size below 256 + special
        tokens, or above what the text has pairs for.
        """
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size={vocab_size}: must be at least {least}, for the 256 bytes and the special tokens"
            )
        cut, counts = _cutter(pattern), Counter()
        for document in [text] if isinstance(text, str) else text:
            _check_unicode(document)
            for pieces in cut(document):
                counts.update(pieces)
        merges = _learn_merges(counts, vocab_size - least, progress)
        if least + len(merges) < vocab_size:
            raise ValueError(
                f"vocab_size={vocab_size}: this text has pairs for {least + len(merges)} tokens only; choose"
                " at most that, or a longer text"
            )
        return cls(merges, pattern, special_tokens)

    @classmethod
    def from_printable(
        cls,
        tokens: Sequence[str],
        merges: Iterable[str],
        pattern: str = GPT2_PATTERN,
        special_tokens: Mapping[str, int] | None = None,
    ) -> "BPETokenizer":
        """From tokens by id and merges ("a b") in the letters of `PRINTABLE`, as GPT-2's files, Hugging
        Face's and GGUF have them.
        """
        special = set((special_tokens or {}).values())
        try:
            vocab = {i: t.encode() if i in special else from_printable(t) for i, t in enumerate(tokens)}
            pairs = [tuple(from_printable(part) for part in merge.split(" ")) for merge in merges]
        except KeyError as error:
            raise ValueError(f"the vocabulary has a character that stands for no byte: {error}") from None
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a merge is not two tokens with a space between them")
        return cls(pairs, pattern, special_tokens or {}, vocab)

    # ---- text to ids and back

    def encode(self, text: str, allowed_special: Iterable[str] | Literal["all"] = ()) -> list[int]:
        """Ids of `text`; nothing is added. A special token's text is plain text unless it is in
        `allowed_special` ("all" allows all).

        Raises ValueError for half a surrogate pair, which is in no UTF-8 text, for a byte that the vocabulary
        lacks, and for an allowed token that doesn't exist.
        """
        _check_unicode(text)
        allowed = set(self.special_tokens if allowed_special == "all" else allowed_special)
        unknown = allowed - self.special_tokens.keys()
        if unknown:
            raise ValueError(
                f"no special token {min(unknown)!r}; there are: {', '.join(self.special_tokens) or 'none'}"
            )
        if not allowed:
            return self._encode_plain(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        ids: list[int] = []
        for part in regex.split("(" + "|".join(map(regex.escape, longest_first)) + ")", text):
            ids += [self.special_tokens[part]] if part in allowed else self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for pieces in self._cut(text):
            ids += chain.from_iterable(map(self._ids_of_piece.__getitem__, pieces))
        return ids

    def _merge(self, piece: str) -> tuple[int, ...]:
        """Ids of one piece: of all pairs that stand side by side, the one learned first is merged, again and
        again.
        """
        ids = [self._byte_ids[b] for b in piece.encode()]
        if None in ids:
            raise ValueError(
                f"the vocabulary has no token for the byte 0x{piece.encode()[ids.index(None)]:02X} in"
                f" {piece!r}: leave it out of the text"
            )
        if len(ids) > LONG_PIECE:
            return self._merge_long(ids)
        rank_of = self._ranks.get
        ranks = [
            rank_of(pair, NEVER) for pair in zip(ids, ids[1:])
        ]  # ranks[i] is that of ids[i] and ids[i + 1]
        while ranks and (rank := min(ranks)) < NEVER:
            at = ranks.index(rank)
            merged = ids[at] = self._merged[rank]
            del ids[at + 1], ranks[at]
            if at:
                ranks[at - 1] = rank_of((ids[at - 1], merged), NEVER)
            if at < len(ranks):
                ranks[at] = rank_of((merged, ids[at + 1]), NEVER)
        return tuple(ids)

    def _merge_long(self, ids: list[int]) -> tuple[int, ...]:
        """The same with a heap of pairs over a linked list: n log n for n bytes, where looking at every rank
        each time takes n².
        """
        rank_of, end = self._ranks.get, len(ids)
        heap = [
            (rank, at) for at, pair in enumerate(zip(ids, ids[1:])) if (rank := rank_of(pair)) is not None
        ]
        heapq.heapify(heap)
        after, before = list(range(1, end + 1)), list(range(-1, end - 1))
        while heap:
            rank, at = heapq.heappop(heap)
            gone = after[at]
            if (
                gone == end or rank_of((ids[at], ids[gone])) != rank
            ):  # one of the two is part of another token by now
                continue
            ids[at], ids[gone] = self._merged[rank], -1
            after[at] = after[gone]
            if after[at] < end:
                before[after[at]] = at
            for left in (before[at], at):
                if (
                    left >= 0
                    and after[left] < end
                    and (rank := rank_of((ids[left], ids[after[left]]))) is not None
                ):
                    heapq.heappush(heap, (rank, left))
        return tuple(i for i in ids if i >= 0)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises ValueError for an id outside the vocabulary."""
        try:
            return b"".join([self.vocab[i] for i in ids])
        except KeyError as error:
            raise ValueError(
                f"id {error.args[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text again. Bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # ---- files

    def to_json(self) -> dict[str, Any]:
        """Bytes as the characters of the same code (latin-1); the vocabulary only where its order is not the
        usual one.
        """
        latin = lambda token: token.decode("latin-1")
        values = {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "merges": [[latin(a), latin(b)] for a, b in self.merges],
        }
        return values | ({"vocab": [latin(t) for t in self.vocab.values()]} if self._has_own_order else {})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BPETokenizer":
        byte = lambda text: text.encode("latin-1")
        try:
            vocab = {i: byte(t) for i, t in enumerate(values["vocab"])} if "vocab" in values else None
            merges = [(byte(a), byte(b)) for a, b in values["merges"]]
        except (ValueError, AttributeError) as error:
            raise TypeError(error) from None  # what `load` takes for damage
        return cls(merges, values["pattern"], dict(values["special_tokens"]), vocab)


class _Memory(dict):
    """A piece's ids, worked out when first asked for. Words come back so often that this is most of the
    speed. Long pieces do not, and a server that kept what strangers send would run out of memory.
    """

    def __init__(self, work_out: Callable[[str], tuple[int, ...]]):
        super().__init__()
        self._work_out = work_out

    def __missing__(self, piece: str) -> tuple[int, ...]:
        if len(self) >= CACHED_PIECES:
            self.clear()
        ids = self._work_out(piece)
        if len(piece) <= LONG_PIECE:
            self[piece] = ids
        return ids


def _learn_merges(counts: Mapping[str, int], wanted: int, progress: bool) -> list[tuple[bytes, bytes]]:
    """At most `wanted` merges, from how often each piece occurs.

    The text is never read again: a merge changes only the pieces that contain its pair, and only the counts
    of the pairs in those. A piece is a str with one character per token, chr(id), so that merging a pair is
    `str.replace`.
    """
    words = [piece.encode().decode("latin-1") for piece in counts]
    times = list(counts.values())
    count_of: defaultdict[str, int] = defaultdict(int)
    where: defaultdict[str, set[int]] = defaultdict(set)  # words that have, or once had, the pair
    for i, (word, n) in enumerate(zip(words, times)):
        for pair in map(add, word, word[1:]):
            count_of[pair] += n
            where[pair].add(i)

    tokens = [bytes([i]) for i in range(256)]
    turned = [_turned(t) for t in tokens]
    entry = lambda pair: (-count_of[pair], turned[ord(pair[0])], turned[ord(pair[1])], pair)
    heap = [entry(pair) for pair in count_of]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    with tqdm(
        total=wanted, desc="merges", unit="merge", disable=None if progress else True, leave=False
    ) as bar:
        while heap and len(merges) < wanted:
            count, _, _, pair = heapq.heappop(heap)
            if -count != count_of[pair]:  # it has become rarer since: back to where it belongs now
                if count_of[pair] > 0:
                    heapq.heappush(heap, entry(pair))
                continue
            left, right = tokens[ord(pair[0])], tokens[ord(pair[1])]
            token = chr(len(tokens))
            merges.append((left, right))
            tokens.append(left + right)
            turned.append(_turned(left + right))
            made = set()
            for i in where.pop(pair):
                old = words[i]
                new = words[i] = old.replace(pair, token)
                if len(new) == len(old):
                    continue
                n = times[i]
                for p in map(add, old, old[1:]):
                    count_of[p] -= n
                for p in map(add, new, new[1:]):
                    count_of[p] += n
                    if token in p:
                        where[p].add(i)
                        made.add(p)
            for p in made:  # only pairs with the new token can have become more frequent
                heapq.heappush(heap, entry(p))
            bar.update()
    return merges


def _turned(token: bytes) -> str:
    """A key that sorts the other way round than the token itself, since the smallest entry leaves a heap
    first.
    """
    return "".join([chr(255 - b) for b in token]) + chr(256)


# ---- cutting text into pieces

CHUNK = 1 << 16  # characters at a time: a list of pieces takes about fifteen times the memory of its text
SAFE_CUT = re.compile(
    r"(?<=[A-Za-z0-9])(?=\s)"
)  # no piece of either pattern has white space after a letter or a digit


@cache
def _cutter(pattern: str) -> Callable[[str], Iterator[list[str]]]:
    """A function that cuts a text into pieces, some at a time. Raises ValueError for a pattern that is none."""
    try:
        find_all = regex.compile(pattern).findall
    except regex.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    if pattern not in (GPT2_PATTERN, GPT4_PATTERN):  # who knows where another one may be cut
        return lambda text: iter([find_all(text)])
    find_all_ascii = _for_ascii(pattern).findall

    def cut(text: str) -> Iterator[list[str]]:
        start = 0
        while start < len(text):
            safe = SAFE_CUT.search(text, start + CHUNK)
            part = text[start : safe.end() if safe else len(text)]
            yield (find_all_ascii if part.isascii() else find_all)(part)
            start += len(part)

    return cut


def _for_ascii(pattern: str) -> re.Pattern:
    """The same for ASCII text in Python's own `re`, which is twice as fast but does not know classes like
    "letter".
    """
    plain = lambda found: found[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
    return re.compile(
        re.sub(
            r"\[.*?\]|\\p\{.\}",
            lambda found: plain(found) if found[0][0] == "[" else f"[{plain(found)}]",
            pattern,
        ),
        re.ASCII,
    )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"the text has half a surrogate pair (U+{code:04X}) at position {error.start}: no UTF-8 text can;"
            " read the file with encoding='utf-8', or drop it with text.encode('utf-8', 'ignore').decode()"
        ) from None


# ---- GPT-2's vocabulary


def _printable() -> dict[int, str]:
    """GPT-2's files write a byte as one printable character: itself where it is one, else one from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


PRINTABLE = _printable()
_BYTE_OF = {c: b for b, c in PRINTABLE.items()}


def to_printable(token: bytes) -> str:
    """A token as vocabulary files write it.

    >>> to_printable(b" the")
    'Ġthe'
    """
    return "".join(PRINTABLE[b] for b in token)


def from_printable(text: str) -> bytes:
    """The token again. Raises KeyError for a character that stands for no byte."""
    return bytes(_BYTE_OF[c] for c in text)


def gpt2_tokenizer() -> BPETokenizer:
    """Our tokenizer with GPT-2's vocabulary: 50,257 tokens, the last of them <|endoftext|>. Fetched on the
    first call.
    """
    ids = json.loads(fetch("gpt2-vocabulary").read_text(encoding="utf-8"))
    merges = (
        fetch("gpt2-merges").read_text(encoding="utf-8").splitlines()[1:]
    )  # the first line names the format
    tokens = sorted(ids, key=ids.get)
    return BPETokenizer.from_printable(tokens, merges, GPT2_PATTERN, {END_OF_TEXT: ids[END_OF_TEXT]})
