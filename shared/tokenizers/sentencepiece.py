"""Week 5. Byte-pair encoding as SentencePiece does it: of characters, and of bytes only where there is none.

The tokenizer of Llama 2, Mistral and Gemma. A text is not cut into words first: a space is a character like
any other, and tokens that begin with one are words. A character that the vocabulary lacks becomes its UTF-8
bytes, for each of which there is a token.

Source: Kudo & Richardson, "SentencePiece: A simple and language independent subword tokenizer and detokenizer
for Neural Text Processing" (2018).

>>> vocab = [b" ", b"a", b"b", b"ab", b" ab", *(bytes([i]) for i in range(256))]
>>> tokenizer = SentencePieceTokenizer(vocab, range(5, 261), merges=[(b"a", b"b"), (b" ", b"ab")])
>>> tokenizer.encode("ab ab!"), tokenizer.decode([3, 4])
([3, 4, 38], 'ab ab')
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import add
from types import MappingProxyType
from typing import Any, Literal, get_args

from shared.tokenizers.added import AddedTokens
from shared.tokenizers.base import Chat
from shared.tokenizers.cutting import CHUNK
from shared.tokenizers.merging import LONG_PIECE, Before, Merger, MergingTokenizer, options_from
from shared.tokenizers.sections import Section, tokens_by_id

SPACE = "\u2581"
"""What a space is inside of tokens and texts here; in a text it is taken for a space."""
UNKNOWN_TOKEN = "<unk>"
Prefix = Literal["never", "first", "parts", "always"]
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
"""The step of a normalizer that writes spaces as U+2581."""
PREPEND_SPACE = {"type": "Prepend", "prepend": SPACE}
SPLIT_AT_SPACES = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""Gemma's pre_tokenizer, to which nothing is left to do where spaces were replaced."""


