"""Week 0. The pictures that stand in for explorers where scripts do not run."""

import base64
import io
from collections.abc import Sequence
from html import escape

from torch import Tensor

from shared.course.report import char_label, figure
from shared.course.style import style
from shared.extras import needs

with needs("course"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


def heat(values: Tensor, labels: Sequence[str], xlabel: str, ylabel: str) -> Figure:
    """A table [n, n] of numbers from 0 to 1 as shades of blue; each row and column has its label."""
    names = ["".join(map(char_label, label)) for label in labels]
    with style():
        fig, ax = figure(7, 7)
        ax.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        ax.grid(False)
        size = 9 if len(names) <= 40 else 6
        ax.set_xticks(range(len(names)), names, fontsize=size, family="monospace")
        if max(map(len, names)) > 2:
            ax.tick_params(axis="x", rotation=90)
        ax.set_yticks(range(len(names)), names, fontsize=size, family="monospace")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        return fig


def as_image(picture: Figure, words: str) -> str:
    """A picture as HTML, with words below it that also stand in for the picture itself."""
    drawn = io.BytesIO()
    with style():
        picture.set_dpi(90)
        FigureCanvasAgg(picture).print_png(drawn, metadata={"Software": None})
    encoded = base64.b64encode(drawn.getvalue()).decode("ascii")
    alt = escape(words)
    return f'<img src="data:image/png;base64,{encoded}" alt="{alt}">\n<p>{alt}</p>'


def words_in_cells(
    words: Sequence[Sequence[str]], shares: Tensor, across: Sequence[str], down: Sequence[str]
) -> Figure:
    """A word in each cell of a table [down, across], on blue as strong as its share, from 0 to 1."""
    rows, columns = shares.shape
    with style():
        fig, ax = figure(max(4.0, 0.3 * columns + 1.6), 0.3 * rows + 0.9)
        ax.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.grid(False)
        for i in range(rows):
            for j in range(columns):
                label = "".join(map(char_label, words[i][j]))
                light = bool(shares[i, j] > 0.6)
                colour = "white" if light else "black"
                ax.text(j, i, label, ha="center", va="center", color=colour, fontsize=9, family="monospace")
        names = ["".join(map(char_label, label)) for label in across]
        ax.set_xticks(range(columns), names, fontsize=9, family="monospace")
        if max(map(len, names)) > 2:
            ax.tick_params(axis="x", rotation=90)
        ax.set_yticks(range(rows), list(down), fontsize=9)
        return fig


def shares_by_rank(shares: Tensor, tokens: Sequence[str]) -> Figure:
    """Probabilities as bars, each with its token below."""
    with style():
        fig, ax = figure(8, 3)
        ax.bar(range(len(tokens)), shares.numpy())
        names = ["".join(map(char_label, token)) for token in tokens]
        ax.set_xticks(range(len(tokens)), names, family="monospace")
        if max(map(len, names)) > 2:
            ax.tick_params(axis="x", rotation=90)
        ax.set(xlabel="next token", ylabel="probability")
        return fig


def labelled_points(points: Tensor, labels: Sequence[str]) -> Figure:
    """Points [count, 2], each as its label."""
    with style():
        fig, ax = figure(6, 4.5)
        for (x, y), label in zip(points.tolist(), labels, strict=True):
            ax.text(x, y, "".join(map(char_label, label)), ha="center", va="center", family="monospace")
        ax.update_datalim(points.numpy())
        ax.margins(0.08)
        ax.set(xlabel="first principal component", ylabel="second principal component")
        return fig
