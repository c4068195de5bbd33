"""Week 0. The structure of `shared`, read off its imports, and a picture of it.

    python -m shared.course.structure     # draws docs/images/architecture.svg again

A *component* is a package of `shared` or a module at its top level. Components are ordered by their weeks.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from shared.runtime import ROOT, write_atomically

PICTURE = Path("docs/images/architecture.svg")


def source_files(root: Path = ROOT) -> dict[str, Path]:
    """The files of `shared` by module name; a package has the name of its folder."""
    files = {}
    for path in sorted((root / "shared").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return files


def week_of(docstring: str | None) -> int | None:
    """The week that a module's docstring begins with ("Week 8. ..."), or None."""
    match = re.match(r"Week (\d+)\.(\s|$)", docstring or "")
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Structure:
    """The modules of `shared` as syntax trees, by name."""

    trees: Mapping[str, ast.Module]
    packages: frozenset[str]
    """Those of them that are a folder's `__init__`."""

    @classmethod
    def read(cls, root: Path = ROOT) -> "Structure":
        """The structure of the files as they are now."""
        files = source_files(root)
        trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
        return cls(trees, frozenset(name for name, path in files.items() if path.name == "__init__.py"))

    def modules(self) -> list[str]:
        """All modules but the packages' `__init__`, which only hand names on."""
        return [name for name in self.trees if name not in self.packages]

    def week(self, module: str) -> int | None:
        """The week of a module, by its docstring."""
        return week_of(ast.get_docstring(self.trees[module]))

    def imports(self, tree: ast.Module) -> list[str]:
        """The modules of this repository that a file imports, wherever in the file it does.

        A name that a package hands on counts as imported from the module that defines it. Raises ValueError
        for a relative import.
        """
        needed = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    raise ValueError(f"line {node.lineno}: a relative import hides which module it takes")
                if _is_ours(node.module or ""):
                    needed += [self._defining_module(node.module or "", alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                needed += [alias.name for alias in node.names if _is_ours(alias.name)]
        return needed

    def _defining_module(self, module: str, name: str) -> str:
        if f"{module}.{name}" in self.trees:
            return f"{module}.{name}"
        if module not in self.packages:
            return module
        for node in self.trees[module].body:
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                return self._defining_module(node.module or "", name)
        raise ValueError(f"{module} has no {name}")

    def components(self) -> dict[str, list[int]]:
        """Each component's weeks. Components are in the order of their first weeks, then of their imports."""
        weeks: dict[str, set[int]] = defaultdict(set)
        for module in self.modules():
            weeks[component_of(module)].add(self.week(module) or 0)
        dependencies = self.dependencies()

        def height(component: str) -> int:
            below = [other for here, other in dependencies if here == component]
            return max((1 + height(other) for other in below), default=0)

        order = sorted(weeks, key=lambda component: (min(weeks[component]), height(component), component))
        return {component: sorted(weeks[component]) for component in order}

    def dependencies(self) -> set[tuple[str, str]]:
        """Pairs of components of which the first imports from the second."""
        pairs = {
            (component_of(module), component_of(other))
            for module in self.modules()
            for other in self.imports(self.trees[module])
            if other.startswith("shared.")
        }
        return {(component, other) for component, other in pairs if component != other}


def component_of(module: str) -> str:
    """The component that a module lies in: "training" for shared.training.optim."""
    return module.split(".")[1]


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("shared", "weeks")


# Sizes in pixels, and colours.
CELL = 26
LEFT = 210
TOP = 190
INK = "#1a1a1a"
SOFT = "#59636e"
LINE = "#d0d7de"
DOT = "#0072b2"
DIAGONAL = "#e7ebef"


def picture(structure: Structure) -> str:
    """The dependencies as a matrix, in SVG: a dot where the row's component imports from the column's.

    Where imports go one way, all dots lie on one side of the diagonal.
    """
    components = structure.components()
    names = list(components)
    dependencies = structure.dependencies()
    side = CELL * len(names)
    width, height = LEFT + side + 90, TOP + side + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="system-ui, sans-serif" font-size="13" role="img">',
        "<title>The packages and modules of shared, by week, and what each imports</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(12, 26, "What each part of shared imports", INK, 'font-size="17" font-weight="600"'),
        _text(12, 48, "A dot: the row imports from the column."),
        _text(12, 66, f"{len(names)} components, {len(dependencies)} dependencies."),
    ]
    for row, component in enumerate(reversed(names)):
        y = TOP + row * CELL
        parts.append(_text(12, y + 18, f"week {', '.join(map(str, components[component]))}"))
        parts.append(_text(LEFT - 8, y + 18, component, INK, 'text-anchor="end"'))
        parts += [_cell(LEFT + column * CELL, y, component == other) for column, other in enumerate(names)]
        parts += [
            _dot(LEFT + names.index(other) * CELL, y, component, other)
            for here, other in sorted(dependencies)
            if here == component
        ]
    for column, component in enumerate(names):
        place = f'transform="translate({LEFT + column * CELL + 17} {TOP - 8}) rotate(-60)"'
        parts.append(_text(0, 0, component, INK, place))
    parts.append(_text(12, TOP + side + 30, "Made from the imports by python -m shared.course.structure."))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: int, y: int, words: str, colour: str = SOFT, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" {more}>{escape(words)}</text>'


def _cell(x: int, y: int, diagonal: bool) -> str:
    fill = DIAGONAL if diagonal else "#ffffff"
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="{LINE}"/>'


def _dot(x: int, y: int, component: str, other: str) -> str:
    title = f"<title>{component} imports {other}</title>"
    return f'<circle cx="{x + CELL // 2}" cy="{y + CELL // 2}" r="6" fill="{DOT}">{title}</circle>'


def main() -> None:
    """Draws the picture again."""
    write_atomically(ROOT / PICTURE, picture(Structure.read()))
    print(f"drew {PICTURE}")


if __name__ == "__main__":
    main()
