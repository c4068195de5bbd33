"""What serving many texts at once is worth: eight at a time beside one after another, beside the library
without a server, and beside llama.cpp's server; and the delays that a client sees.

    python benchmarks/serving.py --model smollm2 --llama-cpp F32
    python benchmarks/serving.py --model smollm2 --quantize int8 --group-size 64 --llama-cpp Q8_0
    python benchmarks/serving.py --url http://127.0.0.1:8000/v1 --model-name smollm2    # it runs already

Without a URL, `python -m shared.serving` is started for it, in a process of its own. All take turns with the
same prompts, and ratios are those within a turn. Every prompt begins differently, so that each is read as a
whole. Servers are told a temperature of 0.8, and draw by their own defaults else. In the library, one text
after another is `generate`, and several at once are `generate_batch`, whose texts may end early.
"""

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from contenders import WORDS, Worker, append_line, ratios, spread, write_gguf
from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name
from shared.models.names import OwnModelName
from shared.models.pretrained import load_model
from shared.runtime import commit, plain, table
from shared.serving.llama_cpp import LlamaCpp
from shared.serving.load import NAME, Delays, Load, client, delays, percentile, rate_of, served
from shared.training.own_model import name_and_source

OURS = "ours"
LIBRARY = "library"


@dataclass(frozen=True)
class Settings:
    """Measures a server."""

    model: OwnModelName = "smollm2"
    quantize: Literal["int8", "int4", "nf4"] | None = None
    group_size: int | None = None
    llama_cpp: tuple[Literal["F32", "Q8_0", "Q4_0", "Q4_1"], ...] = ()
    """Types of weights in which llama.cpp's server has the model too."""
    url: str | None = None
    """Of a server that runs already, with /v1 at its end: it is measured alone."""
    model_name: str | None = None
    """What that one calls its model."""
    words: int = 24
    """In a prompt."""
    threads: int | None = None
    """Cores that compute; none: as many as each takes by itself, and llama.cpp as many as PyTorch."""
    load: Load = Load()
    log: Path | None = None
    """A file to which all that is measured is added, in lines of JSON."""

    def __post_init__(self) -> None:
        if self.url and self.llama_cpp:
            raise ValueError("--url measures that server alone: leave it out to compare with --llama-cpp")

    def prompt(self, number: int) -> str:
        """Each number has another."""
        words = [WORDS[(number * 7 + i) % len(WORDS)] for i in range(self.words)]
        return " ".join([f"{number}.", *words])


# ---- who is measured


class Measurable(Protocol):
    """A contender."""

    def rate(self, numbers: range, tokens: int, at_once: int) -> float:
        """Tokens a second, of so many of each text, with the prompts of these numbers."""
        ...


@dataclass(frozen=True)
class Server:
    """A server with OpenAI's API."""

    settings: Settings
    url: str
    model: str
    """What it calls its model."""

    def rate(self, numbers: range, tokens: int, at_once: int) -> float:
        """As a client sees it."""
        return asyncio.run(self._rate(numbers, tokens, at_once))

    async def _rate(self, numbers: range, tokens: int, at_once: int) -> float:
        async with client(self.url) as http:
            return await rate_of(
                http, self.settings.prompt, numbers, tokens=tokens, at_once=at_once, model=self.model
            )

    def delays(self) -> Delays:
        """What its clients wait for."""
        return asyncio.run(delays(self.url, self.settings.prompt, self.settings.load, self.model))


@dataclass(frozen=True)
class InLibrary:
    """Our library without a server."""

    settings: Settings
    worker: Worker

    def rate(self, numbers: range, tokens: int, at_once: int) -> float:
        """By `generate`, or several at once by `generate_batch`."""
        prompts = [self.settings.prompt(number) for number in numbers]
        return self.worker.ask("rate", prompts=prompts, new_tokens=tokens, at_once=at_once)


