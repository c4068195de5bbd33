"""What week 12 measures of a model that is served: from outside, by HTTP, and in the engine."""

import asyncio
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from names import PROGRAMS, label_of_runs, models_in, server_label, servers_in
from own import percentile_of
from prompts import Prompts
from shared import checkpoint
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.devices import device_name
from shared.models.gpt import GPT
from shared.runtime import clock, table
from shared.serving.engine import Engine
from shared.serving.generation import Generation, Request
from shared.serving.load import Load, ask_for_text, client, delays, percentile, served, throughput

if TYPE_CHECKING:
    from run import Settings

CHUNK = 32
"""Tokens of a prompt that the server reads at a time."""
SMALL_CHUNK = 8
"""The same in the picture of the slots."""
WAITS = ("first", "between", "health")
"""What clients wait for: the first token, the next one, /health."""


# ---- the server, from outside


def measure_server(
    run: str, model: GPT, prompts: Prompts, load: Load, work: Workspace, *, options: Sequence[str] = ()
) -> dict[str, float]:
    """Tokens a second by how many texts are asked for at once, delays of a busy server, and the first token
    of prompts that begin alike.

    run: its name (see `server_label`). options: further ones of the server's command line.
    """
    print(f"{server_label(run)}: serving", flush=True)
    rank = percentile_of(work)
    with tempfile.TemporaryDirectory() as folder, work.log(run) as log:
        path = checkpoint.save(model, Path(folder) / "model", model.tokenizer)
        slots = f"--slots={max(load.at_once)}"
        with served(str(path), slots, f"--chunk={CHUNK}", f"--device={work.device}", *options) as url:
            rates = asyncio.run(throughput(url, prompts, load))
            waits = asyncio.run(delays(url, prompts, load))
            fresh, reused = asyncio.run(first_tokens(url, prompts))
        for at_once, values in rates.items():
            median = statistics.median(values)
            log.log(at_once, tokens_per_second=median, lowest=min(values), highest=max(values))
        metrics = throughput_metrics(rates)
        metrics |= {"texts": load.texts, "tokens": load.tokens, "prompt": prompts.settings.prompt_tokens}
        for name in WAITS:
            for q in (0.5, 0.95):
                metrics[f"{name}_p{round(100 * q)}"] = 1000 * rank(getattr(waits, name), q)
        metrics |= {"requests": load.requests, "clients": load.clients, "health_asked": len(waits.health)}
        metrics["fresh"] = 1000 * statistics.median(fresh)
        metrics["reused"] = 1000 * statistics.median(reused)
        metrics["long_prompt"] = len(prompts.pair(0)[0])
        metrics["reuse_ratio"] = metrics["fresh"] / metrics["reused"]
        points = np.linspace(0, 1, 101)
        log.artifact(**{name: [1000 * percentile(getattr(waits, name), q) for q in points] for name in WAITS})
        return log.finish(**metrics)


