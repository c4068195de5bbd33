"""How results are compared and shown: a sentence says where they differ, and what is long keeps its ends."""

from collections import Counter

import numpy as np
import pytest
import torch

from shared.course.exercise import grade
from shared.course.exercise.comparison import difference, whole
from shared.course.exercise.verdict import Verdict
from tests.course.helpers import made_up


@pytest.mark.parametrize(
    "given, right, message",
    [
        (" ", "  ", "expected '  ', got ' '."),
        (Counter(a=1), {"a": 2}, "at 'a': expected 2, got 1."),
        ({"a": 1, "b": 0}, {"a": 1}, "an entry is too many: 'b'."),
        ({}, {1: "x", 2: "y"}, "2 entries are missing, the first is 1."),
        ([0, [None]], [0, [1]], "item 1: item 0: expected 1, got None."),
        ({"a": None}, {"a": 1}, "at 'a': expected 1, got None."),
        (
            "so " * 40 + "it is",
            "so " * 40 + "it was",
            "from character 113 of 126 on, expected ' so so it was', got ' so so it is'.",
        ),
    ],
)
def test_the_difference_is_in_what_is_said_of_it(given, right, message):
    assert difference(given, right) == message


def test_of_long_lists_the_first_item_that_is_wrong_is_named():
    said = difference([7] * 60 + [8, 9], [7] * 60 + [300])
    assert said.endswith(" The first that is wrong is item 60: 8 instead of 300.")


def test_of_a_long_dict_the_first_and_the_last_entries_are_shown():
    vocab = {i: bytes([i]) for i in range(256)} | {256: b" the"}
    shown = whole(vocab)
    assert shown.startswith("{0: b'\\x00', 1: b'\\x01', ..., ")
    assert shown.endswith(", 255: b'\\xff', 256: b' the'} (257 entries)")
    few = {i: b"x" for i in range(20)}
    assert eval(whole(few)) == few


def test_of_a_model_s_state_the_names_and_shapes_are_shown():
    shown = whole({"embedding.weight": torch.zeros(20, 4), "head.bias": torch.zeros(20)})
    assert shown == "{'embedding.weight': float32 [20, 4],\n 'head.bias': float32 [20]}"
    assert whole({"head.bias": torch.tensor([1.0, 2.5])}) == "{'head.bias': tensor([1, 2.5])}"


@pytest.mark.parametrize("number", [torch.tensor, np.float32])
def test_right_numbers_of_another_type_are_in_no_other_order(number):
    halves = made_up(
        lambda values: ([value / 2 for value in values], len(values)),
        lambda generator: [([1.0, 2.0, 4.0],), ([3.0],), ([0.5, 8.0],)],
    )
    verdict = grade(halves, lambda values: ([number(value / 2) for value in values], len(values)))
    assert verdict.kind == "type" and "order" not in verdict.says
    assert number is np.float32 or ".item()" in verdict.says


def test_a_counter_is_as_good_as_a_dict():
    letters = made_up(lambda word: dict(Counter(word)), lambda generator: [("noon",), ("so",)])
    assert grade(letters, lambda word: Counter(word)).status == "solved"
    verdict = grade(letters, lambda word: Counter(word[1:]))
    assert verdict.kind != "type" and "Counter" not in verdict.says
    assert verdict.case.differs == "an entry is missing: 's'."


def test_spaces_are_kept_in_a_notebook():
    html = Verdict("cut", "wrong", "expected two,  got one").html()
    assert '<p style="white-space:pre-wrap"><strong>cut</strong>: expected two,  got one</p>' in html
