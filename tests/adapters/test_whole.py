"""shared/adapters/whole.py: modules that an adapter trains whole, held against PEFT's `modules_to_save`."""

from copy import deepcopy
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file

from shared.adapters import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from shared.adapters.attach import adapters_by_row, combine_adapters, remove_adapter, use_adapters
from shared.adapters.peft_files import CONFIG, WEIGHTS
from shared.models.pretrained import from_hf
from shared.quantization import quantize
from shared.runtime import read_json
from tests.adapters.helpers import (
    GPT2,
    LLAMA,
    assert_same_bits,
    base_bits,
    bits,
    close,
    gpt,
    hf,
    learn,
    load_strictly,
    lora_config,
)

WHOLE = {"llama": ("lm_head", "norm", "blocks.1.attn_norm"), "gpt2": ("norm", "position_embedding")}
THEIRS = {"llama": ["lm_head", "model.norm"], "gpt2": ["transformer.ln_f", "wpe"]}


def whole(family: str, seed: int = 1):
    """One of Hugging Face's models as ours, with an adapter that trains modules whole, as trained."""
    model = from_hf(hf(family))
    return learn(add_lora(model, lora_config(modules_to_save=WHOLE[family])), seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE)
def test_peft_computes_the_same_with_what_we_saved(family, idx, tmp_path):
    ours = whole(family)
    save_adapter(ours, tmp_path)
    theirs = load_strictly(hf(family), tmp_path)
    with torch.no_grad():
        close(theirs(idx).logits, ours(idx))
        use_adapters(ours, ())
        close(ours(idx), hf(family)(idx).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", THEIRS)
def test_we_compute_the_same_with_what_peft_saved(family, idx, tmp_path):
    config = peft.LoraConfig(
        r=4,
        target_modules=["c_attn"] if family == "gpt2" else ["q_proj"],
        modules_to_save=THEIRS[family],
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )
    torch.manual_seed(0)
    theirs = learn(peft.get_peft_model(hf(family), config).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(from_hf(hf(family)), tmp_path / "theirs")
    with torch.no_grad():
        close(ours(idx), theirs(idx).logits)
    save_adapter(ours, tmp_path / "again")
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "again"))
    assert_same_bits(a, b)


@pytest.mark.parametrize("family", WHOLE)
def test_what_is_saved_is_loaded_bit_for_bit(family, idx, tmp_path):
    ours = whole(family)
    save_adapter(ours, tmp_path)
    again = load_adapter(from_hf(hf(family)), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(idx), ours(idx))


def test_a_new_adapter_changes_nothing_and_trains_only_what_is_its_own():
    base = gpt()
    model = add_lora(deepcopy(base), lora_config(target_modules=("q_proj",), modules_to_save=("lm_head",)))
    idx = torch.arange(10)[None]
    assert torch.equal(model(idx), base(idx))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"lm_head.copies.default.weight"}
    learn(model)
    assert not torch.equal(model(idx), base(idx))
    with torch.no_grad():
        assert torch.equal(use_adapters(model, ())(idx), base(idx))
    assert_same_bits(bits(remove_adapter(model, "default")), bits(base))


@pytest.mark.parametrize("form", ["plain", "quantized"])
def test_merged_it_computes_the_same_with_plain_layers(form, idx):
    base = gpt(replace(LLAMA, n_embd=64))
    if form == "quantized":
        base = quantize(base, "nf4", say=lambda line: None, kernels=())
    model = learn(add_lora(base, lora_config(modules_to_save=("lm_head",))))
    with torch.no_grad():
        expected = model(idx)
        close(merge_lora(model)(idx), expected)
    assert type(model.lm_head).__name__ == "Linear"


def test_several_adapters_have_a_copy_each():
    model = add_lora(gpt(), lora_config(modules_to_save=("norm",)), "a")
    learn(model)
    idx = torch.arange(10)[None]
    with torch.no_grad():
        a = model(idx)
        learn(add_lora(model, lora_config(modules_to_save=("norm",)), "b"), seed=2)
        assert not torch.equal(model(idx), a)
        assert torch.equal(use_adapters(model, "a")(idx), a)
    for wrong in (["a", "b"], {"a": 0.5}):
        with pytest.raises(ValueError, match="used alone"):
            use_adapters(model, wrong)
    with pytest.raises(ValueError, match="a trains modules whole .* cannot be combined"):
        combine_adapters(model, {"a": 1.0}, "c")
    with pytest.raises(ValueError, match="cannot be used for some rows"):
        with adapters_by_row(model, ["a", None]):
            pass


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LLAMA, {"modules_to_save": ("head",)}, "no module is called 'head'; there are: attn_norm, "),
        (LLAMA, {"modules_to_save": ("q_proj",)}, "in target_modules and in modules_to_save"),
        (GPT2, {"modules_to_save": ("lm_head",)}, "shares its weight with another layer"),
        (GPT2, {"modules_to_save": ("token_embedding",)}, "shares its weight with another layer"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_and_the_model_is_as_it_was(config, settings, message):
    model = gpt(config)
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, lora_config(**settings))
    assert_same_bits(bits(model), before)


def test_a_part_of_one_of_hugging_faces_layers_cannot_be_saved_alone(tmp_path):
    model = add_lora(gpt(GPT2), lora_config(target_modules=("up_proj",), modules_to_save=("q_proj",)))
    with pytest.raises(ValueError, match="are one, transformer.h.0.attn.c_attn.weight: name"):
        save_adapter(model, tmp_path)


def test_names_given_as_one_text_are_refused():
    with pytest.raises(ValueError, match="modules_to_save='norm': must be a tuple of names"):
        LoRAConfig(modules_to_save="norm")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_linear_is_what_peft_means_by_it(family, tmp_path):
    config = peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    theirs = set(peft.get_peft_model_state_dict(peft.get_peft_model(hf(family), config)))
    model = add_lora(from_hf(hf(family)), LoRAConfig(target_modules="all-linear"))
    save_adapter(model, tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == theirs
    assert read_json(tmp_path / CONFIG)["modules_to_save"] is None
    assert base_bits(model).keys() == bits(from_hf(hf(family))).keys()
