"""What the grader says of an answer."""

import inspect
import math
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.course.exercise import Exercise, Mistake, NotRight, Week, grade, random_int
from shared.course.exercise.comparison import difference, same, whole
from shared.course.exercise.running import changes_its_input
from shared.course.exercise.shrinking import size
from shared.course.exercise.verdict import Case
from tests.course.answers import OTHER_ANSWERS
from tests.course.helpers import made_up

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
        (_crashes, ["crashed on case 1", "x ", "return y.view(7, 7, 7)", "RuntimeError"]),
        (_crashes_inside_torch, ["return F.layer_norm(x, (99,))", "RuntimeError", "99"]),
        (_misses_an_argument, ["it takes ()", "calls it with (x)"]),
        (lambda x: print(end=""), ["None", "`return`"]),
        (lambda x: x.tolist(), ["expected a tensor", "difference"]),
        (lambda x: past_means(x).double(), ["dtype", "torch.float64", "torch.float32"]),
        (lambda x: past_means(x).transpose(1, 2), ["expected shape", "transpose"]),
        (lambda x: past_means(x).flatten(), ["expected shape", "reshape"]),
        (lambda x: x.mean(dim=1), ["expected shape", "keepdim"]),
        (lambda x: x / 0, ["nan or inf"]),
        (lambda x: x * 0, ["Every value of your result is", "expected"]),
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
        ("loss_in_bits_per_byte", lambda loss, *_: torch.tensor(loss), ["Python number", ".item()"]),
        ("loss_in_bits_per_byte", lambda loss, tokens, text_bytes: 7.5, ["expected", "got 7.5"]),
        ("clip_gradients", lambda gradients, max_norm: {}, ["expected list", "got dict"]),
        ("clip_gradients", lambda gradients, max_norm: gradients[:1], ["items, got 1"]),
        ("decode_step", lambda q, k, v, past_k, past_v: (q, past_k, past_v), ["item 0", "differ"]),
        ("sliding_window_mask", lambda *sizes: window_mask(*sizes).float(), ["torch.float32", "torch.bool"]),
        ("count_parameters", lambda *sizes: 0, ["expected", "got 0"]),
        ("count_pairs", lambda tokens, vocab_size: tokens, ["expected a tensor", "torch.from_numpy"]),
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
        verdict = grade(EXERCISES[function.__name__], function)
        assert all(words in verdict.message for words in (f"`{argument}`", "in place", "copy"))
        case = verdict.case
        assert case.what == f"{argument} after the call" and f"yours, {case.what}" in verdict.message
        given = case.arguments
        function(*given)  # the case shows what the answer makes of it
        after = dict(zip(case.given, given))[argument]
        assert same(after, case.yours, 0) and not same(after, case.expected, 0)
        assert same(case.expected, case.given[argument], 0) and size(list(case.given.values())) < 20


@pytest.mark.parametrize(
    "changed, way",
    [
        ({"tokens": [b"a", b"b"]}, "build a new list"),
        ({"words": {(b"a",): 2}}, "build a new dict"),
        ({"gradients": [torch.ones(2)]}, "returns a new tensor"),
        ({"x": torch.ones(2), "seen": [1]}, "returns a new tensor"),
    ],
)
def test_the_way_out_fits_what_was_changed(changed, way):
    assert way in changes_its_input(changed)


def test_numbers_that_differ_are_not_shown_alike():
    rows = dict(Case({"n": 1}, 1.24104, yours=1.24064, differs="they differ").rows())
    assert (rows["yours"], rows["expected"]) == ("1.24064", "1.24104")
    rows = dict(Case({"n": 1}, 1 / 3, yours=0.25, differs="they differ").rows())
    assert (rows["yours"], rows["expected"]) == ("0.25", "0.3333")


def test_a_long_list_has_an_item_a_line_and_zero_no_sign():
    batches = [(torch.arange(12), torch.arange(12))] * 2
    item = "(tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])"
    lines = whole(batches).split("\n")
    assert len(lines) == 4 and lines[0] == f"[{item}," and lines[2].strip() == f"{item},"
    assert whole([torch.tensor([-0.0, 1.5]), -0.0]) == "[tensor([0, 1.5]), 0]"


def test_the_lines_of_an_error_stand_under_each_other():
    case = Case({"x": 1}, None, error="line 3: x = y\nNameError: y")
    given, first, second = str(case).splitlines()
    assert given.index("1") == first.index("line 3") == second.index("NameError")


def test_a_mistake_of_another_type_is_named_before_the_type():
    right = OTHER_ANSWERS["count_pairs"]
    verdict = grade(EXERCISES["count_pairs"], lambda tokens, vocab_size: right(tokens, vocab_size).float())
    assert verdict.mistake == "counts as floats"


