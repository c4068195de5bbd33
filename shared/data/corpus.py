"""Week 1. From a text to batches: a train and a validation split as memory-mapped tokens, and windows drawn
from them.

The split is made on the text, before any tokenizer sees it (first 90 % train, last 10 % validation), so that
models with different tokenizers are measured on the same held-out characters.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from shared.assets import SUM_BYTES, cache_folder, fetch_or_fallback, is_whole, write_with_sum
from shared.tokenizers import CharTokenizer, Tokenizer

TRAIN_FRACTION = 0.9
TEXTS = ("tinyshakespeare", "shakespeare")
"""The assets that are texts to train on."""
TEXT_ENDINGS = (".txt", ".md")
"""Of the files that are read of a folder."""
TextSource = str | Path | Sequence[str | Path]
"""Where text is: one of TEXTS, a file, a folder, or several files and folders."""
HASHED_AT_ONCE = 1 << 22
"""So many tokens at a time are read for a fingerprint."""
LAYOUT = "sum, {}"
"""How tokens are kept, in which type; part of the files' names, so that none of another layout is read as one
of these.
"""


class Tokens(Protocol):
    """Token ids that may lie on disk, indexed as NumPy's arrays are: a slice, or integers of any shape."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Corpus:
    """A tokenized text. train, val: token ids, memory-mapped from disk: uint16, or uint32 where
    the tokenizer has more than 65,536 tokens.
    """

    name: str
    """The data set that was really used: 'tinyshakespeare', 'shakespeare', or a file's name and the first
    digits of its hash, so that runs on two files of one name are kept apart.
    """
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens

    @classmethod
    def from_texts(
        cls,
        train: str | Iterable[str],
        val: str | Iterable[str] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        name: str = "texts",
        block_size: int = 1,
        say: Callable[[str], None] = print,
    ) -> "Corpus":
        """A corpus of text in memory: one text, or documents that an iterable gives, one after the other.

        val: what is held out; None is the last tenth of `train`. The rest is as in `load_corpus`. Raises
        ValueError for texts without a character, and where it does.
        """
        text = train if isinstance(train, str) else join_texts(train)
        held_out = join_texts(val) if val is not None and not isinstance(val, str) else val
        if not text.strip() or (held_out is not None and not held_out.strip()):
            raise ValueError(f"{name} is empty: a model needs text to learn from, and to be measured on")
        name = named_by_content(name, text.encode())
        return _corpus(name, text, held_out, tokenizer, block_size=block_size, say=say)

    @property
    def start(self) -> list[int]:
        """What to begin a sample with: a line break, or where the text has none, its first token."""
        if b"\n" in self.tokenizer.vocab.values():
            return self.tokenizer.encode("\n")
        return self.train[:1].tolist()

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what is trained on and of what is held out: a run is resumed on the same tokens only."""
        return {"training data": token_fingerprint(self.train), "held-out data": token_fingerprint(self.val)}

    @cached_property
    def token_bytes(self) -> Tensor:
        """How many UTF-8 bytes of text each token stands for: int64 [vocab_size].

        They make bits per byte comparable across tokenizers. A special token stands for none: the mark
        between documents is no part of them.
        """
        lengths = [len(self.tokenizer.vocab[i]) for i in range(self.tokenizer.vocab_size)]
        for special in self.tokenizer.special_tokens.values():
            lengths[special] = 0
        return torch.tensor(lengths)


def token_fingerprint(tokens: Tokens) -> str:
    """A hash of the ids, whatever type holds them; shards bring their `fingerprint` and are not read."""
    own = getattr(tokens, "fingerprint", None)
    if own is not None:
        return own
    digest = hashlib.sha256()
    for start in range(0, len(tokens), HASHED_AT_ONCE):
        digest.update(np.asarray(tokens[start : start + HASHED_AT_ONCE]).astype("<u4").tobytes())
    return digest.hexdigest()[:16]


def read_text(data: TextSource) -> tuple[str, str]:
    """The name of the data set really used (see `Corpus.name`), and its text.

    data: one of TEXTS; the path of a UTF-8 text file; a folder, of which all files with TEXT_ENDINGS are
    read, those of its folders too, sorted by their paths (hidden ones are left out); or several files and
    folders, in their order. Files are put together by `join_texts`. Raises ValueError for what is none of
    these, a folder without such files, an empty text, and one that isn't UTF-8.
    """
    if isinstance(data, str) and data in TEXTS:
        name, path = fetch_or_fallback(data)
        return name, _decoded(path)
    sources = [Path(data)] if isinstance(data, (str, Path)) else [Path(source) for source in data]
    if not sources:
        raise ValueError("no files to read a text from: the list is empty")
    files = [file for source in sources for file in text_files(source)]
    text = join_texts(_decoded(file) for file in files)
    if not text.strip():
        raise ValueError(f"{sources[0]} is empty: a model needs text to learn from")
    more = f"+{len(sources) - 1}" if len(sources) > 1 else ""
    return named_by_content(sources[0].absolute().name + more, text.encode()), text


def text_files(source: Path) -> list[Path]:
    """A file itself; of a folder the text files in it (see `read_text`)."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"--data {source}: neither a file, a folder, nor one of {', '.join(TEXTS)}")
    files = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix.lower() in TEXT_ENDINGS and path.is_file()
        if not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not files:
        raise ValueError(f"--data {source}: a folder without a file that ends in {' or '.join(TEXT_ENDINGS)}")
    return files


