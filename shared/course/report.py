"""Week 0. From run logs to plots, tables and the progress ladder. Nothing here knows a model: it reads JSON
and draws.

    python -m shared.course.report

redraws every plot, refills every table from `logs/` (see shared/course/markdown.py), and makes the progress
page.
"""

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from shared.commandline import errors_for_people, parse_args
from shared.course.markdown import documents, refill
from shared.course.progress import NAMES, collect
from shared.course.progress_page import markdown_page, write_page
from shared.course.runs import TOPICS, newest_logs, output_root, week_results, weeks
from shared.course.style import style
from shared.extras import needs
from shared.runtime import ROOT, read_json, read_jsonl, write_atomically

with needs("course"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
"""Of Okabe and Ito: told apart by everyone."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")


# ---- reading


@dataclass(frozen=True)
class LoggedRun:
    """A run as the files in its folder describe it (see `RunLog`)."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def run(self) -> dict[str, Any]:
        return read_json(self.folder / "run.json")

    @cached_property
    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return read_jsonl(path) if path.exists() else []

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self._optional("summary.json")

    @cached_property
    def artifacts(self) -> dict[str, Any]:
        return self._optional("artifacts.json")

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.exists() else {}

    def series(self, y: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The logged values of y against x, where both were logged."""
        rows = [row for row in self.rows if y in row and x in row]
        return [row[x] for row in rows], [row[y] for row in rows]


def read_runs(folder: Path) -> dict[str, LoggedRun]:
    """The runs in a week's log folder, by name."""
    return {p.parent.name: LoggedRun(p.parent) for p in sorted(Path(folder).glob("*/run.json"))}


def reference_for(logs: Path) -> dict[str, LoggedRun]:
    """The course's own runs of the same week on the same data, to draw yours over.

    None for the reference itself, for smoke runs, and for data that the course has no run on.
    """
    parts = Path(logs).parts
    if "mine" not in parts or "smoke" in parts:
        return {}
    last_mine = len(parts) - 1 - parts[::-1].index("mine")
    return read_runs(ROOT / "logs" / parts[last_mine - 1] / "reference" / parts[-1])


# ---- drawing


def figure(width: float = 8, height: float = 4.8, **subplots: Any) -> tuple[Figure, Any]:
    """A matplotlib figure and its axes, as `Figure.subplots` returns them, in the course's style.

    What is added to them has the course's style inside `style()`, where every week's plots are drawn. The
    figure doesn't belong to pyplot, so nothing is left open and no window is needed.
    """
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(**subplots)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, its folder made if needed. The same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        # Figure.savefig would draw it twice, the first time for the layout.
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path


@dataclass(frozen=True)
class Curve:
    """A line of a plot."""

    run: LoggedRun
    label: str
    y: str = "val_loss"


def curves(
    path: Path,
    lines: Sequence[Curve],
    title: str,
    *,
    x: str = "step",
    xlabel: str = "step",
    ylabel: str = "validation loss (nats per token)",
    reference: Sequence[Curve] = (),
    levels: Mapping[str, float] | None = None,
    ylim: tuple[float | None, float | None] | None = None,
) -> Path:
    """Draws logged values against steps or seconds, and returns the plot's path.

    reference: the course's curves, drawn pale and dotted below. levels: horizontal lines by label. A loss in
    nats (by its `ylabel`) can be read as a perplexity on the right.
    """
    with style():
        fig, ax = figure()
        for i, curve in enumerate(reference):
            _draw_reference(ax, i, curve, x)
        for i, curve in enumerate(lines):
            _draw_curve(ax, i, curve, x)
        for i, (name, value) in enumerate((levels or {}).items()):
            pattern = LINES[1 + i % 3]
            ax.axhline(value, color="#555555", linewidth=1.2, linestyle=pattern, label=f"{name}: {value:.3f}")
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if ylim:
            ax.set_ylim(*ylim)
        if "nats" in ylabel:
            perplexity_axis(ax)
        ax.legend(frameon=False)
        return save_figure(fig, path)


def _draw_reference(ax: Axes, i: int, curve: Curve, x: str) -> None:
    xs, ys = curve.run.series(curve.y, x)
    label = f"course: {curve.label}"
    ax.plot(xs, ys, color=COLOURS[i % 8], alpha=0.45, linestyle=":", linewidth=3, label=label)


def _draw_curve(ax: Axes, i: int, curve: Curve, x: str) -> None:
    xs, ys = curve.run.series(curve.y, x)
    ax.plot(
        xs,
        ys,
        color=COLOURS[i % 8],
        linestyle=LINES[i % 4],
        marker=MARKERS[i % 8] if len(xs) <= 30 else None,
        markersize=5,
        linewidth=1.8,
        label=curve.label,
    )


def perplexity_axis(ax: Axes) -> None:
    """Adds a perplexity axis on the right of a plot of losses in nats: e to the power of the loss."""
    low, high = ax.get_ylim()
    ticks = _perplexity_ticks(math.exp(low), math.exp(high))
    with style():
        right = ax.secondary_yaxis("right", functions=(np.exp, _log))
        right.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
        right.minorticks_off()
        right.set_ylabel("perplexity")


def _log(perplexity: Any) -> Any:
    return np.log(np.maximum(perplexity, 1e-9))  # matplotlib also tries 0


def _perplexity_ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers from `low` to `high`, as many as there can be."""
    halves = [n / 2 for n in range(2, 20)]
    coarser_and_coarser = (halves, halves[::2], [1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1])
    scales = [(digits, range(19)) for digits in coarser_and_coarser]
    scales.append(([1], range(0, 19, 3)))  # every third power of 10
    for digits, exponents in scales:
        candidates = [digit * 10**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in candidates if low <= tick <= high]
        if len(ticks) <= 8:
            return ticks
    return []


def heatmap(
    ax: Axes,
    values: Any,
    title: str,
    xlabels: Sequence[Any],
    ylabels: Sequence[Any],
    *,
    xlabel: str,
    ylabel: str,
    unit: str | None = None,
) -> None:
    """A matrix as colours on `ax`, each row and column named; nan is white.

    unit: labels the colour bar; None leaves the bar out.
    """
    with style():
        image = ax.imshow(np.asarray(values), cmap="viridis", aspect="auto", interpolation="nearest")
        ax.grid(False)
        many = max(len(xlabels), len(ylabels)) > 40
        letters = all(len(str(label)) == 1 for label in [*xlabels, *ylabels])
        size = 9
        if many:
            size = 11 if letters else 8
        ax.set_xticks(range(len(xlabels)), xlabels, fontsize=size, family="monospace")
        ax.set_yticks(range(len(ylabels)), ylabels, fontsize=size, family="monospace")
        if many:  # named at both ends: a cell in the middle is far from either
            ax.tick_params(labeltop=True, labelright=True, length=0)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if unit:
            ax.figure.colorbar(image, ax=ax, label=unit)


def bars(
    path: Path,
    values: Mapping[str, float],
    title: str,
    xlabel: str,
    *,
    format: str = ".3f",
    errors: Mapping[str, float] | None = None,
    start: float = 0,
) -> Path:
    """A horizontal bar for each name, with its value written at the end. start: where the axis begins."""
    names = list(values)
    widths = [values[name] for name in names]
    spreads = [(errors or {}).get(name, 0) for name in names]
    ends = [width + spread for width, spread in zip(widths, spreads)]
    with style():
        fig, ax = figure(height=1.4 + 0.42 * len(values))
        ax.barh(names, widths, color=COLOURS[0], xerr=spreads if errors else None, capsize=3)
        ax.invert_yaxis()
        for i, (width, end) in enumerate(zip(widths, ends)):
            text = f"{width:{format}}"
            ax.annotate(text, (end, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10)
        ax.set(title=title, xlabel=xlabel)
        ax.set_xlim(start, max(ends) + 0.12 * (max(ends) - start))
        return save_figure(fig, path)


def char_label(char: str) -> str:
    """A character as it can be read on an axis.

    >>> char_label(" "), char_label("\\n"), char_label("a")
    ('␣', '⏎', 'a')
    """
    return {" ": "␣", "\n": "⏎", "\t": "⇥"}.get(char, char)


# ---- the ladder and the cards


def ladder(path: Path, data: str, mine: bool) -> Path | None:
    """Bits per byte on the held-out text of `data`, week by week: the course's and, with `mine`, yours.

    None where there is no run.
    """
    measured = [_bits_per_byte("reference", data)]
    if mine:
        measured.append(_bits_per_byte("mine", data))
    if not any(measured):
        return None
    return save_figure(_ladder_figure(measured, data), path)


def _ladder_figure(measured: Sequence[Mapping[str, float]], data: str) -> Figure:
    """measured: bits per byte by topic, the course's and, if there is a second, the learner's."""
    topics = [topic for topic in TOPICS if any(topic in bits for bits in measured)]
    with style():
        fig, ax = figure()
        for i, bits in enumerate(measured):
            _draw_rungs(ax, i, [topics.index(topic) for topic in bits], list(bits.values()))
        ax.set_xticks(range(len(topics)), [f"{int(topic[:2])} {NAMES[topic]}" for topic in topics])
        ax.margins(x=0.08, y=0.18)
        low, high = ax.get_ylim()
        if high - low < 0.5:  # one rung: two figures that differ in the third digit should look alike
            ax.set_ylim((low + high) / 2 - 0.25, (low + high) / 2 + 0.25)
        ax.set(
            title=f"The ladder: bits per byte of the same held-out text ({data})",
            xlabel="week",
            ylabel="bits per byte (lower is better)",
        )
        ax.legend(frameon=False)
        return fig


def _bits_per_byte(owner: str, data: str) -> dict[str, float]:
    """By topic, of the weeks that measure it; smoke runs are left out."""
    bits = {}
    for topic in TOPICS:
        results = week_results(topic, owner, data)
        if results and results["preset"] != "smoke" and "bits_per_byte" in results["metrics"]:
            bits[topic] = results["metrics"]["bits_per_byte"]
    return bits


def _draw_rungs(ax: Axes, i: int, xs: list[int], ys: list[float]) -> None:
    """The course's weeks (i = 0) or the learner's (i = 1), joined by a line."""
    if not xs:
        return
    ax.plot(
        xs,
        ys,
        color=COLOURS[i],
        marker=MARKERS[i],
        linestyle=LINES[i],
        linewidth=2,
        markersize=8,
        label=("the course", "yours")[i],
    )
    offset = ((7, 7), (7, -15))[i]
    for x, y in zip(xs, ys):
        ax.annotate(f"{y:.2f}", (x, y), xytext=offset, textcoords="offset points", color=COLOURS[i])


# ---- all of it


def load_script(topic: str, name: str = "run") -> ModuleType:
    """One of a week's scripts (run, figures, studies, exercises) as a module, loaded anew.

    It finds the scripts beside it, as when it is run by itself. Every week has scripts of the same names, so
    in sys.modules they and what they define get the week's name: "weeks.01_bigram.run".
    """
    folder = ROOT / "weeks" / topic
    beside = [path.stem for path in folder.glob("*.py")]
    others = {stem: sys.modules.pop(stem) for stem in beside if stem in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for stem in beside:
            if stem in sys.modules:
                _rename(sys.modules.pop(stem), f"weeks.{topic}.{stem}")
        sys.modules.update(others)


def _rename(module: ModuleType, name: str) -> None:
    """Gives a module, with its classes and functions, another name, and enters it in sys.modules under it."""
    for value in vars(module).values():
        if isinstance(value, type | FunctionType) and value.__module__ == module.__name__:
            value.__module__ = name
    module.__name__ = name
    sys.modules[name] = module


@dataclass(frozen=True)
class Settings:
    """Redraws plots and refills tables from logs."""

    mine: bool = False
    """Only what is yours: plots in reports/NN_topic/mine and reports/mine, and the progress page."""


def main(settings: Settings) -> None:
    """Redraws all plots that there is a log for, refills the Markdown, and makes the progress page."""
    drawn: list[Path | None] = []
    for topic in weeks():
        drawn += _draw_week(topic, settings.mine)
    yours = [week_results(topic, "mine") for topic in weeks()]
    data = [results["data"] for results in yours if results]
    if data:
        drawn.append(ladder(output_root() / "reports" / "mine" / "ladder.png", data[-1], mine=True))
    if not settings.mine:
        drawn.append(ladder(ROOT / "reports" / "ladder.png", "tinyshakespeare", mine=False))
        write_atomically(ROOT / "reports" / "README.md", markdown_page(collect(mine=False)))
        _refill_documents()
    count = sum(path is not None for path in drawn)
    where = "reports/mine and reports/*/mine" if settings.mine else "reports"
    print(f"drew {count} plots in {where}")
    print(f"your progress, for a browser: {write_page()}")


def _draw_week(topic: str, only_mine: bool) -> list[Path]:
    """The plots of a week's newest run of yours and, if wanted, of the course's runs."""
    figures = load_script(topic, "figures")
    drawn: list[Path] = []
    with style():
        newest = newest_logs(topic, "mine")
        if newest:
            drawn += figures.draw(newest, output_root() / "reports" / topic / "mine")
        if only_mine:
            return drawn
        for week in sorted((ROOT / "logs" / topic / "reference").glob("*/week.json")):
            logs = week.parent
            folder = "" if logs.name == "tinyshakespeare" else logs.name
            drawn += figures.draw(logs, ROOT / "reports" / topic / folder)
    return drawn


def _refill_documents() -> None:
    for path in documents():
        if not path.exists():  # a link that leads nowhere
            continue
        old = path.read_text(encoding="utf-8")
        new = refill(old)
        if new != old:
            write_atomically(path, new)
            print(f"refilled {path.relative_to(ROOT)}")


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
