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
