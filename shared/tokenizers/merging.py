"""Week 5. What byte-pair encodings of every kind share: special tokens found, pieces merged, files.

A kind says how a text is cut into pieces and with which tokens a piece begins (bytes, or characters); the
rest is here. `BPETokenizer` and `SentencePieceTokenizer` are the kinds.

Source: Sennrich, Haddow & Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016).
"""

import heapq
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, Literal

from shared.tokenizers.added import AddedTokens, AllowedSpecial
from shared.tokenizers.base import Chat, Tokenizer
from shared.tokenizers.sections import Section

CACHED_PIECES = 1 << 20
"""How many pieces a tokenizer remembers the ids of."""
LONG_PIECE = 200
"""Pieces of more tokens are merged with a heap; those of more characters are not remembered."""
Before = Literal["nothing", "a token", "text"]
"""What stands before a part of a text: where it begins, behind a special or added token, or more text."""
NEVER = 1 << 62
"""The rank of a pair that is not merged: above that of every merge."""


class Merger:
    """Merges neighbouring tokens: always the pair of the lowest rank, the leftmost of several.

    ranks: of each pair that may be merged. merged: by rank, the token that its pairs become.

    >>> Merger({(0, 0): 0, (1, 0): 1}, merged=[1, 2]).merge([0, 0, 0, 0, 0])
    (1, 2)
    """

    def __init__(self, ranks: Mapping[tuple[int, int], int], merged: Sequence[int]):
        self.ranks = ranks
        self.merged = merged

    def merge(self, ids: list[int]) -> tuple[int, ...]:
        """What the tokens of a piece become; the list itself is used up."""
        if len(ids) > LONG_PIECE:
            return self._merge_long(ids)
        rank_of = self.ranks.get
        ranks = [rank_of(pair, NEVER) for pair in zip(ids, ids[1:])]  # that of ids[i] and ids[i + 1] at i
        while ranks:
            rank = min(ranks)
            if rank == NEVER:
                break
            at = ranks.index(rank)
            ids[at] = self.merged[rank]
            del ids[at + 1], ranks[at]
            if at > 0:
                ranks[at - 1] = rank_of((ids[at - 1], ids[at]), NEVER)
            if at < len(ranks):
                ranks[at] = rank_of((ids[at], ids[at + 1]), NEVER)
        return tuple(ids)

    def _merge_long(self, ids: list[int]) -> tuple[int, ...]:
        """The same with a heap of pairs over a linked list: n log n steps for n tokens instead of n²."""
        rank_of = self.ranks.get
        end = len(ids)
        after = list(range(1, end + 1))  # where the next token stands; `end` behind the last
        before = list(range(-1, end - 1))  # where the one before it stands; -1 before the first
        ranks = [rank_of(pair, NEVER) for pair in zip(ids, ids[1:])]
        # Rank and place in one number, which is compared several times as fast as a tuple.
        heap = [rank * end + at for at, rank in enumerate(ranks) if rank != NEVER]
        heapq.heapify(heap)
        while heap:
            rank, left = divmod(heapq.heappop(heap), end)
            right = after[left]
            if right == end or rank_of((ids[left], ids[right])) != rank:
                continue  # one of the two is part of another token by now
            ids[left] = self.merged[rank]
            ids[right] = -1  # gone
            after[left] = after[right]
            if after[left] < end:
                before[after[left]] = left
            for at in (before[left], left):
                if at < 0 or after[at] == end:
                    continue
                new_rank = rank_of((ids[at], ids[after[at]]), NEVER)
                if new_rank != NEVER:
                    heapq.heappush(heap, new_rank * end + at)
        return tuple(i for i in ids if i >= 0)


class PieceCache(dict[str, tuple[int, ...]]):
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


