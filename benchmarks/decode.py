"""How fast one text is written and a prompt is read: our library beside llama.cpp and transformers with the
same weights, and beside what the memory allows.

    python benchmarks/decode.py                                 # SmolLM2 in fp32, int8 and int4
    python benchmarks/decode.py --busy --log decode.jsonl       # also while another process keeps a core busy
    python benchmarks/decode.py --model checkpoints/my-model --schemes fp32

Contenders are processes of their own that take turns: never do two compute at once. Decoding is greedy, after
a prompt of 16 tokens, and timed from the first token to the last. Figures are median, lowest and highest of
the turns, ratios those within a turn. No token comes faster than all weights are read: the limit is the
bandwidth of reading a large array over the bytes of the packed weights, keys and values left aside.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from contenders import (
    GROUP_SIZES,
    KINDS,
    SAME_WEIGHTS,
    WORDS,
    IdleWatch,
    Worker,
    append_line,
    busy_core,
    count_alike,
    gguf_bytes,
    ratios,
    spread,
    write_gguf,
)
from shared.checks import Checks
from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name
from shared.models.gpt import GPT
from shared.models.names import OwnModelName
from shared.models.pretrained import load_model, to_hf
from shared.quantization.race import SHORT_PROMPT, Contender, speed_of
from shared.runtime import commit, plain, table
from shared.serving.llama_cpp import LlamaCpp
from shared.tokenizers.base import tokenizer_of
from shared.training.own_model import name_and_source


@dataclass(frozen=True)
class Settings:
    """Measures how fast a model writes and reads."""

    model: OwnModelName = "smollm2"
    schemes: tuple[Literal["fp32", "int8", "int4"], ...] = ("fp32", "int8", "int4")
    """Of ours: int8 in groups of 64 weights, int4 of 32. llama.cpp's types of as many bits go with them, and
    transformers with fp32.
    """
    turns: int = 5
    tokens: int = 64
    """Written in a turn."""
    prompt: int = 256
    """Tokens read in a turn."""
    busy: bool = False
    """Measure each turn a second time, while another process keeps one core busy."""
    threads: int | None = None
    """Cores that compute; none: as many as PyTorch takes."""
    cache: Literal["F16", "F32"] = "F16"
    """llama.cpp's keys and values: F16 is its default, ours are in fp32."""
    array: int = 10**9
    """Bytes of the array whose reading tells the bandwidth."""
    log: Path | None = None
    """A file to which all that is measured is added, in lines of JSON."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "turns", "threads")
        checks.at_least(2, "tokens")
        checks.at_least(SHORT_PROMPT, "prompt")
        checks.at_least(10**6, "array")
        checks.finish()


@dataclass(frozen=True)
class Entry:
    """A contender."""

    process: Worker | LlamaCpp
    bytes: int
    """Of the weights that are read for a token."""
    about: str
    """How it computes."""
    like: str | None = None
    """The contender of ours with the same weights, if there is one."""
    alike: int | None = None
    """With how many equal tokens its text and that one's begin."""


# ---- the contenders


def start_all(
    model: GPT, source: str, settings: Settings, folder: Path, at_the_end: ExitStack
) -> dict[str, Entry]:
    """All contenders by name, started one after the other.

    model: in fp32. source: what `load_model` takes for it. folder: for their files. at_the_end: ends the
    processes.
    """
    threads = torch.get_num_threads()
    entries = {}

    def start(program: str, **options: Any) -> Worker:
        worker = Worker(program, threads, **options)
        at_the_end.callback(worker.close)
        return worker

    for scheme in settings.schemes:
        rounding = {"scheme": scheme, "group_size": GROUP_SIZES[scheme]} if scheme != "fp32" else {}
        ours = start("library", model=source, **rounding)
        entries[f"ours {scheme}"] = Entry(ours, ours.bytes, ours.about)
        if scheme == "fp32":
            theirs = start("transformers", model=str(to_hf(model, folder / "hf")))
            entries["transformers fp32"] = Entry(theirs, theirs.bytes, theirs.about, "ours fp32")
        for kind in KINDS[scheme]:
            path = write_gguf(model, kind, folder)
            length = settings.prompt + settings.tokens
            server = LlamaCpp(path, length, threads=threads, half_cache=settings.cache == "F16")
            at_the_end.callback(server.close)
            like = f"ours {scheme}" if kind in SAME_WEIGHTS else None
            entries[f"llama.cpp {kind}"] = Entry(server, gguf_bytes(path), server.system, like)
    return entries


