"""Week 12. Measures a server from outside, as its clients see it: tokens a second at so many texts at once,
and how long they wait.

    with served("smollm2") as url:                              # a server in a process of its own
        rates = asyncio.run(throughput(url, prompts, Load()))   # tokens/s: {1: [22.1, ...], 8: [81.5, ...]}
        waits = asyncio.run(delays(url, prompts, Load()))

Each text is `tokens` tokens long, whatever the model says, so every way of asking does the same work. The
ways take turns, so that a slow minute of the machine does not affect only one of them. The client shares the
server's machine: on two cores it costs part of what is measured.
"""

import asyncio
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shared.checks import Checks
from shared.extras import needs
from shared.runtime import ROOT, clock

with needs("serve"):
    import httpx

NAME = "measured"
"""What a server of `served` calls its model."""
Prompts = Callable[[int], str | list[int]]
"""A prompt for each number, all of them different: what prompts have in common is read only once."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server. Raises ValueError for counts that are not above 0."""

    tokens: int = 64
    """Of each text."""
    texts: int = 8
    """How many make one measurement of throughput."""
    at_once: tuple[int, ...] = (1, 8)
    """The numbers of simultaneous texts to compare."""
    turns: int = 3
    """Measurements of each of these."""
    requests: int = 40
    """For the delays."""
    clients: int = 8
    """At a time, for the delays."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "tokens", "texts", "turns", "requests", "clients")
        for number in self.at_once:
            checks.require(number >= 1, f"at_once of {number}={number}: must be at least 1")
        checks.finish()


@dataclass(frozen=True)
class TimedText:
    """When the parts of a text came, in seconds after it was asked for."""

    times: tuple[float, ...]
    tokens: int
    reused: int
    """Tokens of its prompt that the server had read before."""


@dataclass(frozen=True)
class Delays:
    """Seconds, as several simultaneous clients have seen them."""

    first: list[float]
    """From asking to the first part of a text."""
    between: list[float]
    """Between two parts of a text."""
    health: list[float]
    """How long /health took meanwhile."""


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """Runs `python -m shared.serving` with a model and more options until the block ends.

    Yields the server's address, with /v1 at the end. Raises ValueError with what the server said where it
    does not start.
    """
    command = [sys.executable, "-m", "shared.serving", "--model", model, "--name", NAME, "--port", "0"]
    paths = [path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path]
    with subprocess.Popen(
        [*command, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            output = ""
            for line in process.stderr or ():
                output += line
                if match := re.search(r"running on (http://\S+)", line):
                    yield f"{match[1]}/v1"
                    return
            raise ValueError(f"the server did not start: {output.strip()}")
        finally:
            process.terminate()
            process.communicate()


def client(url: str) -> httpx.AsyncClient:
    """A client of the server at `url`, with the key that LLM_WEEKS_API_KEY holds, if it does.

    Each request has a connection of its own, as those of different people have.
    """
    key = os.environ.get("LLM_WEEKS_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # llama.cpp's server closes connections that a next request has been sent on already.
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=600, headers=headers, limits=limits)


async def ask_for_text(
    http: httpx.AsyncClient, prompt: str | list[int], tokens: int, seed: int = 0, model: str = NAME
) -> TimedText:
    """Asks for one text of so many tokens, streamed.

    Raises ValueError with what the server says where it refuses.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = clock()
    times: list[float] = []
    usage: dict[str, Any] = {}
    async with http.stream("POST", "/completions", json=body) as answer:
        if answer.status_code != 200:
            raise ValueError(f"the server says {answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if event["choices"] and event["choices"][0]["text"]:
                    times.append(clock() - started)
                usage = event.get("usage") or usage
    if not usage:
        raise ValueError("the server broke off a text: its log says why")
    return TimedText(
        tuple(times), usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    )


async def ask_for_texts(
    http: httpx.AsyncClient, prompts: Prompts, numbers: range, *, tokens: int, at_once: int, model: str
) -> list[TimedText]:
    """Asks for a text of so many tokens to each prompt of these numbers, `at_once` of them at any moment."""
    semaphore = asyncio.Semaphore(at_once)

    async def ask_one(number: int) -> TimedText:
        async with semaphore:
            return await ask_for_text(http, prompts(number), tokens, number, model)

    return await asyncio.gather(*(ask_one(number) for number in numbers))


async def rate_of(
    http: httpx.AsyncClient, prompts: Prompts, numbers: range, *, tokens: int, at_once: int, model: str
) -> float:
    """Tokens a second, all texts together, of what `ask_for_texts` asks for."""
    started = clock()
    texts = await ask_for_texts(http, prompts, numbers, tokens=tokens, at_once=at_once, model=model)
    return sum(text.tokens for text in texts) / (clock() - started)


async def throughput(url: str, prompts: Prompts, load: Load, model: str = NAME) -> dict[int, list[float]]:
    """Tokens a second of `load.texts` texts, for each number of them at once, turn by turn."""
    rates: dict[int, list[float]] = {number: [] for number in load.at_once}
    async with client(url) as http:
        # The first matrix products of a process are slow.
        warm_up = range(load.clients)
        await ask_for_texts(http, prompts, warm_up, tokens=8, at_once=load.clients, model=model)
        first = load.clients
        for _ in range(load.turns):
            for at_once in load.at_once:
                numbers = range(first, first + load.texts)
                first += load.texts
                rate = await rate_of(http, prompts, numbers, tokens=load.tokens, at_once=at_once, model=model)
                rates[at_once].append(rate)
    return rates


async def delays(url: str, prompts: Prompts, load: Load, model: str = NAME) -> Delays:
    """What the clients of `load.requests` texts wait for, and how long /health takes meanwhile."""
    numbers = range(100_000, 100_000 + load.requests)  # other prompts than those of `throughput`
    health: list[float] = []
    async with client(url) as http:
        work = asyncio.create_task(
            ask_for_texts(http, prompts, numbers, tokens=load.tokens, at_once=load.clients, model=model)
        )
        while not work.done():
            started = clock()
            (await http.get(url.removesuffix("/v1") + "/health")).raise_for_status()
            health.append(clock() - started)
            await asyncio.wait([work], timeout=0.05)
        texts = await work
    first = [text.times[0] for text in texts if text.times]
    between = [later - earlier for text in texts for earlier, later in zip(text.times, text.times[1:])]
    return Delays(first, between, health)


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest of the values that at least a share `q` of all do not exceed (the nearest rank).

    >>> percentile([3, 1, 2, 4], 0.5), percentile([3, 1, 2, 4], 0.95)
    (2, 4)
    """
    return sorted(values)[max(1, math.ceil(q * len(values))) - 1]
