"""Week 8. Whose model reads and writes fastest: contenders that take turns on one machine, ours and other
libraries'.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shared.models.gpt import GPT
from shared.runtime import clock
from shared.sampling.generate import generate

SHORT_PROMPT = 16
"""Tokens of the prompt after which decoding is timed."""


class Contender(NamedTuple):
    """Who takes part in the race."""

    model: nn.Module
    times: Callable[[nn.Module, list[int], int], list[float]]
    """The moments at which generation began and at which each token came."""


def our_times(model: GPT, prompt: list[int], new_tokens: int) -> list[float]:
    """Of `shared.sampling.generate`."""
    times = [clock()]
    for _ in generate(model, prompt, new_tokens, temperature=0):
        times.append(clock())
    return times


class Stopwatch:
    """When each token came: what transformers calls a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        self.times.append(clock())

    def end(self) -> None:
        pass


def their_times(model: nn.Module, prompt: list[int], new_tokens: int) -> list[float]:
    """Of transformers' own `generate`, whose streamer is given the prompt first."""
    watch, started = Stopwatch(), clock()
    ids = torch.tensor([prompt])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=watch,
        pad_token_id=0,
    )
    return [started, *watch.times[1:]]


def race(
    contenders: Mapping[str, Contender], prompt: list[int], new_tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of prefill and decode, and milliseconds to the first token, of each: the median of
    several rounds.

    new_tokens: written after a prompt of SHORT_PROMPT tokens to time the decoding; the prefill is of the
    whole `prompt`. Contenders take turns, so that a slow minute of the machine does not meet one of them
    alone. The first round warms up.
    """
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    short = prompt[:SHORT_PROMPT]
    for number in range(rounds + 1):
        for name, (model, times, *_) in contenders.items():
            whole = times(model, prompt, 1)
            written = times(model, short, new_tokens if number else 2)
            if number:
                first = written[1] - written[0]
                measured[name].append(
                    (
                        len(prompt) / (whole[1] - whole[0]),
                        1000 * first,
                        (len(written) - 2) / (written[-1] - written[1]),
                    )
                )
    keys = ("prefill_tokens_per_second", "first_token_ms", "decode_tokens_per_second")
    return {
        name: {key: statistics.median(values) for key, values in zip(keys, zip(*each))}
        for name, each in measured.items()
    }
