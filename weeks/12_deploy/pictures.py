"""The notebook's plots: each takes data and returns a figure."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from shared.course.report import COLOURS, LINES, MARKERS, figure


def plot_batch_speed(rows: Sequence[int], seconds: Sequence[float]) -> Figure:
    """The time of a step and the tokens a second, by the number of texts that share the step."""
    fig, (time_ax, rate_ax) = figure(11, 3.8, ncols=2)
    milliseconds = [1000 * s for s in seconds]
    time_ax.plot(rows, milliseconds, color=COLOURS[0], marker=MARKERS[0], label="measured")
    alone = [milliseconds[0] * n for n in rows]
    time_ax.plot(rows, alone, color=COLOURS[7], linestyle=LINES[1], label="one after another")
    time_ax.set(title="A step for so many texts", xlabel="texts", ylabel="milliseconds")
    time_ax.legend(frameon=False)
    rate_ax.plot(rows, [n / s for n, s in zip(rows, seconds)], color=COLOURS[0], marker=MARKERS[0])
    rate_ax.set(title="All texts together", xlabel="texts", ylabel="tokens/s", ylim=(0, None))
    return fig


def plot_visible_keys(seen: Tensor) -> Figure:
    """Which keys each row's newest token may see. seen: bool [rows, time]."""
    fig, ax = figure(8, 2.8)
    ax.imshow(seen, cmap="cividis", aspect="auto", vmin=0, vmax=1)
    ax.grid(False)
    ax.set_xticks(range(0, seen.size(1), 2))
    ax.set_yticks(range(len(seen)), [f"slot {i}" for i in range(len(seen))])
    ax.set(title="What each row's newest token may see (bright)", xlabel="place of the key")
    return fig


def plot_row_choices(choices: Mapping[str, Mapping[str, float]]) -> Figure:
    """The likeliest next tokens of several rows. choices: probability by token, by what the row is called."""
    fig, axes = figure(11, 3.2, ncols=len(choices))
    for i, (ax, (name, probabilities)) in enumerate(zip(axes, choices.items())):
        ax.barh(list(probabilities), list(probabilities.values()), color=COLOURS[i])
        ax.invert_yaxis()
        ax.set(title=name, xlabel="probability", xlim=(0, 1))
        ax.grid(axis="y", visible=False)
    return fig


def plot_seats(schedules: Mapping[str, Sequence[Sequence[int | None]]]) -> Figure:
    """Who has which slot in which step. schedules: for each step the number of the request in each slot, or
    None, by what the schedule is called.
    """
    slots = [len(steps[0]) for steps in schedules.values()]
    fig, axes = figure(
        11, 1.2 + 0.42 * sum(slots) + 0.5 * len(slots), nrows=len(slots), sharex=True, height_ratios=slots
    )
    for ax, (name, steps) in zip(axes if len(slots) > 1 else [axes], schedules.items()):
        _draw_seats(ax, steps)
        given = sum(number is not None for seats in steps for number in seats)
        ax.set_title(f"{name}: {len(steps)} passes, {given / len(steps):.2f} tokens a pass")
        last = ax
    last.set_xlabel("step (one forward pass; numbers: requests in the order they came; white: nobody)")
    return fig


def _draw_seats(ax: Axes, steps: Sequence[Sequence[int | None]]) -> None:
    """A block for each stretch of steps in which a request has a slot."""
    slots = len(steps[0])
    for slot in range(slots):
        begin = 0
        for step in range(1, len(steps) + 1):
            number = steps[begin][slot]
            if step < len(steps) and steps[step][slot] == number:
                continue
            if number is not None:
                colour = COLOURS[number % 6]
                box = dict(facecolors=colour, edgecolor="black", linewidth=0.8, alpha=0.75)
                ax.broken_barh([(begin, step - begin)], (slot - 0.4, 0.8), **box)
                ax.annotate(str(number), ((begin + step) / 2, slot), ha="center", va="center")
            begin = step
    ax.set_yticks(range(slots), [f"slot {i}" for i in range(slots)])
    ax.set(ylim=(slots - 0.5, -0.5), xlim=(0, None))
    ax.grid(axis="y", visible=False)
