"""Week 2's plots of what the notebook has at hand. Each function takes data and returns a figure."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, LoggedRun, figure

Evaluations = Sequence[tuple[int, float]]
"""(steps done, validation loss), as `train` returns them."""
VOWELS = "aeiou"


def contexts_figure(vocab_size: int, found: Mapping[int, int], met_again: Mapping[int, float]) -> Figure:
    """By the length of a context: how many there could be, how many there are, and how many of a new text's
    were seen before.
    """
    fig, (left, right) = figure(11, 3.8, ncols=2)
    lengths = list(found)
    rows = [vocab_size**k for k in lengths]
    left.semilogy(lengths, rows, color=COLOURS[1], linestyle="--", marker="s", label="rows of the table")
    left.semilogy(
        lengths, list(found.values()), color=COLOURS[0], marker="o", label="different contexts in the text"
    )
    left.set(title="A row for each context", xlabel="characters of context", ylabel="number")
    left.legend(frameon=False)
    right.plot(list(met_again), list(met_again.values()), color=COLOURS[2], marker="D", linewidth=2)
    right.set(
        title="Contexts of a new text that were seen before",
        xlabel="characters of context",
        ylabel="share",
        ylim=(0, 1.05),
    )
    return fig


def sums_figure(sizes: Sequence[int], deviations: Mapping[str, Sequence[float]]) -> Figure:
    """The standard deviation of a neuron's sum by the number of its inputs, for several kinds of weights."""
    fig, ax = figure(8, 3.6)
    for i, (name, values) in enumerate(deviations.items()):
        style = {"color": COLOURS[1 - i], "linestyle": LINES[1 - i], "marker": MARKERS[1 - i]}
        ax.loglog(sizes, values, linewidth=2, label=f"weights {name}", **style)
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    ax.minorticks_off()
    ax.set(title="How large is the sum in a neuron?", xlabel="inputs", ylabel="standard deviation of the sum")
    ax.legend(frameon=False)
    return fig


def activations_figure(activations: Mapping[str, Tensor]) -> Figure:
    """Histograms of tanh outputs, one for each initialization."""
    fig, axes = figure(11, 3.6, ncols=2, sharey=True)
    for i, (name, values) in enumerate(activations.items()):
        saturated = (values.abs() > 0.97).float().mean().item()
        axes[i].hist(
            values.flatten().numpy(),
            bins=50,
            range=(-1, 1),
            weights=[1 / values.numel()] * values.numel(),
            color=COLOURS[1 - i],
            label=f"{saturated:.0%} beyond ±0.97",
        )
        axes[i].set(title=f"Hidden layer before the first step: {name}", xlabel="tanh output")
        axes[i].legend(frameon=False, loc="upper center")
    axes[0].set_ylabel("share of values")
    return fig


def steps_figure(
    lines: Mapping[str, Sequence[float]],
    title: str,
    ylabel: str,
    *,
    level: tuple[str, float] | None = None,
    ticks: Sequence[float] = (),
) -> Figure:
    """Values by training step, one line for each name. level: a horizontal line, with its label. ticks: of a
    logarithmic axis; without any, the axis is linear.
    """
    fig, ax = figure(8, 3.7)
    for i, (name, values) in enumerate(lines.items()):
        ax.plot(values, color=COLOURS[i], linestyle=LINES[i], linewidth=2, label=name)
    if level is not None:
        ax.axhline(level[1], color=COLOURS[7], linestyle=":", linewidth=2, label=level[0])
    if ticks:
        ax.set_yscale("log")
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
    ax.set(title=title, xlabel="step", ylabel=ylabel)
    ax.legend(frameon=False)
    return fig


def contest_figure(runs: Mapping[str, tuple[Sequence[float], Evaluations]], ln_v: float) -> Figure:
    """Training losses (pale) and validation losses by step, of several models."""
    fig, ax = figure(8, 4)
    for i, (name, (losses, evaluations)) in enumerate(runs.items()):
        colour = COLOURS[1 - i]
        ax.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.3, linewidth=1)
        steps, values = zip(*evaluations)
        label = f"{name}, validation: {values[-1]:.3f}"
        ax.plot(
            steps,
            values,
            color=colour,
            linestyle=LINES[1 - i],
            marker=MARKERS[1 - i],
            linewidth=2,
            label=label,
        )
    ax.axhline(ln_v, color=COLOURS[7], linestyle=":", label="ln V")
    ax.set(
        title="Eight characters against one, as many steps (pale: training batches)",
        xlabel="step",
        ylabel="loss (nats per character)",
    )
    ax.legend(frameon=False)
    return fig


