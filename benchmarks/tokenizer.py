"""How fast our BPE is beside Hugging Face's `tokenizers` (Rust), tiktoken (Rust) and the plain loop.

    python benchmarks/tokenizer.py

trains 4,096 tokens on `shakespeare`, 5 MB, and encodes it with GPT-2's vocabulary; and trains on a part of it
as it is and without its spaces, where nearly every piece is a new one and several times as long.

The plain loop (count every pair of the whole text, merge one, start again) would train for hours. It is timed
on a few merges of the whole text as bytes, and on a few of the text as it is after the last merge, when it is
shortest. The shorter time, times the number of merges, is less than the loop would need, so the ratio printed
is a lower bound.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copy

import regex
import tiktoken
import tokenizers
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from shared.assets import fetch
from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name
from shared.runtime import clock, table
from shared.tokenizers import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.tokenizers.patterns import GPT2_PATTERN
from timing import seconds


@dataclass(frozen=True)
class Settings:
    """Times training and encoding, and prints the ratios."""

    vocab_size: int = 4096
    plain_merges: int = 3
    """How many merges of the plain loop to time, at each end."""
    spaceless: int = 1_000_000
    """On how many characters to train with and without spaces."""
    repeats: int = 3
    """The median of so many runs counts."""


def plain_loop(pieces: list[list[int]], merges: int) -> None:
    """The textbook's training loop, on `pieces` in place. New tokens get ids from 10⁶ on."""
    for new in range(10**6, 10**6 + merges):
        counts: dict[tuple[int, int], int] = {}
        for piece in pieces:
            for pair in zip(piece, piece[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        left, right = max(counts, key=counts.__getitem__)
        for k, piece in enumerate(pieces):
            if left in piece:
                pieces[k] = merged(piece, left, right, new)


def merged(piece: list[int], left: int, right: int, new: int) -> list[int]:
    """A piece with `new` in the place of each `left` that `right` follows."""
    out = []
    i = 0
    while i < len(piece):
        if piece[i] == left and piece[i + 1 : i + 2] == [right]:
            out.append(new)
            i += 2
        else:
            out.append(piece[i])
            i += 1
    return out


def training(text: str, settings: Settings) -> list[dict]:
    """A row for each way to train `vocab_size` tokens."""

    ours = seconds(partial(BPETokenizer.train, text, settings.vocab_size), settings.repeats)
    theirs = seconds(partial(train_hugging_face, text, settings.vocab_size), settings.repeats)
    trained = BPETokenizer.train(text, settings.vocab_size)
    pieces = regex.findall(GPT2_PATTERN, text)
    first = [list(piece.encode()) for piece in pieces]
    last = [trained.encode(piece) for piece in pieces]
    at_first = seconds(lambda: plain_loop(first, settings.plain_merges))
    at_last = seconds(lambda: plain_loop(last, settings.plain_merges))
    plain = min(at_first, at_last) * (settings.vocab_size - 256) / settings.plain_merges
    rows = [("ours", ours), ("tokenizers (Rust)", theirs), ("the plain loop, at least", plain)]
    return [{"training": name, "seconds": time, "times ours": time / ours} for name, time in rows]


def train_hugging_face(text: str, vocab_size: int) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size, min_frequency=1, show_progress=False)


def without_spaces(text: str, settings: Settings) -> list[dict]:
    """A row for each way to train on the text as it is and on the same text without its spaces, in turns."""
    text = text[: settings.spaceless]
    texts = {"words": text, "no spaces": text.replace(" ", "")}
    rows = []
    for name, train in (("ours", BPETokenizer.train), ("tokenizers (Rust)", train_hugging_face)):
        times: dict[str, list[float]] = {kind: [] for kind in texts}
        for _ in range(settings.repeats):
            for kind, part in texts.items():
                times[kind].append(seconds(partial(train, part, settings.vocab_size)))
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        rows.append(
            {"training": name, **medians, "no spaces / words": medians["no spaces"] / medians["words"]}
        )
    return rows


def encoding(text: str, settings: Settings) -> list[dict]:
    """A row for each way to encode with GPT-2's vocabulary.

    Each run starts with a new tokenizer that has seen no word yet.
    """
    repeats = range(settings.repeats)
    encoders = {
        "ours": [gpt2_tokenizer().encode for _ in repeats],
        "tokenizers (Rust)": [hugging_face_encoder() for _ in repeats],
        "tiktoken (Rust)": [tiktoken_encoder() for _ in repeats],
    }
    size = len(text.encode()) / 1e6
    speeds: dict[str, float] = {}
    ids: dict[str, list[int]] = {}
    for name, fresh in encoders.items():
        times = []
        for encode in fresh:
            started = clock()
            ids[name] = encode(text)
            times.append(clock() - started)
        speeds[name] = size / statistics.median(times)
    assert ids["ours"] == ids["tiktoken (Rust)"] == ids["tokenizers (Rust)"], "the three do not agree"
    ours = speeds["ours"]
    return [
        {"encoding": name, "MB/s": speed, "ours / theirs": ours / speed} for name, speed in speeds.items()
    ]


def hugging_face_encoder() -> Callable[[str], list[int]]:
    """The `encode` of a new ByteLevelBPETokenizer with GPT-2's vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = copy(fetch("gpt2-vocabulary"), Path(folder, "vocab.json"))  # the names that it reads
        merges = copy(fetch("gpt2-merges"), Path(folder, "merges.txt"))
        tokenizer = tokenizers.ByteLevelBPETokenizer(str(vocabulary), str(merges))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    return encode


def tiktoken_encoder() -> Callable[[str], list[int]]:
    """The `encode_ordinary` of a new tiktoken.Encoding with GPT-2's vocabulary."""
    ranks = data_gym_to_mergeable_bpe_ranks(str(fetch("gpt2-merges")), str(fetch("gpt2-vocabulary")))
    special = {END_OF_TEXT: 50256}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return encoding.encode_ordinary


def main(settings: Settings) -> None:
    """Prints the tables."""
    text = fetch("shakespeare").read_text(encoding="utf-8")
    print(
        f"{device_name(torch.device('cpu'))}; {len(text.encode()) / 1e6:.1f} MB of text,"
        f" {settings.vocab_size} tokens, median of {settings.repeats} runs"
    )
    for rows in (training, without_spaces, encoding):
        print("\n" + table(rows(text, settings)))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
