"""shared/training/fused.c against PyTorch's operations, at sizes that fit no tile."""

import os

import pytest
import torch
from torch import nn

from shared import compiled
from shared.training import fused
from shared.training.optim import Muon

COMPILED = pytest.mark.skipif(
    os.name != "posix", reason="fused.c is compiled on Linux and macOS only; elsewhere PyTorch computes"
)
SHAPES = [(1, 1), (1, 6), (5, 7), (8, 16), (33, 32), (65, 31), (40, 130), (130, 40)]


@pytest.fixture
def two_threads():
    """PyTorch, and with it fused.c, computes with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trained_by_muon(dtype: torch.dtype = torch.float32, **settings) -> list[torch.Tensor]:
    """Matrices after four steps of Muon with random gradients, the last matrix without one."""
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(shape, generator=generator) for shape in (*SHAPES, (3, 4))]
    parameters = [nn.Parameter(matrix.to(dtype)) for matrix in draw]
    optimizer = Muon(parameters, lr=0.02, momentum=0.9, **settings)
    for _ in range(4):
        for p in parameters[:-1]:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    return [p.detach() for p in parameters]


@COMPILED
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_in_c_is_muon(weight_decay):
    expected = trained_by_muon(weight_decay=weight_decay)
    for got, want in zip(trained_by_muon(weight_decay=weight_decay, fused=True), expected):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@COMPILED
def test_muon_in_c_gives_the_same_bits_with_any_number_of_threads(two_threads):
    of_two = trained_by_muon(fused=True)
    torch.set_num_threads(1)
    assert all(map(torch.equal, trained_by_muon(fused=True), of_two))


@COMPILED
def test_matrices_that_c_cannot_read_are_left_to_pytorch():
    for got, want in zip(trained_by_muon(torch.float64, fused=True), trained_by_muon(torch.float64)):
        assert torch.equal(got, want)


@COMPILED
def test_muon_in_c_keeps_its_momentum_where_muon_does():
    p = nn.Parameter(torch.eye(4))
    optimizer = Muon([p], fused=True)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.full((4, 4), 0.05))
    assert p._version == 1  # autograd would notice that it was changed


@COMPILED
def test_without_a_compiler_it_is_said_what_is_missing(monkeypatch):
    fused.library.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    try:
        assert "it needs a C compiler" in (fused.why_unfused() or "")
        with pytest.raises(
            RuntimeError, match=r"Muon\(fused=True\) does not work here: it needs a C compiler"
        ):
            Muon([nn.Parameter(torch.ones(2, 2))], fused=True)
    finally:
        fused.library.cache_clear()