def schedules_figure(runs: Mapping[str, Evaluations]) -> Figure:
    """Validation losses by step of runs that differ in their schedule."""
    fig, ax = figure(8, 3.8)
    for i, (name, evaluations) in enumerate(runs.items()):
        steps, values = zip(*evaluations)
        style = {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i]}
        ax.plot(steps, values, linewidth=2, label=f"{name}: {values[-1]:.3f} at the end", **style)
    ax.set(
        title="The same model and batches, another schedule",
        xlabel="step",
        ylabel="validation loss (nats per character)",
    )
    ax.legend(frameon=False)
    return fig


def resumed_figure(in_peace: Sequence[float], until: Sequence[float], resumed: Sequence[float]) -> Figure:
    """Training losses of a run that was left alone, as a line, and of one in two pieces, as marks on it."""
    fig, ax = figure(8, 3.7)
    steps = list(range(1, len(in_peace) + 1))
    ax.plot(steps, in_peace, color=COLOURS[7], linewidth=1.5, label="left in peace")
    pieces = (("until Ctrl-C", steps[: len(until)], until), ("resumed", steps[len(until) :], resumed))
    for i, (name, where, losses) in enumerate(pieces):
        ax.plot(where, losses, color=COLOURS[i], marker=MARKERS[i], linestyle="", markersize=5, label=name)
    ax.set(title="Interrupted and resumed", xlabel="step", ylabel="training loss (nats per character)")
    ax.legend(frameon=False)
    return fig


def update_ratios_figure(run: LoggedRun) -> Figure:
    """How far each logged step of a run moved each matrix, as a share of the size of its numbers."""
    fig, ax = figure()
    names = sorted({key for row in run.rows for key in row if key.startswith("update/")})
    for i, name in enumerate(names):
        label = name.removeprefix("update/").removesuffix(".weight")
        steps, exponents = run.series(name)
        ratios = [10**exponent for exponent in exponents]
        ax.plot(steps, ratios, color=COLOURS[i], linestyle=LINES[i % 4], label=label)
    ax.axhline(1e-3, color="#555555", linewidth=1.2, linestyle=":", label="rule of thumb: a thousandth")
    ticks = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
    ax.set_yscale("log")
    ax.set_yticks(ticks, [f"{tick:f}".rstrip("0") for tick in ticks])
    ax.minorticks_off()
    ax.set(
        title="How far each step moves each matrix",
        xlabel="step",
        ylabel="std of update / std of weight",
    )
    ax.legend(frameon=False)
    return fig


def reach_figure(reach: Mapping[str, Sequence[float]], window: int) -> Figure:
    """How much the prediction changes, by its total variation, with the character so many places back."""
    fig, ax = figure(8, 3.6)
    for i, (name, values) in enumerate(reach.items()):
        places = [back + 0.4 * i - 0.2 for back in range(len(values))]
        ax.bar(places, values, width=0.4, color=COLOURS[1 - i], label=name)
        ax.set_xticks(range(len(values)))
    ax.axvline(window - 0.5, color="black", linewidth=1, linestyle=":", label="end of the window")
    ax.grid(axis="x")
    ax.set(
        title="What does the next character depend on?",
        xlabel="how far back (0: the present character)",
        ylabel="total variation (0 to 1)",
    )
    ax.legend(frameon=False)
    return fig


def letters_figure(spaces: Mapping[str, Tensor], letters: str) -> Figure:
    """Letters' vectors, [letters, channel], drawn on the two directions in which they differ most. Letters
    that would cover each other are moved apart.
    """
    fig, axes = figure(11, 4.8, ncols=2)
    kinds = {"vowels": VOWELS, "consonants": "".join(c for c in letters if c not in VOWELS)}
    for ax, (title, vectors) in zip(axes, spaces.items()):
        places = _spread_out(_two_directions(vectors))
        for (kind, members), colour in zip(kinds.items(), (COLOURS[5], COLOURS[0])):
            ax.scatter([], [], color=colour, label=kind)
            for c in members:
                x, y = places[letters.index(c)].tolist()
                ax.text(x, y, c, color=colour, fontsize=13, ha="center", va="center")
        ax.update_datalim(places.numpy())
        ax.set(title=title, xlabel="first principal component", ylabel="second principal component")
        ax.margins(0.1)
        ax.legend(frameon=False)
    return fig


