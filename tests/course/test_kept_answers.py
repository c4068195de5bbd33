"""What is solved is kept, outside the checkout, as a file that defines the answer and all that it needs."""

import functools
import json
import math
import math as m
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.course.exercise import Week, grade, week
from shared.course.exercise.answers import NotKeptError, Shelf, load_module, module_source, source_of
from shared.runtime import ROOT
from tests.course.helpers import made_up, normal, toy_week

SCALE = 2
NAMES = {"a": [1, 2.5, (None, True)], "b": "text"}
INFINITE = math.inf
TABLE = torch.ones(2, 2)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A week of two exercises, and nobody's answers."""
    folder = toy_week(tmp_path)
    monkeypatch.setattr(week, "ROOT", tmp_path)
    monkeypatch.setattr(week, "EARLIER", tmp_path / "weeks" / ".progress.json")
    return folder


# ---- the source of an answer


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def with_helper(x: Tensor) -> Tensor:
    return helper(x)


def with_aliases(x):
    return x * m.sqrt(4) + float(np.zeros(1)[0]) * F.relu(x)


def with_constants(x):
    return x * len(NAMES["a"]) - x * (NAMES["b"] == "text")


def with_import(x):
    import math as mathematics

    return x * mathematics.sqrt(4)


def tripled_less_one(function):
    @functools.wraps(function)
    def changed(x):
        return function(x) - x

    return changed


@tripled_less_one
def decorated(x):
    return x * 3


@torch.no_grad()
def decorated_by_a_library(x):
    return x + x


named_lambda = lambda x: x + helper(x) / 2  # noqa: E731  what learners write


def recursive(x, times=2):
    return x if times == 1 else x + recursive(x, times - 1)


class Doubler(nn.Module):
    def forward(self, x):
        return helper(x)


def with_a_class(x):
    return Doubler()(x)


class Twice(torch.autograd.Function):
    """Its methods are all static."""

    @staticmethod
    def forward(ctx, x):
        return helper(x)

    @staticmethod
    def backward(ctx, grad):
        return helper(grad)


def with_an_autograd_function(x):
    return Twice.apply(x)


RIGHT = [
    helper,
    with_helper,
    with_aliases,
    with_constants,
    with_import,
    decorated,
    decorated_by_a_library,
    named_lambda,
    recursive,
    with_a_class,
    with_an_autograd_function,
]
DOUBLE = made_up(lambda x: x * 2, normal((2, 3)))


@pytest.mark.parametrize("answer", RIGHT, ids=lambda f: f.__name__)
def test_a_kept_answer_is_still_right_when_it_is_loaded(answer, tmp_path):
    assert grade(DOUBLE, answer).status == "solved"
    path = tmp_path / "double.py"
    path.write_text(module_source("double", answer), encoding="utf-8")
    loaded = load_module(path, "answer_double").double
    assert grade(DOUBLE, loaded).status == "solved" and loaded is not answer


CELL = """
import torch
from torch import nn, relu as positive_part

SCALE = 2


def helper(x):
    return positive_part(x) * SCALE


class Doubler(nn.Module):
    def forward(self, x):
        return helper(x) - helper(-x)
"""


def test_a_class_of_a_notebook_is_kept_with_what_it_uses(tmp_path):
    cell = tmp_path / "cell.py"
    cell.write_text(CELL, encoding="utf-8")
    space = {"__name__": "__main__"}
    exec(compile(CELL, cell, "exec"), space)
    source = module_source("Doubler", space["Doubler"])
    assert "def helper" in source and "SCALE = 2" in source and "relu as positive_part" in source
    path = tmp_path / "Doubler.py"
    path.write_text(source, encoding="utf-8")
    module = load_module(path, "answer_Doubler").Doubler()
    assert torch.equal(module(torch.tensor([1.0, -3.0])), torch.tensor([2.0, -6.0]))


@pytest.mark.slow
def test_a_kept_answer_runs_in_a_fresh_interpreter(toy, tmp_path, answers_folder):
    def double(x):
        return with_helper(x) + 0 * F.relu(x)

    Week(3).check(double)
    code = (
        "import torch; from shared.course.exercise.answers import Shelf;"
        " print(Shelf('03_toy').load('double')(torch.tensor([1.5, -2.0])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[3.0, -4.0]\n", done.stderr


def reads_a_tensor(x):
    return x @ TABLE


def reads_infinity(x):
    return x.clamp(max=INFINITE) * 2


def reads_nothing_known(x):
    return x * unknown  # noqa: F821


@pytest.mark.parametrize(
    "answer, words",
    [
        (reads_a_tensor, "it uses `TABLE`, a Tensor of the notebook"),
        (reads_infinity, "it uses `INFINITE`, a float of the notebook"),
        (reads_nothing_known, "it uses `unknown`, which is not defined"),
        (functools.partial(torch.mul, 2), "the source of `double` cannot be found"),
        (torch.mul, "the source of `double` cannot be found"),
    ],
)
def test_what_no_file_can_hold_is_named(answer, words):
    with pytest.raises(NotKeptError, match=words):
        module_source("double", answer)


def test_a_week_object_is_written_as_one(toy, tmp_path):
    space = {"week": Week(3)}
    path = tmp_path / "cell.py"
    path.write_text("def double(x):\n    return week.find('double').reference(x)\n", encoding="utf-8")
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), space)
    source = module_source("double", space["double"])
    assert "from shared.course.exercise import Week\n" in source and "week = Week(3)\n" in source


