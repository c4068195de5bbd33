"""Week 8's plots and the kept model's card, drawn from the logs alone."""

import math
import statistics
from pathlib import Path
from typing import Any

from names import GPTQ, GROUP, MINE, OUTLIERS, ROWS, WAYS, label_of, model_and_row
from shared.course.report import COLOURS, MARKERS, LoggedRun, figure, read_runs, save_figure
from shared.course.style import style
from shared.models.card import model_card
from shared.models.names import model_label
from shared.runtime import ROOT

Rows = dict[str, dict[str, float]]
"""Metrics by row."""


def rows_of(logs: Path) -> dict[str, dict[str, LoggedRun]]:
    """The measured rows of each model that the logs have, by what a plot calls the model."""
    return {label_of_model(slug): rows for slug, rows in rows_by_slug(logs).items()}


def rows_by_slug(logs: Path) -> dict[str, dict[str, LoggedRun]]:
    """The same by what the names of the model's runs begin with: nothing for the learner's own, which comes
    first.
    """
    runs = {
        name: run
        for name, run in read_runs(logs).items()
        if run.summary and "decode_tokens_per_second" in run.summary
    }
    order = ["transformers-fp32", "fp32", *ROWS, MINE]

    def place(row: str) -> int:
        return order.index(row) if row in order else len(order)

    models: dict[str, dict[str, LoggedRun]] = {}
    for name, run in runs.items():
        model, row = model_and_row(name)
        models.setdefault(model, {})[row] = run
    return {
        model: {row: models[model][row] for row in sorted(models[model], key=place)}
        for model in sorted(models, key=_place_of_model)
        if "fp32" in models[model]
    }


def _place_of_model(slug: str) -> tuple[bool, bool, str]:
    """The learner's own model first, then SmolLM2."""
    return slug != "", slug != "smollm2", slug


def label_of_model(slug: str) -> str:
    """What a plot calls a model of `rows_by_slug`."""
    return model_label(slug) if slug else "week 6's model"


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    models = {
        slug: {row: run.summary for row, run in rows.items()} for slug, rows in rows_by_slug(logs).items()
    }
    runs = read_runs(logs)
    plots = []
    for name, run in runs.items():
        if name.endswith(OUTLIERS) and run.summary:
            model = name.removesuffix(OUTLIERS).removesuffix("-") or "smollm2"
            plots.append(save_figure(outlier_figure(run.artifacts, model_label(model)), out / f"{name}.png"))
    if not models:
        return plots
    labelled = {label_of_model(slug): rows for slug, rows in models.items()}
    plots.append(save_figure(tradeoff_figure(labelled), out / "tradeoff.png"))
    for slug, rows in models.items():
        name = f"{slug}_speed.png" if slug else "speed.png"
        plots.append(save_figure(speed_figure(label_of_model(slug), rows), out / name))
    return plots


def tradeoff_figure(models: dict[str, Rows]) -> Any:
    """Bits against perplexity, a bubble's area the decoding speed; a panel for each model."""
    fig, axes = figure(7.2 * len(models), 6.6, ncols=len(models), squeeze=False)
    for ax, (model, rows) in zip(axes[0], models.items()):
        _tradeoff_panel(ax, model, {name: row for name, row in rows.items() if "worse" in row})
    return fig


