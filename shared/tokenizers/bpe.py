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

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any

from shared.assets import fetch
from shared.runtime import read_json
from shared.tokenizers.added import AddedTokens
from shared.tokenizers.base import Chat
from shared.tokenizers.bpe_training import learn_merges
from shared.tokenizers.cutting import Cutter
from shared.tokenizers.merging import Before, Merger, MergingTokenizer, check_unicode, options_from
from shared.tokenizers.patterns import GPT2_PATTERN, byte_level, pre_tokenizer_of
from shared.tokenizers.piece_encoder import PieceEncoder
from shared.tokenizers.sections import Section, tokens_by_id

END_OF_TEXT = "<|endoftext|>"
FEW_PIECES = 32
"""So many are encoded one by one: most are words that the tokenizer remembers the ids of."""


class BPETokenizer(MergingTokenizer):
    """Byte-pair encoding with given merges; `train` learns them.

    merges: pairs of tokens, in the order in which they are merged. pattern: what cuts text into pieces, in
    the syntax of `regex`; what lies between its matches is a piece as well. special_tokens: texts that stand
    for one token each, where the caller of `encode` allows it; a mapping gives their ids. vocab: the tokens
    by id, special ones among them; None means the 256 bytes, then what each merge makes, then the special
    tokens. A given vocab may lack bytes (SmolLM2's has no 0x04): text with them cannot be encoded.
    begins_with: the special token that `prompt` puts first. ends, chat: see `Tokenizer`. added_tokens: ids of
    tokens that are found in every text (Qwen's <tool_call>). lstrip, rstrip: those of both kinds that take
    the white space on their left or right. nfc: whether text is brought into Unicode's form NFC first, which
    then is what `decode` gives. ignore_merges: whether a piece that is a token becomes that token even where
    no merges lead to it (Llama 3). Raises ValueError for parts that don't fit together.
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
        added_tokens: Mapping[str, int] = MappingProxyType({}),
        lstrip: Iterable[str] = (),
        rstrip: Iterable[str] = (),
        nfc: bool = False,
        ignore_merges: bool = False,
    ):
        self.merges = list(merges)
        self.pattern = pattern
        self.nfc = nfc
        self.ignore_merges = ignore_merges
        self._cut = Cutter(pattern)
        single_bytes = [bytes([i]) for i in range(256)]
        merged = [left + right for left, right in self.merges]
        plain = list(dict.fromkeys(single_bytes + merged))
        specials = list(special_tokens)
        usual = dict(enumerate(plain + [special.encode() for special in specials]))
        if isinstance(special_tokens, Mapping):
            special_ids = dict(special_tokens)
        else:
            special_ids = {special: len(plain) + i for i, special in enumerate(specials)}
        added = AddedTokens(special_ids, added_tokens, lstrip, rstrip)
        super().__init__(vocab or usual, added, begins_with, ends, chat)
        self._has_own_order = self.vocab != usual

        of_texts = {*special_ids.values(), *added_tokens.values()}
        ids = {token: i for i, token in self.vocab.items() if i not in of_texts}
        for token, i in added_tokens.items():  # merges may make them too
            ids.setdefault(token.encode(), i)
        problems = []
        if len(set(specials)) != len(specials):
            problems.append("special tokens must be different from each other")
        needed = chain(plain[256:], chain.from_iterable(self.merges))
        missing = next((token for token in needed if token not in ids), None)
        if missing is not None:
            problems.append(f"the vocabulary lacks {missing!r}")
        self._refuse(problems)
        self._byte_ids = {byte: ids[token] for byte, token in enumerate(single_bytes) if token in ids}
        ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(self.merges)}
        self._merger = Merger(ranks, [ids[token] for token in merged])
        self._whole = ids if ignore_merges else {}

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
        cut = Cutter(pattern)
        counts: Counter[str] = Counter()
        for document in [text] if isinstance(text, str) else text:
            check_unicode(document)
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

        The files of GPT-2, Hugging Face and GGUF write them so. Special and added tokens are written as their
        texts. how: what else the class takes. Raises ValueError for a character that stands for no byte, and
        for a merge that is not two tokens.
        """
        special_tokens = special_tokens or {}
        of_texts = {*special_tokens.values(), *how.get("added_tokens", {}).values()}
        vocab = {}
        pairs = []
        read: dict[str, bytes] = {}  # merges are made of the vocabulary's tokens

        def in_bytes(token: str) -> bytes:
            if token not in read:
                read[token] = from_printable(token)
            return read[token]

        try:
            for i, token in enumerate(tokens):
                vocab[i] = token.encode() if i in of_texts else in_bytes(token)
            for merge in merges:
                parts = merge.split(" ")
                if len(parts) != 2:
                    raise ValueError("a merge is not two tokens with a space between them")
                pairs.append((in_bytes(parts[0]), in_bytes(parts[1])))
        except KeyError as error:
            raise ValueError(f"the vocabulary has a character that stands for no byte: {error}") from None
        return cls(pairs, pattern, special_tokens, vocab, begins_with, **how)

    # ---- text to ids

    def _pieces(self, part: str, before: Before) -> Iterator[list[str]]:
        return self._cut(unicodedata.normalize("NFC", part) if self.nfc else part)

    def _ids_of(self, pieces: list[str]) -> Iterable[int]:
        if len(pieces) > FEW_PIECES and self._piece_encoder is not None:
            ids = self._piece_encoder.encode(pieces)
            if ids is not None:
                return ids
        return super()._ids_of(pieces)

    @cached_property
    def _piece_encoder(self) -> PieceEncoder | None:
        """What gives many pieces their ids at once; None where C cannot be compiled."""
        try:
            return PieceEncoder(self._merger, self._byte_ids, self._whole)
        except RuntimeError:
            return None

    def _merge(self, piece: str) -> tuple[int, ...]:
        whole = self._whole.get(piece.encode()) if self.ignore_merges else None
        return super()._merge(piece) if whole is None else (whole,)

    def _first_ids(self, piece: str) -> list[int]:
        """The tokens of its bytes."""
        try:
            return [self._byte_ids[byte] for byte in piece.encode()]
        except KeyError as error:
            raise ValueError(
                f"the vocabulary has no token for the byte 0x{error.args[0]:02X} in {piece!r}:"
                " leave it out of the text"
            ) from None

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
        values |= self._options()
        for name in ("nfc", "ignore_merges"):
            if getattr(self, name):
                values[name] = True
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
        flags = {name: values[name] for name in ("nfc", "ignore_merges") if name in values}
        return cls(
            merges,
            values["pattern"],
            dict(values["special_tokens"]),
            vocab,
            **options_from(values),
            **flags,
        )

    def _written(self, token: bytes) -> str:
        return to_printable(token)

    def _hf_sections(self) -> dict[str, Any]:
        return {
            "normalizer": {"type": "NFC"} if self.nfc else None,
            "pre_tokenizer": pre_tokenizer_of(self.pattern),
            "decoder": byte_level(),
            "model": self._hf_model(self.merges) | {"ignore_merges": self.ignore_merges},
        }

    @classmethod
    def _said_in(cls, model: Section, own: dict[str, Any]) -> dict[str, Any]:
        names = {*own["special_tokens"], *own.get("added_tokens", ())}
        in_bytes = {text: text.encode() if text in names else from_printable(text) for text in model["vocab"]}
        in_latin_1 = {text: token.decode("latin-1") for text, token in in_bytes.items()}
        return {
            "vocab": [in_latin_1[text] for text in tokens_by_id(model["vocab"])],
            "merges": [[in_latin_1[text] for text in merge.split(" ")] for merge in model["merges"]],
        }


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
    return token.decode("latin-1").translate(PRINTABLE)


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
