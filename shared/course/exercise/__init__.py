"""Week 0. Graded exercises: a learner's code is compared with a reference, by what it does.

In a notebook (a week's exercises live in its `exercises.py`):

    from shared.course.exercise import Week
    week = Week(1)
    week.task("count_pairs")           # what to write
    def count_pairs(tokens, vocab_size):
        ...
    week.check(count_pairs)            # solved, or what is wrong, with the smallest case that shows it
    week.hint("count_pairs")           # one more hint each time
    week.case("count_pairs")           # that case, to play with
    week.solution("count_pairs")       # once it is solved, or the hints are used up
    week.mine("count_pairs")           # hers, once it is solved, else the course's

On the command line `python -m shared.course.exercise 1` does the same (see `__main__.py`).
"""

from shared.course.exercise.definition import Exercise, Mistake, NotRight, random_int
from shared.course.exercise.grading import grade
from shared.course.exercise.verdict import Case, Verdict
from shared.course.exercise.week import Week, week_numbers

__all__ = [
    "Case",
    "Exercise",
    "Mistake",
    "NotRight",
    "Verdict",
    "Week",
    "grade",
    "random_int",
    "week_numbers",
]
