"""shared/quantization/race.py by a clock of our own: turns, medians, and which moments are counted."""

import statistics

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from shared.quantization import race as module
from shared.quantization.race import SHORT_PROMPT, Contender, Speed, our_times, race, their_times
from tests.quantization.helpers import TIED, gpt

PROMPT = list(range(40))


class Paced:
    """A model that needs so many seconds for a token of the prompt, for the first token, and for each further
    one; in some runs `slow` times as many.
    """

    def __init__(self, name: str, calls: list, *, read: float, first: float, write: float, slow=()):
        self.name, self.calls, self.slow = name, calls, dict(slow)
        self.read, self.first, self.write = read, first, write
        self.runs = 0

    def times(self, prompt: list[int], new_tokens: int) -> list[float]:
        self.calls.append((self.name, len(prompt), new_tokens))
        factor = self.slow.get(self.runs // 2, 1)  # a round is two runs
        self.runs += 1
        first = factor * (self.first + self.read * len(prompt))
        return [7.0, *(7 + first + factor * self.write * i for i in range(new_tokens))]


def contender(*args, **kwargs) -> Contender:
    return Contender(Paced(*args, **kwargs), Paced.times)


def test_contenders_take_turns_and_the_first_round_warms_up():
    calls = []
    contenders = {name: contender(name, calls, read=1, first=0, write=1) for name in ("a", "b", "c")}
    race(contenders, PROMPT, new_tokens=8, rounds=2)
    turn = [(name, n, new) for name in "abc" for n, new in ((len(PROMPT), 1), (SHORT_PROMPT, 8))]
    warm_up = [(name, n, min(new, 2)) for name, n, new in turn]
    assert calls == warm_up + turn + turn


def test_the_figures_are_those_of_the_pace():
    result = race({"a": contender("a", [], read=0.01, first=0.5, write=0.02)}, PROMPT, 11, rounds=1)
    assert result["a"] == pytest.approx(
        {
            "prefill_tokens_per_second": 40 / (0.5 + 40 * 0.01),
            "first_token_ms": 1000 * (0.5 + 16 * 0.01),
            "decode_tokens_per_second": 1 / 0.02,
        }
    )
    assert list(result["a"]) == list(Speed._fields)


def test_a_prompt_shorter_than_the_short_one_is_read_whole():
    calls = []
    result = race({"a": contender("a", calls, read=0.01, first=0, write=0.02)}, [1, 2, 3], 4, rounds=1)
    assert {n for _, n, _ in calls} == {3}
    assert result["a"]["first_token_ms"] == pytest.approx(30)


def test_each_figure_is_the_median_and_a_slow_round_or_warm_up_does_not_count():
    """Round 0 is the one that warms up."""
    calm = contender("calm", [], read=0.01, first=0, write=0.02)
    busy = contender("busy", [], read=0.01, first=0, write=0.02, slow={0: 1000, 2: 50})
    result = race({"calm": calm, "busy": busy}, PROMPT, 11, rounds=3)
    assert result["busy"] == pytest.approx(result["calm"])
    uneven = contender("uneven", [], read=0.01, first=0, write=0.02, slow={1: 2, 2: 5, 3: 3, 4: 1})
    result = race({"uneven": uneven}, PROMPT, 11, rounds=4)
    expected = statistics.median([1 / (0.02 * slow) for slow in (2, 5, 3, 1)])
    assert result["uneven"]["decode_tokens_per_second"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "rounds", "named"),
    [([], 8, 3, "0 tokens of prompt"), (PROMPT, 1, 3, "new_tokens=1"), (PROMPT, 8, 0, "rounds=0")],
)
def test_a_race_in_which_nothing_can_be_measured_is_refused(prompt, new_tokens, rounds, named):
    calls = []
    with pytest.raises(ValueError, match=f"at least 2 new tokens and a round, not .*{named}"):
        race({"a": contender("a", calls, read=1, first=0, write=1)}, prompt, new_tokens, rounds)
    assert calls == []


@pytest.fixture
def ticks(monkeypatch):
    """A clock that goes on by a second each time it is read."""
    seconds = iter(range(1000))
    monkeypatch.setattr(module, "clock", lambda: float(next(seconds)))


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
def test_our_times_are_the_beginning_and_each_new_token(ticks, new_tokens):
    assert our_times(gpt(TIED), [1, 2, 3], new_tokens) == [float(i) for i in range(new_tokens + 1)]


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
def test_transformers_times_are_the_beginning_and_each_new_token_without_the_prompt(ticks, new_tokens):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=53, n_positions=32, n_layer=1, n_head=2, n_embd=8)
    times = their_times(GPT2LMHeadModel(config).eval(), [1, 2, 3], new_tokens)
    assert times == [0.0, *(float(i) for i in range(2, new_tokens + 2))]  # at 1 it is given the prompt
