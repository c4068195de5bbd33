"""shared/training/fused.c against PyTorch's operations, at sizes that fit no tile."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from shared import compiled
from shared.runtime import ROOT
from shared.training import fused
from shared.training.fused_attention import Heads, causal_attention
from shared.training.optim import Muon
from tests.arm import CROSS_COMPILER, EMULATED, numbers_by_name, run_on_arm

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
    fused.fused_library.cache_clear()
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    try:
        assert "it needs a C compiler" in (fused.why_unfused() or "")
        with pytest.raises(
            RuntimeError, match=r"Muon\(fused=True\) does not work here: it needs a C compiler"
        ):
            Muon([nn.Parameter(torch.ones(2, 2))], fused=True)
    finally:
        fused.fused_library.cache_clear()


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients_agree(ours: torch.Tensor, exact: torch.Tensor, leaves: list, exact_leaves: list) -> None:
    """fp32's result and gradients against those of fp64, for a random gradient of the result."""
    torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-5)
    dy = leaf(*ours.shape, seed=9).detach()
    got = torch.autograd.grad(ours, leaves, dy)
    for gradient, want in zip(got, torch.autograd.grad(exact, exact_leaves, dy.double())):
        torch.testing.assert_close(gradient, want.float(), rtol=1e-4, atol=1e-5)


@COMPILED
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (3, 50, 128), (200, 3)])
def test_norm_and_gate_are_pytorchs(shape):
    leaves = [leaf(*shape), leaf(shape[-1], seed=1), leaf(*shape, seed=2)]
    x, weight, up = leaves
    exact = [t.detach().double().requires_grad_() for t in leaves]
    norm = nn.functional.rms_norm(exact[0], shape[-1:], exact[1], 1e-3)
    gradients_agree(fused.rms_norm(x, weight, 1e-3), norm, leaves[:2], exact[:2])
    gate = nn.functional.silu(exact[0]) * exact[2]
    gradients_agree(fused.gated_silu(x, up), gate, [x, up], [exact[0], exact[2]])


@COMPILED
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (3, 50, 128), (200, 3)])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_a_layer_norm_is_pytorchs(shape, has_bias):
    x, weight, dy = leaf(*shape), leaf(shape[-1], seed=1), leaf(*shape, seed=2).detach()
    x = (x + 3).detach()  # a mean that matters
    bias = leaf(shape[-1], seed=3) if has_bias else None
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = nn.functional.layer_norm(exact[0], shape[-1:], *exact[1:], eps=1e-3)
    norm = fused.Norm(1e-3, centered=True)
    got = fused.norm_forward(norm, x, weight.detach(), None if bias is None else bias.detach())
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)
    given = [t for t in exact if t is not None]
    beside = torch.ones(shape)
    dx, *others = fused.norm_backward(norm, x, weight.detach(), dy, beside=beside, has_bias=has_bias)
    gradients = [dx - beside, *(gradient for gradient in others if gradient is not None)]
    of_exact = torch.autograd.grad(want, given, dy.double())
    for gradient, exactly in zip(gradients, of_exact, strict=True):
        torch.testing.assert_close(gradient, exactly.float(), rtol=1e-4, atol=1e-4)


