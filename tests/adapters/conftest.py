"""Fixtures of the tests of shared/adapters."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def idx() -> Tensor:
    """Three texts of ten tokens, for models with a vocabulary of 53."""
    return torch.randint(53, (3, 10), generator=torch.Generator().manual_seed(0))
