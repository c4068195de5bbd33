"""shared/quantization/packing.py against bitsandbytes, gguf, PyTorch's kernels, and the laws of rounding."""

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shared.quantization import native
from shared.quantization.modules import QuantizedLinear
from shared.quantization.packing import (
    NF4,
    PACKED_ROWS,
    SCHEMES,
    Int4Weight,
    Int8Weight,
    NF4Weight,
    absmax_int8,
    dynamic_levels,
    nearest_levels,
)
from tests.quantization.helpers import COMPILED, packed, random, weights


def assert_nearest_but_for_their_table(ours: Tensor, theirs: Tensor) -> None:
    """On a CPU bitsandbytes looks the nearest of 256 levels up in a table of 2¹⁶ places (on CUDA it searches,
    as we do): within 2⁻¹⁶ of the middle between two levels it may take the other.
    """
    assert (ours.int() - theirs.int()).abs().max() <= 1 and (ours != theirs).float().mean() < 0.02


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(64, 256), (70, 384)])
def test_nf4_is_bitsandbytes(shape, group_size, double_quant):
    weight = random(*shape) * random(shape[0], 1, seed=1).exp()
    weight[3] = 0
    packed, state = bnb.quantize_4bit(
        weight, blocksize=group_size, quant_type="nf4", compress_statistics=double_quant
    )
    ours = NF4Weight(weight, group_size, double_quant)
    assert torch.equal(ours.codes.flatten(), packed.flatten())
    if double_quant:
        assert torch.equal(ours.absmax_scale, state.state2.absmax) and torch.equal(ours.offset, state.offset)
        assert_nearest_but_for_their_table(ours.absmax, state.absmax.view_as(ours.absmax))
        ours.absmax = state.absmax.view_as(ours.absmax)
    assert torch.equal(ours.absmax.flatten(), state.absmax.flatten())
    torch.testing.assert_close(ours.rows(slice(None)), bnb.dequantize_4bit(packed, state), atol=0, rtol=1e-6)


