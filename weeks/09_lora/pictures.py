"""The notebook's plots: each takes data and returns a figure."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from shared.course.report import COLOURS, figure


def plot_who_sees_whom(mask: Tensor) -> Figure:
    """A row's mask, bool [time, time], beside the causal one of the same size. Behind the last token that
    sees another one there is padding.
    """
    fig, axes = figure(11, 4.6, ncols=2)
    causal = torch.ones(mask.shape).tril()
    titles = ("Causal: the second text sees the first", "Packed: each text sees itself alone")
    for ax, values, title in zip(axes, (causal, mask), titles):
        ax.imshow(values, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        ax.set(title=title, xlabel="token that is looked at", ylabel="token that looks")
        ax.grid(False)
    padding = int((mask.sum(1) > 1).nonzero().max()) + 1
    if padding < len(mask):
        middle = (padding + len(mask)) / 2
        axes[1].annotate(
            "padding: each place\nsees itself alone",
            (middle, middle),
            xytext=(0.55 * len(mask), 0.3 * len(mask)),
            arrowprops={"arrowstyle": "->", "color": "#555555"},
        )
    return fig


def plot_change_by_rank(shares: Sequence[Sequence[float]], of_random: Sequence[float], rank: int) -> Figure:
    """How much of each change its first pieces hold. shares: of each matrix's squared length, by the number
    of pieces; of_random: the same of a random matrix; rank: a number of pieces to mark.
    """
    fig, ax = figure(8, 4.2)
    for number, share in enumerate(shares):
        label = "changes of the model's matrices" if number == 0 else None
        ax.plot(range(1, len(share) + 1), share, color=COLOURS[0], alpha=0.25, linewidth=1, label=label)
    label = f"a random {len(of_random)} × {len(of_random)} matrix, for comparison"
    ax.plot(
        range(1, len(of_random) + 1), of_random, color=COLOURS[5], linestyle="--", linewidth=2, label=label
    )
    ax.axvline(rank, color="#555555", linewidth=1, linestyle=":")
    ax.annotate(f"{rank} pieces", (rank, 0.06), xytext=(6, 0), textcoords="offset points")
    ax.set(
        title="How much of a change the first pieces hold",
        xlabel="pieces (rank)",
        ylabel="share of the squared change",
        ylim=(0, 1.02),
    )
    ax.legend(frameon=False)
    return fig


def plot_steps_by_hand(distances: Mapping[str, Sequence[float]]) -> Figure:
    """How far a layer is from what it shall become, step by step, by the name of the training."""
    fig, ax = figure(8, 3.8)
    for number, (name, distance) in enumerate(distances.items()):
        ax.plot(distance, color=COLOURS[number], label=name)
    ax.set(
        title="One layer, trained by hand",
        xlabel="step",
        ylabel="mean squared error",
        yscale="log",
    )
    ax.legend(frameon=False)
    return fig


def plot_yours_and_the_courses(
    yours: Mapping[str, Sequence[float]], courses: Mapping[str, Sequence[float]]
) -> Figure:
    """The loss of two trainings, step by step. Each: "step" and "loss" of the batches, "val_step" and
    "val_loss" of the held-out answers.
    """
    fig, ax = figure(9, 4.4)
    for run, name, colour, look in (
        (courses, "the course's", COLOURS[1], {"linewidth": 5, "alpha": 0.5, "markersize": 13}),
        (yours, "yours", COLOURS[0], {"linewidth": 1.5, "markersize": 6}),
    ):
        ax.plot(run["step"], run["loss"], color=colour, label=f"{name}: each batch", **look)
        points = look | {"linestyle": "", "marker": "o"}
        ax.plot(run["val_step"], run["val_loss"], color=colour, label=f"{name}: held-out answers", **points)
    ax.set(
        title="Your layer, labels and packing, and the course's",
        xlabel="step",
        ylabel="loss on answers (nats per token)",
    )
    ax.legend(frameon=False)
    return fig
