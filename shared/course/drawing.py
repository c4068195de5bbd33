"""Week 0. A few strokes for pictures in SVG: boxes, arrows, grids of numbers, words. `diagrams.py` draws with
them.

A picture stands on a panel of its own and follows the reader's light or dark mode. Colour never says anything
alone: what is learned has a thick edge, what was chosen a double one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

KINDS = ("values", "learned", "step", "chosen")
"""What a box is: numbers that flow, numbers that are learned, something that is done, what came out of it."""
STYLE = """
.paper{fill:#ffffff;stroke:#d0d7de}.ink{fill:#1f2328}.soft{fill:#57606a}
.line{stroke:#57606a;stroke-width:1.6;fill:none}.again{stroke-dasharray:6 4}.head{fill:#57606a}
.values{fill:#e3f0fa;stroke:#0072b2;stroke-width:1.4}.learned{fill:#fdf1d6;stroke:#b37400;stroke-width:3}
.step{fill:#f3f4f6;stroke:#8c959f;stroke-width:1.4}.chosen{fill:#d9f2e8;stroke:#00795c;stroke-width:1.8}
.values-shade{fill:#0072b2}.learned-shade{fill:#d98a00}.chosen-shade{fill:#009e73}
.part0{fill:#0072b2}.part1{fill:#e69f00}.part2{fill:#009e73}
@media (prefers-color-scheme:dark){
.paper{fill:#0d1117;stroke:#3d444d}.ink{fill:#f0f6fc}.soft{fill:#a9b4c0}
.line{stroke:#a9b4c0}.head{fill:#a9b4c0}
.values{fill:#12304a;stroke:#56b4e9}.learned{fill:#3d2c08;stroke:#e69f00}
.step{fill:#21262d;stroke:#7d8590}.chosen{fill:#0b3b2f;stroke:#3fc79a}
.values-shade{fill:#56b4e9}.learned-shade{fill:#e69f00}.chosen-shade{fill:#3fc79a}
.part0{fill:#56b4e9}.part1{fill:#e69f00}.part2{fill:#3fc79a}
}
"""
SMALLEST = 12
"""Pixels of the smallest words."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle in a picture, with the middles of its sides, where arrows begin and end."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height


def text_width(words: str, size: float, wide: bool = False) -> float:
    """About how wide words are, in pixels. wide: in letters of one width."""
    if wide:
        return 0.61 * size * len(words)
    narrow = sum(letter in " .,:;ijlt'|[]()" for letter in words)
    return size * (0.6 * (len(words) - narrow) + 0.33 * narrow)


class Picture:
    """An SVG being drawn; places are in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str, description: str):
        """title: the heading, also for screen readers. description: the whole picture, in words."""
        self.width = width
        self.height = height
        self.title = title
        self.description = description
        self.boxes: list[Box] = []
        self.words: list[Box] = []
        """Where words stand, about: a test holds that nothing lies on anything else."""
        self._parts: list[str] = []
        self.write(24, 36, title, size=17, anchor="start", bold=True)

    def svg(self) -> str:
        """The picture as a file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"'
            f' width="{self.width}" height="{self.height}" role="img" aria-labelledby="title desc"'
            ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        )
        paper = f'<rect class="paper" x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}"'
        return "\n".join(
            [
                head,
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="desc">{escape(self.description)}</desc>',
                f"<style>{STYLE}</style>",
                f'{paper} rx="10"/>',
                *self._parts,
                "</svg>\n",
            ]
        )

    def write(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 13,
        anchor: str = "middle",
        bold: bool = False,
        soft: bool = False,
        wide: bool = False,
    ) -> None:
        """Words whose baseline is at y. soft: paler. wide: in letters of one width, for code and shapes."""
        assert size >= SMALLEST, words
        width = text_width(words, size, wide) * (1.1 if bold else 1)
        start = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        assert start >= 0 and start + width <= self.width, f"{words!r} leaves the picture"
        self.words.append(Box(start, y - 0.75 * size, width, 0.95 * size))
        more = ' font-weight="600"' if bold else ""
        if wide:
            more += ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'
        kind = "soft" if soft else "ink"
        self._parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{more}>'
            f"{escape(words)}</text>"
        )

    def shape(self, x: float, y: float, words: str) -> None:
        """The shape of what stands above it."""
        self.write(x, y, words, size=SMALLEST, soft=True, wide=True)

    def box(self, place: Box, words: str = "", kind: str = "step", *, behind: int = 0) -> Box:
        """A box with words in its middle, a line for each of the lines in them. behind: more of the same, of
        which only the edges are seen.
        """
        assert kind in KINDS, kind
        size = 14
        self.boxes.append(place)
        for offset in range(8 * behind, 0, -8):
            self._rectangle(Box(place.x + offset, place.y - offset, place.width, place.height), kind, 6)
        self._rectangle(place, kind, corner=6)
        if kind == "chosen":
            inner = Box(place.x + 3, place.y + 3, place.width - 6, place.height - 6)
            self._rectangle(inner, kind, corner=4)
        lines = words.split("\n") if words else []
        middle, y = place.top[0], place.left[1] - 0.65 * size * (len(lines) - 1) + 0.35 * size
        for line in lines:
            assert text_width(line, size) <= place.width - 6, f"{line!r} is too wide for its box"
            self.write(middle, y, line, size=size)
            y += 1.3 * size
        return place

    def _rectangle(self, place: Box, kind: str, corner: float = 0, more: str = "") -> None:
        self._parts.append(
            f'<rect class="{kind}" x="{place.x:g}" y="{place.y:g}" width="{place.width:g}"'
            f' height="{place.height:g}" rx="{corner:g}"{more}/>'
        )

    def arrow(self, *points: Point, again: bool = False) -> None:
        """A line through these points with a head at the last. again: dashed, for what comes round."""
        self.line(*points, again=again)
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        corners = [(x1, y1)]
        for side in (1, -1):
            corners.append((x1 - 9 * dx + side * 4.5 * dy, y1 - 9 * dy - side * 4.5 * dx))
        drawn = " ".join(f"{x:.4g},{y:.4g}" for x, y in corners)
        self._parts.append(f'<polygon class="head" points="{drawn}"/>')

    def line(self, *points: Point, again: bool = False) -> None:
        """A line through these points, without a head."""
        assert all(0 <= x <= self.width and 0 <= y <= self.height for x, y in points), points
        assert all(a != b for a, b in pairwise(points)), points
        drawn = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline class="line{" again" if again else ""}" points="{drawn}"/>')

    def grid(
        self,
        x: float,
        y: float,
        rows: Sequence[Sequence[float | str]],
        *,
        cell: tuple[float, float] = (36, 28),
        kind: str = "values",
        largest: float = 0.0,
        digits: int = 1,
        parts: Sequence[Sequence[int]] | None = None,
    ) -> Box:
        """Numbers or words in cells.

        largest: of the numbers; a cell is the darker, the nearer it is to it; 0: all alike. parts: for each
        cell which part (0, 1, 2) of the whole it belongs to, in a colour of its own.
        """
        width, height = cell
        place = Box(x, y, width * len(rows[0]), height * len(rows))
        self.boxes.append(place)
        self._rectangle(place, kind)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                here = Box(x + width * j, y + height * i, width, height)
                if parts is not None:
                    self._rectangle(here, f"part{parts[i][j]}", more=' fill-opacity="0.3"')
                elif largest and isinstance(value, float) and value > 0:
                    opacity = 0.5 * min(value / largest, 1)
                    self._rectangle(here, f"{kind}-shade", more=f' fill-opacity="{opacity:.2f}"')
                self._cell(here, value if isinstance(value, str) else f"{value:.{digits}f}")
        for i in range(1, len(rows)):
            self._rule((x, y + height * i), (x + place.width, y + height * i))
        for j in range(1, len(rows[0])):
            self._rule((x + width * j, y), (x + width * j, y + place.height))
        return place

    def _cell(self, place: Box, words: str) -> None:
        if words:
            assert text_width(words, SMALLEST) <= place.width, f"{words!r} is too wide for its cell"
            self.write(place.top[0], place.left[1] + 4.5, words.replace("-", "−"), size=SMALLEST)

    def _rule(self, start: Point, end: Point) -> None:
        self._parts.append(
            f'<line class="line" stroke-opacity="0.35" style="stroke-width:1" x1="{start[0]:g}"'
            f' y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}"/>'
        )

    def frame(self, place: Box) -> None:
        """A strong edge round cells that are meant."""
        self._rectangle(place, "line", more=' style="stroke-width:3"')

    def plus(self, x: float, y: float) -> Box:
        """A small circle with a plus: where two things are added."""
        self._parts.append(f'<circle class="step" cx="{x:g}" cy="{y:g}" r="12"/>')
        for start, end in (((x - 6, y), (x + 6, y)), ((x, y - 6), (x, y + 6))):
            self.line(start, end)
        return Box(x - 12, y - 12, 24, 24)

    def legend(self, x: float, y: float, *kinds: str) -> None:
        """What the looks of boxes mean, in a row."""
        names = {
            "values": "values that flow",
            "learned": "learned weights",
            "step": "a step without weights",
            "chosen": "the result",
        }
        for kind in kinds:
            place = Box(x, y - 11, 20, 14)
            self._rectangle(place, kind, corner=3)
            if kind == "chosen":
                self._rectangle(Box(x + 3, y - 8, 14, 8), kind, corner=2)
            self.write(x + 27, y, names[kind], size=SMALLEST, anchor="start", soft=True)
            x += 27 + text_width(names[kind], SMALLEST) + 22
