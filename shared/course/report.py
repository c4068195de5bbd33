"""Week 0. From run logs to plots, tables and the progress ladder. Nothing here knows a model: it reads JSON
and draws.

    python -m shared.course.report          # redraws every plot, refills every table from logs/, and makes the progress page

In Markdown, text between markers is generated. A table has a row for each run, a column for each
`key|heading|format`:

    <!-- table 04_mini_gpt/reference/tinyshakespeare classic,modern "best_val_loss|validation loss|.3f, seconds|time (s)|.0f" -->
    <!-- end -->

and a single figure is `<!-- = 04_mini_gpt/reference/tinyshakespeare/modern best_val_loss .3f -->1.497<!-- end
-->`.
"""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import matplotlib
import numpy as np

from shared.commandline import errors_for_people, parse_args
from shared.course.progress import NAMES, collect, markdown_page, write_page
from shared.course.workspace import TOPICS, newest_logs, output_root, week_results, weeks
from shared.runtime import ROOT, read_jsonl, write_atomically

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#000000",
    "#999999",
)  # Okabe and Ito: told apart by everyone
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}


# ---- reading


@dataclass(frozen=True)
class LoggedRun:
    """A run as its folder has it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def run(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())

    @cached_property
    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return read_jsonl(path) if path.exists() else []

    @cached_property
    def summary(self) -> dict[str, Any]:
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @cached_property
    def artifacts(self) -> dict[str, Any]:
        path = self.folder / "artifacts.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def series(self, y: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The logged values of y against x, where both were logged."""
        rows = [r for r in self.rows if y in r and x in r]
        return [r[x] for r in rows], [r[y] for r in rows]


def read_runs(folder: Path) -> dict[str, LoggedRun]:
    """The runs in a week's log folder, by name."""
    return {p.parent.name: LoggedRun(p.parent) for p in sorted(Path(folder).glob("*/run.json"))}


def reference_for(logs: Path) -> dict[str, LoggedRun]:
    """The course's own runs of the same week on the same data, to draw yours over; none for the reference
    itself, or for other data.
    """
    parts = Path(logs).parts
    if "mine" not in parts or "smoke" in parts:
        return {}
    at = len(parts) - 1 - parts[::-1].index("mine")
    return read_runs(ROOT / "logs" / parts[at - 1] / "reference" / parts[-1])


# ---- drawing


def figure(width: float = 8, height: float = 4.8, **subplots: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes, in the course's style."""
    matplotlib.rcParams.update(STYLE)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width, height), layout="constrained"
    )  # not pyplot: nothing is left open, no window needed
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**subplots)


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure as PNG, its folder made if needed. The same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
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
    x: str = "step",
    xlabel: str = "step",
    ylabel: str = "validation loss (nats per token)",
    reference: Sequence[Curve] = (),
    levels: dict[str, float] | None = None,
    ylim: tuple[float | None, float | None] | None = None,
) -> Path:
    """Logged values against steps or seconds. reference: drawn pale and dashed below. levels: horizontal
    lines by label. A loss in nats (by its `ylabel`) is read as a perplexity on the right.
    """
    fig, ax = figure()
    for i, curve in enumerate(reference):
        ax.plot(
            *curve.run.series(curve.y, x),
            color=COLOURS[i % 8],
            alpha=0.45,
            linestyle=":",
            linewidth=3,
            label=f"course: {curve.label}",
        )
    for i, curve in enumerate(lines):
        xs, ys = curve.run.series(curve.y, x)
        few = len(xs) <= 30
        ax.plot(
            xs,
            ys,
            color=COLOURS[i % 8],
            linestyle=LINES[i % 4],
            marker=MARKERS[i % 8] if few else None,
            markersize=5,
            linewidth=1.8,
            label=curve.label,
        )
    for name, value in (levels or {}).items():
        ax.axhline(
            value,
            color="#555555",
            linewidth=1.2,
            linestyle=LINES[1 + list(levels).index(name) % 3],
            label=f"{name}: {value:.3f}",
        )
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if ylim:
        ax.set_ylim(*ylim)
    if "nats" in ylabel:
        perplexity_axis(ax)
    ax.legend(frameon=False)
    return save_figure(fig, path)


def perplexity_axis(ax: Any) -> None:
    """Beside a loss in nats, on the right, the perplexity: e to its power."""
    low, high = map(math.exp, ax.get_ylim())
    halves = [m / 2 for m in range(2, 20)]
    scales = [(steps, 1) for steps in (halves, halves[::2], (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,))] + [
        ((1,), 3)
    ]  # the last: every third power of 10
    fitting = (
        [m * 10**e for e in range(0, 19, every) for m in steps if low <= m * 10**e <= high]
        for steps, every in scales
    )
    ticks = next((ticks for ticks in fitting if len(ticks) <= 8), [])
    right = ax.secondary_yaxis(
        "right", functions=(np.exp, lambda p: np.log(np.maximum(p, 1e-9)))
    )  # matplotlib also tries 0
    right.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    right.minorticks_off()
    right.set_ylabel("perplexity")


