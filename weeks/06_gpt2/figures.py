"""Week 6's plots and its model's card, drawn from the logs alone."""

import math
from pathlib import Path
from typing import Any

from shared.course.report import (
    COLOURS,
    Curve,
    LoggedRun,
    curves,
    figure,
    read_runs,
    reference_for,
    save_figure,
)
from shared.course.style import style
from shared.models.card import model_card
from shared.runtime import ROOT

EARLIER = (
    ("05_bpe", "bpe", "week 5, tokens (the course's run)"),
    ("04_mini_gpt", "headline", "week 4, characters (the course's run)"),
)
"""The runs of earlier weeks on the same text: topic, run, and label."""


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs; beside them the card of a model that has been trained."""
    runs = read_runs(logs)
    plots = []
    with style():
        if "gpt2" in runs:
            plots += [draw_loss(logs, runs, out), draw_training(runs["gpt2"], out)]
            if runs["gpt2"].summary:
                write_base_card(runs["gpt2"], logs.name, out)
        steps = [run.summary for name, run in runs.items() if name.startswith("cost-") and run.summary]
        if steps and all(step["gigabytes"] for step in steps):
            plots.append(draw_cost(steps, out))
    return plots


def draw_loss(logs: Path, runs: dict[str, LoggedRun], out: Path) -> Path:
    """Bits per byte of the held-out text against seconds: this week, GPT-2's own blocks, earlier weeks."""
    bits = "val_bits_per_byte"
    lines = [Curve(runs["gpt2"], "today's blocks (this week)", bits)]
    if "shape-gpt2" in runs:
        lines.append(Curve(runs["shape-gpt2"], "GPT-2's blocks", bits))
    for topic, name, label in EARLIER:
        earlier = read_runs(ROOT / "logs" / topic / "reference" / logs.name)
        if name in earlier:
            lines.append(Curve(earlier[name], label, bits))
    reference = reference_for(logs)
    return curves(
        out / "loss.png",
        lines,
        "Three weeks, one held-out text",
        x="seconds",
        xlabel="seconds of training",
        ylabel="bits per byte of held-out text",
        reference=[Curve(reference["gpt2"], "GPT-2", bits)] if "gpt2" in reference else [],
    )


def draw_training(run: LoggedRun, out: Path) -> Path:
    """The loss of the training batches, and that of the held-out text."""
    levels = {}
    if run.summary:
        levels["ln(vocabulary)"] = math.log(run.summary["vocab_size"])
    return curves(
        out / "training.png",
        [Curve(run, "training batch", "train_loss"), Curve(run, "held-out text")],
        "What it has learned, and what carries over",
        ylabel="loss (nats per token)",
        levels=levels,
    )


def draw_cost(steps: list[dict[str, Any]], out: Path) -> Path:
    """Time and memory of each kind of step, side by side."""
    panels = {
        "seconds": ("Time of a step", "seconds"),
        "kept_gigabytes": ("Kept for the backward pass", "GB"),
        "gigabytes": ("Peak memory of the process", "GB"),
    }
    names = [step["name"] for step in steps]
    fig, axes = figure(13, 1.6 + 0.5 * len(steps), ncols=len(panels), sharey=True)
    for ax, (key, (title, unit)), colour in zip(axes, panels.items(), COLOURS):
        values = [step[key] for step in steps]
        ax.barh(names, values, color=colour)
        for i, value in enumerate(values):
            text = f"{value:.2f}"
            ax.annotate(text, (value, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10)
        ax.set(title=title, xlabel=unit)
        ax.margins(x=0.15)
    axes[0].invert_yaxis()
    return save_figure(fig, out / "cost.png")


def write_base_card(run: LoggedRun, data: str, out: Path) -> Path:
    """The model's card, from its log. data: the name of its text. Returns the card's path."""
    summary = run.summary
    settings = run.run["settings"]
    model = settings["model"]
    train = settings["train"]
    tokens = train["steps"] * train["batch_size"] * train["block_size"] * train["grad_accum_steps"]
    sizes = (
        f"{summary['parameters']:,} parameters: {model['n_layer']} blocks, {model['n_embd']} channels,"
        f" {model['n_head']} heads"
    )
    kinds = f"{model['norm']}, {model['position']}, {model['mlp']}"
    recipe = f"optimizer {train['optimizer']}, weight decay {train['weight_decay']:g}, seed {train['seed']}"
    where = f"in {summary['seconds']:,.0f} s on {run.run['device']}"
    path = f"checkpoints/06_gpt2/{settings['preset']}/{data}/gpt2/best"
    facts = {
        "What": "a small GPT that writes like its training text and knows nothing else. For learning only",
        "Built as": f"{sizes}, {kinds}; a context of {model['block_size']} tokens",
        "Tokens": f"{summary['vocab_size']:,}, by byte-pair encoding",
        "Trained on": f"{tokens:,} tokens drawn from the training part of {data}, {where}",
        "How": f"{train['steps']:,} steps, {recipe}",
        "Measured on": f"{train['eval_windows'] or 'all'} windows of the held-out part",
        "Limits": (
            "it has read nothing but this text: it invents words and facts, and the manners are those of the"
            " text"
        ),
        "Licence": "that of this repository",
    }
    figures = {
        "bits per byte": f"{summary['best_val_bits_per_byte']:.3f}",
        "loss (nats per token)": f"{summary['best_val_loss']:.3f}",
        "perplexity": f"{summary['best_val_perplexity']:.2f}",
        "likeliest token is right": f"{summary['best_val_accuracy']:.1%}",
        "its words that occur in the training text": f"{summary['known_words']:.0%}",
    }
    usage = (
        "from shared.models.gpt import GPT\n"
        f'model = GPT.from_checkpoint("{path}")\n'
        'print(model.generate("ROMEO:", temperature=0.8))'
    )
    return model_card(
        out / "model_card.md",
        "Week 6's GPT",
        facts,
        figures=[{"": name, "held out": value} for name, value in figures.items()],
        usage=usage,
        sample=run.artifacts["sample"],
    )