def test_the_source_of_a_cell_with_a_magic_line_is_found(tmp_path):
    path = tmp_path / "cell.py"
    code = "def double(x):\n    return x + x\n"
    path.write_text(f"%time\n!ls\n{code}", encoding="utf-8")
    space = {}
    exec(compile("\n\n" + code, path, "exec"), space)
    assert source_of(space["double"]) == code.rstrip("\n")


# ---- what a week remembers


def double(x):
    return x + x


def test_it_can_be_lost_and_says_so(toy, capsys):
    toy = Week(3)
    toy.check(double)
    assert "solved" in capsys.readouterr().out and toy.solved() == ["double"]
    toy.check(lambda x: x * 3, "double")
    shown = capsys.readouterr().out
    assert "three times" in shown and "It was solved before, and now is not." in shown
    assert str(toy.shelf.file("double")) in shown and toy.shelf.file("double").exists()
    assert toy.solved() == [] and toy.mine("double") is toy.find("double").reference


def test_an_untouched_stub_does_not_take_the_mark_away(toy, capsys):
    Week(3).check(double)
    fresh = Week(3)
    space = {"torch": torch}
    exec(fresh.find("double").stub, space)
    fresh.check(space["double"])
    assert "it stays solved" in capsys.readouterr().out and fresh.solved() == ["double"]


def test_mine_is_the_courses_before_and_the_learners_after(toy, capsys):
    own = Week(3)
    assert own.mine("double") is own.find("double").reference
    own.check(double)
    capsys.readouterr()
    assert own.mine("double") is double and capsys.readouterr().out == "double: yours\n"
    kept = Week(3).mine("double")
    assert kept is not double and torch.equal(kept(torch.ones(2)), torch.full((2,), 2.0))
    assert capsys.readouterr().out == "double: yours, as you solved it before\n"


@pytest.mark.parametrize(
    "text, words",
    [("def double(x:\n", "is no Python"), ("1 / 0\n", "ZeroDivisionError"), ("", "does not define")],
)
def test_a_kept_file_that_no_longer_runs_gives_way_to_the_courses(toy, capsys, text, words):
    Week(3).check(double)
    again = Week(3)
    again.shelf.file("double").write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert again.mine("double") is again.find("double").reference
    assert "the course's (" in (shown := capsys.readouterr().out) and words in shown


def test_what_cannot_be_kept_counts_all_the_same(toy, capsys):
    Week(3).check(functools.partial(torch.mul, 2), "double")
    assert "It counts, but it cannot be kept for later" in capsys.readouterr().out
    again = Week(3)
    assert again.solved() == ["double"] and again.mine("double") is again.find("double").reference


def test_two_objects_of_a_week_see_the_same_answers(toy):
    one, other = Week(3), Week(3)
    one.check(double)
    assert other.solved() == ["double"] and other.mine("double")(torch.ones(1)) == 2
    other.check(lambda x: x, "double")
    assert one.solved() == []


def test_an_answer_is_checked_by_the_name_that_it_is_bound_to(toy, capsys):
    class Halver:
        def __call__(self, n):
            return n // 2

    own = Week(3)
    space = {"own": own, "Halver": Halver, "double": None}
    exec("halve = Halver()\nown.check(halve)\ndouble = lambda x: 2 * x\nown.check(double)", space)
    assert own.solved() == ["double", "halve"]
    with pytest.raises(ValueError, match="'<lambda>'.*checked with it"):
        own.check(lambda x: x)
    with pytest.raises(ValueError, match=r"without calling it, and this is Tensor: week.check\(double\)"):
        own.check(torch.ones(1))


def test_a_case_is_the_failing_one_and_a_copy_each_time(toy):
    own = Week(3)
    before = own.case("double")
    assert before.yours is None and torch.equal(before.expected, before.given["x"] * 2)
    own.check(lambda x: x * 2 + 1, "double")
    failing = own.case("double")
    assert failing.yours is not None
    (x,) = failing.arguments
    x.fill_(9)
    assert not torch.equal(own.case("double").arguments[0], x)
    own.check(double)
    assert own.case("double").yours is None


def test_progress_of_before_counts_until_it_is_checked_again(toy, monkeypatch, tmp_path):
    monkeypatch.delenv("LLM_WEEKS_ANSWERS")
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    earlier = tmp_path / "weeks" / ".progress.json"
    earlier.write_text(json.dumps({"3": ["halve"], "4": ["layer_norm"]}), encoding="utf-8")
    own = Week(3)
    assert own.solved() == ["halve"]
    assert json.loads(earlier.read_text(encoding="utf-8")) == {"4": ["layer_norm"]}  # read once, moved over
    assert own.mine("halve") is own.find("halve").reference
    own.check(lambda n: n, "halve")
    assert Week(3).solved() == []


def test_progress_of_before_stays_where_answers_lie_elsewhere(toy, tmp_path):
    earlier = tmp_path / "weeks" / ".progress.json"
    earlier.write_text(json.dumps({"3": ["halve"]}), encoding="utf-8")
    assert Week(3).solved() == [] and earlier.exists()


def test_the_last_week_of_the_old_file_takes_it_along(tmp_path):
    earlier = tmp_path / ".progress.json"
    earlier.write_text(json.dumps({"3": ["halve"]}), encoding="utf-8")
    Shelf("03_toy", tmp_path / "answers").adopt(earlier, "3")
    assert not earlier.exists() and Shelf("03_toy", tmp_path / "answers").is_solved("halve")
