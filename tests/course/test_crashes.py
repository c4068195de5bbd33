"""What the grader says of an answer that crashes: a known mistake, by its words or by its other results."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.course.exercise import Exercise, Mistake, Week, grade

WEEK = Week(1).exercises


def _third(n: int) -> int:
    return n // 3


def _exercise(*mistakes: Mistake) -> Exercise:
    return Exercise("A third.", _third, lambda _: [(9,), (30,), (0,)], mistakes, ("a", "b", "c"))


INVERTED = Mistake("inverted", lambda n: 3 // n if n else 0, "The division is upside down.")
LOOKED_UP = Mistake("looked up", lambda n: [0][n], "There is no list to look it up in.")


def test_the_words_of_a_crash_name_a_mistake_whatever_its_numbers():
    verdict = grade(_exercise(INVERTED, LOOKED_UP), lambda n: [0, 0][n])
    assert (verdict.kind, verdict.mistake) == ("mistake", "looked up")
    assert "IndexError" in verdict.case.error


def test_other_words_of_the_same_error_name_none():
    verdict = grade(_exercise(LOOKED_UP), lambda n: "abc"[n])
    assert (verdict.kind, verdict.mistake) == ("crash", None)


def test_a_wrong_result_is_shown_before_a_crash_that_goes_with_it():
    verdict = grade(_exercise(INVERTED), lambda n: 3 // n)  # 3 // 0 is the last case
    assert verdict.mistake == "inverted"
    assert verdict.case.error == "" and verdict.case.yours != verdict.case.expected


def test_a_crash_beside_right_results_is_a_crash():
    verdict = grade(_exercise(INVERTED), lambda n: n // 3 if n else 1 // n)
    assert (verdict.kind, verdict.mistake) == ("crash", None) and "case 3 of 3" in verdict.says


def _log2(loss, tokens, text_bytes):
    return math.log2(loss) * tokens / text_bytes


def _rows_by_length(logits, targets):
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets].mean()


def _rows_by_number(logits, targets):
    return -logits.log_softmax(-1)[torch.arange(targets.numel()), targets.flatten()].mean()


def _unflattened(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _stacked(tokens, starts, block_size):
    ids = torch.from_numpy(tokens.astype(np.int64))
    x = torch.stack([ids[start : start + block_size] for start in starts])
    return x, torch.stack([ids[start + block_size : start + 2 * block_size] for start in starts])


def _picked(tokens, starts, block_size):
    places = np.array(starts)[:, None] + np.arange(block_size)
    ids = tokens.astype(np.int64)
    return torch.from_numpy(ids[places]), torch.from_numpy(ids[places + block_size])


SLIPS = [
    ("loss_in_bits_per_byte", _log2, "the logarithm of the loss"),
    ("token_loss", _rows_by_length, "the targets are not flattened before they are an index"),
    ("token_loss", _rows_by_number, "the rows are not flattened before they are indexed"),
    ("training_step", _unflattened, "logits and targets are not flattened"),
    ("inputs_and_targets", _stacked, "the targets are the next window"),
    ("inputs_and_targets", _picked, "the targets are the next window"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, slip, mistake", SLIPS)
def test_learners_slips_that_crash_are_named(name, slip, mistake):
    for seed in range(3):
        assert grade(WEEK[name], slip, seed).mistake == mistake
