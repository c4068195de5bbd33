"""Week 6. The tokenizers in Hugging Face's files as ours: tokenizer.json, or vocab.json with merges.txt.

Ours cut text by a pattern and merge bytes (GPT-2, Llama 3, Qwen), merge characters (Llama 2, Mistral, Gemma),
or take single characters. A tokenizer that does something else is refused with the reason.
`shared.models.tokenizer_gguf` reads those of GGUF files, which `shared.models.tokenizer_writing` writes.

Source: the file format of the library `tokenizers`.
"""

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shared.models.tokenizer_ends import Ends, ends_of_json, named_special
from shared.runtime import read_json
from shared.tokenizers.base import Tokenizer, own_part
from shared.tokenizers.bpe import PRINTABLE, BPETokenizer
from shared.tokenizers.char import EVERY_CHARACTER, CharTokenizer
from shared.tokenizers.patterns import GPT2_PATTERN, UnlikeOurs, pattern_of, regex_of
from shared.tokenizers.sentencepiece import (
    PREPEND_SPACE,
    REPLACE_SPACES,
    SPACE,
    SPLIT_AT_SPACES,
    Prefix,
    SentencePieceTokenizer,
    byte_token,
    decoder_steps,
    in_plain_bytes,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Where a folder may have its tokenizer; ours can be what the first holds, or the next two together."""


class TokenizerFound(NamedTuple):
    """A tokenizer of a file's, and what the file asks for and ours does not do."""

    tokenizer: Tokenizer | None
    left_out: list[str]


def tokenizer_in_folder(folder: Path) -> TokenizerFound:
    """The tokenizer of a folder, Hugging Face's or a checkpoint, as ours; None where there is none.

    Raises `UnlikeOurs` where ours cannot be it, and ValueError for files that are damaged.
    """
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not names:
        return TokenizerFound(None, [])
    if names[0] != "tokenizer.json" and names[:2] != ["vocab.json", "merges.txt"]:
        raise UnlikeOurs(f"of {', '.join(TOKENIZER_FILES[:3])} there is not enough ({', '.join(names)})")
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter counts more
        if (folder / name).exists():
            config |= read_hf_json(folder / name)
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else None
    if names[0] == "tokenizer.json":
        return tokenizer_in_file(folder / names[0], config, template)
    vocab = folder / "vocab.json"
    ids = read_hf_json(vocab)
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    added = folder / "added_tokens.json"
    more = read_hf_json(added) if added.exists() else {}
    with _naming(vocab):
        return tokenizer_from_merges(ids, merges, more, config, template)


def tokenizer_in_file(
    path: Path, config: Mapping[str, Any] | None = None, template: str | None = None
) -> TokenizerFound:
    """The tokenizer of a tokenizer.json, Hugging Face's or ours, in either form.

    config, template: as in `tokenizer_from_json`; ours needs neither. Raises `UnlikeOurs` where ours cannot
    be it, and ValueError for a file that is damaged.
    """
    values = read_hf_json(path)
    if own_part(values) is not None:
        return TokenizerFound(Tokenizer.from_file_json(values, str(path)), [])
    with _naming(path):
        return tokenizer_from_json(values, config, template)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file where what it holds is damaged."""
    try:
        yield
    except UnlikeOurs:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): download it again") from None


def read_hf_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of Hugging Face's. Raises ValueError, naming it, for one that is damaged."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing, cut or damaged ({error}): download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return values


def tokenizer_from_json(
    values: Mapping[str, Any], config: Mapping[str, Any] | None = None, template: str | None = None
) -> TokenizerFound:
    """The content of a tokenizer.json of Hugging Face's as one of ours.

    config: the tokenizer_config.json beside it. template: the chat template, where it has a file of its own.
    Raises `UnlikeOurs` where ours cannot be it; KeyError, TypeError, AttributeError, IndexError or ValueError
    for one that is damaged.
    """
    config = config or {}
    model = values["model"]
    if _is_of_characters(values):
        characters = CharTokenizer("".join(in_order(model["vocab"])))
        return TokenizerFound(characters, ends_of_json(values, config, {}, template).left_out)
    known = {token["content"] for token in values["added_tokens"]}
    listed = values["added_tokens"] + [t for t in _added_in_config(config) if t["content"] not in known]
    added = _Added.of(listed)
    merges = model["merges"] if model.get("type", "BPE") == "BPE" else []
    if model.get("byte_fallback"):
        return _sentencepiece(values, added, config, template)
    steps = _steps(values.get("normalizer"), "normalizers")
    nfc = [step["type"] for step in steps] == ["NFC"]
    problems = _what_ours_lacks(model, {"ignore_merges"}) + added.problems(normalized=nfc)
    if steps and not nfc:
        problems.append("it changes the text first (normalizer)")
    if config.get("add_prefix_space"):
        problems.append(SPACE_FIRST)
    try:
        pattern = pattern_of(values["pre_tokenizer"])
    except UnlikeOurs as reason:
        problems.append(str(reason))
    if problems:
        raise UnlikeOurs("; ".join(problems))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    ends = ends_of_json(values, config, added.special, template)
    tokenizer = _bpe(
        model["vocab"], merges, pattern, added, ends, nfc=nfc, ignore_merges=bool(model.get("ignore_merges"))
    )
    return TokenizerFound(tokenizer, ends.left_out)


def _is_of_characters(values: Mapping[str, Any]) -> bool:
    vocab = values["model"]["vocab"]
    return (
        values["model"].get("type") == "WordLevel"
        and all(len(token) == 1 for token in vocab)
        and not values["added_tokens"]
        and not values.get("normalizer")
        and regex_of(values["pre_tokenizer"]) == EVERY_CHARACTER
    )


def in_order(ids: Mapping[str, int]) -> list[str]:
    """The tokens by id. Raises `UnlikeOurs` unless the ids go from 0 up without a gap."""
    tokens = sorted(ids, key=ids.__getitem__)
    for expected, token in enumerate(tokens):
        if ids[token] != expected:
            fault = f"no token has the id {expected}"
            if expected and ids[token] == expected - 1:
                fault = f"{tokens[expected - 1]!r} and {token!r} have one id, {ids[token]}"
            raise UnlikeOurs(f"its ids do not go from 0 up without a gap: {fault}")
    return tokens


def _added_in_config(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens that a tokenizer_config.json adds, as tokenizer.json would list them."""
    return [token | {"id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()]


SPACE_FIRST = "it puts a space before the text (add_prefix_space)"
_MODEL_FIELDS = {"type", "vocab", "merges", "fuse_unk"}
"""What our tokenizers have of a BPE in tokenizer.json; where no token is unknown, none are fused."""
_ADDED_FIELDS = {"id", "content", "normalized", "special", "__type", "lstrip", "rstrip"}
"""What our special and added tokens have."""


class _Added(NamedTuple):
    """The added tokens that a file lists."""

    special: dict[str, int]
    plain: dict[str, int]
    lstrip: list[str]
    rstrip: list[str]
    unclear: list[str]
    """Those that ask for more than ours can do."""
    normalized: list[str]
    """Those that are looked for once the text was normalized, after all others."""

    @classmethod
    def of(cls, listed: Iterable[Mapping[str, Any]]) -> "_Added":
        added = cls({}, {}, [], [], [], [])
        for token in listed:
            text = token["content"]
            (added.special if token["special"] else added.plain)[text] = token["id"]
            for flag in ("lstrip", "rstrip", "normalized"):
                if token.get(flag):
                    getattr(added, flag).append(text)
            if any(token[name] for name in token.keys() - _ADDED_FIELDS):
                added.unclear.append(text)
        return added

    def problems(self, normalized: bool) -> list[str]:
        """What ours cannot do of them. normalized: whether the text changes before some are looked for."""
        if self.unclear:
            return [
                f"the token {self.unclear[0]!r} is found only where more than its text is as it should be"
            ]
        if normalized and self.normalized:
            return [f"the token {self.normalized[0]!r} is looked for in the normalized text"]
        late = set(self.normalized)
        early = (self.special.keys() | self.plain.keys()) - late
        for first in early if late else ():
            second = next((text for text in late if _overlap(first, text)), None)
            if second is not None:
                return [f"the token {first!r} is looked for before {second!r}, which it overlaps with"]
        return []

    @property
    def of_tokenizer(self) -> dict[str, Any]:
        """What our tokenizers take of it, beside the special ones."""
        return {"added_tokens": self.plain, "lstrip": self.lstrip, "rstrip": self.rstrip}


def _overlap(a: str, b: str) -> bool:
    """Whether two different texts can stand in a text so that they share characters."""
    if a in b or b in a:
        return True
    lengths = range(1, min(len(a), len(b)))
    return any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in lengths)


def _steps(section: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a section of tokenizer.json, which may be one, or several under a name."""
    return [] if section is None else section.get(name, [section])


def _what_ours_lacks(model: Mapping[str, Any], also: set[str]) -> list[str]:
    """What a file's model asks for that ours does not have. also: fields that this kind of ours has."""
    problems = []
    if model.get("type", "BPE") != "BPE":
        problems.append(f"its model is {model['type']}")
    return problems + [
        f"its model has {name}={reprlib.repr(model[name])}"
        for name in model
        if model[name] and name not in _MODEL_FIELDS | also
    ]


def tokenizer_from_merges(
    ids: Mapping[str, int],
    merges: str,
    added: Mapping[str, int] | None = None,
    config: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> TokenizerFound:
    """GPT-2's two files, vocab.json and the text of merges.txt, as our BPETokenizer.

    added: what added_tokens.json, where there is one, adds to them. config, template: as in
    `tokenizer_from_json`. A token of vocab.json that no merge makes is a special one; one that is added is
    found in every text unless it is said to be special. Raises as `tokenizer_from_json` does.
    """
    config = config or {}
    pairs = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    made = {*PRINTABLE.values(), *(pair.replace(" ", "") for pair in pairs)}
    special = {token: i for token, i in ids.items() if token not in made}
    roles = named_special(config)
    listed = _added_in_config(config)
    known = {token["content"] for token in listed}
    for token, i in (added or {}).items():
        if token not in known:
            listed.append({"id": i, "content": token, "special": token in roles or token in special})
    found = _Added.of(listed)
    problems = found.problems(normalized=False)
    if config.get("add_prefix_space"):
        problems.append(SPACE_FIRST)
    if problems:
        raise UnlikeOurs("; ".join(problems))
    special = {token: i for token, i in special.items() if token not in found.plain}
    found = found._replace(special=special | found.special)
    ends = ends_of_json(None, config, found.special, template)
    return TokenizerFound(_bpe(ids, pairs, GPT2_PATTERN, found, ends), ends.left_out)


def _bpe(
    ids: Mapping[str, int],
    merges: Iterable[str],
    pattern: str,
    added: _Added,
    ends: Ends,
    **how: bool,
) -> BPETokenizer:
    tokens = in_order({**ids, **added.special, **added.plain})
    how = {**how, **added.of_tokenizer, **ends.of_tokenizer}
    return BPETokenizer.from_printable(tokens, merges, pattern, added.special, ends.begins_with, **how)


# ---- SentencePiece's


def _sentencepiece(
    values: Mapping[str, Any], added: _Added, config: Mapping[str, Any], template: str | None
) -> TokenizerFound:
    """A tokenizer.json with byte_fallback."""
    model = values["model"]
    problems = _what_ours_lacks(model, {"unk_token", "byte_fallback"})
    problems += added.problems(normalized=bool(values.get("normalizer")))
    prefix, each_space = _spaces(values, problems)
    if config.get("add_prefix_space") and prefix == "never":
        problems.append(SPACE_FIRST)
    byte_ids = [model["vocab"].get(byte_token(byte)) for byte in range(256)]
    if None in byte_ids:
        problems.append(f"it has no token {byte_token(byte_ids.index(None))}, and byte_fallback")
    own = {**model["vocab"], **added.special, **added.plain}
    known = {*added.special, *added.plain}
    with_space = next((token for token in model["vocab"] if " " in token and token not in known), None)
    if with_space is not None:
        problems.append(f"its token {with_space!r} has a space, which it writes as {SPACE!r} elsewhere")
    if problems:
        raise UnlikeOurs("; ".join(problems))
    special_ids = set(added.special.values())
    vocab = [
        token.encode() if i in special_ids else in_plain_bytes(token) for i, token in enumerate(in_order(own))
    ]
    for byte, i in enumerate(byte_ids):
        vocab[i] = bytes([byte])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [
        (in_plain_bytes(left), in_plain_bytes(right))
        for left, right in pairs
        if not added.special.keys() & {left, right, left + right}  # plain text never becomes such a token
    ]
    decoder = values.get("decoder")
    is_usual = _steps(decoder, "decoders") == decoder_steps(with_prefix=prefix != "never")
    ends = ends_of_json({**values, "decoder": None if is_usual else decoder}, config, added.special, template)
    tokenizer = SentencePieceTokenizer(
        vocab,
        byte_ids,
        added.special,
        merges=merges,
        prefix=prefix,
        each_space=each_space,
        begins_with=ends.begins_with,
        **ends.of_tokenizer,
        **added.of_tokenizer,
    )
    return TokenizerFound(tokenizer, ends.left_out)


_SCHEMES: dict[str, Prefix] = {"never": "never", "first": "first", "always": "parts"}
"""Our `prefix` by Metaspace's prepend_scheme."""


def _spaces(values: Mapping[str, Any], problems: list[str]) -> tuple[Prefix, bool]:
    """Where a space is put before text, and whether every space begins a piece. What is done otherwise is
    added to `problems`.
    """
    changes = _steps(values.get("normalizer"), "normalizers")
    steps = _steps(values.get("pre_tokenizer"), "pretokenizers")
    if not changes and [(step.get("type"), step.get("replacement")) for step in steps] == [
        ("Metaspace", SPACE)
    ]:
        scheme = steps[0].get("prepend_scheme", "always")
        return _SCHEMES[scheme], steps[0].get("split", True)
    if changes not in ([REPLACE_SPACES], [PREPEND_SPACE, REPLACE_SPACES]):
        what = "changes the text first" if changes else f"does not write spaces as {SPACE!r}"
        problems.append(f"it {what} (normalizer)")
    if any(step != SPLIT_AT_SPACES for step in steps):
        problems.append("it cuts the text by another rule (pre_tokenizer)")
    return ("always" if PREPEND_SPACE in changes else "never"), False