def join_texts(texts: Iterable[str]) -> str:
    """One text of several, each on lines of its own: a line break is added behind one that ends without.

    >>> join_texts(["to be", "or not\\n", "to be"])
    'to be\\nor not\\nto be'
    """
    parts = list(texts)
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts[:-1]) + "".join(parts[-1:])


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}"
        ) from None


def named_by_content(name: str, content: bytes) -> str:
    """A name that another content of this name does not have: the first digits of its hash stand behind it.

    >>> named_by_content("my.txt", b"to be")
    'my.txt-0af1207e'
    """
    return f"{name}-{hashlib.sha256(content).hexdigest()[:8]}"


def split_text(text: str) -> tuple[str, str]:
    """First 90 % and last 10 % of the characters."""
    cut = int(TRAIN_FRACTION * len(text))
    return text[:cut], text[cut:]


def load_corpus(
    data: TextSource = "tinyshakespeare",
    tokenizer: Tokenizer | None = None,
    block_size: int = 1,
    say: Callable[[str], None] = print,
    *,
    val: TextSource | None = None,
) -> Corpus:
    """Reads, splits and tokenizes a text; tokens are kept on disk, so that a second call only maps them.

    data: one of TEXTS, a file, a folder or several of these (see `read_text`). val: the same for what is held
    out; None is the last tenth of `data`, which of several files are the last. tokenizer: None makes a
    `CharTokenizer` of all the text's characters. block_size: what both splits must be longer than, or
    ValueError. Kept tokens that are cut or damaged are made again, and `say` is told.
    """
    name, text = read_text(data)
    held_out = None if val is None else read_text(val)[1]
    return _corpus(name, text, held_out, tokenizer, block_size=block_size, say=say)


def _corpus(
    name: str,
    text: str,
    held_out: str | None,
    tokenizer: Tokenizer | None,
    *,
    block_size: int,
    say: Callable[[str], None],
) -> Corpus:
    """held_out: None is the last tenth of the text."""
    parts = split_text(text) if held_out is None else (text, held_out)
    tokenizer = tokenizer or CharTokenizer.train("".join(parts))
    train, val = (_tokens(part, tokenizer, say) for part in parts)
    TokenDataset(min(train, val, key=len), block_size)  # says so now if it is too short
    return Corpus(name, tokenizer, train, val)