def check_texts(entries: dict[str, Entry], prompt: list[int], tokens: int) -> dict[str, Entry]:
    """The entries, each with the number of tokens that its greedy text has in common with ours of the same
    weights, from the first one on.

    Raises ValueError where that is not all of them in fp32, or none in another scheme, whose products are
    rounded in different ways.
    """
    texts = {name: entry.process.tokens(prompt, tokens) for name, entry in entries.items()}
    checked = dict(entries)
    for name, entry in entries.items():
        if entry.like is None:
            continue
        alike = count_alike(texts[entry.like], texts[name])
        wanted = tokens if entry.like == "ours fp32" else 1
        if alike < wanted:
            raise ValueError(
                f"{name} and {entry.like} have the same weights, and of {tokens} tokens they write only the"
                f" first {alike} alike, not {wanted}: {texts[name]} and {texts[entry.like]}. Their speeds"
                " are not comparable before that is understood"
            )
        checked[name] = replace(entry, alike=alike)
    return checked


def pairs_of(entries: dict[str, Entry], schemes: Sequence[str]) -> list[tuple[str, str]]:
    """Each of ours with each other of as many bits."""
    pairs = []
    for scheme in schemes:
        others = [*(f"llama.cpp {kind}" for kind in KINDS[scheme]), f"transformers {scheme}"]
        pairs += [(f"ours {scheme}", other) for other in others if other in entries]
    return pairs


# ---- measuring


class Measured:
    """What was measured of each contender in each turn: of the quiet machine, and with a core busy."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def values(self, name: str, field: str, busy: bool = False) -> list[float]:
        """A field of a contender, turn by turn."""
        return [row[field] for row in self.rows if row["contender"] == name and row["busy"] == busy]

    def pair(self, names: tuple[str, str], field: str, busy: bool = False) -> str:
        """One contender's over another's."""
        ours, theirs = (self.values(name, field, busy) for name in names)
        return spread(ratios(ours, theirs))

    def of_quiet(self, name: str, field: str) -> str:
        """With a core busy over without."""
        return spread(ratios(self.values(name, field, True), self.values(name, field, False)))


def times_of(process: Worker | LlamaCpp, prompt: list[int], new_tokens: int) -> list[float]:
    """As `Contender.times`."""
    return process.times(prompt, new_tokens)


def measure(
    entries: dict[str, Entry], memory: Worker, prompt: list[int], settings: Settings
) -> tuple[Measured, IdleWatch]:
    """Lets the contenders take turns."""
    measured, idle = Measured(), IdleWatch()
    for turn in range(settings.turns):
        for busy in (False, True) if settings.busy else (False,):
            with busy_core(busy):
                bandwidth = memory.ask("bandwidth")
                for name, entry in entries.items():
                    with idle.turn(name, entry.process.process):
                        speed = speed_of(Contender(entry.process, times_of), prompt, settings.tokens)
                    limit = bandwidth / entry.bytes
                    row = {
                        "contender": name,
                        "turn": turn,
                        "busy": busy,
                        "decode": speed.decode_tokens_per_second,
                        "prefill": speed.prefill_tokens_per_second,
                        "limit": limit,
                        "share_of_limit": speed.decode_tokens_per_second / limit,
                    }
                    measured.rows.append(row)
                    append_line(settings.log, row)
    return measured, idle


# ---- tables


def speed_rows(measured: Measured, entries: dict[str, Entry]) -> list[dict[str, Any]]:
    """Tokens a second of the quiet machine, and what share they are of the limit."""
    return [
        {
            "contender": name,
            "MB": entry.bytes / 1e6,
            "decode, tokens/s": spread(measured.values(name, "decode")),
            "limit": statistics.median(measured.values(name, "limit")),
            "share of it": spread(measured.values(name, "share_of_limit")),
            "prefill, tokens/s": spread(measured.values(name, "prefill")),
            "tokens as ours": entry.alike,
        }
        for name, entry in entries.items()
    ]


def busy_rows(measured: Measured, entries: dict[str, Entry]) -> list[dict[str, Any]]:
    """Tokens a second with a core busy, and what is left of the quiet machine's."""
    return [
        {
            "with a core busy": name,
            "decode, tokens/s": spread(measured.values(name, "decode", True)),
            "decode / quiet": measured.of_quiet(name, "decode"),
            "prefill, tokens/s": spread(measured.values(name, "prefill", True)),
            "prefill / quiet": measured.of_quiet(name, "prefill"),
        }
        for name in entries
    ]


