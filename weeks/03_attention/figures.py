"""Week 3's plots, drawn from its logs alone."""

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


def habits(layers: list) -> list[tuple[str, int, int]]:
    """The heads that do something a person can see: (what, layer, head), each the strongest of its kind."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    found = []
    heads = [(i, j, head) for i, layer in enumerate(layers) for j, head in enumerate(layer)]
    for what, back in (("the previous character", 1), ("two characters back", 2)):
        i, j, head = max(
            heads, key=lambda h: mean([row[t - back] for t, row in enumerate(h[2]) if t >= back])
        )
        strength = mean([row[t - back] for t, row in enumerate(head) if t >= back])
        found.append((f"{what}: {strength:.0%} of its weight", i, j))
    spread = [
        (
            mean(
                [
                    -sum(p * math.log(p) for p in row if p > 0) / math.log(t + 1)
                    for t, row in enumerate(h[2])
                    if t > 3
                ]
            ),
            h,
        )
        for h in heads
    ]
    i, j, _ = max(spread, key=lambda s: s[0])[1]
    found.append(("the widest view", i, j))
    return found


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs, reference = read_runs(logs), reference_for(logs)
    lines = [("attention", "attention over 64"), ("window-mlp", "MLP over 8 characters")]
    loss = curves(
        out / "loss.png",
        [Curve(runs[n], label) for n, label in lines],
        "Attention against a fixed window: equal parameters, equal steps",
        ylabel="validation loss (nats per character)",
        reference=[Curve(reference[n], label) for n, label in lines if n in reference],
    )
    layers, text = runs["attention"].artifacts["attention"], runs["attention"].artifacts["tokens"]
    labels = [char_label(c) for c in text]
    fig, axes = figure(19, 7.2, ncols=3)
    for ax, (what, i, j) in zip(axes, habits(layers)):
        heatmap(
            ax,
            layers[i][j],
            f"layer {i + 1}, head {j + 1}\n{what}",
            labels,
            labels,
            xlabel="looks at",
            ylabel="position",
        )
    fig.colorbar(axes[-1].images[0], ax=axes[-1], label="attention weight")
    heads = save_figure(fig, out / "attention.png")
    fig, axes = figure(
        3.2 * len(layers[0]), 3.2 * len(layers), nrows=len(layers), ncols=len(layers[0]), squeeze=False
    )
    for i, layer in enumerate(layers):
        for j, head in enumerate(layer):
            axes[i][j].imshow(head, cmap="viridis", aspect="auto", interpolation="nearest")
            axes[i][j].set(title=f"layer {i + 1}, head {j + 1}", xticks=[], yticks=[])
            axes[i][j].grid(False)
    fig.supxlabel("looks at (position, left to right)")
    fig.supylabel("position (top to bottom)")
    fig.suptitle("Every head on one phrase (brighter: more weight)")
    return [loss, heads, save_figure(fig, out / "heads.png")]
