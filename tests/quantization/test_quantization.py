"""shared/quantization/modules.py and packing.py against bitsandbytes, gguf, PyTorch's kernels, and the laws
of rounding.
"""

import json
import os
from copy import deepcopy
from dataclasses import replace
from functools import cache

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import Tensor, nn

from shared import checkpoint
from shared.assets import fetch
from shared.models.gpt import GPT, GPTConfig
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.models.pretrained import load_smollm2, to_hf
from shared.quantization import native, packing, quantize
from shared.quantization.gptq import gptq, gptq_round
from shared.quantization.modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    load_quantized,
    num_bytes,
    quantization_of,
    save_quantized,
)
from shared.quantization.packing import (
    NF4,
    SCHEMES,
    Int4Weight,
    Int8Weight,
    NF4Weight,
    absmax_int8,
    dynamic_levels,
    find_kernel,
    gguf_blocks,
    group_ranges,
    nearest_levels,
)
from shared.sampling import generate
from shared.tokenizers import CharTokenizer
from shared.zero_shot import sliding_window
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


# ---- against other libraries


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


KINDS = {"q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(weights(64))
def test_ggufs_blocks_are_those_of_gguf_byte_for_byte(kind, weight):
    weight[weight.abs() < 1e-35] = (
        # of a block with nothing larger, 1 / d is inf, and its codes are whatever the C compiler makes of
        # that
        0
    )
    assert np.array_equal(gguf_blocks(weight, kind).numpy(), gguf.quantize(weight.numpy(), KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_ggufs_blocks_of_many_weights(kind):
    weight = random(300, 1024) * random(300, 1, seed=1).exp()
    weight[0, 0:32], weight[1, 32:34], weight[1, 34:64] = (
        0,
        torch.tensor([-2.0, 2.0]),
        1,
    )  # nothing; two largest, of both signs
    weight[2, :32] = torch.arange(32) - 15.5  # halves
    assert np.array_equal(gguf_blocks(weight, kind).numpy(), gguf.quantize(weight.numpy(), KINDS[kind]))


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
    assert torch.equal(
        packed.codes, (codes.flatten(1)[:, ::2] | codes.flatten(1)[:, 1::2] << 4).to(torch.uint8)
    )


# ---- how far a weight can be off


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weights(32))
def test_int8_is_off_by_half_a_step_at_most(weight):
    packed = Int8Weight(weight)
    error = (packed.rows(slice(None)) - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * (0.5 + 1e-4) + 1e-37).all()
    assert packed.codes.abs().max() <= 127


@settings(max_examples=150, deadline=None, derandomize=True)
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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weights(64), st.booleans())
def test_nf4_is_off_by_half_the_widest_gap_at_most(weight, double_quant):
    packed = NF4Weight(weight, 32, double_quant)
    blocks, absmax = weight.unflatten(1, (-1, 32)), packed.block_absmax().unsqueeze(-1)
    error = (packed.rows(slice(None)).unflatten(1, (-1, 32)) - blocks).abs()
    slack = (blocks.abs().amax(-1, keepdim=True) - absmax).abs()  # what double quantization did to the absmax
    widest = max(b - a for a, b in zip(NF4, NF4[1:]))
    assert (
        error <= blocks.abs().amax(-1, keepdim=True) * (widest / 2 + 1e-5) + slack * (1 + 1e-5) + 1e-37
    ).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_of_normal_weights_as_much_is_lost_as_the_bits_allow(scheme):
    weight = random(256, 512)
    loss = ((SCHEMES[scheme](weight).rows(slice(None)) - weight).std() / weight.std()).item()
    low, high = {"int8": (0.005, 0.012), "int4": (0.06, 0.09), "nf4": (0.08, 0.10)}[scheme]
    assert low < loss < high


# ---- packed weights


COMPILED = pytest.mark.skipif(
    os.name != "posix",
    reason="native.c is compiled on Linux and macOS only; elsewhere PyTorch's kernels are used",
)


@pytest.fixture(params=[pytest.param("native", marks=COMPILED), "torch", "unpacked"])
def kernels(request) -> tuple[str, ...]:
    """Each way of computing, whatever is chosen on this machine."""
    return () if request.param == "unpacked" else (request.param,)


def packed(
    weight: Tensor, scheme: str, kernels: tuple[str, ...] = packing.KERNELS, **options
) -> packing.PackedWeight:
    return packing.with_kernel(SCHEMES[scheme](weight, **options), kernels)


def rounded(x: Tensor) -> Tensor:
    """As native.c rounds activations: each group of 32 to 127 steps up to its largest magnitude."""
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
    assert torch.equal(laid_out.rows(slice(None)), plain.rows(slice(None)))
    assert torch.equal(laid_out.rows(index), plain.rows(slice(None))[index]) and torch.equal(
        plain.rows(index), plain.rows(slice(None))[index]
    )
    assert plain.state_dict().keys() == laid_out.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), laid_out.state_dict().values()))
    other = packed(torch.zeros(shape), scheme, kernels)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.rows(slice(None)), plain.rows(slice(None)))


