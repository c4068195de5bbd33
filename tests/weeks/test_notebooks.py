"""The notebooks: JupyterLab changes nothing when it opens them; no section is lost; lines fit on the page,
and no solution stands in sight of its task.
"""

import ast
import json
import re
import sys
from functools import cache

import pytest
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict

from shared.course.exercise import Week, grade
from shared.course.exercise.answers import load_module, source_of
from shared.runtime import ROOT

WIDTH = 88
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


in_all_weeks = pytest.mark.parametrize("number", range(1, 13))


def notebook(number: int) -> list[dict]:
    """The cells of a week's notebook."""
    (path,) = (ROOT / "weeks").glob(f"{number:02d}_*/notebook.ipynb")
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


@cache
def cells(number: int) -> list[str]:
    """The source of each code cell that is seen, without the lines that are no Python."""
    return [
        "\n".join("" if line.startswith(("%", "!")) else line for line in "".join(cell["source"]).split("\n"))
        for cell in notebook(number)
        if cell["cell_type"] == "code" and not cell["metadata"].get("jupyter", {}).get("source_hidden")
    ]


def shape(node: ast.AST) -> str:
    """A statement without its docstrings, its types and its places; the names of variables as they are."""
    tree = ast.parse(ast.unparse(node))
    for part in ast.walk(tree):
        body = getattr(part, "body", None)
        if isinstance(body, list):
            part.body = [
                s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ]
        if isinstance(part, (ast.FunctionDef, ast.arg)):
            part.returns = part.annotation = None
    return ast.dump(tree)


def bodies(answer) -> list[str]:
    """The statements of a function, or of each method of a class."""
    source = source_of(answer)
    if source is None:
        return []
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    found = []
    for function in functions:
        body = [
            s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        ]
        if len(ast.dump(ast.Module(body, []))) > 150:  # one call of a known function is no secret
            found.append(" ".join(map(shape, body)))
    return found


@cache
def pieces(cell: str) -> list[str]:
    """All sequences of statements in a cell, the cell's own and those of its blocks."""
    return [
        " ".join(map(shape, block))
        for node in ast.walk(ast.parse(cell))
        for block in (getattr(node, "body", None), getattr(node, "orelse", None))
        if isinstance(block, list) and block
    ]


@in_all_weeks
def test_sections_follow_each_other_and_what_the_text_points_to_is_there(number):
    text = "\n".join("".join(cell["source"]) for cell in notebook(number) if cell["cell_type"] == "markdown")
    sections = [int(n) for n in re.findall(r"^## (\d+)\.", text, flags=re.M)]
    assert sections == list(range(1, len(sections) + 1)) and len(sections) >= 5
    assert {int(n) for n in re.findall(r"\b[Ss]ection (\d+)", text)} <= set(sections)


@in_all_weeks
def test_the_tasks_that_are_kept_are_todays(number):
    """A reader of the notebook on a page, without running it, sees the task as it is graded."""
    week = Week(number)
    for cell in notebook(number):
        for name in re.findall(r'^week\.task\("(\w+)"\)', "".join(cell["source"]), flags=re.M):
            shown = "".join("".join(out.get("data", out)["text/plain"]) for out in cell["outputs"])
            assert week._task(week.exercises[name])[0].strip() in shown, name


@in_all_weeks
def test_nothing_that_a_library_complains_of_stands_on_the_page(number):
    said = [
        output["text"]
        for cell in notebook(number)
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]
    assert said == []


@in_all_weeks
def test_every_visible_line_fits_on_the_page(number):
    long = [line for cell in cells(number) for line in cell.split("\n") if len(line) > WIDTH]
    assert long == []


@in_all_weeks
@pytest.mark.slow
def test_no_cell_defines_what_solves_an_exercise(number, monkeypatch):
    """Whatever a cell defines is graded as every exercise that takes as many arguments, or as a class."""
    week = Week(number)
    monkeypatch.chdir(week.folder)
    monkeypatch.setattr(sys, "path", [str(week.folder), *sys.path])  # as the kernel has it
    for path in week.folder.glob("*.py"):  # these names are other weeks' too
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    space: dict = {"__name__": "__main__"}
    solved = []
    for cell in cells(number):
        tree = ast.parse(cell)
        wanted = [n for n in tree.body if isinstance(n, (*DEFINITIONS, ast.Import, ast.ImportFrom))]
        module = ast.Module([n for n in wanted if not isinstance(n, ast.ClassDef) or n.bases], [])
        exec(compile(ast.fix_missing_locations(module), "cell", "exec"), space)
        for node in (n for n in module.body if isinstance(n, DEFINITIONS)):
            for exercise in week.exercises.values():
                if could_be(node, exercise) and grade(exercise, space[node.name]).status == "solved":
                    solved.append((node.name, exercise.name))
    for path in week.folder.glob("*.py"):
        sys.modules.pop(path.stem, None)
    assert solved == []


def could_be(node: ast.AST, exercise) -> bool:
    is_class = isinstance(exercise.reference, type)
    if is_class or isinstance(node, ast.ClassDef):
        return is_class and isinstance(node, ast.ClassDef)
    return len(node.args.args) == len(ast.parse(exercise.stub).body[0].args.args)


@in_all_weeks
def test_no_cell_contains_the_body_of_an_answer(number):
    week = Week(number)
    path = week.folder / "answers.py"
    clean = load_module(path, "answers") if path.exists() else None
    seen = []
    for name, exercise in week.exercises.items():
        answers = [exercise.reference, *([getattr(clean, name)] if clean else [])]
        for body in (body for answer in answers for body in bodies(answer)):
            seen += [(name, cell) for cell in cells(number) if any(body in piece for piece in pieces(cell))]
    assert seen == []


@in_all_weeks
def test_each_exercise_has_its_stub_and_the_cell_after_it_checks_it(number):
    sources = [cell.strip() for cell in cells(number)]
    for name, exercise in Week(number).exercises.items():
        assert sources.count(exercise.stub.strip()) == 1, name
        following = sources[sources.index(exercise.stub.strip()) + 1]
        assert f"week.check({name})" in "".join(following.split()), name


@pytest.mark.slow
def test_a_cell_with_a_solution_is_found():
    """Against tests that would pass whatever is written."""
    (path,) = (ROOT / "weeks").glob("01_*/answers.py")
    answer = load_module(path, "answers").row_probabilities
    assert bodies(answer) and any(
        bodies(answer)[0] in piece
        for piece in pieces("smoothed = counts + smoothing\nreturn_ = 1\n" + source_of(answer))
    )
    hidden = "def f(counts, smoothing):\n    print(1)\n    return counts / counts.sum()\n"
    assert not any(bodies(answer)[0] in piece for piece in pieces(hidden))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "weeks").glob("*/notebook.ipynb")), ids=lambda p: p.parent.name
)
def test_jupyterlab_would_write_the_same_metadata(path):
    """But for the version of Python, which is that of whoever opens it."""
    found = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    kernel = get_kernel_dict()
    assert found["kernelspec"] == {
        "display_name": kernel["display_name"],
        "language": kernel["language"],
        "name": "python3",
    }
    assert found["language_info"] | {"version": ""} == IPythonKernel.language_info | {"version": ""}
