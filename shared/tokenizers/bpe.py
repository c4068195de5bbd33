"""Week 5. Byte-level byte-pair encoding, the tokenizer of GPT-2 and of nearly everything after it.

A pattern cuts the text into pieces (words, numbers, runs of signs), each piece becomes its UTF-8 bytes, and
then pairs of neighbouring tokens are merged, in the order in which training learned them, the most frequent
pair first. Every text has ids, since every byte is a token.

Sources: Sennrich, Haddow & Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016);
Radford et al. (GPT-2, 2019) for the bytes and the pattern.

>>> tokenizer = BPETokenizer.train("low lower lowest", vocab_size=260)
>>> tokenizer.merges
[(b'o', b'w'), (b'l', b'ow'), (b'low', b'e'), (b' ', b'lowe')]
>>> tokenizer.encode("lowly"), tokenizer.decode([259, 114])
([257, 108, 121], ' lower')
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any, Literal

import regex

from shared.assets import fetch
from shared.runtime import read_json
from shared.tokenizers.base import Chat, Tokenizer
from shared.tokenizers.bpe_training import learn_merges

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
"""How many pieces a tokenizer remembers the ids of."""
LONG_PIECE = 200
"""Pieces of more bytes are merged with a heap; those of more characters are not remembered."""
NEVER = 1 << 62
"""The rank of a pair that is not merged: above that of every merge."""


class BPETokenizer(Tokenizer):
    """Byte-pair encoding with given merges; `train` learns them.

    merges: pairs of tokens, in the order in which they are merged. pattern: what cuts text into pieces, in
    the syntax of `regex`. special_tokens: texts that stand for one token each, where the caller of `encode`
    allows it; a mapping gives their ids. vocab: the tokens by id, special ones among them; None means the 256
    bytes, then what each merge makes, then the special tokens. A given vocab may lack bytes (SmolLM2's has no
    0x04): text with them cannot be encoded. begins_with: the special token that `prompt` puts first. ends,
    chat: see `Tokenizer`. Raises ValueError for parts that don't fit together.
    """

    def __init__(
        self,
        merges: Iterable[tuple[bytes, bytes]],
        pattern: str = GPT2_PATTERN,
        special_tokens: Sequence[str] | Mapping[str, int] = (),
        vocab: Mapping[int, bytes] | None = None,
        begins_with: str | None = None,
        *,
        ends: Iterable[str] = (),
        chat: Chat | None = None,
    ):
        self.merges = list(merges)
        self.pattern = pattern
        self._cut = _cutter(pattern)
        single_bytes = [bytes([i]) for i in range(256)]
        merged = [left + right for left, right in self.merges]
        plain = list(dict.fromkeys(single_bytes + merged))
        specials = list(special_tokens)
        usual = dict(enumerate(plain + [special.encode() for special in specials]))
        self.vocab: dict[int, bytes] = dict(sorted(vocab.items())) if vocab else usual
        self._has_own_order = self.vocab != usual
        if isinstance(special_tokens, Mapping):
            self.special_tokens = dict(special_tokens)
        else:
            self.special_tokens = {special: len(plain) + i for i, special in enumerate(specials)}

        self.begins_with = begins_with
        self.ends = tuple(ends)
        self.chat = chat
        special_ids = set(self.special_tokens.values())
        ids = {token: i for i, token in self.vocab.items() if i not in special_ids}
        self._check(specials, needed=[*plain[256:], *chain.from_iterable(self.merges)], ids=ids)
        self._byte_ids = {byte: ids[token] for byte, token in enumerate(single_bytes) if token in ids}
        self._ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(self.merges)}
        self._merged = [ids[token] for token in merged]
        self._ids_of_piece = _PieceCache(self._merge)

    def _check(self, specials: list[str], needed: list[bytes], ids: dict[bytes, int]) -> None:
        """Raises ValueError where vocabulary, special tokens and the tokens that merges need do not agree."""
        problems = []
        if list(self.vocab) != list(range(len(self.vocab))):
            problems.append("ids must go from 0 up without a gap")
        if len(set(specials)) != len(specials) or "" in specials:
            problems.append("special tokens must be different from each other and not empty")
        if any(self.vocab.get(i) != special.encode() for special, i in self.special_tokens.items()):
            problems.append("a special token's id must be its own in the vocabulary")
        if self.begins_with is not None and self.begins_with not in self.special_tokens:
            problems.append(f"begins_with={self.begins_with!r} is not one of the special tokens")
        problems += [
            f"it ends at {end!r}, which is not one of the special tokens"
            for end in self.ends
            if end not in self.special_tokens
        ]
        missing = [token for token in needed if token not in ids]
        if missing:
            problems.append(f"the vocabulary lacks {missing[0]!r}")
        if problems:
            raise ValueError("BPETokenizer: " + "; ".join(problems))

    def __reduce__(self) -> tuple:
        """Pickled as the arguments that it is made from: its functions cannot be sent to another process."""
        made = partial(BPETokenizer, ends=self.ends, chat=self.chat)
        return made, (self.merges, self.pattern, self.special_tokens, self.vocab, self.begins_with)

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        pattern: str = GPT2_PATTERN,
        special_tokens: Sequence[str] = (),
        progress: bool = False,
    ) -> "BPETokenizer":
        """Learns `vocab_size` tokens (the bytes and special tokens among them) from a text or documents.

        text: one text, or a stream of documents, which is read once; no token crosses from one document to
        the next. Memory grows with the number of different pieces, not with the text. Of equally frequent
        pairs the lexicographically greater one is merged first. Raises ValueError for a size below 256 +
        special tokens, or above what the text has pairs for.
        """
        least = 256 + len(special_tokens)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size={vocab_size}: must be at least {least}, for the 256 bytes and the special tokens"
            )
        cut = _cutter(pattern)
        counts: Counter[str] = Counter()
        for document in [text] if isinstance(text, str) else text:
            _check_unicode(document)
            for pieces in cut(document):
                counts.update(pieces)
        merges = learn_merges(counts, vocab_size - least, progress)
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
        begins_with: str | None = None,
        **how: Any,
    ) -> "BPETokenizer":
        """From tokens by id and merges ("a b") written in the characters of `PRINTABLE`.

        The files of GPT-2, Hugging Face and GGUF write them so. how: `ends` and `chat`. Raises ValueError for
        a character that stands for no byte, and for a merge that is not two tokens.
        """
        special_tokens = special_tokens or {}
        special_ids = set(special_tokens.values())
        vocab = {}
        pairs = []
        read: dict[str, bytes] = {}  # merges are made of the vocabulary's tokens

        def in_bytes(token: str) -> bytes:
            if token not in read:
                read[token] = from_printable(token)
            return read[token]

        try:
            for i, token in enumerate(tokens):
                vocab[i] = token.encode() if i in special_ids else in_bytes(token)
            for merge in merges:
                parts = merge.split(" ")
                if len(parts) != 2:
                    raise ValueError("a merge is not two tokens with a space between them")
                pairs.append((in_bytes(parts[0]), in_bytes(parts[1])))
        except KeyError as error:
            raise ValueError(f"the vocabulary has a character that stands for no byte: {error}") from None
        return cls(pairs, pattern, special_tokens, vocab, begins_with, **how)

    # ---- text to ids and back

    def encode(self, text: str, allowed_special: Iterable[str] | Literal["all"] = ()) -> list[int]:
        """Ids of `text`; nothing is added.

        A special token's text is plain text unless it is in `allowed_special` ("all" allows all). Raises
        ValueError for half a surrogate pair, which is in no UTF-8 text, for a byte that the vocabulary lacks,
        and for an allowed token that doesn't exist.
        """
        _check_unicode(text)
        allowed = set(self.special_tokens if allowed_special == "all" else allowed_special)
        unknown = allowed - self.special_tokens.keys()
        if unknown:
            known = ", ".join(self.special_tokens) or "none"
            raise ValueError(f"no special token {min(unknown)!r}; there are: {known}")
        if not allowed:
            return self._encode_plain(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        ids: list[int] = []
        for part in regex.split(f"({'|'.join(map(regex.escape, longest_first))})", text):
            if part in allowed:
                ids.append(self.special_tokens[part])
            else:
                ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for pieces in self._cut(text):
            ids += chain.from_iterable(map(self._ids_of_piece.__getitem__, pieces))
        return ids

    def _merge(self, piece: str) -> tuple[int, ...]:
        """Ids of one piece: of all neighbouring pairs the one learned first is merged, again and again."""
        ids = self._ids_of_bytes(piece)
        if len(ids) > LONG_PIECE:
            return self._merge_long(ids)
        rank_of = self._ranks.get
        ranks = [rank_of(pair, NEVER) for pair in zip(ids, ids[1:])]  # that of ids[i] and ids[i + 1] at i
        while ranks:
            rank = min(ranks)
            if rank == NEVER:
                break
            at = ranks.index(rank)
            ids[at] = self._merged[rank]
            del ids[at + 1], ranks[at]
            if at > 0:
                ranks[at - 1] = rank_of((ids[at - 1], ids[at]), NEVER)
            if at < len(ranks):
                ranks[at] = rank_of((ids[at], ids[at + 1]), NEVER)
        return tuple(ids)

    def _merge_long(self, ids: list[int]) -> tuple[int, ...]:
        """The same with a heap of pairs over a linked list: n log n steps for n bytes instead of n²."""
        rank_of = self._ranks.get
        end = len(ids)
        after = list(range(1, end + 1))  # where the next token stands; `end` behind the last
        before = list(range(-1, end - 1))  # where the one before it stands; -1 before the first
        ranks = [rank_of(pair, NEVER) for pair in zip(ids, ids[1:])]
        heap = [(rank, at) for at, rank in enumerate(ranks) if rank != NEVER]
        heapq.heapify(heap)
        while heap:
            rank, left = heapq.heappop(heap)
            right = after[left]
            if right == end or rank_of((ids[left], ids[right])) != rank:
                continue  # one of the two is part of another token by now
            ids[left] = self._merged[rank]
            ids[right] = -1  # gone
            after[left] = after[right]
            if after[left] < end:
                before[after[left]] = left
            for at in (before[left], left):
                if at < 0 or after[at] == end:
                    continue
                new_rank = rank_of((ids[at], ids[after[at]]), NEVER)
                if new_rank != NEVER:
                    heapq.heappush(heap, (new_rank, at))
        return tuple(i for i in ids if i >= 0)

    def _ids_of_bytes(self, piece: str) -> list[int]:
        try:
            return [self._byte_ids[byte] for byte in piece.encode()]
        except KeyError as error:
            raise ValueError(
                f"the vocabulary has no token for the byte 0x{error.args[0]:02X} in {piece!r}:"
                " leave it out of the text"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises ValueError for an id outside the vocabulary."""
        try:
            return b"".join([self.vocab[i] for i in ids])
        except KeyError as error:
            raise ValueError(
                f"id {error.args[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # ---- files

    def to_json(self) -> dict[str, Any]:
        """Bytes as the characters of the same code (latin-1); the vocabulary only where its order is not the
        usual one.
        """
        values: dict[str, Any] = {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "merges": [[left.decode("latin-1"), right.decode("latin-1")] for left, right in self.merges],
        }
        if self._has_own_order:
            values["vocab"] = [token.decode("latin-1") for token in self.vocab.values()]
        if self.begins_with is not None:
            values["begins_with"] = self.begins_with
        if self.ends:
            values["ends"] = list(self.ends)
        if self.chat is not None:
            values["chat"] = {"template": self.chat.template, "tokens": dict(self.chat.tokens)}
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BPETokenizer":
        vocab = None
        try:
            merges = [(left.encode("latin-1"), right.encode("latin-1")) for left, right in values["merges"]]
            if "vocab" in values:
                vocab = {i: token.encode("latin-1") for i, token in enumerate(values["vocab"])}
        except (ValueError, AttributeError) as error:
            raise TypeError(error) from None  # which `load` reports as a damaged file
        special_tokens = dict(values["special_tokens"])
        chat = values.get("chat")
        return cls(
            merges,
            values["pattern"],
            special_tokens,
            vocab,
            values.get("begins_with"),
            ends=values.get("ends", ()),
            chat=None if chat is None else Chat(**chat),
        )


class _PieceCache(dict[str, tuple[int, ...]]):
    """The ids of pieces, each computed when first asked for.

    Words come back so often that this is most of the speed. Long pieces rarely do, and are not kept: a server
    that kept every long text it was sent would run out of memory.
    """

    def __init__(self, compute: Callable[[str], tuple[int, ...]]):
        super().__init__()
        self._compute = compute

    def __missing__(self, piece: str) -> tuple[int, ...]:
        if len(self) >= CACHED_PIECES:
            self.clear()
        ids = self._compute(piece)
        if len(piece) <= LONG_PIECE:
            self[piece] = ids
        return ids


# ---- cutting text into pieces

CHUNK = 1 << 16
"""Characters that are cut at a time: a list of pieces takes about fifteen times the memory of its text."""
SAFE_CUT = re.compile(r"(?<=[A-Za-z0-9])(?=\s)")
"""Where a text may be cut in two: no piece of either pattern has white space after a letter or a digit."""


@cache
def _cutter(pattern: str) -> Callable[[str], Iterator[list[str]]]:
    """A function that cuts a text into pieces and yields them in lists.

    Raises ValueError for a pattern that is no regular expression.
    """
    try:
        find_all = regex.compile(pattern).findall
    except regex.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None

    def cut_at_once(text: str) -> Iterator[list[str]]:
        yield find_all(text)

    if pattern not in (GPT2_PATTERN, GPT4_PATTERN):
        return cut_at_once  # nothing is known of where its pieces may end
    find_all_ascii = _for_ascii(pattern).findall

    def cut_in_chunks(text: str) -> Iterator[list[str]]:
        start = 0
        while start < len(text):
            safe = SAFE_CUT.search(text, start + CHUNK)
            part = text[start : safe.end() if safe else len(text)]
            yield find_all_ascii(part) if part.isascii() else find_all(part)
            start += len(part)

    return cut_in_chunks


def _for_ascii(pattern: str) -> re.Pattern[str]:
    """The same pattern for ASCII text in Python's own `re`.

    That is twice as fast as `regex`, but does not know classes like "letter", which are written out here.
    """

    def written_out(match: re.Match[str]) -> str:
        characters = match[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
        return characters if match[0].startswith("[") else f"[{characters}]"

    return re.compile(re.sub(r"\[.*?\]|\\p\{.\}", written_out, pattern), re.ASCII)


def _check_unicode(text: str) -> None:
    """Raises ValueError, naming the place, for a text that UTF-8 cannot hold."""
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
    """The characters that GPT-2's files write for the 256 bytes.

    A byte that is itself a printable character in latin-1 stands for itself, the others for those from U+0100
    on.
    """
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
    """The inverse of `to_printable`. Raises KeyError for a character that stands for no byte."""
    return bytes(map(_BYTE_OF.__getitem__, text))


def gpt2_tokenizer() -> BPETokenizer:
    """Our tokenizer with GPT-2's vocabulary: 50,257 tokens, the last of them <|endoftext|>.

    The vocabulary is fetched on the first call.
    """
    ids: dict[str, int] = read_json(fetch("gpt2-vocabulary"))
    lines = fetch("gpt2-merges").read_text(encoding="utf-8").splitlines()
    merges = lines[1:]  # the first line names the format
    tokens = sorted(ids, key=ids.__getitem__)
    return BPETokenizer.from_printable(tokens, merges, GPT2_PATTERN, {END_OF_TEXT: ids[END_OF_TEXT]})
