"""Week 0. A few strokes for pictures in SVG: boxes, arrows with shapes on them, grids of numbers, words.

A picture stands on a panel of its own and follows the reader's light or dark mode. It is as narrow as a phone
allows, and as high as what is in it. Colour never says anything alone: what is learned has a thick edge, what
is frozen a dashed one, what came out a double one.

What a picture says of the code it says by name: `of` is where the code has it, and a test looks there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

KINDS = {
    "values": "values",
    "learned": "learned weights",
    "frozen": "frozen weights",
    "step": "a step",
    "chosen": "the result",
}
"""What a box is, as the legend says it."""
LETTERS = {
    "B": "texts",
    "T": "positions",
    "C": "n_embd",
    "H": "n_head",
    "D": "head_dim",
    "V": "vocab_size",
    "L": "n_layer",
    "M": "max_length",
    "W": "window",
    "N": "n_hidden",
    "I": "in_features",
    "O": "out_features",
    "G": "group_size",
    "R": "r, the rank",
    "A": "tokens of prompt and answer",
    "K": "passages",
    "E": "numbers of a vector",
    "S": "slots",
}
"""What a letter in a shape stands for, in all pictures."""
STYLE = """
.paper{fill:#ffffff;stroke:#d0d7de}.ink{fill:#1f2328}.soft{fill:#57606a}
.line{stroke:#57606a;stroke-width:1.6;fill:none}.again{stroke-dasharray:6 4}.head{fill:#57606a}
.stream{stroke:#0072b2;stroke-width:4;fill:none}
.values{fill:#e3f0fa;stroke:#0072b2;stroke-width:1.4}.learned{fill:#fdf1d6;stroke:#b37400;stroke-width:3}
.frozen{fill:#fdf1d6;stroke:#b37400;stroke-width:1.4;stroke-dasharray:5 3}
.step{fill:#f3f4f6;stroke:#8c959f;stroke-width:1.4}.chosen{fill:#d9f2e8;stroke:#00795c;stroke-width:1.8}
.group{fill:#f6f8fa;stroke:#8c959f;stroke-width:1.2}.week{fill:#f6e0ec;stroke:#a8487f;stroke-width:1}
.values-shade{fill:#0072b2}.learned-shade{fill:#d98a00}.chosen-shade{fill:#009e73}
.part0{fill:#0072b2}.part1{fill:#e69f00}.part2{fill:#009e73}.part3{fill:#cc79a7}
@media (prefers-color-scheme:dark){
.paper{fill:#0d1117;stroke:#3d444d}.ink{fill:#f0f6fc}.soft{fill:#a9b4c0}
.line{stroke:#a9b4c0}.head{fill:#a9b4c0}.stream{stroke:#56b4e9}
.values{fill:#12304a;stroke:#56b4e9}.learned{fill:#3d2c08;stroke:#e69f00}
.frozen{fill:#3d2c08;stroke:#e69f00}
.step{fill:#21262d;stroke:#7d8590}.chosen{fill:#0b3b2f;stroke:#3fc79a}
.group{fill:#161b22;stroke:#7d8590}.week{fill:#45253a;stroke:#cc79a7}
.values-shade{fill:#56b4e9}.learned-shade{fill:#e69f00}.chosen-shade{fill:#3fc79a}
.part0{fill:#56b4e9}.part1{fill:#e69f00}.part2{fill:#3fc79a}.part3{fill:#cc79a7}
}
"""
WIDTH = 480
"""Of every picture, in pixels: on a phone of 360 the smallest words still have nine."""
MARGIN = 24
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


def around(x: float, y: float, width: float, height: float) -> Box:
    """A box with its middle there."""
    return Box(x - width / 2, y - height / 2, width, height)


@dataclass(frozen=True)
class Claim:
    """Something that a picture says of the code."""

    words: str
    """A shape, such as "[B, T, C]", or a name, such as "q_proj"."""
    of: str
    """What has that shape or name: see `tests/course/evidence.py`."""


def text_width(words: str, size: float, wide: bool = False) -> float:
    """About how wide words are, in pixels. wide: in letters of one width."""
    if wide:
        return 0.61 * size * len(words)
    narrow = sum(letter in " .,:;ijlt'|[]()" for letter in words)
    return size * (0.6 * (len(words) - narrow) + 0.33 * narrow)


class Picture:
    """An SVG being drawn; places are in pixels from the upper left corner."""

    def __init__(self, title: str, idea: str, description: str):
        """title: the heading, also for screen readers. idea: what there is to see, in a line under it.
        description: the whole picture, in words.
        """
        self.title = f"{title}: {idea[0].lower()}{idea[1:]}" if idea[1].islower() else f"{title}: {idea}"
        self.description = description
        self.boxes: list[Box] = []
        self.groups: list[Box] = []
        """What boxes stand in together."""
        self.words: list[Box] = []
        """Where words stand, about: a test holds that nothing lies on anything else."""
        self.lines: list[tuple[Point, Point]] = []
        self.shapes: list[Claim] = []
        self.types: list[Claim] = []
        self.names: list[Claim] = []
        self._parts: list[str] = []
        self._kinds: dict[str, None] = {}
        self.write(MARGIN, 36, title, size=17, anchor="start", bold=True)
        self.write(MARGIN, 57, idea, size=13, anchor="start", soft=True)

    @property
    def bottom(self) -> float:
        """The lowest place at which something is drawn."""
        places = [box.bottom[1] for box in (*self.boxes, *self.groups, *self.words)]
        return max(places + [y for line in self.lines for _, y in line])

    def close(self, *hidden: str) -> "Picture":
        """Adds what the looks of boxes and the letters in shapes mean. hidden: kinds that need no word."""
        y = self.bottom + 30
        kinds = [kind for kind in KINDS if kind in self._kinds and kind not in hidden]
        x: float = MARGIN
        for kind in kinds:
            width = 27 + text_width(KINDS[kind], SMALLEST)
            if x + width > WIDTH - MARGIN:
                x, y = MARGIN, y + 22
            self._rectangle(Box(x, y - 11, 20, 14), kind, corner=3)
            if kind == "chosen":
                self._rectangle(Box(x + 3, y - 8, 14, 8), kind, corner=2)
            self.write(x + 27, y, KINDS[kind], size=SMALLEST, anchor="start", soft=True)
            x += width + 18
        y += 22 if kinds else 0
        letters = [letter for claim in self.shapes for letter in re.findall(r"[A-Z]", claim.words)]
        meanings = [f"{letter}: {LETTERS[letter]}" for letter in dict.fromkeys(letters)]
        for line in wrapped(meanings, " · ", WIDTH - 2 * MARGIN, SMALLEST):
            self.write(MARGIN, y, line, size=SMALLEST, anchor="start", soft=True)
            y += 18
        return self

    def svg(self) -> str:
        """The picture as a file's text."""
        height = round(self.bottom + 20)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
            f' width="{WIDTH}" height="{height}" role="img" aria-labelledby="title desc"'
            ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        )
        paper = f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>'
        return "\n".join(
            [
                head,
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="desc">{escape(self.description)}</desc>',
                f"<style>{STYLE}</style>",
                paper,
                *self._parts,
                "</svg>\n",
            ]
        )

    # ---- words

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
        assert start >= 0 and start + width <= WIDTH, f"{words!r} leaves the picture"
        self.words.append(Box(start, y - 0.75 * size, width, 0.95 * size))
        more = ' font-weight="600"' if bold else ""
        if wide:
            more += ' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"'
        kind = "soft" if soft else "ink"
        self._parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{more}>'
            f"{escape(words)}</text>"
        )

    def note(self, x: float, y: float, words: str, *, anchor: str = "start", bold: bool = False) -> None:
        """Small words in several lines, the first with its baseline at y."""
        for number, line in enumerate(words.split("\n")):
            soft = not (bold and number == 0)
            self.write(
                x, y + 16 * number, line, size=SMALLEST, anchor=anchor, soft=soft, bold=bold and not soft
            )

    def shape(self, x: float, y: float, words: str, of: str, *, anchor: str = "middle") -> None:
        """The shape of something in the code, as [B, T, C], or its type, as bf16."""
        (self.shapes if words.startswith("[") else self.types).append(Claim(words, of))
        self.write(x, y, words, size=SMALLEST, soft=True, wide=True, anchor=anchor)

    def name(self, x: float, y: float, words: str, of: str, *, anchor: str = "middle") -> None:
        """The name of something in the code."""
        self.names.append(Claim(words, of))
        self.write(x, y, words, size=13, wide=True, anchor=anchor)

    def week(self, x: float, y: float, number: int, words: str = "") -> None:
        """A week's badge with its middle at y, and what is done in it, in up to two lines."""
        self._rectangle(Box(x, y - 10, 60, 20), "week", corner=10)
        self.write(x + 30, y + 4.5, f"week {number}", size=SMALLEST)
        lines = words.split("\n")
        self.note(x + 68, y + 4.5 - 8 * (len(lines) - 1), words)

    # ---- boxes

    def box(
        self,
        place: Box,
        words: str = "",
        kind: str = "step",
        *,
        of: str = "",
        shape: tuple[str, str] | None = None,
        behind: int = 0,
    ) -> Box:
        """A box with words in its middle, a line for each of the lines in them.

        of: what the code calls so; then the words are its name, in letters of one width. shape: what stands
        under the words, and of what it is. behind: more of the same, of which only the edges are seen.
        """
        self._kinds[kind] = None
        self.boxes.append(place)
        for offset in range(6 * behind, 0, -6):
            self._rectangle(Box(place.x + offset, place.y - offset, place.width, place.height), kind, 6)
        self._rectangle(place, kind, corner=6)
        if kind == "chosen":
            inner = Box(place.x + 3, place.y + 3, place.width - 6, place.height - 6)
            self._rectangle(inner, kind, corner=4)
        lines = words.split("\n") if words else []
        rows = len(lines) + (shape is not None)
        y = place.left[1] - 8.5 * (rows - 1) + 4.8
        for line in lines:
            width = text_width(line, 13 if of else 14, wide=bool(of))
            assert width <= place.width - 6, f"{line!r} is too wide for its box"
            if of:
                self.name(place.top[0], y, line, of)
            else:
                self.write(place.top[0], y, line, size=14)
            y += 17
        if shape:
            self.shape(place.top[0], y, *shape)
        return place

    def group(self, place: Box, words: str = "", *, behind: int = 0) -> Box:
        """A panel behind boxes that belong together, with words in its upper left corner."""
        self.groups.append(place)
        for offset in range(6 * behind, 0, -6):
            self._rectangle(Box(place.x + offset, place.y - offset, place.width, place.height), "group", 8)
        self._rectangle(place, "group", corner=8)
        if words:
            self.write(place.x + 10, place.y + 18, words, size=SMALLEST, anchor="start", bold=True)
        return place

    def _rectangle(self, place: Box, kind: str, corner: float = 0, more: str = "") -> None:
        self._parts.append(
            f'<rect class="{kind}" x="{place.x:g}" y="{place.y:g}" width="{place.width:g}"'
            f' height="{place.height:g}" rx="{corner:g}"{more}/>'
        )

    def plus(self, x: float, y: float) -> Box:
        """A small circle with a plus: where two things are added."""
        return self._sign(x, y, ((x - 6, y), (x + 6, y)), ((x, y - 6), (x, y + 6)))

    def times(self, x: float, y: float) -> Box:
        """A small circle with a cross: where two things are multiplied."""
        return self._sign(
            x, y, ((x - 4.5, y - 4.5), (x + 4.5, y + 4.5)), ((x - 4.5, y + 4.5), (x + 4.5, y - 4.5))
        )

    def _sign(self, x: float, y: float, *strokes: tuple[Point, Point]) -> Box:
        self._parts.append(f'<circle class="step" cx="{x:g}" cy="{y:g}" r="11"/>')
        for (x0, y0), (x1, y1) in strokes:
            self._parts.append(f'<polyline class="line" points="{x0:g},{y0:g} {x1:g},{y1:g}"/>')
        return Box(x - 11, y - 11, 22, 22)

    # ---- lines

    def arrow(
        self,
        *points: Point,
        again: bool = False,
        shape: tuple[str, str] | None = None,
        side: str = "",
        stream: bool = False,
    ) -> None:
        """A line through these points with a head at the last.

        again: dashed, for what comes round. shape: written beside its longest part, and of what it is; side:
        left, right, above or below. stream: thick.
        """
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        self.line(*points[:-1], (x1 - 6 * dx, y1 - 6 * dy), again=again, stream=stream)
        corners = [(x1, y1)]
        for way in (1, -1):
            corners.append((x1 - 9 * dx + way * 4.5 * dy, y1 - 9 * dy - way * 4.5 * dx))
        drawn = " ".join(f"{x:.4g},{y:.4g}" for x, y in corners)
        self._parts.append(f'<polygon class="head" points="{drawn}"/>')
        if shape:
            self._beside(points, shape, side)

    def _beside(self, points: Sequence[Point], shape: tuple[str, str], side: str) -> None:
        lengths = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pairwise(points)]
        (x0, y0), (x1, y1) = list(pairwise(points))[lengths.index(max(lengths))]
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        side = side or ("right" if x0 == x1 else "above")
        if side in ("left", "right"):
            away = 9 if side == "right" else -9
            self.shape(x + away, y + 4, *shape, anchor="start" if side == "right" else "end")
        else:
            self.shape(x, y - 8 if side == "above" else y + 17, *shape)

    def line(self, *points: Point, again: bool = False, stream: bool = False) -> None:
        """A line through these points, without a head."""
        assert all(0 <= x <= WIDTH and y >= 0 for x, y in points), points
        assert all(a != b for a, b in pairwise(points)), points
        self.lines += pairwise(points)
        drawn = " ".join(f"{x:g},{y:g}" for x, y in points)
        look = "stream" if stream else "line"
        self._parts.append(f'<polyline class="{look}{" again" if again else ""}" points="{drawn}"/>')

    def bracket(self, x0: float, x1: float, y: float, depth: float = 6) -> None:
        """A flat bracket under (or, with a negative depth, over) what stands from x0 to x1."""
        self.line((x0, y), (x0, y + depth), (x1, y + depth), (x1, y))

    # ---- tables

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
        wide: bool = False,
    ) -> Box:
        """Numbers or words in cells.

        largest: of the numbers; a cell is the darker, the nearer it is to it; 0: all alike. parts: for each
        cell which part (0 to 3) of the whole it belongs to, in a colour of its own; -1: none. wide: in
        letters of one width.
        """
        width, height = cell
        place = Box(x, y, width * len(rows[0]), height * len(rows))
        self.boxes.append(place)
        self._kinds[kind] = None
        self._rectangle(place, kind)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                here = Box(x + width * j, y + height * i, width, height)
                if parts is not None and parts[i][j] >= 0:
                    self._rectangle(here, f"part{parts[i][j]}", more=' fill-opacity="0.3"')
                elif largest and isinstance(value, float) and value > 0:
                    opacity = 0.5 * min(value / largest, 1)
                    self._rectangle(here, f"{kind}-shade", more=f' fill-opacity="{opacity:.2f}"')
                self._cell(here, value if isinstance(value, str) else f"{value:.{digits}f}", wide)
        for i in range(1, len(rows)):
            self._rule((x, y + height * i), (x + place.width, y + height * i))
        for j in range(1, len(rows[0])):
            self._rule((x + width * j, y), (x + width * j, y + place.height))
        return place

    def _cell(self, place: Box, words: str, wide: bool) -> None:
        if words:
            width = text_width(words, SMALLEST, wide)
            assert width <= place.width, f"{words!r} is too wide for its cell"
            x, y = place.top[0], place.left[1] + 4.5
            self.write(x, y, words.replace("-", "−"), size=SMALLEST, wide=wide)

    def _rule(self, start: Point, end: Point) -> None:
        self._parts.append(
            f'<line class="line" stroke-opacity="0.35" style="stroke-width:1" x1="{start[0]:g}"'
            f' y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}"/>'
        )

    def bar(self, place: Box, kind: str = "values") -> None:
        """A length that stands for a number."""
        self._rectangle(place, kind, corner=2)
        self.boxes.append(place)

    def dot(self, x: float, y: float, kind: str = "values") -> None:
        """A number on a line."""
        self._parts.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="4.5"/>')

    def frame(self, place: Box) -> None:
        """A strong edge round cells that are meant."""
        self._rectangle(place, "line", more=' style="stroke-width:3"')


def wrapped(pieces: Sequence[str], between: str, width: float, size: float) -> list[str]:
    """Pieces joined to lines of at most this width."""
    lines: list[str] = []
    for piece in pieces:
        if lines and text_width(lines[-1] + between + piece, size) <= width:
            lines[-1] += between + piece
        else:
            lines.append(piece)
    return lines
