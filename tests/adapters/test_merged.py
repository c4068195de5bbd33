"""What becomes of an adapted model: saved, exported, quantized anew, or refused at once."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from shared.adapters.attach import linear_layers, use_adapters
from shared.adapters.prompts import add_prompt
from shared.models.pretrained import to_hf
from shared.quantization.modules import load_quantized, quantization_of, quantize, save_quantized
from tests.adapters.helpers import ALL, CONFIGS, KINDS, adapted, assert_same_bits, bits, close, gpt, learn

FEW = ("q_proj", "v_proj")


def quiet(line: str) -> None:
    pass


def qlora(config: str = "llama", targets=FEW, scheme: str = "nf4", **kind):
    """A quantized model with an adapter on some of its layers, as trained, without kernels."""
    base = quantize(gpt(CONFIGS[config]), scheme, 32, say=quiet, kernels=())
    return learn(add_lora(base, LoRAConfig(r=4, target_modules=targets, **kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_merged_qlora_is_the_plain_model_of_the_sum(config, kind, idx):
    model = qlora(config, **KINDS[kind])
    expected = model(idx)
    weights = {name: layer.weight.detach().clone() for name, layer in linear_layers(model).items()}
    plain = merge_lora(model)
    assert plain is model and quantization_of(plain) is None
    assert bits(plain).keys() == bits(gpt(CONFIGS[config])).keys()
    assert {tensor.dtype for tensor in bits(plain).values()} == {torch.float32}
    for name, weight in weights.items():
        assert torch.equal(plain.get_submodule(name).weight, weight), name
    assert (plain.lm_head.weight is plain.token_embedding.weight) == plain.config.tie_weights
    close(plain(idx), expected)
    once = bits(plain)
    assert_same_bits(bits(merge_lora(plain)), once)


@pytest.mark.parametrize("config", ["gpt2", "llama"])
def test_an_exported_merged_qlora_gives_the_logits_of_the_adapted_model(config, idx, tmp_path):
    model = qlora(config)
    expected = model(idx)
    to_hf(merge_lora(model), tmp_path / "hf")
    close(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(idx).logits, expected)


def test_a_merged_qlora_is_saved_and_quantized_again(idx, tmp_path):
    model = merge_lora(qlora("gpt2"))
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "plain")).model
    assert_same_bits(bits(loaded), bits(model))
    expected = model(idx)
    again = quantize(model, "int8", say=quiet)
    loaded = load_quantized(save_quantized(again, tmp_path / "int8")).model
    assert torch.equal(loaded(idx), again(idx))
    assert (again(idx) - expected).norm() < 0.03 * expected.norm()


def test_with_no_adapter_in_use_a_quantized_base_stays_what_it_is():
    model = merge_lora(use_adapters(qlora(), ()))
    assert_same_bits(bits(model), bits(quantize(gpt(), "nf4", 32, say=quiet, kernels=())))


def test_a_merged_qlora_that_keeps_its_adapters_goes_back(idx):
    model = qlora()
    before = bits(model)
    expected = model(idx)
    merge_lora(model, keep=True)
    close(model(idx), expected)
    assert quantization_of(model) and bits(model).keys() > before.keys()
    close(merge_lora(deepcopy(model))(idx), expected)


UNSAVED = {
    "an adapter": adapted,
    "an adapter on a quantized model": qlora,
    "merged, with the adapters kept": lambda: merge_lora(adapted(), keep=True),
    "quantized, and saved as if it were not": lambda: quantize(gpt(), "int8", say=quiet),
    "a soft prompt": lambda: add_prompt(gpt(), 3),
}


@pytest.mark.parametrize("what", UNSAVED)
def test_a_save_that_nothing_could_load_is_refused_at_once(what, tmp_path):
    model = UNSAVED[what]()
    saves = [checkpoint.save]
    if quantization_of(model) and "as if" not in what:
        saves.append(save_quantized)
    for save in saves:
        with pytest.raises(ValueError, match=r"could not be loaded again.*\(save_adapter\)"):
            save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_of_what_is_refused_is_saved_by_itself(idx, tmp_path):
    model = qlora()
    base = quantize(gpt(), "nf4", 32, say=quiet, kernels=())
    save_quantized(base, tmp_path / "base")
    loaded = load_adapter(base, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(loaded(idx), model(idx))


def test_all_layers_quantized_and_adapted_leave_nothing_packed(idx):
    model = qlora("gpt2", targets=ALL, scheme="int4")
    expected = model(idx)
    close(merge_lora(model)(idx), expected)
    assert quantization_of(model) is None
