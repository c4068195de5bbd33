"""The exercises of weeks 1 to 12: each has enough in it, and its answers, right and wrong, are told apart."""

import inspect
from dataclasses import replace

import pytest
import torch

from shared.course.exercise import Week, grade
from shared.course.exercise.__main__ import ALSO_IMPORTED, SOLUTIONS_HEAD
from shared.course.exercise.answers import load_module
from shared.course.exercise.comparison import same
from shared.runtime import ROOT
from tests.course.answers import OTHER_ANSWERS

WEEKS = range(1, 13)
SEEDS = (0, 1, 2, 3)
EXERCISES = {e.name: e for n in WEEKS for e in Week(n).exercises.values()}
MISTAKES = [(e.name, mistake) for e in EXERCISES.values() for mistake in e.mistakes]
ALL = pytest.mark.parametrize("name", EXERCISES)


# ---- what is in them


@pytest.mark.parametrize("number", WEEKS)
def test_a_week_has_enough(number):
    exercises = Week(number).exercises
    assert len(exercises) >= 5
    for e in exercises.values():
        assert len(e.mistakes) >= 3 and len(e.hints) == 3, e.name
        assert len({m.name for m in e.mistakes}) == len(e.mistakes), e.name
        assert len(set(e.hints)) == 3, e.name
        assert 5 <= len(e.cases(torch.Generator().manual_seed(0))) <= 12, e.name
        for text in (e.task, *e.hints, *(m.why for m in e.mistakes)):
            end = ".?)]:" if text in e.hints else ".?"  # a hint may end in code
            assert text.strip() == text and text[-1] in end, (e.name, text)


def test_no_name_occurs_twice():
    assert sum(len(Week(n).exercises) for n in WEEKS) == len(EXERCISES)


@ALL
def test_stubs_run_and_are_not_attempted(name):
    namespace = {}
    exec("\n".join([SOLUTIONS_HEAD, *ALSO_IMPORTED.values()]), namespace)
    stub = EXERCISES[name].stub
    exec(stub, namespace)  # the names that solutions.py imports are enough for the signature
    assert grade(EXERCISES[name], namespace[name], source=stub).status == "not attempted"
    if inspect.isclass(EXERCISES[name].reference):
        return
    parameters = inspect.signature(EXERCISES[name].reference).parameters.values()
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)


@ALL
def test_cases_are_the_same_for_a_seed(name):
    def cases(seed):
        return [tuple(case) for case in EXERCISES[name].cases(torch.Generator().manual_seed(seed))]

    assert same(cases(5), cases(5), 0)
    assert not same(cases(5), cases(6), 0)


# ---- the right answers and the wrong ones


@ALL
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_solves_it(name, seed):
    """But for the calls that a task forbids: a reference may be the course's own function."""
    exercise = replace(EXERCISES[name], forbids=())
    assert grade(exercise, exercise.reference, seed).status == "solved"


@pytest.mark.slow
@pytest.mark.parametrize("name, mistake", MISTAKES, ids=lambda p: getattr(p, "name", p))
def test_a_mistake_is_recognised(name, mistake):
    for seed in SEEDS:
        verdict = grade(EXERCISES[name], mistake.function, seed)
        assert (verdict.status, verdict.mistake) == ("wrong", mistake.name), seed
        assert mistake.name in verdict.message and mistake.why in verdict.message


def clean_answers() -> dict:
    """What the weeks' answers.py show as solutions, by the name of the exercise."""
    answers = {}
    for path in sorted((ROOT / "weeks").glob("*/answers.py")):
        module = load_module(path, f"answers_{path.parent.name}")
        for name in Week(int(path.parent.name[:2])).exercises:
            answers[name] = getattr(module, name)
    return answers


CLEAN_ANSWERS = clean_answers()


def test_every_exercise_has_another_answer():
    assert OTHER_ANSWERS.keys() <= EXERCISES.keys()
    assert OTHER_ANSWERS.keys() | CLEAN_ANSWERS.keys() == EXERCISES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_ANSWERS)
def test_another_right_answer_solves_it(name):
    """But for the calls that a task forbids: some answers are the promoted code's."""
    exercise = replace(EXERCISES[name], forbids=())
    for seed in SEEDS[:2]:
        verdict = grade(exercise, OTHER_ANSWERS[name], seed)
        assert verdict.status == "solved", verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("name", CLEAN_ANSWERS)
def test_a_clean_answer_solves_it_and_can_be_shown(name):
    assert inspect.getdoc(CLEAN_ANSWERS[name])
    for seed in SEEDS:
        verdict = grade(EXERCISES[name], CLEAN_ANSWERS[name], seed)
        assert verdict.status == "solved", verdict.message
    number = next(n for n in WEEKS if name in Week(n).exercises)
    why, source = Week(number).solution_of(EXERCISES[name])
    assert why and "    ...\n" not in source and f" {name}" in source


def test_a_loss_that_can_neither_overflow_nor_underflow_is_right():
    def token_loss(logits, targets):
        shifted = logits - logits.max(-1, keepdim=True).values
        log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
        return -log_p.gather(-1, targets.unsqueeze(-1)).mean()

    assert grade(EXERCISES["token_loss"], token_loss).status == "solved"


def test_a_loss_that_cannot_overflow_but_rounds_to_zero_is_a_known_mistake():
    def token_loss(logits, targets):
        powers = (logits - logits.max(-1, keepdim=True).values).exp()
        p = powers / powers.sum(-1, keepdim=True)
        return -p.gather(-1, targets.unsqueeze(-1)).log().mean()

    assert grade(EXERCISES["token_loss"], token_loss).mistake == "the logarithm of a probability"
