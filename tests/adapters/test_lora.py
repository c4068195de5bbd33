"""shared/adapters/lora.py: the laws of one adapter, of merging it, and of one on a quantized layer."""

from copy import deepcopy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from shared.adapters import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from shared.adapters.attach import adapters_of, linear_layers, unmerge_lora, use_adapters
from shared.adapters.lora import LoRALinear, lora_scale
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.models.pretrained import to_hf
from shared.quantization import quantize
from shared.quantization.modules import QuantizedLinear
from shared.sampling import generate
from tests.adapters.helpers import (
    ALL,
    CONFIGS,
    KINDS,
    adapted,
    assert_same_bits,
    base_bits,
    bits,
    close,
    gpt,
    learn,
)


def next_token_loss(model: nn.Module, idx: Tensor) -> Tensor:
    return F.cross_entropy(model(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_nothing_changes(kind, config, idx):
    model = gpt(CONFIGS[config])
    before = bits(model)
    expected = model(idx)
    add_lora(model, LoRAConfig(target_modules=ALL, **KINDS[kind]))
    assert torch.equal(model(idx), expected)
    assert len(adapters_of(model)) == 1
    assert_same_bits(base_bits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_values_have_the_size_that_pefts_have(kind):
    """A's are uniform, within 1 / √in_features; B's are 0."""
    model = nn.ModuleDict({"up": nn.Linear(1024, 64)})
    config = peft.LoraConfig(r=32, target_modules=["up"], **KINDS[kind])
    torch.manual_seed(0)
    theirs = peft.get_peft_model(deepcopy(model), config).base_model.model["up"]
    add_lora(model, LoRAConfig(r=32, target_modules=("up",), **KINDS[kind]))
    ours = model["up"].adapters["default"]
    for a in (ours.lora_A, theirs.lora_A["default"].weight):
        assert a.shape == (32, 1024)
        assert a.abs().max().item() == pytest.approx(1024**-0.5, rel=1e-3)
        assert a.std().item() == pytest.approx((3 * 1024) ** -0.5, rel=0.02)
    assert not ours.lora_B.any() and not theirs.lora_B["default"].weight.any()


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_dropout_acts_where_pefts_does(kind):
    """With DoRA on what the base's weight multiplies too, but for the base's own output."""
    base = nn.ModuleDict({"up": nn.Linear(16, 8)})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up"], lora_dropout=0.5, **KINDS[kind])
    theirs = learn(peft.get_peft_model(deepcopy(base), config)).base_model.model["up"].train()
    add_lora(base, LoRAConfig(r=4, lora_alpha=8, target_modules=("up",), lora_dropout=0.5, **KINDS[kind]))
    layer = base["up"].train()
    ours = layer.adapters["default"]
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora_A["default"].weight)
        ours.lora_B.copy_(theirs.lora_B["default"].weight)
        if ours.magnitude is not None:
            ours.magnitude.copy_(theirs.lora_magnitude_vector["default"].weight)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    outputs = []
    for module in (layer, theirs):
        torch.manual_seed(7)  # the same places are dropped
        outputs.append(module(x))
    close(*outputs)
    assert (outputs[0] - layer.eval()(x)).abs().max() > 0.1


def test_dora_on_rows_of_zeros_stays_finite():
    model = nn.ModuleDict({"up": nn.Linear(8, 4, bias=False)})
    nn.init.zeros_(model["up"].weight)
    layer = add_lora(model, LoRAConfig(r=2, target_modules=("up",), use_dora=True))["up"]
    y = layer(torch.ones(3, 8))
    y.sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.adapters.parameters())
    assert merge_lora(model)["up"].weight.isfinite().all()


def test_what_an_adapter_is_comes_back_with_its_file(tmp_path):
    settings = {"r": 3, "lora_alpha": 5.0, "lora_dropout": 0.3, "use_rslora": True}
    model = add_lora(gpt(), LoRAConfig(target_modules=("q_proj", "v_proj"), **settings))
    loaded = adapters_of(load_adapter(gpt(), save_adapter(model, tmp_path)))["default"]
    assert {name: getattr(loaded, name) for name in settings} == settings


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_adapter_and_leaves_the_base_bit_for_bit(kind, idx):
    model = gpt()
    before = bits(model)
    add_lora(model, LoRAConfig(r=4, target_modules=ALL, lora_dropout=0.1, **KINDS[kind])).train()
    start = bits(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), 0.01, weight_decay=0.1)
    losses = []
    for _ in range(15):
        loss = next_token_loss(model, idx)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert_same_bits(base_bits(model), before)
    moved = {name for name, t in bits(model).items() if not torch.equal(t, start[name])}
    assert moved == {name for name in start if ".adapters." in name} == trainable.keys()
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "r=0: must be at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"target_modules": "q_proj"}, r"must be a tuple of names, as in \('q_proj',\)"),
        ({"target_modules": ()}, "target_modules is empty"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)


