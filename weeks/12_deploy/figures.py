"""Week 12's plots, made from logs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from names import OWN, PROGRAMS, label_of_runs, models_in, server_label, servers_in
from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, figure, read_runs, save_figure
from shared.course.style import style


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    servers = {name: runs[name] for name in servers_in(runs)}
    plots = []
    with style():
        if servers:
            plots.append(draw_throughput(servers, out))
            plots.append(draw_delays(servers, out))
        if "slots" in runs:
            plots.append(draw_slots(runs["slots"], out))
        for name in models_in(runs, "-pytorch"):
            keys = {program: f"{name}-{program}" for program in PROGRAMS}
            rows = {program: runs[key].summary for program, key in keys.items() if key in runs}
            plots.append(draw_programs(name, rows, out))
    return plots


def line_look(i: int) -> dict[str, Any]:
    """The look of the i-th line."""
    return dict(color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i], linewidth=1.8, markersize=6)


def use_plain_log(axis: Any, ticks: Sequence[int] | None = None) -> None:
    """Makes an axis logarithmic, with numbers that are read at a glance."""
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


def draw_throughput(servers: dict[str, LoggedRun], out: Path) -> Path:
    """Tokens a second, and how many times those of one after another, by the number of texts at once."""
    fig, (rate_ax, ratio_ax) = figure(12, 4.8, ncols=2)
    for i, (name, run) in enumerate(servers.items()):
        at_once, rates = run.series("tokens_per_second")
        rate_ax.plot(at_once, rates, **line_look(i), label=server_label(name))
        for x, rate in zip(at_once, rates):
            rate_ax.annotate(
                f"{rate:,.0f}",
                (x, rate),
                xytext=(0, -15 if i == 1 else 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=COLOURS[i],
            )
        ratio_ax.plot(at_once, [rate / rates[0] for rate in rates], **line_look(i), label=server_label(name))
    most = max(ax.get_xlim()[1] for ax in (rate_ax, ratio_ax))
    ideal = [n for n in (1, 2, 4, 8, 16, 32) if n <= most]
    label = "as many times as texts"
    ratio_ax.plot(ideal, ideal, color="#555555", linestyle=":", linewidth=1.4, label=label)
    use_plain_log(rate_ax.yaxis)
    use_plain_log(ratio_ax.yaxis, ideal)
    rate_ax.margins(y=0.15)
    rate_ax.set(title="All texts together", ylabel="tokens/s")
    ratio_ax.set(title="Against one after another", ylabel="times as many tokens/s")
    for ax in (rate_ax, ratio_ax):
        use_plain_log(ax.xaxis, ideal)
        ax.set(xlabel="texts at once")
        ax.legend(frameon=False)
    fig.suptitle("What serving many texts at once is worth")
    return save_figure(fig, out / "throughput.png")


def draw_delays(servers: dict[str, LoggedRun], out: Path) -> Path:
    """What shares of clients wait how long, and what is saved where prompts begin alike."""
    fig, (first_ax, between_ax, reuse_ax) = figure(14, 4.6, ncols=3)
    _plot_shares(first_ax, servers, "first", "To the first token")
    _plot_shares(between_ax, servers, "between", "Between two tokens")
    look = dict(frameon=False, ncols=len(servers), loc="outside lower center")
    fig.legend(*first_ax.get_legend_handles_labels(), **look)
    _bars_of_reuse(reuse_ax, servers)
    clients = next(iter(servers.values())).summary["clients"]
    fig.suptitle(f"Waiting: {clients} clients at once")
    return save_figure(fig, out / "delays.png")


def _plot_shares(ax: Any, servers: dict[str, LoggedRun], key: str, title: str) -> None:
    """What share of the clients waits no longer than so many milliseconds."""
    for i, (name, run) in enumerate(servers.items()):
        values = run.artifacts[key]  # by percent, 0 to 100
        look = dict(color=COLOURS[i], linestyle=LINES[i], linewidth=1.8)
        ax.plot(values, range(101), **look, label=server_label(name))
        for percent in (50, 95):
            ax.plot(values[percent], percent, marker=MARKERS[i], color=COLOURS[i], markersize=7)
    use_plain_log(ax.xaxis)
    ax.set(title=f"{title} (marks: p50, p95)", xlabel="milliseconds", ylabel="% that wait no longer")


def _bars_of_reuse(ax: Any, servers: dict[str, LoggedRun]) -> None:
    """The first token of a long prompt that is new, and of one whose beginning has been read."""
    places = np.arange(len(servers))
    bars = (
        ("fresh", "all of it read", COLOURS[1], -0.2),
        ("reused", "its beginning reused", COLOURS[0], 0.2),
    )
    for key, label, colour, shift in bars:
        values = [run.summary[key] for run in servers.values()]
        ax.bar(places + shift, values, 0.38, color=colour, label=label)
        for x, value in zip(places + shift, values):
            ax.annotate(
                f"{value:.0f}",
                (x, value),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    ax.set_xticks(places, [server_label(name).replace(", ", "\n") for name in servers])
    use_plain_log(ax.yaxis)
    values = [run.summary[key] for run in servers.values() for key in ("fresh", "reused")]
    limits = (min(values) / 2, 4 * max(values))
    ax.set(title="First token of a long prompt, alone", ylabel="milliseconds", ylim=limits)
    ax.legend(frameon=False, loc="upper left")


def draw_slots(run: LoggedRun, out: Path) -> Path:
    """A time line: what each slot does, with one slot and with four."""
    fig, axes = figure(13, 5.4, nrows=2, sharex=True, height_ratios=(1, 3.2))
    for ax, slots in zip(axes, (1, 4)):
        _draw_time_line(ax, slots, run.artifacts[f"spans_{slots}"])
    axes[0].legend(frameon=False, ncols=3, loc="upper right", bbox_to_anchor=(1, 1.6))
    axes[1].set_xlabel(
        "milliseconds (numbers: texts in the order they came; *: the beginning of its prompt was in a slot"
        " already)"
    )
    fig.suptitle(f"{run.summary['texts']} requests, slot by slot")
    return save_figure(fig, out / "slots.png")


def _draw_time_line(ax: Any, slots: int, spans: Sequence[dict[str, Any]]) -> None:
    """What each slot does when. spans: as the log has them, in the order of time."""
    for kind, colour, label in (
        ("read", COLOURS[1], "read (prompt)"),
        ("written", COLOURS[4], "a token written"),
    ):
        for slot in range(slots):
            own = [span for span in spans if span["slot"] == slot and span["kind"] == kind]
            ax.broken_barh(
                [(1000 * span["begin"], 1000 * (span["end"] - span["begin"])) for span in own],
                (slot - 0.4, 0.8),
                facecolors=colour,
                edgecolor="white",
                linewidth=0.4,
                label=label if slot == 0 else None,
            )
    for number in sorted({span["text"] for span in spans}):
        _mark_text(ax, number, [span for span in spans if span["text"] == number], is_first=number == 0)
    ax.set_yticks(range(slots), [f"slot {slot}" for slot in range(slots)])
    name = "One slot" if slots == 1 else f"{slots} slots"
    end = 1000 * max(span["end"] for span in spans)
    ax.set(ylim=(slots - 0.45, -0.55), title=f"{name}: {end:.0f} ms", ylabel="")
    ax.grid(axis="y", visible=False)


def _mark_text(ax: Any, number: int, spans: Sequence[dict[str, Any]], is_first: bool) -> None:
    """Where a text begins, grey behind all of its time, and its number in the middle of its tokens.

    is_first: whether the legend is still to be told what grey is.
    """
    slot = spans[0]["slot"]
    begin, end = 1000 * spans[0]["begin"], 1000 * spans[-1]["end"]
    label = "waits while other prompts are read" if is_first else None
    ax.broken_barh([(begin, end - begin)], (slot - 0.4, 0.8), facecolors="#d0d0d0", zorder=0.8, label=label)
    ax.plot([begin, begin], [slot - 0.42, slot + 0.42], color="black", linewidth=1.4)
    begin = 1000 * next(span["begin"] for span in spans if span["kind"] == "written")
    ax.annotate(
        f"{number}*" if spans[0]["reused"] else str(number),
        ((begin + end) / 2, slot),
        ha="center",
        va="center",
        fontsize=9,
        fontweight="bold",
    )


def draw_programs(name: str, rows: dict[str, dict[str, float]], out: Path) -> Path:
    """How large the files are, and how fast each program writes. rows: by program."""
    fig, axes = figure(12, 1.8 + 0.42 * len(rows), ncols=2, sharey=True)
    labels = [PROGRAMS[program] for program in rows]
    colours = [COLOURS[0] if program == "pytorch" else COLOURS[4] for program in rows]
    for ax, key, title, unit, number_format in (
        (axes[0], "megabytes", "Size", "megabytes", ".3g"),
        (axes[1], "decode_tokens_per_second", "Speed, one text", "tokens/s", ",.0f"),
    ):
        values = [row[key] for row in rows.values()]
        ax.barh(labels, values, color=colours)
        for i, value in enumerate(values):
            ax.annotate(
                f"{value:{number_format}}",
                (value, i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=10,
            )
        ax.set(title=title, xlabel=unit, xlim=(0, 1.15 * max(values)))
    axes[0].invert_yaxis()
    model = label_of_runs(name)
    fig.suptitle(f"{model[0].upper()}{model[1:]} in other programs' files")
    suffix = "" if name == OWN else f"-{name}"
    return save_figure(fig, out / f"programs{suffix}.png")
