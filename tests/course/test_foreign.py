"""The grader on answers that it was not made with: no wrong one is accepted, no right one refused."""

import importlib

import pytest
import torch

from shared.course.exercise import Week, grade
from tests.course.foreign import register

WEEKS = (*range(1, 7), 8)
SETS = ("foreign", "foreign.builds")
"""Functions, and classes and loops."""
NAMED = ("mistake", "property", "type", "input", "forbidden", "detached", "crash", "time")
"""Verdicts that say what is wrong; "differs" only shows that something is."""
GOAL = 0.8

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiler_imported():
    """The first use of the device meta imports PyTorch's compiler, for seconds."""
    with torch.device("meta"):
        torch.nn.Linear(1, 1)


def answers(chosen, number):
    """The wrong answers of a week with what is wrong, and the right ones."""
    module = f"tests.course.{chosen}.week_{number:02d}"
    importlib.import_module(module)
    wrong = [(answer, what) for answer, what in register.WRONG if answer.__module__ == module]
    return wrong, [answer for answer in register.RIGHT if answer.__module__ == module]


@pytest.mark.parametrize("number", WEEKS)
@pytest.mark.parametrize("chosen", SETS)
def test_no_strangers_right_answer_is_refused(chosen, number):
    exercises = Week(number).exercises
    _, right = answers(chosen, number)
    assert right
    for answer in right:
        verdict = grade(exercises[answer.__name__], answer)
        assert verdict.status == "solved", verdict.message


@pytest.mark.parametrize("chosen", SETS)
def test_most_strangers_wrong_answers_are_named_and_none_is_accepted(chosen, capsys):
    kinds = []
    for number in WEEKS:
        exercises = Week(number).exercises
        for answer, what in answers(chosen, number)[0]:
            verdict = grade(exercises[answer.__name__], answer)
            assert verdict.status == "wrong", (answer.__name__, what)
            assert not verdict.says.rstrip().endswith(":"), (answer.__name__, what)  # it says something
            kinds.append(verdict.kind)
    named = sum(kind in NAMED for kind in kinds)
    with capsys.disabled():
        share = f"{named} of {len(kinds)} ({named / len(kinds):.0%})"
        print(f"\n{chosen}: {share} of strangers' wrong answers are named")
    assert len(kinds) >= 90 and named / len(kinds) >= GOAL
