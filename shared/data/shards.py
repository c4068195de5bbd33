"""Week 6. Data at scale: documents streamed, cleaned, tokenized by several processes, and kept as shards.

    python -m shared.data.shards --source fineweb-edu --out data/fineweb-edu --tokens 10M
    corpus = open_shards("data/fineweb-edu")  # as the Trainer takes it

A shard is a file of tokens: uint16, or uint32 where the vocabulary has more than 65,536. The folder holds
`val_00000.bin`, the first documents of the source, then `train_00000.bin` and so on; the tokenizer; and
`shards.json`, which names each shard with its sum. A file that it doesn't name does not count: a run that was
killed goes on after the last whole shard. Each document begins with <|endoftext|>, and none is cut: a shard
ends with the document that fills it.
"""

import hashlib
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tqdm import tqdm
from tyro.constructors import PrimitiveConstructorSpec

from shared.assets import sha256
from shared.checks import Checks
from shared.commandline import errors_for_people, parse_args
from shared.data.corpus import Corpus, token_dtype
from shared.data.sources import clean, describe_source, stream_documents
from shared.processes import in_groups, in_processes
from shared.runtime import read_json, write_atomically, write_json
from shared.tokenizers import Tokenizer, gpt2_tokenizer
from shared.tokenizers.bpe import END_OF_TEXT

INDEX = "shards.json"
FORMAT = 1
GROUP = 1 << 18  # characters that a process is handed at a time


def token_count(text: str) -> int:
    """A number of tokens as people write it. Raises ValueError for anything else.

    >>> token_count("10M"), token_count("1.5b"), token_count("250_000")
    (10000000, 1500000000, 250000)
    """
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([KMB]?)", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a number of tokens: write 250000, 250K, 10M or 1.5B")
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    return round(float(match[1]) * units[match[2].upper()])


TOKENS = PrimitiveConstructorSpec(
    nargs=1,
    metavar="N",
    instance_from_str=lambda args: token_count(args[0]),
    is_instance=lambda value: isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)
"""Tells the command line how a number of tokens is written."""


@dataclass(frozen=True)
class ShardConfig:
    """Turns documents into shards of tokens."""

    source: str
    """fineweb-edu, openwebtext, wikitext-103 (streamed from the Hugging Face hub), or a .jsonl, .parquet or
    .txt file or a folder of them.
    """
    out: str
    """The folder for the shards. One that was begun with the same settings is gone on with."""
    tokens: Annotated[int, TOKENS] | None = None
    """Stop when the training split has so many (10M, 1.5B); none takes the whole source."""
    val_tokens: Annotated[int, TOKENS] = 10**6
    """The validation split: the source's first documents, until they have so many tokens."""
    shard_tokens: Annotated[int, TOKENS] = 10**8
    """Tokens in a training shard; the run needs about twice a token's bytes of memory for each."""
    tokenizer: str | None = None
    """A tokenizer's JSON file; none takes GPT-2's."""
    column: str = "text"
    """Where the documents are, in .jsonl and .parquet."""
    form: Literal["documents", "wikitext"] = "documents"
    """documents: one a row; in .txt one a file, or several with a line <|endoftext|> between them. wikitext
    (always so for wikitext-103): a row is a line, and a title (" = Title = ") begins a document.
    """
    min_chars: int = 32
    """Shorter documents are dropped."""
    workers: int | None = None
    """Processes that tokenize; none takes one for each processor, at most 32. The result is the same."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "tokens", "val_tokens", "shard_tokens", "min_chars", "workers")
        checks.one_of("form", ("documents", "wikitext"))
        checks.finish()

    @property
    def is_wikitext(self) -> bool:
        """Whether a row is a line of WikiText."""
        return self.form == "wikitext" or self.source == "wikitext-103"


@cache
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """Built once in each process, and anew for another tokenizer in the same place."""
    return Tokenizer.load(path)


def _encode(
    path: Path, fingerprint: str, min_chars: int, wikitext: bool, group: list[tuple[int, str]]
) -> list[tuple[int, np.ndarray, int]]:
    """Of each document that isn't dropped its row, its tokens, and its text's bytes: what a process does."""
    tokenizer = _tokenizer(path, fingerprint)
    end, dtype = tokenizer.special_tokens[END_OF_TEXT], token_dtype(tokenizer.vocab_size)
    encoded = []
    for row, text in group:
        text = clean(text, wikitext)
        if len(text) >= min_chars:
            ids = np.array([end, *tokenizer.encode(text)], dtype)
            encoded.append((row, ids, len(text.encode())))
    return encoded


def _groups(stream: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    return in_groups(stream, _size, GROUP)


def _size(document: tuple[int, str]) -> int:
    return len(document[1]) + 1


def build(config: ShardConfig, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Writes the shards of a source, or goes on with those in the folder; returns what `shards.json` holds.

    tokenizer: None takes the config's. Killed at any moment and run again, the files are those of a run in
    one go. Raises ValueError for a tokenizer without <|endoftext|>, a source that cannot be read or is too
    short, and a folder that was begun with other settings, another tokenizer or other files (told apart by
    name and size; on the hub, by commit).
    """
    if tokenizer is None:
        tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else gpt2_tokenizer()
    _check_tokenizer(tokenizer)
    folder = Path(config.out)
    index = _begin(folder, config, tokenizer)
    if index["complete"]:
        return index
    shards = index["shards"]
    rows_read = shards[-1]["rows"] if shards else 0
    documents = stream_documents(
        config.source, index["source"], config.column, config.is_wikitext, skip=rows_read
    )
    path = folder / "tokenizer.json"
    job = partial(_encode, path, tokenizer.fingerprint, config.min_chars, config.is_wikitext)
    workers = config.workers or min(os.cpu_count() or 1, 32)
    with closing(in_processes(job, _groups(documents), workers)) as encoded:
        _write_shards(config, folder, index, encoded)
    if len(shards) < 2:
        raise ValueError(
            f"--source {config.source} is too short: after val_tokens={config.val_tokens} nothing is left to"
            " train on. Choose fewer (and another --out), or a source of more documents; a .txt file is one"
            f" document unless lines {END_OF_TEXT} part it"
        )
    index["complete"] = True
    write_json(folder / INDEX, index)
    return index


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) has no special token {END_OF_TEXT}, which goes"
            " between documents"
        )


