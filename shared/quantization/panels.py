"""Week 8. The order in which the course's kernels in C read a packed weight: panels of 16 rows.

Within a panel come a few columns of row 0, the same columns of row 1, ... of row 15, then the next columns.
So one instruction multiplies the same columns of 16 rows, and their sums lie side by side (see kernels.h).

>>> weight = torch.arange(64).view(32, 2)
>>> to_panels(weight, 1)[0].tolist()[1]  # the second column of the first 16 rows
[1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31]
>>> from_panels(to_panels(weight, 1), torch.tensor([17]), 1).tolist()
[[34, 35]]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16


def to_panels(rows: Tensor, columns: int, filled_with: int = 0) -> Tensor:
    """[out, n] -> [panels, n / columns, 16 · columns]; rows that are missing in the last panel are filled."""
    padded = F.pad(rows, (0, 0, 0, -len(rows) % PANEL), value=filled_with)
    by_column = padded.view(-1, PANEL, rows.size(1) // columns, columns)
    return by_column.transpose(1, 2).flatten(2).contiguous()


def from_panels(panels: Tensor, index: Tensor | slice, columns: int, out: int | None = None) -> Tensor:
    """The rows at `index`, as they were: [..., n]. out: how many rows there are."""
    by_row = panels.unflatten(-1, (PANEL, columns)).transpose(1, 2)  # [panels, 16, n / columns, columns]
    if isinstance(index, slice):
        return by_row.flatten(0, 1).flatten(1)[:out][index]
    return by_row[index // PANEL, index % PANEL].flatten(-2)


def nibbles_to_panels(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, uint8 [out, n] -> bytes [panels, n / 8, 64]: of 8 columns, the first 4 lie in the
    low halves of 4 bytes, the others in the high ones.
    """
    low, high = codes.unflatten(1, (-1, 2, 4)).unbind(2)  # [out, n / 8, 4] each
    return to_panels((low | high << 4).flatten(1), 4)


def nibbles_from_panels(panels: Tensor, index: Tensor | slice, out: int) -> Tensor:
    """The codes of the rows at `index`, as they were: uint8 [..., n]."""
    fours = from_panels(panels, index, 4, out).unflatten(-1, (-1, 1, 4))  # bytes [..., n / 8, 1, 4]
    return torch.cat([fours & 15, fours >> 4], -2).flatten(-3)
