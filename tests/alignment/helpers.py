"""What the tests of shared/alignment have in common: TRL's frozen numbers, random tensors and masks."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TRL = json.loads((Path(__file__).parents[1] / "expectations" / "trl.json").read_text())
"""Made by tests/expectations/make_trl.py."""

close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_ids(vocab_size: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def some_mask(batch: int, time: int, seed: int = 0) -> Tensor:
    """Each row's answer begins somewhere, and ends somewhere after it."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, time // 2, (batch, 1), generator=generator)
    length = torch.randint(1, time // 2 + 1, (batch, 1), generator=generator)
    places = torch.arange(time)
    return (places >= start) & (places < start + length)


def tensors(numbers: dict[str, Any], *names: str) -> list[Tensor]:
    """The frozen numbers of these names, in fp64; a mask as bool."""
    dtypes = [torch.bool if name == "mask" else torch.float64 for name in names]
    return [torch.tensor(numbers[name], dtype=dtype) for name, dtype in zip(names, dtypes)]
