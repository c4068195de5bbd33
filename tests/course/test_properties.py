"""In what way an answer is wrong: each property on an exercise made up for it, and not claimed of an answer
that is wrong in another way.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from shared.course.exercise import grade, properties
from tests.course.helpers import made_up, normal

ROWS = normal((4, 3), (5, 4), (3, 6))


def above_zero(generator):
    return [(torch.rand(4, 3, generator=generator) + 0.5,), (torch.rand(2, 5, generator=generator) + 0.5,)]


def doubled(x):
    return x * 2


def strange(x):
    """Wrong in a way that has no name."""
    return x * 2 + (7 * x).sin() * x.abs()


def positive(x):
    return x > 0


def strange_mask(x):
    return (10 * x).sin() > 0


def summed(x):
    return x.sum(-1)


def softmax(x):
    return x.softmax(-1)


def strange_softmax(x):
    return (x + (5 * x).sin()).softmax(-1)


def listed(values):
    return sorted(values)


def lists(generator):
    return [(torch.randperm(n, generator=generator).tolist(),) for n in (6, 7, 9)]


def strange_list(values):
    return [value * value for value in values]


def running_mean(x):
    return x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]


def strange_mean(x):
    return running_mean(x) * (1 + x.abs())


def split_up(text):
    return sorted(text.split())


def gelu(x):
    return F.gelu(x)


def counted(text):
    return {letter: text.count(letter) for letter in text}


def two_cases(generator):
    def case(n):
        return torch.rand(n, 4, generator=generator) + 0.5, float(torch.rand(1, generator=generator)) + 2

    return [case(3), case(5), case(4)]


def scaled(x, factor):
    return x * factor


def log_sum_exp(x):
    return x.logsumexp(-1)


def large(generator):
    return [(torch.randn(n, 5, generator=generator) * 60 + 90,) for n in (2, 3)]


def whole(generator):
    return [(torch.randint(100, 5000, (n, 4), generator=generator),) for n in (3, 5)]


def extremes(x):
    return x.amin(-1), x.amax(-1)


def centred(x):
    return x - x.mean(-1, keepdim=True)


def pairs(generator):
    return [(torch.randn(2, n, generator=generator),) for n in (3, 4)]


def last_changed(x):
    y = x * 2
    y[:, -1] = y[:, -1] * x[:, -1].sin()
    return y


def through_int16(x):
    return (x * x).to(torch.int16).long()


def through_int8(x):
    return (x + 1).to(torch.int8).long()


def just_above_int8(generator):
    return [(torch.randint(100, 250, (n, 4), generator=generator),) for n in (3, 5)]


FOUND = [
    ("another result each time", doubled, ROWS, lambda x: x * 2 + torch.rand(()), strange),
    ("Every value of your result is 3", doubled, ROWS, lambda x: x * 0 + 3, strange),
    ("True and False are exchanged", positive, ROWS, lambda x: x <= 0, strange_mask),
    ("There is nan in your result", doubled, ROWS, lambda x: x * 2 + 0 * x.new_tensor(math.inf), strange),
    ("not in float32", log_sum_exp, large, lambda x: x.exp().sum(-1).log(), lambda x: x.amax(-1) ** 0.5),
    ("The future leaks", running_mean, ROWS, lambda x: running_mean(x) + x.mean(0), strange_mean),
    ("Places are mixed", doubled, ROWS, lambda x: x * 2 + x.mean(0), strange),
    ("The result is transposed", lambda x: x @ x.T.sin(), ROWS, lambda x: (x @ x.T.sin()).T, None),
    ("opposite order along dimension 1", doubled, ROWS, lambda x: x.flip(1) * 2, strange),
    ("each value stands one place later", doubled, ROWS, lambda x: x.roll(1, 1) * 2, strange),
    ("each value stands one place earlier", doubled, ROWS, lambda x: x.roll(-1, 1) * 2, strange),
    (
        "in another order or in other places",
        doubled,
        ROWS,
        lambda x: x.view(-1).sort()[0].view(x.shape) * 2,
        strange,
    ),
    ("yours sum to", softmax, ROWS, lambda x: x.sigmoid(), strange_softmax),
    ("the wrong dimension, or it lost", softmax, ROWS, lambda x: x.softmax(0), strange_softmax),
    ("divided by its own sum", softmax, ROWS, lambda x: x.view(-1).softmax(0).view(x.shape), strange_softmax),
    ("`factor` makes no difference", scaled, two_cases, lambda x, factor: x * 2, lambda x, factor: x**factor),
    ("but for the sign", doubled, ROWS, lambda x: x * -2, strange),
    ("a logarithm is missing", doubled, ROWS, lambda x: (x * 2).exp(), strange),
    ("natural logarithm of the right", doubled, above_zero, lambda x: (x * 2).log(), strange),
    ("minus the logarithm of the right", doubled, above_zero, lambda x: -(x * 2).log(), strange),
    ("a square root is missing", doubled, above_zero, lambda x: (x * 2) ** 2, strange),
    ("the square root of the right", doubled, above_zero, lambda x: (x * 2) ** 0.5, strange),
    ("the fraction is upside down", doubled, above_zero, lambda x: 1 / (x * 2), strange),
    ("1 minus the right result", softmax, ROWS, lambda x: 1 - x.softmax(-1), strange_softmax),
    ("one softmax too many", softmax, ROWS, lambda x: x.softmax(-1).softmax(-1), strange_softmax),
    ("too small by a factor: the last size of `x`", summed, ROWS, lambda x: x.mean(-1), lambda x: x.amax(-1)),
    (
        "too large by a factor: the square root of the last",
        summed,
        ROWS,
        lambda x: x.sum(-1) * x.size(-1) ** 0.5,
        None,
    ),
    (
        "too large by a factor: `factor`",
        scaled,
        two_cases,
        lambda x, factor: x * factor**2,
        lambda x, f: x**f,
    ),
    ("off by a constant factor: yours are 1.37", doubled, ROWS, lambda x: x * 2.74, strange),
    ("one factor for all of them", doubled, ROWS, lambda x: x * x.abs().max(), strange),
    (
        "depends on the place along dimension 1",
        doubled,
        ROWS,
        lambda x: x * torch.linspace(1, 4, x.size(1)),
        strange,
    ),
    ("in some where it should be False", positive, ROWS, lambda x: x > -0.5, strange_mask),
    ("it misses some", positive, ROWS, lambda x: x > 0.5, strange_mask),
    ("a type of 16 bits has no room", lambda x: x * x, whole, through_int16, lambda x: x * x // 3),
    ("a type of 8 bits has no room", lambda x: x + 1, just_above_int8, through_int8, lambda x: x * x // 3),
    ("It is one too many", lambda values: len(values), lists, lambda v: len(v) + 1, lambda v: len(v) ** 2),
    ("It is one too few", lambda values: len(values), lists, lambda v: len(v) - 1, lambda v: len(v) ** 2),
    ("the same amount everywhere: yours are 0.37 too large", doubled, ROWS, lambda x: x * 2 + 0.37, strange),
    ("the same amount everywhere: by `factor`", scaled, two_cases, lambda x, f: x * f + f, lambda x, f: x**f),
    ("scores) were multiplied by 2", softmax, ROWS, lambda x: (2 * x).softmax(-1), strange_softmax),
    ("too flat", softmax, ROWS, lambda x: (x / x.size(-1)).softmax(-1), strange_softmax),
    ("another result alone than among other rows", centred, pairs, lambda x: x - x.mean(), lambda x: x**2),
    (
        "a type of fewer digits (bfloat16",
        gelu,
        ROWS,
        lambda x: F.gelu(x.bfloat16()).float(),
        lambda x: x.sigmoid(),
    ),
    (
        "It is nearly right",
        gelu,
        ROWS,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x.sigmoid(),
    ),
    (
        "1 entries that should not be there, such as 'z'",
        counted,
        [("abca",)],
        lambda t: {**counted(t), "z": 0},
        None,
    ),
    ("entries are missing", counted, [("abca",)], lambda t: dict(list(counted(t).items())[:1]), None),
    (
        "It is one too many.",
        counted,
        [("abca",)],
        lambda t: {**counted(t), "a": 3},
        None,
    ),
    ("right everywhere but at the last place of dimension 1", doubled, ROWS, last_changed, strange),
    ("in another order than the task names them", extremes, ROWS, lambda x: extremes(x)[::-1], None),
    ("in the opposite order", listed, lists, lambda values: sorted(values)[::-1], strange_list),
    ("one item too many: the last", listed, lists, lambda values: [*sorted(values), 77], strange_list),
    ("one item too many: the first", listed, lists, lambda values: [77, *sorted(values)], strange_list),
    ("One item is missing: the last", listed, lists, lambda values: sorted(values)[:-1], strange_list),
    ("It stops too early", listed, lists, lambda values: sorted(values)[:2], strange_list),
    ("It goes on too long", listed, lists, lambda values: [*sorted(values), 8, 9], strange_list),
    ("but in another order", listed, lists, lambda values: values, strange_list),
    ("The items are the right ones", split_up, [("b a c",)], lambda t: t.split(), lambda t: t.split(" ", 1)),
]


@pytest.mark.parametrize("words, reference, cases, answer, other", FOUND, ids=[row[0] for row in FOUND])
def test_a_property_is_recognised_and_not_claimed_of_another_failure(words, reference, cases, answer, other):
    exercise = made_up(reference, cases)
    assert grade(exercise, reference).status == "solved"
    verdict = grade(exercise, answer)
    assert (verdict.status, verdict.kind) == ("wrong", "property") and words in verdict.says, verdict.says
    assert verdict.case is not None
    if other is not None:
        another = grade(exercise, other)
        assert another.status == "wrong" and words not in another.says, another.says


def test_of_one_and_zero_no_function_is_told():
    """e to the power of 0 is 1, and so are other things."""
    exercise = made_up(lambda values: ("passes", 0), lists)
    says = grade(exercise, lambda values: ("passes", 1)).says
    assert "It is one too many" in says and "logarithm" not in says


def test_every_property_is_tried():
    """The sentences above come from all functions that recognise something."""
    said = {name: 0 for name in (function.__name__ for function in properties.RECOGNISED)}
    for _, reference, cases, answer, _ in FOUND:
        says = _first_to_recognise(made_up(reference, cases), answer)
        if says:
            said[says] += 1
    assert [name for name, count in said.items() if count == 0] == []


def _first_to_recognise(exercise, answer):
    names = []

    def watched(function):
        def recognise(evidence):
            sentence = function(evidence)
            if sentence:
                names.append(function.__name__)
            return sentence

        return recognise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(properties, "RECOGNISED", tuple(map(watched, properties.RECOGNISED)))
        grade(exercise, answer)
    return names[0] if names else None


def test_a_property_of_one_part_of_a_result_is_found():
    verdict = grade(made_up(extremes, ROWS), lambda x: (x.amin(-1), -x.amax(-1)))
    assert "but for the sign" in verdict.says


def counted_on(x, step, limit):
    """Two results, of which both depend on `step` and `limit`."""
    return (x * 2, 0) if step + 1 == limit else (x, step + 1)


def one_step_late(x, step, limit):
    return (x * 2, 0) if step + 1 > limit else (x, step + 1)


def both_forgotten(x, step, limit):
    return x, round(100 * float(x.sum()))


def steps(generator):
    return [(torch.rand(3, generator=generator) + 0.5, step, 10) for step in (3, 9, 4, 9)]


def test_an_argument_is_called_unused_only_where_no_part_of_the_result_depends_on_it():
    exercise = made_up(counted_on, steps)
    assert "makes no difference" not in grade(exercise, one_step_late).says
    assert "`step` and `limit` make no difference" in grade(exercise, both_forgotten).says


def weighted(x, y, weight):
    return x + y.mean() * weight


def weights(generator):
    drawn = [torch.rand(2, 3, generator=generator) + 0.5 for _ in range(3)]
    return [(x, y, weight) for (x, y), weight in zip(drawn, (0.5, 2.0, 3.0))]


def test_all_unused_arguments_are_named_together():
    says = grade(made_up(weighted, weights), lambda x, y, weight: x + (7 * x).sin()).says
    assert "The arguments `y` and `weight` make no difference" in says


def test_an_argument_is_called_unused_only_where_nothing_that_is_seen_depends_on_it():
    """What is looked at first may not show it; and what the task does not name is the grader's own."""

    def watched(answer, x, y, weight, salt):
        result = answer(x, y, weight)
        yield "the sum, rounded", round(float(result.sum())) + salt
        yield "the result", result

    def cases(generator):
        return [(*case, salt) for case, salt in zip(weights(generator), (3, 40, 700))]

    exercise = made_up(weighted, cases, observe=watched)

    def hardly_moved(x, y, weight):
        return 9 + (x + 0.01 * (y + weight).sin()) / 100

    assert "no difference" not in grade(exercise, hardly_moved).says
    assert "The arguments `y` and `weight` make" in grade(exercise, lambda x, y, weight: (7 * x).sin()).says


