"""The notebook's plots: each takes data and returns a figure."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, figure


def _bit_axis(ax: Axes, bits: Sequence[int]) -> None:
    """A logarithmic axis of bits for each weight."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(bits, [str(b) for b in bits])
    ax.minorticks_off()


def limit_figure(bits: Sequence[int], limits: Mapping[str, Sequence[float]]) -> Figure:
    """Tokens per second that memory allows a model of 7 billion weights, by bits for each. limits: by the
    name of a machine.
    """
    fig, ax = figure(8, 4.2)
    for i, (label, values) in enumerate(limits.items()):
        ax.plot(
            bits, values, color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i], linewidth=2, label=label
        )
    _bit_axis(ax, bits)
    ax.set_yscale("log")
    ax.set_yticks((1, 10, 100, 500), ("1", "10", "100", "500"))
    ax.minorticks_off()
    ax.axhline(5, color="#555555", linewidth=1)
    ax.annotate("as fast as one reads", (10, 5), xytext=(0, -13), textcoords="offset points", fontsize=10)
    ax.set(
        title="What memory allows: a model of 7 billion weights",
        xlabel="bits for each weight (logarithmic)",
        ylabel="tokens a second, at most",
    )
    ax.legend(frameon=False)
    return fig


def int8_levels_figure(values: Tensor, codes: Tensor, scale: float) -> Figure:
    """A few weights above the 255 levels of their scale, each with its code. values, codes: [n]."""
    fig, ax = figure(10, 2.2)
    ax.vlines(torch.arange(-127, 128) * scale, 0, 0.5, color=COLOURS[7], linewidth=0.6)
    ax.plot(values, torch.full((len(values),), 0.62), "v", color=COLOURS[0], markersize=9)
    for value, code in zip(values.tolist(), codes.tolist()):
        place = dict(xytext=(0, 9), textcoords="offset points", ha="center", fontsize=10)
        ax.annotate(str(int(code)), (value, 0.62), **place)
    ax.set(title="Six weights on the 255 levels of int8, with their codes", xlabel="value")
    ax.set(yticks=[], ylim=(0, 1.15))
    ax.grid(False)
    ax.spines[["left"]].set_visible(False)
    return fig


def offered_levels_figure(weight: Tensor, levels: Mapping[str, Tensor]) -> Figure:
    """How a matrix's values are distributed, and the levels that formats offer to its first row."""
    fig, axes = figure(9, 6, nrows=3, sharex=True)
    for ax, (label, values), colour in zip(axes, levels.items(), COLOURS):
        ax.hist(weight.flatten(), bins=150, color=COLOURS[7], alpha=0.6)
        width = 0.7 if len(values) > 16 else 2
        ax.vlines(values, 0, ax.get_ylim()[1] * 0.35, color=colour, linewidth=width)
        ax.set(title=label, ylabel="weights")
    axes[-1].set_xlabel("value")
    return fig


