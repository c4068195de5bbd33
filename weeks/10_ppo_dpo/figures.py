"""Week 10's plots and the aligned model's card, made from logs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from names import METHODS, NAMES
from shared.course.report import (
    COLOURS,
    LINES,
    MARKERS,
    LoggedRun,
    figure,
    read_runs,
    reference_for,
    save_figure,
)
from shared.course.runs import output_root
from shared.course.style import style
from shared.models.card import model_card
from shared.models.names import model_label
from solving_figures import draw_solving

if TYPE_CHECKING:
    from run import Settings

LOOK = {m: dict(color=COLOURS[i], linestyle=LINES[i], marker=MARKERS[i]) for i, m in enumerate(METHODS)}
PANELS = {
    "reward": ("The rule's reward", "exclamations in an answer"),
    "learned": ("The reward model's reward", "reward (standard deviations)"),
    "kl": ("Distance from week 6's model", "KL (nats in an answer)"),
    "known_words": ("Words that occur in the text", "share of words"),
}
"""What is measured on held-out prompts: a panel's title and the unit of its y axis."""
DIAGNOSTICS = (
    ("approx_kl", "Distance from the policy that drew", "approx_kl (nats per token)", ("ppo", "grpo")),
    ("clipfrac", "Tokens that the clip stops", "clip fraction", ("ppo", "grpo")),
    ("entropy", "Entropy of the next token", "nats", ("ppo", "grpo")),
    ("explained_variance", "What the value model knows of the returns", "explained variance", ("ppo",)),
    ("accuracy", "Pairs in the right order, batch by batch", "accuracy", ("dpo",)),
)
"""What is logged at each step: its name, a panel's title, the unit, and the methods that have it."""


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    plots = []
    with style():
        if {"base", *METHODS} <= runs.keys():
            plots.append(draw_rewards(runs, reference_for(logs), out))
            plots.append(draw_diagnostics(runs, out))
            plots.append(draw_frontier(runs, out))
        if {"hacking-held", "hacking-free"} <= runs.keys():
            plots.append(draw_hacking(runs, out))
        plots += [draw_lengths(run, out) for run in runs.values() if "after_length" in run.summary]
        plots += draw_solving(logs, runs, out)
    return plots


def draw_rewards(runs: dict[str, LoggedRun], course: dict[str, LoggedRun], out: Path) -> Path:
    """Both rewards and KL on held-out prompts, against the share of the budget.

    course: the course's own runs, drawn pale below.
    """
    fig, axes = figure(14, 4.6, ncols=3)
    for ax, key in zip(axes, ("reward", "learned", "kl")):
        for method in METHODS:
            if method in course:
                pale = LOOK[method] | dict(alpha=0.4, linewidth=3, label=f"course: {NAMES[method]}")
                held_out_curve(ax, course[method], course.get("base"), key, share=True, **pale)
            look = LOOK[method] | dict(label=NAMES[method])
            held_out_curve(ax, runs[method], runs["base"], key, share=True, **look)
        title, unit = PANELS[key]
        ax.set(title=title, ylabel=unit, xlabel="answers learned from (% of the budget)")
    axes[0].legend(frameon=False)
    fig.suptitle("Three methods, the same prompts and the same budget: held-out prompts")
    return save_figure(fig, out / "curves.png")


def held_out_curve(
    ax: Any, run: LoggedRun, base: LoggedRun | None, key: str, share: bool = False, **look: Any
) -> None:
    """Measurements on held-out prompts by step, from the untouched model on.

    share: by percent of the run instead. look: as in matplotlib's `plot`.
    """
    xs, ys = run.series(f"held_out_{key}")
    if share:
        xs = [100 * x / xs[-1] for x in xs]
    if base:
        xs, ys = [0, *xs], [base.summary[key], *ys]
    ax.plot(xs, ys, **(dict(linewidth=1.8, markersize=6) | look))


def draw_diagnostics(runs: dict[str, LoggedRun], out: Path) -> Path:
    """What one watches while it trains."""
    fig, axes = figure(14, 8, nrows=2, ncols=3)
    for ax, (key, title, unit, methods) in zip(axes.flat, DIAGNOSTICS):
        for method in methods:
            look = LOOK[method] | dict(marker=None, linewidth=1.8, label=NAMES[method])
            ax.plot(*runs[method].series(key), **look)
        ax.set(title=title, ylabel=unit, xlabel="step")
        ax.legend(frameon=False)
    ax = axes[1, 2]
    for key, colour, line in (("chosen", COLOURS[3], LINES[0]), ("rejected", COLOURS[5], LINES[1])):
        xs, ys = runs["dpo"].series(f"{key}_reward")
        ax.plot(xs, ys, color=colour, linestyle=line, linewidth=1.8, label=f"{key} answers")
    ax.set(title="DPO's own reward", ylabel="beta · log(policy / reference)", xlabel="step")
    ax.legend(frameon=False)
    return save_figure(fig, out / "diagnostics.png")


def draw_frontier(runs: dict[str, LoggedRun], out: Path) -> Path:
    """Reward against KL, a point for each beta."""
    fig, axes = figure(13, 5.4, ncols=2)
    for ax, key in zip(axes, ("reward", "learned")):
        for method in METHODS:
            own = [run.summary for name, run in runs.items() if name.partition("-")[0] == method]
            _plot_betas(ax, method, key, sorted(own, key=lambda summary: summary["kl"]))
        untouched = runs["base"].summary[key]
        ax.plot(0, untouched, marker="*", markersize=14, color="black", linestyle="none", label=NAMES["base"])
        title, unit = PANELS[key]
        ax.set(title=title, ylabel=unit, xlabel=PANELS["kl"][1])
        ax.margins(y=0.1)
    axes[0].legend(frameon=False, loc="lower right")
    fig.suptitle("What a nat buys: held-out prompts, the numbers are betas, bars one standard error")
    return save_figure(fig, out / "frontier.png")


