"""Week 0. The look of the course's plots, in matplotlib's parameters."""

from contextlib import AbstractContextManager
from typing import Any

from shared.extras import needs

with needs("course"):
    import matplotlib

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 110,
}


def style() -> AbstractContextManager[None]:
    """A context in which plots have the course's look; matplotlib's parameters are as before when it ends.

    Matplotlib reads its parameters when a text, a tick or a legend is made, and again when a figure is drawn:
    all of a plot belongs inside.
    """
    return matplotlib.rc_context(STYLE)


def use_style() -> None:
    """Gives every plot of this process the course's look, for a notebook."""
    matplotlib.rcParams.update(STYLE)
