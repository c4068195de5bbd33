"""Week 6's plots, drawn from its logs alone."""

import math
from pathlib import Path

from shared.course.report import (
    COLOURS,
    Curve,
    LoggedRun,
    curves,
    figure,
    model_card,
    read_runs,
    reference_for,
    save_figure,
)
from shared.course.style import style
from shared.runtime import ROOT


@style()
def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs, reference = read_runs(logs), reference_for(logs)
    plots = []
    if "gpt2" in runs:
        lines = [Curve(runs["gpt2"], "today's blocks (this week)", "val_bits_per_byte")]
        lines += (
            [Curve(runs["shape-gpt2"], "GPT-2's blocks", "val_bits_per_byte")] if "shape-gpt2" in runs else []
        )
        for topic, run, label in (
            ("05_bpe", "bpe", "week 5, tokens"),
            ("04_mini_gpt", "headline", "week 4, characters"),
        ):
            earlier = read_runs(ROOT / "logs" / topic / "reference" / logs.name)
            lines += (
                [Curve(earlier[run], f"{label} (the course's run)", "val_bits_per_byte")]
                if run in earlier
                else []
            )
        plots.append(
            curves(
                out / "loss.png",
                lines,
                "Three weeks, one held-out text",
                x="seconds",
                xlabel="seconds of training",
                ylabel="bits per byte of held-out text",
                reference=(
                    [Curve(reference["gpt2"], "GPT-2", "val_bits_per_byte")] if "gpt2" in reference else ()
                ),
            )
        )
        plots.append(
            curves(
                out / "training.png",
                [Curve(runs["gpt2"], "training batch", "train_loss"), Curve(runs["gpt2"], "held-out text")],
                "What it has learned, and what carries over",
                ylabel="loss (nats per token)",
                levels=(
                    {"ln(vocabulary)": math.log(runs["gpt2"].summary["vocab_size"])}
                    if runs["gpt2"].summary
                    else None
                ),
            )
        )
        if runs["gpt2"].summary:
            write_base_card(runs["gpt2"], logs.name, out)
    steps = [r.summary for n, r in runs.items() if n.startswith("cost-") and r.summary]
    if steps and all(s["gigabytes"] for s in steps):
        plots.append(draw_cost(steps, out))
    return plots


def write_base_card(run: LoggedRun, data: str, out: Path) -> Path:
    """The model's card, from its log."""
    s, settings = run.summary, run.run["settings"]
    m, train = settings["model"], settings["train"]
    seen = train["steps"] * train["batch_size"] * train["block_size"] * train["grad_accum_steps"]
    path = f"checkpoints/06_gpt2/{settings['preset']}/{data}/gpt2/best"
    return model_card(
        out / "model_card.md",
        "Week 6's GPT",
        {
            "What": (
                "a small GPT that writes like its training text and knows nothing else. For learning only"
            ),
            "Built as": (
                f"{s['parameters']:,} parameters: {m['n_layer']} blocks, {m['n_embd']} channels,"
                f" {m['n_head']} heads, {m['norm']}, {m['position']}, {m['mlp']}; a context of"
                f" {m['block_size']} tokens"
            ),
            "Tokens": f"{s['vocab_size']:,}, by byte-pair encoding",
            "Trained on": (
                f"{seen:,} tokens drawn from the training part of {data}, in {s['seconds']:,.0f} s on"
                f" {run.run['device']}"
            ),
            "How": (
                f"{train['steps']:,} steps, optimizer {train['optimizer']}, weight decay"
                f" {train['weight_decay']:g}, seed {train['seed']}"
            ),
            "Measured on": f"{train['eval_windows'] or 'all'} windows of the held-out part",
            "Limits": (
                "it has read nothing but this text: it invents words and facts, and the manners are those of"
                " the text"
            ),
            "Licence": "that of this repository",
        },
        figures=[
            {"": "bits per byte", "held out": f"{s['best_val_bits_per_byte']:.3f}"},
            {"": "loss (nats per token)", "held out": f"{s['best_val_loss']:.3f}"},
            {"": "perplexity", "held out": f"{s['best_val_perplexity']:.2f}"},
            {"": "likeliest token is right", "held out": f"{s['best_val_accuracy']:.1%}"},
            {"": "its words that occur in the training text", "held out": f"{s['known_words']:.0%}"},
        ],
        usage="from shared.models.gpt import GPT\nmodel ="
        f' GPT.from_checkpoint("{path}")\nprint(model.generate("ROMEO:", temperature=0.8))',
        sample=run.artifacts["sample"],
    )


def draw_cost(steps: list[dict], out: Path) -> Path:
    """Time and memory of each kind of step, side by side."""
    fig, axes = figure(13, 1.6 + 0.5 * len(steps), ncols=3, sharey=True)
    names, titles = (
        [s["name"] for s in steps],
        (
            "Time of a step",
            "Kept for the backward pass",
            "Peak memory of the process",
        ),
    )
    for ax, key, title, unit, colour in zip(
        axes, ("seconds", "kept_gigabytes", "gigabytes"), titles, ("seconds", "GB", "GB"), COLOURS
    ):
        values = [s[key] for s in steps]
        ax.barh(names, values, color=colour)
        for i, v in enumerate(values):
            ax.annotate(
                f"{v:.2f}", (v, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10
            )
        ax.set(title=title, xlabel=unit)
        ax.margins(x=0.15)
    axes[0].invert_yaxis()
    return save_figure(fig, out / "cost.png")
