"""What serving many texts at once is worth: eight at a time beside one after another, in one run, and the
delays that a client sees.

    python benchmarks/serving.py --model smollm2
    python benchmarks/serving.py --model smollm2 --quantize int8 --group-size 64
    python benchmarks/serving.py --url http://127.0.0.1:8000/v1 --model-name smollm2    # it runs already

Without a URL, `python -m shared.serving` is started for it, in a process of its own. Every prompt begins
differently, so that each is read as a whole.
"""

import asyncio
import statistics
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from shared.commandline import errors_for_people, parse_args
from shared.devices import device_name
from shared.models.names import OwnModelName
from shared.runtime import table
from shared.serving.load import NAME, Delays, Load, delays, percentile, served, throughput

WORDS = (
    "the ship sailed north for nine days before anyone on board saw land and when they did it was not the"
    " coast that their maps had promised".split()
)


@dataclass(frozen=True)
class Settings:
    """Measures a server."""

    model: OwnModelName = "smollm2"
    quantize: str | None = None
    group_size: int | None = None
    url: str | None = None
    """Of a server that runs already, with /v1 at its end."""
    model_name: str | None = None
    """What that one calls its model."""
    words: int = 24
    """In a prompt."""
    load: Load = Load()


def server_of(settings: Settings) -> AbstractContextManager[str]:
    """The address of the server that is measured: one that runs already, or a new process."""
    if settings.url:
        return nullcontext(settings.url)
    options = [f"--slots={max(settings.load.at_once)}"]
    if settings.quantize:
        options.append(f"--quantize={settings.quantize}")
    if settings.group_size:
        options.append(f"--group-size={settings.group_size}")
    return served(settings.model, *options)


def print_rates(rates: dict[int, list[float]]) -> None:
    """Tokens a second for each number of texts at once, and their ratio turn by turn."""
    rows = [
        {"at once": number, "tokens/s, median": statistics.median(values), "best": max(values)}
        for number, values in rates.items()
    ]
    print(f"\n{table(rows)}")
    few, many = min(rates), max(rates)
    ratios = [b / a for a, b in zip(rates[few], rates[many])]
    print(
        f"\n{many} at once / {few}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to"
        f" {max(ratios):.2f})"
    )


def print_delays(waits: Delays, load: Load) -> None:
    """Milliseconds that clients wait."""
    kinds = {"to the first token": waits.first, "between tokens": waits.between, "/health": waits.health}
    rows = [
        {
            "ms": name,
            "p50": 1000 * percentile(values, 0.5),
            "p95": 1000 * percentile(values, 0.95),
            "most": 1000 * max(values),
        }
        for name, values in kinds.items()
    ]
    print(f"\n{load.requests} requests of {load.tokens} tokens, {load.clients} clients at a time\n")
    print(table(rows))


def main(settings: Settings) -> None:
    """Prints the rates with their ratio, and the delays."""
    load = settings.load
    model = NAME
    if settings.url:
        model = settings.model_name or settings.model

    def prompt(number: int) -> str:
        words = [WORDS[(number * 7 + i) % len(WORDS)] for i in range(settings.words)]
        return " ".join([f"{number}.", *words])

    with server_of(settings) as url:
        rates = asyncio.run(throughput(url, prompt, load, model))
        waits = asyncio.run(delays(url, prompt, load, model))
    print(
        f"{device_name(torch.device('cpu'))}; {load.texts} texts of {load.tokens} tokens, {load.turns} turns;"
        f" prompts of {settings.words + 1} words"
    )
    print_rates(rates)
    print_delays(waits, load)


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
