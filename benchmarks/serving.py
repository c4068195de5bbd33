"""What serving many texts at once is worth: eight at a time beside one after another, in one run, and the
delays that a client sees.

    python benchmarks/serving.py --model smollm2
    python benchmarks/serving.py --model smollm2 --quantize int8 --group-size 64
    python benchmarks/serving.py --url http://127.0.0.1:8000/v1 --model-name smollm2     # a server that runs already

Without a URL, `python -m shared.serving` is started for it, in a process of its own. Prompts are different
beginnings, so that nothing is read only once.
"""

import asyncio
import statistics
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from shared.commandline import errors_for_people, parse_args
from shared.runtime import device_name, table
from shared.serving.load import NAME, Load, delays, percentile, served, throughput

WORDS = (
    "the ship sailed north for nine days before anyone on board saw land and when they did it was not the"
    " coast that their maps had promised".split()
)


@dataclass(frozen=True)
class Settings:
    """Measures a server."""

    model: str = "smollm2"
    """As for shared.serving."""
    quantize: str | None = None
    group_size: int | None = None
    url: str | None = None
    """Of a server that runs already, with /v1 at its end."""
    model_name: str | None = None
    """What that one calls its model."""
    words: int = 24
    """In a prompt."""
    load: Load = Load()


def main(s: Settings) -> None:
    """Prints the rates with their ratio, and the delays."""
    load, name = s.load, (s.model_name or s.model) if s.url else NAME
    prompts = lambda number: " ".join(
        [f"{number}.", *(WORDS[(number * 7 + i) % len(WORDS)] for i in range(s.words))]
    )
    options = [
        f"--{flag}={value}"
        for flag, value in (("quantize", s.quantize), ("group-size", s.group_size))
        if value
    ]
    with nullcontext(s.url) if s.url else served(s.model, f"--slots={max(load.at_once)}", *options) as url:
        rates = asyncio.run(throughput(url, prompts, load, name))
        found = asyncio.run(delays(url, prompts, load, name))
    print(
        f"{device_name(torch.device('cpu'))}; {load.texts} texts of {load.tokens} tokens, {load.turns} turns;"
        f" prompts of {s.words + 1} words"
    )
    print(
        "\n"
        + table(
            [
                {"at once": n, "tokens/s, median": statistics.median(values), "best": max(values)}
                for n, values in rates.items()
            ]
        )
    )
    ratios = [b / a for a, b in zip(rates[min(rates)], rates[max(rates)])]
    print(
        f"\n{max(rates)} at once / {min(rates)}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to"
        f" {max(ratios):.2f})"
    )
    rows = [
        {
            "ms": name,
            "p50": 1000 * percentile(values, 0.5),
            "p95": 1000 * percentile(values, 0.95),
            "most": 1000 * max(values),
        }
        for name, values in (
            ("to the first token", found.first),
            ("between tokens", found.between),
            ("/health", found.health),
        )
    ]
    print(
        f"\n{load.requests} requests of {load.tokens} tokens, {load.clients} clients at a time\n\n"
        + table(rows)
    )


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
