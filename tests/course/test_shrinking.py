"""The smallest failing case: it fails, it is valid, it is not larger than the start, it is the same."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.course.exercise import grade
from shared.course.exercise.comparison import same
from shared.course.exercise.shrinking import TRIES, size, smallest
from tests.course.helpers import made_up, normal

NUMBERS = st.integers(-5, 40) | st.floats(-5, 5)
LISTS = st.lists(st.integers(0, 9), max_size=12)
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def tensors(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


ARGUMENTS = st.tuples(
    SHAPES.map(tensors),
    LISTS,
    st.text("abc ", max_size=30),
    NUMBERS,
    SHAPES.map(lambda s: tensors(s).numpy()),
)
FAILURES = {
    "a long list": lambda x, items, text, n, array: len(items) >= 3,
    "a letter": lambda x, items, text, n, array: "b" in text,
    "a large array": lambda x, items, text, n, array: array.size > 4,
    "several dimensions": lambda x, items, text, n, array: x.dim() > 1 and x.numel() > 1,
    "a value": lambda x, items, text, n, array: bool((x > 0.4).any()),
    "an item and a number": lambda x, items, text, n, array: 7 in items or n > 20,
    "always": lambda *arguments: True,
}


@settings(max_examples=80)
@given(ARGUMENTS, st.sampled_from(sorted(FAILURES)))
def test_it_fails_and_is_not_larger_and_is_the_same_each_time(arguments, name):
    fails = FAILURES[name]
    if not fails(*arguments):
        return
    before = copy.deepcopy(arguments)
    found = smallest(arguments, lambda case: fails(*case))
    assert fails(*found) and size(found) <= size(arguments)
    assert same(arguments, before, 0)  # what is given is left alone
    assert same(found, smallest(arguments, lambda case: fails(*case)), 0)
    assert [type(part) for part in found] == [type(part) for part in arguments]


def test_what_is_between_two_ends_goes():
    text = "b" + "a" * 200 + "c"
    assert smallest((text,), lambda case: "b" in case[0] and "c" in case[0]) == ("bc",)


def test_what_always_fails_becomes_as_small_as_can_be():
    x = torch.randn(4, 5, 6)
    (found,) = smallest((x,), lambda case: True)
    assert found.shape == (1, 1, 1) and torch.equal(found, found.round())
    assert smallest(([3, 1, 2],), lambda case: True) == ([],)


def test_sizes_that_belong_together_are_cut_together():
    q, k = torch.randn(3, 7, 4), torch.randn(3, 7, 4)
    found = smallest((q, k, 7), lambda case: case[0].shape == case[1].shape and case[2] == case[0].size(1))
    assert found[0].shape == found[1].shape == (1, 1, 1) and found[2] == 1


def test_small_numbers_become_1_before_they_become_0():
    small = torch.tensor([0.02, -0.01])
    assert smallest((small,), lambda case: len(case[0]) == 2)[0].tolist() == [1, -1]
    assert smallest((small,), lambda case: bool((case[0] < 0.5).all()))[0].tolist() == [0]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_number_of_arguments_is_no_size(count):
    found = smallest(tuple(torch.randn(5, 7) for _ in range(count)), lambda case: True)
    assert [part.shape for part in found] == [(1, 1)] * count
    assert all(torch.equal(part, part.round()) for part in found)


def test_it_gives_up_in_time():
    tried = []

    def never_again(case):
        tried.append(case)
        return False

    start = (torch.randn(50, 50), list(range(40)))
    assert smallest(start, never_again) is start and 0 < len(tried) <= TRIES


def test_a_case_that_breaks_what_looks_at_it_can_be_handled_by_the_caller():
    def careful(case):
        try:
            return int(case[0][2]) >= 0
        except IndexError:
            return False

    assert len(smallest(([5, 6, 7, 8],), careful)[0]) == 3


# ---- in the grader


def test_a_case_of_nothing_but_nan_is_not_shown_where_another_tells_more():
    def first_is_nan(x):
        return torch.cat([x[:1] * math.nan, x[1:]])

    case = grade(made_up(lambda x: x * 1, normal((1,), (5,))), first_is_nan).case
    assert case.given["x"].shape == (2,) and not case.yours[1].isnan()


def test_a_case_whose_right_result_is_nan_is_not_shown_where_another_tells_more():
    def mean(x):
        return x.mean()

    def zero_for_nothing(x):
        return x.sum() / (len(x) + 1)

    case = grade(made_up(mean, normal((0,), (5,))), zero_for_nothing).case
    assert not case.expected.isnan() and len(case.given["x"]) == 1


def _sorted(values):
    return sorted(values)


def _pairs_only(values):
    return sorted(values) if len(values) < 3 else values


def test_the_case_that_is_shown_is_smaller_than_any_that_was_tried():
    exercise = made_up(_sorted, lambda g: [(torch.randperm(9, generator=g).tolist(),)])
    case = grade(exercise, _pairs_only).case
    assert len(case.given["values"]) == 3 and case.yours != case.expected == sorted(case.given["values"])


def test_the_case_that_is_shown_is_one_that_the_task_allows():
    def is_distribution(p):
        return bool((p >= 0).all()) and abs(float(p.sum()) - 1) < 1e-4

    def cases(generator):
        return [(torch.rand(6, generator=generator).softmax(0),)]

    exercise = made_up(lambda p: -(p * p.log()).sum(), cases, valid=is_distribution)
    case = grade(exercise, lambda p: (p * p.log()).sum()).case
    assert is_distribution(case.given["p"])


def test_a_case_on_which_the_reference_fails_is_not_shown():
    def first(values):
        return values[0]

    case = grade(made_up(first, [([4, 5, 6],)]), lambda values: values[-1] + 1).case
    assert len(case.given["values"]) >= 1


def test_a_crash_is_shown_on_the_smallest_case_that_crashes():
    def crashes(x):
        return x.view(99) if x.size(1) > 2 else x

    case = grade(made_up(lambda x: x, normal((4, 5))), crashes).case
    assert case.given["x"].shape == (1, 3) and "return x.view" in case.error and "RuntimeError" in case.error


def test_the_arguments_of_a_case_are_copies_each_time():
    case = grade(made_up(lambda x: x * 2, normal((3, 3))), lambda x: x * 5).case
    first = case.arguments
    first[0].fill_(99)
    assert not torch.equal(case.arguments[0], first[0])
    assert torch.equal(case.arguments[0], case.given["x"])


def test_arrays_are_rounded_and_cut_too():
    (found,) = smallest((np.random.default_rng(0).normal(size=(5, 5)),), lambda case: case[0].shape[1] > 1)
    assert found.shape == (1, 2) and np.array_equal(found, found.round())


def test_a_number_is_rounded_to_one_decimal_and_left_alone_then():
    assert smallest((0.4567,), lambda arguments: arguments[0] > 0.3) == (0.5,)
    assert smallest((0.4567,), lambda arguments: arguments[0] < 0.47) == (0.4567,)
