"""What the tests of quantization share: small models, random weights, and where decoder.c can be compiled."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from shared.models.gpt import GPT, GPTConfig
from shared.quantization.kernels import KERNELS, with_kernel
from shared.quantization.packing import SCHEMES, PackedWeight
from shared.tokenizers import CharTokenizer
from tests.helpers import shake

TOKENIZER = CharTokenizer("".join(map(chr, range(97, 97 + 53))))
TIED = GPTConfig(vocab_size=53, block_size=32, n_layer=2, n_head=4, n_embd=64)
UNTIED = replace(
    TIED,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    mlp_hidden=128,
    n_kv_head=2,
    bias=False,
    tie_weights=False,
)
CONFIGS = {"tied, with biases": TIED, "untied": UNTIED}
SETTINGS = {
    "int8": dict(scheme="int8"),
    "int8 in groups of 32": dict(scheme="int8", group_size=32),
    "int4": dict(scheme="int4"),
    "int4 in groups of 32": dict(scheme="int4", group_size=32),
    "nf4": dict(scheme="nf4", group_size=32),
    "nf4 without double quantization": dict(scheme="nf4", group_size=32, double_quant=False),
}
COMPILED = pytest.mark.skipif(
    os.name != "posix",
    reason="decoder.c is compiled on Linux and macOS only; elsewhere PyTorch's kernels are used",
)


def quiet(line: str) -> None:
    pass


def gpt(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return shake(GPT(config))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(columns: int) -> st.SearchStrategy[Tensor]:
    """Up to three rows of finite numbers, among them zeros, repeated and very unequal ones."""
    numbers = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30, 127.0])
    return (
        st.integers(1, 3)
        .flatmap(lambda rows: arrays(np.float32, (rows, columns), elements=numbers))
        .map(torch.from_numpy)
    )


def packed(weight: Tensor, scheme: str, kernels: tuple[str, ...] = KERNELS, **options) -> PackedWeight:
    return with_kernel(SCHEMES[scheme](weight, **options), kernels)
