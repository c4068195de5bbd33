"""shared/quantization/modules.py: models that compute with packed weights, in memory and on disk."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shared import checkpoint
from shared.assets import fetch
from shared.evaluation import score_text
from shared.models.gpt import GPT
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.models.pretrained import load_smollm2, to_hf
from shared.quantization.gptq import gptq
from shared.quantization.modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    load_quantized,
    num_bytes,
    quantization_of,
    quantize,
    save_quantized,
)
from shared.quantization.packing import SCHEMES
from shared.sampling import generate
from tests.quantization.helpers import CONFIGS, SETTINGS, TIED, TOKENIZER, UNTIED, gpt, quiet

IN_A_BLOCK = (
    *("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"),
    *("mlp.up_proj", "mlp.down_proj"),
)


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
    # More rows than go through the kernel at once, and then three at a time.
    idx = torch.randint(53, (3, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = unpacked(idx), model(idx)
        past = model.new_cache(batch_size=3)
        stepwise = torch.cat([model(part, past) for part in idx.split([20] + [1] * 10, dim=1)], 1)
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
    assert any(name.startswith("token_embedding") for name in names)
    assert not any(name.startswith("lm_head") for name in names)
    untied = quantize(gpt(UNTIED), scheme, say=quiet)
    assert isinstance(untied.token_embedding, nn.Embedding) and isinstance(untied.lm_head, QuantizedLinear)


def test_bytes_are_counted_as_they_lie_on_the_disk(tmp_path):
    for scheme in SCHEMES:
        model = quantize(gpt(TIED), scheme, say=quiet)
        save_quantized(model, tmp_path / scheme)
        file = tmp_path / scheme / "model.safetensors"
        stored = sum(t.nbytes for t in load_file(file).values())
        assert stored == num_bytes(model) <= file.stat().st_size
        # And in memory: there is no second copy of a weight.
        held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
        assert sum(held.values()) <= num_bytes(model) * 1.1 + 4096


def test_any_model_with_linear_layers_is_quantized():
    torch.manual_seed(0)
    model = WindowMLP(WindowMLPConfig(vocab_size=53))
    idx = torch.randint(53, (2, 20))
    expected = model(idx)
    got = quantize(model, "int8", say=quiet)(idx)
    assert quantization_of(model) == {"scheme": "int8"}
    assert 0 < (got - expected).norm() < 0.02 * expected.norm()


def test_a_quantized_model_writes_text_with_a_cache_and_without_the_same():
    for scheme in ("int8", "nf4"):
        model = quantize(gpt(TIED), scheme, say=quiet)
        cached = list(generate(model, [1, 2, 3], 20, temperature=0, use_cache=True))
        uncached = list(generate(model, [1, 2, 3], 20, temperature=0, use_cache=False))
        assert cached == uncached and len(cached) == 20


def test_it_trains_nothing_but_what_was_not_quantized():
    model = quantize(gpt(TIED), "nf4", say=quiet)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters()}
    assert all("norm" in name or "bias" in name or "position" in name for name in trained)


TOO_WIDE = "q_proj.weight has 64 columns, which groups of 128 do not divide: choose 32 or 64"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scheme="int5"), "no scheme is called 'int5'; there are: int8, int4, nf4"),
        (dict(scheme="int4", group_size=48), "group_size=48: must be one of 32, 64, 128, 256"),
        (dict(scheme="int4", group_size=128), TOO_WIDE),
        (dict(scheme="int8", group_size=128), TOO_WIDE),
        (dict(scheme="int4", double_quant=True), "only nf4 has it"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_the_model_is_left_alone(options, message):
    model = gpt(TIED)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        quantize(model, **options, say=quiet)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


def test_a_width_that_no_group_divides_is_refused():
    message = "has 40 columns, which groups of 32 do not divide: its in_features must be a multiple of 32"
    with pytest.raises(ValueError, match=message):
        quantize(GPT(replace(TIED, n_embd=40)), "int4", say=quiet)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("work", ["int8", "int4", "nf4", "gptq"])
def test_weights_that_are_not_finite_are_named(work, value):
    model = gpt(TIED)
    model.blocks[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match="1 values that are NaN or inf") as error:
        if work == "gptq":
            gptq(model, torch.zeros(1, 4, dtype=torch.int64), say=quiet)
        else:
            quantize(model, work, say=quiet)
    assert "blocks.1.mlp.up_proj.weight" in str(error.value)
    assert isinstance(model.blocks[0].attn.q_proj, nn.Linear)


def test_models_that_cannot_be_quantized_are_refused():
    with pytest.raises(ValueError, match=r"quantized already \(int8\): quantize the original"):
        quantize(quantize(gpt(TIED), "int8", say=quiet), "int4", say=quiet)
    with pytest.raises(ValueError, match="this LayerNorm has no linear layers"):
        quantize(nn.LayerNorm(4), "int8", say=quiet)
    with pytest.raises(ValueError, match="export it before it is quantized"):
        to_hf(quantize(gpt(UNTIED), "int8", say=quiet), "nowhere")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", SETTINGS)
def test_a_quantized_model_comes_back_bit_for_bit(config, options, tmp_path):
    model = quantize(gpt(CONFIGS[config]), **SETTINGS[options], say=quiet)
    save_quantized(model, tmp_path / "m", TOKENIZER, {"val_loss": 1.5})
    torch.manual_seed(1)
    loaded = load_quantized(tmp_path / "m")
    assert loaded.metrics == {"val_loss": 1.5} and loaded.model.tokenizer.fingerprint == TOKENIZER.fingerprint
    saved = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert quantization_of(loaded.model) == quantization_of(model) == saved
    with torch.no_grad():
        for idx in (torch.arange(4)[None], torch.arange(30)[None]):
            assert torch.equal(loaded.model(idx), model(idx))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", SETTINGS)
def test_checkpoint_load_and_from_checkpoint_give_the_same_quantized_model(config, options, tmp_path):
    model = quantize(gpt(CONFIGS[config]), **SETTINGS[options], say=quiet)
    save_quantized(model, tmp_path / "m", TOKENIZER)
    idx = torch.arange(30)[None]
    for loaded in (checkpoint.load(tmp_path / "m").model, GPT.from_checkpoint(tmp_path / "m")):
        assert quantization_of(loaded) == quantization_of(model) and not loaded.training
        assert torch.equal(loaded(idx), model(idx))


def test_a_form_that_nothing_has_registered_is_named(tmp_path, monkeypatch):
    """As where shared.quantization is not imported."""
    save_quantized(quantize(gpt(TIED), "int4", say=quiet), tmp_path / "m")
    monkeypatch.delitem(checkpoint.FORMS, "quantization")
    with pytest.raises(
        ValueError, match="was saved with quantization, .*import the one .*shared.quantization"
    ):
        checkpoint.load(tmp_path / "m")


def test_a_checkpoint_of_another_scheme_or_of_none_is_refused(tmp_path):
    save_quantized(quantize(gpt(TIED), "int4", say=quiet), tmp_path / "int4")
    loaded = load_quantized(tmp_path / "int4", "int4").model
    assert quantization_of(loaded) == {"scheme": "int4", "group_size": 32}
    with pytest.raises(ValueError, match=r"is quantized by int4, not int8: quantize the original"):
        load_quantized(tmp_path / "int4", "int8")
    weights = tmp_path / "int4" / "model.safetensors"
    with pytest.raises(ValueError, match="does not fit the model"):
        checkpoint.load_weights(quantize(gpt(TIED), "int8", say=quiet), weights)
    with pytest.raises(ValueError, match="does not fit the model"):
        checkpoint.load_weights(gpt(TIED), weights)
    with pytest.raises(ValueError, match="does not fit the model: .*scale_zero is"):
        checkpoint.load_weights(quantize(gpt(TIED), "int4", group_size=64, say=quiet), weights)
    checkpoint.save(gpt(TIED), tmp_path / "fp32")
    with pytest.raises(ValueError, match="is not quantized: load it with checkpoint.load"):
        load_quantized(tmp_path / "fp32")
    with pytest.raises(ValueError, match="this model is not quantized: save it with checkpoint.save"):
        save_quantized(gpt(TIED), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "said",
    ["int4", {}, {"scheme": "int5"}, {"scheme": "int4", "group_size": 33}, {"scheme": "int4", "bits": 4}],
)
def test_settings_on_disk_that_describe_no_scheme_are_refused(said, tmp_path):
    save_quantized(quantize(gpt(TIED), "int4", say=quiet), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization": said}))
    with pytest.raises(ValueError):
        load_quantized(tmp_path / "m")


@cache
def smollm2() -> tuple[GPT, str, float, int]:
    model, _ = load_smollm2()
    text = fetch("shakespeare").read_text(encoding="utf-8")[:4000]
    return model, text, score_text(model, text, block_size=512, stride=512).perplexity, num_bytes(model)


@pytest.mark.slow
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
    assert score_text(small, text, block_size=512, stride=512).perplexity <= perplexity * (1 + worse)


@pytest.mark.parametrize("by", ["nearest", "gptq"])
@pytest.mark.parametrize(
    "skip, left",
    [
        (("lm_head",), {"lm_head"}),
        (("blocks.0.*", "*.down_proj"), {"blocks.1.mlp.down_proj"} | {f"blocks.0.{n}" for n in IN_A_BLOCK}),
    ],
)
def test_layers_that_are_skipped_stay_as_they_are_on_disk_too(by, skip, left, tmp_path):
    original = gpt(TIED)
    if by == "gptq":
        model = gptq(gpt(TIED), torch.arange(48).view(2, 24), skip=skip, say=quiet)
    else:
        model = quantize(gpt(TIED), "int4", skip=skip, say=quiet)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears.keys() == left
    for name, linear in linears.items():
        assert torch.equal(linear.weight, original.get_submodule(name).weight)
    assert (model.lm_head.weight is model.token_embedding.weight) == ("lm_head" in left)
    save_quantized(model, tmp_path / "m")
    loaded = load_quantized(tmp_path / "m").model
    idx = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(loaded(idx), model(idx))
    saved = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert set(saved["skip"]) == left


def test_a_pattern_that_fits_nothing_or_everything_is_refused():
    with pytest.raises(
        ValueError, match=r"skip='head' fits no linear layer; there are: blocks.0.attn.q_proj"
    ):
        quantize(gpt(TIED), "int8", skip=("head",), say=quiet)
    with pytest.raises(ValueError, match=r"skip=\* leaves no linear layer"):
        quantize(gpt(TIED), "int8", skip=("*",), say=quiet)
