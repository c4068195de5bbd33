"""`python -m shared.course.exercise`: writes stubs, grades what is in their place, helps, makes a table."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from shared.course.exercise import Week, week
from shared.course.exercise import __main__ as command
from shared.runtime import ROOT
from tests.course.helpers import toy_week

RIGHT = "def double(x):\n    return x + x\n"
TRIPLED = "def double(x):\n    return x * 3\n"
MEMORISED = "def halve(n):\n    return {4: 2, 7: 3, 1000: 500}[n]\n"


def double(x):
    return x + x


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The exercises in a folder of their own, and the command working there."""
    for source in (ROOT / "weeks").glob("*/exercises.py"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    monkeypatch.setattr(week, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A week of two exercises, double (1 point) and halve (3 points)."""
    folder = toy_week(tmp_path)
    monkeypatch.setattr(week, "ROOT", tmp_path)
    return folder


@pytest.mark.parametrize("number", range(1, 13))
def test_the_command_writes_stubs_that_are_not_attempted(copy, capsys, number):
    command.main([str(number)])
    week = Week(number)
    count = len(week.exercises)
    shown = capsys.readouterr().out
    assert f"solutions.py with {count} stubs" in shown
    command.main(["week", str(number)])  # as it was spelled before
    shown = capsys.readouterr().out
    assert shown.count(": not attempted") == count
    assert f"of {count} exercises" in shown
    assert f": 0 solved, 0 wrong, {count} not attempted, 0 missing" in shown


def test_the_command_grades_what_is_there_and_its_summary_adds_up(toy, capsys):
    (toy / "solutions.py").write_text(TRIPLED, encoding="utf-8")
    command.main(["3"])
    shown = capsys.readouterr().out
    assert "three times" in shown and "halve: not in solutions.py" in shown
    assert shown.count(" wrong,") == 1 and "of 2 exercises" in shown
    assert ": 0 solved, 1 wrong, 0 not attempted, 1 missing" in shown
    (toy / "solutions.py").write_text(RIGHT, encoding="utf-8")
    command.main(["3"])
    assert ": 1 solved, 0 wrong, 0 not attempted, 1 missing" in capsys.readouterr().out
    assert Week(3).solved() == ["double"]


def test_what_was_solved_elsewhere_is_counted_by_itself(toy, capsys):
    Week(3).check(lambda n: n // 2, "halve")
    (toy / "solutions.py").write_text(RIGHT, encoding="utf-8")
    command.main(["3"])
    assert "With those that you solved elsewhere, in the notebook, 2 are solved." in capsys.readouterr().out


def test_a_renamed_function_is_recognised(toy, capsys):
    (toy / "solutions.py").write_text(RIGHT.replace("double", "doubel"), encoding="utf-8")
    command.main(["3"])
    shown = capsys.readouterr().out
    assert "double: not in solutions.py; is it doubel? The exercise's name is wanted" in shown


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = 1\ndef double(x:\n", "solutions.py is no Python, line 2: def double"),
        ("import nothing_of_that_name\n", "solutions.py does not run: ModuleNotFoundError"),
    ],
)
def test_a_file_that_does_not_run_is_named_with_its_line(toy, text, words):
    (toy / "solutions.py").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        command.main(["3"])


@pytest.mark.parametrize(
    "argv", [[], ["week"], ["week", "one"], ["lesson", "1"], ["task"], ["3", "4"], ["--help"]]
)
def test_wrong_arguments_say_what_is_right(argv):
    with pytest.raises(ValueError, match=r"python -m shared.course.exercise 3\), or one of task, hint, case"):
        command.main(argv)


def test_a_misspelled_exercise_is_guessed(toy):
    with pytest.raises(ValueError, match="no week has an exercise 'dubble'; do you mean double"):
        command.main(["task", "dubble"])
    with pytest.raises(ValueError, match="no week has an exercise 'zzz'; there are: double, halve"):
        command.main(["hint", "zzz"])
    with pytest.raises(ValueError, match="'--now' is not understood here; there is --reveal"):
        command.main(["solution", "double", "--now"])


def test_task_hints_case_and_solution(toy, capsys):
    command.main(["task", "double"])
    assert "Double every number" in (shown := capsys.readouterr().out) and "def double(x" in shown
    command.main(["solution", "double"])
    assert "0 of 3 hints are used" in (shown := capsys.readouterr().out) and "x + x" not in shown
    command.main(["case", "double"])
    assert "expected" in (shown := capsys.readouterr().out) and "yours" not in shown
    for hint in ("add", "x + x", "return x + x"):
        command.main(["hint", "double"])
        assert capsys.readouterr().out.endswith(f"of 3: {hint}\n")
    command.main(["solution", "double"])
    assert "Adding a number to itself doubles it." in (shown := capsys.readouterr().out)
    assert "return x + x" in shown
    command.main(["solution", "halve", "--reveal"])
    assert "return n >> 1" in capsys.readouterr().out


def test_the_case_is_the_one_that_the_file_fails(toy, capsys):
    (toy / "solutions.py").write_text(TRIPLED, encoding="utf-8")
    command.main(["case", "double"])
    assert "yours" in (shown := capsys.readouterr().out) and "difference" in shown


# ---- a teacher's table


def rows(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_teachers_table_has_a_row_for_each_exercise(toy, tmp_path, capsys):
    for student, text in (("ada", RIGHT + "\n\ndef halve(n):\n    return n // 2\n"), ("bob", TRIPLED)):
        folder = tmp_path / student / "03_toy"
        folder.mkdir(parents=True)
        (folder / "solutions.py").write_text(text, encoding="utf-8")
    command.main(["grade", "--json", "--solutions", str(tmp_path / "ada")])
    ada = rows(capsys)
    assert [row["exercise"] for row in ada] == ["double", "halve"]
    assert [(row["status"], row["points"], row["of"]) for row in ada] == [("solved", 1, 1), ("solved", 3, 3)]
    command.main(["grade", "--json", "--solutions", str(tmp_path / "bob")])
    bob = rows(capsys)
    assert [(row["status"], row["points"]) for row in bob] == [("wrong", 0), ("not attempted", 0)]
    assert bob[0]["kind"] == "mistake" and "three times" in bob[0]["says"]
    command.main(["grade", "--solutions", str(tmp_path / "ada")])
    assert capsys.readouterr().out.splitlines()[-1] == "4 of 4 points"
    assert Week(3).solved() == []  # nothing is kept


def test_a_teachers_table_takes_kept_answers_another_seed_and_broken_files(toy, tmp_path, capsys):
    Week(3).check(double)
    capsys.readouterr()
    command.main(["grade", "3", "--json", "--seed", "12345"])
    assert [row["points"] for row in rows(capsys)] == [1, 0]
    folder = tmp_path / "eve" / "03_toy"
    folder.mkdir(parents=True)
    (folder / "solutions.py").write_text("def double(x:\n", encoding="utf-8")
    command.main(["grade", "--json", "--solutions", str(tmp_path / "eve")])
    eve = rows(capsys)
    assert [row["status"] for row in eve] == ["wrong", "wrong"] and "no Python, line 1" in eve[0]["says"]


def test_printing_does_not_come_between_the_rows(toy, tmp_path, capsys):
    folder = tmp_path / "ada" / "03_toy"
    folder.mkdir(parents=True)
    text = "print('loading')\ndef double(x):\n    print(x)\n    return x + x\n"
    (folder / "solutions.py").write_text(text, encoding="utf-8")
    command.main(["grade", "--json", "--solutions", str(tmp_path / "ada")])
    assert [row["points"] for row in rows(capsys)] == [1, 0]


@pytest.mark.slow
def test_the_command_line_itself(copy, answers_folder):
    """In a copy of the package: one exercise solved, one mistaken, the rest stubs."""
    shutil.copytree(ROOT / "shared", copy / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "weeks" / "01_bigram" / "solutions.py"
    command.main(["1"])
    text = path.read_text(encoding="utf-8")
    bodies = {
        "row_probabilities": "    return (counts + smoothing) / (counts + smoothing).sum(dim=1)\n",
        "temperature_probabilities": "    return F.softmax(logits / temperature, dim=-1)\n",
    }
    stub = "    # your code here\n    ...\n"
    for name, body in bodies.items():
        head, definition, rest = text.partition(f"def {name}(")
        text = head + definition + rest.replace(stub, body, 1)
    path.write_text(text, encoding="utf-8")
    count = len(Week(1).exercises)
    line = [sys.executable, "-m", "shared.course.exercise", "1"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    graded = subprocess.run(line, cwd=copy, env=environment, capture_output=True, text=True)
    assert graded.returncode == 0, graded.stderr
    assert "keepdim forgotten" in graded.stdout and "temperature_probabilities: solved" in graded.stdout
    assert graded.stdout.count(": not attempted") == count - 2
    assert f"1 solved, 1 wrong, {count - 2} not attempted, 0 missing" in graded.stdout
    kept = sorted(path.name for path in (answers_folder / "01_bigram").iterdir())
    assert kept == ["temperature_probabilities.json", "temperature_probabilities.py"]
    assert path.read_text(encoding="utf-8") == text
