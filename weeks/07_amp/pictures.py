"""The notebook's plots: each takes data and returns a figure."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, figure
from shared.training.memory import MemoryEstimate

SIGN_EXPONENT_FRACTION = (5, 4, 1)
"""Their colours."""
HELD = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "moments",
    "activations": "activations",
}
"""What a step holds, as an estimate calls it and as the notebook does."""


def plot_bits(written: Mapping[str, str], parts: Mapping[str, tuple[int, int, int]]) -> Figure:
    """A number in several formats, bit by bit. written: its bits; parts: how many belong to sign, exponent
    and fraction.
    """
    fig, ax = figure(11, 0.8 + 0.6 * len(written))
    for row, (name, bits) in enumerate(written.items()):
        owner = [part for part, size in enumerate(parts[name]) for _ in range(size)]
        for i, (bit, part) in enumerate(zip(bits, owner)):
            colour = COLOURS[SIGN_EXPONENT_FRACTION[part]]
            ax.add_patch(Rectangle((i, -row), 0.94, 0.8, facecolor=colour))
            ax.text(i + 0.47, 0.4 - row, bit, ha="center", va="center", fontsize=10)
    for part, label in enumerate(("sign", "exponent", "fraction")):
        colour = COLOURS[SIGN_EXPONENT_FRACTION[part]]
        ax.add_patch(Rectangle((0, 9), 0, 0, facecolor=colour, label=label))
    ax.set(title="π, bit by bit", xlim=(-0.2, 32.2), xlabel="bits, the highest first")
    ax.set_ylim(0.9 - len(written), 1)
    ax.set_yticks([0.4 - row for row in range(len(written))], list(written))
    ax.grid(False)
    ax.legend(frameon=False, loc="lower right", ncols=3)
    return fig


def plot_spacing(at: Tensor, steps: Mapping[str, Tensor]) -> Figure:
    """From a number to the next larger one, in several formats; nan where a format has none."""
    fig, ax = figure(9, 4.8)
    for i, (name, step) in enumerate(steps.items()):
        line = LINES[i % len(LINES)]
        ax.plot(at, step, color=COLOURS[i], linestyle=line, linewidth=2, label=name)
    ax.set(
        xscale="log",
        yscale="log",
        title="How far it is to the next number",
        xlabel="number",
        ylabel="step to the next one",
    )
    ax.axvline(65504, color="#555555", linewidth=1)
    ax.annotate("fp16 ends", (65504, 1e-13), xytext=(-6, 0), textcoords="offset points", ha="right")
    ax.legend(frameon=False, ncols=2)
    return fig


def plot_rounding(x: Tensor, rounded: Tensor) -> Figure:
    """Numbers against what they are rounded to, and how far off that is."""
    fig, (left, right) = figure(11, 3.6, ncols=2)
    left.plot(x, x, color="#999999", linewidth=1, label="not rounded")
    left.plot(x, rounded, color=COLOURS[0], linewidth=2, label="rounded to bf16")
    left.set(title="A staircase", xlabel="x", ylabel="rounded x")
    left.legend(frameon=False)
    right.plot(x, rounded - x, color=COLOURS[1], linewidth=1)
    right.axhline(0, color="#555555", linewidth=1)
    right.set(title="As often up as down", xlabel="x", ylabel="rounded x less x")
    return fig


def plot_by_length(lengths: Sequence[int], errors: Mapping[str, Sequence[float]], title: str) -> Figure:
    """The relative error of sums, by their length, in several ways."""
    fig, ax = figure(8, 4)
    for i, (label, values) in enumerate(errors.items()):
        how = {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i]}
        ax.plot(lengths, values, linewidth=2, label=label, **how)
    ax.set(yscale="log", title=title, xlabel="n", ylabel="relative error")
    ax.set_xscale("log", base=2)
    ax.legend(frameon=False)
    return fig


def plot_gradient_sizes(sizes: Tensor, smallest: float) -> Figure:
    """A histogram of gradients' sizes as powers of ten, and the range of fp16. smallest: half of its smallest
    number, as a power of ten.
    """
    fig, ax = figure(9, 4)
    ax.hist(sizes, bins=120, color=COLOURS[0])
    whole = math.log10(2**-14)
    ax.axvspan(-12, smallest, color=COLOURS[5], alpha=0.25, label="becomes 0 in fp16")
    ax.axvspan(smallest, whole, color=COLOURS[1], alpha=0.25, label="loses digits in fp16")
    ax.axvspan(whole, 5, color=COLOURS[2], alpha=0.15, label="fp16 keeps it whole")
    ax.set(
        title="Gradients of a small GPT, and the range of fp16",
        xlabel="size, as a power of ten",
        ylabel="gradients",
        xlim=(-12, 5),
    )
    ax.legend(frameon=False, loc="upper right")
    return fig


def plot_lost_gradients(scales: Sequence[float], lost: Sequence[float], broken: Sequence[float]) -> Figure:
    """Shares of the gradients that became 0, and that became inf or nan, by the scale of the loss."""
    fig, ax = figure(9, 4)
    lines = {"became 0 (of those that are not 0 in fp32)": lost, "became inf or nan": broken}
    for i, (label, values) in enumerate(lines.items()):
        how = {"color": COLOURS[(0, 5)[i]], "linestyle": LINES[i], "marker": MARKERS[i]}
        ax.plot(scales, [100 * v for v in values], linewidth=2, label=label, **how)
    ax.axvline(2**16, ymax=0.8, color="#555555", linewidth=1)
    ax.annotate("PyTorch begins here", (2**16, 60), xytext=(6, 0), textcoords="offset points")
    ax.set(title="A scaled loss in fp16", xlabel="what the loss is multiplied by")
    ax.set_ylabel("percent of all gradients")
    ax.set_xscale("log", base=2)
    ax.legend(frameon=False)
    return fig


def plot_still_weights(rates: Sequence[float], still: Mapping[str, Sequence[float]]) -> Figure:
    """Percent of the weights that a step does not move, by learning rate and format."""
    fig, ax = figure(8, 3.8)
    for i, (name, shares) in enumerate(still.items()):
        at = [j + 0.36 * (i - 0.5) for j in range(len(rates))]
        bars = ax.bar(at, shares, 0.34, color=COLOURS[i], label=f"weights in {name}")
        ax.bar_label(bars, [f"{share:.1f}" for share in shares], padding=2, fontsize=10)
    ax.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    ax.set(title="Weights that a step does not move", xlabel="learning rate", ylim=(0, 112))
    ax.set_ylabel("percent of all weights")
    ax.legend(frameon=False)
    return fig


def plot_formats_learning(losses: Mapping[str, Sequence[float]]) -> Figure:
    """The losses of one training in several formats, the first of them fp32, and how they differ from it."""
    fig, (left, right) = figure(11, 3.8, ncols=2)
    for i, (name, values) in enumerate(losses.items()):
        how = {"color": COLOURS[i], "linestyle": LINES[i % len(LINES)], "linewidth": 2, "label": name}
        left.plot(values, **how)
        if name != "fp32":
            right.plot([v - w for v, w in zip(values, losses["fp32"])], **how)
    left.set(title="The same training in each format", xlabel="step", ylabel="loss (nats per token)")
    right.set(title="The difference from fp32", xlabel="step", ylabel="loss less fp32's")
    for ax in (left, right):
        ax.legend(frameon=False)
    return fig


def plot_held_memory(models: Mapping[str, Mapping[str, MemoryEstimate]]) -> Figure:
    """What a step holds, by model and by the way that it is trained."""
    fig, axes = figure(12, 3.6, ncols=len(models), sharey=True)
    for ax, (title, rows) in zip(axes, models.items()):
        left = np.zeros(len(rows))
        for i, (part, label) in enumerate(HELD.items()):
            sizes = np.array([getattr(row, part) / 1e9 for row in rows.values()])
            ax.barh(list(rows), sizes, left=left, color=COLOURS[(0, 1, 2, 4)[i]], label=label)
            left += sizes
        ax.set(title=title, xlabel="gigabytes")
    axes[0].invert_yaxis()
    labelled = axes[0].get_legend_handles_labels()
    fig.legend(*labelled, frameon=False, loc="outside lower center", ncols=4)
    return fig


def plot_state(gigabytes: Mapping[str, Sequence[float]]) -> Figure:
    """Weights, gradients and moments by precision, in gigabytes."""
    fig, ax = figure(9, 3.2)
    left = np.zeros(len(gigabytes))
    for i, part in enumerate(("weights", "gradients", "moments")):
        sizes = np.array([row[i] for row in gigabytes.values()])
        ax.barh(list(gigabytes), sizes, left=left, color=COLOURS[i], label=part)
        left += sizes
    for y, total in enumerate(left):
        ax.text(total, y, f"  {total:.1f}", va="center", fontsize=10)
    ax.set(title="GPT-2 and AdamW: what a step holds beside activations", xlabel="gigabytes")
    ax.set_xlim(0, 1.25 * left.max())
    ax.invert_yaxis()
    ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return fig


def plot_loss_memory(alive: Mapping[str, float], logits: float) -> Figure:
    """Megabytes alive at the peak of a loss and its backward, by the way of it. logits: of all tokens."""
    fig, ax = figure(9, 1.4 + 0.45 * len(alive))
    colours = [COLOURS[5], *[COLOURS[0]] * (len(alive) - 1)]
    bars = ax.barh(list(alive), list(alive.values()), color=colours)
    ax.bar_label(bars, [f"{value:.1f}" for value in alive.values()], padding=4, fontsize=10)
    ax.axvline(logits, color="#555555", linewidth=1, linestyle="--")
    label = "all logits, once"
    ax.annotate(label, (logits, len(alive) - 1), xytext=(6, 0), textcoords="offset points", va="center")
    ax.set(title="The loss and its backward: what is alive at the peak", xlabel="megabytes")
    ax.set_xlim(0, 1.15 * max(alive.values()))
    ax.invert_yaxis()
    return fig


def plot_running_sum(row: Tensor, path: Sequence[tuple[float, float]], block: int) -> Figure:
    """The largest logit so far and the sum of exponentials, block by block."""
    fig, (left, right) = figure(11, 3.6, ncols=2)
    blocks = range(1, len(path) + 1)
    own = row.view(-1, block).max(1).values
    left.plot(blocks, own, ".", color=COLOURS[7], label="largest of this block")
    largest = [m for m, _ in path]
    left.step(blocks, largest, color=COLOURS[0], linewidth=2, where="mid", label="m, the largest so far")
    left.set(title="m", xlabel="blocks read", ylabel="logit", ylim=(2.5, 12))
    left.legend(frameon=False, loc="lower right", ncols=2)
    right.step(blocks, [s for _, s in path], color=COLOURS[1], linewidth=2, where="mid")
    right.set(title="s, brought over whenever m changes", xlabel="blocks read")
    right.set_ylabel("sum of exp(x - m)")
    return fig
