"""The pictures of week 3's notebook: each function takes numbers and returns a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, char_label, figure, heatmap

CONTEST_LABELS = {"window-mlp": "MLP over 8 characters", "attention": "attention over 64"}
FEW = 8
"""Positions up to which the weights of a picture are written out as numbers."""


def draw_cost_of_context(contexts: Sequence[int], window_weights: Sequence[int], attention: int) -> Figure:
    """Parameters against characters in view: of a window's first layer, and of an attention layer."""
    fig, ax = figure(8, 3.8)
    lines = (
        (window_weights, "first layer of week 2's MLP"),
        ([attention] * len(contexts), "an attention layer, 64 wide"),
    )
    for i, (weights, label) in enumerate(lines):
        style = {"color": COLOURS[1 - i], "linestyle": LINES[1 - i], "marker": MARKERS[1 - i]}
        ax.loglog(contexts, weights, **style, linewidth=2, label=label)
    ax.set_xticks(contexts, [str(context) for context in contexts])
    ax.minorticks_off()
    ax.set(title="What it costs to look further back", xlabel="characters in view", ylabel="parameters")
    ax.legend(frameon=False)
    return fig


def draw_weights(weights: Tensor, labels: Sequence[str], title: str) -> Figure:
    """Attention weights [time, time] as a heatmap, a row for each position that looks."""
    names = [char_label(label) for label in labels]
    fig, ax = figure(7.4, 6.2)
    axes = {"xlabel": "looks at", "ylabel": "position"}
    heatmap(ax, weights.detach(), title, names, names, **axes, unit="attention weight")
    if len(names) <= FEW:
        _write_numbers(ax, weights.detach())
    return fig


def draw_steps_in_numbers(
    steps: Mapping[str, Tensor], tokens: Sequence[str], channels: Sequence[str]
) -> Figure:
    """The matrices of a worked example side by side, every number written out.

    steps: by title, [time, time] with a column for each key, or [time, value_dim] with one for each channel
    of a value.
    """
    fig, axes = figure(3.9 * len(steps), 3.6, ncols=len(steps))
    for ax, (title, values) in zip(axes, steps.items()):
        is_of_keys = values.size(1) == len(tokens)
        columns, xlabel = (tokens, "key") if is_of_keys else (channels, "value")
        shown = values.detach().masked_fill(values.isinf(), float("nan"))
        heatmap(ax, shown, title, columns, tokens, xlabel=xlabel, ylabel="query")
        _write_numbers(ax, shown)
    return fig


def _write_numbers(ax: Axes, shown: Tensor) -> None:
    """Each number in its cell of a heatmap; nan is a score of minus infinity."""
    middle = (shown.nan_to_num().max() + shown.nan_to_num().min()).item() / 2
    for row, column in torch.cartesian_prod(*map(torch.arange, shown.shape)).tolist():
        value = shown[row, column].item()
        text = "-∞" if value != value else f"{value:.2f}"
        colour = "white" if value <= middle else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=10, color=_on(text, colour))


def _on(text: str, colour: str) -> str:
    """A hidden entry is blank, so its sign is dark."""
    return "black" if text == "-∞" else colour


def draw_score_variances(dims: Sequence[int], raw: Sequence[float], divided: Sequence[float]) -> Figure:
    """The variance of scores of random queries and keys against head_dim, without and with division."""
    fig, ax = figure(8, 3.8)
    for i, (values, label) in enumerate(((divided, "q · k / √head_dim"), (raw, "q · k"))):
        style = {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i]}
        ax.loglog(dims, values, **style, linewidth=2, label=label)
    ax.set_xticks(dims, [str(d) for d in dims])
    ax.minorticks_off()
    ax.set(title="Scores of random queries and keys", xlabel="head_dim", ylabel="variance of the score")
    ax.legend(frameon=False)
    return fig


def draw_saturation(weights: Mapping[str, Tensor]) -> Figure:
    """The attention weights of one query on a few keys, a panel for each way to make the scores."""
    fig, axes = figure(10, 3.2, ncols=len(weights), sharey=True)
    for i, (title, shares) in enumerate(weights.items()):
        axes[i].bar(range(len(shares)), shares, color=COLOURS[i])
        axes[i].grid(False)
        axes[i].set(title=title, xlabel="key", ylim=(0, 1), xticks=range(len(shares)))
    axes[0].set_ylabel("attention weight")
    return fig


