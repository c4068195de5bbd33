"""What a notebook shows: HTML with plain text beside it, the status in words, hints that open."""

import sys

import nbformat
import pytest
from nbclient import NotebookClient

from shared.runtime import ROOT
from tests.course.helpers import toy_week

START = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from shared.course.exercise import Week, week as module
module.ROOT = Path.cwd()
week = Week(3)
"""
CELLS = [
    START,
    'week.task("double")',
    "def double(x):\n    # your code here\n    ...\n",
    "week.check(double)",
    "week.check(lambda x: x * 3, 'double')",
    'case = week.case("double")\ncase',
    "def double(x):\n    return x + x\n\n\nweek.check(double)",
    'week.hint("halve")',
    'week.solution("halve")',
    'print(week.mine("double") is double, week.mine("halve") is double)',
    "print(week.shelf.file('double').read_text())",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each of the cells gave."""
    root = tmp_path_factory.mktemp("repository")
    toy_week(root)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root)}})
    client.execute()
    return [cell.outputs for cell in notebook.cells]


def shown(outputs, cell):
    """The text and the HTML of a cell that draws one thing."""
    (output,) = [output for output in outputs[cell] if output.output_type != "stream"]
    return output.data["text/plain"], output.data["text/html"]


@pytest.mark.slow
def test_everything_is_html_with_plain_text_beside_it(outputs):
    for cell in (1, 3, 4, 5, 6, 7, 8):
        text, html = shown(outputs, cell)
        assert text.strip() and "<" in html and "\x1b" not in text
        assert text.split()[0].strip("`:*") in html


@pytest.mark.slow
def test_the_box_says_the_status_in_words_beside_its_colour(outputs):
    for cell, words, colour in ((3, "not attempted", "#57606a"), (6, "solved", "#1a7f37")):
        text, html = shown(outputs, cell)
        assert words in text and words in html and colour in html
    text, html = shown(outputs, 4)
    assert "known mistake: three times" in text and "known mistake: three times" in html and "#9a6700" in html
    assert "<table>" in html and "Week 3: 0 of 2 solved." in html
    assert "Week 3: 1 of 2 solved." in shown(outputs, 6)[1]


@pytest.mark.slow
def test_hints_open_one_after_the_other(outputs):
    html = shown(outputs, 4)[1]
    assert html.count("<details>") == html.count("</details>") == 3
    first, second, third = (html.index(f"Hint {n} of 3") for n in (1, 2, 3))
    assert first < second < third < html.index("reveal=True") < html.index("</details>")
    assert "<details>" not in shown(outputs, 6)[1]  # solved: nothing to hint at
    assert "Hint 1 of 3" in shown(outputs, 7)[1] and "hints are used" in shown(outputs, 8)[1]


@pytest.mark.slow
def test_the_learners_own_function_is_used_and_kept(outputs):
    text = "".join(output.text for output in outputs[9])
    assert text.endswith("True False\n") and "double: yours" in text and "halve: the course's" in text
    assert "".join(output.text for output in outputs[10]).strip() == "def double(x):\n    return x + x"


@pytest.mark.slow
def test_a_kernel_keeps_answers_where_the_tests_say(outputs, answers_folder):
    """The kernel inherits the folder of the tests, and none of this is the person's own."""
    assert (answers_folder.parent / "03_toy" / "double.py").exists() or sys.platform == "win32"
