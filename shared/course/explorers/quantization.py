"""Week 0. For week 8: a weight matrix in 8 and 4 bits, group by group, and what one large weight costs."""

import base64
from collections.abc import Sequence

import torch
from torch import Tensor

from shared.course.explorers.page import Explorer
from shared.course.explorers.pictures import as_image
from shared.course.report import figure
from shared.course.style import style
from shared.extras import needs

with needs("course"):
    from matplotlib.figure import Figure

GROUPS = (32, 64, 128)
"""Sizes of a group that may be chosen, beside the whole row."""
MOST_WEIGHTS = 8192


def quantization_explorer(
    weight: Tensor, levels: Sequence[float], *, title: str = "A weight in 8 and 4 bits, group by group"
) -> Explorer:
    """A weight to round: choose scheme and size of the groups, look into one group, make one weight larger.

    weight: [out, in], rounded as `shared.quantization` does; in is a multiple of 32, and there are at most
    `MOST_WEIGHTS`: a few rows of a matrix. levels: the 16 of NF4, in order, from -1 to 1; each group's
    largest magnitude is kept in float32 there (no double quantization). Raises ValueError for others.
    """
    if weight.dim() != 2 or weight.size(1) % 32 or not 0 < weight.numel() <= MOST_WEIGHTS:
        raise ValueError(
            f"a weight of shape {list(weight.shape)}: the explorer shows [out, in], in a multiple of 32, with"
            f" at most {MOST_WEIGHTS:,} numbers (some rows of a matrix: weight[:32])"
        )
    numbers = weight.detach().cpu().float().contiguous()
    if not torch.isfinite(numbers).all() or not numbers.any():
        raise ValueError("the weight has numbers that are not finite, or is all zeros")
    of_nf4 = list(levels)
    if len(of_nf4) != 16 or sorted(of_nf4) != of_nf4 or (of_nf4[0], of_nf4[-1]) != (-1, 1):
        raise ValueError(f"levels={of_nf4}: give 16, in order, from -1 to 1")
    out, width = numbers.shape
    data = {
        "rows": out,
        "columns": width,
        "weight": base64.b64encode(numbers.numpy().astype("<f4").tobytes()).decode("ascii"),
        "sizes": [size for size in GROUPS if width % size == 0 and size < width] + [width],
        "levels": of_nf4,
    }
    words = (
        f"{out} rows of a weight, {width} columns: the weights, and how far off groups of 32 are when each is"
        " rounded to 16 even steps."
    )
    return Explorer(title, ("formats.js", "quantization.js"), data, as_image(_maps(numbers), words))


def _maps(weight: Tensor) -> Figure:
    """The weights, and the error of each group of 32 in 16 even steps, for the picture."""
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-30)
    off = ((groups - low) / step).round() * step + low - groups
    by_group = off.square().mean(-1).sqrt() / weight.square().mean().sqrt()
    with style():
        fig, axes = figure(10, 4.4, nrows=2)
        reach = 3 * weight.std().item()
        axes[0].imshow(weight.numpy(), cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
        axes[0].set_title("the weights")
        shown = axes[1].imshow(100 * by_group.numpy(), cmap="Blues", vmin=0, aspect="auto")
        axes[1].set_title("how far off, by group (%)")
        fig.colorbar(shown, ax=axes[1])
        for ax in axes:
            ax.grid(False)
        return fig
