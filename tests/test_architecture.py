"""The rules of the house that can be read off the source: the imports are the curriculum, everything is
defined once, nothing is pickled.
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from shared.runtime import ROOT

SHARED = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "shared").rglob("*.py"))
}
MODULES = [
    name for name, path in SHARED.items() if path.name != "__init__.py"
]  # a package's __init__ only hands names on
RUNS = sorted((ROOT / "weeks").glob("*/run.py"))
WEEKS = sorted((ROOT / "weeks").rglob("*.py"))
PUBLIC = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def week_of(docstring: str | None) -> int | None:
    found = re.match(r"Week (\d+)\.(\s|$)", docstring or "")
    return int(found[1]) if found else None


def resolve(module: str, name: str) -> str:
    """The module that `from module import name` really takes it from: a package's __init__ is looked through."""
    if f"{module}.{name}" in SHARED:
        return f"{module}.{name}"
    if module in SHARED and SHARED[module].name == "__init__.py":
        for node in ast.walk(parse(SHARED[module])):
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                return resolve(node.module, name)
        raise AssertionError(f"{module} has no {name}")
    return module


def imports(tree: ast.Module) -> list[str]:
    """All modules of this repository that are imported anywhere in the file. A bare `import shared.models as
    models` inside a function is a look-up by name at run time, and so no dependency on any one of them.
    """
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for n in ast.walk(f)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import hides which module it takes"
            if node.module.split(".")[0] in ("shared", "weeks"):
                found += [resolve(node.module, a.name) for a in node.names]
        elif isinstance(node, ast.Import):
            for a in node.names:
                package = a.name in SHARED and SHARED[a.name].name == "__init__.py"
                if a.name.split(".")[0] in ("shared", "weeks") and not (package and id(node) in inside):
                    found.append(a.name)
    return found


def rules_broken(name: str, trees: dict[str, ast.Module]) -> list[str]:
    own = week_of(ast.get_docstring(trees[name]))
    broken = []
    for other in imports(trees[name]):
        if other.split(".")[0] == "weeks":
            broken.append(f"{name} imports {other}")
        elif (theirs := week_of(ast.get_docstring(trees[other]))) is None or theirs > own:
            broken.append(f"{name} (week {own}) imports {other} (week {theirs})")
    return broken


@pytest.mark.parametrize("name", MODULES)
def test_a_modules_docstring_opens_with_its_week(name):
    week = week_of(ast.get_docstring(parse(SHARED[name])))
    assert week is not None and 0 <= week <= 12


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_week_or_an_earlier_one_and_never_weeks(name):
    assert rules_broken(name, {n: parse(p) for n, p in SHARED.items()}) == []


def test_the_rule_about_imports_can_be_broken():
    """Against a test that would pass whatever is written."""
    trees = {n: parse(p) for n, p in SHARED.items()}
    for line, expected in {
        "from shared.models.gpt import GPT": "imports shared.models.gpt (week 4)",
        "from shared.models import GPT": "imports shared.models.gpt (week 4)",
        "def f():\n    from shared.training import lr_at": "imports shared.training (week 2)",
        "import shared.models": "imports shared.models (week None)",
        "from weeks.week import x": "imports weeks.week",
        "import weeks.other": "imports weeks.other",
        "from shared.runtime import table": None,
        "from shared.tokenizers import CharTokenizer": None,
        "def f():\n    import shared.models as models": None,
    }.items():
        trees["shared.data"] = ast.parse(f'"""Week 1. X."""\n{line}\n')
        broken = rules_broken("shared.data", trees)
        assert (broken == []) if expected is None else (len(broken) == 1 and expected in broken[0]), line


def test_a_packages_init_only_hands_names_on():
    for name, path in SHARED.items():
        if path.name == "__init__.py":
            for node in parse(path).body:
                allowed = isinstance(node, (ast.ImportFrom, ast.Expr)) or (
                    isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                )
                assert allowed, f"{name}, line {node.lineno}"


def test_every_public_class_and_function_is_defined_once():
    places = defaultdict(list)
    for path in [*SHARED.values(), *RUNS]:
        for node in parse(path).body:
            if isinstance(node, PUBLIC) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    for own in ("main", "Settings", "draw", "smoke"):  # every script has its own
        places.pop(own, None)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("name", SHARED)
def test_no_module_is_longer_than_450_lines(name):
    assert len(SHARED[name].read_text(encoding="utf-8").splitlines()) <= 450


def unsafe(tree: ast.Module) -> list[str]:
    """Ways to run what a file contains: pickle and its kin, eval, exec, torch.load without weights_only=True."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                a.name
                for a in node.names
                if a.name.split(".")[0]
                in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
            ]
        elif isinstance(node, ast.ImportFrom):
            found += (
                [node.module]
                if node.module
                and node.module.split(".")[0]
                in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
                else []
            )
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
                found.append(f"{called}(")
            elif called == "torch.load" and options.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            elif called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                found.append("np.load with allow_pickle")
    return found


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
