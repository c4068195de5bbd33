"""Week 7's plots, drawn from its logs alone."""

import math
from pathlib import Path
from typing import Any

from shared.course.report import COLOURS, LINES, MARKERS, figure, read_runs, save_figure
from shared.course.style import style
from shared.training.tricks import KINDS, LADDER, NOT_MEASURED, PRECISIONS

NOTES = {"format": "slower here", "ladder": "left out below"}


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    plots = []
    for kind, rungs, title in (
        ("format", PRECISIONS, "The same training in each format"),
        ("ladder", LADDER, "One trick after the other"),
    ):
        names = [f"{kind}-{rung.replace(' ', '-')}" for rung, _ in rungs]
        rows = [runs[name].summary for name in names if name in runs]
        if any("ms" in row for row in rows):
            plots.append(save_figure(rows_figure(rows, title), out / f"{kind}.png"))
    if "scaler" in runs:
        rows = runs["scaler"].artifacts["rows"]
        plots.append(save_figure(scales_figure(rows, "The scale of the loss in fp16"), out / "scaler.png"))
    losses = [run.summary for name, run in runs.items() if name.startswith("loss-")]
    if losses:
        plots.append(save_figure(losses_figure(losses), out / "loss.png"))
    if "batch" in runs:
        plots.append(save_figure(batch_figure(runs["batch"].artifacts["rows"]), out / "batch.png"))
    profiles = {
        name.removeprefix("profile-"): run.artifacts["rows"]
        for name, run in runs.items()
        if name.startswith("profile-")
    }
    if profiles:
        plots.append(save_figure(profile_figure(profiles), out / "profile.png"))
    return plots


def rows_figure(rows: list[dict[str, Any]], title: str) -> Any:
    """Tokens a second, with the change against the row above, and peak memory.

    Pale bars: tried, and left out of the rows below. A row without figures says what it needs.
    """
    fig, axes = figure(12, 1.7 + 0.5 * len(rows), ncols=2, sharey=True)
    for ax, key, scale, heading, unit, colour in zip(
        axes,
        ("tokens_per_second", "bytes"),
        (1, 1e6),
        ("speed", "peak memory"),
        ("tokens a second", "megabytes"),
        COLOURS,
    ):
        values = [(row.get(key) or 0) / scale for row in rows]
        bars = ax.barh([row["step"] for row in rows], values, color=colour)
        for i, (row, value, bar) in enumerate(zip(rows, values, bars)):
            left_out = (row["note"] or "").startswith(NOTES["ladder"])
            bar.set_alpha(0.4 if left_out else 1)
            label = f"{value:,.0f}" if "ms" in row else reason(row)
            if key == "tokens_per_second" and row["change"] is not None:
                label += f"  ({100 * row['change']:+.0f} %)"
            if left_out:
                label += f"\n  {NOTES['ladder']}"
            if "ms" not in row and key == "bytes":
                continue
            ax.annotate(
                label,
                (value, i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=10 if "ms" in row else 8,
            )
        ax.set(title=f"{title}: {heading}", xlabel=unit, xlim=(0, 1.4 * max(values) or 1))
    axes[0].invert_yaxis()
    return fig


def reason(row: dict[str, Any]) -> str:
    """Why a row has no figures."""
    return row["note"].removeprefix(NOT_MEASURED)


def scales_figure(rows: list[dict[str, Any]], title: str) -> Any:
    """The scale of the loss after each step, and where a step was left out; beside it the losses.

    rows: step, scale, loss (None where it was not finite), skipped.
    """
    fig, (left, right) = figure(11, 3.6, ncols=2)
    steps = [row["step"] for row in rows]
    scales = [row["scale"] for row in rows]
    left.step(steps, scales, color=COLOURS[1], linewidth=2, where="mid", label="scale after the step")
    skipped = [(row["step"], row["scale"]) for row in rows if row["skipped"]]
    if skipped:
        left.plot(*zip(*skipped), "x", color=COLOURS[5], markersize=9, label="step left out")
    left.set(title=title, xlabel="step", ylabel="scale")
    left.set_yscale("log", base=2)
    left.legend(frameon=False)
    right.plot(
        steps,
        [math.nan if row["loss"] is None else row["loss"] for row in rows],
        color=COLOURS[0],
        marker=MARKERS[0],
        markersize=4,
    )
    right.set(title="The loss meanwhile", xlabel="step", ylabel="loss (nats per token)")
    return fig


def losses_figure(rows: list[dict[str, Any]]) -> Any:
    """What is alive at the peak of a loss and its backward, whole and in chunks, for each width.

    rows: width, way, bytes.
    """
    widths = sorted({row["width"] for row in rows})
    height = 1.6 + 0.45 * len(rows) / len(widths)
    fig, axes = figure(11, height, ncols=len(widths), sharey=True, squeeze=False)
    for i, (ax, width) in enumerate(zip(axes[0], widths)):
        chosen = sorted((row for row in rows if row["width"] == width), key=lambda row: -row["bytes"])
        values = [row["bytes"] / 1e6 for row in chosen]
        bars = ax.barh([row["way"] for row in chosen], values, color=COLOURS[i])
        ax.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4, fontsize=10)
        ax.set(title=f"Output layer and loss, {width} wide", xlim=(0, 1.25 * max(values)))
        ax.set_xlabel("megabytes alive at the peak")
    axes[0][0].invert_yaxis()
    return fig