def test_a_mistake_that_crashes_on_a_case_is_no_match():
    def half(x: int) -> int:
        return x // 2

    crashing = Mistake("divided by zero", lambda x: 1 // 0, "Never divide by zero.")
    exercise = Exercise("Halve it.", half, lambda generator: [(4,), (7,)], (crashing,), ("a", "b", "c"))
    verdict = grade(exercise, lambda x: x)
    assert verdict.status == "wrong" and verdict.mistake is None
    assert re.search(r"expected -?\d+, got -?\d+", verdict.message)
    assert verdict.case.expected == verdict.case.yours // 2


def test_a_law_that_is_broken_as_a_mistake_breaks_it_but_not_in_all_cases_is_told():
    def keep(n: int) -> int:
        return n

    def observe(answer, n):
        if answer(n) < 0:
            raise NotRight("it is negative.")
        yield "the number", answer(n)

    turned = Mistake("turned", lambda n: -n, "The sign is turned round.")
    cases = [(4,), (7,), (9,)]
    exercise = Exercise("Keep it.", keep, lambda _: cases, (turned,), ("a", "b", "c"), observe=observe)
    verdict = grade(exercise, lambda n: -n if n > 4 else n)
    assert verdict.says == "not right yet: it is negative."
    known = grade(exercise, lambda n: -n)
    assert known.mistake == "turned" and ("what was seen", "it is negative.") in known.case.rows()


def test_random_int_leaves_its_upper_end_out():
    generator = torch.Generator().manual_seed(0)
    assert {random_int(generator, 2, 5) for _ in range(100)} == {2, 3, 4}


def test_only_the_answer_that_counts_exactly_is_right():
    """Whole numbers are compared exactly, however large: a tolerance of 1e-5 would forgive a thousand."""
    assert not same(124439808, 124439809, 1e-5) and same(2.0, 2, 0)
    assert not same(np.array([124439808]), np.array([124439809]), 1e-5)
    assert not same(True, 1, 1e-5) and same([1, 2], (1, 2), 0) and not same([1], [1, 2], 0)


def test_a_detached_answer_is_told_apart():
    right = OTHER_ANSWERS["token_loss"]

    def token_loss(logits, targets):
        return right(logits.detach(), targets)

    def through_numpy(logits, targets):
        return right(torch.from_numpy(logits.numpy()), targets)

    for function, words in ((token_loss, "detached from the graph"), (through_numpy, "not with gradients")):
        verdict = grade(EXERCISES["token_loss"], function)
        assert (verdict.status, verdict.kind) == ("wrong", "detached") and words in verdict.says


def test_an_answer_that_only_knows_the_cases_that_were_shown_is_wrong():
    exercise = replace(EXERCISES["average_past"], differentiable=False)  # what is looked up has no graph
    cases = exercise.cases(torch.Generator().manual_seed(0))
    known = {str(x.tolist()): exercise.reference(x) for (x,) in cases}
    verdict = grade(exercise, lambda x: known.get(str(x.tolist()), x))
    assert verdict.status == "wrong" and "right on the cases that were tried first" in verdict.says


def unwritten_operation(x):
    return x.long().softmax(-1)  # PyTorch raises NotImplementedError


async def asynchronous(x):
    return x


def generating(x):
    yield x


def quitting(x):
    raise SystemExit


def endlessly(x):
    return endlessly(x)


class Unreadable:
    def __repr__(self):
        raise ValueError


class Stubborn(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("not with me")


@pytest.mark.parametrize(
    "function, kind, words",
    [
        (unwritten_operation, "crash", "not implemented for 'Long'"),
        (asynchronous, "type", "`async def`"),
        (generating, "type", "`yield`"),
        (quitting, "crash", "SystemExit"),
        (endlessly, "crash", "calls itself without an end"),
        (lambda x: Unreadable(), "type", "whose repr raises ValueError"),
        (lambda x: past_means(x).to_sparse(), "type", "sparse and should be dense"),
        (lambda x: past_means(x).to(torch.complex64), "type", "dtype is torch.complex64"),
        (lambda x: past_means(x).to("meta"), "type", "on the device meta"),
        (lambda x: (past_means(x) * 0).as_subclass(Stubborn), "property", "Every value"),
        (lambda *, x: x, "crash", "it takes (*, x)"),
        (lambda x: True, "type", "the number True"),
        (lambda x: [past_means(x)], "type", "torch.stack or torch.cat"),
        (lambda x: "x" * 10**5, "type", "expected a tensor"),
        (3, "type", "a function or a class is wanted"),
        (None, "type", "a function or a class is wanted"),
    ],
)
def test_whatever_comes_is_answered(function, kind, words):
    verdict = grade(EXERCISES["average_past"], function)
    assert (verdict.status, verdict.kind) == ("wrong", kind) and words in verdict.message, verdict.message
    assert len(verdict.message) < 5000 and len(verdict.html()) < 10_000


def average(cases=EXERCISES["average_past"].cases):
    """The exercise as it is, without asking for gradients."""
    return Exercise("", past_means, cases, (), ("a", "b", "c"))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: past_means(x).as_subclass(Stubborn),
        lambda x: torch.nn.Parameter(past_means(x)),
        lambda *arguments, **options: past_means(*arguments),
        torch.no_grad()(lambda x: past_means(x)),
    ],
)
def test_what_is_right_in_an_unusual_form_is_right(function):
    assert grade(average(), function).status == "solved"


