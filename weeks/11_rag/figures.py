"""Week 11's plots, made from logs."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from names import CONDITIONS, DEPTHS, EFFORTS, MEASURES, QUOTED, RETRIEVERS, REWRITES, WINDOWS
from shared.course.report import COLOURS, LoggedRun, figure, read_runs, save_figure
from shared.course.style import style
from shared.retrieval.ranking import RANKING_METRICS

DOCUMENTS = {"handbook": "the handbook", "python": "Python's reference"}
OWN = ("rule", "untrained", "examples", "examples-written", "copied", "copied-written", "smollm2")
MEASURE_LABELS = {
    "exact": "exact match",
    "f1": "token F1",
    "holds": "the right one is in it",
    "mrr": "MRR",
    "ndcg@10": "nDCG@10",
}
SIGNALS = {
    "score": "the passage's score (cosine)",
    "gain": "the answer's gain (nats per token;\n-1 or less: none was given)",
}
STORE_LABELS = {"flat": "Flat", "pq": "PQ", "ivf": "IVF, cells searched", "hnsw": "HNSW, candidates kept"}


def draw(logs: Path, out: Path) -> list[Path]:
    """The week's plots, from its logs."""
    runs = {name: run for name, run in read_runs(logs).items() if run.summary}
    plots = []
    with style():
        for data in DOCUMENTS:
            plots += draw_documents(data, runs, out)
        if "handbook-example" in runs:
            fig = example_figure(runs["handbook-example"].artifacts)
            plots.append(save_figure(fig, out / "handbook_example.png"))
        stores = [run.summary for name, run in runs.items() if name.startswith("index-")]
        if stores:
            plots.append(save_figure(index_figure(stores), out / "index.png"))
    return plots


def draw_documents(data: str, runs: dict[str, LoggedRun], out: Path) -> list[Path]:
    """What was measured on some documents: finding, windows, answers, the own model, abstention."""
    title = DOCUMENTS[data]
    every = "all-" if f"{data}-all-answer-right" in runs else ""  # all questions, rather than some
    window_names = [name.replace(" ", "-") for name in WINDOWS]
    groups = (
        ("finding", "find", RETRIEVERS, RANKING_METRICS, "Finding the right section in"),
        ("windows", "windows", window_names, RANKING_METRICS, "What is embedded by itself:"),
        ("answers", f"{every}answer", CONDITIONS, tuple(MEASURES), "SmolLM2's answers from"),
        ("own", "own", OWN, tuple(MEASURES), "Answers from one sentence of"),
    )
    plots = []
    for plot, prefix, names, measures, what in groups:
        keys = [f"{data}-{prefix}-{name}" for name in names]
        rows = [runs[key].summary for key in keys if key in runs]
        if rows:
            plots.append(draw_grouped_bars(out / f"{data}_{plot}.png", rows, measures, f"{what} {title}"))
    if f"{data}-quotes-B-span" in runs:
        rows = [runs[key].summary for key in (f"{data}-quotes-B-{name}" for name in QUOTED) if key in runs]
        title = f"Quoted answers from {title}, half B"
        plots.append(draw_grouped_bars(out / f"{data}_quotes.png", rows, ("exact", "f1", "holds"), title))
    domain = runs.get(f"{data}-domain-score")
    if domain:
        plots.append(save_figure(domain_figure(domain), out / f"{data}_domain.png"))
    if f"{data}-followups-rule" in runs:
        names = [f"{data}-followups-{name}" for name in REWRITES]
        names += sorted(name for name in runs if name.endswith(f"-{data}-followups-model"))  # other models'
        rows = [runs[name].summary for name in names if name in runs]
        plots.append(save_figure(followups_figure(rows), out / f"{data}_followups.png"))
    if f"{data}-k-written-{DEPTHS[-1]}" in runs:
        plots.append(save_figure(depths_figure(data, runs), out / f"{data}_depths.png"))
    abstain = runs.get(f"{data}-{every}abstain")
    if abstain:
        plots.append(save_figure(abstention_figure(abstain), out / f"{data}_abstention.png"))
    return plots