def batch_figure(rows: list[dict[str, Any]]) -> Any:
    """Tokens a second, and memory with its estimate, against the batch size."""
    fig, (left, right) = figure(11, 4.2, ncols=2)
    sizes = [row["batch_size"] for row in rows]
    left.plot(sizes, [row["tokens/s"] for row in rows], color=COLOURS[0], marker=MARKERS[0], linewidth=2)
    left.set(
        title="A larger batch: speed", ylabel="tokens a second", xlabel="sequences in a batch", ylim=(0, None)
    )
    memories = [("memory", "measured: the whole process"), ("estimate", "computed: the tensors of a step")]
    for i, (key, label) in enumerate(memories):
        values = [row[key] / 1e6 for row in rows if row[key]]
        if values:
            right.plot(
                sizes,
                values,
                color=COLOURS[i],
                marker=MARKERS[i],
                linestyle=LINES[i],
                linewidth=2,
                label=label,
            )
    right.set(title="A larger batch: peak memory", ylabel="megabytes", xlabel="sequences in a batch")
    right.set_yscale("log")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
    right.legend(frameon=False)
    return fig


def profile_figure(profiles: dict[str, list[dict[str, Any]]]) -> Any:
    """Milliseconds of a step by kind of operation, for each format."""
    times = {name: {row["kind"]: row["ms"] for row in rows} for name, rows in profiles.items()}
    measured = set().union(*times.values())
    kinds = [kind for kind in (*KINDS, "other", "between operations", "idle") if kind in measured]
    kinds.sort(key=lambda kind: -max(by_kind.get(kind, 0) for by_kind in times.values()))
    fig, axes = figure(
        6 * len(times) + 1, 1.6 + 0.42 * len(kinds), ncols=len(times), sharey=True, squeeze=False
    )
    for ax, (name, by_kind), colour in zip(axes[0], sorted(times.items(), reverse=True), COLOURS):
        values = [by_kind.get(kind, 0) for kind in kinds]
        total = sum(by_kind.values())
        ax.barh(kinds, values, color=colour)
        for i, value in enumerate(values):
            ax.annotate(
                f"{value:.1f}  ({value / total:.0%})",
                (value, i),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
        ax.set(
            title=f"One step in {name}: {total:.0f} ms", xlabel="milliseconds", xlim=(0, 1.35 * max(values))
        )
    axes[0][0].invert_yaxis()
    return fig
