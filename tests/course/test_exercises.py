"""The exercises of weeks 1 to 12: each has enough in it, and its answers, right and wrong, are told apart."""

import inspect
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from shared.course.exercise import Week, grade
from shared.course.exercise.__main__ import ALSO_IMPORTED, SOLUTIONS_HEAD
from shared.course.exercise.answers import load_module
from shared.course.exercise.comparison import same
from shared.course.exercise.verdict import as_html
from shared.runtime import ROOT
from tests.course.answers import OTHER_ANSWERS

WEEKS = range(1, 13)
SEEDS = (0, 1, 2, 3)
EXERCISES = {e.name: e for n in WEEKS for e in Week(n).exercises.values()}
MISTAKES = [(e.name, mistake) for e in EXERCISES.values() for mistake in e.mistakes]
ALL = pytest.mark.parametrize("name", EXERCISES)


@pytest.fixture
def gradable():
    """Skips a test, with the reason, where this machine cannot grade the exercise."""

    def check(exercise) -> None:
        if exercise.lacking:
            pytest.skip(exercise.lacking)

    return check


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


class _Seen(HTMLParser):
    """What a reader sees of HTML, and its tags."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("number", WEEKS)
def test_drawn_as_it_is_written(number):
    """Markdown takes nothing from a text: no ** of a power, no __ of a name, no \\, of a formula; and it
    takes no indented paragraph for code.
    """
    week = Week(number)
    for e in week.exercises.values():
        for text in (*e.hints, *(m.why for m in e.mistakes)):
            assert _Seen(as_html(text)).text.split() == text.replace("`", "").split(), e.name
        task = _Seen(week._task(e)[1])
        assert task.tags <= {"div", "p", "code", "em", "ul", "ol", "li"}, e.name
        for part in re.findall(r"`[^`]+`|\$[^$`]+\$", " ".join(e.task.split())):
            assert part.strip("`") in task.text, e.name


def test_lists_and_formulas_in_a_task():
    task = """Give $x_1 \\cdot x_2$ and
    $\\sqrt{2\\, n\\_x}$ of

    - the first, which goes on
      here;
    - the second, `a * b * c`.

    The end."""
    week = Week(1)
    plain, html = week._task(replace(EXERCISES["count_pairs"], task=task, forbids=(), stub="def f(): ..."))
    lines = [
        "Give $x_1 \\cdot x_2$ and $\\sqrt{2\\, n\\_x}$ of",
        "",
        "- the first, which goes on here;",
        "- the second, `a * b * c`.",
        "",
        "The end.",
        "",
        "def f(): ...",
    ]
    assert plain.split("\n") == lines
    assert "<p>Give $x_1 \\cdot x_2$ and $\\sqrt{2\\, n\\_x}$ of</p>" in html
    assert "<li>the first, which goes on here;</li>\n<li>the second, <code>a * b * c</code>.</li>" in html
    assert "$3 and <code>$5</code>" in as_html("$3 and `$5`")  # no formula reaches into code


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
def test_the_reference_solves_it(name, seed, gradable):
    """But for the calls that a task forbids: a reference may be the course's own function."""
    gradable(EXERCISES[name])
    exercise = replace(EXERCISES[name], forbids=())
    assert grade(exercise, exercise.reference, seed).status == "solved"


@pytest.mark.slow
@pytest.mark.parametrize("name, mistake", MISTAKES, ids=lambda p: getattr(p, "name", p))
def test_a_mistake_is_recognised(name, mistake, gradable):
    gradable(EXERCISES[name])
    for seed in SEEDS[:2]:
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
def test_another_right_answer_solves_it(name, gradable):
    """But for the calls that a task forbids: some answers are the promoted code's."""
    gradable(EXERCISES[name])
    exercise = replace(EXERCISES[name], forbids=())
    for seed in SEEDS[:2]:
        verdict = grade(exercise, OTHER_ANSWERS[name], seed)
        assert verdict.status == "solved", verdict.message


@pytest.mark.slow
@pytest.mark.parametrize("name", CLEAN_ANSWERS)
def test_a_clean_answer_solves_it_and_can_be_shown(name, gradable):
    gradable(EXERCISES[name])
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
