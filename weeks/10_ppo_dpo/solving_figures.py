"""Week 10's plots of countdown, made from logs: what each method reaches, and how it gets there."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from names import LONGER, SOLVERS
from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, figure, reference_for, save_figure

RUN = re.compile(r"countdown-([a-z_]+)-(\d+)")
SUPERVISED = ("base", "form", "solutions")
COLOUR = {
    "base": "#000000",
    "form": "#999999",
    "solutions": COLOURS[5],
    "expert": COLOURS[1],
    "grpo": COLOURS[0],
    "dr_grpo": COLOURS[4],
    "rloo": COLOURS[3],
    "ppo": COLOURS[2],
}
LOOKS = {
    method: dict(color=COLOUR[method], marker=MARKERS[i], linestyle=LINES[i % 4])
    for i, method in enumerate(SOLVERS)
}
SeedRuns = dict[str, list[LoggedRun]]
"""A method's runs, one for each seed."""


def by_method(runs: dict[str, LoggedRun], prefix: str = "") -> SeedRuns:
    """The runs of countdown that are finished, in the order of `SOLVERS`. prefix: of the names of methods."""
    found: SeedRuns = defaultdict(list)
    for name, run in runs.items():
        match = RUN.fullmatch(name)
        if match and run.summary and match[1].startswith(prefix):
            found[match[1].removeprefix(prefix)].append(run)
    return {method: found[method] for method in SOLVERS if method in found}


def draw_solving(logs: Path, runs: dict[str, LoggedRun], out: Path) -> list[Path]:
    """Both plots; none where there is no base, or nothing beside it."""
    own = by_method(runs)
    if "base" not in own or len(own) < 2:
        return []
    plots = [draw_success(own, by_method(reference_for(logs)), out)]
    plots.append(draw_solving_curves(own, own["base"], out / "countdown_curves.png"))
    longer = by_method(runs, LONGER)
    if longer:
        plots.append(draw_solving_curves(longer, own["base"], out / "countdown_longer.png"))
    return plots


def draw_success(own: SeedRuns, course: SeedRuns, out: Path) -> Path:
    """pass@1 and pass@8 on held-out problems, a point for each seed, a bar at their mean.

    course: the course's own runs, drawn pale below.
    """
    fig, axes = figure(13, 1.8 + 0.42 * len(own), ncols=2, sharey=True)
    methods = list(own)
    for ax, key, title in zip(axes, ("pass_at_1", "pass_at_8"), ("One answer (pass@1)", "Eight (pass@8)")):
        for y, method in enumerate(methods):
            for runs, look in ((course.get(method, []), dict(alpha=0.3)), (own[method], {})):
                _draw_seeds(ax, y, [100 * run.summary[key] for run in runs], method, **look)
        chance = 100 * np.mean([run.summary[f"chance_{key}"] for run in own["base"]])
        ax.axvline(chance, color="#555555", linestyle=":", linewidth=1.2, label="random expressions")
        if key == "pass_at_1":
            fixed = 100 * own["base"][0].summary["fixed"]
            ax.axvline(fixed, color="#555555", linestyle="--", linewidth=1.2, label="best fixed form")
        ax.legend(frameon=False, loc="best")
        ax.set(title=title, xlabel="held-out problems solved (%)")
        ax.set_xlim(left=0)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(methods)), [SOLVERS[method] for method in methods])
    axes[0].invert_yaxis()
    fig.suptitle("Countdown, from the same base and for about the same time: a point for each seed")
    return save_figure(fig, out / "countdown.png")


def _draw_seeds(ax: Any, y: int, values: list[float], method: str, **look: Any) -> None:
    """The points of a method's seeds in its row, and its mean."""
    if not values:
        return
    looks = dict(color=COLOUR[method], marker=LOOKS[method]["marker"], linestyle="none", markersize=7) | look
    ax.plot(values, np.linspace(y - 0.15, y + 0.15, len(values) + 2)[1:-1], **looks)
    mean = float(np.mean(values))
    ax.plot([mean, mean], [y - 0.32, y + 0.32], color=COLOUR[method], linewidth=2, **look)


def draw_solving_curves(own: SeedRuns, of_base: list[LoggedRun], path: Path) -> Path:
    """pass@1 and pass@8 while it is learned, against processor seconds: a line for each seed, from the base
    that it began with.
    """
    fig, axes = figure(13, 4.8, ncols=2)
    bases = {_seed(run): run.summary for run in of_base}
    for ax, key, title in zip(
        axes, ("pass_at_1", "pass_at_8"), ("One answer is right (pass@1)", "One of eight is (pass@8)")
    ):
        for method, runs in own.items():
            for number, run in enumerate([] if method == "base" else runs):
                times, values = run.series(f"tune_{key}", "cpu_seconds")
                start = bases[_seed(run)][f"tune_{key}"]
                look = LOOKS[method] | dict(linewidth=1.4, markersize=5)
                label = None if number else SOLVERS[method]
                ax.plot([0, *times], [100 * value for value in (start, *values)], label=label, **look)
        ax.set(title=title, xlabel="seconds of processor time, learning alone", ylabel="problems solved (%)")
        ax.set_ylim(bottom=0)
    axes[1].legend(frameon=False, loc="best", fontsize=9)
    fig.suptitle("Countdown: problems that are neither learned from nor reported, a line for each seed")
    return save_figure(fig, path)


def _seed(run: LoggedRun) -> str:
    return run.name.rpartition("-")[2]