def _plot_betas(ax: Any, method: str, key: str, points: Sequence[dict[str, float]]) -> None:
    """A method's line through its betas. points: the runs' summaries, by KL."""
    xs, ys = [point["kl"] for point in points], [point[key] for point in points]
    ax.errorbar(
        xs,
        ys,
        xerr=[point["kl_error"] for point in points],
        yerr=[point[f"{key}_error"] for point in points],
        capsize=2,
        **LOOK[method],
        markersize=7,
        linewidth=1.6,
        label=NAMES[method],
    )
    height = 7 if method == "ppo" else -13  # PPO's numbers above its line, the others' below
    for x, y, point in zip(xs, ys, points):
        ax.annotate(
            f"{point['beta']:g}",
            (x, y),
            xytext=(6, height),
            textcoords="offset points",
            fontsize=9,
            color=LOOK[method]["color"],
            bbox=dict(facecolor="white", edgecolor="none", alpha=0.7, pad=0.5),
        )


def draw_hacking(runs: dict[str, LoggedRun], out: Path) -> Path:
    """With the KL term and without."""
    fig, axes = figure(13, 8, nrows=2, ncols=2)
    looks = {
        "hacking-held": dict(
            color=COLOURS[0], linestyle=LINES[0], marker=MARKERS[0], label="with the KL term"
        ),
        "hacking-free": dict(color=COLOURS[5], linestyle=LINES[1], marker=MARKERS[1], label="without"),
    }
    for ax, key in zip(axes.flat, ("learned", "reward", "kl", "known_words")):
        for name, look in looks.items():
            held_out_curve(ax, runs[name], runs.get("base"), key, **look)
        title, unit = PANELS[key]
        ax.set(title=title, ylabel=unit, xlabel="step")
    axes[0, 0].legend(frameon=False)
    fig.suptitle("Reward hacking: the reward model is content, the rule is not")
    return save_figure(fig, out / "hacking.png")


def draw_lengths(run: LoggedRun, out: Path) -> Path:
    """How long a model's answers to held-out questions are, and how many of them did not come to an end."""
    fig, ax = figure()
    lengths, longest = run.artifacts["lengths"], run.artifacts["longest"]
    labels = []
    for name, values in lengths.items():
        cut = sum(length >= longest for length in values)
        labels.append(f"{name}: {cut} of {len(values)} cut off at {longest} tokens")
    ax.hist(list(lengths.values()), np.linspace(0, longest, 17), color=COLOURS[:2], label=labels)
    ax.set(
        title=f"The answers of {model_label(run.name)}, before and after DPO",
        xlabel=f"tokens in an answer (the last bar: {longest}, where answers are cut off)",
        ylabel="held-out questions",
    )
    ax.legend(frameon=False)
    return save_figure(fig, out / f"{run.name}.png")


def write_aligned_card(logs: Path, out: Path, settings: "Settings", folder: Path) -> Path:
    """The kept model's card, from the logs. folder: where the model lies. Returns the card's path."""
    runs, name = read_runs(logs), NAMES[settings.keep]
    run, reward = runs[settings.keep], runs["reward"].summary
    config = settings.config_of(settings.keep)
    where = folder.relative_to(output_root()).as_posix()
    judged = f"{reward['held_out_accuracy']:.1%} of {reward['held_out_pairs']} held-out pairs"
    answers = f"one answer of {settings.answer_tokens} tokens to each"
    prompt, answer = run.artifacts["samples"][0]
    return model_card(
        out / "model_card.md",
        f"Week 6's GPT, aligned by {name}",
        facts={
            "What": (
                "a small GPT that writes like its training text, exclaims more and knows nothing else. For"
                " learning only"
            ),
            "From": f"the checkpoint of week 6, preset {settings.preset}, trained on {logs.name}",
            "Rewarded": (
                f"phrases of at least {settings.min_words} words that end in '{settings.mark}', as a reward"
                f" model learned it from {reward['pairs']} pairs of the model's own answers"
                f" (right on {judged})"
            ),
            "How": (
                f"{name}, {config.steps} steps at beta {run.summary['beta']:g}, KL to week 6's model in the"
                " objective"
            ),
            "Measured on": f"{settings.held_out} held-out prompts, {answers}, temperature 1",
            "Limits": (
                "the reward model can be fooled by marks without words; further from week 6's model, reward"
                " and meaning come apart"
            ),
            "Licence": "that of this repository",
        },
        figures=_card_rows(runs["base"].summary, run.summary, name),
        usage=(
            "from shared.models.gpt import GPT\n"
            f'model = GPT.from_checkpoint("{where}")\n'
            'print(model.generate("ROMEO:"))'
        ),
        sample=prompt + answer,
    )


def _card_rows(before: dict[str, float], after: dict[str, float], name: str) -> list[dict[str, str]]:
    """The rows of the card's table. name: what heads the aligned model's column."""

    def with_error(summary: dict[str, float], key: str) -> str:
        return f"{summary[key]:.2f} ± {summary[f'{key}_error']:.2f}"

    labels = {
        "reward": "exclamations in an answer",
        "learned": "the reward model's reward",
        "kl": "KL to week 6's model (nats in an answer)",
    }
    rows = [
        {"": label, "week 6": with_error(before, key), name: with_error(after, key)}
        for key, label in labels.items()
    ]
    known_before, known_after = f"{before['known_words']:.1%}", f"{after['known_words']:.1%}"
    rows.append({"": "words that occur in the training text", "week 6": known_before, name: known_after})
    return rows
