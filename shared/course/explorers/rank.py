"""Week 0. For week 9: a change of a weight, piece by piece: what a rank catches of it, and what it costs."""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shared.course.explorers.page import Explorer
from shared.course.explorers.pictures import as_image
from shared.course.report import figure
from shared.course.style import style
from shared.extras import needs

with needs("course"):
    from matplotlib.figure import Figure

SHORTEST = 1e-5
"""Pieces below this part of the first are rounding: a product of thin matrices has none of them."""


def rank_explorer(
    changes: Mapping[str, Tensor],
    losses: Mapping[int, float] | None = None,
    *,
    title: str = "A change, and what a rank catches of it",
) -> Explorer:
    """Changes of a weight to take apart: choose a rank, see the matrix at that rank and what is missing.

    changes: by name, [out, in] each, of one shape. The pieces are those of the singular value decomposition,
    kept in float16; what the page says of shares is computed from singular values in full precision.
    losses: by rank, the loss with the first change, and all others of its training, cut to that rank.
    Raises ValueError for changes that are no such matrices or all zeros, for ranks below 0, and where the
    explorer becomes too large: two full matrices of 128 x 128 fit.
    """
    shapes = {name: list(change.shape) for name, change in changes.items()}
    if not shapes or any(
        len(shape) != 2 or shape != next(iter(shapes.values())) for shape in shapes.values()
    ):
        raise ValueError(f"changes of shapes {shapes}: give at least one matrix [out, in], all of one shape")
    for name, change in changes.items():
        if not torch.isfinite(change).all() or not change.any():
            raise ValueError(f"the change {name!r} is all zeros, or has numbers that are not finite")
    measured = sorted((losses or {}).items())
    if any(rank < 0 for rank, _ in measured):
        raise ValueError(f"losses at the ranks {[rank for rank, _ in measured]}: a rank is 0 or more")
    out, width = next(iter(shapes.values()))
    data = {
        "out": out,
        "in": width,
        "changes": [{"name": name, **_pieces(change)} for name, change in changes.items()],
        "losses": [[rank, loss] for rank, loss in measured],
    }
    words = f"How much of a change of {out} x {width} numbers its first pieces hold, the strongest first."
    return Explorer(title, ("formats.js", "rank.js"), data, as_image(_shares(changes), words))


def _svd(change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [out, k], [k], [k, in] with the k pieces that are there."""
    u, s, v = torch.linalg.svd(change.detach().cpu().double(), full_matrices=False)
    k = int((s > SHORTEST * s[0]).sum())
    return u[:, :k], s[:k], v[:k]


def _pieces(change: Tensor) -> dict[str, Any]:
    """A change as the page reads it."""
    u, s, v = _svd(change)
    return {
        "values": [float(f"{value:.9g}") for value in s.tolist()],
        "left": _halves(u.T),
        "right": _halves(v),
    }


def _halves(numbers: Tensor) -> str:
    """float16, the lowest byte first."""
    return base64.b64encode(numbers.contiguous().half().numpy().astype("<f2").tobytes()).decode("ascii")


def _shares(changes: Mapping[str, Tensor]) -> Figure:
    """What the first so many pieces hold of each change, for the picture."""
    with style():
        fig, ax = figure(8, 4)
        for name, change in changes.items():
            squares = _svd(change)[1].square()
            ax.plot([0, *(100 * squares.cumsum(0) / squares.sum()).tolist()], label=name)
        ax.set(xlabel="rank", ylabel="of the squared length (%)")
        ax.legend()
        return fig
