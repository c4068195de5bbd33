"""How fast our BPE is beside Hugging Face's `tokenizers` (Rust), tiktoken (Rust) and the plain loop: one
text, one run.

    python benchmarks/tokenizer.py                 # on `shakespeare`, 5 MB: train 4,096 tokens, encode with GPT-2's vocabulary

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
from pathlib import Path
from shutil import copy

import regex
import tiktoken
import tokenizers
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from shared.assets import fetch
from shared.commandline import errors_for_people, parse_args
from shared.runtime import clock, device_name, table
from shared.tokenizers import BPETokenizer, gpt2_tokenizer
from shared.tokenizers.bpe import END_OF_TEXT, GPT2_PATTERN


@dataclass(frozen=True)
class Settings:
    """Times training and encoding, and prints the ratios."""

    vocab_size: int = 4096
    plain_merges: int = 3
    """How many merges of the plain loop to time, at each end."""
    repeats: int = 3
    """The median of so many runs counts."""


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    times = []
    for _ in range(repeats):
        started = clock()
        work()
        times.append(clock() - started)
    return statistics.median(times)


def plain_loop(pieces: list[list[int]], merges: int) -> None:
    """The textbook's training loop. New tokens get ids from 10⁶ on."""
    for new in range(10**6, 10**6 + merges):
        counts: dict[tuple[int, int], int] = {}
        for piece in pieces:
            for pair in zip(piece, piece[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=counts.get)
        for k, piece in enumerate(pieces):
            if best[0] in piece:
                out, i = [], 0
                while i < len(piece):
                    if piece[i] == best[0] and piece[i + 1 : i + 2] == [best[1]]:
                        out.append(new)
                        i += 2
                    else:
                        out.append(piece[i])
                        i += 1
                pieces[k] = out


def training(text: str, s: Settings) -> list[dict]:
    """A row for each way to train `vocab_size` tokens."""
    hugging_face = lambda: tokenizers.ByteLevelBPETokenizer().train_from_iterator(
        [text], s.vocab_size, min_frequency=1, show_progress=False
    )
    ours = seconds(lambda: BPETokenizer.train(text, s.vocab_size), s.repeats)
    theirs = seconds(hugging_face, s.repeats)
    trained = BPETokenizer.train(text, s.vocab_size)
    first = [list(piece.encode()) for piece in regex.findall(GPT2_PATTERN, text)]
    last = [trained.encode(piece) for piece in regex.findall(GPT2_PATTERN, text)]
    plain = min(
        seconds(lambda: plain_loop(first, s.plain_merges)), seconds(lambda: plain_loop(last, s.plain_merges))
    )
    plain *= (s.vocab_size - 256) / s.plain_merges
    rows = [("ours", ours), ("tokenizers (Rust)", theirs), ("the plain loop, at least", plain)]
    return [{"training": name, "seconds": time, "times ours": time / ours} for name, time in rows]


def encoding(text: str, s: Settings) -> list[dict]:
    """A row for each way to encode with GPT-2's vocabulary. Each run starts with a new tokenizer that has
    seen no word yet.
    """
    vocabulary, merges = str(fetch("gpt2-vocabulary")), str(fetch("gpt2-merges"))
    ranks = data_gym_to_mergeable_bpe_ranks(merges, vocabulary)
    with tempfile.TemporaryDirectory() as folder:  # `tokenizers` wants these names
        paths = [
            str(copy(vocabulary, Path(folder, "vocab.json"))),
            str(copy(merges, Path(folder, "merges.txt"))),
        ]
        hugging_face = [tokenizers.ByteLevelBPETokenizer(*paths) for _ in range(s.repeats)]
    special = {END_OF_TEXT: 50256}
    open_ai = [
        tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        for _ in range(s.repeats)
    ]
    encoders = {
        "ours": [gpt2_tokenizer().encode for _ in range(s.repeats)],
        "tokenizers (Rust)": [lambda t, one=one: one.encode(t).ids for one in hugging_face],
        "tiktoken (Rust)": [one.encode_ordinary for one in open_ai],
    }
    size = len(text.encode()) / 1e6
    speed, ids = {}, {}
    for name, fresh in encoders.items():
        times = []
        for encode in fresh:
            started = clock()
            ids[name] = encode(text)
            times.append(clock() - started)
        speed[name] = size / statistics.median(times)
    assert ids["ours"] == ids["tiktoken (Rust)"] == ids["tokenizers (Rust)"], "the three do not agree"
    return [{"encoding": name, "MB/s": mb, "ours / theirs": speed["ours"] / mb} for name, mb in speed.items()]


def main(s: Settings) -> None:
    """Prints both tables."""
    text = fetch("shakespeare").read_text(encoding="utf-8")
    print(
        f"{device_name(torch.device('cpu'))}; {len(text.encode()) / 1e6:.1f} MB of text, {s.vocab_size}"
        f" tokens, median of {s.repeats} runs"
    )
    print("\n" + table(training(text, s)) + "\n\n" + table(encoding(text, s)))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