def token_dtype(vocab_size: int) -> np.dtype:
    """What ids of such a vocabulary are kept as: uint16, or uint32 where they need more."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _tokens(text: str, tokenizer: Tokenizer, say: Callable[[str], None]) -> np.ndarray:
    dtype = token_dtype(tokenizer.vocab_size)
    layout = LAYOUT.format(dtype).encode()
    text_hash = hashlib.sha256(text.encode()).digest()
    key = hashlib.sha256(layout + tokenizer.fingerprint.encode() + text_hash).hexdigest()[:16]
    path = cache_folder() / "tokens" / f"{key}.bin"
    if not is_whole(path):
        if path.exists():
            say(f"{path} is cut or damaged: these tokens are made again")
        write_with_sum(path, np.array(tokenizer.encode(text), dtype).tobytes())
    if path.stat().st_size == SUM_BYTES:  # a tiny text's validation split; no bytes cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=SUM_BYTES)


class TokenDataset(Dataset):
    """Windows of a token array: item i is (tokens[i : i + block_size], the same shifted by one), int64
    [block_size] each.

    >>> x, y = TokenDataset(np.arange(10), block_size=4)[3]
    >>> x.tolist(), y.tolist()
    ([3, 4, 5, 6], [4, 5, 6, 7])
    """

    def __init__(self, tokens: Tokens, block_size: int):
        if len(tokens) <= block_size:
            raise ValueError(
                f"block_size={block_size} is too long for a split of {len(tokens)} tokens: choose at most"
                f" {len(tokens) - 1}, or a longer text"
            )
        self.tokens = tokens
        self.block_size = block_size

    def __len__(self) -> int:
        return len(self.tokens) - self.block_size

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([start])
        return x[0], y[0]

    def __getitems__(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, which is what `DataLoader` asks for: [batch, block_size] twice."""
        rows = np.asarray(starts)[:, None] + np.arange(self.block_size + 1)
        window = torch.from_numpy(self.tokens[rows].astype(np.int64))
        return window[:, :-1], window[:, 1:]


class EpochSampler(Sampler):
    """Batches of start positions, without end.

    Each epoch cuts the text at a new random phase into windows that don't overlap, and goes through them in a
    new order. Batch number `step` depends on seed and step alone, so a resumed run draws what it would have
    drawn. With fewer windows than `batch_size`, start positions are drawn at random instead. every: after a
    batch, so many numbers further on comes the next.
    """

    def __init__(
        self, dataset: TokenDataset, batch_size: int, seed: int, start_step: int = 0, every: int = 1
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.step = start_step
        self.every = every
        # One window less than fit, so that every phase has as many.
        self.batches_per_epoch = (len(dataset.tokens) // dataset.block_size - 1) // batch_size

    def _random(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, number])

    def __iter__(self) -> Iterator[list[int]]:
        epoch: int | None = None
        order = np.zeros(0, dtype=np.int64)
        step = self.step
        while True:
            if self.batches_per_epoch < 1:
                yield self._random(step).integers(len(self.dataset), size=self.batch_size).tolist()
            else:
                at = step % self.batches_per_epoch
                if epoch != step // self.batches_per_epoch:
                    epoch = step // self.batches_per_epoch
                    random = self._random(epoch)
                    phase = int(random.integers(self.dataset.block_size))
                    windows = (len(self.dataset.tokens) - 1 - phase) // self.dataset.block_size
                    order = random.permutation(windows) * self.dataset.block_size + phase
                yield order[at * self.batch_size : (at + 1) * self.batch_size].tolist()
            step += self.every


def batches(
    tokens: Tokens,
    block_size: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    every: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches without end, (x, y) int64 [batch_size, block_size], from batch number `start_step` on.

    every: of these only every so many-th. rank, world_size: of each batch only row number `rank` and every
    `world_size`-th after it are read, so that together, processes that share a batch read what one would.
    Raises ValueError for a rank that isn't one, or a batch that cannot be shared evenly.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must be from 0 to world_size - 1 = {world_size - 1}")
    if batch_size % world_size:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared by {world_size} processes: choose a multiple"
        )
    dataset = TokenDataset(tokens, block_size)
    sampler = EpochSampler(dataset, batch_size, seed, start_step, every)
    own = (starts[rank::world_size] for starts in sampler)
    # A generator of its own: without one, starting to iterate draws from torch's, and a resumed run would get
    # other dropout masks.
    loader = DataLoader(dataset, batch_sampler=own, collate_fn=_as_it_is, generator=torch.Generator())
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def fixed_windows(tokens: Tokens, block_size: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The windows that a split is measured on: (x, y) int64 [windows, block_size], side by side.

    limit: at most so many windows, spread evenly over the split (its beginning may be easier than the rest).
    None takes them all.
    """
    dataset = TokenDataset(tokens, block_size)
    count = (len(tokens) - 1) // block_size
    if limit is None or limit >= count:
        picked = np.arange(count)
    else:
        picked = np.linspace(0, count - 1, limit).round().astype(int)
    return dataset.__getitems__(list(picked * block_size))