@pytest.mark.parametrize("rows", [1, 3, 4, 7, packing.PACKED_ROWS, packing.PACKED_ROWS + 1])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("shape", [(64, 128), (53, 256), (200, 640)])
def test_products_are_those_with_the_unpacked_weight(shape, group_size, rows, kernels):
    """Up to the order of sums where the weight is unpacked, and for native.c with activations rounded as it
    does; within what bfloat16 activations lose for PyTorch's.
    """
    layer = packed(
        random(*shape),
        "int4" if group_size else "int8",
        kernels,
        **({"group_size": group_size} if group_size else {}),
    )
    assert layer.kernel == (kernels[0] if kernels else None), (
        "this machine has a C compiler, and PyTorch 2.13 its kernels for x86 and ARM"
    )
    x = random(1, rows, shape[1], seed=1)
    weight = layer.rows(slice(None))
    few = rows <= packing.PACKED_ROWS
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
    torch.testing.assert_close(
        layer.product(x), F.linear(x, layer.rows(slice(None))), rtol=0.02, atol=0.05 * x.abs().max().item()
    )


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
    monkeypatch.setattr(
        type(layer),
        f"{kernel}_product",
        lambda self, x: calls.append(x.dtype) or x.new_zeros(*x.shape[:-1], 64),
    )
    layer.product(random(1, 64)), layer.product(random(packing.PACKED_ROWS + 1, 64))
    assert calls == [torch.float32 if kernel == "native" else torch.bfloat16]


@pytest.fixture
def fresh():
    """Kernels are looked for anew, in the test and after it."""
    for _ in range(2):
        find_kernel.cache_clear()
        native.library.cache_clear()
        if not _:
            yield


@COMPILED
def test_a_kernel_that_is_missing_or_computes_wrong_is_not_used(monkeypatch, fresh):
    assert find_kernel("nf4", ("torch",)) == (None, "torch: it does not know nf4")
    monkeypatch.setattr(native, "product_int8", lambda x, *weight: x.new_zeros(2, 64))
    assert find_kernel("int8") == ("torch", "native: it computes something else here")
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    find_kernel.cache_clear()
    kernel, reason = find_kernel("int8")
    assert kernel is None and "_weight_int8pack_mm" in reason


@COMPILED
def test_a_library_that_another_user_wrote_is_not_run(monkeypatch, tmp_path, fresh):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    if (uid := os.getuid()) == 0:
        native.library()
        native.library.cache_clear()
        (path,) = (tmp_path / "native").glob("*.so")
        os.chown(path, 12345, -1)
    else:  # only root can give a file away: here we are another user than its writer from the start
        monkeypatch.setattr(native.os, "getuid", lambda: uid + 1)
    with pytest.raises(RuntimeError, match="belongs to another user"):
        native.library()


@COMPILED
def test_without_a_compiler_pytorchs_kernel_is_used_and_that_is_said(monkeypatch, fresh, capsys):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    quantize(gpt(TIED), "int8")
    assert (
        "go through PyTorch's kernel (native.c is not used: native: it needs a C compiler (cc, gcc or clang)"
        in capsys.readouterr().out
    )