@COMPILED
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_is_pytorchs(approximate):
    x = torch.cat([torch.linspace(-9, 9, 1003), torch.tensor([0.0, -1e20, -100.0, 100.0, 1e20])])
    exact = x.double().requires_grad_()
    want = nn.functional.gelu(exact, approximate=approximate)
    y, slope = fused.gelu_and_slope(x, approximate == "tanh")
    torch.testing.assert_close(y, want.float(), rtol=1e-6, atol=5e-7)
    (of_want,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(slope, of_want.float(), rtol=1e-5, atol=1e-6)
    nans = fused.gelu_and_slope(torch.tensor([float("nan")]), approximate == "tanh")
    assert all(t.isnan().all() for t in nans)


@COMPILED
def test_far_numbers_saturate_and_whoever_sees_a_nan_becomes_one():
    gate = torch.tensor([-1e30, -100.0, 100.0, 1e30, float("nan")])
    y = fused.gated_silu(gate, torch.ones(5))
    torch.testing.assert_close(y, nn.functional.silu(gate), equal_nan=True)
    q = torch.zeros(1, 40, 8)
    q[0, 3] = float("nan")
    out = causal_attention(Heads(2, 2, 4, 0.5), q, q, q)
    assert out[0, 3:].isnan().all()


@COMPILED
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (8, 32, 64), (5, 13, 7), (33, 65, 40), (300, 17, 96)]
)
@pytest.mark.parametrize("own", [True, False], ids=["in C", "by PyTorch"])
def test_products_of_any_size_are_right_and_are_added(rows, inputs, outputs, own, monkeypatch):
    monkeypatch.setattr(fused, "has_own_products", lambda inputs, outputs: own)
    x, weight, dy = (leaf(*s).detach() for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    ones, bias = torch.ones(rows, outputs), leaf(outputs, seed=1).detach()
    for adds in ({}, {"bias": bias}, {"beside": ones}, {"bias": bias, "beside": ones}):
        y = fused.linear(x, weight, **adds)
        want = x.double() @ weight.double().T + sum(more.double() for more in adds.values())
        torch.testing.assert_close(y, want.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ones, torch.ones(rows, outputs))
    for add_to in (None, torch.ones(rows, inputs)):
        dx = fused.linear_backward_input(dy, weight, None if add_to is None else add_to.clone())
        want = dy.double() @ weight.double() + (0 if add_to is None else 1)
        torch.testing.assert_close(dx, want.float(), rtol=1e-5, atol=1e-4)
    d_weight = fused.linear_backward_weight(dy, x)
    torch.testing.assert_close(d_weight, (dy.double().T @ x.double()).float(), rtol=1e-5, atol=1e-4)
    d_bias = fused.linear_backward_bias(dy)
    torch.testing.assert_close(d_bias, dy.double().sum(0).float(), rtol=1e-5, atol=1e-5)


@COMPILED
def test_parts_of_a_block_give_the_same_bits_with_any_number_of_threads(two_threads):
    def result() -> list[torch.Tensor]:
        leaves = [leaf(3, 70, 32, seed=s) for s in range(3)] + [leaf(8, seed=s) for s in (3, 4)]
        out = causal_attention(Heads(4, 4, 8, 0.3, eps=1e-5), *leaves, None, None)
        normed = fused.rms_norm(out, leaf(32, seed=5), 1e-5)
        x, weight, bias = out.detach(), leaf(40, 32, seed=6).detach(), leaf(40, seed=7).detach()
        products = fused.linear(x, weight, bias)
        d_bias = fused.linear_backward_bias(products)
        layer_norm = fused.Norm(1e-5, centered=True)
        centered = fused.norm_forward(layer_norm, x, x[0, 0])
        of_centered = fused.norm_backward(layer_norm, x, x[0, 0], x, has_bias=True)
        gates = [leaf(1003, seed=8), leaf(1003, seed=9)]
        gated = fused.gated_silu(*gates)
        of_gates = torch.autograd.grad(gated.sum(), gates)
        gelus = [t for tanh in (False, True) for t in fused.gelu_and_slope(gates[0].detach().clone(), tanh)]
        results = [out, products, d_bias, centered, *of_centered, gated, *of_gates, *gelus]
        return [*results, *torch.autograd.grad(normed.sum(), leaves)]

    of_two = result()
    torch.set_num_threads(1)
    assert all(map(torch.equal, result(), of_two))


@pytest.mark.slow
@COMPILED
@EMULATED
def test_arm_computes_what_this_machine_does(tmp_path):
    main = ROOT / "tests/training/fused_main.c"
    compiled.compile_c(compiled.find_compiler(), [main], tmp_path / "here")
    strict = ("-static", "-Wall", "-Wextra", "-Werror")
    compiled.compile_c(CROSS_COMPILER, [main], tmp_path / "arm", *strict, flags=[["-fopenmp"]])
    expected = numbers_by_name(tmp_path / "here")
    got, of_two_threads = (run_on_arm(tmp_path / "arm", "cortex-a72", threads) for threads in "12")
    assert got.keys() == of_two_threads.keys() == expected.keys() and len(got) > 20
    for name, numbers in expected.items():
        np.testing.assert_allclose(got[name], numbers, rtol=1e-5, atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(got[name], of_two_threads[name], err_msg=name)
