"""Week 0. Keeps what a learner has solved, outside the checkout: `git pull` and a new clone leave it alone.

Answers lie in `~/.llm-weeks/answers`, or in the folder that LLM_WEEKS_ANSWERS names, a Python file for each:
`01_bigram/count_pairs.py` has the function and all that it needs, `01_bigram/count_pairs.json` says whether
it is solved. The notebook, the command line and `run.py --mine` read the same files.
"""

import ast
import builtins
import importlib.util
import inspect
import linecache
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.runtime import read_json, write_atomically, write_json

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign
SMALL = 2000
"""Characters of a constant that is written into an answer's file."""


def answers_root() -> Path:
    """Where a learner's answers are kept. Raises ValueError where there is no home folder to keep them in."""
    named = os.environ.get("LLM_WEEKS_ANSWERS")
    if named:
        return Path(named)
    try:
        return Path.home() / ".llm-weeks" / "answers"
    except RuntimeError:
        raise ValueError(
            "there is no home folder to keep your answers in: name one with LLM_WEEKS_ANSWERS=FOLDER"
        ) from None


class NotKeptError(ValueError):
    """An answer that cannot be written into a file, with the reason."""


class Shelf:
    """A week's kept answers."""

    def __init__(self, topic: str, root: Path | None = None):
        self.folder = (root or answers_root()) / topic

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.py"

    def _state(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() else {}

    def _change(self, name: str, **state: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{name}.json", {**self._state(name), **state})

    def is_solved(self, name: str) -> bool:
        return bool(self._state(name).get("solved"))

    def hints(self, name: str) -> int:
        """How many hints were asked for."""
        return int(self._state(name).get("hints", 0))

    def hinted(self, name: str, hints: int) -> None:
        self._change(name, hints=hints)

    def solve(self, name: str, answer: Any) -> str | None:
        """Keeps a right answer. Returns why its source could not be kept, None where it was."""
        self._change(name, solved=datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            source = module_source(name, answer)
        except NotKeptError as error:
            self.file(name).unlink(missing_ok=True)
            return str(error)
        write_atomically(self.file(name), source)
        return None

    def adopt(self, earlier: Path, week: str) -> None:
        """Takes over what is solved according to the course's earlier bookkeeping, once.

        earlier: its file, {"3": ["split_heads"]}, from which the week is taken out. There is no source: it
        counts as solved until it is checked again.
        """
        if not earlier.exists():
            return
        solved = read_json(earlier)
        for name in solved.pop(week, []):
            if "solved" not in self._state(name):
                self._change(name, solved="earlier")
        if solved:
            write_json(earlier, solved)
        else:
            earlier.unlink()

    def lose(self, name: str) -> bool:
        """Takes the mark of a solved exercise away; its file stays. Returns whether there was one."""
        if not self.is_solved(name):
            return False
        self._change(name, solved=None)
        return True

    def load(self, name: str) -> Any:
        """The kept answer. Raises ValueError where there is none, or it does not run any more."""
        path = self.file(name)
        if not path.exists():
            raise ValueError(f"{name} is solved, but its source was not kept: solve it in the notebook again")
        module = load_module(path, f"answer_{name}")
        if not hasattr(module, name):
            raise ValueError(f"{path} does not define {name} any more")
        return getattr(module, name)


def load_module(path: Path, name: str) -> ModuleType:
    """A Python file as a module of that name. Raises ValueError, with the line, where it does not run."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    linecache.checkcache(str(path))  # the file may have changed since it was last read
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        line = f", line {error.lineno}: {(error.text or '').strip()}" if error.lineno else ""
        raise ValueError(f"{path} is no Python{line} ({error.msg})") from None
    except Exception as error:
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from None
    finally:
        sys.dont_write_bytecode = bytecode
    return module


# ---- an answer's source, with all that it needs


def module_source(name: str, answer: Any) -> str:
    """A file that defines `name` as the answer: its source, its imports, helpers and constants.

    Raises NotKeptError for what no file can hold, such as a tensor of the notebook that it reads.
    """
    writer = _Writer()
    own = writer.define(name, answer)
    if own != name:
        writer.definitions.append(f"{name} = {own}")
    imports = "\n".join(sorted(set(writer.imports)))
    parts = [imports] if imports else []
    return "\n\n\n".join([*parts, *writer.definitions]) + "\n"


def source_of(answer: Any) -> str | None:
    """The source of a function or a class, in a file or in a notebook's cell; None where there is none."""
    node, text = _definition(answer)
    return None if node is None else _segment(node, text)


class _Writer:
    """Collects what a file needs, what is used before what uses it."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self.definitions: list[str] = []
        self._names: dict[str, int] = {}
        """What was written, by name: the object's id."""

    def define(self, name: str, value: Any) -> str:
        """Writes a function or a class, and first what it uses. Returns the name that its source gives it."""
        node, text = _definition(value)
        if node is None:
            raise NotKeptError(f"the source of `{name}` cannot be found")
        own = _name_in(node)
        self._take(name, value)
        self._take(own, value)
        space = _globals(value)
        for used in _names_used(node):
            if used in space and used not in self._names:
                self.need(used, space[used])
            elif used not in space and not hasattr(builtins, used):
                raise NotKeptError(f"it uses `{used}`, which is not defined")
        self.definitions.append(_segment(node, text))
        return own

    def _take(self, name: str, value: Any) -> None:
        """Notes what a name stands for. Raises NotKeptError where it stands for something else, too."""
        if self._names.setdefault(name, id(value)) != id(value):
            raise NotKeptError(f"`{name}` is the name of two things that it uses: give one another name")

    def need(self, name: str, value: Any) -> None:
        """Writes what a global name of the answer stands for."""
        line = _import_of(name, value)
        if line is not None:
            self.imports.append(line)
            self._names[name] = id(value)
        elif inspect.isfunction(value) or inspect.isclass(value):
            own = self.define(name, value)
            if own != name:
                self.definitions.append(f"{name} = {own}")
        elif _is_week(value):
            self.imports.append("from shared.course.exercise import Week")
            self.definitions.append(f"{name} = Week({value.number})")
            self._names[name] = id(value)
        elif _is_plain(value) and len(repr(value)) <= SMALL:
            self.definitions.append(f"{name} = {value!r}")
            self._names[name] = id(value)
        else:
            raise NotKeptError(
                f"it uses `{name}`, a {type(value).__name__} of the notebook: hand it in as an argument, or"
                " make it inside"
            )


def _is_week(value: Any) -> bool:
    return type(value).__name__ == "Week" and type(value).__module__.startswith("shared.course.exercise")


def _is_plain(value: Any) -> bool:
    """Whether `repr` writes a value that Python reads back: nan and inf it does not, nor subclasses."""
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        return all(map(_is_plain, value))
    if kind is dict:
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if kind is float:
        return math.isfinite(value)
    return value is None or kind in (bool, int, str, bytes)


def _name_in(node: Definition) -> str:
    """The name that a definition gives, or the first of an assignment's."""
    return node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else ast.unparse(node.targets[0])


def _import_of(name: str, value: Any) -> str | None:
    """The line that imports a value under a name; None for what is no module, nor found in one."""
    if isinstance(value, ModuleType):
        if value.__name__ == name:
            return f"import {name}"
        parent, _, last = value.__name__.rpartition(".")
        if parent and last == name:
            return f"from {parent} import {last}"
        return f"import {value.__name__} as {name}"
    if _is_plain(value):
        return None
    for module_name in dict.fromkeys(["torch", getattr(value, "__module__", None), "typing", "math"]):
        if not isinstance(module_name, str) or module_name.startswith(("__main__", "answer_", "solutions")):
            continue
        for attribute in dict.fromkeys([getattr(value, "__name__", name), name]):
            if getattr(sys.modules.get(module_name), attribute, None) is value:
                alias = "" if attribute == name else f" as {name}"
                return f"from {module_name} import {attribute}{alias}"
    return None


def _globals(value: Any) -> dict[str, Any]:
    """The global names that a function's or a class's code sees."""
    function = inspect.unwrap(_first_function(value) or value)
    space = dict(getattr(function, "__globals__", {}))
    closure = getattr(function, "__closure__", None) or ()
    code = getattr(function, "__code__", None)
    for name, cell in zip(code.co_freevars if code else (), closure):
        if name != "__class__":
            space[name] = cell.cell_contents
    return space


def _first_function(value: Any) -> Callable | None:
    if not inspect.isclass(value):
        return None
    parts = (getattr(part, "__func__", part) for part in vars(value).values())  # of static methods too
    return next((part for part in parts if inspect.isfunction(part)), None)


def _definition(value: Any) -> tuple[Definition | None, str]:
    """Where a function or a class is defined: the statement, and the text of its file or notebook cell."""
    function = inspect.unwrap(_first_function(value) or value)
    code = getattr(function, "__code__", None)
    if code is None:
        return None, ""
    text = "".join(linecache.getlines(code.co_filename))
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a cell with a magic line
        text = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in text.split("\n"))
        try:
            tree = ast.parse(text)
        except SyntaxError:
            return None, ""
    for node in ast.walk(tree):
        if inspect.isclass(value):
            if isinstance(node, ast.ClassDef) and node.name == value.__name__ and _spans(node, code):
                return node, text
        elif isinstance(node, ast.FunctionDef) and node.name == function.__name__:
            if _spans(node, code):
                return node, text
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and _spans(node, code):
            return node, text
    return None, ""


def _spans(node: Definition, code: Any) -> bool:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return first <= code.co_firstlineno <= (node.end_lineno or node.lineno)


def _segment(node: Definition, text: str) -> str:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return textwrap.dedent("\n".join(text.split("\n")[first - 1 : node.end_lineno]))


def _names_used(node: ast.AST) -> Iterator[str]:
    """The names that are read in a statement and not made in it, each once."""
    made = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef | ast.ClassDef)}
    made |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
    made |= {part.name for part in ast.walk(node) if isinstance(part, ast.ExceptHandler) and part.name}
    made |= {
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
    made |= {
        (alias.asname or alias.name).split(".")[0]
        for part in ast.walk(node)
        if isinstance(part, ast.Import | ast.ImportFrom)
        for alias in part.names
    }
    own = {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
    read = (
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    )
    yield from dict.fromkeys(name for name in read if name not in made | own)
