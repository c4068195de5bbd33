"""Week 1's plots, drawn from its logs alone."""

import math
from pathlib import Path

from shared.course.report import (
    Curve,
    char_label,
    curves,
    figure,
    heatmap,
    read_runs,
    reference_for,
    save_figure,
)
from shared.course.style import style


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs, reference = read_runs(logs), reference_for(logs)
    chars = [char_label(c) for c in runs["counts"].artifacts["chars"]]
    fig, ax = figure(12, 11)
    counts = runs["counts"].artifacts["counts"]
    heatmap(
        ax,
        [[math.log10(n) if n else math.nan for n in row] for row in counts],
        "How often each character follows each (white: never)",
        chars,
        chars,
        xlabel="next character",
        ylabel="present character",
        unit="log10(count)",
    )
    heat = save_figure(fig, out / "counts.png")
    loss = curves(
        out / "loss.png",
        [
            Curve(runs["network"], "network, training batch", "train_loss"),
            Curve(runs["network"], "network, validation"),
        ],
        "Gradient descent finds the table that counting gives",
        ylabel="loss (nats per character)",
        reference=[Curve(reference["network"], "validation")] if "network" in reference else (),
        levels={"counting, validation": runs["counts"].summary["val_loss"], "ln V": math.log(len(chars))},
    )
    return [heat, loss]
