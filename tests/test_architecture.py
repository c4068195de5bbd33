"""The rules of the house that can be read off the source: imports follow the curriculum, everything is
defined once, a reader never holds more than a page, nothing is pickled.
"""

import ast
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from shared.course.structure import PICTURE, Structure, component_of, picture, source_files
from shared.runtime import ROOT

SHARED = source_files()
STRUCTURE = Structure.read()
MODULES = STRUCTURE.modules()
RUNS = sorted((ROOT / "weeks").glob("*/run.py"))
WEEKS = sorted((ROOT / "weeks").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = [*SHARED.values(), *WEEKS, *TESTS, *sorted((ROOT / "benchmarks").glob("*.py"))]
PUBLIC = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def named(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def number_of_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


C_AND_TRITON = ("library()", "fused_library()", "_forward[", "_backward[")


def rules_broken(name: str, structure: Structure) -> list[str]:
    own = structure.week(name)
    broken = []
    for other in structure.imports(structure.trees[name]):
        if other.split(".")[0] == "weeks":
            broken.append(f"{name} imports {other}")
            continue
        theirs = structure.week(other)
        if other in structure.packages or theirs is None or theirs > own:
            broken.append(f"{name} (week {own}) imports {other} (week {theirs})")
    return broken


@pytest.mark.parametrize("name", MODULES)
def test_a_modules_docstring_opens_with_its_week(name):
    week = STRUCTURE.week(name)
    assert week is not None and 0 <= week <= 12


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_week_or_an_earlier_one_and_never_weeks(name):
    assert rules_broken(name, STRUCTURE) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from shared.models.gpt import GPT", "imports shared.models.gpt (week 4)"),
        ("from shared.training import Trainer", "imports shared.training.trainer (week 2)"),
        ("def f():\n    from shared.training import lr_at", "imports shared.training.config (week 2)"),
        ("import shared.models", "imports shared.models (week None)"),
        ("def f():\n    import shared.models as models", "imports shared.models (week None)"),
        ("from weeks.week import x", "imports weeks.week"),
        ("import weeks.other", "imports weeks.other"),
        ("from shared.runtime import table", None),
        ("from shared.tokenizers import CharTokenizer", None),
    ],
)
def test_the_rule_about_imports_can_be_broken(line, expected):
    """Against a test that would pass whatever is written."""
    tree = ast.parse(f'"""Week 1. X."""\n{line}\n')
    broken = rules_broken(
        "shared.data.corpus", replace(STRUCTURE, trees={**STRUCTURE.trees, "shared.data.corpus": tree})
    )
    if expected is None:
        assert broken == []
    else:
        assert len(broken) == 1 and expected in broken[0]


@pytest.mark.slow
def test_between_components_imports_go_one_way():
    order = list(STRUCTURE.components())
    assert {component_of(name) for name in MODULES} == set(order)
    assert [pair for pair in STRUCTURE.dependencies() if order.index(pair[0]) <= order.index(pair[1])] == []


@pytest.mark.slow
def test_the_picture_of_the_components_is_that_of_the_imports():
    assert (ROOT / PICTURE).read_text(encoding="utf-8") == picture(STRUCTURE), (
        "run python -m shared.course.structure"
    )


def test_the_page_about_the_architecture_names_every_component_with_its_weeks():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for component, weeks in STRUCTURE.components().items():
        starts = (f"| `{component}/`", f"| `{component}.py`")
        row = next((line for line in page.splitlines() if line.startswith(starts)), None)
        assert row is not None, f"{component} has no row in docs/architecture.md"
        first, last = row.split("|")[2].strip().replace("–", ",").split(",")[0], row.split("|")[2].strip()
        assert first == str(weeks[0]) and last.endswith(str(weeks[-1])), row