def test_one_number_is_not_off_by_the_same_amount_everywhere():
    exercise = made_up(lambda x: [float(x.sum())], normal((3,)))
    assert "everywhere" not in grade(exercise, lambda x: [float(x.sum()) + 0.37]).says


def test_a_result_that_is_constant_only_where_it_is_wrong_is_not_called_the_same_whatever_comes():
    def one_where_negative(x):
        return x * 2 if x.sum() > 0 else x * 0 + 1

    exercise = made_up(doubled, lambda g: [(torch.tensor([1.0, 2.0]),), (torch.tensor([-1.0, -2.0]),)])
    assert "Every value" not in grade(exercise, one_where_negative).says
    assert "Every value of your result is 1" in grade(exercise, lambda x: x * 0 + 1).says


def test_one_factor_for_all_places_does_not_depend_on_the_place():
    def shrunk(x):
        """One case is off by one factor, the other by none that counts."""
        return x * 2 * (1.5 if x.size(1) == 3 else 1.0)

    says = grade(made_up(doubled, normal((4, 3), (5, 4))), shrunk).says
    assert "depends on the place" not in says


def test_the_part_of_a_result_that_a_sentence_is_about_is_named():
    verdict = grade(made_up(extremes, ROWS), lambda x: (x.amin(-1), -x.amax(-1)))
    assert "In item 1 of the result: The values are right but for the sign" in verdict.says


def test_what_has_no_name_is_said_to_differ():
    verdict = grade(made_up(doubled, ROWS), strange)
    assert verdict.kind == "differs" and "values differ" in verdict.says and "on 3 of 3 cases" in verdict.says


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_break_no_property(value):
    verdict = grade(made_up(doubled, ROWS), lambda x: x * value)
    assert verdict.status == "wrong" and "nan or inf" in verdict.message