def _tradeoff_panel(ax: Any, model: str, rows: Rows) -> None:
    fastest = max(row["decode_tokens_per_second"] for row in rows.values())
    for i, (name, row) in enumerate(rows.items()):
        speed = row["decode_tokens_per_second"]
        worse = 100 * row["worse"]
        colour = COLOURS[i % 8]
        marker = MARKERS[0] if row.get("ours", 1) else MARKERS[1]
        look = dict(color=colour, alpha=0.55, edgecolor="black", marker=marker)
        ax.errorbar(row["bits"], worse, 100 * row["worse_error"], color=colour, capsize=3, zorder=3)
        ax.scatter(row["bits"], worse, s=20 + 200 * speed / fastest, zorder=2, **look)
        ax.scatter([], [], s=60, label=f"{i + 1}. {label_of(name)}: {speed:,.0f}", **look)
    ax.set_xscale("log", base=2)
    ax.set_xticks((4, 8, 16, 32), ("4", "8", "16", "32"))
    ax.minorticks_off()
    ax.set(
        title=f"Bits, perplexity and speed: {model}",
        xlabel="bits for each weight (logarithmic)",
        ylabel="perplexity, increase over fp32 (%)",
    )
    ax.set_xlim(3.4, 44)
    ax.margins(y=0.15)
    if max(row["worse"] for row in rows.values()) > 0.05:
        ax.set_yscale("symlog", linthresh=1)
        ax.set_yticks((0, 0.5, 1, 5, 10, 50), ("0", "0.5", "1", "5", "10", "50"))
        ax.set_ylim(-0.5, 100)
        ax.set_ylabel("perplexity, increase over fp32 (%, logarithmic above 1)")
    _number_points(ax, [(row["bits"], 100 * row["worse"]) for row in rows.values()])
    title = "tokens a second, as the area shows"
    if not all(row.get("ours", 1) for row in rows.values()):
        title += " (squares: other libraries)"
    ax.legend(
        frameon=False,
        fontsize=10,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.11),
        ncols=3,
        columnspacing=1,
        handletextpad=0.3,
        title=title,
    )


def _number_points(ax: Any, points: list[tuple[float, float]]) -> None:
    """Numbers beside points, from 1, each with a line to its own; none stands on another or on a point."""
    ax.figure.canvas.draw()  # places are known from here on
    places = [tuple(72 / ax.figure.dpi * at for at in ax.transData.transform(point)) for point in points]
    taken = list(places)
    for i, point in sorted(enumerate(points), key=lambda numbered: numbered[1][1]):
        x, y = places[i]
        label_x, label_y = x + 20, y
        while any(abs(label_x - a) < 14 and abs(label_y - b) < 12 for a, b in taken):
            label_y += 2
        taken.append((label_x, label_y))
        line = dict(arrowstyle="-", linewidth=0.7, color="#555555", shrinkA=0, shrinkB=0)
        place = dict(xytext=(label_x - x, label_y - y), textcoords="offset points", arrowprops=line)
        ax.annotate(str(i + 1), point, ha="center", va="center", fontsize=10, zorder=4, **place)


def speed_figure(model: str, rows: Rows) -> Any:
    """Decode with what memory allows, and prefill, side by side."""
    fig, (decode, prefill) = figure(12.5, 1.8 + 0.46 * len(rows), ncols=2, sharey=True)
    limits = [row.get("memory_limit", math.inf) for row in rows.values()]
    fastest = max(row["decode_tokens_per_second"] for row in rows.values())
    if max(limits) >= 10 * fastest:  # a model that a cache holds is not bound by memory
        limits = []
    _speed_panel(decode, f"{model}: writing, token by token", "decode_tokens_per_second", rows, limits)
    _speed_panel(prefill, f"{model}: reading the prompt", "prefill_tokens_per_second", rows, [])
    decode.invert_yaxis()
    return fig


def _speed_panel(ax: Any, title: str, key: str, rows: Rows, limits: list[float]) -> None:
    """Bars of one speed; `limits` are what memory allows, none where that does not bind."""
    names = [label_of(name) for name in rows]
    values = [row[key] for row in rows.values()]
    colours = [COLOURS[0] if row.get("ours", 1.0) else COLOURS[1] for row in rows.values()]
    right = 1.15 * max(values + limits)
    ax.barh(names, values, color=colours)
    for i, value in enumerate(values):
        if value > 0.08 * right:  # inside its bar, where no tick is, unless the bar is too short
            look: dict[str, Any] = dict(xytext=(-5, 0), ha="right", color="white")
        else:
            look = dict(xytext=(5, 0), ha="left", color="black")
        ax.annotate(f"{value:,.0f}", (value, i), textcoords="offset points", va="center", fontsize=10, **look)
    ax.set(title=title, xlabel="tokens a second", xlim=(0, right))
    if not limits:
        return
    ax.plot(limits, names, "|", color="black", markersize=18, markeredgewidth=2, label="what memory allows")
    for label, colour in (("ours", COLOURS[0]), ("others'", COLOURS[1])):
        ax.barh(names[:1], [0], color=colour, label=label)
    ax.legend(frameon=False, loc="lower right")


