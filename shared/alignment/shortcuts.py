"""Week 10. What a policy may have learned instead of solving: answers that do not look at the target.

A task can have a cheap way to a reward that nothing can fool. Here: how many problems one fixed form of
expression solves, how much of a policy's answers is of one form, and whether they change with the target.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from shared.alignment.countdown import PRECEDENCE, Problem, judge, solve

PLACES = "abcdef"
"""The names of a problem's numbers in a form."""


def expression_forms(places: str, operators: str = "".join(PRECEDENCE)) -> Iterator[str]:
    """All expressions of these places, in all their orders: `a-b`, `b-a`, `(a-b)*c` and so on."""
    for order in itertools.permutations(places):
        yield from _in_order(order, operators)


def _in_order(places: Sequence[str], operators: str) -> Iterator[str]:
    if len(places) == 1:
        yield places[0]
        return
    for cut in range(1, len(places)):
        for left in _in_order(places[:cut], operators):
            for right in _in_order(places[cut:], operators):
                yield from (f"{_bracketed(left)}{operator}{_bracketed(right)}" for operator in operators)


def _bracketed(form: str) -> str:
    return form if len(form) == 1 else f"({form})"


def solved_by(form: str, problem: Problem) -> bool:
    """Whether a form, with the problem's numbers at their places, solves it: `a` is the first of them."""
    numbers = dict(zip(PLACES, map(str, problem.numbers)))
    return judge(problem, "".join(numbers.get(character, character) for character in form)).right


def best_fixed_form(problems: Sequence[Problem]) -> dict[int, tuple[str, float]]:
    """How far one gets who never looks at the target: for each number of numbers the one form that solves
    most of these problems, and what share of them.

    Of all forms the best is taken, with the numbers in the order in which they are shown or in ascending
    order (said behind it). It is chosen on these very problems, so it flatters itself.
    """
    best = {}
    for size in sorted({len(problem.numbers) for problem in problems}):
        own = [problem for problem in problems if len(problem.numbers) == size]
        counts: Counter[str] = Counter()
        for order, ordered in (("as shown", own), ("ascending", [problem.in_order for problem in own])):
            for form in expression_forms(PLACES[:size]):
                counts[f"{form}, {order}"] = sum(solved_by(form, problem) for problem in ordered)
        form, solved = counts.most_common(1)[0]
        best[size] = form, solved / len(own)
    return best


def commonest_form(problems: Sequence[Problem], answers: Sequence[Sequence[str]]) -> float:
    """The share of answers whose operators and brackets are the commonest for their number of numbers."""
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for problem, own in zip(problems, answers):
        counts[len(problem.numbers)].update(re.sub(r"\d+", "n", answer) for answer in own)
    total = sum(counter.total() for counter in counts.values())
    return sum(counter.most_common(1)[0][1] for counter in counts.values()) / total


def follows_target(policy: nn.Module, problems: Sequence[Problem], max_new_tokens: int) -> float:
    """The share of problems to which the policy's likeliest answer changes when the numbers are kept and the
    target is another: that of the next problem with as many numbers and another target.
    """
    changed = [replace(problem, target=_other_target(i, problems)) for i, problem in enumerate(problems)]
    before, after = (solve(policy, own, 1, max_new_tokens, 0, temperature=0) for own in (problems, changed))
    return sum(one != other for one, other in zip(before, after)) / len(problems)


def _other_target(i: int, problems: Sequence[Problem]) -> int:
    """Where there is no such problem, one more than its own."""
    own = problems[i]
    for other in (*problems[i + 1 :], *problems[:i]):
        if len(other.numbers) == len(own.numbers) and other.target != own.target:
            return other.target
    return own.target + 1
