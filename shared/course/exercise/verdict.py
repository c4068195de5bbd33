"""Week 0. What the grader says of an answer, as text for a terminal and as a coloured box for a notebook."""

import copy
import re
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor

from shared.course.exercise.comparison import whole
from shared.extras import needs

with needs("course"):
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline

FORMULA = re.compile(r"\$[^$`]+\$")


def _formula(state: StateInline, silent: bool) -> bool:
    """A formula goes through as it is written: Markdown would take the backslash of \\, or \\_ away."""
    found = FORMULA.match(state.src, state.pos)
    if found is None:
        return False
    if not silent:
        state.push("text", "", 0).content = found[0]
    state.pos = found.end()
    return True


_MARKDOWN = MarkdownIt("commonmark", {"html": False})
_MARKDOWN.inline.ruler.before("escape", "formula", _formula)
COLOURS = {"solved": "#1a7f37", "wrong": "#9a6700", "not attempted": "#57606a"}
"""Of a box's edge: green, amber, grey; the words beside it say the same."""
MORE_DIGITS = 8
"""Of numbers that print alike with fewer, and differ."""


@dataclass(frozen=True)
class Case:
    """A call that an answer fails on, or one to play with: the arguments, by name, and the results."""

    given: dict[str, Any]
    expected: Any
    yours: Any = None
    error: str = ""
    """Where the answer crashed: its line and the error."""
    what: str = ""
    """What of the answer is looked at: "the output"; empty for a function's result."""
    differs: str = ""
    """How `yours` differs from `expected`, in a sentence; where there are none, what was seen."""
    only_given: bool = False
    """Whether there is no result to compare, only what the answer was called with."""

    @property
    def arguments(self) -> tuple:
        """The arguments in order, each time a copy. For trying a function again: `answer(*case.arguments)`.

        A class or a whole update is tried on what the grader makes of them, such as models from a seed.
        """
        return tuple(copy.deepcopy(value) for value in self.given.values())

    def rows(self) -> list[tuple[str, str]]:
        """What there is to show: (what, its value)."""
        rows = [(name, whole(value)) for name, value in self.given.items()]
        if self.only_given:
            return [*rows, ("what was seen", self.differs)] if self.differs else rows
        if self.error:
            return [*rows, ("stopped at", self.error)]
        what = f", {self.what}" if self.what else ""
        if not self.differs:
            return [*rows, (f"expected{what}", whole(self.expected))]
        for item, yours, expected in self._wrong_parts():
            texts = whole(yours), whole(expected)
            if texts[0] == texts[1]:  # they differ after the digits that are shown
                texts = whole(yours, MORE_DIGITS), whole(expected, MORE_DIGITS)
            rows += [(f"yours{what}{item}", texts[0]), (f"expected{what}{item}", texts[1])]
        return [*rows, ("difference", self.differs)]

    def _wrong_parts(self) -> list[tuple[str, Any, Any]]:
        """Of results that are several tensors those that look different: (which, yours, right)."""
        everything = [("", self.yours, self.expected)]
        if not isinstance(self.yours, list | tuple) or not isinstance(self.expected, list | tuple):
            return everything
        is_tensors = all(isinstance(part, Tensor) for part in (*self.yours, *self.expected))
        if not is_tensors or len(self.yours) != len(self.expected):
            return everything
        parts = enumerate(zip(self.yours, self.expected))
        return [
            (f", item {i}", yours, right) for i, (yours, right) in parts if whole(yours) != whole(right)
        ] or everything

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        indent = "\n" + " " * (width + 4)
        return "\n".join(f"  {name:{width}}  {value.replace(chr(10), indent)}" for name, value in rows)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        cells = [
            f'<tr><th style="text-align:left;vertical-align:top;white-space:nowrap">{escape(name)}</th>'
            f'<td style="text-align:left"><code style="white-space:pre-wrap">{escape(value)}</code></td></tr>'
            for name, value in self.rows()
        ]
        return f"<table>{''.join(cells)}</table>"


@dataclass(frozen=True)
class Verdict:
    """What `grade` says."""

    exercise: str
    status: str
    """One of "solved", "not attempted", "wrong"."""
    says: str
    """The verdict, and what is wrong, without the name and the case."""
    mistake: str | None = None
    """The name of the known mistake that the function makes."""
    kind: str = ""
    """Of a wrong answer: "mistake", "property", "crash", "time", "input", "forbidden", "detached",
    "program" (it changes what all use), "type", or "differs" where nothing more is known.
    """
    case: Case | None = None
    """The smallest case found on which it is wrong."""

    @property
    def message(self) -> str:
        """All of it as plain text."""
        case = f"\n{self.case}" if self.case is not None else ""
        return f"{self.exercise}: {self.says}{case}"

    def html(self) -> str:
        """All of it as a box, in which every space counts: two spaces of a text are not one."""
        case = self.case._repr_html_() if self.case is not None else ""
        html = box(f"**{self.exercise}**: {self.says}", self.status, case)
        return html.replace("<p>", '<p style="white-space:pre-wrap">')


def as_html(markdown: str) -> str:
    """Markdown as HTML; what stands between $ signs is left to the notebook, which typesets it."""
    return _MARKDOWN.render(markdown)


def box(markdown: str, status: str, html: str = "") -> str:
    """Markdown, and HTML below it, in a box whose edge has the status's colour."""
    return (
        f'<div style="border-left:6px solid {COLOURS[status]};padding:.4em 1em;margin:.4em 0;'
        f'background:rgba(127,127,127,.08)">{as_html(markdown)}{html}</div>'
    )
