"""A Sphinx extension: a page for each module of `shared`, an index by week, docstrings as they are meant.

A docstring here is plain text with a little Markdown: `code`, lists, tables, indented blocks of code. Sphinx
reads reStructuredText, where a * or a trailing _ would mean something else.
"""

import ast
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, get_origin

from shared.course.structure import Structure

FOLDER = "modules"
STRUCTURE = Structure.read()
PUBLIC = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def public_names(module: str) -> dict[str, str]:
    """The classes and functions of a module, and their homes; of a package, what it hands on."""
    tree = STRUCTURE.trees[module]
    if module in STRUCTURE.packages:
        given = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        return {alias.asname or alias.name: str(node.module) for node in given for alias in node.names}
    defined = [node.name for node in tree.body if isinstance(node, PUBLIC)]
    return {name: module for name in defined if not name.startswith("_")}


HOMES = {name: module for module in STRUCTURE.modules() for name in public_names(module) if name != "main"}
"""The module of each public class and function: all but `main` are defined once."""


# ---- docstrings


def to_rst(lines: list[str]) -> list[str]:
    """A docstring in reStructuredText."""
    rst: list[str] = []
    for block in _blocks(lines):
        rst += [*_block_to_rst(block), ""]
    return rst


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Parts between empty lines. An indented one goes on over empty lines, until one is not indented."""
    indented: list[str] = []
    for empty, group in groupby(lines, lambda line: not line.strip()):
        block = list(group)
        if not empty and all(line.startswith("    ") for line in block):
            indented += [""] * bool(indented) + block
        elif not empty:
            if indented:
                yield indented
            indented = []
            yield block
    if indented:
        yield indented


def _block_to_rst(block: list[str]) -> list[str]:
    first = block[0]
    if first.startswith("    "):
        return [f".. code-block:: {_language(block)}", "", *block]
    if first.startswith(">>>"):
        return block
    if first.startswith("|"):
        return _table(block)
    if re.match(r"[-*] ", first):
        return [line[:2] + inline(line[2:]) for line in block]
    where = next((number for number, line in enumerate(block) if line.startswith((">>>", "|"))), None)
    if where is not None:
        return [*_block_to_rst(block[:where]), "", *_block_to_rst(block[where:])]
    return inline("\n".join(block)).split("\n")


def _language(block: list[str]) -> str:
    try:
        ast.parse("\n".join(line[4:] for line in block))
    except SyntaxError:
        return "text"
    return "python"


def _table(rows: list[str]) -> list[str]:
    cells = [[cell.strip() for cell in row[1:-1].split(" | ")] for row in rows]
    rst = [".. list-table::", "   :header-rows: 1", ""]
    for row in [cells[0], *cells[2:]]:  # the second is a ruler
        rst += [f"   {'-' if number else '* -'} {inline(cell)}" for number, cell in enumerate(row)]
    return [re.sub(r"^   - ", "     - ", line) for line in rst]


def inline(text: str) -> str:
    """Text in which `code` is code, with a link where it is a public name, and no other sign means anything.

    >>> inline("`GPT` reads *ids*")
    ':py:obj:`GPT <shared.models.gpt.GPT>` reads \\\\*ids\\\\*'
    """
    joined = ""
    for number, part in enumerate(re.split(r"`([^`]+)`", text)):
        words = _code(part) if number % 2 else re.sub(r"([\\*_|`])", r"\\\1", part)
        # Code that touches a word (`idx`s) is parted from it by an escaped space, which is not shown.
        touches = re.search(r"\w$", joined) if number % 2 else number and re.match(r"\w", words)
        joined += "\\ " + words if touches else words
    return joined


def _code(text: str) -> str:
    name = text.removesuffix("()")
    if name in HOMES:
        return f":py:obj:`{text} <{HOMES[name]}.{name}>`"
    if name in STRUCTURE.trees:
        return f":py:mod:`{name}`"
    return f"``{' '.join(text.split())}``"


# ---- pages


def by_week() -> str:
    """For each week its modules, what they are, and their public names; and what the side bar shows."""
    library = [module for module in STRUCTURE.modules() if not module.startswith("shared.course.")]
    weeks = groupby(sorted(library, key=STRUCTURE.week), STRUCTURE.week)
    sections = [(f"Week {week}" if week else "What all weeks use", list(modules)) for week, modules in weeks]
    sections.append(("The course's own tooling", sorted(set(STRUCTURE.modules()) - set(library))))
    parts = []
    for title, modules in sections:
        parts += [title, "-" * len(title), "", *_table_of(modules, "shared"), ""]
    return "\n".join([*parts, *_toctree([f"{FOLDER}/{name}" for name in _inside("shared")])])


def page(module: str) -> str:
    """The page of a module, or of a package."""
    title = f"python -m {module.removesuffix('.__main__')}" if module.endswith("__main__") else module
    parts = [title, "=" * len(title), "", f".. automodule:: {module}"]
    if module in STRUCTURE.packages:
        parts += ["   :no-members:", ""]
        if public_names(module):
            parts += [f"Handed on: {_links(module)}.", ""]
        parts += [*_table_of(_inside(module), module), "", *_toctree(_inside(module))]
    return "\n".join([*parts, ""])


def _inside(package: str) -> list[str]:
    return [name for name in STRUCTURE.trees if name.rpartition(".")[0] == package]


def _toctree(documents: list[str]) -> list[str]:
    return [".. toctree::", "   :hidden:", "", *(f"   {name}" for name in documents)]


def _about(module: str) -> str:
    """The first paragraph of a module's docstring, without its week."""
    first = (ast.get_docstring(STRUCTURE.trees[module]) or "").split("\n\n")[0]
    return inline(" ".join(re.sub(r"^Week \d+\.\s", "", first).split()))


def _links(module: str) -> str:
    return ", ".join(f":py:obj:`{name} <{home}.{name}>`" for name, home in public_names(module).items())


def _table_of(modules: list[str], package: str) -> list[str]:
    """A table of modules, named as seen from a package: what they are, and their public names."""
    table = [".. list-table::", "   :widths: 25 40 35", "   :class: modules", ""]
    for module in modules:
        name = f":py:mod:`{module.removeprefix(package + '.')} <{module}>`"
        table += [f"   * - {name}", f"     - {_about(module)}", f"     - {_links(module)}"]
    return table


def write_pages(folder: Path) -> None:
    """Writes all pages; one that is as it was keeps its time, and Sphinx does not read it again."""
    folder.mkdir(exist_ok=True)
    texts = {f"{module}.rst": page(module) for module in STRUCTURE.trees if module != "shared"}
    texts["by_week.txt"] = by_week()
    for path in set(folder.iterdir()) - {folder / name for name in texts}:
        path.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _process(*arguments: Any) -> None:
    lines: list[str] = arguments[-1]
    lines[:] = to_rst(lines)


def _skip(*arguments: Any) -> bool | None:
    thing = arguments[3]
    return True if get_origin(thing) is Annotated else None  # Sphinx writes out all that pydantic keeps


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / FOLDER))
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