@COMPILED
def test_the_compiled_form_is_kept_and_belongs_to_its_source(monkeypatch, fresh, tmp_path):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    x, codes, scale = torch.ones(1, 32), torch.ones(3, 32, dtype=torch.int8), torch.ones(3, 1)
    for _ in range(2):
        native.library.cache_clear()
        torch.testing.assert_close(native.product_int8(x, codes, scale, 3, 32), torch.full((1, 3), 32.0))
        assert len(list((tmp_path / "native").iterdir())) == 1
    changed = tmp_path / "native.c"
    changed.write_text(native.SOURCE.read_text().replace("= found[r];", "= 2 * found[r];"))
    monkeypatch.setattr(native, "SOURCE", changed)
    native.library.cache_clear()
    torch.testing.assert_close(native.product_int8(x, codes, scale, 3, 32), torch.full((1, 3), 64.0))
    changed.write_text("this is not C")
    native.library.cache_clear()
    with pytest.raises(RuntimeError, match="could not compile it"):
        native.library()
    assert len(list((tmp_path / "native").iterdir())) == 2


@COMPILED
def test_the_c_without_avx2_computes_the_same(monkeypatch, fresh, tmp_path):
    x, layers = random(5, 256), [packed(random(70, 256), scheme, ("native",)) for scheme in ("int8", "int4")]
    expected = [layer.product(x) for layer in layers]
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ([],))
    native.library.cache_clear()
    for layer, other in zip(layers, expected):
        torch.testing.assert_close(layer.product(x), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_change_of_type_changes_what_is_unpacked_and_no_code_or_scale(scheme):
    layer = QuantizedLinear(packed(random(64, 64), scheme))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x, weight = random(2, 64), layer.weight
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight, weight.bfloat16())
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert all(
        torch.equal(t, before[name]) and t.dtype == before[name].dtype
        for name, t in layer.state_dict().items()
    )
    assert torch.equal(layer.float().weight, weight)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_pass_to_the_input_and_nothing_else_is_trained(scheme, rows, kernels):
    layer = QuantizedLinear(packed(random(48, 64), scheme, kernels), nn.Parameter(random(48)))
    x, out = random(rows, 64, seed=1).requires_grad_(), random(rows, 48, seed=2)
    (layer(x) * out).sum().backward()
    torch.testing.assert_close(x.grad, out @ layer.weight, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer.bias.grad, out.sum(0)) and [name for name, _ in layer.named_parameters()] == [
        "bias"
    ]