class MergingTokenizer(Tokenizer):
    """A byte-pair encoding of some kind, with given merges."""

    _merger: Merger

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        added: AddedTokens,
        begins_with: str | None,
        ends: Iterable[str],
        chat: Chat | None,
    ):
        self.vocab: dict[int, bytes] = dict(sorted(vocab.items()))
        self.added = added
        self.special_tokens = added.special
        self.begins_with = begins_with
        self.ends = tuple(ends)
        self.chat = chat
        self._ids_of_piece = PieceCache(self._merge)
        problems = added.problems()
        if list(self.vocab) != list(range(len(self.vocab))):
            problems.append("ids must go from 0 up without a gap")
        if any(self.vocab.get(i) != token.encode() for token, i in self.special_tokens.items()):
            problems.append("a special token's id must be its own in the vocabulary")
        if any(i not in self.vocab for i in added.plain.values()):
            problems.append("an added token's id must be in the vocabulary")
        if begins_with is not None and begins_with not in self.special_tokens:
            problems.append(f"begins_with={begins_with!r} is not one of the special tokens")
        problems += [
            f"it ends at {end!r}, which is not one of the special tokens"
            for end in self.ends
            if end not in self.special_tokens
        ]
        self._refuse(problems)

    def _refuse(self, problems: list[str]) -> None:
        """Raises ValueError where there are any."""
        if problems:
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}")

    def __reduce__(self) -> tuple:
        """Pickled as what `save` writes: its functions cannot be sent to another process."""
        return type(self).from_json, (self.to_json(),)

    # ---- text to ids

    @abstractmethod
    def _pieces(self, part: str, before: Before) -> Iterator[list[str]]:
        """Lists of the pieces of what lies between special and added tokens."""

    @abstractmethod
    def _first_ids(self, piece: str) -> list[int]:
        """The tokens of a piece before any are merged."""

    def encode(self, text: str, allowed_special: AllowedSpecial = (), *, mark: str = "") -> list[int]:
        """Ids of `text`; no special token is added.

        A special token's text is plain text unless it is in `allowed_special` ("all" allows all). mark: a
        text that is left out once the special tokens are found: inside the text of one, it keeps that from
        being the token. Raises ValueError for half a surrogate pair, which is in no UTF-8 text, for a byte
        that the vocabulary lacks, and for an allowed token that doesn't exist.
        """
        return self._encode(text, allowed_special, mark, "nothing")

    def encode_more(self, text: str) -> list[int]:
        """Ids of a text that goes on from another one."""
        return self._encode(text, (), "", "text")

    def _encode(self, text: str, allowed_special: AllowedSpecial, mark: str, before: Before) -> list[int]:
        check_unicode(text)
        ids: list[int] = []
        for part in self.added.split(text, allowed_special):
            if isinstance(part, int):
                ids.append(part)
                before = "a token"
                continue
            if mark:
                part = part.replace(mark, "")
            for pieces in self._pieces(part, before):
                ids += self._ids_of(pieces)
        return ids

    def _ids_of(self, pieces: list[str]) -> Iterable[int]:
        """Ids of pieces, one after the other."""
        return chain.from_iterable(map(self._ids_of_piece.__getitem__, pieces))

    def _merge(self, piece: str) -> tuple[int, ...]:
        """Ids of one piece: of all neighbouring pairs the one learned first is merged, again and again."""
        return self._merger.merge(self._first_ids(piece))

    # ---- files

    def _options(self) -> dict[str, Any]:
        """Of what `to_json` writes, what every kind may have; nothing where it is not set."""
        values: dict[str, Any] = {}
        if self.begins_with is not None:
            values["begins_with"] = self.begins_with
        if self.ends:
            values["ends"] = list(self.ends)
        if self.chat is not None:
            values["chat"] = {"template": self.chat.template, "tokens": dict(self.chat.tokens)}
        if self.added.plain:
            values["added_tokens"] = self.added.plain
        for side in ("lstrip", "rstrip"):
            if getattr(self.added, side):
                values[side] = sorted(getattr(self.added, side))
        return values

    @abstractmethod
    def _written(self, token: bytes) -> str:
        """How vocabulary files write a token."""

    def _names(self) -> dict[int, str]:
        """The tokens, by id, that vocabulary files write by a name instead."""
        return {i: name for tokens in (self.added.plain, self.added.special) for name, i in tokens.items()}

    def written_vocab(self) -> list[str]:
        """The tokens by id as vocabulary files write them (Hugging Face's, GGUF).

        Raises ValueError where two are written alike.
        """
        names = self._names()
        tokens = [names[i] if i in names else self._written(token) for i, token in self.vocab.items()]
        token, times = Counter(tokens).most_common(1)[0]
        if times > 1:
            kind = "special token" if token in self.special_tokens else "token"
            raise ValueError(
                f"the {kind} {token!r} is written like an ordinary one, which no other format can tell"
                " apart: give it another text"
            )
        return tokens

    def written_merges(self, merges: Iterable[tuple[bytes, bytes]]) -> list[str]:
        """Merges as vocabulary files write them: two tokens with a space between them."""
        return [f"{self._written(left)} {self._written(right)}" for left, right in merges]

    def _hf_model(self, merges: Iterable[tuple[bytes, bytes]]) -> Section:
        """The section model of a tokenizer.json."""
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(self.written_vocab())},
            "merges": self.written_merges(merges),
        }

    def _hf_added_tokens(self) -> list[Section]:
        """The special and added tokens, by id. They are found whatever stands around them."""
        added = self.added
        return [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": token in added.lstrip,
                "rstrip": token in added.rstrip,
                "normalized": False,
                "special": token in added.special,
            }
            for token, i in sorted({**added.plain, **added.special}.items(), key=itemgetter(1))
        ]


def options_from(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `MergingTokenizer._options` wrote."""
    names = ("begins_with", "ends", "added_tokens", "lstrip", "rstrip")
    options = {name: values[name] for name in names if name in values}
    if "chat" in values:
        options["chat"] = Chat(**values["chat"])
    return options


def check_unicode(text: str) -> None:
    """Raises ValueError, naming the place, for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"the text has half a surrogate pair (U+{code:04X}) at position {error.start}: no UTF-8 text can;"
            " read the file with encoding='utf-8', or drop it with text.encode('utf-8', 'ignore').decode()"
        ) from None
