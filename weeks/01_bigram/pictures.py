"""The pictures of week 1's notebook: each takes data and returns a figure."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, char_label, figure, heatmap
from shared.course.style import style


def what_comes_next(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """The eight likeliest next characters after each context. shares: by context, then by character."""
    with style():
        fig, axes = figure(11, 3.4, ncols=len(shares))
        for ax, colour, (context, after) in zip(axes, COLOURS, shares.items()):
            top = list(after.items())[:8]
            ax.bar([char_label(c) for c, _ in top], [share for _, share in top], color=colour)
            ax.grid(axis="x")
            label = context.replace(" ", "␣")
            ax.set(title=f"after {label}", xlabel="next character (␣: space)", ylim=(0, 1.05))
            ax.set_xlim(-0.6, 7.6)
        axes[0].set_ylabel("share of all cases")
        return fig


def table_of_pairs(counts: Tensor, chars: Sequence[str]) -> Figure:
    """How often each character follows each, on a logarithmic scale of colours; what never does is white."""
    labels = [char_label(c) for c in chars]
    with style():
        fig, ax = figure(12, 11)
        heatmap(
            ax,
            counts.double().log10().masked_fill(counts == 0, math.nan),
            "How often each character follows each (white: never)",
            labels,
            labels,
            xlabel="next character",
            ylabel="present character",
            unit="log10(count)",
        )
        return fig


def row_as_bars(
    rows: Mapping[str, Tensor], chars: Sequence[str], after: str, ylabel: str = "probability"
) -> Figure:
    """The twelve likeliest characters after one, side by side. rows: by title; ordered by the first."""
    order = next(iter(rows.values())).argsort(descending=True, stable=True)[:12]
    with style():
        fig, axes = figure(max(8, 3.7 * len(rows)), 3.4, ncols=len(rows), sharey=True, squeeze=False)
        for ax, colour, (title, row) in zip(axes[0], COLOURS, rows.items()):
            ax.bar([char_label(chars[int(i)]) for i in order], row[order].tolist(), color=colour)
            ax.grid(axis="x")
            ax.set(title=title, xlabel=f"next character after {char_label(after)}")
        axes[0][0].set_ylabel(ylabel)
        return fig


def learning_by_heart(lengths: Sequence[int], read: Sequence[float], unread: Sequence[float]) -> Figure:
    """How often a lookup table of k characters is right, on what it has read and on other text."""
    with style():
        fig, ax = figure(8, 4)
        for i, (label, shares) in enumerate({"text it has read": read, "other text": unread}.items()):
            ax.plot(
                lengths,
                shares,
                color=COLOURS[i],
                marker=MARKERS[i],
                linestyle=LINES[i],
                linewidth=2,
                label=label,
            )
        ax.set(
            title="A model that learns by heart",
            xlabel="k: characters it looks back",
            ylabel="share of next characters guessed right",
            ylim=(0, 1.05),
        )
        ax.legend(frameon=False)
        return fig


def losses_as_bars(losses: Mapping[str, float], vocab_size: int) -> Figure:
    """The losses of several models on the same text."""
    with style():
        fig, ax = figure(8, 0.9 + 0.6 * len(losses))
        ax.barh(list(losses), list(losses.values()), color=[COLOURS[7], *COLOURS][: len(losses)])
        ax.invert_yaxis()
        ax.grid(axis="y")
        for i, value in enumerate(losses.values()):
            ax.annotate(f"{value:.3f}", (value, i), xytext=(5, 0), textcoords="offset points", va="center")
        ax.set(
            title="The same held-out text, read by each model",
            xlabel="loss (nats per character, lower is better)",
            xlim=(0, 1.12 * math.log(vocab_size)),
        )
        return fig


def cost_of_smoothing(amounts: Sequence[float], losses: Sequence[float], vocab_size: int) -> Figure:
    """The validation loss by how much is added to each count."""
    with style():
        fig, ax = figure(8, 3.8)
        ax.semilogx(amounts, losses, color=COLOURS[0], marker="o", linewidth=2, label="bigram")
        uniform = math.log(vocab_size)
        ax.axhline(uniform, color=COLOURS[7], linestyle="--", label="ln V: all characters alike")
        ax.set(
            title="What smoothing costs",
            xlabel="smoothing (added to each count)",
            ylabel="validation loss (nats per character)",
        )
        ax.legend(frameon=False)
        return fig


def expected_and_happened(letters: Sequence[str], expected: Tensor, happened: Tensor) -> Figure:
    """Softmax, one-hot, and their difference, which is the gradient of the loss at the logits."""
    parts = {
        "expected: softmax": expected,
        "happened: one-hot": happened,
        "gradient of the loss": expected - happened,
    }
    with style():
        fig, axes = figure(11, 3.2, ncols=3, sharey=True)
        for ax, colour, (title, values) in zip(axes, COLOURS, parts.items()):
            ax.bar(letters, values.tolist(), color=colour)
            ax.axhline(0, color="black", linewidth=0.8)
            ax.grid(axis="x")
            ax.set(title=title, xlabel="character")
        axes[0].set_ylabel("probability, or nats per unit of logit")
        return fig


def descent(train_loss: Sequence[float], counting: float, network: float, vocab_size: int) -> Figure:
    """The loss of each training batch, with the validation losses of both ways to the table."""
    with style():
        fig, ax = figure(8, 4)
        steps = range(1, len(train_loss) + 1)
        ax.plot(steps, train_loss, color=COLOURS[0], linewidth=1.2, label="network, training batches")
        uniform = math.log(vocab_size)
        ax.axhline(uniform, color=COLOURS[7], linestyle="--", label=f"ln V: {uniform:.3f}")
        label = f"counting, validation: {counting:.3f}"
        ax.axhline(counting, color=COLOURS[1], linestyle="--", linewidth=2, label=label)
        label = f"network, validation: {network:.3f}"
        ax.plot(len(train_loss), network, "D", color=COLOURS[2], markersize=8, label=label)
        ax.set(
            title="Gradient descent approaches the counted table",
            xlabel="step (each mark on the axis: ten times as many)",
            xscale="log",
            ylabel="loss (nats per character)",
        )
        ax.legend(frameon=False)
        return fig


def two_ways_to_one_table(counts: Tensor, counted: Tensor, learned: Tensor) -> Figure:
    """Each pair's probability by counting and by descent, for characters that occur more than 1,000 times."""
    seen = (counts > 0) & (counts.sum(dim=1, keepdim=True) > 1000)
    with style():
        fig, ax = figure(6.6, 5.6)
        colours = counts[seen].log10()
        dots = ax.scatter(counted[seen], learned[seen], c=colours, s=9, cmap="viridis")
        ax.plot([1e-5, 1], [1e-5, 1], color=COLOURS[5], linewidth=1, label="equal")
        ax.set(
            title="Two ways to one table",
            xlabel="probability by counting",
            ylabel="probability by gradient descent",
            xscale="log",
            yscale="log",
        )
        fig.colorbar(dots, ax=ax, label="log10(how often the pair was seen)")
        ax.legend(frameon=False)
        return fig