def one_outlier_figure(sizes: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Figure:
    """What one outlier does to all other weights. errors: in percent, by what shares a scale."""
    fig, ax = figure(8, 4)
    for i, (label, values) in enumerate(errors.items()):
        look = dict(color=COLOURS[i], marker=MARKERS[i], linestyle=LINES[i], linewidth=2)
        ax.loglog(sizes, values, label=label, **look)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.set_yticks((0.5, 1, 2, 5, 10, 20, 50, 100), ("0.5", "1", "2", "5", "10", "20", "50", "100"))
    ax.minorticks_off()
    ax.set(
        title="8 bits, and a single outlier in a matrix",
        xlabel="size of the outlier (standard deviations, logarithmic)",
        ylabel="error of all other weights\n(%, logarithmic)",
    )
    ax.legend(frameon=False)
    return fig


def lopsided_figure(group: Tensor) -> Figure:
    """A group of weights on 15 levels symmetric round 0, and on 16 from its lowest to its highest."""
    fig, axes = figure(11, 3.6, ncols=2, sharey=True)
    low, high = group.min(), group.max()
    offers = {
        "the same range on both sides of zero": torch.arange(-7, 8) * group.abs().max() / 7,
        "from the smallest to the largest": torch.linspace(float(low), float(high), 16),
    }
    for ax, (title, levels) in zip(axes, offers.items()):
        for level in levels:
            ax.axhline(level, color=COLOURS[7], linewidth=0.7)
        near = levels[(group[:, None] - levels).abs().argmin(1)]
        error = 100 * float((near - group).norm() / group.norm())
        ax.vlines(range(len(group)), group, near, color=COLOURS[5], linewidth=3, label="error")
        ax.plot(range(len(group)), group, "o", color=COLOURS[0], markersize=2.5, label="weight")
        ax.grid(False)
        ax.set(title=f"{title}\nerror {error:.1f} %", xlabel="weight of the group")
    axes[0].set_ylabel("value")
    axes[0].legend(frameon=False)
    return fig


def group_costs_figure(
    int4: Mapping[str, tuple[float, float]], others: Mapping[str, tuple[float, float]]
) -> Figure:
    """What a weight costs and what is lost: (bits, error in percent), a line for int4's groups."""
    fig, ax = figure(8, 4)
    costs, errors = zip(*int4.values())
    ax.plot(costs, errors, color=COLOURS[1], marker="s", linewidth=2, label="int4")
    for label, point in int4.items():
        ax.annotate(label, point, xytext=(8, 4), textcoords="offset points", fontsize=10)
    for (label, (cost, error)), colour, marker in zip(others.items(), (2, 0), "^o"):
        look = dict(color=COLOURS[colour], marker=marker, markersize=9, linestyle="none")
        ax.plot(cost, error, label=label, **look)
    ax.set(
        title="What a weight costs, and what is lost",
        xlabel="bits for each weight, scales included",
        ylabel="error of the weights (%)",
        xlim=(3.8, 9),
        ylim=(0, 1.2 * max(errors)),
    )
    ax.legend(frameon=False)
    return fig


def byte_figure(first: int, second: int) -> Figure:
    """The eight bits of a byte that holds two codes, the first in its low half."""
    fig, ax = figure(9, 2.4)
    byte = 16 * second + first
    for i, bit in enumerate(f"{byte:08b}"):
        ax.add_patch(Rectangle((i, 0), 0.94, 0.9, facecolor=COLOURS[1 if i < 4 else 0], alpha=0.35))
        ax.text(i + 0.47, 0.45, bit, ha="center", va="center", fontsize=16, family="monospace")
    for x, code, words in ((2, second, "the second code"), (6, first, "the first code")):
        ax.text(x, 1.15, f"{words}: {code}", ha="center", fontsize=12)
    ax.set(title=f"The byte {byte}: two codes of four bits", xlim=(-0.1, 8.1), ylim=(-0.1, 1.5))
    ax.axis("off")
    return fig


def code_use_figure(codes: Mapping[str, Tensor]) -> Figure:
    """How often each of 16 codes is used, by format."""
    fig, axes = figure(11, 3.4, ncols=2, sharey=True)
    for ax, (label, found), colour in zip(axes, codes.items(), COLOURS[1:]):
        counts = np.bincount(found.flatten().numpy(), minlength=16)
        ax.bar(range(16), 100 * counts / found.numel(), color=colour)
        ax.axhline(100 / 16, color="#555555", linestyle="--", linewidth=1, label="all alike")
        ax.set(title=f"How often each code is used: {label}", xlabel="code")
    axes[0].set_ylabel("share of the weights (%)")
    axes[0].legend(frameon=False)
    return fig


def errors_by_value_figure(weight: Tensor, rounded: Mapping[str, Tensor], bins: int = 25) -> Figure:
    """How far weights are from what a format makes of them, by their value: the root mean square of each of
    `bins` ranges of values that has 30 weights or more.
    """
    fig, ax = figure(9, 4)
    edges = torch.linspace(float(weight.min()), float(weight.max()), bins + 1)
    place = torch.bucketize(weight.flatten(), edges[1:-1])
    counts = torch.bincount(place, minlength=bins)
    used = counts >= 30
    for i, (label, values) in enumerate(rounded.items()):
        squares = (values - weight).flatten().square()
        mean = torch.zeros(bins).index_add(0, place, squares) / counts.clamp(min=1)
        look = dict(color=COLOURS[(2, 1, 0)[i]], marker=MARKERS[i], linestyle=LINES[i], linewidth=2)
        ax.plot((edges[1:] + edges[:-1])[used] / 2, mean.sqrt()[used], label=label, **look)
    ax.set(
        title="The error of weights, by their value",
        xlabel="value of the weight",
        ylabel="error (root mean square)",
        ylim=(0, None),
    )
    ax.legend(frameon=False)
    return fig


def two_weights_figure(weights: Tensor, hessian: Tensor, grid: Tensor, best: Tensor) -> Figure:
    """Two weights among the pairs of levels [n, 2], and lines of equal error of the output."""
    fig, ax = figure(7, 5.4)
    x = torch.linspace(-1.2, 2.2, 200)
    plane = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1) - weights
    cost = torch.einsum("...i,ij,...j->...", plane, hessian, plane).T
    ax.contour(x, x, cost, levels=(0.02, 0.1, 0.3, 0.72, 1.5), colors=COLOURS[4], linewidths=1.2)
    ax.plot(*grid.T, "o", color=COLOURS[7], markersize=6)
    for point, label, colour, marker in (
        (weights, "the weights", 6, "X"),
        (weights.round(), "nearest to the weights", 1, "s"),
        (best, "nearest in the output", 0, "D"),
    ):
        ax.plot(*point, marker, color=COLOURS[colour], markersize=11, linestyle="none", label=label)
    ax.set(
        title="Two weights, and inputs that rise and fall together",
        xlabel="first weight (levels are whole numbers)",
        ylabel="second weight",
    )
    ax.set_aspect("equal")
    ax.legend(frameon=True, loc="upper right", fontsize=10)
    return fig