def throughput_metrics(rates: dict[int, list[float]]) -> dict[str, float]:
    """Tokens a second one text after another and with most at once, and their ratio, turn by turn."""
    one, many = rates[min(rates)], rates[max(rates)]
    ratios = [b / a for a, b in zip(one, many)]
    return {
        "one": statistics.median(one),
        "many": statistics.median(many),
        "at_once": max(rates),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


async def first_tokens(url: str, prompts: Prompts) -> tuple[list[float], list[float]]:
    """Seconds to the first token of long prompts that are all new, and of such whose beginning was read
    before, in turns.
    """
    fresh: list[float] = []
    reused: list[float] = []
    async with client(url) as http:
        await ask_for_text(http, prompts.pair(0)[1], 2)
        for number in range(1, 1 + prompts.settings.shared_prompts):
            new_prompt, known_prompt = prompts.pair(number)
            text = await ask_for_text(http, new_prompt, 2)
            check_reuse(text.reused, expected=False)
            fresh.append(text.times[0])
            text = await ask_for_text(http, known_prompt, 2)
            check_reuse(text.reused, expected=True)
            reused.append(text.times[0])
    return fresh, reused


def check_reuse(tokens: int, expected: bool) -> None:
    """Raises ValueError where a prompt's beginning was reused and should not have been, or the other way."""
    if bool(tokens) != expected:
        raise ValueError(
            f"{tokens} tokens of a prompt were reused, where {'some' if expected else 'none'} should be: the"
            " text repeats itself"
        )


# ---- the engine, from inside


def same_alone(
    name: str, model: GPT, prompts: Prompts, settings: "Settings", work: Workspace
) -> dict[str, float]:
    """How many of eight texts have the same tokens alone as all together, each with settings of its own."""
    mixed = [
        Request(
            prompts.part(40 + i, settings.prompt_tokens - i % 4),
            max(1, settings.new_tokens - 3 * i % 7),
            temperature=0.4 * (i % 3),
            top_p=0.9 if i % 2 else None,
            seed=i,
        )
        for i in range(8)
    ]
    with work.log(f"{name}-alone", settings) as log:
        engine = Engine(model, slots=8, max_length=settings.prompt_tokens + settings.new_tokens)
        try:
            alone = [ids_of(engine.submit(request)) for request in mixed]
            generations = [engine.submit(request) for request in mixed]
            together = [ids_of(generation) for generation in generations]
        finally:
            engine.close()
        same = sum(a == b for a, b in zip(alone, together))
        return log.finish(texts=len(mixed), same=same, tokens=sum(map(len, alone)))


def ids_of(generation: Generation) -> list[int]:
    """A text's tokens; waits for its end."""
    return [token.id for token in generation]


def watch_slots(model: GPT, prompts: Prompts, settings: "Settings", work: Workspace) -> dict[str, float]:
    """Steps an engine by hand through ten requests, with one slot and with four, and notes what each slot
    does when.
    """
    new_tokens = max(2, settings.new_tokens // 2)
    opening = prompts.part(11, 2 * SMALL_CHUNK)
    requests = []
    for i in range(10):
        prompt = prompts.part(60 + i, settings.prompt_tokens - i % 5)
        if i in (4, 7):  # two that begin alike
            prompt = opening + prompt
        requests.append(Request(prompt, 2 + (7 * i + 3) % new_tokens, temperature=0, seed=i))
    with work.log("slots", settings) as log:
        spans, ends = {}, {}
        for slots in (1, 4):
            engine = Engine(model, slots, chunk=SMALL_CHUNK, speculate=False, start=False)
            spans[slots] = list(step_by_step(engine, requests))
            ends[slots] = max(span["end"] for span in spans[slots])
        log.artifact(**{f"spans_{slots}": found for slots, found in spans.items()})
        return log.finish(
            texts=len(requests),
            one_slot=1000 * ends[1],
            four_slots=1000 * ends[4],
            saved=1 - ends[4] / ends[1],
        )


def step_by_step(engine: Engine, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
    """What happened to each text in each step: its number and slot, whether a part of its prompt was read or
    a token written, and when. Closes the engine.
    """
    generations = [engine.submit(request) for request in requests]
    before = [(0, 0)] * len(generations)
    started = clock()
    while True:
        begin = clock() - started
        if not engine.step():
            break
        end = clock() - started
        for number, generation in enumerate(generations):
            now = generation.read, generation.drawn
            for kind, old, new in zip(("read", "written"), before[number], now):
                if new > old:
                    yield {
                        "text": number,
                        "slot": generation.slot,
                        "kind": kind,
                        "begin": begin,
                        "end": end,
                        "reused": generation.reused,
                    }
            before[number] = now
    engine.close()


# ---- tables


def show_served(logs: Path) -> None:
    """Prints the tables of servers and of programs, from the logs."""
    summaries = {name: run.summary for name, run in read_runs(logs).items() if run.summary}
    servers = [server_cells(name, summaries[name]) for name in servers_in(summaries)]
    print(f"\n{table(servers)}\n({device_name(torch.device('cpu'))}, the client on the same cores)")
    programs = [
        program_cells(name, program, summaries[f"{name}-{program}"])
        for name in models_in(summaries, "-pytorch")
        for program in PROGRAMS
        if f"{name}-{program}" in summaries
    ]
    print("\n" + table(programs))


def server_cells(name: str, summary: dict[str, float]) -> dict[str, Any]:
    """The row of a model that was served."""
    return {
        "model": server_label(name),
        "one after another (tokens/s)": summary["one"],
        f"{summary['at_once']} at once": summary["many"],
        "ratio": summary["ratio"],
        "first token p50 / p95 (ms)": f"{summary['first_p50']:.0f} / {summary['first_p95']:.0f}",
        "between p50 / p95": f"{summary['between_p50']:.1f} / {summary['between_p95']:.1f}",
        "/health p95": summary["health_p95"],
        "long prompt, new / reused (ms)": f"{summary['fresh']:.0f} / {summary['reused']:.0f}",
    }


def program_cells(name: str, program: str, summary: dict[str, float]) -> dict[str, Any]:
    """The row of a program with a model."""
    alike = f"{summary['alike']} of {summary['new_tokens']}" if "alike" in summary else ""
    return {
        "model": label_of_runs(name),
        "program": PROGRAMS[program],
        "tokens as ours": alike,
        "MB": summary["megabytes"],
        "decode (tokens/s)": summary["decode_tokens_per_second"],
        "first token (ms)": summary["first_token_ms"],
    }
