"""Explorers of weeks 7 to 9 as their tests, and those of all explorers, make them."""

import torch

from shared.course.explorers import (
    loss_scale_explorer,
    number_explorer,
)


def numbers():
    return number_explorer()


def gradients() -> torch.Tensor:
    """Of sizes from 2⁻⁴⁵ to 2⁻⁶, and some that are 0."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(20_000).uniform_(-45, -6, generator=generator)
    return torch.cat([torch.exp2(exponents), -torch.exp2(exponents[:100]), torch.zeros(50)])


def loss_scale():
    return loss_scale_explorer(gradients())
