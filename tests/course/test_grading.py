"""What the grader says of an answer, what a week shows, and what it remembers."""

import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
from shared.course.comparison import difference

from shared.course.exercise import Exercise, Mistake, Week, grade, random_int, read_progress
from tests.course.answers import OTHER_ANSWERS

EXERCISES = {e.name: e for n in (1, 2, 3, 4) for e in Week(n).exercises.values()}
past_means = OTHER_ANSWERS["average_past"]
window_mask = OTHER_ANSWERS["sliding_window_mask"]


# ---- what the grader says


def average_past(x): ...


def _not_written(x):
    """The mean of the past."""
    raise NotImplementedError


def _only_pass(x):
    pass


def _documented(x):
    """The mean of the past."""
    ...


@pytest.mark.parametrize("function", [average_past, _not_written, _only_pass, _documented, lambda x: ...])
def test_an_untouched_stub_is_not_attempted(function):
    verdict = grade(EXERCISES["average_past"], function)
    assert verdict.status == "not attempted" and "average_past" in verdict.message and verdict.mistake is None


def _crashes(x):
    y = x.mean(dim=1)
    return y.view(7, 7, 7)  # the learner's own line


def _crashes_inside_torch(x):
    return F.layer_norm(x, (99,))


def _misses_an_argument():
    return 0


@pytest.mark.parametrize(
    "function, words",
    [
        (_crashes, ["crashed on case 1", "of shape [2, 5, 3]", "return y.view(7, 7, 7)", "RuntimeError"]),
        (_crashes_inside_torch, ["return F.layer_norm(x, (99,))", "RuntimeError", "99"]),
        (_misses_an_argument, ["TypeError", "positional argument"]),
        (lambda x: print(end=""), ["None", "`return`"]),
        (lambda x: x.tolist(), ["expected a tensor", "float32"]),
        (lambda x: past_means(x).double(), ["dtype", "torch.float64", "torch.float32"]),
        (lambda x: past_means(x).transpose(1, 2), ["expected shape [2, 5, 3], got [2, 3, 5]", "transpose"]),
        (lambda x: past_means(x).flatten(), ["expected shape [2, 5, 3], got [30]", "reshape"]),
        (lambda x: x.mean(dim=1), ["got [2, 3]", "keepdim"]),
        (lambda x: x / 0, ["nan or inf"]),
        (lambda x: x * 0, ["values differ", "expected"]),
    ],
)
def test_what_is_wrong_is_said(function, words):
    verdict = grade(EXERCISES["average_past"], function)
    assert verdict.status == "wrong" and verdict.mistake is None
    for word in words:
        assert word in verdict.message, verdict.message


def test_what_differs_is_counted_by_the_exercises_own_tolerance():
    given = torch.tensor([math.inf, 1.0, 2.5, 2e-9])
    right = torch.tensor([math.inf, 1.0, 2.0, 1e-9])
    message = "shape and dtype are right, but 1 of 4 values differ, most at [2]: 2.5, expected 2."
    assert difference(given, right, 1e-5) == message
    assert "2 of 4 values differ, most at [2]" in difference(given, right, 0)
    other = torch.tensor([-math.inf, 1.0, 2.0, 1e-9])
    assert "1 of 4 values differ, most at [0]: inf, expected -inf" in difference(right, other)


def test_the_line_of_a_crash_is_the_learners():
    line = inspect.getsourcelines(_crashes)[1] + 2
    assert f"line {line}: " in grade(EXERCISES["average_past"], _crashes).message


@pytest.mark.parametrize(
    "name, function, words",
    [
        ("loss_in_bits_per_byte", lambda loss, *_: torch.tensor(loss), ["expected float", "got Tensor"]),
        ("loss_in_bits_per_byte", lambda loss, *_: 7.5, ["expected", "got 7.5"]),
        ("clip_gradients", lambda gradients, max_norm: tuple(gradients), ["expected list", "got tuple"]),
        ("clip_gradients", lambda gradients, max_norm: gradients[:1], ["expected 3 items, got 1"]),
        ("decode_step", lambda q, k, v, past_k, past_v: (q, past_k, past_v), ["item 0", "values differ"]),
        ("sliding_window_mask", lambda *sizes: window_mask(*sizes).float(), ["torch.float32", "torch.bool"]),
        ("count_parameters", lambda *sizes: 0, ["expected 124439808, got 0"]),
        ("count_pairs", lambda tokens, vocab_size: tokens, ["expected a tensor", "array"]),
    ],
)
def test_what_is_wrong_with_other_types_is_said(name, function, words):
    verdict = grade(EXERCISES[name], function)
    assert verdict.status == "wrong" and verdict.mistake is None
    for word in words:
        assert word in verdict.message, verdict.message