def one_answer_for_all(
    letters: Sequence[str], shares: Mapping[str, Mapping[str, float]], bigram: Mapping[str, float]
) -> Figure:
    """What follows contexts that end alike, in the text and by the bigram. bigram: by character."""
    places = np.arange(len(letters))
    with style():
        fig, axes = figure(11, 3.2, ncols=len(shares), sharey=True)
        for i, (ax, (context, after)) in enumerate(zip(axes, shares.items())):
            heights = [after.get(c, 0) for c in letters]
            ax.bar(places - 0.2, heights, 0.4, color=COLOURS[i], label=f"the text, after {context}")
            heights = [bigram[c] for c in letters]
            label = f"the bigram, after {context[-1]}"
            ax.bar(places + 0.2, heights, 0.4, color=COLOURS[7], label=label)
            ax.set_xticks(places, [char_label(c) for c in letters])
            ax.grid(axis="x")
            ax.set(title=f"{context}, and then?", xlabel="next character", ylim=(0, 1))
            ax.legend(frameon=False, fontsize=9)
        axes[0].set_ylabel("probability")
        return fig


def course_run(runs: Mapping[str, LoggedRun], data: str) -> Figure:
    """The validation loss of the course's network over its training, with that of its counted table."""
    with style():
        fig, ax = figure(8, 3.8)
        steps, losses = runs["network"].series("val_loss")
        ax.plot(steps, losses, color=COLOURS[0], marker="o", linewidth=2, label="network, validation")
        counted = runs["counts"].summary["val_loss"]
        label = "counting, validation"
        ax.axhline(counted, color=COLOURS[1], linestyle="--", linewidth=2, label=label)
        ax.set(title=f"The course's run on {data}", xlabel="step", ylabel="loss (nats per character)")
        ax.legend(frameon=False)
        return fig
