"""shared/adapters/peft_files.py and files.py: adapters of another base, and files that do not fit."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from shared.adapters import load_adapter, save_adapter
from shared.adapters.attach import adapters_of
from shared.adapters.peft_files import CONFIG, WEIGHTS
from shared.adapters.prompts import PromptTuned, add_prompt
from shared.checkpoint import unshared
from shared.models.pretrained import from_hf, to_hf
from tests.adapters.helpers import (
    GPT2,
    LLAMA,
    adapted,
    assert_same_bits,
    bits,
    gpt,
    rewrite,
    without_first,
)


@pytest.mark.parametrize(
    "base, message",
    [
        (lambda: gpt(seed=1), "trained on another base: the weights here are others"),
        (lambda: gpt(replace(LLAMA, n_embd=64)), r"another base or rank: .* is \[4, 32\], not \[4, 64\]"),
        (lambda: gpt(replace(LLAMA, n_layer=1)), "for another base: it has model.layers.1"),
        (lambda: gpt(GPT2), "for another base: it has model.layers.0.* and this model .*c_attn"),
    ],
)
def test_an_adapter_of_another_base_is_refused(base, message, tmp_path):
    save_adapter(adapted(), tmp_path)
    model = base()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert_same_bits(bits(model), before)


def test_an_adapter_of_a_compiled_model_is_saved_like_that_of_the_model_in_it(tmp_path):
    model = adapted()
    for name, given in (("a", model), ("b", torch.compile(model))):
        save_adapter(given, tmp_path / name)
    assert (tmp_path / "a" / CONFIG).read_bytes() == (tmp_path / "b" / CONFIG).read_bytes()
    assert_same_bits(load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS))


def test_a_prompt_of_another_base_is_refused(tmp_path):
    save_adapter(add_prompt(gpt(GPT2), 3), tmp_path)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(gpt(GPT2, seed=1), tmp_path)
    with pytest.raises(ValueError, match="another base or length"):
        load_adapter(gpt(replace(GPT2, n_embd=64)), tmp_path)
    assert isinstance(load_adapter(gpt(GPT2), tmp_path), PromptTuned)


SETTINGS = [
    ({"r": 8}, "another base or rank"),
    ({"r": "4"}, "r='4' is of the wrong kind"),
    ({"r": 0}, "r=0 must be at least 1"),
    ({"use_dora": True}, "magnitude is missing"),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"bias": "all"}, "bias='all' is more than is done here"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"init_lora_weights": "pissa"}, "changes the base itself"),
    ({"rank_pattern": {"(": 2}}, "is no pattern"),
    ({"alpha_pattern": {r"1\.mlp\.up_proj": -1}}, "alpha=-1 must be a number above 0"),
    ({"alpha_pattern": {"up_proj": "8"}}, "alpha='8' must be a number above 0"),
]
TENSORS = [
    (without_first, "is missing"),
    (lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}, "another base or rank"),
    (lambda t: {k: v * math.nan for k, v in t.items()}, "NaN or inf"),
    (lambda t: {k: v.int() for k, v in t.items()}, "of type torch.int32"),
    (
        lambda t: {k.replace("lora_A", "lora_embedding_A"): v for k, v in t.items()},
        "no tensor of a LoRA on linear layers",
    ),
    (lambda t: {}, "no layers"),
]
HEADERS = [
    ({"own": "{"}, "holds no adapter, or a damaged one"),
    ({"own": "[]"}, "expected JSON objects"),
    ({"own": '{"blocks.0.attn.q_proj": [0, 9, 1]}'}, "notes in the header .* are damaged"),
    ({"base": '{"blocks.0.attn.q_proj": "x"}'}, "header of .* is damaged"),
]
DAMAGES = [
    *((dict(config=settings), message) for settings, message in SETTINGS),
    *((dict(tensors=change), message) for change, message in TENSORS),
    *((dict(metadata=header), message) for header, message in HEADERS),
]


@pytest.mark.parametrize("damage, message", DAMAGES)
def test_files_that_do_not_fit_are_refused(damage, message, tmp_path):
    save_adapter(adapted(), tmp_path)
    rewrite(tmp_path, **damage)
    model = gpt()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not adapters_of(model)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_cut_or_missing_file_is_named(name, tmp_path):
    save_adapter(adapted(), tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="holds no adapter, or a damaged one"):
        load_adapter(gpt(), tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="holds no adapter"):
        load_adapter(gpt(), tmp_path)


def test_a_models_folder_is_not_overwritten(tmp_path):
    to_hf(gpt(), tmp_path)
    with pytest.raises(ValueError, match="holds a model"):
        save_adapter(adapted(), tmp_path)
    assert unshared(from_hf(tmp_path)).keys() == unshared(gpt()).keys()
