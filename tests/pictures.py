"""What a plot shows, read from matplotlib's figure and not from its pixels, which empty axes have too."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOUR_BAR = "<colorbar>"


def drawn_figures(patch: pytest.MonkeyPatch) -> dict[Path, Figure]:
    """The figures that are saved from now on, by file."""
    figures = {}
    save = FigureCanvasAgg.print_png

    def keep(canvas, path, **options):
        figures[Path(path)] = canvas.figure
        save(canvas, path, **options)

    patch.setattr(FigureCanvasAgg, "print_png", keep)
    return figures


@contextmanager
def unrendered() -> Iterator[None]:
    """Inside, plots are made, and their files are empty: turning them into pictures takes the most time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", lambda canvas, path, **options: Path(path).touch())
        yield


def data_of(ax: Axes) -> list[np.ndarray]:
    """The numbers that are drawn: of lines, bars, points and images, those that are finite."""
    drawn = [np.asarray(line.get_xydata(), dtype=float) for line in ax.lines]
    drawn += [np.asarray(points.get_offsets(), dtype=float) for points in ax.collections]
    drawn += [np.asarray(patch.get_extents().size)[None] for patch in ax.patches]
    drawn += [np.asarray(image.get_array(), dtype=float).reshape(-1, 1) for image in ax.images]
    finite = [rows[np.isfinite(rows).all(axis=-1)] for rows in drawn]
    return [rows for rows in finite if rows.size and np.any(rows)]


def is_named(ax: Axes, which: str) -> bool:
    """Whether an axis has a label, or words at its ticks, or shares it with another that has.

    One without ticks measures nothing.
    """
    if not len(getattr(ax, f"get_{which}ticks")()):
        return True
    sharing = getattr(ax, f"get_shared_{which}_axes")().get_siblings(ax)
    for other in sharing:
        axis = getattr(other, f"{which}axis")
        words = "".join(tick.get_text() for tick in axis.get_ticklabels())
        if axis.get_label_text() or any(not c.isdigit() and c not in ".,−-+ " for c in words):
            return True
    return False


def assert_shows_something(figure: Figure, name: str) -> None:
    """Every part of a plot has a title, two axes that say what they are, and data."""
    parts = [ax for ax in figure.axes if ax.get_label() != COLOUR_BAR]
    assert parts, f"{name} has no axes"
    for number, ax in enumerate(parts):
        where = f"{name}, part {number}"
        assert ax.get_title() or figure.get_suptitle(), f"{where}: no title"
        assert is_named(ax, "x") and is_named(ax, "y"), f"{where}: an axis says not what it is"
        assert data_of(ax), f"{where}: nothing is drawn"
