"""shared/training/fp8.py on a CPU, where torch has a slow product, against float64 of the rounded factors."""

import pytest
import torch
from torch import nn

from shared.training.fp8 import E4M3, E5M2, Float8Linear, fp8_product, fp8_with_scale, to_fp8


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


@pytest.mark.parametrize(("dtype", "end", "bits"), [(E4M3, 448, 3), (E5M2, 57344, 2)])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_the_largest_number_comes_to_the_end_of_the_format(dtype, end, bits, size):
    x = drawn(32, 16, scale=size)
    x8, scale = fp8_with_scale(x, dtype)
    assert x8.float().abs().max() == end
    back = x8.float() * scale
    large = x.abs() > x.abs().max() / 16
    wrong = ((back - x).abs() / x.abs())[large]
    assert wrong.max() <= 2.0 ** -(bits + 1) * 1.0001  # half a step
    assert not fp8_with_scale(torch.zeros(4, 4), dtype)[0].float().any()


def test_a_product_is_that_of_the_rounded_factors():
    a, b = drawn(16, 48), drawn(32, 48, scale=1e-3)
    (a8, a_scale), (b8, b_scale) = fp8_with_scale(a, E5M2), fp8_with_scale(b, E4M3)
    right = (a8.double() @ b8.double().T) * (a_scale * b_scale)
    found = fp8_product(a, b, (E5M2, E4M3))
    assert found.dtype == torch.bfloat16
    assert relative(found, right) < 2**-8  # bf16's own rounding
    assert relative(found, a.double() @ b.double().T) < 0.1


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_and_its_gradients_are_near_those_of_fp32(bias):
    plain = nn.Linear(32, 48, bias=bias)
    layers = nn.Sequential(plain)
    x = drawn(2, 16, 32)
    results = []
    for _ in range(2):
        inputs = x.clone().requires_grad_()
        plain.zero_grad()
        out = layers(inputs)
        (out.float() * drawn(2, 16, 48)).sum().backward()
        results.append([out, inputs.grad, *(p.grad.clone() for p in layers.parameters())])
        if isinstance(layers[0], Float8Linear):
            break
        to_fp8(layers)
    assert layers[0].weight is plain.weight
    assert layers[0].bias is plain.bias
    for right, found in zip(*results):
        assert found.shape == right.shape
        assert relative(found.detach(), right.detach()) < 0.08


def test_the_output_layer_and_odd_sizes_stay_as_they_are():
    model = nn.ModuleDict({"up": nn.Linear(16, 32), "odd": nn.Linear(16, 20), "lm_head": nn.Linear(16, 32)})
    to_fp8(model)
    assert [type(layer) for layer in model.values()] == [Float8Linear, nn.Linear, nn.Linear]
    with pytest.raises(ValueError, match="no linear layer's sides divide by 16"):
        to_fp8(nn.Sequential(nn.Linear(4, 4)))


def test_tokens_that_do_not_divide_are_padded_only_where_nothing_is_learned():
    layers = nn.Sequential(nn.Linear(16, 16))
    to_fp8(layers)
    x = drawn(5, 16)
    with torch.no_grad():
        assert relative(layers(x), x @ layers[0].weight.T + layers[0].bias) < 0.1
    with pytest.raises(ValueError, match="a number of tokens that divides by 16, and this is 5"):
        layers(x)


@pytest.mark.parametrize(("dtype", "exponent", "fraction", "end"), [(E4M3, 4, 3, 448), (E5M2, 5, 2, 57344)])
def test_torchs_codes_are_the_papers_table(dtype, exponent, fraction, end):
    """All 256 of them by the formula: E4M3 has no inf, and one nan for each sign."""
    bias = 2 ** (exponent - 1) - 1
    codes = torch.arange(256, dtype=torch.uint8)
    for code, value in zip(codes.tolist(), codes.view(dtype).double().tolist()):
        e, f = (code & 127) >> fraction, code & (2**fraction - 1)
        digits = (1 if e else 0) + f / 2**fraction
        right = (-1) ** (code >> 7) * digits * 2.0 ** (max(e, 1) - bias)
        if abs(right) <= end:
            assert value == right
        else:
            assert value != value or abs(value) == float("inf")
