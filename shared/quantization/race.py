"""Week 8. How fast models read and write: contenders, ours and others', that take turns on one machine.

contenders = {"ours": Contender(model, our_times), "theirs": Contender(other, their_times)}
race(contenders, prompt, new_tokens=64, rounds=5)["ours"]["decode_tokens_per_second"]
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from shared.models.gpt import GPT
from shared.runtime import clock
from shared.sampling.generate import generate

SHORT_PROMPT = 16
"""Tokens of the prompt after which decoding is timed."""

Model = TypeVar("Model")


@dataclass(frozen=True)
class Contender(Generic[Model]):
    """One who takes part in the race."""

    model: Model
    """Whatever `times` takes."""
    times: Callable[[Model, list[int], int], list[float]]
    """times(model, prompt, new_tokens): the moments, in seconds, at which generation began and at which each
    new token came, new_tokens + 1 of them.
    """


def our_times(model: GPT, prompt: list[int], new_tokens: int) -> list[float]:
    """A contender's times by `shared.sampling.generate`."""
    times = [clock()]
    for _ in generate(model, prompt, new_tokens, temperature=0):
        times.append(clock())
    return times


class Stopwatch:
    """Notes when each token came: what transformers calls a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        """Called with the prompt, and then with each new token."""
        self.times.append(clock())

    def end(self) -> None:
        """Called after the last token."""


class TransformersGenerator(Protocol):
    """What `their_times` needs of a model of transformers'."""

    def generate(self, inputs: Tensor, **options: Any) -> Any: ...


def their_times(model: TransformersGenerator, prompt: list[int], new_tokens: int) -> list[float]:
    """A contender's times by transformers' own `generate`."""
    watch = Stopwatch()
    started = clock()
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
    return [started, *watch.times[1:]]  # the streamer is given the prompt first


def their_tokens(model: TransformersGenerator, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest tokens, by transformers' own `generate`."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


class Speed(NamedTuple):
    """What is measured in a round."""

    prefill_tokens_per_second: float
    """Of the whole prompt."""
    first_token_ms: float
    """Milliseconds to the first token after the short prompt."""
    decode_tokens_per_second: float
    """Of the tokens after the first."""


def race(
    contenders: Mapping[str, Contender[Any]], prompt: list[int], new_tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """The median over several rounds of each field of `Speed`, by contender and field.

    prompt: its first SHORT_PROMPT tokens are what `new_tokens` are written after. Contenders take turns, so
    that a slow minute of the machine does not meet one of them alone; a round before the first warms them up.
    Raises ValueError for an empty prompt, for new_tokens below 2 and rounds below 1.
    """
    if not prompt or new_tokens < 2 or rounds < 1:
        raise ValueError(
            f"a race needs a prompt, at least 2 new tokens and a round, not {len(prompt)} tokens of prompt,"
            f" new_tokens={new_tokens}, rounds={rounds}"
        )
    for contender in contenders.values():
        speed_of(contender, prompt, 2)
    speeds: dict[str, list[Speed]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            speeds[name].append(speed_of(contender, prompt, new_tokens))
    return {name: _medians(of_one) for name, of_one in speeds.items()}


def speed_of(contender: Contender[Any], prompt: list[int], new_tokens: int) -> Speed:
    """A contender's speed once: it reads the prompt, and writes `new_tokens` after its first SHORT_PROMPT."""
    read = contender.times(contender.model, prompt, 1)
    written = contender.times(contender.model, prompt[:SHORT_PROMPT], new_tokens)
    return Speed(
        prefill_tokens_per_second=len(prompt) / (read[1] - read[0]),
        first_token_ms=1000 * (written[1] - written[0]),
        decode_tokens_per_second=(len(written) - 2) / (written[-1] - written[1]),
    )


def _medians(speeds: Sequence[Speed]) -> dict[str, float]:
    return {field: statistics.median(getattr(speed, field) for speed in speeds) for field in Speed._fields}
