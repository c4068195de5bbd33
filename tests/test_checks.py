"""shared/checks.py: what is wrong with settings is said all at once, and what is right passes."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from shared.checks import Checks


@dataclass(frozen=True)
class Walk:
    value: Any = None
    other: Any = None
    seed: Any = 0


def problems(value, method: str, *arguments) -> list[str]:
    """What one of the checks says of a field `value`."""
    checks = Checks(Walk(value))
    getattr(checks, method)(*arguments, "value")
    return checks.problems


@pytest.mark.parametrize("value", [1, 1.0, 7, math.inf])
def test_at_least_takes_the_limit_and_more(value):
    assert problems(value, "at_least", 1) == []


@pytest.mark.parametrize("value", [0, 0.999, -1, -math.inf, math.nan])
def test_at_least_refuses_less(value):
    assert problems(value, "at_least", 1) == [f"value={value}: must be at least 1"]


@pytest.mark.parametrize("value", [0, 0.0, 3, math.inf])
def test_zero_is_not_negative(value):
    assert problems(value, "not_negative") == []


@pytest.mark.parametrize("value", [-1e-9, -1, math.nan])
def test_a_negative_value_is_refused(value):
    assert problems(value, "not_negative") == [f"value={value}: must not be negative"]


def test_above_takes_more_than_the_limit_as_long_as_it_is_finite():
    assert problems(1e-300, "above", 0) == problems(0.6, "above", 0.5) == []
    for value in (0, -1, math.nan, -math.inf):
        assert problems(value, "above", 0) == [f"value={value}: must be above 0"]
    assert problems(0.5, "above", 0.5) == ["value=0.5: must be above 0.5"]
    assert problems(math.inf, "above", 0) == ["value=inf: must be finite"]


def test_between_takes_both_ends():
    assert problems(0, "between", 0, 65535) == problems(65535, "between", 0, 65535) == []
    for value in (-1, 65536, math.nan):
        assert problems(value, "between", 0, 65535) == [f"value={value}: must be from 0 to 65535"]


def test_below_takes_zero_and_leaves_the_limit_out():
    assert problems(0, "below", 1) == problems(0.999, "below", 1) == []
    for value in (1, -0.1, math.nan):
        assert problems(value, "below", 1) == [f"value={value}: must be from 0 up to, not including, 1"]


@pytest.mark.parametrize(
    ("allowed", "words"),
    [(("slow",), "slow"), (("slow", "fast"), "slow or fast"), (("a", "b", "c"), "one of a, b, c")],
)
def test_one_of_names_what_is_allowed(allowed, words):
    checks = Checks(Walk("idle"))
    checks.one_of("value", allowed)
    assert checks.problems == [f"value='idle': must be {words}"]
    checks = Checks(Walk(allowed[-1]))
    checks.one_of("value", allowed)
    assert checks.problems == []


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_a_seed_that_a_generator_would_refuse_is_a_problem(seed):
    checks = Checks(Walk(seed=seed))
    checks.seed()
    assert checks.problems == [f"seed {seed!r} is out of range: choose a whole number from 0 to 4294967295"]
    checks = Checks(Walk(seed=5))
    checks.seed()
    assert checks.problems == []


def test_a_field_that_is_not_set_passes_every_check():
    checks = Checks(Walk(None, seed=None))
    checks.at_least(1, "value", "other")
    checks.not_negative("value")
    checks.above(0, "value")
    checks.between(0, 1, "value")
    checks.below(1, "value")
    checks.one_of("value", ("slow", "fast"))
    checks.seed()
    checks.finish()


def test_finish_raises_all_problems_in_one_line_in_their_order():
    checks = Checks(Walk(0, -1))
    checks.at_least(1, "value", "other")
    checks.require(False, "other is below value")
    checks.require(True, "never said")
    with pytest.raises(ValueError) as error:
        checks.finish()
    assert str(error.value) == (
        "Walk: value=0: must be at least 1; other=-1: must be at least 1; other is below value"
    )
