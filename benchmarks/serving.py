"""What serving many texts at once is worth: eight at a time beside one after another, in one run, and the delays that a client sees.

    python benchmarks/serving.py --model smollm2
    python benchmarks/serving.py --model smollm2 --quantize int8
    python benchmarks/serving.py --url http://127.0.0.1:8000/v1 --model-name smollm2     # the delays only, of a server that runs already

Without a URL, `python -m shared.serving` is started for it, in a process of its own. Prompts are different beginnings, so that nothing is read
only once. Each text is `tokens` tokens long, whatever the model says: all runs do the same work.
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import torch

from shared.commandline import errors_for_people, parse_args
from shared.runtime import ROOT, clock, device_name, table

WORDS = (
    "the ship sailed north for nine days before anyone on board saw land and when they did it was not the coast that their maps had promised".split()
)


@dataclass(frozen=True)
class Settings:
    """Measures a server."""

    model: str = "smollm2"
    """As for shared.serving."""
    quantize: str | None = None
    url: str | None = None
    """Of a server that runs already, with /v1 at its end."""
    model_name: str | None = None
    """What that one calls its model."""
    at_once: int = 8
    tokens: int = 64
    """Of each text."""
    turns: int = 3
    """Of each way, in turns; the median counts."""
    load: int = 40
    """Requests for the delays, `clients` at a time."""
    clients: int = 8
    prompt: int = 24
    """Words in a prompt."""


@contextmanager
def server(s: Settings) -> Iterator[tuple[str, str]]:
    """A server's address and what it calls its model."""
    if s.url:
        yield s.url, s.model_name or s.model
        return
    command = [sys.executable, "-m", "shared.serving", "--model", s.model, "--name", "measured", "--port", "0", "--slots", str(s.at_once)]
    command += ["--quantize", s.quantize] if s.quantize else []
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            said = ""
            for line in process.stderr:
                said += line
                if found := re.search(r"running on (http://\S+)", line):
                    yield f"{found[1]}/v1", "measured"
                    return
            raise ValueError(f"the server did not start: {said.strip()}")
        finally:
            process.terminate()


@dataclass
class Text:
    """When its parts came, in seconds after it was asked for."""

    times: list[float]
    tokens: int


async def write(http: httpx.AsyncClient, model: str, number: int, s: Settings) -> Text:
    """Asks for one text, and notes when each part of it comes."""
    prompt = " ".join([f"{number}.", *(WORDS[(number * 7 + i) % len(WORDS)] for i in range(s.prompt))])
    body = {"model": model, "prompt": prompt, "max_tokens": s.tokens, "temperature": 0.8, "seed": number, "stream": True, "ignore_eos": True}
    started, times, tokens = clock(), [], 0
    async with http.stream("POST", "/completions", json=body | {"stream_options": {"include_usage": True}}) as answer:
        if answer.status_code != 200:
            raise ValueError(f"the server says {answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                times += [clock() - started] if event["choices"] and event["choices"][0]["text"] else []
                tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
    return Text(times, tokens)


async def rate(http: httpx.AsyncClient, model: str, first: int, at_once: int, s: Settings) -> float:
    """Tokens a second of `s.at_once` texts, `at_once` at a time."""
    started, gate = clock(), asyncio.Semaphore(at_once)

    async def one(number: int) -> int:
        async with gate:
            return (await write(http, model, number, s)).tokens

    tokens = sum(await asyncio.gather(*(one(first + i) for i in range(s.at_once))))
    return tokens / (clock() - started)


def percentile(values: list[float], q: float) -> float:
    """The value that a share `q` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


async def measure(url: str, model: str, s: Settings) -> tuple[dict[str, list[float]], list[Text], list[float]]:
    """Rates of both ways, the texts of the load, and how long /health took meanwhile."""
    key = os.environ.get("LLM_WEEKS_API_KEY")
    async with httpx.AsyncClient(base_url=url, timeout=600, headers={"Authorization": f"Bearer {key}"} if key else {}) as http:
        rates: dict[str, list[float]] = {"one after another": [], f"{s.at_once} at once": []}
        await write(http, model, 0, s)
        for turn in range(s.turns):
            for way, at_once in zip(rates, (1, s.at_once)):
                rates[way].append(await rate(http, model, 1000 * (1 + turn) + 100 * at_once, at_once, s))
        gate, health = asyncio.Semaphore(s.clients), []

        async def one(number: int) -> Text:
            async with gate:
                return await write(http, model, 9000 + number, s)

        load = asyncio.gather(*(one(i) for i in range(s.load)))
        while not load.done():
            started = clock()
            (await http.get(url.removesuffix("/v1") + "/health")).raise_for_status()
            health.append(clock() - started)
            await asyncio.wait([load], timeout=0.05)
        return rates, await load, health


def main(s: Settings) -> None:
    """Prints the rates with their ratio, and the delays."""
    with server(s) as (url, model):
        rates, texts, health = asyncio.run(measure(url, model, s))
    one, many = rates.values()
    ratios = [b / a for a, b in zip(one, many)]
    rows = [{"texts": way, "tokens/s, median": statistics.median(found), "best": max(found)} for way, found in rates.items()]
    print(f"{device_name(torch.device('cpu'))}; {s.at_once} texts of {s.tokens} tokens, {s.turns} turns; prompts of {s.prompt + 1} words")
    print("\n" + table(rows))
    print(f"\nat once / one after another: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    between = [b - a for text in texts for a, b in zip(text.times, text.times[1:])]
    rows = [
        {"ms": name, "p50": 1000 * percentile(values, 0.5), "p95": 1000 * percentile(values, 0.95), "most": 1000 * max(values)}
        for name, values in (("to the first token", [t.times[0] for t in texts if t.times]), ("between tokens", between), ("/health", health))
    ]
    print(f"\n{s.load} requests, {s.clients} clients at a time, {sum(t.tokens for t in texts)} tokens\n\n" + table(rows))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
