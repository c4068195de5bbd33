"""Week 12. Measures a server from outside, as its clients see it: tokens a second at so many texts at once,
and how long they wait.

    with served("smollm2") as url:                                # a server in a process of its own
        rates = asyncio.run(throughput(url, prompts, Load()))     # {1: [22.1, ...], 8: [81.5, ...]} tokens a second
        waits = asyncio.run(delays(url, prompts, Load()))

Each text is `tokens` tokens long, whatever the model says, so all ways do the same work; they take turns, so
that a slow minute of the machine does not meet one of them alone. The client shares the server's machine: on
two cores it costs part of what is measured.
"""

import asyncio
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from shared.runtime import ROOT, clock

NAME = "measured"
"""What a server of `served` calls its model."""
Prompts = Callable[[int], str | list[int]]
"""A prompt for each number, different ones: what is the same is read only once."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server. Raises ValueError for counts that are not above 0."""

    tokens: int = 64
    """Of each text."""
    texts: int = 8
    """So many make a measurement of throughput."""
    at_once: tuple[int, ...] = (1, 8)
    """So many of them at a time."""
    turns: int = 3
    """Of each way."""
    requests: int = 40
    """For the delays."""
    clients: int = 8
    """At a time, for the delays."""

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if name != "at_once"} | {
            f"at_once of {n}": n for n in self.at_once
        }
        problems = [f"{name}={value}: must be at least 1" for name, value in counts.items() if value < 1]
        if problems:
            raise ValueError("Load: " + "; ".join(problems))


@dataclass(frozen=True)
class Text:
    """When the parts of a text came, in seconds after it was asked for."""

    times: tuple[float, ...]
    tokens: int
    reused: int
    """Tokens of its prompt that the server had read before."""


@dataclass(frozen=True)
class Delays:
    """Seconds, as many clients at once have seen them."""

    first: list[float]
    """From asking to the first part of a text."""
    between: list[float]
    """Between two parts of a text."""
    health: list[float]
    """How long /health took meanwhile."""


@contextmanager
def served(model: str, *options: str) -> Iterator[str]:
    """`python -m shared.serving` with a model and more options, until the block ends: its address, with /v1
    at the end.

    Raises ValueError with what the server said where it does not start.
    """
    command = [
        sys.executable,
        "-m",
        "shared.serving",
        "--model",
        model,
        "--name",
        NAME,
        "--port",
        "0",
        *options,
    ]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            said = ""
            for line in process.stderr:
                said += line
                if found := re.search(r"running on (http://\S+)", line):
                    yield f"{found[1]}/v1"
                    return
            raise ValueError(f"the server did not start: {said.strip()}")
        finally:
            process.terminate()
            process.communicate()


def client(url: str) -> httpx.AsyncClient:
    """A client of the server at `url`, with the key that LLM_WEEKS_API_KEY holds, if it does."""
    key = os.environ.get("LLM_WEEKS_API_KEY")
    return httpx.AsyncClient(
        base_url=url, timeout=600, headers={"Authorization": f"Bearer {key}"} if key else {}
    )


async def write(
    http: httpx.AsyncClient, prompt: str | list[int], tokens: int, seed: int = 0, model: str = NAME
) -> Text:
    """Asks for one text of so many tokens, streamed. Raises ValueError with what the server says where it
    refuses.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": seed,
        "stream": True,
        "ignore_eos": True,
    }
    started, times, usage = clock(), [], {}
    async with http.stream(
        "POST", "/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as answer:
        if answer.status_code != 200:
            raise ValueError(f"the server says {answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event["choices"] and event["choices"][0]["text"]:
                    times.append(clock() - started)
                usage = event.get("usage") or usage
    if not usage:
        raise ValueError("the server broke off a text: its log says why")
    return Text(tuple(times), usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


async def at_a_time(number: int, jobs: Sequence[Callable[[], Awaitable[Text]]]) -> list[Text]:
    """Runs all jobs, `number` of them at any moment."""
    gate = asyncio.Semaphore(number)

    async def one(job: Callable[[], Awaitable[Text]]) -> Text:
        async with gate:
            return await job()

    return await asyncio.gather(*map(one, jobs))


def _jobs(
    http: httpx.AsyncClient, prompts: Prompts, first: int, count: int, tokens: int, model: str
) -> list[Callable[[], Awaitable[Text]]]:
    return [lambda i=i: write(http, prompts(i), tokens, i, model) for i in range(first, first + count)]


async def throughput(url: str, prompts: Prompts, load: Load, model: str = NAME) -> dict[int, list[float]]:
    """Tokens a second of `load.texts` texts, for each number of them at once, turn by turn."""
    rates: dict[int, list[float]] = {number: [] for number in load.at_once}
    async with client(url) as http:
        await at_a_time(
            load.clients, _jobs(http, prompts, 0, load.clients, 8, model)
        )  # the first products of a process are slow
        number = load.clients
        for _ in range(load.turns):
            for at_once, found in rates.items():
                started = clock()
                texts = await at_a_time(at_once, _jobs(http, prompts, number, load.texts, load.tokens, model))
                found.append(sum(text.tokens for text in texts) / (clock() - started))
                number += load.texts
    return rates


async def delays(url: str, prompts: Prompts, load: Load, model: str = NAME) -> Delays:
    """What the clients of `load.requests` texts wait for, and /health beside them."""
    health: list[float] = []
    async with client(url) as http:
        work = asyncio.gather(
            at_a_time(load.clients, _jobs(http, prompts, 100_000, load.requests, load.tokens, model))
        )
        while not work.done():
            started = clock()
            (await http.get(url.removesuffix("/v1") + "/health")).raise_for_status()
            health.append(clock() - started)
            await asyncio.wait([work], timeout=0.05)
        texts = (await work)[0]
    between = [b - a for text in texts for a, b in zip(text.times, text.times[1:])]
    return Delays([text.times[0] for text in texts if text.times], between, health)


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest of the values that at least a share `q` of all do not exceed (the nearest rank).

    >>> percentile([3, 1, 2, 4], 0.5), percentile([3, 1, 2, 4], 0.95)
    (2, 4)
    """
    return sorted(values)[max(1, math.ceil(q * len(values))) - 1]