def test_dropout_is_for_training_only(idx):
    model = adapted(lora_dropout=0.5)
    assert torch.equal(model(idx), model(idx))
    assert torch.equal(model(idx), adapted(lora_dropout=0.0)(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_the_scale_of_rslora_keeps_the_size_of_the_change_at_any_rank():
    """Of random A and B the entries of B A grow with √r."""
    generator = torch.Generator().manual_seed(0)
    plain = {}
    rslora = {}
    for r in (4, 256):
        product = torch.randn(200, r, generator=generator) @ torch.randn(r, 200, generator=generator)
        plain[r] = (lora_scale(8, r, False) * product).std().item()
        rslora[r] = (lora_scale(8, r, True) * product).std().item()
    assert rslora[256] == pytest.approx(rslora[4], rel=0.05)
    assert plain[256] == pytest.approx(plain[4] / 8, rel=0.05)


def test_generating_with_a_cache_is_the_same():
    model = adapted()
    cached = list(generate(model, [1, 2], 12, temperature=0))
    assert cached == list(generate(model, [1, 2], 12, temperature=0, use_cache=False))


def test_any_model_with_linear_layers_can_be_adapted():
    torch.manual_seed(0)
    model = WindowMLP(WindowMLPConfig(vocab_size=11))
    names = linear_layers(model)
    add_lora(model, LoRAConfig(r=2, target_modules=tuple(names)))
    layers = linear_layers(model)
    assert all(isinstance(layer, LoRALinear) for layer in layers.values())
    assert layers.keys() == names.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_bfloat16_has_adapters_in_fp32(kind, idx):
    model = learn(add_lora(gpt().bfloat16(), LoRAConfig(r=4, target_modules=ALL, **KINDS[kind])))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    logits = model(idx)
    assert logits.dtype == torch.bfloat16 == merge_lora(model).lm_head.weight.dtype
    assert (model(idx) - logits).norm() < 0.03 * logits.norm()


# ---- merging


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_w_plus_scale_b_a(kind, idx):
    model = adapted(**KINDS[kind])
    expected = model(idx)
    layers = linear_layers(model)
    plain = merge_lora(model)
    for name, layer in layers.items():
        if isinstance(layer, LoRALinear):
            a = layer.adapters["default"]
            weight = layer.base.weight + lora_scale(8, 4, kind == "rslora") * a.lora_B @ a.lora_A
            if kind == "dora":
                weight = a.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
            close(plain.get_submodule(name).weight, weight, 1e-6)
    close(plain(idx), expected)
    assert bits(plain).keys() == bits(gpt()).keys()


@pytest.mark.parametrize("keep", [False, True])
def test_merging_twice_changes_nothing(keep):
    model = merge_lora(adapted(), keep)
    once = bits(model)
    assert_same_bits(bits(merge_lora(model, keep)), once)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_brings_everything_back_bit_for_bit(kind, idx):
    model = adapted(**KINDS[kind])
    before = bits(model)
    expected = model(idx)
    merge_lora(model, keep=True)
    close(model(idx), expected)
    assert not torch.equal(model(idx), expected), "rounding differs, so it was merged"
    assert_same_bits(bits(unmerge_lora(model)), before)
    assert torch.equal(unmerge_lora(model)(idx), expected)


def test_kept_and_then_taken_away_is_the_same_merge():
    model = adapted()
    assert_same_bits(bits(merge_lora(merge_lora(deepcopy(model), keep=True))), bits(merge_lora(model)))


def test_a_merged_model_is_one_that_others_can_read(tmp_path, idx):
    model = adapted()
    with pytest.raises(ValueError, match="merge adapters"):
        to_hf(model, tmp_path)
    to_hf(merge_lora(model), tmp_path)
    close(LlamaForCausalLM.from_pretrained(tmp_path)(idx).logits, model(idx))


def test_merging_with_no_adapter_in_use_is_the_base():
    model = use_adapters(adapted(), ())
    assert_same_bits(bits(merge_lora(model)), bits(gpt()))


# ---- QLoRA


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_round_a_quantized_layer_it_is_the_same_adapter(scheme, kind, idx):
    """As round a plain layer with the quantized one's weight."""
    base = quantize(gpt(), scheme, 32, say=lambda line: None, kernels=())
    plain = gpt()
    with torch.no_grad():
        for name, layer in linear_layers(base).items():
            plain.get_submodule(name).weight.copy_(layer.weight)
    packed = bits(base)
    gradients = []
    for model in (base, plain):
        torch.manual_seed(5)
        learn(add_lora(model, LoRAConfig(r=4, target_modules=ALL, **KINDS[kind])))
        next_token_loss(model, idx).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    close(base(idx), plain(idx))
    adapters = {name for name, p in base.named_parameters() if ".adapters." in name}
    assert gradients[0].keys() == gradients[1].keys() == adapters
    for name in adapters:
        close(gradients[0][name], gradients[1][name])
    assert_same_bits(base_bits(base), packed)
    expected = base(idx)
    close(merge_lora(base)(idx), expected)
    merged = [layer for name, layer in linear_layers(base).items() if name != "lm_head"]
    assert not any(isinstance(layer, QuantizedLinear) for layer in merged)


def test_an_adapter_learned_on_a_quantized_base_goes_on_the_original(tmp_path):
    quantized = quantize(gpt(), "nf4", 32, say=lambda line: None)
    base = learn(add_lora(quantized, LoRAConfig(target_modules=ALL)))
    model = load_adapter(gpt(), save_adapter(base, tmp_path))
    for name, layer in linear_layers(model).items():
        if name != "lm_head":
            assert_same_bits(bits(layer.adapters), bits(base.get_submodule(name).adapters))
