"""shared/alignment/shortcuts.py: how far one gets without a look at the target."""

import random

import pytest
import torch
from torch import nn

from shared.alignment.countdown import END, TOKENIZER, Countdown, Problem
from shared.alignment.shortcuts import (
    best_fixed_form,
    commonest_form,
    expression_forms,
    follows_target,
    solved_by,
)


def test_the_forms_of_three_numbers_are_all_of_them():
    """Orders times ways to cut (the Catalan number 2) times operators."""
    forms = list(expression_forms("abc"))
    assert len(forms) == len(set(forms)) == 6 * 2 * 4**2
    assert {"(a-b)*c", "c/(a+b)", "b-(c-a)"} <= set(forms)
    assert sorted(expression_forms("ab", "-")) == ["a-b", "b-a"]


def test_a_form_solves_a_problem_with_the_numbers_as_they_are_shown():
    problem = Problem((12, 3), 9)
    assert solved_by("a-b", problem) and not solved_by("b-a", problem)
    assert solved_by("b-a", problem.in_order)


def test_the_best_fixed_form_is_found_for_each_number_of_numbers():
    differences = [Problem((9, 4), 5), Problem((3, 8), 5), Problem((7, 2), 5), Problem((7, 2), 14)]
    sums = [Problem((2, 3, 4), 9), Problem((5, 4, 3), 12), Problem((5, 4, 3), 50)]
    best = best_fixed_form(differences + sums)
    assert best[2] == ("b-a, ascending", 3 / 4)
    assert best[3][1] == 2 / 3 and set(best[3][0].partition(",")[0]) <= set("abc()+")


@pytest.mark.slow
def test_no_fixed_form_solves_much_of_countdown():
    """Of two numbers four operators are equally frequent, so that one form solves a fourth at the least; what
    is above it is coincidence, as in 4/2 = 4-2.
    """
    rng = random.Random(7)
    problems = [Countdown().draw(rng, "test")[0] for _ in range(400)]
    best = best_fixed_form(problems)
    assert best[2][1] < 0.36 and best[3][1] < 0.17, best
    assert sum(sum(problem.numbers) == problem.target for problem in problems) / len(problems) < 0.18


def test_the_commonest_form_is_counted_by_operators_and_brackets():
    problems = [Problem((5, 7), 12), Problem((3, 8, 12), 60)]
    answers = [["5+7", "7+5", "7-5", "7"], ["12*(8-3)", "3*(12-8)", "8*(3-1)", "8-3*12"]]
    assert commonest_form(problems, answers) == (2 + 3) / 8


class Says(nn.Module):
    """Ends its answer at once, after a digit: the target's last, or always 1."""

    def __init__(self, looks: bool):
        super().__init__()
        self.looks = looks
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        after_target = ids == TOKENIZER.encode(":")[0]
        last = torch.roll(ids, 1, 1) if self.looks else torch.full_like(ids, TOKENIZER.encode("1")[0])
        said = torch.where(after_target, last, END)
        return nn.functional.one_hot(said, len(TOKENIZER.chars)).float()


@pytest.mark.parametrize(("looks", "share"), [(True, 1.0), (False, 0.0)])
def test_whether_answers_follow_the_target(looks, share):
    problems = [Problem((5, 7), 12), Problem((4, 8), 33), Problem((2, 3, 4), 9)]
    assert follows_target(Says(looks), problems, 4) == share