def test_a_packages_init_only_hands_names_on():
    for name in STRUCTURE.packages:
        for node in STRUCTURE.trees[name].body:
            names = [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
            allowed = names in (["__all__"], ["__version__"])
            assert isinstance(node, (ast.ImportFrom, ast.Expr)) or allowed, f"{name}, line {node.lineno}"


@pytest.mark.parametrize("path", named(WEEKS))
def test_no_weeks_file_loads_another_weeks(path):
    """What weeks share is in `shared`; a script may import the files that lie beside it."""
    source = path.read_text(encoding="utf-8")
    beside = {other.stem for other in path.parent.glob("*.py")}
    topics = {folder.name for folder in path.parent.parent.iterdir()} - {path.parent.name}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level and node.module.split(".")[0] != "weeks"
            assert (
                node.module != "run" or "TYPE_CHECKING" in source
            )  # run.py is the main module: never a second time
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            assert called not in ("load_script", "import_module", "spec_from_file_location", "run_path"), (
                called
            )
    assert not [topic for topic in topics if f"weeks/{topic}/run.py" in source and "subprocess" in source]
    assert "figures" in beside and "run" in beside


@pytest.mark.slow
def test_every_public_class_and_function_is_defined_once():
    places = defaultdict(list)
    for path in [
        *SHARED.values(),
        *(path for path in WEEKS if path.name not in ("exercises.py", "answers.py")),
    ]:
        for node in parse(path).body:
            if isinstance(node, PUBLIC) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    for own in ("main", "Settings", "draw", "smoke"):  # every script has its own
        places.pop(own, None)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


# How much a reader must hold at once. ruff holds the width of lines, the branches and statements of a
# function, and the number of its positional parameters.


OF_A_PIECE = [path for path in TESTS if "foreign" not in path.parts]
"""Tests that are read as a whole; strangers' answers are a list."""


@pytest.mark.parametrize("path", named([*SHARED.values(), *OF_A_PIECE]))
def test_no_file_is_longer_than_500_lines(path):
    assert number_of_lines(path) <= 500


@pytest.mark.parametrize("path", named(RUNS))
def test_a_weeks_script_is_read_in_five_minutes(path):
    assert number_of_lines(path) <= 250


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_no_function_is_longer_than_60_lines(path):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(parse(path)) if isinstance(n, functions)}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_no_call_has_more_than_six_positional_arguments(path):
    """Functions in C and kernels of Triton take nothing by name."""
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and len(node.args) > 6]
    names = [ast.unparse(node.func) for node in calls]
    assert [name for name in names if not name.startswith(C_AND_TRITON)] == []


PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe(tree: ast.Module) -> list[str]:
    """Ways to run what a file contains: pickle and the like, eval, exec, torch.load that unpickles."""
    ways = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ways += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            ways.append(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
                ways.append(f"{called}(")
            elif called == "torch.load" and options.get("weights_only") != "True":
                ways.append("torch.load without weights_only=True")
            elif called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                ways.append("np.load with allow_pickle")
    return ways


@pytest.mark.slow
def test_nothing_unpickles_or_evaluates_what_it_reads():
    found = {str(path.relative_to(ROOT)): unsafe(parse(path)) for path in [*SHARED.values(), *WEEKS]}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "eval('1')",
        "exec('x = 1')",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_what_is_unsafe_is_found(line):
    assert len(unsafe(ast.parse(line))) == 1


def without_encoding(tree: ast.Module) -> list[str]:
    """Calls that read or write text in whatever encoding the machine has: not UTF-8 on every Windows."""
    calls = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        called = ast.unparse(node.func)
        mode = options.get("mode") or (ast.unparse(node.args[1]) if node.args[1:] else "'r'")
        as_text = (
            called.endswith(".read_text")
            or called.endswith(".write_text")
            or (called == "open" and "b" not in mode)
            or (called.startswith("subprocess.") and options.get("text") == "True")
        )
        if as_text and "encoding" not in options:
            calls.append(ast.unparse(node))
    return calls


def test_all_text_is_utf_8():
    scripts = [path for path in SCRIPTS if path not in TESTS]
    found = {str(path.relative_to(ROOT)): without_encoding(parse(path)) for path in scripts}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "path.read_text()",
        "path.write_text(text)",
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='a')",
        "subprocess.run(command, text=True)",
    ],
)
def test_a_text_without_encoding_is_found(line):
    assert len(without_encoding(ast.parse(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "path.read_text(encoding='utf-8')",
        "open(path, 'rb')",
        "open(path, 'ab' if resumed else 'wb')",
        "subprocess.run(command)",
        "image.open(path)",
    ],
)
def test_bytes_need_no_encoding(line):
    assert without_encoding(ast.parse(line)) == []


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "spec.loader.exec_module(module)", "torch.load(p, weights_only=True)", "np.load(p)"],
)
def test_what_only_looks_unsafe_is_not_found(line):
    assert unsafe(ast.parse(line)) == []


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_and_function_has_a_docstring(name):
    missing = [
        n.name
        for n in parse(SHARED[name]).body
        if isinstance(n, PUBLIC) and not n.name.startswith("_") and not ast.get_docstring(n)
    ]
    assert missing == []
