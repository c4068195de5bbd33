"""What `pip install .` brings: what the library imports, and an extra for each part that needs more."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement

import shared
from shared.course.structure import Structure, component_of
from shared.extras import needs
from shared.runtime import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STRUCTURE = Structure.read()
DISTRIBUTIONS = importlib.metadata.packages_distributions()
BY_NAME = {"wandb", "trackio"}
"""Trackers: `--tracker NAME` asks for the package of that name, and says so where it is missing."""
EXTRAS_OF = {"course": {"course"}, "retrieval": {"rag"}, "serving": {"serve"}}
"""What importing a module of these components may ask for; of all others, nothing."""
EXTRAS_OF_MODULES = {
    "shared.serving.page": {"serve", "page"},
    "shared.training.base_model": {"course"},  # the course's own model, with its folders of logs and plots
}


def names_of(requirements: list[str]) -> set[str]:
    return {normal(Requirement(line).name) for line in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


BASE = names_of(PROJECT["dependencies"])
EXTRAS = {extra: names_of(lines) for extra, lines in PROJECT["optional-dependencies"].items()}


def imports(node: ast.AST, around: tuple[ast.AST, ...] = ()) -> Iterator[tuple[str, tuple[ast.AST, ...]]]:
    """Each module that is imported below a node, and what stands around the import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, around) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or "", around
        yield from imports(child, (*around, child))


def extras_around(around: tuple[ast.AST, ...]) -> list[str]:
    """The extras of the `with needs(...)` around an import."""
    calls = [ast.unparse(item.context_expr) for n in around if isinstance(n, ast.With) for item in n.items]
    return [call.split("'")[1] for call in calls if call.startswith("needs(")]


def can_do_without(around: tuple[ast.AST, ...]) -> bool:
    """Whether an import may fail: `try: import ...`, `except ImportError:`."""
    handlers = [handler for node in around if isinstance(node, ast.Try) for handler in node.handlers]
    return any(ast.unparse(handler.type) == "ImportError" for handler in handlers if handler.type)


def is_declared(imported: str, around: tuple[ast.AST, ...]) -> bool:
    """Whether an import is of ours, comes with Python or the library, or with the extra that it names."""
    root = imported.split(".")[0]
    if any(isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for node in around):
        return True
    if root in {"shared", *BY_NAME} or root in sys.stdlib_module_names or can_do_without(around):
        return True
    distributions = {normal(distribution) for distribution in DISTRIBUTIONS.get(root, [])}
    return bool(distributions & BASE.union(*(EXTRAS[extra] for extra in extras_around(around))))


def test_what_is_imported_comes_with_the_library_or_with_the_extra_that_the_import_names():
    found = [(name, *found) for name, tree in STRUCTURE.trees.items() for found in imports(tree)]
    assert len({name for name, _, _ in found}) > 100
    assert [(name, what) for name, what, around in found if not is_declared(what, around)] == []


def extras_of_import(name: str) -> set[str]:
    """The extras that importing a module needs, for itself and for the modules that it imports."""
    seen: set[str] = set()
    found: set[str] = set()
    left = [name]
    while left:
        name = left.pop()
        if name in STRUCTURE.trees and name not in seen:
            seen.add(name)
            body = [
                node for node in STRUCTURE.trees[name].body if isinstance(node, (ast.ImportFrom, ast.With))
            ]
            first = ast.Module(body, [])  # without what is imported later, or only for types
            found.update(extra for _, around in imports(first) for extra in extras_around(around))
            left += [*STRUCTURE.imports(first), name.rpartition(".")[0]]
    return found


def test_importing_a_module_needs_no_extra_but_its_own():
    def allowed(name: str) -> set[str]:
        return EXTRAS_OF_MODULES.get(name, EXTRAS_OF.get(component_of(name), set()))

    assert extras_of_import("shared.serving.page") == {"serve", "page"}
    assert {n: found for n in STRUCTURE.modules() if not (found := extras_of_import(n)) <= allowed(n)} == {}


def test_a_package_that_is_missing_is_named_with_its_extra():
    with pytest.raises(
        ModuleNotFoundError, match=r'^no_such is not installed: pip install "llm-weeks\[rag\]"$'
    ):
        with needs("rag"):
            import no_such.module  # noqa: F401


def test_the_course_installs_all_that_any_part_needs():
    lines = [
        line
        for file in ("requirements.txt", "requirements-test.txt")
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith(("#", "-e"))
    ]
    assert set().union(BASE, *EXTRAS.values()) <= names_of(lines)


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    """Built as pip builds it, of a copy: setuptools would leave a folder `build` in the checkout."""
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("shared", "tests", "weeks"):  # of the last two only what could be taken for a package
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    build = "import setuptools.build_meta as b; print(b.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        files = set(wheel.namelist())
        (metadata,) = [name for name in files if name.endswith(".dist-info/METADATA")]
        fields = wheel.read(metadata).decode("utf-8").split("\n\n")[0].splitlines()
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "shared").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in files if ".dist-info/" not in name} == ours
    assert f"Version: {shared.__version__}" in fields
    sources = {"shared/py.typed", "shared/quantization/decoder.c", "shared/quantization/pool.h"}
    training = {"shared/training/fused.c", "shared/training/fused_products.h"}
    assert sources | training | {"shared/tokenizers/piece_encoder.c"} <= files
    assert {line.split(": ")[1] for line in fields if line.startswith("Provides-Extra")} == EXTRAS.keys()