def ratio_rows(measured: Measured, pairs: Sequence[tuple[str, str]], busy: bool) -> list[dict[str, Any]]:
    """Our speed over others'."""
    rows = []
    for pair in pairs:
        row = {"ratio": " / ".join(pair)}
        for field in ("decode", "prefill"):
            row[field] = measured.pair(pair, field)
            if busy:
                row[f"{field}, a core busy"] = measured.pair(pair, field, True)
        rows.append(row)
    return rows


def print_head(entries: dict[str, Entry], settings: Settings) -> None:
    """What is measured; the log has it too."""
    device = device_name(torch.device("cpu"))
    how = {name: entry.about for name, entry in entries.items()}
    head = {"benchmark": "decode", "settings": plain(settings), "device": device, "commit": commit()}
    head |= {"how": how, "bytes": {name: entry.bytes for name, entry in entries.items()}}
    head["tokens_as_ours"] = {name: entry.alike for name, entry in entries.items() if entry.like}
    append_line(settings.log, head)
    print(
        f"{device}; {settings.tokens} tokens written, {settings.prompt} read, {settings.turns} turns: median"
        " (lowest to highest)"
    )
    for about in dict.fromkeys(how.values()):
        print(f"  {', '.join(name for name in how if how[name] == about)}: {about}")


def main(settings: Settings) -> None:
    """Measures, and prints the tables."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    name, source = name_and_source(settings.model)
    model = load_model(source, "cpu", torch.float32)
    if max(settings.prompt, SHORT_PROMPT) + settings.tokens > model.config.block_size:
        raise ValueError(
            f"{name} has room for {model.config.block_size} tokens: take a smaller --prompt or --tokens"
        )
    words = " ".join(WORDS * settings.prompt)  # a word is a token or more
    prompt = tokenizer_of(model).encode(words)[: settings.prompt]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as at_the_end:
        entries = start_all(model, source, settings, Path(folder), at_the_end)
        del model
        memory = Worker("memory", torch.get_num_threads(), size=settings.array)
        at_the_end.callback(memory.close)
        entries = check_texts(entries, prompt[:SHORT_PROMPT], settings.tokens)
        print_head(entries, settings)
        for entry in entries.values():
            entry.process.times(prompt, 1)  # the first time is slow
        measured, idle = measure(entries, memory, prompt, settings)
    tables = [
        speed_rows(measured, entries),
        ratio_rows(measured, pairs_of(entries, settings.schemes), settings.busy),
    ]
    if settings.busy:
        tables.append(busy_rows(measured, entries))
    for rows in tables:
        print(f"\n{table(rows)}")
    if idle.most:
        name = max(idle.most, key=idle.most.__getitem__)
        print(f"\nbetween its turns, none used more than {idle.most[name]:.1%} of a core ({name})")
    append_line(settings.log, {"share_of_a_core_between_turns": idle.most})


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