def outlier_figure(seen: dict[str, Any], model: str) -> Any:
    """The largest activation and weight of each channel of one layer, and the errors that rounding makes."""
    fig, (channels, errors) = figure(13, 5.2, ncols=2, width_ratios=(1.2, 1))
    for name, label, colour in (
        ("activations", "activations", COLOURS[1]),
        ("weights", "weights", COLOURS[0]),
    ):
        values = sorted(seen[name], reverse=True)
        middle = values[len(values) // 2]
        channels.plot([value / middle for value in values], color=colour, label=label, linewidth=2)
    channels.set_yscale("log")
    channels.set(
        title=f"{model}, what {seen['layer']} reads",
        xlabel="channel, the largest first",
        ylabel="largest magnitude; the median channel's is 1",
    )
    channels.legend(frameon=False)
    kinds = list(seen["errors"])
    height = 0.8 / len(WAYS)
    for i, (way, label) in enumerate(WAYS.items()):
        medians = [100 * statistics.median(seen["errors"][kind][way]) for kind in kinds]
        places = [row + (i - (len(WAYS) - 1) / 2) * height for row in range(len(kinds))]
        errors.barh(places, medians, height, color=COLOURS[i], label=label)
    errors.set_yticks(range(len(kinds)), kinds)
    errors.invert_yaxis()
    errors.set(title="Error of each layer's output", xlabel="% of the output, median of all blocks")
    errors.legend(frameon=False, fontsize=10, loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=2)
    return fig


def _scheme_in_words(scheme: str, group_size: int) -> str:
    how = {
        "int4": f"int4 in groups of {group_size}",
        "int8": "int8, one scale for each row",
        "int8-groups": f"int8 in groups of {GROUP}",
        "int4-wide": "int4 in the largest groups that fit",
        "nf4": "NF4 in blocks of 64, with double quantization",
    }[scheme.removesuffix(GPTQ)]
    return how + ", rounded by GPTQ" if scheme.endswith(GPTQ) else how


def write_card(logs: Path, out: Path, scheme: str, folder: Path) -> Path:
    """The kept model's card, from the logs."""
    runs = read_runs(logs)
    before = runs["fp32"].summary
    after = runs[scheme].summary
    settings = runs[scheme].run["settings"]
    where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    formats = {
        "size in memory": ("megabytes", "{:.2f} MB"),
        "file": ("file_megabytes", "{:.2f} MB"),
        "bits for each weight": ("bits", "{:.1f}"),
        "perplexity": ("perplexity", "{:.2f}"),
        "bits per byte": ("bits_per_byte", "{:.3f}"),
    }
    figures = [
        {"": name, "fp32": style.format(before[key]), scheme: style.format(after[key])}
        for name, (key, style) in formats.items()
    ]
    facts = {
        "What": (
            "a small GPT that writes like its training text and knows nothing else, with quantized linear"
            " layers. For learning only"
        ),
        "From": f"the checkpoint of week 6, preset {settings['preset']}, trained on {logs.name}",
        "Scheme": _scheme_in_words(scheme, settings["group_size"]),
        "Not quantized": "norms, and the token embedding unless the output layer shares its weight",
        "Measured on": f"{after['tokens']:,} tokens of held-out text",
        "Licence": "that of this repository",
    }
    usage = (
        "from shared.quantization.modules import load_quantized\n"
        f'model = load_quantized("{where.as_posix()}").model\n'
        'print(model.generate("ROMEO:"))'
    )
    title = f"Week 6's GPT in {scheme}"
    sample = runs[scheme].artifacts["sample"]
    return model_card(out / "model_card.md", title, facts, figures=figures, usage=usage, sample=sample)
