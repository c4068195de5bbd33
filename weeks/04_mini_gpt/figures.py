"""Week 4's plots, drawn from its logs alone."""

from pathlib import Path

from shared.course.report import (
    Curve,
    LoggedRun,
    bars,
    char_label,
    curves,
    figure,
    heatmap,
    read_runs,
    reference_for,
    save_figure,
)
from shared.course.style import style

ABLATIONS: dict[str, tuple[dict, dict]] = {
    "modern": ({}, {}),
    "learned positions": ({"position": "learned"}, {}),
    "LayerNorm": ({"norm": "layernorm"}, {}),
    "no QK-norm": ({"qk_norm": False}, {}),
    "GELU": ({"mlp": "gelu"}, {}),
    "ReLU squared": ({"mlp": "relu2"}, {}),
    "tied weights": ({"tie_weights": True}, {}),
    "no zero init": ({"zero_init": False}, {}),
    **{f"AdamW, rate {lr}": ({}, {"optimizer": "adamw", "lr": lr}) for lr in (0.0005, 0.001, 0.002, 0.004)},
    "dropout 0.1": ({"dropout": 0.1}, {}),
    "cosine decay": ({}, {"schedule": "cosine", "final_lr": 0.1}),
}


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs, reference = read_runs(logs), reference_for(logs)
    plots = []
    if "headline" in runs:
        lines = [("headline", f"seed {runs['headline'].run['seed']}")] + [
            (n, n.replace("-", " ")) for n in runs if n.startswith("seed-")
        ]
        ends = [y for n, _ in lines for y in runs[n].series("val_loss")[1][-1:]]
        plots.append(
            curves(
                out / "loss.png",
                [Curve(runs["headline"], "training batch", "train_loss")]
                + [Curve(runs[n], f"validation, {label}") for n, label in lines],
                "The headline: a GPT in five minutes",
                x="seconds",
                xlabel="seconds of training",
                ylabel="loss (nats per character)",
                ylim=(
                    (None, max(ends) + 0.9) if ends else None
                ),  # below where every curve begins: the seeds lie close together
                reference=[Curve(reference["headline"], "validation")] if "headline" in reference else (),
                levels={"nanoGPT's GPU recipe": 1.4697} if logs.name == "tinyshakespeare" else None,
            )
        )
        plots += draw_attention(runs["headline"], out)
    if {"classic", "modern"} <= runs.keys():
        plots.append(
            curves(
                out / "speedrun.png",
                [Curve(runs["modern"], "modern"), Curve(runs["classic"], "classic")],
                "The speedrun: two recipes, about one model size",
                x="step",
                xlabel="steps (those of the modern recipe take more operations each)",
                ylabel="validation loss (nats per character)",
                levels={"target": runs["classic"].summary["target"]} if runs["classic"].summary else None,
                reference=[Curve(reference[n], n) for n in ("modern", "classic") if n in reference],
            )
        )
    ablated = {
        r.summary["name"]: r.summary["val_loss"]
        for n, r in runs.items()
        if n.startswith("ablation-") and r.summary and r.summary["name"] in ABLATIONS
    }
    if len(ablated) == len(ABLATIONS):
        ordered = dict(sorted(ablated.items(), key=lambda item: item[1]))
        bottom = min(ordered.values()) - 0.02
        title = "One ingredient exchanged at a time, same number of steps"
        plots.append(
            bars(
                out / "ablation.png",
                ordered,
                title,
                "validation loss (nats per character; the axis does not start at 0)",
                start=bottom,
            )
        )
    return plots


def draw_attention(run: LoggedRun, out: Path) -> list[Path]:
    """In up to three layers, the head with the largest single weight on a previous character, on a known
    phrase.
    """
    maps, text = run.artifacts["attention"], run.artifacts["tokens"][:24]
    if len(text) < 8:
        return []
    labels = [char_label(c) for c in text]
    shown = maps[:: max(1, len(maps) // 3)][:3]
    fig, axes = figure(15, 5.4, ncols=len(shown), squeeze=False)
    for ax, layer in zip(axes[0], shown):
        strongest = max(
            layer, key=lambda head: max(row[i - 1] for i, row in enumerate(head[: len(text)]) if i)
        )
        heatmap(
            ax,
            [row[: len(text)] for row in strongest[: len(text)]],
            f"layer {maps.index(layer) + 1}, head {layer.index(strongest) + 1}",
            labels,
            labels,
            xlabel="looks at",
            ylabel="position",
        )
    fig.colorbar(axes[0][-1].images[0], ax=axes[0][-1], label="attention weight")
    return [save_figure(fig, out / "attention.png")]