def two_errors_figure(of_weight: Mapping[str, float], of_output: Mapping[str, float]) -> Figure:
    """The errors of a layer's weights and of its outputs, in percent, by how it was rounded."""
    fig, axes = figure(10, 3.4, ncols=2)
    panels = {"error of the weights": of_weight, "error of the outputs, on new text": of_output}
    for ax, (title, errors) in zip(axes, panels.items()):
        ax.bar(list(errors), list(errors.values()), color=[COLOURS[i] for i in (1, 0, 2)], width=0.6)
        for i, value in enumerate(errors.values()):
            place = dict(xytext=(0, 3), textcoords="offset points", ha="center")
            ax.annotate(f"{value:.1f}", (i, value), **place)
        ax.set(title=title, ylabel="percent", ylim=(0, 1.15 * max(errors.values())))
    return fig


def model_costs_figure(points: Mapping[str, tuple[float, float]]) -> Figure:
    """A whole model's bits for each weight, and by how many percent its perplexity is up."""
    fig, ax = figure(8, 4.2)
    for i, (label, (bits, more)) in enumerate(points.items()):
        look = dict(color=COLOURS[i], markersize=10, linestyle="none")
        ax.plot(bits, more, MARKERS[i], label=label, **look)
    _bit_axis(ax, (4, 8, 16, 32))
    ax.set(
        title="A model of ours, with fewer and fewer bits",
        xlabel="bits for each weight (logarithmic)",
        ylabel="perplexity, increase (%)",
        xlim=(3.5, 40),
    )
    ax.legend(frameon=False)
    return fig


def panels_figure(reads: Mapping[str, Tensor]) -> Figure:
    """Some rows of a matrix of codes, in the order that is each one's title: which read of 64 bytes each code
    comes with. reads: numbers from 0 on, [rows, columns].
    """
    fig, axes = figure(11, 5.6, nrows=2, sharex=True)
    colours = ListedColormap([COLOURS[0], COLOURS[1], "#e6e6e6"])
    for ax, (title, numbers) in zip(axes, reads.items()):
        rows, columns = numbers.shape
        look = dict(cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=0.5)
        ax.pcolormesh(numbers.clamp(max=2).numpy(), **look)
        touched = [row for row in range(rows) if bool((numbers[row] == 0).any())]
        ax.plot([columns + 2] * len(touched), [row + 0.5 for row in touched], "s", color=COLOURS[0])
        ax.annotate("sums that the\nfirst read adds to", (columns + 3.5, rows / 2), va="center", fontsize=10)
        ax.set(title=title, ylabel="row (output)", xlim=(0, columns + 16), ylim=(rows, 0))
        ax.set(yticks=(0.5, rows - 0.5), yticklabels=("0", str(rows - 1)))
        ax.grid(False)
        ax.spines[["left", "bottom"]].set_visible(False)
    axes[1].set(xlabel="column (input)", xticks=range(0, columns + 1, 8))
    keys = [Patch(color=COLOURS[0]), Patch(color=COLOURS[1]), Patch(color="#e6e6e6")]
    labels = ("the first read of 64 bytes", "the second", "later ones")
    fig.legend(keys, labels, ncols=3, frameon=False, loc="outside lower center")
    return fig


