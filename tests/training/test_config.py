"""shared/training/config.py: the schedules against transformers' own, and settings that are refused."""

import math

import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from shared.training import TrainConfig, lr_at


def theirs(make, steps: int, **options) -> list[float]:
    """The learning rates of one of transformers' schedules, peak 1, at steps 0 … steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, **options)
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


WSD = dict(num_training_steps=50, num_decay_steps=10, decay_type="linear")
COSINE_TO_A_TENTH = dict(num_training_steps=50, min_lr_rate=0.1)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize(
    ("schedule", "final_lr", "make", "options"),
    [
        ("cosine", 0.0, get_cosine_schedule_with_warmup, dict(num_training_steps=50)),
        ("cosine", 0.1, get_cosine_with_min_lr_schedule_with_warmup, COSINE_TO_A_TENTH),
        ("linear", 0.0, get_linear_schedule_with_warmup, dict(num_training_steps=50)),
        ("wsd", 0.0, get_wsd_schedule, WSD),
        ("wsd", 0.2, get_wsd_schedule, {**WSD, "min_lr_ratio": 0.2}),
    ],
)
def test_the_learning_rate_equals_transformers(schedule, final_lr, make, options, warmup):
    config = TrainConfig(
        steps=50, lr=1.0, schedule=schedule, final_lr=final_lr, warmup_steps=warmup, decay_fraction=0.2
    )
    expected = theirs(make, 50, num_warmup_steps=warmup, **options)
    assert [lr_at(s, config) for s in range(warmup, 51)] == pytest.approx(expected[warmup:], abs=1e-9)
    # In the warmup ours is a step ahead: a first step with learning rate 0 would be a step for nothing.
    if final_lr == 0:
        assert [lr_at(s, config) for s in range(warmup)] == pytest.approx(expected[1 : warmup + 1], abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
def test_every_schedule_climbs_to_the_peak_and_ends_where_it_should(schedule, warmup):
    config = TrainConfig(steps=20, lr=3e-4, schedule=schedule, warmup_steps=warmup, final_lr=0.25)
    rates = [lr_at(s, config) for s in range(21)]
    end = 3e-4 if schedule == "constant" else 3e-4 * 0.25
    assert max(rates) == pytest.approx(3e-4)
    assert min(rates) > 0
    if warmup:
        assert rates[:warmup] == pytest.approx([3e-4 * (s + 1) / warmup for s in range(warmup)])
    if warmup < 20:
        assert rates[20] == pytest.approx(end)
        assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :]))
    assert lr_at(1000, config) == pytest.approx(end)  # no further


def test_a_warmup_longer_than_the_training_is_refused_and_told_what_to_set():
    with pytest.raises(ValueError) as error:
        TrainConfig(steps=10, warmup_steps=50)
    assert "warmup_steps=50 of steps=10: the training would end before the learning rate" in str(error.value)
    assert "Set warmup-steps too, to at most as many (1, a tenth, is usual)" in str(error.value)
    assert lr_at(9, TrainConfig(steps=10, warmup_steps=10, lr=1.0)) == 1.0  # the last step is at the peak


def test_a_config_names_all_its_problems_at_once():
    numbers = dict(
        steps=0,
        batch_size=-1,
        lr=0,
        muon_lr=math.nan,
        final_lr=2,
        beta1=-0.1,
        weight_decay=-1,
        eval_windows=0,
    )
    with pytest.raises(ValueError) as error:
        TrainConfig(**numbers, optimizer="sgd", schedule="step", seed=-5)
    problems = [f"{name}={value}" for name, value in numbers.items()]
    for part in (*problems, "'sgd'", "'step'", "seed -5"):
        assert part in str(error.value)


@pytest.mark.parametrize("field", ["final_lr", "weight_decay", "grad_clip", "beta2", "lr"])
def test_a_setting_that_is_not_a_number_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}=nan"):
        TrainConfig(**{field: math.nan})