def draw_gradient_sizes(sizes: Mapping[str, Tensor], title: str) -> Figure:
    """The gradients that single queries get, from the smallest to the largest, on a log scale."""
    fig, ax = figure(8, 4)
    for i, (label, lengths) in enumerate(sizes.items()):
        share = torch.linspace(0, 100, len(lengths))
        floor = lengths.sort().values.clamp_min(1e-8)
        ax.plot(share, floor, color=COLOURS[i], linestyle=LINES[i], linewidth=2, label=label)
    ax.set(
        title=title,
        xlabel="queries, sorted by their gradient (percent)",
        ylabel="length of the gradient at q\n(smaller than 1e-8 drawn at 1e-8)",
        yscale="log",
    )
    ax.legend(frameon=False)
    return fig


def draw_accuracy_by_distance(shares: Mapping[str, Tensor], chance: float) -> Figure:
    """How often the speaker is named rightly, against how far back the name stands."""
    fig, ax = figure(8, 3.8)
    for i, (label, values) in enumerate(shares.items()):
        ax.plot(values, color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i], markersize=5, label=label)
    ax.axhline(chance, color="#555555", linestyle=":", linewidth=1.5, label="guessing")
    ax.set(
        title="Who is speaking?",
        xlabel="how far back the speaker's letter stands (characters)",
        ylabel="share named rightly",
        ylim=(0, 1.05),
    )
    ax.legend(frameon=False)
    return fig


def draw_who_notices(noticed: Tensor) -> Figure:
    """How much each position's output moves [position, changed position] when one input is changed."""
    fig, ax = figure(6, 5)
    places = range(len(noticed))
    axes = {"xlabel": "position that was changed", "ylabel": "position that looks"}
    heatmap(ax, noticed, "Who notices a change?", places, places, **axes, unit="change of its output")
    return fig


def draw_masks(masks: Mapping[str, Tensor]) -> Figure:
    """Masks side by side; yellow where a position may look."""
    fig, axes = figure(9, 4, ncols=len(masks))
    for ax, (name, mask) in zip(axes, masks.items()):
        places = range(len(mask))
        title = f"{name}: {int(mask.sum())} scores"
        heatmap(ax, mask, title, places, places, xlabel="looks at", ylabel="position")
    return fig


def draw_heads_by_distance(back: Tensor) -> Figure:
    """The mean attention weight at each distance, a panel for each layer: [layer, head, distance]."""
    fig, axes = figure(10, 3.6, ncols=len(back), sharey=True)
    for i, ax in enumerate(axes):
        for j, head in enumerate(back[i]):
            ax.plot(head, color=COLOURS[j], marker=MARKERS[j], linestyle=LINES[j], label=f"head {j + 1}")
        ax.set(title=f"layer {i + 1}", xlabel="how far back (characters)")
    axes[0].set_ylabel("mean attention weight")
    axes[-1].legend(frameon=False)
    return fig


def draw_contest(runs: Mapping[str, LoggedRun]) -> Figure:
    """Validation losses of the window and of attention against steps."""
    fig, ax = figure(8, 4.2)
    for i, (name, run) in enumerate(runs.items()):
        style: dict[str, Any] = {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i]}
        ax.plot(*run.series("val_loss"), **style, linewidth=2, label=CONTEST_LABELS.get(name, name))
    ax.set(
        title="Equal parameters, equal steps, Muon, one seed",
        xlabel="step",
        ylabel="validation loss (nats per character)",
    )
    ax.legend(frameon=False)
    return fig


def draw_surest_heads(maps: Tensor, labels: Sequence[str]) -> Figure:
    """In each layer the head that is surest of itself: weights [layer, head, time, time] on a phrase."""
    names = [char_label(label) for label in labels]
    surest = maps.amax(dim=-1).mean(dim=-1).argmax(dim=-1)  # [layer]
    fig, axes = figure(5 * len(maps), 5, ncols=len(maps), squeeze=False)
    for i, ax in enumerate(axes[0]):
        shown = maps[i, surest[i], : len(names), : len(names)]
        title = f"layer {i + 1}, head {surest[i] + 1}"
        heatmap(ax, shown, title, names, names, xlabel="looks at", ylabel="position")
    fig.colorbar(axes[0][-1].images[0], ax=axes[0][-1], label="attention weight")
    return fig


def draw_weeks_so_far(bits: Mapping[str, float], data: str) -> Figure:
    """Bits per byte of the weeks so far, and of what this notebook trained, as bars."""
    fig, ax = figure(8, 1.2 + 0.5 * len(bits))
    colours = [COLOURS[0]] * (len(bits) - 1) + [COLOURS[1]]
    ax.barh(list(bits), list(bits.values()), color=colours)
    for i, value in enumerate(bits.values()):
        ax.text(value + 0.03, i, f"{value:.2f}", va="center")
    ax.invert_yaxis()
    ax.grid(False)
    ax.set_xlim(0, 1.12 * max(bits.values()))
    ax.set(title=f"The ladder so far ({data})", xlabel="bits per byte of held-out text (lower is better)")
    return fig