FIRST, SECOND, HELD, WAITS = "a piece of the first loop", "a piece of the next loop", "held", "waits"
Bars = Sequence[tuple[float, float, str]]
"""From when to when a thread does what."""


def _threads_figure(
    timelines: Mapping[str, Sequence[Bars]], marks: Mapping[str, tuple[float, str]]
) -> Figure:
    """What threads do over time: a panel a title, in it a row a thread. marks: a time and words, by title."""
    fig, axes = figure(10, 4.6, nrows=len(timelines), sharex=True)
    looks = {
        FIRST: dict(facecolor=COLOURS[0], edgecolor="white"),
        SECOND: dict(facecolor=COLOURS[1], edgecolor="white"),
        HELD: dict(facecolor="#d9d9d9", edgecolor="#555555", hatch="///"),
        WAITS: dict(facecolor="white", edgecolor="#999999", hatch="..."),
    }
    seen: dict[str, Patch] = {}
    for ax, (title, threads) in zip(axes, timelines.items()):
        for row, bars in enumerate(threads):
            for begin, end, kind in bars:
                ax.barh(row, end - begin, left=begin, height=0.7, **looks[kind])
                seen[kind] = Patch(**looks[kind])
        if title in marks:
            at, words = marks[title]
            ax.axvline(at, color="#000000", linestyle="--", linewidth=1.5)
            ax.annotate(
                words, (at, -0.62), xytext=(5, 0), textcoords="offset points", fontsize=10, va="center"
            )
        ax.set(title=title, yticks=range(len(threads)), ylim=(len(threads) - 0.5, -0.9), xlim=(0, 14))
        ax.set_yticklabels([f"thread {row + 1}" for row in range(len(threads))])
        ax.grid(False)
    axes[-1].set_xlabel("time (in pieces)")
    order = [kind for kind in looks if kind in seen]
    keys = [seen[kind] for kind in order]
    fig.legend(keys, order, ncols=4, frameon=False, loc="outside lower center")
    return fig


def _pieces(begin: float, count: int, kind: str) -> list[tuple[float, float, str]]:
    """So many pieces, one after the other, each as long as one unit of time."""
    return [(begin + i, begin + i + 1, kind) for i in range(count)]


def pieces_figure() -> Figure:
    """A loop of twelve pieces for two threads, the second of which is held for a while: halves that are cut
    beforehand, and pieces taken one at a time.
    """
    held = [*_pieces(0, 2, FIRST), (2, 7, HELD)]
    cut = [[*_pieces(0, 6, FIRST), (6, 11, WAITS)], [*held, *_pieces(7, 4, FIRST)]]
    taken = [[*_pieces(0, 8, FIRST), (8, 9, WAITS)], [*held, *_pieces(7, 2, FIRST)]]
    return _threads_figure(
        {"Halves that are cut beforehand": cut, "Pieces, taken one at a time": taken},
        {
            "Halves that are cut beforehand": (11, "the loop is over"),
            "Pieces, taken one at a time": (9, "the loop is over"),
        },
    )


def barrier_figure() -> Figure:
    """Two loops for two threads, one of which is held at a piece of the first: without a barrier between the
    loops, and with one.
    """
    slow = [*_pieces(0, 2, FIRST), (2, 3, FIRST), (3, 7, HELD), (7, 8, FIRST)]
    without = [[*_pieces(0, 4, FIRST), *_pieces(4, 5, SECOND)], [*slow, *_pieces(8, 1, SECOND)]]
    with_one = [
        [*_pieces(0, 4, FIRST), (4, 8, WAITS), *_pieces(8, 3, SECOND)],
        [*slow, *_pieces(8, 3, SECOND)],
    ]
    return _threads_figure(
        {"Without a barrier": without, "With a barrier": with_one},
        {
            "Without a barrier": (4, "reads sums that thread 2 has not written yet"),
            "With a barrier": (8, "all pieces of the first loop are finished"),
        },
    )