class SentencePieceTokenizer(MergingTokenizer):
    """Byte-pair encoding that begins with characters.

    vocab: the bytes of each token, by id, with plain spaces. byte_ids: of the 256 tokens for bytes. merges:
    pairs of tokens, in the order in which they are merged. scores: instead of merges, one number for each
    token: two neighbours are merged where together they are a token, that of the highest score first, the
    leftmost of several. special_tokens, added_tokens, lstrip, rstrip, begins_with, ends, chat: as in
    `BPETokenizer`.

    prefix: where a space is put before text, so that a word there is the token that it is elsewhere: "never"
    (Gemma); "first", before a whole text that does not begin with a space (Mistral, from v0.3 on); "parts",
    the same behind special and added tokens too; "always", there even before a space (Llama 2). each_space:
    whether no token has a space behind its first place, so that several spaces stay several tokens.

    `decode` gives the bytes of the tokens, whether they are a text or a part of one: the space that was put
    before a text is there, and U+2581 has become a space. All else comes back whole. Raises ValueError for
    parts that don't fit together.
    """

    def __init__(
        self,
        vocab: Sequence[bytes],
        byte_ids: Sequence[int],
        special_tokens: Mapping[str, int] = MappingProxyType({}),
        *,
        merges: Iterable[tuple[bytes, bytes]] | None = None,
        scores: Sequence[float] | None = None,
        prefix: Prefix = "never",
        each_space: bool = False,
        begins_with: str | None = None,
        ends: Iterable[str] = (),
        chat: Chat | None = None,
        added_tokens: Mapping[str, int] = MappingProxyType({}),
        lstrip: Iterable[str] = (),
        rstrip: Iterable[str] = (),
    ):
        added = AddedTokens(special_tokens, added_tokens, lstrip, rstrip)
        super().__init__(dict(enumerate(vocab)), added, begins_with, ends, chat)
        self.byte_ids = list(byte_ids)
        self.prefix: Prefix = prefix
        self.each_space = each_space
        self.scores = None if scores is None else list(scores)
        self._given_merges = None if merges is None else list(merges)
        self._check()
        not_text = {*self.special_tokens.values(), *self.byte_ids}
        if merges is None:
            not_text |= set(added_tokens.values())
        self._texts = {i: token.decode() for i, token in self.vocab.items() if i not in not_text}
        self._ids = {text: i for i, text in self._texts.items()}
        if len(self._ids) < len(self._texts):
            twice = next(text for i, text in self._texts.items() if self._ids[text] != i)
            self._refuse([f"two tokens are {twice!r}"])
        self._ranks, self._merged = self._ranked_pairs() if merges is None else self._ranks_of_merges()
        self._merger = Merger(self._ranks, self._merged)
        self._break = self._between_words()

    def _check(self) -> None:
        problems = []
        if (self.scores is None) == (self._given_merges is None):
            problems.append("either merges or scores are needed")
        if self.scores is not None and len(self.scores) != len(self.vocab):
            problems.append(f"there are {len(self.scores)} scores for {len(self.vocab)} tokens")
        if self.prefix not in get_args(Prefix):
            problems.append(f"prefix={self.prefix!r} is not one of {', '.join(get_args(Prefix))}")
        if [self.vocab.get(i) for i in self.byte_ids] != [bytes([byte]) for byte in range(256)]:
            problems.append("byte_ids must be the ids of 256 tokens, one for each byte")
        self._refuse(problems)

    def _ranks_of_merges(self) -> tuple[dict[tuple[int, int], int], list[int]]:
        """The rank of each pair of ids that is merged, and by rank what it becomes."""
        ids = {text.encode(): i for text, i in self._ids.items()}
        assert self._given_merges is not None
        try:
            merged = [ids[left + right] for left, right in self._given_merges]
            pairs = [(ids[left], ids[right]) for left, right in self._given_merges]
        except KeyError as error:
            raise ValueError(f"SentencePieceTokenizer: the vocabulary lacks {error.args[0]!r}") from None
        return {pair: rank for rank, pair in enumerate(pairs)}, merged

    def _ranked_pairs(self) -> tuple[dict[tuple[int, int], int], list[int]]:
        """The same where scores say it: every way to make a token of two others has the token's rank."""
        assert self.scores is not None
        ids = self._ids
        scores = self.scores
        ranks = {}
        merged = sorted((i for i, text in self._texts.items() if len(text) > 1), key=lambda i: -scores[i])
        for rank, i in enumerate(merged):
            text = self._texts[i]
            if rank and scores[i] == scores[merged[rank - 1]]:
                self._refuse([f"{self._texts[merged[rank - 1]]!r} and {text!r} have one score, {scores[i]}"])
            for middle in range(1, len(text)):
                left = ids.get(text[:middle])
                if left is not None and (right := ids.get(text[middle:])) is not None:
                    ranks[left, right] = rank
        return ranks, merged

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs that are merged, in their order; those that make one token by its score are side by side,
        in the order of their ids.
        """
        if self._given_merges is not None:
            return self._given_merges
        in_order = sorted((rank, *pair) for pair, rank in self._ranks.items())
        return [(self.vocab[left], self.vocab[right]) for _, left, right in in_order]

    # ---- text to ids

    def _between_words(self) -> re.Pattern[str]:
        """Where a text may be cut: before a space, behind a character that no token has before a space.

        Tokens cannot be merged across such a place, so pieces are merged one by one, and most are words,
        which come again.
        """
        if self.each_space:
            return re.compile("(?<=.)(?= )", re.DOTALL)
        inside = [self._texts[i] for i in self._merged if " " in self._texts[i][1:]]
        before = {character for text in inside for character in re.findall("([^ ]) ", text)}
        return re.compile(f"(?<=[^ {re.escape(''.join(sorted(before)))}])(?= )")

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """All that are two characters side by side in a token."""
        texts = [self._texts[i] for i in self._merged]
        return frozenset(pair for text in texts for pair in map(add, text, text[1:]))

    def _pieces(self, part: str, before: Before) -> Iterator[list[str]]:
        text = part.replace(SPACE, " ")
        if self._puts_space(text, before):
            text = f" {text}"
        start = 0
        while len(text) - start > CHUNK:
            cut = self._break.search(text, start + CHUNK)
            end = cut.start() if cut else len(text)
            yield self._break.split(text[start:end])
            start = end
        yield self._break.split(text[start:])

    def _puts_space(self, text: str, before: Before) -> bool:
        if (
            not text
            or before == "text"
            or self.prefix == "never"
            or (self.prefix == "first" and before != "nothing")
        ):
            return False
        return text[:1] != " " or self.prefix == "always"

    def _merge(self, piece: str) -> tuple[int, ...]:
        """A long piece, such as a text in Chinese, is cut first wherever no token could reach across."""
        if len(piece) <= LONG_PIECE:
            return super()._merge(piece)
        ids: list[int] = []
        start = 0
        for at, pair in enumerate(map(add, piece, piece[1:]), 1):
            if pair not in self._neighbours:
                ids += self._ids_of_part(piece[start:at])
                start = at
        return (*ids, *self._ids_of_part(piece[start:]))

    def _ids_of_part(self, part: str) -> tuple[int, ...]:
        return self._ids_of_piece[part] if len(part) <= LONG_PIECE else super()._merge(part)

    def _first_ids(self, piece: str) -> list[int]:
        """The tokens of its characters, or of their bytes."""
        ids = []
        for character in piece:
            known = self._ids.get(character)
            if known is None:
                ids += [self.byte_ids[byte] for byte in character.encode()]
            else:
                ids.append(known)
        return ids

    # ---- files

    def to_json(self) -> dict[str, Any]:
        """Bytes as the characters of the same code (latin-1)."""
        values: dict[str, Any] = {
            "vocab": [token.decode("latin-1") for token in self.vocab.values()],
            "byte_ids": self.byte_ids,
            "special_tokens": self.special_tokens,
            "prefix": self.prefix,
            "each_space": self.each_space,
        }
        if self.scores is not None:
            values["scores"] = self.scores
        else:
            values["merges"] = [[a.decode("latin-1"), b.decode("latin-1")] for a, b in self.merges]
        return values | self._options()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SentencePieceTokenizer":
        merges = None
        try:
            vocab = [token.encode("latin-1") for token in values["vocab"]]
            if "merges" in values:
                merges = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in values["merges"]]
        except (ValueError, AttributeError) as error:
            raise TypeError(error) from None  # which `load` reports as a damaged file
        return cls(
            vocab,
            values["byte_ids"],
            dict(values["special_tokens"]),
            merges=merges,
            scores=values.get("scores"),
            prefix=values["prefix"],
            each_space=values["each_space"],
            **options_from(values),
        )

    def _written(self, token: bytes) -> str:
        return token.decode().replace(" ", SPACE)

    def _names(self) -> dict[int, str]:
        return {i: byte_token(byte) for byte, i in enumerate(self.byte_ids)} | super()._names()

    def _hf_sections(self) -> dict[str, Any]:
        unknown = UNKNOWN_TOKEN if UNKNOWN_TOKEN in self.special_tokens else None
        model = self._hf_model(self.merges) | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
        steps = decoder_steps(with_prefix=self.prefix != "never")
        return self._hf_spaces() | {"decoder": {"type": "Sequence", "decoders": steps}, "model": model}

    def _hf_spaces(self) -> dict[str, Section | None]:
        """The sections normalizer and pre_tokenizer."""
        if self.prefix in ("first", "parts") or self.each_space:
            if self.prefix == "always":
                raise ValueError(
                    "prefix='always' with each_space has no equivalent at Hugging Face: use 'parts'"
                )
            scheme = "always" if self.prefix == "parts" else self.prefix
            metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme}
            return {"normalizer": None, "pre_tokenizer": metaspace | {"split": self.each_space}}
        if self.prefix == "always":
            both = {"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]}
            return {"normalizer": both, "pre_tokenizer": None}
        return {"normalizer": REPLACE_SPACES, "pre_tokenizer": SPLIT_AT_SPACES}

    @classmethod
    def _said_in(cls, model: Section, own: dict[str, Any]) -> dict[str, Any]:
        special = own["special_tokens"]
        tokens = tokens_by_id(model["vocab"])
        vocab = [token.encode() if token in special else in_plain_bytes(token) for token in tokens]
        for byte, i in enumerate(own["byte_ids"]):
            vocab[i] = bytes([byte])
        said: dict[str, Any] = {"vocab": [token.decode("latin-1") for token in vocab]}
        if "scores" not in own:
            pairs = [merge.split(" ") for merge in model["merges"]]
            said["merges"] = [[in_plain_bytes(token).decode("latin-1") for token in pair] for pair in pairs]
        return said


# ---- Hugging Face's form


def byte_token(byte: int) -> str:
    """How SentencePiece writes the token for a byte.

    >>> byte_token(10)
    '<0x0A>'
    """
    return f"<0x{byte:02X}>"


def in_plain_bytes(token: str) -> bytes:
    """The bytes of a token that is written with U+2581 for a space."""
    return token.replace(SPACE, " ").encode()


def decoder_steps(with_prefix: bool) -> list[Section]:
    """The steps of the usual decoder; with_prefix: the space that was put before a text is taken off."""
    steps: list[Section] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if with_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps
