"""`python -m shared.course.exercise week N`: writes stubs, and grades what is in their place."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from shared.course import exercise as grader
from shared.course.exercise import Week
from shared.runtime import ROOT


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The exercises in a folder of their own, and the grader working there."""
    for source in (ROOT / "weeks").glob("*/exercises.py"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    monkeypatch.setattr(grader, "ROOT", tmp_path)
    monkeypatch.setattr(Week.__init__, "__defaults__", (tmp_path / "progress.json",))
    return tmp_path


@pytest.mark.parametrize("number", range(1, 13))
def test_the_command_writes_stubs_that_are_not_attempted(copy, capsys, number):
    grader.main(["week", str(number)])
    shown = capsys.readouterr().out
    count = len(Week(number).exercises)
    assert f"wrote weeks/{Week(number).folder.name}/solutions.py with {count} stubs" in shown
    assert shown.count("not attempted") == count
    assert f"week {number}: 0 of {count} solved" in shown


def test_the_command_grades_what_is_there(copy, capsys):
    path = copy / "weeks" / "03_attention" / "solutions.py"
    body = "    return x.view(x.size(0), x.size(1), n_head, -1).transpose(1, 2)\n"
    path.write_text(f"def split_heads(x, n_head):\n{body}")
    grader.main(["week", "3"])
    shown = capsys.readouterr().out
    assert "split_heads: solved" in shown and "average_past: not in solutions.py" in shown
    assert "week 3: 1 of 9 solved" in shown


def test_a_file_that_does_not_run_is_named(copy):
    (copy / "weeks" / "03_attention" / "solutions.py").write_text("def split_heads(x, n_head:\n")
    with pytest.raises(ValueError, match="weeks/03_attention/solutions.py does not run: SyntaxError"):
        grader.main(["week", "3"])


@pytest.mark.parametrize("argv", [[], ["week"], ["week", "one"], ["lesson", "1"]])
def test_wrong_arguments_say_what_is_right(argv):
    with pytest.raises(ValueError, match="python -m shared.course.exercise week N"):
        grader.main(argv)


@pytest.mark.slow
def test_the_command_line_itself(copy):
    """In a copy of the package: one exercise solved, one mistaken, the rest stubs."""
    shutil.copytree(ROOT / "shared", copy / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "weeks" / "01_bigram" / "solutions.py"
    grader.main(["week", "1"])
    text = path.read_text()
    bodies = {
        "row_probabilities": "    return (counts + smoothing) / (counts + smoothing).sum(dim=1)\n",
        "temperature_probabilities": "    return F.softmax(logits / temperature, dim=-1)\n",
    }
    stub = "    # your code here\n    ...\n"
    for name, body in bodies.items():
        head, definition, rest = text.partition(f"def {name}(")
        text = head + definition + rest.replace(stub, body, 1)
    path.write_text(text)
    command = [sys.executable, "-m", "shared.course.exercise", "week", "1"]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    graded = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert graded.returncode == 0, graded.stderr
    assert "keepdim forgotten" in graded.stdout and "temperature_probabilities: solved" in graded.stdout
    assert graded.stdout.count("not attempted") == 4 and "week 1: 1 of 6 solved" in graded.stdout
    assert json.loads((copy / "weeks" / ".progress.json").read_text()) == {"1": ["temperature_probabilities"]}
    assert path.read_text() == text