def start_all(settings: Settings, folder: Path, at_the_end: ExitStack) -> dict[str, Measurable]:
    """Who is measured, by name. folder: for llama.cpp's files. at_the_end: ends the processes."""
    if settings.url:
        return {OURS: Server(settings, settings.url, settings.model_name or settings.model)}
    _, source = name_and_source(settings.model)
    slots = max(settings.load.at_once)
    options = {
        "slots": slots,
        "quantize": settings.quantize,
        "group-size": settings.group_size,
        "threads": settings.threads,
    }
    flags = [f"--{option}={value}" for option, value in options.items() if value is not None]
    url = at_the_end.enter_context(served(source, *flags))
    threads = settings.threads or torch.get_num_threads()
    library = Worker(
        "library", threads, model=source, scheme=settings.quantize, group_size=settings.group_size
    )
    at_the_end.callback(library.close)
    found: dict[str, Measurable] = {
        OURS: Server(settings, url, NAME),
        LIBRARY: InLibrary(settings, library),
    }
    if settings.llama_cpp:
        model = load_model(source, "cpu", torch.float32)
        # As many characters as a prompt has are more tokens than it has.
        length = min(model.config.block_size, len(settings.prompt(10**6)) + settings.load.tokens)
        for kind in settings.llama_cpp:
            path = write_gguf(model, kind, folder)
            server = LlamaCpp(path, length, threads=threads, slots=slots, half_cache=True)
            at_the_end.callback(server.close)
            found[f"llama.cpp {kind}"] = Server(settings, server.url, kind)
    return found


# ---- measuring

Rates = dict[str, dict[int, list[float]]]
"""Tokens a second by contender and by how many texts at once, turn by turn."""


def measure_rates(contenders: Mapping[str, Measurable], settings: Settings) -> Rates:
    """Lets the contenders take turns, each with the same prompts."""
    load = settings.load
    rates: Rates = {name: {at_once: [] for at_once in load.at_once} for name in contenders}
    first = load.clients
    for contender in contenders.values():  # the first matrix products of a process are slow
        contender.rate(range(first), 8, load.clients)
    for turn in range(load.turns):
        for at_once in load.at_once:
            numbers = range(first, first + load.texts)
            first += load.texts
            for name, contender in contenders.items():
                rate = contender.rate(numbers, load.tokens, at_once)
                rates[name][at_once].append(rate)
                row = {"contender": name, "turn": turn, "at_once": at_once, "tokens_per_second": rate}
                append_line(settings.log, row)
    return rates


# ---- tables


def print_rates(rates: Rates) -> None:
    """Tokens a second, and what serving many at once gains over one after another."""
    numbers = list(rates[OURS])
    few, many = min(numbers), max(numbers)
    rows = []
    for name, values in rates.items():
        row = {"tokens/s": name} | {f"{number} at once": spread(values[number]) for number in numbers}
        row[f"{many} at once / {few}"] = spread(ratios(values[many], values[few]))
        rows.append(row)
    print(f"\n{table(rows)}")


def print_ratios(rates: Rates) -> None:
    """Our server over the others, and with many at once over the library with one after another."""
    rows = []
    for name, values in rates.items():
        if name != OURS:
            row = {"ratio": f"{OURS} / {name}"}
            for number, theirs in values.items():
                row[f"{number} at once"] = spread(ratios(rates[OURS][number], theirs))
            rows.append(row)
    if rows:
        print(f"\n{table(rows)}")
    if LIBRARY in rates:
        few, many = min(rates[OURS]), max(rates[OURS])
        gain = spread(ratios(rates[OURS][many], rates[LIBRARY][few]))
        print(f"\n{OURS}, {many} at once / {LIBRARY}, {few} at once: {gain}")


def print_delays(contenders: Mapping[str, Measurable], settings: Settings) -> None:
    """Milliseconds that the servers' clients wait; measures one server after the other."""
    rows = []
    for name, contender in contenders.items():
        if not isinstance(contender, Server):
            continue
        waits = contender.delays()
        kinds = {"to the first token": waits.first, "between tokens": waits.between, "/health": waits.health}
        for kind, seconds in kinds.items():
            row = {
                "contender": name,
                "ms": kind,
                "p50": 1000 * percentile(seconds, 0.5),
                "p95": 1000 * percentile(seconds, 0.95),
                "most": 1000 * max(seconds),
            }
            rows.append(row)
            append_line(settings.log, row)
    load = settings.load
    print(f"\n{load.requests} requests of {load.tokens} tokens, {load.clients} clients at a time\n")
    print(table(rows))


def main(settings: Settings) -> None:
    """Prints the rates with their ratios, and the delays."""
    load = settings.load
    device = device_name(torch.device("cpu"))
    head = {"benchmark": "serving", "settings": plain(settings), "device": device, "commit": commit()}
    append_line(settings.log, head)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as at_the_end:
        contenders = start_all(settings, Path(folder), at_the_end)
        print(
            f"{device}; {load.texts} texts of {load.tokens} tokens, {load.turns} turns, median (lowest to"
            f" highest); prompts of {settings.words + 1} words"
        )
        rates = measure_rates(contenders, settings)
        print_rates(rates)
        print_ratios(rates)
        print_delays(contenders, settings)


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
