"""Week 0. For week 7: the numbers that a float format has, and what becomes of gradients in it."""

import base64
import math
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

FORMATS = {
    "fp32": (torch.float32, 8, 23),
    "bf16": (torch.bfloat16, 8, 7),
    "fp16": (torch.float16, 5, 10),
    "fp8 E4M3": (torch.float8_e4m3fn, 4, 3),
    "fp8 E5M2": (torch.float8_e5m2, 5, 2),
}
"""By name: the type, and how many bits its exponent and its fraction have."""
SAMPLE = 4000
"""So many gradients go into an explorer."""


def _described(name: str) -> dict[str, Any]:
    """A format as `formats.js` reads it. What becomes of too large a number is PyTorch's to say."""
    dtype, exponent, fraction = FORMATS[name]
    beyond = torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64).to(dtype).float()
    return {
        "name": name,
        "exponent": exponent,
        "fraction": fraction,
        "infinite": name != "fp8 E4M3",
        "saturates": bool(beyond.isfinite()),
    }


def number_explorer(number: float = math.pi, *, title: str = "Where the numbers lie") -> Explorer:
    """Five float formats on a line to drag and to zoom, and what each makes of a number, bit by bit.

    number: what is chosen at first; it is rounded to float32 before anything else, as `torch.tensor` does.
    Raises ValueError for one that float32 does not have.
    """
    largest = torch.finfo(torch.float32).max
    if not abs(number) <= largest:
        raise ValueError(f"number={number}: give one of at most {largest:.4g}, the largest of float32")
    data = {"number": torch.tensor(number).item(), "formats": [_described(name) for name in FORMATS]}
    words = (
        "All numbers from 0 to 8 that four formats have. Between two powers of two they are evenly spaced;"
        " from one power to the next the distance doubles."
    )
    return Explorer(title, ("formats.js", "numbers.js"), data, as_image(_line(8), words))


def _line(end: int) -> Figure:
    """The formats' numbers from 0 to `end`, for the picture."""
    names = [name for name in FORMATS if name != "fp32"]
    with style():
        fig, ax = figure(10, 3)
        for row, name in enumerate(names):
            dtype = FORMATS[name][0]
            size = dtype.itemsize
            codes = torch.arange(2 ** (8 * size - 1), dtype=torch.int32)
            values = codes.to(torch.uint8 if size == 1 else torch.int16).view(dtype).float()
            inside = values[values <= end].numpy()
            ax.vlines(inside, row - 0.35, row + 0.35, linewidth=0.8, color="C0")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.grid(False)
        ax.set_xlim(-0.05, end + 0.05)
        return fig


def loss_scale_explorer(
    gradients: Tensor, *, title: str = "The gradients, and the range that a format has"
) -> Explorer:
    """A histogram of gradients to shift by a loss scale: how many become 0, lose digits, or overflow.

    gradients: of any shape, of a loss that was not scaled. Of those that are not 0, `SAMPLE` are taken,
    evenly from the smallest to the largest. Raises ValueError where none is above 0, and for such that are
    not finite.
    """
    sizes = gradients.detach().cpu().float().abs().flatten()
    if not torch.isfinite(sizes).all():
        raise ValueError("some gradients are not finite: give those of a step in fp32, without a scale")
    moved = sizes[sizes > 0].sort().values
    if not len(moved):
        raise ValueError("all gradients are 0: there is nothing to shift")
    taken = torch.linspace(0, len(moved) - 1, min(SAMPLE, len(moved)), dtype=torch.float64).round().long()
    data = {
        "sizes": base64.b64encode(moved[taken].numpy().astype("<f4").tobytes()).decode("ascii"),
        "total": len(moved),
        "formats": [_described(name) for name in FORMATS if name != "fp32"],
        "format": "fp16",
    }
    lost = (moved.half() == 0).double().mean().item()
    words = f"The sizes of {len(moved):,} gradients. Without a scale, fp16 makes 0 of {lost:.1%} of them."
    return Explorer(title, ("formats.js", "loss_scale.js"), data, as_image(_histogram(moved[taken]), words))


def _histogram(sizes: Tensor) -> Figure:
    """The sizes on a logarithmic axis, with fp16's limits, for the picture."""
    with style():
        fig, ax = figure(10, 4)
        ax.hist(sizes.log2().numpy(), bins=60, color="C0")
        for power, label in ((-25, "below: 0"), (-14, "below: digits missing"), (16, "above: inf")):
            ax.axvline(power, color="C1")
            ax.annotate(
                label, (power, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
            )
        ax.set(xlabel="size of a gradient, as a power of 2", ylabel="gradients")
        return fig
