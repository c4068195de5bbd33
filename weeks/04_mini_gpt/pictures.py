"""The pictures of week 4's notebook: each function takes data and returns a figure."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, figure, heatmap

Curves = Mapping[str, Sequence[float] | Tensor]
"""Lines by their label."""


def lines_figure(
    lines: Curves, title: str, xlabel: str, ylabel: str, x: Sequence | Tensor | None = None
) -> Figure:
    """Lines over the same x (none: 0, 1, 2, ...), each with a colour and a pattern of its own."""
    fig, ax = figure(8, 4)
    for i, (label, values) in enumerate(lines.items()):
        places = range(len(values)) if x is None else x
        ax.plot(places, values, color=COLOURS[i], linestyle=LINES[i % 4], linewidth=2, label=label)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
    return fig


def wave_fits(x: Tensor, fits: Curves) -> Figure:
    """What different layers make of a wave; the first is what was wanted."""
    fig = lines_figure(fits, "One number in, one number out", "input", "output", x[:, 0])
    fig.axes[0].lines[0].set(linewidth=7, alpha=0.35)
    return fig


def gradients_by_gain(gains: Sequence[float], arriving: Curves, depth: int) -> Figure:
    """How much of the gradient reaches the first layer, by the gain of the initial weights."""
    title = f"What reaches the first of {depth} layers"
    ylabel = "gradient at the first layer / at the last"
    fig = lines_figure(arriving, title, "gain of the initial weights", ylabel, gains)
    for line, marker in zip(fig.axes[0].lines, MARKERS):
        line.set_marker(marker)
    fig.axes[0].axhline(1, color=COLOURS[7], linestyle=":", label="as much as was sent")
    fig.axes[0].set_yscale("log")
    fig.axes[0].legend(frameon=False)
    return fig


def channel_bars(values: Mapping[str, Tensor]) -> Figure:
    """The channels of one position, as they came and after each norm."""
    fig, axes = figure(10, 3.2, ncols=len(values), sharey=True)
    for i, (ax, (name, channels)) in enumerate(zip(axes, values.items())):
        ax.bar(range(len(channels)), channels, color=COLOURS[i])
        ax.axhline(0, color="black", linewidth=0.8)
        ax.grid(False)
        ax.set(title=name, xlabel="channel")
    axes[0].set_ylabel("value")
    return fig


def activation_curves(x: Tensor, curves: Curves) -> Figure:
    """Activation functions over their input."""
    fig = lines_figure(curves, "Four activations", "what comes in", "what goes out", x)
    fig.axes[0].set_ylim(-0.5, 4)
    return fig


def stream_growth(growth: Curves) -> Figure:
    """The variance of the residual stream after each block, by how its projections are initialized."""
    fig = lines_figure(
        growth,
        "The residual stream before training",
        "blocks passed",
        "variance (multiple of the input's)",
    )
    fig.axes[0].legend(frameon=False, title="projections into the stream")
    return fig


def one_batch_loss(losses: Sequence[float], vocab_size: int) -> Figure:
    """The loss on one batch that is learned by heart."""
    fig = lines_figure({"the one batch": losses}, "Learning one batch by heart", "step", "loss (nats)")
    ax = fig.axes[0]
    ax.axhline(math.log(vocab_size), color=COLOURS[7], linestyle="--", label="ln V: knows nothing")
    ax.set_ylim(0, None)
    ax.legend(frameon=False)
    return fig


def turning_arrows(speeds: Mapping[str, float]) -> Figure:
    """One vector of two channels at positions 0 to 7, for pairs that turn at different speeds (radians)."""
    fig, axes = figure(10, 4.4, ncols=len(speeds))
    for ax, (name, speed) in zip(axes, speeds.items()):
        for position in range(8):
            x, y = math.cos(position * speed), math.sin(position * speed)
            arrow = dict(arrowstyle="->", color=COLOURS[0], lw=1.8)
            ax.annotate("", (x, y), (0, 0), arrowprops=arrow)
            ax.annotate(str(position), (1.12 * x, 1.12 * y), ha="center", va="center")
        ax.set(title=f"{name}: {speed:g} radian a step", xlabel="channel i", ylabel="channel i + head_dim/2")
        ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    return fig


def score_map(scores: Tensor) -> Figure:
    """The score of one query and one key at all pairs of positions: [query's position, key's position]."""
    fig, ax = figure(6.6, 5.2)
    ticks = [str(t) if t % 4 == 0 else "" for t in range(len(scores))]
    title = "The score of one query and one key, wherever they stand"
    labels = dict(xlabel="position of the key", ylabel="position of the query", unit="score")
    heatmap(ax, scores, title, ticks, ticks, **labels)
    return fig


def loss_by_position(run: LoggedRun) -> Figure:
    """The loss of a model in longer texts than it was trained on, by position and by how RoPE is scaled."""
    losses: dict[str, dict[str, float]] = run.artifacts["losses"]
    fig = lines_figure(
        {name: list(by_range.values()) for name, by_range in losses.items()},
        f"Trained on {run.summary['trained_on']} positions",
        "position in the text",
        "loss (nats per character)",
    )
    ranges = list(next(iter(losses.values())))
    fig.axes[0].set_xticks(range(len(ranges)), ranges)
    inside = sum(int(name.split("-")[1]) < run.summary["trained_on"] for name in ranges)
    fig.axes[0].axvline(inside - 0.5, color=COLOURS[7], linestyle=":", label="end of the trained length")
    fig.axes[0].legend(frameon=False)
    return fig


def attention_sharpness(factors: Sequence[float], weights: Curves) -> Figure:
    """The largest attention weight as the query matrix grows."""
    title, xlabel = "What large queries do to attention", "size of the query matrix (multiple of its first)"
    fig = lines_figure(weights, title, xlabel, "largest weight of a row", factors)
    fig.axes[0].set_xscale("log")
    fig.axes[0].set_ylim(0, 1)
    return fig


def direction_strengths(strengths: Mapping[str, Tensor]) -> Figure:
    """Singular values of a gradient and of Muon's update, each as a multiple of its largest. Those that are
    rounding only are not drawn.
    """
    relative = {name: values / values[0] for name, values in strengths.items()}
    relative = {name: values.where(values > 1e-4, math.nan) for name, values in relative.items()}
    title = "Strength of each direction in one step of one matrix"
    fig = lines_figure(relative, title, "direction, strongest first", "singular value (of the largest)")
    fig.axes[0].set_yscale("log")
    fig.axes[0].set_ylim(2e-3, 2)
    return fig


def recipe_losses(histories: Mapping[str, Sequence[Mapping[str, float]]], vocab_size: int) -> Figure:
    """Training (thin) and validation loss (thick) of recipes, by step."""
    fig, ax = figure(8, 4.4)
    for i, (name, history) in enumerate(histories.items()):
        for key, width, alpha in (("train_loss", 1, 0.4), ("val_loss", 2.4, 1.0)):
            rows = [row for row in history if key in row]
            steps, losses = [row["step"] for row in rows], [row[key] for row in rows]
            label = name if key == "val_loss" else None
            ax.plot(
                steps, losses, color=COLOURS[i], linestyle=LINES[i], linewidth=width, alpha=alpha, label=label
            )
    ax.axhline(math.log(vocab_size), color=COLOURS[7], linestyle=":", label="ln V")
    title = "The first steps of two recipes (thin: training batch, thick: validation)"
    ax.set(title=title, xlabel="step", ylabel="loss (nats per character)")
    ax.legend(frameon=False)
    return fig


def writing_time(elapsed: Curves) -> Figure:
    """Seconds since the start, by characters written."""
    title = f"Writing {len(next(iter(elapsed.values())))} characters"
    fig = lines_figure(elapsed, title, "characters written", "seconds since the start")
    fig.axes[0].set_ylim(0, None)
    return fig


def logged_losses(runs: Mapping[str, LoggedRun], title: str) -> Figure:
    """The validation losses of logged runs, by their seconds of training."""
    fig, ax = figure(8, 4.2)
    for i, (name, run) in enumerate(runs.items()):
        style = dict(color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i % 4])
        ax.plot(*run.series("val_loss", "seconds"), linewidth=2, label=name, **style)
    ax.set(title=title, xlabel="seconds of training", ylabel="validation loss (nats per character)")
    ax.legend(frameon=False)
    return fig


def speedrun_losses(runs: Mapping[str, LoggedRun], target: float) -> Figure:
    """The validation losses of runs that reached the target, by their steps, operations and CPU time."""
    measures = {
        "target_step": ("steps", 1),
        "target_flops": ("operations (millions of millions)", 1e12),
        "target_cpu_seconds": ("CPU seconds", 1),
    }
    fig, axes = figure(11, 4, ncols=len(measures), sharey=True)
    for ax, (measure, (xlabel, unit)) in zip(axes, measures.items()):
        for i, (name, run) in enumerate(runs.items()):
            a_step = run.summary[measure] / run.summary["target_step"] / unit
            steps, losses = run.series("val_loss", "step")
            style = dict(color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i % 4])
            ax.plot([step * a_step for step in steps], losses, linewidth=2, label=name, **style)
        ax.axhline(target, color=COLOURS[7], linestyle=":", label=f"target: {target:g}")
        ax.set(xlabel=xlabel)
    axes[0].set_ylabel("validation loss (nats per character)")
    axes[1].set_title("The speedrun: two recipes, about one model size")
    axes[0].legend(frameon=False)
    return fig


def exchange_bars(changes: Mapping[str, float]) -> Figure:
    """What each exchange does to the validation loss: worse to the right, better to the left."""
    fig, ax = figure(8, 4.2)
    ordered = dict(sorted(changes.items(), key=lambda item: item[1]))
    colours = [COLOURS[1] if value > 0 else COLOURS[2] for value in ordered.values()]
    bars = ax.barh(list(ordered), list(ordered.values()), color=colours)
    ax.bar_label(bars, [f"{value:+.3f}" for value in ordered.values()], padding=4)
    ax.margins(x=0.16)
    ax.axvline(0, color="black", linewidth=0.8)
    xlabel = "change of the validation loss (nats per character)"
    ax.set(title="The modern recipe with one part exchanged", xlabel=xlabel, ylabel="instead, it has")
    return fig


def beside_the_reference(losses: Sequence[float], run: LoggedRun) -> Figure:
    """A training loss of each step, beside the logged one of the course's run in the same steps."""
    steps, logged = run.series("train_loss")
    shown = [(step, loss) for step, loss in zip(steps, logged) if step <= len(losses)]
    fig, ax = figure(8, 4.2)
    ax.plot(range(1, len(losses) + 1), losses, color=COLOURS[0], linewidth=2, label="this notebook's")
    places = [step for step, _ in shown]
    ax.plot(
        places, [loss for _, loss in shown], "o", color=COLOURS[1], markersize=8, label="the course's run"
    )
    title = "The GPT of this notebook beside the course's run: same recipe, same batches"
    ax.set(title=title, xlabel="step", ylabel="loss on the batch (nats per character)")
    ax.legend(frameon=False)
    return fig


def rungs(bits: Mapping[str, float], data: str) -> Figure:
    """Bits per byte of the same held-out text, week by week."""
    fig, ax = figure(8, 3.8)
    ax.plot(list(bits), list(bits.values()), color=COLOURS[0], marker="o", markersize=9, linewidth=2)
    for i, value in enumerate(bits.values()):
        ax.annotate(f"{value:.2f}", (i, value), xytext=(4, 9), textcoords="offset points")
    ax.set(title=f"The ladder ({data})", xlabel="week", ylabel="bits per byte (lower is better)")
    ax.margins(x=0.1, y=0.25)
    return fig
