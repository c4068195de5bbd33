"""Week 9's plots and the fine-tuned model's card, made from logs."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from names import METHOD_LABELS, MODELS, STEWARD, TRIAL, model_name, parts_of, run_label
from shared.course.report import (
    COLOURS,
    MARKERS,
    Curve,
    LoggedRun,
    curves,
    figure,
    read_runs,
    save_figure,
)
from shared.course.runs import relative
from shared.course.style import style
from shared.models.card import model_card

if TYPE_CHECKING:
    from run import Settings

HIGHEST_OF_BEFORE = 1.1
"""Where the loss's axis ends, in losses of the untouched model."""


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    models = runs_of(logs)
    plots = []
    with style():
        for model, runs in models.items():
            if any(len(run.series("val_loss")[0]) > 1 for run in runs.values()):
                plots.append(draw_learning(model, runs, out))
        if models:
            plots.append(save_figure(comparison_figure(models), out / "comparison.png"))
        if trials_of(logs):
            plots.append(save_figure(rates_figure(logs), out / "rates.png"))
    return plots


def trials_of(logs: Path) -> dict[str, list[LoggedRun]]:
    """The finished trials of `--study rates`, by the run that they are trials of, from the lowest rate up."""
    trials: dict[str, list[LoggedRun]] = {}
    for name, run in read_runs(logs).items():
        if name.startswith(TRIAL) and "best_val_loss" in run.summary:
            trials.setdefault(name.removeprefix(TRIAL).rpartition("-")[0], []).append(run)
    for runs in trials.values():
        runs.sort(key=lambda run: run.summary["lr"])
    return trials


