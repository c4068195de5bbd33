"""Week 2's plots, drawn from its logs alone."""

from pathlib import Path

from pictures import losses_by_window, update_ratios_figure, window_study_figure
from shared.course.report import (
    COLOURS,
    LINES,
    MARKERS,
    Curve,
    LoggedRun,
    curves,
    figure,
    read_runs,
    reference_for,
    save_figure,
)
from shared.course.style import style


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs, reference = read_runs(logs), reference_for(logs)
    plots = []
    if "mlp" in runs:
        lines = [("mlp", "MLP"), ("bigram", "bigram (week 1)")]
        plots.append(
            curves(
                out / "loss.png",
                [Curve(runs[n], label) for n, label in lines],
                "A window of characters against one, at the same budget",
                ylabel="validation loss (nats per character)",
                reference=[Curve(reference[n], label) for n, label in lines if n in reference],
            )
        )
        if any(key.startswith("update/") for row in runs["mlp"].rows for key in row):
            plots.append(save_figure(update_ratios_figure(runs["mlp"]), out / "updates.png"))
    if "init-naive" in runs:
        plots.append(draw_activations(runs, out))
    losses = losses_by_window(runs)
    if len(losses) > 1:
        plots.append(save_figure(window_study_figure(losses), out / "window.png"))
    return plots


def draw_activations(runs: dict[str, LoggedRun], out: Path) -> Path:
    """The hidden layer before the first step, naive against scaled, and the first steps' losses."""
    fig, axes = figure(11, 4.2, ncols=2)
    for i, init in enumerate(("naive", "scaled")):
        run = runs[f"init-{init}"]
        start = run.artifacts["start"]
        total = sum(start["counts"])
        axes[0].stairs(
            [n / total for n in start["counts"]],
            start["edges"],
            color=COLOURS[1 - i],
            linewidth=2,
            linestyle=LINES[1 - i],
            label=f"{init}: {start['saturated']:.0%} saturated",
        )
        xs, ys = run.series("train_loss")
        axes[1].plot(
            xs,
            ys,
            color=COLOURS[1 - i],
            linestyle=LINES[1 - i],
            marker=MARKERS[1 - i],
            markersize=4,
            label=f"{init}: first loss {ys[0]:.2f}",
        )
    axes[0].set(
        title="Hidden activations before the first step",
        xlabel="tanh output",
        ylabel="share of values",
        yscale="log",
    )
    axes[1].set(
        title="The first steps", xlabel="step", ylabel="training loss (nats per character)", yscale="log"
    )
    axes[1].set_yticks([2, 3, 5, 10, 20, 30], ["2", "3", "5", "10", "20", "30"])
    axes[1].minorticks_off()
    for ax in axes:
        ax.legend(frameon=False)
    return save_figure(fig, out / "init.png")
