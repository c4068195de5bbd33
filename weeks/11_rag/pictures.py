"""Week 11's plots of what the notebook has at hand. Each function takes data and returns a figure; one
returns an answer as it is shown to people.
"""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shared.course.report import COLOURS, LINES, MARKERS, figure, heatmap
from shared.retrieval.rag import Reply
from shared.retrieval.ranking import Interval


def cited_answer(question: str, answer: str, title: str, text: str, sentence: str) -> HTML:
    """A question, its answer and where it is from: the passage, the sentence in it marked."""
    before, _, after = text.partition(sentence)
    marked = f"{escape(before)}<mark>{escape(sentence)}</mark>{escape(after)}"
    return HTML(
        f"<p><b>{escape(question)}</b></p><p>{escape(answer)}</p>"
        f"<blockquote><p><small>{escape(title)}</small><br>{marked}</p></blockquote>"
    )


def cited_reply(reply: Reply) -> HTML:
    """The same for a reply of the course's RAG, with the first sentence that it rests on."""
    source = reply.evidence[0]
    sentence = source.quotes[0]
    return cited_answer(reply.question, reply.text, source.chunk.cite, source.chunk.text, sentence)


def bm25_parts_figure(repeated: Mapping[str, Sequence[float]], rare: Mapping[int, float], n: int) -> Figure:
    """BM25's score by how often a text has the word, from 0 up, a line for each length of text; and by how
    many of n texts have it.
    """
    fig, (left, right) = figure(11, 3.8, ncols=2)
    for i, (name, scores) in enumerate(repeated.items()):
        style = {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i]}
        left.plot(range(len(scores)), scores, markersize=4, label=name, **style)
    left.set(title="More of a word counts less and less", xlabel="how often the text has it", ylabel="score")
    left.legend(frameon=False)
    right.plot(list(rare), list(rare.values()), color=COLOURS[0], linewidth=2)
    right.set(title="A word in few texts counts more", xlabel=f"texts that have it (of {n})", ylabel="score")
    return fig


def near_texts_figure(near: np.ndarray, texts: Sequence[str], asked: Sequence[str]) -> Figure:
    """The cosine of each text with each question, [texts, questions]."""
    fig, ax = figure(10, 3.2)
    heatmap(
        ax,
        near,
        "What is near what",
        list(asked),
        list(texts),
        xlabel="question",
        ylabel="text",
        unit="cosine",
    )
    for (row, column), cosine in np.ndenumerate(near):
        colour = "black" if cosine > near.max() / 2 else "white"
        ax.text(column, row, f"{cosine:.2f}", ha="center", va="center", color=colour)
    return fig


