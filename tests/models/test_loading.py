"""How models are loaded: in the type in which they are stored, and block by block."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.models.gpt import GPT
from shared.models.pretrained import from_hf, load_model, to_hf
from shared.quantization import quantize, quantizing
from tests.helpers import shake
from tests.models.helpers import OURS, ids, same_tensors


def quiet(line: str) -> None:
    """Says nothing."""


@pytest.fixture
def folder(tmp_path):
    """A Llama at Hugging Face's, in bf16."""
    return to_hf(shake(GPT(OURS["Llama"])).bfloat16(), tmp_path / "m")


def test_weights_stay_in_their_type_unless_another_is_asked_for(folder):
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(folder, dtype=torch.float32).parameters()} == {torch.float32}
    half = load_model(folder, dtype=torch.float16)
    whole = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(half.norm.weight, whole.half())


def test_where_types_are_mixed_it_is_that_of_the_embedding(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, folder / "model.safetensors")
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Llama tied"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_while_it_is_loaded_it_is_what_it_is_quantized_afterwards(name, scheme, tmp_path):
    folder = to_hf(shake(GPT(replace(OURS[name], mlp_hidden=64))), tmp_path / "m")
    at_once = load_model(folder, each=quantizing(scheme, 32, skip=("*.v_proj",), say=quiet))
    afterwards = quantize(from_hf(folder), scheme, 32, skip=("*.v_proj",), say=quiet)
    assert same_tensors(at_once, afterwards)
    with torch.inference_mode():
        assert torch.equal(at_once(ids()), afterwards(ids()))


def test_parts_come_one_after_the_other_with_their_weights(folder):
    seen = []

    def look(model: GPT) -> None:
        there = {name.split(".")[0:2][-1] for name, p in model.named_parameters() if not p.is_meta}
        seen.append(there & {"0", "1", "weight"})

    load_model(folder, each=look)
    assert seen == [{"weight"}, {"weight", "0"}, {"weight", "0", "1"}]


def test_a_layer_that_cannot_be_packed_and_a_pattern_without_a_layer_are_named(folder):
    with pytest.raises(ValueError, match="lm_head.weight has 32 columns"):
        load_model(folder, each=quantizing("int4", 64, say=quiet))
    with pytest.raises(ValueError, match="skip='nothing' fits no linear layer"):
        load_model(folder, each=quantizing("int8", skip=("nothing",), say=quiet))
