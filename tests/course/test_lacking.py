"""Exercises that a machine cannot grade, and what is no empty stub though it returns only a text."""

from dataclasses import replace

import pytest

from shared.course.exercise import Week, grade
from shared.course.exercise.definition import is_empty
from tests.course.answers import OTHER_ANSWERS

WEEK = Week(1)
NAME = next(iter(WEEK.exercises))
RIGHT = OTHER_ANSWERS[NAME]


def _a_text():
    return "a text"


def _a_documented_text():
    """Some words."""
    return "a text"


@pytest.mark.parametrize("function", [_a_text, _a_documented_text, lambda: "a text"])
def test_a_function_that_returns_a_text_is_not_empty(function):
    assert not is_empty(function)


@pytest.mark.parametrize("answer", [RIGHT, _a_text], ids=["right", "wrong"])
def test_what_this_machine_cannot_grade_is_not_attempted_and_that_is_said(answer, monkeypatch):
    def no_compiler() -> str:
        return "there is no C compiler here."

    exercise = replace(WEEK.exercises[NAME], lacks=no_compiler)
    verdict = grade(exercise, answer)
    assert verdict.status == "not attempted" and verdict.mistake is None and verdict.case is None
    assert "not graded on this machine: there is no C compiler here." in verdict.message
    monkeypatch.setitem(WEEK.exercises, NAME, exercise)
    with pytest.raises(ValueError, match=f"{NAME} has no case to show on this machine: there is no C"):
        WEEK.case(NAME)
    assert grade(replace(exercise, lacks=lambda: None), RIGHT).status == "solved"