def test_an_input_changed_in_place_is_named():
    def causal_weights(scores):
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return scores.masked_fill_(hidden, float("-inf")).softmax(-1)

    def clip_gradients(gradients, max_norm):
        right = EXERCISES["clip_gradients"].reference(gradients, max_norm)
        gradients[0] *= 2
        return right

    for function, argument in ((causal_weights, "scores"), (clip_gradients, "gradients")):
        message = grade(EXERCISES[function.__name__], function).message
        assert f"`{argument}`" in message and "in place" in message and "copy" in message


def test_a_mistake_that_crashes_on_a_case_is_no_match():
    def half(x: int) -> int:
        return x // 2

    crashing = Mistake("divided by zero", lambda x: 1 // 0, "Never divide by zero.")
    exercise = Exercise("Halve it.", half, lambda generator: [(4,), (7,)], (crashing,), ("a", "b", "c"))
    verdict = grade(exercise, lambda x: x)
    assert verdict.status == "wrong" and verdict.mistake is None
    assert "case 1" in verdict.message and "expected 2, got 4" in verdict.message


def test_random_int_leaves_its_upper_end_out():
    generator = torch.Generator().manual_seed(0)
    assert {random_int(generator, 2, 5) for _ in range(100)} == {2, 3, 4}


# ---- a week


@pytest.fixture
def week(tmp_path):
    return Week(3, tmp_path / "progress.json")


def test_task_shows_what_to_write(week, capsys):
    week.task("average_past")
    shown = " ".join(capsys.readouterr().out.split())
    assert "[batch, time, channel]" in shown and "def average_past(x: torch.Tensor) -> torch.Tensor:" in shown


def test_hints_come_in_order_and_the_last_repeats(week, capsys):
    for _ in range(5):
        week.hint("average_past")
    hints = EXERCISES["average_past"].hints
    shown = [f"Hint {n} of 3: {hints[n - 1]}" for n in (1, 2, 3, 3, 3)]
    assert capsys.readouterr().out.splitlines() == shown


def test_hints_of_one_exercise_do_not_use_up_anothers(week, capsys):
    week.hint("average_past")
    week.hint("split_heads")
    assert capsys.readouterr().out.count("Hint 1 of 3") == 2


def test_solved_is_remembered(week, tmp_path, capsys):
    def split_heads(x, n_head):
        return x.view(x.size(0), x.size(1), n_head, -1).transpose(1, 2)

    def average_past(x):
        return x.cumsum(1)

    assert week.solved() == []
    week.check(average_past)
    assert "sums instead of means" in capsys.readouterr().out and week.solved() == []
    week.check(split_heads)
    week.check(split_heads)
    assert "solved" in capsys.readouterr().out
    assert Week(3, tmp_path / "progress.json").solved() == ["split_heads"]
    assert Week(2, tmp_path / "progress.json").solved() == []
    assert read_progress(tmp_path / "progress.json") == {"3": ["split_heads"]}


def test_progress_of_several_weeks_is_kept_together(week, tmp_path):
    week.check(EXERCISES["causal_weights"].reference)
    week.check(EXERCISES["average_past"].reference)
    Week(2, tmp_path / "progress.json").check(EXERCISES["adamw_step"].reference)
    assert week.solved() == ["average_past", "causal_weights"]  # in the order of the week
    assert set(json.loads((tmp_path / "progress.json").read_text())) == {"2", "3"}


ASK = [lambda w: w.task("attend"), lambda w: w.hint("attend"), lambda w: w.check(lambda x: x)]


@pytest.mark.parametrize("ask", ASK, ids=["task", "hint", "check"])
def test_an_unknown_exercise_is_an_error_that_names_those_there_are(week, ask):
    with pytest.raises(ValueError, match="week 3 has no exercise.*average_past.*multi_head_attention"):
        ask(week)


def test_an_unknown_week_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="week 99 has no exercises.*1, 2, 3, 4, 5, 6"):
        Week(99)