def found_first_figure(
    shares: Mapping[str, Mapping[str, Interval]], gains: Mapping[str, Interval], over: str
) -> Figure:
    """Left: for each measure the share of the questions, a bar for each search. Right: what each search has
    over one of them on the same questions. All with 95 % intervals.
    """
    fig, (left, right) = figure(12, 4.4, ncols=2, width_ratios=(3, 2))
    width = 0.84 / len(shares)
    for i, (name, measured) in enumerate(shares.items()):
        places = np.arange(len(measured)) + (i - (len(shares) - 1) / 2) * width
        means = [interval.mean for interval in measured.values()]
        left.bar(places, means, width, yerr=_bars(measured.values()), color=COLOURS[i], label=name, capsize=2)
        for x, mean in zip(places, means):
            left.annotate(f"{mean:.2f}", (x, 0.02), ha="center", color="white", fontsize=9)
        measures = list(measured)
    left.set_xticks(range(len(measures)), measures)
    left.set(title="Where is the right section?", ylabel="share of the questions, or mean", ylim=(0, 1.05))
    left.set_xlabel("measure")
    left.grid(False, axis="x")
    gains_on(right, gains, f"hit@1, less that of {over}")
    right.set_title("On the same questions")
    fig.legend(*left.get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
    return fig


def gains_on(ax: Axes, gains: Mapping[str, Interval], label: str) -> None:
    """A point with its interval for each difference, beside a line at 0."""
    means = [interval.mean for interval in gains.values()]
    ax.errorbar(means, range(len(gains)), xerr=_bars(gains.values()), fmt="o", color=COLOURS[0], capsize=4)
    ax.axvline(0, color="#555555", linestyle="--")
    ax.set_yticks(range(len(gains)), list(gains))
    ax.set_ylim(len(gains) - 0.5, -0.5)
    ax.set_xlabel(f"{label} (95 % intervals)")
    ax.grid(False, axis="y")


def _bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """How far the intervals reach down and up."""
    pairs = [(interval.mean - interval.low, interval.high - interval.mean) for interval in intervals]
    return [list(side) for side in zip(*pairs)]


def searched_cells_figure(
    points: np.ndarray, cell: np.ndarray, centres: np.ndarray, asked: np.ndarray
) -> Figure:
    """Which points are looked at, of those in so many of the nearest cells, with the cells' borders. points,
    centres: [n, 2]; cell: the number of each point's.
    """
    near = np.linalg.norm(centres - asked, axis=1).argsort()
    best = np.linalg.norm(points - asked, axis=1).argsort()[:10]
    low, high = points.min(0) - 0.3, points.max(0) + 0.3
    plane = np.stack(np.meshgrid(*np.linspace(low, high, 300).T), -1)
    owner = np.linalg.norm(plane[..., None, :] - centres, axis=-1).argmin(-1)
    fig, axes = figure(11, 4, ncols=2, sharey=True)
    for ax, probes in zip(axes, (1, 3)):
        looked = np.isin(cell, near[:probes])
        for number in range(len(centres)):  # where another centre is nearer, a cell ends
            ax.contour(*np.moveaxis(plane, -1, 0), owner == number, [0.5], colors="#aaaaaa", linewidths=0.8)
        ax.scatter(*points[~looked].T, s=14, color=COLOURS[7], label="not looked at")
        ax.scatter(*points[looked].T, s=14, color=COLOURS[0], label="looked at")
        ax.scatter(*points[best].T, s=60, facecolor="none", edgecolor=COLOURS[5], label="the ten nearest")
        ax.scatter(*centres.T, s=90, marker="x", color="black", label="centres of cells")
        ax.scatter(*asked, s=160, marker="*", color=COLOURS[1], edgecolor="black", label="the question")
        recall = looked[best].mean()
        ax.set(title=f"{probes} of {len(centres)} cells searched: recall@10 {recall:.1f}")
        ax.set(xlabel="first coordinate", ylabel="second coordinate")
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    return fig


def quoted_or_written_figure(rows: Sequence[Mapping[str, float]], gains: Mapping[str, Interval]) -> Figure:
    """Left: exact match and whether the right answer is contained, a bar for each way to answer. Right:
    paired differences. rows: the runs' summaries.
    """
    fig, (left, right) = figure(12, 4.6, ncols=2, width_ratios=(3, 2))
    width = 0.84 / len(rows)
    for i, row in enumerate(rows):
        places = np.arange(2) + (i - (len(rows) - 1) / 2) * width
        measured = [Interval(row[m], row[f"{m}_low"], row[f"{m}_high"]) for m in ("exact", "holds")]
        means = [interval.mean for interval in measured]
        left.bar(places, means, width, yerr=_bars(measured), color=COLOURS[i], label=row["name"], capsize=2)
        for x, mean in zip(places, means):
            colour = "white" if mean > 0.1 else "black"  # a bar too low for its number
            left.annotate(f"{mean:.2f}", (x, 0.01), ha="center", color=colour, fontsize=9)
    left.set_xticks(range(2), ["exactly the right one", "the right one is in it"])
    left.set_xlabel("measure")
    left.set(
        title=f"{rows[0]['questions']} questions of half B", ylabel="share of the answers", ylim=(0, 1.05)
    )
    left.grid(False, axis="x")
    gains_on(right, gains, "share of the answers")
    right.set_title("A span that is quoted, less what is written")
    fig.legend(*left.get_legend_handles_labels(), frameon=False, ncols=2, loc="outside lower center")
    return fig