def heatmap(
    ax: Any,
    values: Any,
    title: str,
    xlabels: Sequence[str],
    ylabels: Sequence[str],
    xlabel: str,
    ylabel: str,
    unit: str | None = None,
) -> None:
    """A matrix as colours on `ax`, each row and column named. unit: labels the colour bar; None leaves the
    bar out.
    """
    image = ax.imshow(np.asarray(values), cmap="viridis", aspect="auto", interpolation="nearest")
    ax.grid(False)
    size = 9 if len(xlabels) <= 40 else 6
    ax.set_xticks(range(len(xlabels)), xlabels, fontsize=size, family="monospace")
    ax.set_yticks(range(len(ylabels)), ylabels, fontsize=size, family="monospace")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if unit:
        ax.figure.colorbar(image, ax=ax, label=unit)


def bars(
    path: Path,
    values: dict[str, float],
    title: str,
    xlabel: str,
    format: str = ".3f",
    errors: dict[str, float] | None = None,
    start: float = 0,
) -> Path:
    """A horizontal bar for each name, with its value written at the end."""
    fig, ax = figure(height=1.4 + 0.42 * len(values))
    names = list(values)
    ax.barh(
        names,
        [values[n] for n in names],
        color=COLOURS[0],
        xerr=[(errors or {}).get(n, 0) for n in names] if errors else None,
        capsize=3,
    )
    ax.invert_yaxis()
    for i, n in enumerate(names):
        ax.annotate(
            f"{values[n]:{format}}",
            (values[n] + (errors or {}).get(n, 0), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    ax.set(title=title, xlabel=xlabel)
    top = max(values[n] + (errors or {}).get(n, 0) for n in names)
    ax.set_xlim(start, top + 0.12 * (top - start))
    return save_figure(fig, path)


def char_label(char: str) -> str:
    """A character as it can be read on an axis.

    >>> char_label(" "), char_label("\\n"), char_label("a")
    ('␣', '⏎', 'a')
    """
    return {" ": "␣", "\n": "⏎", "\t": "⇥"}.get(char, char)


# ---- the ladder


def ladder(path: Path, data: str, mine: bool) -> Path | None:
    """Bits per byte on the held-out text of `data`, week by week: the course's and, with `mine`, yours. None
    where there is no run.
    """
    fig, ax = figure()
    results = {
        owner: {t: week_results(t, owner, data) for t in TOPICS}
        for owner in ("reference", *(["mine"] if mine else []))
    }
    measured = {
        owner: {
            t: r for t, r in weeks.items() if r and r["preset"] != "smoke" and "bits_per_byte" in r["metrics"]
        }
        for owner, weeks in results.items()
    }
    names = [t for t in TOPICS if any(t in weeks for weeks in measured.values())]
    for i, found in enumerate(measured.values()):
        xs, ys = [names.index(t) for t in found], [r["metrics"]["bits_per_byte"] for r in found.values()]
        if xs:
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
        for x, y in zip(xs, ys):
            ax.annotate(
                f"{y:.2f}", (x, y), xytext=(7, (7, -15)[i]), textcoords="offset points", color=COLOURS[i]
            )
    if not ax.lines:
        return None
    ax.set_xticks(range(len(names)), [f"{int(n[:2])} {NAMES[n]}" for n in names])
    ax.margins(x=0.08, y=0.18)
    ax.set(
        title=f"The ladder: bits per byte of the same held-out text ({data})",
        xlabel="week",
        ylabel="bits per byte (lower is better)",
    )
    ax.legend(frameon=False)
    return save_figure(fig, path)


def model_card(
    path: Path, title: str, facts: dict[str, str], figures: Sequence[dict[str, str]], usage: str, sample: str
) -> Path:
    """Writes a model's card in Markdown: what it is, what was measured, how to load it, what it writes.
    Returns its path.

    facts: a line each. figures: the rows of a table, their keys its heading. usage: Python. sample: text by
    the model.
    """
    rows = [
        list(figures[0]),
        ["---", *["---:"] * (len(figures[0]) - 1)],
        *(list(row.values()) for row in figures),
    ]
    parts = [
        f"# {title}",
        "\n".join(f"- **{name}:** {fact}" for name, fact in facts.items()),
        "\n".join(f"| {' | '.join(cells)} |" for cells in rows),
        f"```python\n{usage}\n```",
        f"A sample:\n\n```text\n{sample.strip()}\n```",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path


# ---- tables and figures in Markdown


TABLE = re.compile(r"(<!-- table (\S+) (\S+) \"([^\"]*)\" -->\n).*?(<!-- end -->)", re.S)
VALUE = re.compile(r"(<!-- = (\S+) (\S+) (\S+) -->).*?(<!-- end -->)", re.S)


def fill(text: str) -> str:
    """Markdown with every marked table and figure taken from `logs/` anew. Raises ValueError for one whose
    log isn't there.
    """

    def value(run: Path, key: str) -> Any:
        if (run / "week.json").exists():
            found = json.loads((run / "week.json").read_text())
            return {**found["metrics"], "week_seconds": found["seconds"]}[key]
        return json.loads((run / "summary.json").read_text())[key]

    def one(match: re.Match) -> str:
        head, run, key, format, end = match.groups()
        return f"{head}{value(ROOT / 'logs' / run, key):{format}}{end}"

    def whole(match: re.Match) -> str:
        head, folder, names, spec, end = match.groups()
        columns = [tuple(part.strip() for part in c.split("|")) for c in spec.split(", ")]
        lines = ["| run | " + " | ".join(c[1] for c in columns) + " |", "| --- |" + " ---: |" * len(columns)]
        for name in names.split(","):
            name, _, label = name.partition("=")
            cells = [f"{value(ROOT / 'logs' / folder / name, key):{format}}" for key, _, format in columns]
            lines.append(f"| {label.replace('_', ' ') or name} | " + " | ".join(cells) + " |")
        return head + "\n".join(lines) + "\n" + end

    def careful(function: Callable) -> Callable:
        def replace(match: re.Match) -> str:
            try:
                return function(match)
            except (FileNotFoundError, KeyError) as error:
                raise ValueError(f"{match.group(0).splitlines()[0]}: {error!r}") from None

        return replace

    return VALUE.sub(careful(one), TABLE.sub(careful(whole), text))


def documents() -> list[Path]:
    """The Markdown files whose figures come from logs."""
    patterns = ("README.md", "weeks/*/log.md", "reports/*.md", "docs/*.md", "docs/posts/*.md")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def load_script(topic: str, name: str = "run") -> Any:
    """One of a week's scripts (run, figures, studies, exercises) as a module; those beside it are found as when it is run by itself."""
    folder = ROOT / "weeks" / topic
    beside = [path.stem for path in folder.glob("*.py")]
    others = {stem: sys.modules.pop(stem) for stem in beside if stem in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for stem in beside:  # every week has a run.py: the next week's must not meet this one
            if stem in sys.modules:
                _rename(sys.modules.pop(stem), f"weeks.{topic}.{stem}")
        sys.modules.update(others)


def _rename(module: ModuleType, name: str) -> None:
    """Gives an imported module another name, which its classes and functions then have too: their source is
    looked up by it (for one by tyro, which shows it as help).
    """
    for member in vars(module).values():
        if isinstance(member, (type, FunctionType)) and member.__module__ == module.__name__:
            member.__module__ = name
    module.__name__ = name
    sys.modules[name] = module


@dataclass(frozen=True)
class Settings:
    """Redraws plots and refills tables from logs."""

    mine: bool = False
    """Only what is yours: plots in reports/NN_topic/mine and reports/mine, and the progress page."""


def main(settings: Settings) -> None:
    """Redraws everything there is a log for, the course's plots and yours, refills the Markdown, and makes
    the progress page.
    """
    drawn: list[Path | None] = []
    for topic in weeks():
        figures = load_script(topic, "figures")
        if newest := newest_logs(topic, "mine"):
            drawn += figures.draw(newest, output_root() / "reports" / topic / "mine")
        if not settings.mine:
            for logs in sorted((ROOT / "logs" / topic / "reference").glob("*/week.json")):
                data = logs.parent.name
                drawn += figures.draw(
                    logs.parent, ROOT / "reports" / topic / ("" if data == "tinyshakespeare" else data)
                )
    latest = [result["data"] for t in weeks() if (result := week_results(t, "mine"))]
    if latest:
        drawn.append(ladder(output_root() / "reports" / "mine" / "ladder.png", latest[-1], mine=True))
    if not settings.mine:
        drawn.append(ladder(ROOT / "reports" / "ladder.png", "tinyshakespeare", mine=False))
        write_atomically(ROOT / "reports" / "README.md", markdown_page(collect(mine=False)))
        for path in filter(Path.exists, documents()):
            old = path.read_text(encoding="utf-8")
            new = fill(old)
            if new != old:
                write_atomically(path, new)
                print(f"refilled {path.relative_to(ROOT)}")
    print(
        f"drew {sum(p is not None for p in drawn)} plots in"
        f" {'reports/mine and reports/*/mine' if settings.mine else 'reports'}"
    )
    print(f"your progress, for a browser: {write_page()}")


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