def _write_shards(config: ShardConfig, folder: Path, index: dict[str, Any], encoded: Iterator[tuple]) -> None:
    """Writes shard after shard and saves `index` with each, until there are enough tokens or no documents."""
    shards = index["shards"]
    total = config.tokens + config.val_tokens if config.tokens else None
    written = sum(shard["tokens"] for shard in shards)
    name = index["source"]["name"]
    with tqdm(
        desc=name, initial=written, total=total, unit=" tokens", unit_scale=True, disable=None
    ) as progress:
        while (wanted := _wanted(config, shards)) > 0:
            documents, counts = _take(encoded, wanted, progress)
            if not documents or (not shards and counts["tokens"] < wanted):
                break
            file = _file_name(len(shards))
            write_atomically(folder / file, np.concatenate(documents).tobytes())
            shards.append({"file": file, **counts, "sha256": sha256(folder / file)})
            write_json(folder / INDEX, index)


def _begin(folder: Path, config: ShardConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The index of a folder that is begun, or of one that can be gone on with.

    In the latter case each shard in it has been read and is whole.
    """
    old = _read_index(folder) if (folder / INDEX).exists() else None
    if old is None and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has .bin files but no {INDEX}: they are not from here; choose another --out"
        )
    new = _identity(config, tokenizer, known=old["source"] if old else None)
    if old:
        for leftover in folder.glob(".*.tmp"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
    if old and old["shards"]:
        changed = []
        for part, values in new.items():
            changed += [
                f"{part}: {key}" for key in values | old[part] if values.get(key) != old[part].get(key)
            ]
        if changed:
            raise ValueError(
                f"{folder} was begun with another source, tokenizer or settings ({', '.join(changed)}):"
                " choose another --out, or delete it"
            )
        for shard in old["shards"]:
            _map(folder, shard, token_dtype(old["tokenizer"]["vocab_size"]), verify=True)
        return old
    index = {"format": FORMAT, **new, "complete": False, "shards": []}
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / INDEX, index)
    return index


def _identity(
    config: ShardConfig, tokenizer: Tokenizer, known: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """What decides the shards: source, settings and tokenizer, as the index keeps them."""
    left_out = ("source", "out", "tokenizer", "workers")
    return {
        "source": describe_source(config.source, known),
        "settings": {name: value for name, value in asdict(config).items() if name not in left_out},
        "tokenizer": {
            "kind": type(tokenizer).__name__,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
    }


def _wanted(config: ShardConfig, shards: list[dict]) -> float:
    """How many tokens the next shard is to have; none when there are enough."""
    if not shards:
        return config.val_tokens
    left = math.inf if config.tokens is None else config.tokens - sum(s["tokens"] for s in shards[1:])
    return min(config.shard_tokens, left)


def _take(encoded: Iterator[tuple], wanted: float, progress: tqdm) -> tuple[list[np.ndarray], dict[str, int]]:
    """Whole documents until there are `wanted` tokens, and what they come to.

    rows: of the source, read up to the last of them.
    """
    documents: list[np.ndarray] = []
    counts = {"documents": 0, "tokens": 0, "text_bytes": 0, "rows": 0}
    for row, ids, size in encoded:
        documents.append(ids)
        counts["documents"] += 1
        counts["tokens"] += len(ids)
        counts["text_bytes"] += size
        counts["rows"] = row
        progress.update(len(ids))
        if counts["tokens"] >= wanted:
            break
    return documents, counts


def _file_name(number: int) -> str:
    if number == 0:
        return "val_00000.bin"
    return f"train_{number - 1:05d}.bin"


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = read_json(folder / INDEX)
        names = [shard["file"] for shard in index["shards"]]
        if index["format"] != FORMAT or names != [_file_name(i) for i in range(len(names))]:
            raise ValueError(f"not of format {FORMAT}")
        fields = ("format", "source", "settings", "tokenizer", "complete", "shards")
        return {field: index[field] for field in fields}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"no shards in {folder}: {INDEX} is missing or damaged ({error}); `python -m shared.data.shards`"
            " makes them"
        ) from None


def _map(folder: Path, shard: dict, dtype: np.dtype, verify: bool) -> np.ndarray:
    path = folder / shard["file"]
    size = shard["tokens"] * dtype.itemsize
    whole = path.is_file() and path.stat().st_size == size
    if not whole or (verify and sha256(path) != shard["sha256"]):
        raise ValueError(
            f"{path} is missing, cut or damaged (expected {size} bytes, sha256 {shard['sha256']}): delete"
            f" {folder} and make it again"
        )
    return np.memmap(path, dtype=dtype, mode="r")


class ShardedTokens:
    """Arrays of tokens, one after the other, as one long array [tokens] that can only be read.

    Nothing of it is held in memory. Indexed with a number, a slice or integers of any shape; a window may
    begin in one shard and end in the next.

    >>> tokens = ShardedTokens([np.array([1, 2, 3], np.uint16), np.array([4, 5], np.uint16)])
    >>> tokens[np.array([[1, 2], [3, -1]])].tolist(), tokens[2:4].tolist(), len(tokens)
    ([[2, 3], [4, 5]], [3, 4], 5)
    """

    def __init__(self, parts: Sequence[np.ndarray], fingerprint: str | None = None):
        """parts: at least one, all of one dtype. fingerprint: of the contents, where it is known without
        reading them.
        """
        self.parts = list(parts)
        self.dtype = self.parts[0].dtype
        self.fingerprint = fingerprint
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            at = np.arange(*index.indices(len(self)))
        else:
            at = np.asarray(index)
        if at.dtype.kind not in "iu":
            raise IndexError(
                f"tokens are indexed with whole numbers, slices and integer arrays, not with {at.dtype}"
            )
        if at.size and not -len(self) <= at.min() <= at.max() < len(self):
            raise IndexError(f"index out of bounds: there are {len(self)} tokens")
        at = np.where(at < 0, at + len(self), at)
        which = np.searchsorted(self._starts, at, side="right") - 1
        tokens = np.empty(at.shape, self.dtype)
        for i in np.unique(which):
            here = which == i
            tokens[here] = self.parts[i][at[here] - self._starts[i]]
        return tokens[()]


def open_shards(folder: str | Path, tokenizer: Tokenizer | None = None, verify: bool = False) -> Corpus:
    """The corpus that `build` wrote, mapped from disk.

    tokenizer: if given, the shards must have been made with this one. Sizes are always checked; verify: the
    sums too, which reads every byte. Raises ValueError for shards that are unfinished, cut, damaged, or of
    another tokenizer.
    """
    folder = Path(folder)
    index = _read_index(folder)
    if not index["complete"]:
        raise ValueError(
            f"the shards in {folder} are not finished: run `python -m shared.data.shards` again with the same"
            " settings"
        )
    own = Tokenizer.load(folder / "tokenizer.json")
    made_with = index["tokenizer"]
    for used, where in ((own, f"in {folder / 'tokenizer.json'}"), (tokenizer or own, "in use")):
        if used.fingerprint != made_with["fingerprint"]:
            raise ValueError(
                f"the shards in {folder} were made with another tokenizer ({made_with['kind']},"
                f" {made_with['vocab_size']} tokens) than the one {where} ({type(used).__name__},"
                f" {used.vocab_size} tokens): use theirs, or make shards with yours"
            )
    dtype = token_dtype(made_with["vocab_size"])
    val, train = (
        ShardedTokens([_map(folder, shard, dtype, verify) for shard in shards], _fingerprint(shards))
        for shards in (index["shards"][:1], index["shards"][1:])
    )
    return Corpus(index["source"]["name"], own, train, val)


def _fingerprint(shards: Sequence[dict]) -> str:
    """Of a split's contents, from the sums that the index keeps."""
    return hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()[:16]


def main(config: ShardConfig) -> None:
    """Builds the shards and says what is there."""
    shards = build(config)["shards"]
    for name, split in (("val", shards[:1]), ("train", shards[1:])):
        tokens = sum(shard["tokens"] for shard in split)
        documents = sum(shard["documents"] for shard in split)
        text_bytes = sum(shard["text_bytes"] for shard in split)
        print(
            f"{name}: {tokens:,} tokens of {documents:,} documents ({text_bytes:,} bytes of text), shards:"
            f" {len(split)}"
        )
    print(f"to train on them: open_shards({config.out!r})")


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(ShardConfig, sys.argv[1:], __doc__))
