"""Explorers of weeks 7 to 9 as their tests, and those of all explorers, make them."""

import torch

from shared.course.explorers import (
    loss_scale_explorer,
    number_explorer,
    quantization_explorer,
    rank_explorer,
)
from shared.quantization.packing import NF4


def numbers():
    return number_explorer()


def gradients() -> torch.Tensor:
    """Of sizes from 2⁻⁴⁵ to 2⁻⁶, and some that are 0."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(20_000).uniform_(-45, -6, generator=generator)
    return torch.cat([torch.exp2(exponents), -torch.exp2(exponents[:100]), torch.zeros(50)])


def loss_scale():
    return loss_scale_explorer(gradients())


def weight() -> torch.Tensor:
    """A few rows: one of zeros, one with a group of zeros, one with a large weight."""
    torch.manual_seed(0)
    rows = 0.05 * torch.randn(12, 128)
    rows[3] = 0
    rows[4, 32:64] = 0
    rows[5, 70] = 1.5
    return rows


def quantization():
    return quantization_explorer(weight(), NF4)


def changes() -> dict[str, torch.Tensor]:
    """One of all ranks, and one of rank 3."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -3, 24)
    return {
        "whole": torch.randn(40, 24) * scales @ torch.randn(24, 24) / 5,
        "thin": torch.randn(40, 3) @ torch.randn(3, 24) / 10,
    }


def rank():
    return rank_explorer(changes(), {0: 4.0, 2: 3.5, 8: 3.2, 24: 3.0})
