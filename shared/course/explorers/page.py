"""Week 0. An explorer: a title, data and JavaScript as one piece of HTML, for a notebook and a site.

Where scripts run, the piece puts a page of its own into a frame: neither its styles nor its keys meddle with
what is round it, and it can fetch nothing. Where they are stripped (code-hosting sites, a notebook that is
not trusted yet), a picture or a table stands there instead. `page.css` and `page.js` are what all explorers
share, `embed.js` makes the frame.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).parent
LIMIT = 300_000
"""Bytes of an explorer with its data: a notebook with a few of them still opens at once."""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""What the browser lets the page do: run what stands in it, and fetch nothing."""


@cache
def source(name: str) -> str:
    """The text of a file beside this one."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert "</script" not in text.lower() and "<!--" not in text, name
    return text


def script_json(values: Any) -> str:
    """JSON for inside of a script element: no text in it can end the element, or begin a comment.

    Raises ValueError for numbers that JSON does not have (nan, infinity).

    >>> script_json({"text": "</script>"})
    '{"text":"\\\\u003c/script>"}'
    """
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def in_base64(numbers: Tensor) -> str:
    """float32, the lowest byte first, as base64: `numbersOf` of page.js reads it."""
    packed = numbers.detach().cpu().contiguous().numpy().astype("<f4")
    return base64.b64encode(packed.tobytes()).decode("ascii")


@dataclass(frozen=True)
class Explorer:
    """Something to play with. As a cell's last line, a notebook draws it.

    Raises ValueError where it is larger than `LIMIT`.
    """

    title: str
    scripts: tuple[str, ...]
    """The JavaScript files, of those beside this module, in the order in which they are read."""
    data: Mapping[str, Any]
    """What the scripts are given, as JSON."""
    stand_in: str
    """HTML for where scripts do not run: a picture with its words, or a table."""

    def __post_init__(self) -> None:
        size = len(self._repr_html_().encode())
        if size > LIMIT:
            raise ValueError(
                f"{self.title}: {size:,} bytes with its data, more than the {LIMIT:,} that an explorer may"
                " have: give it less (a shorter text, fewer layers or vocabularies)"
            )

    def __repr__(self) -> str:
        return f"{self.title} (an explorer: a notebook draws it)"

    def page(self) -> str:
        """The page that stands in the frame: a whole HTML document, which needs nothing else."""
        scripts = [f"<script>{source(name)}</script>\n" for name in ("page.js", *self.scripts)]
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f"<title>{escape(self.title)}</title>\n<style>{source('page.css')}</style></head>\n"
            f'<body><main><h2>{escape(self.title)}</h2><div id="explorer"></div></main>\n'
            f'<script type="application/json" id="data">{script_json(self.data)}</script>\n'
            f"{''.join(scripts)}</body></html>\n"
        )

    def _repr_html_(self) -> str:
        page = self.page()
        key = hashlib.sha256(page.encode()).hexdigest()[:12]
        arguments = ", ".join(map(script_json, (key, self.title, page)))
        heading = f"<p><strong>{escape(self.title)}</strong></p>"
        return (
            f'<div data-explorer="{key}">{heading}\n{self.stand_in}</div>\n'
            f"<script>(() => {{\n{source('embed.js')}\nembedExplorer({arguments});\n}})();</script>"
        )