def rates_figure(logs: Path) -> Any:
    """What each method pays at each of its rates: the old text's perplexity over the held-out loss."""
    fig, ax = figure(8.5, 5.6)
    trials = trials_of(logs)
    named: list[tuple[float, float]] = []  # places that have a rate beside them
    for number, name in enumerate(sorted(trials, key=_trained)):
        runs = trials[name]
        losses = [run.summary["best_val_loss"] for run in runs]
        forgotten = [100 * run.summary["forgotten"] for run in runs]
        look = dict(color=COLOURS[number % 8], marker=MARKERS[number % 8], markersize=8)
        ax.plot(losses, forgotten, label=run_label(name), **look)
        for run, x, y in zip(runs, losses, forgotten):
            if any(abs(x - a) < 0.02 and abs(y - b) < 10 for a, b in named):
                continue  # of points that lie together one tells
            named.append((x, y))
            text = f"{run.summary['lr']:g}"
            ax.annotate(text, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    ax.set(
        title="Three learning rates for each method: what is learned, what is paid",
        xlabel="loss on held-out answers (nats per token)",
        ylabel="increase of perplexity on held-out Shakespeare (%)",
    )
    ax.legend(frameon=False, fontsize=9)
    return fig


def _trained(name: str) -> tuple[int, int]:
    """Where a trial stands among others: by method, then by rank."""
    method, _, size = parts_of(name)
    return list(METHOD_LABELS).index(method), int(size or 0)


def runs_of(logs: Path) -> dict[str, dict[str, LoggedRun]]:
    """The finished runs of each model, by method and size."""
    finished = [
        run
        for run in read_runs(logs).values()
        if "best_val_loss" in run.summary and not run.name.startswith(TRIAL)
    ]
    by_model: dict[str, dict[str, LoggedRun]] = {}
    for run in sorted(finished, key=_order):
        by_model.setdefault(model_of(run), {})[run.name] = run
    return by_model


def model_of(run: LoggedRun) -> str:
    """What the logs call a run's model."""
    return model_name(run.run["settings"]["model"])


def _order(run: LoggedRun) -> tuple[str, int, float, str]:
    """Where a run stands among others: by model, by method, by how much is trained."""
    method = parts_of(run.name)[0]
    return model_of(run), list(METHOD_LABELS).index(method), run.summary["trainable"], run.name


def loss_before(runs: dict[str, LoggedRun]) -> float:
    """The untouched model's loss, which all runs of a model have in common."""
    return next(iter(runs.values())).summary["base_loss"]


def draw_learning(model: str, runs: dict[str, LoggedRun], out: Path) -> Path:
    """The loss on held-out answers, step by step, of all runs of a model."""
    before = loss_before(runs)
    return curves(
        out / f"{model}_curves.png",
        [Curve(run, run_label(name)) for name, run in runs.items()],
        f"Held-out answers while {MODELS.get(model, model)} learns",
        ylabel="loss on held-out answers (nats per token)",
        levels={"before": before},
        ylim=(None, HIGHEST_OF_BEFORE * before),
    )


def comparison_figure(models: dict[str, dict[str, LoggedRun]]) -> Any:
    """Above: how much is trained against how well it answers. Below: what the model forgets. A column for
    each model.
    """
    fig, axes = figure(7.4 * len(models), 9.2, nrows=2, ncols=len(models), squeeze=False)
    labels = list(dict.fromkeys(run_label(name) for runs in models.values() for name in runs))
    numbers = {label: i for i, label in enumerate(labels)}  # a run has one look in every column
    for (top, bottom), (model, runs) in zip(axes.T, models.items()):
        _scatter_losses(top, runs, numbers)
        top.set(
            title=f"{MODELS.get(model, model)}: how much is trained, how well it answers",
            xlabel="numbers trained (logarithmic)",
        )
        _bars_of_forgetting(bottom, runs, numbers)
    return fig


def _scatter_losses(ax: Any, runs: dict[str, LoggedRun], numbers: dict[str, int]) -> None:
    """A point for each run, hollow, since some lie on one another. numbers: which colour and marker a label
    has.
    """
    for name, run in runs.items():
        summary, label = run.summary, run_label(name)
        number = numbers[label] % 8
        look = dict(facecolor="none", edgecolor=COLOURS[number], marker=MARKERS[number], linewidth=2)
        ax.scatter(summary["trainable"], summary["best_val_loss"], s=150, label=label, **look)
    ax.set_xscale("log")
    ax.margins(x=0.12, y=0.15)
    ax.set_ylabel("loss on held-out answers (nats per token)")
    title = f"before training the loss is {loss_before(runs):.2f}"
    ax.legend(frameon=False, fontsize=9, title=title, title_fontsize=9)


def _bars_of_forgetting(ax: Any, runs: dict[str, LoggedRun], numbers: dict[str, int]) -> None:
    """A bar for each run. numbers: which colour a label has."""
    labels = [run_label(name) for name in runs]
    percent = [100 * run.summary.get("forgotten", math.nan) for run in runs.values()]
    ax.barh(labels, percent, color=[COLOURS[numbers[label] % 8] for label in labels])
    for i, value in enumerate(percent):
        if math.isnan(value):  # not measured
            continue
        ax.annotate(
            f"{value:+.1f} %",
            (max(value, 0), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set(title="What it costs on the old text", xlabel="increase of perplexity on held-out Shakespeare (%)")


def write_adapter_card(logs: Path, out: Path, settings: "Settings", folder: Path) -> Path:
    """The fine-tuned model's card, from the logs. folder: where the adapter lies. Returns the card's path."""
    run = read_runs(logs)[settings.run]
    summary, adapter = run.summary, settings.adapter
    layers = ", ".join(adapter.target_modules)
    if adapter.target_modules == ("all-linear",):
        layers = "all linear layers but the output"
    adapter_kind = f"{METHOD_LABELS[settings.method]} of rank {adapter.r} on {layers}"
    size = f"{summary['trainable']:,} numbers, {summary['megabytes']:.2f} MB"
    data = f"{summary['examples']:.0f} questions and answers ({settings.data})"
    usage = f"""from shared.adapters import load_adapter
from shared.adapters.instructions import answer, template_for
from shared.models.gpt import GPT

model = GPT.from_checkpoint("checkpoints/06_gpt2/{settings.preset}/{logs.name}/gpt2/best")
model = load_adapter(model, "{relative(folder)}")
print(answer(model, template_for(model.tokenizer), "How do I keep bread from going stale?"))"""
    return model_card(
        out / "model_card.md",
        f"Week 6's GPT, taught to answer {'as a steward' if settings.data == STEWARD else 'by examples'}",
        facts={
            "What": f"{adapter_kind}: {size}, in PEFT's format",
            "Base": f"week 6's model, preset {settings.preset}, trained on {logs.name}",
            "Data": f"{data}; the figures are measured on others, held out",
            "Meant for": "learning how adapters work; its advice is not to be relied on",
            "Licence": "that of this repository",
        },
        figures=_before_and_after(summary),
        usage=usage,
        sample="\n\n".join(
            f"> {question}\n{after}" for question, _, after in run.artifacts.get("talk", [])[:3]
        ),
    )


def _before_and_after(summary: dict[str, float]) -> list[dict[str, str]]:
    """The rows of the card's table."""
    rows = [
        {
            "": "loss on held-out answers (nats per token)",
            "before": f"{summary['base_loss']:.3f}",
            "after": f"{summary['best_val_loss']:.3f}",
        },
    ]
    if "text_perplexity" in summary:
        rows.append(
            {
                "": "perplexity on the text of the base model",
                "before": f"{summary['text_perplexity_before']:.2f}",
                "after": f"{summary['text_perplexity']:.2f}",
            }
        )
    if "in_form" in summary:
        rows.append(
            {
                "": "answers in the steward's form",
                "before": f"{summary['in_form_before']:.0%}",
                "after": f"{summary['in_form']:.0%}",
            }
        )
    return rows