def draw_grouped_bars(path: Path, rows: Sequence[dict], measures: Sequence[str], title: str) -> Path:
    """A group of bars for each measure, a bar for each row, with their intervals."""
    fig, ax = figure(10, 5.2)
    width = 0.84 / len(rows)
    for i, (row, colour) in enumerate(zip(rows, COLOURS)):
        means, lows, highs = np.array(
            [[row[key], row[f"{key}_low"], row[f"{key}_high"]] for key in measures]
        ).T
        places = np.arange(len(measures)) + (i - (len(rows) - 1) / 2) * width
        ax.bar(
            places,
            means,
            width,
            yerr=[means - lows, highs - means],
            color=colour,
            edgecolor="white",
            label=row["name"],
            capsize=2,
            ecolor="#444444",
        )
        for x, mean, high in zip(places, means, highs):
            ax.annotate(
                f"{mean:.2f}",
                (x, high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8 if len(rows) < 5 else 7,
            )
    asked = f"{rows[0]['questions']} questions, " if "questions" in rows[0] else ""
    ax.set(
        title=f"{title} ({asked}95 % intervals)",
        xticks=range(len(measures)),
        xticklabels=[MEASURE_LABELS.get(key, key) for key in measures],
    )
    highest = max(row[f"{key}_high"] for row in rows for key in measures)
    ax.set_ylim(0, min(1.08, 1.12 * highest) if highest else 1.08)
    ax.set(ylabel="share of questions, or mean", xlabel="measure")
    ax.grid(False, axis="x")
    columns = len(rows) if len(rows) < 5 else 3
    if max(len(row["name"]) for row in rows) > 30:
        columns = 2
    fig.legend(*ax.get_legend_handles_labels(), frameon=False, ncols=columns, loc="outside lower center")
    return save_figure(fig, path)


def abstention_figure(run: LoggedRun) -> Any:
    """How two signals lie where there is an answer and where there is none."""
    fig, axes = figure(11, 4.4, ncols=2)
    for ax, (key, label) in zip(axes, SIGNALS.items()):
        groups = {
            "there is an answer": [max(value, -1) for value in run.artifacts[key]["answerable"]],
            "there is none": [max(value, -1) for value in run.artifacts[key]["unanswerable"]],
        }
        _dots(ax, groups, run.summary[f"{key}_threshold"], "threshold: less is withheld")
        ax.set(title=f"AUC {run.summary[f'{key}_auc']:.2f} (0.5 is chance)", xlabel=label)
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    fig.suptitle("Do two signals tell questions with an answer from those without?")
    return fig


def domain_figure(run: LoggedRun) -> Any:
    """The nearest passage's score on half B: questions on the documents, and about the world."""
    fig, ax = figure(8.5, 3.6)
    groups = {"the documents answer it": run.artifacts["inside"], "about the world": run.artifacts["outside"]}
    threshold = run.summary["threshold"]
    _dots(ax, groups, threshold, f"threshold {threshold:.3f}: less is refused")
    title = f"Which questions are near a passage? Half B (AUC {run.summary['auc']:.2f}, 0.5 is chance)"
    ax.set(title=title, xlabel="the nearest passage's score (cosine)")
    fig.legend(*ax.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    return fig


def _dots(ax: Any, groups: dict[str, Sequence[float]], threshold: float, cut: str) -> None:
    """A row of dots for each group, one for each question; dots of nearly the same value are piled up."""
    every = [value for values in groups.values() for value in values]
    width = (max(every) - min(every)) / 60
    highest = 0.0
    for i, (name, values) in enumerate(groups.items()):
        heights: dict[int, int] = {}
        places = []
        for value in sorted(values):
            column = round(value / width)
            heights[column] = heights.get(column, 0) + 1
            places.append((value, highest + heights[column]))
        look = {"s": 22, "color": COLOURS[i], "marker": "os"[i], "linewidths": 0}
        ax.scatter(*zip(*places), label=f"{name} ({len(values)})", **look)
        highest += max(heights.values()) + 3
    ax.axvline(threshold, color="#555555", linestyle="--", label=cut)
    ax.set(yticks=[], ylim=(0, highest), ylabel="a dot: a question")
    ax.grid(False, axis="y")


def followups_figure(rows: Sequence[dict]) -> Any:
    """How often the first passage is the right one, by what is searched; on both halves."""
    fig, ax = figure(9, 4.2)
    places = np.arange(len(rows))
    for shift, half, colour in ((-0.2, "A", COLOURS[4]), (0.2, "B", COLOURS[0])):
        means, lows, highs = np.array(
            [[row[f"hit@1_{half}{bound}"] for bound in ("", "_low", "_high")] for row in rows]
        ).T
        errors = [means - lows, highs - means]
        name = f"half {half}"
        ax.bar(
            places + shift, means, 0.38, yerr=errors, color=colour, label=name, capsize=2, ecolor="#444444"
        )
        for x, mean in zip(places + shift, means):
            ax.annotate(f"{mean:.2f}", (x, 0.02), ha="center", color="white", fontsize=9)
    ax.set_xticks(places, [textwrap.fill(row["name"], 18) for row in rows])
    ax.set(
        title=f"{rows[0]['pairs']} follow-up questions, all seen while the rule was made (95 % intervals)",
        xlabel="what is searched",
    )
    ax.set(ylabel="share with the right passage first", ylim=(0, 1.08))
    ax.grid(False, axis="x")
    fig.legend(*ax.get_legend_handles_labels(), frameon=False, ncols=2, loc="outside lower center")
    return fig


def depths_figure(data: str, runs: dict[str, LoggedRun]) -> Any:
    """What is found and what is answered, by how many passages or sentences are looked at."""
    fig, axes = figure(10.5, 4.6, ncols=2)
    panels = (
        (
            "found",
            (("found", "passage", "the right passage"), ("found", "sentence", "a sentence with the answer")),
        ),
        (
            "answered",
            (
                ("quoted", "exact", "quoted from the best sentence: exact"),
                ("written", "exact", "written from k passages: exact"),
                ("written", "holds", "written from k passages: in it"),
            ),
        ),
    )
    for ax, (panel, lines), colours in zip(axes, panels, (COLOURS[:2], COLOURS[2:])):
        for shift, (what, key, label), colour in zip((-0.06, 0.06, 0), lines, colours):
            rows = [runs[f"{data}-k-{what}-{k}"].summary for k in DEPTHS]
            means, lows, highs = np.array(
                [[row[f"{key}{bound}"] for bound in ("", "_low", "_high")] for row in rows]
            ).T
            places = np.arange(len(DEPTHS)) + shift
            ax.errorbar(places, means, [means - lows, highs - means], color=colour, marker="o", label=label)
        ax.set(title=f"{rows[0]['questions']} questions: {panel}", ylabel="share of the questions")
        ax.set(xlabel="k: passages or sentences", ylim=(0, 1.02))
        ax.set_xticks(range(len(DEPTHS)), [str(k) for k in DEPTHS])
        ax.legend(loc="lower right" if panel == "found" else "upper right")
    fig.suptitle(f"How many to look at: {DOCUMENTS[data]} (95 % intervals)")
    return fig


def example_figure(seen: dict[str, Any]) -> Any:
    """A question on its way: the sections that are near, the sentences of the nearest, the answer.

    seen: as the run's artifacts have it.
    """
    sections = [textwrap.fill(cite, 30) for cite, _ in seen["hits"]]
    sentences = [textwrap.fill(text, 62) for text, _ in seen["sentences"]]
    height = 2.8 + 0.26 * sum(text.count("\n") + 1.6 for text in sentences)
    fig, (left, right) = figure(15, height, ncols=2, width_ratios=(1, 1))
    _bars_of_scores(left, sections, [score for _, score in seen["hits"]], "1. The nearest sections")
    nearness = [score for _, score in seen["sentences"]]
    _bars_of_scores(right, sentences, nearness, "2. The nearest one's sentences")
    fig.suptitle(seen["question"], fontsize=14, fontweight="bold")
    fig.supxlabel(f"3. SmolLM2 answers: {seen['answer']}   [{'; '.join(seen['sources'])}]", fontsize=13)
    return fig


def _bars_of_scores(ax: Any, names: Sequence[str], scores: Sequence[float], title: str) -> None:
    """A horizontal bar for each name, the highest in another colour."""
    best = int(np.argmax(scores))
    colours = [COLOURS[0] if i == best else COLOURS[4] for i in range(len(names))]
    ax.barh(range(len(names)), scores, color=colours)
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    for i, score in enumerate(scores):
        place = (max(score, 0), i)
        ax.annotate(f"{score:.2f}", place, xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    ax.margins(x=0.14)
    ax.grid(False, axis="y")
    ax.set(title=title, xlabel="cosine with the question")


def index_figure(stores: Sequence[dict]) -> Any:
    """Recall against time, and what a vector takes. stores: the runs' summaries."""
    fig, (ax, size) = figure(12, 4.8, ncols=2, width_ratios=(2, 1))
    kinds: dict[str, list[dict]] = {kind: [] for kind in EFFORTS}
    for store in sorted(stores, key=lambda store: store["milliseconds"]):
        kinds[store["name"].split("-")[0]].append(store)
    for colour, marker, (kind, rows) in zip(COLOURS, "osD^", kinds.items()):
        times, recalls = [row["milliseconds"] for row in rows], [row["recall"] for row in rows]
        ax.plot(times, recalls, marker=marker, color=colour, label=STORE_LABELS[kind])
        for row in rows if len(rows) > 1 else []:
            effort = row["name"].partition("-")[2]
            place = (row["milliseconds"], row["recall"])
            ax.annotate(effort, place, xytext=(6, -13), textcoords="offset points", fontsize=9)
    ax.set(
        xscale="log",
        xlabel="milliseconds for a question, one at a time",
        ylabel="recall@10 (Flat is the truth)",
    )
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.margins(y=0.1)
    ax.set_title(f"{stores[0]['vectors']:,} vectors of 384 numbers")
    ax.legend(frameon=False, loc="lower right")
    measured = {kind: rows[0]["bytes"] for kind, rows in kinds.items() if rows}
    size.bar([STORE_LABELS[kind].split(",")[0] for kind in measured], measured.values(), color=COLOURS)
    for i, value in enumerate(measured.values()):
        size.annotate(f"{value:,.0f}", (i, value), xytext=(0, 3), textcoords="offset points", ha="center")
    size.set(title="What a vector takes", ylabel="bytes, ids included", xlabel="store")
    return fig