def _spread_out(points: Tensor, least: float = 0.04) -> Tensor:
    """Points, [count, 2], moved so that no two are nearer to each other than a share of the picture."""
    span = points.amax(dim=0) - points.amin(dim=0)
    places = points / span
    for _ in range(300):
        away = places[:, None] - places
        distance = away.norm(dim=-1, keepdim=True)
        push = (least - distance).clamp(min=0) / distance.clamp(min=1e-9)
        places = places + 0.5 * (push * away).sum(dim=1)
    return places * span


def _two_directions(vectors: Tensor) -> Tensor:
    """The first two principal components: [count, channel] -> [count, 2]."""
    centred = vectors - vectors.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T


def likeness_figure(distances: Tensor, cosines: Tensor, letters: str) -> Figure:
    """Each pair of letters: how differently they are followed, and how alike their vectors are."""
    fig, ax = figure(8, 4)
    pairs = torch.triu_indices(len(letters), len(letters), 1)
    is_vowel = torch.tensor([c in VOWELS for c in letters])
    two_vowels = is_vowel[pairs].all(dim=0)
    kinds = (
        ("two vowels", two_vowels, COLOURS[5], "s", 1.0),
        ("another pair of letters", ~two_vowels, COLOURS[0], "o", 0.4),
    )
    for label, chosen, colour, marker, alpha in kinds:
        x, y = distances[*pairs][chosen], cosines[*pairs][chosen]
        ax.scatter(x, y, s=18, alpha=alpha, color=colour, marker=marker, label=label)
    ax.axhline(0, color=COLOURS[7], linewidth=1)
    ax.set(
        title="Letters that are followed alike, and their vectors",
        xlabel="total variation between the letters' next characters",
        ylabel="cosine of their vectors",
    )
    ax.legend(frameon=False, loc="lower left")
    return fig


def beside_reference_figure(evaluations: Evaluations, reference: Mapping[str, LoggedRun]) -> Figure:
    """The learner's validation losses by step, over the curves of the course's runs, by their labels."""
    fig, ax = figure(8, 4)
    for i, (label, run) in enumerate(reference.items()):
        style = {"color": COLOURS[1 - i], "linestyle": LINES[1 - i], "marker": MARKERS[1 - i]}
        ax.plot(*run.series("val_loss"), linewidth=1.5, label=f"the course, {label}", **style)
    steps, values = zip(*evaluations)
    label = f"this notebook: {values[-1]:.3f}"
    ax.plot(steps, values, color=COLOURS[5], marker="P", linewidth=2.5, label=label)
    ax.set(
        title="This notebook's run and the course's",
        xlabel="step",
        ylabel="validation loss (nats per character)",
    )
    ax.legend(frameon=False)
    return fig


def window_study_figure(losses: Mapping[int, float]) -> Figure:
    """The validation loss by the size of the window."""
    fig, ax = figure(8, 3.8)
    sizes = sorted(losses)
    ax.plot(sizes, [losses[size] for size in sizes], color=COLOURS[0], marker="o", linewidth=2)
    for size in sizes:
        place = (size, losses[size])
        ax.annotate(f"{losses[size]:.3f}", place, xytext=(4, 8), textcoords="offset points", fontsize=9)
    ax.set(
        title="The same model with windows of several sizes",
        xlabel="window (characters)",
        ylabel="validation loss (nats per character)",
    )
    ax.set_xticks(sizes)
    ax.margins(y=0.15)
    return fig


def losses_by_window(runs: Mapping[str, LoggedRun]) -> dict[int, float]:
    """The validation loss by the size of the window, of the study's runs and of the main one beside them."""
    losses = {
        run.summary["window"]: run.summary["val_loss"]
        for name, run in runs.items()
        if name.startswith("window-") and run.summary
    }
    main = runs.get("mlp")
    if losses and main is not None and main.summary:
        losses[main.run["settings"]["window"]] = main.summary["val_loss"]
    return losses