def test_a_buffer_that_is_written_into_again_is_as_good_as_any_result():
    buffer = torch.empty(10_000)

    def average_past(x):
        return buffer[: x.numel()].view(x.shape).copy_(past_means(x))

    assert grade(average(), average_past).status == "solved"


def test_threads_may_compute():
    def average_past(x):
        results = []
        thread = threading.Thread(target=lambda: results.append(past_means(x)))
        thread.start()
        thread.join()
        return results[0]

    assert grade(average(), average_past).status == "solved"


def test_a_class_with_other_names_for_its_arguments_is_right_and_one_without_them_is_told():
    bigram = EXERCISES["Bigram"]

    class Bigram(bigram.reference):
        def __init__(self, number_of_tokens):
            super().__init__(number_of_tokens)

    class Forgetful(torch.nn.Module):
        def __init__(self):
            super().__init__()

    assert grade(bigram, Bigram).status == "solved"
    verdict = grade(bigram, Forgetful)
    assert verdict.kind == "crash" and "takes 1 positional argument" in verdict.message


def test_a_method_that_an_attribute_hides_is_told():
    class LossScaler:
        def __init__(self, scale=2.0**16, growth_interval=2000):
            self.scale = scale
            self.good_steps = 0

        def get_scale(self):
            return self.scale

        def scale(self, loss):
            return loss * self.scale

    verdict = grade(Week(7).exercises["LossScaler"], LossScaler)
    assert verdict.kind == "property" and "self.scale = float, has taken its place" in verdict.says


def test_what_a_broken_law_cut_off_is_not_said_to_be_missing():
    """One case breaks a law before the number is looked at; another has a wrong number."""

    def observed(answer, n):
        if answer(n) < 0:
            raise NotRight("it is below 0.")
        yield "the number", answer(n)

    exercise = made_up(lambda n: n, [(1,), (5,), (100,)], observe=observed)
    verdict = grade(exercise, lambda n: n if n == 1 else n - 50)
    assert "returned None" not in verdict.message and verdict.case.given == {"n": 100}


def test_one_number_that_agrees_with_a_mistake_by_chance_is_not_that_mistake():
    """A mistake that is wrong in more cases than the answer, and gives the same only in one of these."""
    cases = [(torch.ones(2),), (torch.tensor([1.0, -1.0]),)]

    def observed(answer, x):
        yield "a long name of what is seen", answer(x)

    def absolute(x):
        return x.sum().abs() + 1 if x.sum() == 0 else x.sum()

    def one_more(x):
        return x.sum() + 1

    mistakes = (Mistake("one more", one_more, "It is one more."),)
    exercise = made_up(lambda x: x.sum(), cases, mistakes=mistakes, observe=observed)
    assert grade(exercise, one_more).mistake == "one more"
    assert grade(exercise, absolute).mistake is None


def test_a_wrong_gradient_is_shown_and_named_where_it_is_known():
    def quotient(x, gate_weight, up_weight, down_weight):
        z = x @ gate_weight.T
        return (z / (1 + torch.exp(-z)) * (x @ up_weight.T)) @ down_weight.T

    known = EXERCISES["gated_mlp"]
    others = tuple(m for m in known.mistakes if m.name != "the gradient overflows")
    verdict = grade(known, quotient)
    assert (verdict.kind, verdict.mistake) == ("mistake", "the gradient overflows")
    assert verdict.case.what == "the gradient of x" and verdict.case.yours.isnan().any()
    assert verdict.case.expected.isfinite().all()
    verdict = grade(replace(known, mistakes=others), quotient)
    assert verdict.kind == "detached" and "the gradient of `x` is nan or infinite" in verdict.message


def test_a_changed_input_is_shown_small_before_and_after():
    def in_place(x, up_weight, down_weight):
        x += EXERCISES["mlp_sublayer"].reference(x, up_weight, down_weight) - x
        return x

    verdict = grade(EXERCISES["mlp_sublayer"], in_place)
    assert verdict.kind == "input" and verdict.case.what == "x after the call"
    assert torch.equal(verdict.case.expected, verdict.case.given["x"])
    assert not torch.equal(verdict.case.yours, verdict.case.given["x"])
    assert sum(value.numel() for value in verdict.case.given.values()) <= 10


def test_of_several_tensors_only_those_that_differ_are_shown():
    def without_scale(q, k, v, past_k, past_v):
        return EXERCISES["decode_step"].reference(3 * q, k, v, past_k, past_v)

    rows = [name for name, _ in grade(EXERCISES["decode_step"], without_scale).case.rows()]
    assert rows[-3:] == ["yours, item 0", "expected, item 0", "difference"]