# ---- models


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", SETTINGS)
def test_a_quantized_gpt_computes_with_its_unpacked_weights(config, options, kernels):
    model = quantize(gpt(CONFIGS[config]), **SETTINGS[options], say=quiet, kernels=kernels)
    original, unpacked = gpt(CONFIGS[config]), gpt(CONFIGS[config])
    assert model.config == original.config and not any(isinstance(m, nn.Linear) for m in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            unpacked.get_submodule(name).weight.data = module.weight
            linear = original.get_submodule(name)
            assert getattr(module, "bias", None) is None or torch.equal(module.bias, linear.bias)
    idx = torch.randint(
        53, (3, 30), generator=torch.Generator().manual_seed(0)
    )  # more rows than go through the kernel
    with torch.no_grad():
        expected, got = unpacked(idx), model(idx)
        cache = model.new_cache(batch_size=3)
        stepwise = torch.cat(
            [model(idx[:, :20], cache), *(model(idx[:, i : i + 1], cache) for i in range(20, 30))], 1
        )
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert (stepwise - expected).norm() <= (0.04 if kernels else 1e-5) * expected.norm()
        loss = (got - original(idx)).norm() / original(idx).norm()
    assert 0 < loss < (0.03 if "int8" in options else 0.4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_embedding_and_the_output_layer_share_one_packed_weight(scheme):
    model = quantize(gpt(TIED), scheme, say=quiet)
    assert model.token_embedding.packed is model.lm_head.packed
    assert num_bytes(model) < num_bytes(quantize(gpt(replace(TIED, tie_weights=False)), scheme, say=quiet))
    names = checkpoint.unshared(model)
    assert any(n.startswith("token_embedding") for n in names) and not any(
        n.startswith("lm_head") for n in names
    )
    untied = quantize(gpt(UNTIED), scheme, say=quiet)
    assert isinstance(untied.token_embedding, nn.Embedding) and isinstance(untied.lm_head, QuantizedLinear)


def test_bytes_are_counted_as_they_lie_on_the_disk(tmp_path):
    for scheme in SCHEMES:
        model = quantize(gpt(TIED), scheme, say=quiet)
        save_quantized(tmp_path / scheme, model)
        stored = load_file(tmp_path / scheme / "model.safetensors").values()
        assert (
            sum(t.nbytes for t in stored)
            == num_bytes(model)
            <= (tmp_path / scheme / "model.safetensors").stat().st_size
        )
        held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
        assert (
            sum(held.values()) <= num_bytes(model) * 1.1 + 4096
        )  # and in memory: no second copy of a weight


def test_any_model_with_linear_layers_is_quantized():
    torch.manual_seed(0)
    model = WindowMLP(WindowMLPConfig(vocab_size=53))
    idx = torch.randint(53, (2, 20))
    expected = model(idx)
    got = quantize(model, "int8", say=quiet)(idx)
    assert (
        quantization_of(model) == {"scheme": "int8"} and 0 < (got - expected).norm() < 0.02 * expected.norm()
    )


@COMPILED
def test_it_is_said_how_products_are_computed(capsys):
    quantize(gpt(TIED), "int4", kernels=("native",))
    quantize(gpt(TIED), "int4", kernels=("torch",))
    quantize(gpt(TIED), "nf4", kernels=("torch",))
    lines = capsys.readouterr().out.splitlines()
    assert "int4: up to 64 rows at a time go through the course's kernel in C; for more" in lines[0]
    assert "int4: up to 64 rows at a time go through PyTorch's kernel; for more" in lines[1]
    assert (
        "nf4: no kernel multiplies by such weights here" in lines[2]
        and "less memory, not more speed" in lines[2]
    )


def test_a_quantized_model_writes_text_with_a_cache_and_without_the_same():
    model = quantize(gpt(TIED), "int8", say=quiet)
    packing_off = quantize(gpt(TIED), "nf4", say=quiet)
    for one in (model, packing_off):
        ids = [
            list(generate(one, [1, 2, 3], 20, temperature=0, use_cache=use_cache))
            for use_cache in (True, False)
        ]
        assert ids[0] == ids[1] and len(ids[0]) == 20


def test_it_trains_nothing_but_what_was_not_quantized():
    model = quantize(gpt(TIED), "nf4", say=quiet)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters()} and all(
        "norm" in n or "bias" in n or "position" in n for n in trained
    )


# ---- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scheme="int5"), "no scheme is called 'int5'; there are: int8, int4, nf4"),
        (dict(scheme="int4", group_size=48), "group_size=48: must be one of 32, 64, 128, 256"),
        (
            dict(scheme="int4", group_size=128),
            "q_proj.weight has 64 columns, which groups of 128 do not divide: choose 32 or 64",
        ),
        (
            dict(scheme="int8", group_size=128),
            "q_proj.weight has 64 columns, which groups of 128 do not divide: choose 32 or 64",
        ),
        (dict(scheme="int4", double_quant=True), "only nf4 has it"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_the_model_is_left_alone(options, message):
    model = gpt(TIED)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        quantize(model, **options, say=quiet)
    assert model.state_dict().keys() == before.keys() and all(
        torch.equal(t, before[n]) for n, t in model.state_dict().items()
    )


def test_a_width_that_no_group_divides_is_refused():
    with pytest.raises(
        ValueError,
        match=r"has 40 columns, which groups of 32 do not divide: its in_features must be a multiple of 32",
    ):
        quantize(GPT(replace(TIED, n_embd=40)), "int4", say=quiet)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("work", ["int8", "int4", "nf4", "gptq", "q8_0"])
def test_weights_that_are_not_finite_are_named(work, value):
    model = gpt(TIED)
    model.blocks[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match="1 values that are NaN or inf") as error:
        if work == "gptq":
            gptq(model, torch.zeros(1, 4, dtype=torch.int64), say=quiet)
        elif work == "q8_0":
            gguf_blocks(model.blocks[1].mlp.up_proj.weight, work)
        else:
            quantize(model, work, say=quiet)
    assert "blocks.1.mlp.up_proj.weight" in str(error.value) or work == "q8_0"
    assert isinstance(model.blocks[0].attn.q_proj, nn.Linear)


def test_models_that_cannot_be_quantized_are_refused():
    with pytest.raises(ValueError, match=r"quantized already \(int8\): quantize the original"):
        quantize(quantize(gpt(TIED), "int8", say=quiet), "int4", say=quiet)
    with pytest.raises(ValueError, match="this LayerNorm has no linear layers"):
        quantize(nn.LayerNorm(4), "int8", say=quiet)
    with pytest.raises(ValueError, match="export it before it is quantized"):
        to_hf(quantize(gpt(UNTIED), "int8", say=quiet), "nowhere")


def test_ggufs_blocks_refuse_another_kind_and_width():
    with pytest.raises(ValueError, match="no kind of block is called 'q2_k'; there are: q8_0, q4_0"):
        gguf_blocks(random(2, 32), "q2_k")
    with pytest.raises(ValueError, match="has 40 columns"):
        gguf_blocks(random(2, 40), "q8_0")


# ---- on disk


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", SETTINGS)
def test_a_quantized_model_comes_back_bit_for_bit(config, options, tmp_path):
    model = quantize(gpt(CONFIGS[config]), **SETTINGS[options], say=quiet)
    save_quantized(tmp_path / "m", model, TOKENIZER, {"val_loss": 1.5})
    torch.manual_seed(1)
    loaded = load_quantized(tmp_path / "m")
    assert loaded.metrics == {"val_loss": 1.5} and loaded.model.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert (
        quantization_of(loaded.model)
        == quantization_of(model)
        == json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    )
    with torch.no_grad():
        for idx in (torch.arange(4)[None], torch.arange(30)[None]):
            assert torch.equal(loaded.model(idx), model(idx))


@COMPILED
def test_the_file_does_not_depend_on_the_kernel(tmp_path):
    files = [
        save_quantized(tmp_path / str(i), quantize(gpt(TIED), "int4", say=quiet, kernels=kernels))
        / "model.safetensors"
        for i, kernels in enumerate([("native",), ("torch",), ()])
    ]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_checkpoint_of_another_scheme_or_of_none_is_refused(tmp_path):
    save_quantized(tmp_path / "int4", quantize(gpt(TIED), "int4", say=quiet))
    assert quantization_of(load_quantized(tmp_path / "int4", "int4").model) == {
        "scheme": "int4",
        "group_size": 32,
    }
    with pytest.raises(ValueError, match=r"is quantized by int4, not int8: quantize the original"):
        load_quantized(tmp_path / "int4", "int8")
    for load in (checkpoint.load, GPT.from_checkpoint):
        with pytest.raises(ValueError, match="is quantized: load it with shared.quantization.load_quantized"):
            load(tmp_path / "int4")
    with pytest.raises(ValueError, match="does not fit the model"):
        checkpoint.load_weights(
            quantize(gpt(TIED), "int8", say=quiet), tmp_path / "int4" / "model.safetensors"
        )
    with pytest.raises(ValueError, match="does not fit the model"):
        checkpoint.load_weights(gpt(TIED), tmp_path / "int4" / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model: .*scale_zero is"):
        checkpoint.load_weights(
            quantize(gpt(TIED), "int4", group_size=64, say=quiet), tmp_path / "int4" / "model.safetensors"
        )
    checkpoint.save(tmp_path / "fp32", gpt(TIED))
    with pytest.raises(ValueError, match="is not quantized: load it with checkpoint.load"):
        load_quantized(tmp_path / "fp32")
    with pytest.raises(ValueError, match="this model is not quantized: save it with checkpoint.save"):
        save_quantized(tmp_path / "m", gpt(TIED))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "said",
    ["int4", {}, {"scheme": "int5"}, {"scheme": "int4", "group_size": 33}, {"scheme": "int4", "bits": 4}],
)
def test_settings_on_disk_that_describe_no_scheme_are_refused(said, tmp_path):
    save_quantized(tmp_path / "m", quantize(gpt(TIED), "int4", say=quiet))
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": said}))
    with pytest.raises(ValueError):
        load_quantized(tmp_path / "m")


# ---- GPTQ


def correlated(samples: int, columns: int, seed: int) -> Tensor:
    return random(samples, 8, seed=seed) @ random(8, columns, seed=99) + 0.1 * random(
        samples, columns, seed=seed + 1
    )


@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_rounding_keeps_products_on_inputs_it_has_not_seen(group_size):
    weight, seen, unseen = random(96, 256), correlated(2000, 256, 1), correlated(500, 256, 3)
    scale, zero = group_ranges(weight, group_size)
    nearest = Int4Weight(weight, group_size).rows(slice(None))
    rounded = gptq_round(weight, seen.T @ seen, scale, zero)
    assert torch.equal(
        Int4Weight(rounded, group_size, (scale, zero)).rows(slice(None)), rounded
    )  # int4 can express it
    loss = lambda w: (unseen @ (w - weight).T).square().mean()
    assert loss(rounded) < 0.3 * loss(nearest)
    assert (rounded - weight).norm() > (nearest - weight).norm()  # at the cost of the single weight


def test_gptq_rounding_is_to_nearest_where_inputs_do_not_hang_together():
    weight = random(16, 64)
    scale, zero = group_ranges(weight, 32)
    nearest = Int4Weight(weight, 32).rows(slice(None))
    torch.testing.assert_close(gptq_round(weight, 3 * torch.eye(64), scale, zero), nearest, atol=0, rtol=0)
    torch.testing.assert_close(gptq_round(weight, torch.zeros(64, 64), scale, zero), nearest, atol=0, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_gptq_recovers_at_least_half_of_what_rounding_to_nearest_loses(config):
    """In nats: how much worse than the model itself its quantized form predicts what the model would say."""
    config = replace(CONFIGS[config], n_embd=128, mlp_hidden=256)
    model = gpt(config)
    draw = torch.Generator().manual_seed(5)
    seen, unseen = (torch.randint(53, (48, 32), generator=draw) for _ in range(2))

    @torch.no_grad()
    def loss(other: GPT) -> float:
        truth = model(unseen).log_softmax(-1)
        return (
            F.kl_div(other(unseen).log_softmax(-1), truth, log_target=True, reduction="none")
            .sum(-1)
            .mean()
            .item()
        )

    nearest = loss(quantize(deepcopy(model), "int4", group_size=128, say=quiet))
    recovered = gptq(deepcopy(model), seen, group_size=128, say=quiet)
    assert quantization_of(recovered) == {"scheme": "int4", "group_size": 128} and not recovered.training
    # A tied embedding is rounded for what the output layer makes of it, not for what reads it.
    assert 0 < loss(recovered) < (0.7 if config.tie_weights else 0.5) * nearest


def test_gptq_gives_int4s_layout(tmp_path):
    tokens = torch.randint(53, (4, 16), generator=torch.Generator().manual_seed(0))
    model, plain = gptq(gpt(TIED), tokens, say=quiet), quantize(gpt(TIED), "int4", say=quiet)
    a, b = model.state_dict(), plain.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
    assert model.token_embedding.packed is model.lm_head.packed
    loaded = load_quantized(save_quantized(tmp_path / "m", model), "int4").model
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize(
    "tokens, damp, message",
    [
        (
            torch.zeros(4, dtype=torch.int64),
            0.01,
            r"tokens must be ids of shape \[texts, time\]; these are torch.int64 of shape \[4\]",
        ),
        (torch.zeros(2, 4), 0.01, "tokens must be ids"),
        (torch.zeros(2, 0, dtype=torch.int64), 0.01, "tokens must be ids"),
        (torch.zeros(2, 4, dtype=torch.int64), 0.0, "damp=0.0: must be above 0"),
    ],
)
def test_gptq_refuses_what_it_cannot_use(tokens, damp, message):
    with pytest.raises(ValueError, match=message):
        gptq(gpt(TIED), tokens, damp=damp, say=quiet)


# ---- SmolLM2


@cache
def smollm2() -> tuple[GPT, str, float, int]:
    model, tokenizer = load_smollm2()
    text = fetch("shakespeare").read_text(encoding="utf-8")[:4000]
    return model, text, sliding_window(model, tokenizer, text, 512, 512).perplexity, num_bytes(model)


@pytest.mark.parametrize(
    "options, size, worse",
    [
        (dict(scheme="int8"), 0.27, 0.015),
        (dict(scheme="int8", group_size=64), 0.27, 0.005),
        (dict(scheme="int4"), 0.16, 0.08),
        (dict(scheme="nf4"), 0.135, 0.7),
    ],
)
def test_smollm2_is_small_and_still_good(options, size, worse):
    """Of 1,189 tokens only; the week's log has the figures of a longer text."""
    model, text, perplexity, whole = smollm2()
    small = quantize(deepcopy(model), **options, say=quiet)
    assert num_bytes(small) <= size * whole
    assert sliding_window(small, model.tokenizer, text, 512, 512).perplexity <= perplexity * (1 + worse)