def test_the_levels_are_bitsandbytes():
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map(signed=True))
    assert torch.equal(torch.tensor(NF4), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("size", [256, 1000, 20000])
def test_blocks_of_dynamic_levels_are_bitsandbytes(size):
    values = random(size)
    codes, state = bnb.quantize_blockwise(values, blocksize=256)
    ours, absmax = nearest_levels(values, dynamic_levels(), 256)
    assert torch.equal(absmax, state.absmax)
    assert_nearest_but_for_their_table(ours, codes)


def test_each_place_of_bitsandbytes_table_has_the_level_that_is_nearest():
    places = (torch.arange(2**16) / 32767.5 - 1).view(-1, 128)
    values = torch.cat([places, torch.ones(len(places), 128)], 1)  # the largest value of each block is 1
    codes, _ = bnb.quantize_blockwise(values, blocksize=256)
    assert torch.equal(nearest_levels(values, dynamic_levels(), 256)[0], codes)


def test_int8_is_bitsandbytes():
    weight = random(48, 192).half()
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    ours, scale = absmax_int8(weight.float())
    assert torch.equal(ours, codes)
    torch.testing.assert_close(scale, absmax.flatten() / 127)


def test_what_ggufs_q4_1_can_express_comes_back_from_int4():
    """Groups of 32 with a scale and a minimum: where those two fit in bfloat16 the grids are one."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (8, 4, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15
    scale = 2.0 ** torch.randint(-9, 0, (8, 4, 1), generator=generator)
    weight = (codes * scale + scale * torch.randint(-12, 4, (8, 4, 1), generator=generator)).flatten(1)
    q4_1 = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), Kind.Q4_1), Kind.Q4_1))
    assert torch.equal(q4_1, weight)
    packed = Int4Weight(weight, 32)
    assert torch.equal(packed.rows(slice(None)), weight)
    low, high = codes.flatten(1)[:, ::2], codes.flatten(1)[:, 1::2]
    assert torch.equal(packed.codes, (low | high << 4).to(torch.uint8))


@pytest.mark.slow
@settings(max_examples=150)
@given(weights(32))
def test_int8_is_off_by_half_a_step_at_most(weight):
    packed = Int8Weight(weight)
    error = (packed.rows(slice(None)) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * (0.5 + 1e-4) + 1e-37).all()
    assert packed.codes.abs().max() <= 127


@pytest.mark.slow
@settings(max_examples=150)
@given(weights(64))
def test_int4_is_off_by_half_a_step_and_the_rounding_of_its_scale_and_zero(weight):
    """bfloat16 has 8 bits: scale and zero are off by a share of 2⁻⁹ each, the scale seven or eight times over
    at the ends.
    """
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step, zero = (high - low) / 15, low + 8 * (high - low) / 15
    error = (Int4Weight(weight, 32).rows(slice(None)).unflatten(1, (-1, 32)) - groups).abs()
    assert (error <= step * (0.5 + 9 * 2**-9) + zero.abs() * 2**-8 + 1e-37).all()


@pytest.mark.slow
@settings(max_examples=150)
@given(weights(64), st.booleans())
def test_nf4_is_off_by_half_the_widest_gap_at_most(weight, double_quant):
    packed = NF4Weight(weight, 32, double_quant)
    blocks, absmax = weight.unflatten(1, (-1, 32)), packed.block_absmax().unsqueeze(-1)
    error = (packed.rows(slice(None)).unflatten(1, (-1, 32)) - blocks).abs()
    largest = blocks.abs().amax(-1, keepdim=True)
    slack = (largest - absmax).abs()  # what double quantization did to the absmax
    widest = max(b - a for a, b in zip(NF4, NF4[1:]))
    assert (error <= largest * (widest / 2 + 1e-5) + slack * (1 + 1e-5) + 1e-37).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_of_normal_weights_as_much_is_lost_as_the_bits_allow(scheme):
    weight = random(256, 512)
    loss = ((SCHEMES[scheme](weight).rows(slice(None)) - weight).std() / weight.std()).item()
    low, high = {"int8": (0.005, 0.012), "int4": (0.06, 0.09), "nf4": (0.08, 0.10)}[scheme]
    assert low < loss < high


def rounded(x: Tensor) -> Tensor:
    """As kernels.h rounds activations: each group of 32 to 127 steps up to its largest magnitude."""
    groups = x.unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    steps = groups * torch.where(most > 0, torch.tensor(127.0).div(most), 0.0)
    return (steps.round() * (most / 127)).flatten(-2)


@pytest.mark.parametrize("shape", [(64, 64), (53, 128), (130, 576)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_the_same_rows_however_they_are_kept(scheme, shape, kernels):
    weight = random(*shape)
    plain, laid_out = SCHEMES[scheme](weight), packed(weight, scheme, kernels)
    index = torch.tensor([[0, 5, shape[0] - 1], [31, 32, 5]])
    rows = plain.rows(slice(None))
    assert torch.equal(laid_out.rows(slice(None)), rows)
    assert torch.equal(laid_out.rows(index), rows[index]) and torch.equal(plain.rows(index), rows[index])
    assert plain.state_dict().keys() == laid_out.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), laid_out.state_dict().values()))
    other = packed(torch.zeros(shape), scheme, kernels)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.rows(slice(None)), rows)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, PACKED_ROWS, PACKED_ROWS + 1])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("shape", [(64, 128), (53, 256), (200, 640)])
def test_products_are_those_with_the_unpacked_weight(shape, group_size, rows, kernels):
    """Up to the order of sums where the weight is unpacked, and for the course's kernel with activations
    rounded as it does; within what bfloat16 activations lose for PyTorch's.
    """
    if group_size:
        layer = packed(random(*shape), "int4", kernels, group_size=group_size)
    else:
        layer = packed(random(*shape), "int8", kernels)
    assert layer.kernel == (kernels[0] if kernels else None), (
        "this machine has a C compiler, and PyTorch 2.13 its kernels for x86 and ARM"
    )
    x = random(1, rows, shape[1], seed=1)
    weight = layer.rows(slice(None))
    few = rows <= PACKED_ROWS
    expected = F.linear(rounded(x) if few and layer.kernel == "native" else x, weight)
    got = layer.product(x)
    assert got.shape == expected.shape and got.dtype == x.dtype
    assert (got - expected).norm() <= (0.006 if few and layer.kernel == "torch" else 1e-6) * expected.norm()
    assert (got - F.linear(x, weight)).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(
    "x", [torch.zeros(2, 64), torch.full((1, 64), 1e-30), torch.full((1, 64), 3e4), random(2, 128)[:, ::2]]
)
def test_products_of_unusual_activations(scheme, x, kernels):
    layer = packed(random(96, 64), scheme, kernels)
    expected = F.linear(x, layer.rows(slice(None)))
    torch.testing.assert_close(layer.product(x), expected, rtol=0.02, atol=0.05 * x.abs().max().item())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden_by_rounding(scheme, value, kernels):
    layer, x = packed(random(96, 64), scheme, kernels), random(2, 64)
    x[0, 40] = value
    assert not layer.product(x)[0].isfinite().any() and layer.product(x)[1].isfinite().all()


@pytest.mark.parametrize("kernel", [pytest.param("native", marks=COMPILED), "torch"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_few_rows_go_through_the_kernel_and_many_do_not(scheme, kernel, monkeypatch):
    layer, calls = packed(random(64, 64), scheme, (kernel,)), []

    def product(self, x: Tensor) -> Tensor:
        calls.append(x.dtype)
        return x.new_zeros(*x.shape[:-1], 64)

    if kernel == "native":
        monkeypatch.setattr(native, "product", lambda x, weight: product(layer, x))
    else:
        monkeypatch.setattr(type(layer), "torch_product", product)
    layer.product(random(1, 64))
    layer.product(random(PACKED_ROWS + 1, 64))
    assert calls == [torch.float32 if kernel == "native" else torch.bfloat16]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_change_of_type_changes_what_is_unpacked_and_no_code_or_scale(scheme):
    layer = QuantizedLinear(packed(random(64, 64), scheme))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x, weight = random(2, 64), layer.weight
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, weight.bfloat16())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    for name, t in layer.state_dict().items():
        assert torch.equal(t, before[name]) and t.dtype == before[name].dtype
    assert torch.equal(layer.float().weight, weight)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_to_the_input_and_nothing_else_is_trained(scheme, rows, kernels):
    layer = QuantizedLinear(packed(random(48, 64), scheme, kernels), nn.Parameter(random(48)))
    x, out = random(rows, 64, seed=1).requires_grad_(), random(rows, 48, seed=2)
    (layer(x) * out).sum().backward()
    torch.testing.assert_close(x.grad, out @ layer.weight, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.bias.grad, out.sum(0))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
