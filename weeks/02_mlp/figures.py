"""Week 2's plots, drawn from its logs alone."""

from pathlib import Path

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
        plots.append(draw_updates(runs["mlp"], out))
    if "init-naive" in runs:
        plots.append(draw_activations(runs, out))
    studied = {
        r.summary["window"]: r.summary["val_loss"]
        for n, r in runs.items()
        if n.startswith("window-") and r.summary
    }
    if len(studied) > 1:
        if "mlp" in runs and runs["mlp"].summary:  # the main run is one of the study's points
            studied[runs["mlp"].run["settings"]["window"]] = runs["mlp"].summary["val_loss"]
        fig, ax = figure()
        xs = sorted(studied)
        ax.plot(xs, [studied[x] for x in xs], color=COLOURS[0], marker="o", linewidth=2)
        for x in xs:
            ax.annotate(
                f"{studied[x]:.3f}", (x, studied[x]), xytext=(4, 8), textcoords="offset points", fontsize=9
            )
        ax.set(
            title="What each further character of context is worth",
            xlabel="window (characters)",
            ylabel="validation loss (nats per character)",
        )
        ax.set_xticks(xs)
        ax.margins(y=0.12)
        plots.append(save_figure(fig, out / "window.png"))
    return plots


def draw_updates(run: LoggedRun, out: Path) -> Path:
    """The update-to-data ratio of each matrix: about 10^-3 is healthy."""
    fig, ax = figure()
    names = sorted({k for row in run.rows for k in row if k.startswith("update/")})
    for i, name in enumerate(names):
        label = name.removeprefix("update/").removesuffix(".weight").replace("_", " ")
        ax.plot(*run.series(name), color=COLOURS[i], linestyle=LINES[i % 4], label=label)
    ax.axhline(-3, color="#555555", linewidth=1.2, linestyle=":", label="rule of thumb: a thousandth")
    ax.set(
        title="How far each step moves each matrix",
        xlabel="step",
        ylabel="log10(std of update / std of weight)",
    )
    ax.legend(frameon=False)
    return save_figure(fig, out / "updates.png")


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
