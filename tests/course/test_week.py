"""What a week shows of its exercises, and what it remembers."""

import pytest
import torch

from shared.course.exercise import Week, week_numbers
from tests.course.answers import OTHER_ANSWERS

EXERCISES = {e.name: e for n in (1, 2, 3, 4) for e in Week(n).exercises.values()}
past_means = OTHER_ANSWERS["average_past"]


@pytest.fixture
def week():
    return Week(3)


def test_task_shows_what_to_write(week, capsys):
    week.task("average_past")
    shown = " ".join(capsys.readouterr().out.split())
    assert "[batch, time, channel]" in shown and "def average_past(x: torch.Tensor) -> torch.Tensor:" in shown


def test_a_task_with_paragraphs_keeps_them_and_its_list(capsys):
    week = Week(2)
    week.task("train")
    assert "\n1. set the learning rate" in capsys.readouterr().out
    assert week._task(week.find("train"))[1].count("<li>") == 6


def test_hints_come_in_order_and_then_the_way_to_the_solution(week, capsys):
    for _ in range(5):
        week.hint("average_past")
    hints = EXERCISES["average_past"].hints
    shown = [f"Hint {n} of 3: {hints[n - 1]}" for n in (1, 2, 3)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == shown and len(lines) == 5
    assert all("Those were all hints." in line and "solution average_past" in line for line in lines[3:])


def test_hints_of_one_exercise_do_not_use_up_anothers(week, capsys):
    week.hint("average_past")
    week.hint("causal_weights")
    assert capsys.readouterr().out.count("Hint 1 of 3") == 2


def test_a_solution_is_locked_until_the_hints_are_used_up_or_it_is_solved(capsys):
    week = Week(1)
    week.solution("count_pairs")
    locked = capsys.readouterr().out
    assert "0 of 3 hints are used" in locked and "np.bincount" not in locked
    week.solution("count_pairs", reveal=True)
    assert "np.bincount" in capsys.readouterr().out
    for _ in range(3):
        week.hint("count_pairs")
    Week(1).solution("count_pairs")  # what was asked for is remembered
    assert "return torch.from_numpy(counts)" in capsys.readouterr().out
    week.check(OTHER_ANSWERS["row_probabilities"])
    week.solution("row_probabilities")
    assert "keepdim=True" in capsys.readouterr().out


def causal_weights(scores):
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def test_solved_is_remembered(week, capsys):
    def average_past(x):
        return x.cumsum(1)

    assert week.solved() == []
    week.check(average_past)
    assert "sums instead of means" in capsys.readouterr().out and week.solved() == []
    week.check(causal_weights)
    week.check(causal_weights)
    assert "solved" in capsys.readouterr().out
    assert Week(3).solved() == ["causal_weights"]
    assert Week(2).solved() == []
    kept = sorted(path.name for path in week.shelf.folder.iterdir())
    assert kept == ["causal_weights.json", "causal_weights.py"]


def test_progress_of_several_weeks_is_kept_together(week, answers_folder):
    week.check(causal_weights)
    week.check(past_means, "average_past")
    Week(2).check(OTHER_ANSWERS["adamw_step"], "adamw_step")
    assert week.solved() == ["average_past", "causal_weights"]  # in the order of the week
    assert {path.name for path in answers_folder.iterdir()} == {"02_mlp", "03_attention"}


ASK = [
    lambda w: w.task("attend"),
    lambda w: w.hint("attend"),
    lambda w: w.check(lambda x: x),
    lambda w: w.mine("attend"),
    lambda w: w.case("attend"),
    lambda w: w.solution("attend"),
]


@pytest.mark.parametrize("ask", ASK, ids=["task", "hint", "check", "mine", "case", "solution"])
def test_an_unknown_exercise_is_an_error_that_names_those_there_are(week, ask):
    with pytest.raises(ValueError, match="week 3 has no exercise.*average_past.*causal_weights"):
        ask(week)


def test_an_unknown_week_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="week 99 has no exercises.*1, 2, 3, 4, 5, 6"):
        Week(99)


def test_weeks_with_exercises_are_known():
    assert week_numbers() == list(range(1, 13))
