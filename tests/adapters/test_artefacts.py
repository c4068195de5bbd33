"""shared/adapters/artefacts.py: what was trained, loaded at one call by PEFT and transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import checkpoint
from shared.adapters import add_lora, save_adapter
from shared.adapters.artefacts import AdapterCard, base_on_the_hub, save_artefact, save_base, save_whole
from shared.adapters.conversations import conversation
from shared.adapters.instructions import template_for
from shared.adapters.peft_files import rounding_of
from shared.models import pretrained
from shared.models.chat import IM_END, IM_START
from shared.models.gpt import GPT
from shared.models.pretrained import from_hf, to_hf
from shared.quantization import quantize
from shared.tokenizers import BPETokenizer
from tests.adapters.helpers import GPT2, KINDS, LLAMA, OTHER, close, gpt, learn, load_strictly, lora_config
from tests.helpers import synthetic_text
from tests.models.families import build

pytestmark = pytest.mark.slow

CARD = AdapterCard("Mine", {"Data": "talks.jsonl"}, [{"measured": "loss", "value": "1.25"}])
TALK = conversation(
    {
        "messages": [
            {"role": "system", "content": "A castle."},
            {"role": "user", "content": "Who is it?\nSay!"},
            {"role": "assistant", "content": "It is I."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "Toad."},
        ]
    }
)


def tokenizer(chat: bool) -> BPETokenizer:
    special = ("<|endoftext|>", IM_START, IM_END) if chat else ()
    return BPETokenizer.train(synthetic_text(), 320, special_tokens=special)


def base(config=LLAMA, chat: bool = False) -> GPT:
    model = gpt(replace(config, vocab_size=320, block_size=64))
    model.tokenizer = tokenizer(chat)
    return model


def ids() -> torch.Tensor:
    return torch.randint(320, (3, 20), generator=torch.Generator().manual_seed(0))


def logits_of_peft(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoPeftModelForCausalLM.from_pretrained(folder).eval()(ids()).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [GPT2, replace(GPT2, bias=False), LLAMA, replace(LLAMA, qk_norm=True)])
def test_peft_loads_adapter_and_base_at_one_call(kind, config, tmp_path):
    """The base is one of ours: it is written beside the adapter, and named."""
    model = base(config)
    name = save_base(model, tmp_path / "base")
    model = learn(add_lora(model, lora_config(**KINDS[kind])))
    said = save_artefact(model, tmp_path, name, CARD)
    with torch.no_grad():
        expected = model(ids())
    close(logits_of_peft(tmp_path), expected, atol=1e-4)
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path}")' in said
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {name}\n" in card and said in card and "| loss | 1.25 |" in card


def test_a_base_in_hugging_faces_form_is_named_where_it_lies(tmp_path):
    model = base()
    to_hf(model, tmp_path / "theirs")
    name = base_on_the_hub(str(tmp_path / "theirs"), model.config)
    model = learn(add_lora(model, lora_config()))
    save_artefact(model, tmp_path / "adapter", name, CARD)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "theirs")
    with torch.no_grad():
        close(logits_of_peft(tmp_path / "adapter"), model(ids()), atol=1e-4)


def test_a_quantized_base_is_written_as_what_it_stands_for(tmp_path):
    # Without kernels, which round what goes into a packed layer.
    model = quantize(base(replace(LLAMA, n_embd=64)), "nf4", say=lambda line: None, kernels=())
    name = save_base(model, tmp_path / "base")
    model = learn(add_lora(model, lora_config()))
    save_artefact(model, tmp_path, name, CARD)
    with torch.no_grad():
        close(logits_of_peft(tmp_path), model(ids()), atol=1e-4)
    assert rounding_of(tmp_path) == {"scheme": "nf4", "group_size": 64, "double_quant": True}


@pytest.mark.parametrize("chat", [False, True], ids=["play", "chat"])
def test_tokenizer_and_chat_template_beside_it_give_our_ids(chat, tmp_path):
    model = add_lora(base(chat=chat), lora_config())
    save_artefact(model, tmp_path, "someone/base", CARD)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = synthetic_text()[:2000]
    assert theirs(text, add_special_tokens=False)["input_ids"] == model.tokenizer.encode(text)
    for asked in (TALK[:2], TALK[1:2], TALK[:4]):
        rendered = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert rendered == template_for(model.tokenizer).prompt(asked)


def test_a_whole_model_is_a_hugging_face_folder_or_where_it_cannot_be_a_checkpoint(tmp_path):
    model = base()
    save_artefact(model, tmp_path / "llama", None, CARD)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    with torch.no_grad():
        close(theirs(ids()).logits, model(ids()), atol=1e-4)
    other = base(OTHER)
    said = save_artefact(other, tmp_path / "other", None, CARD)
    assert "GPT.from_checkpoint" in said
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "other").model(ids()), other(ids()))


def test_a_base_that_nobody_else_has_is_said_to_be_ours(tmp_path):
    model = base(OTHER)
    assert save_base(model, tmp_path / "base") is None and not (tmp_path / "base").exists()
    said = save_artefact(add_lora(model, lora_config()), tmp_path / "a", None, CARD)
    assert "from shared.adapters import load_adapter" in said


def test_bases_are_called_as_the_hub_calls_them(tmp_path, monkeypatch):
    config = base().config
    checkpoint.save(base(), tmp_path / "ours", tokenizer(False))
    assert base_on_the_hub(str(tmp_path / "ours"), config) is None
    assert base_on_the_hub(str(tmp_path / "model.gguf"), config) is None
    assert base_on_the_hub("smollm2", config) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    save_whole(base(), tmp_path / "theirs")
    assert base_on_the_hub(str(tmp_path / "theirs"), config) == str((tmp_path / "theirs").resolve())
    monkeypatch.setattr(pretrained, "_snapshot", lambda name, download: tmp_path / "theirs")
    assert base_on_the_hub("someone/model", config) == "someone/model"


def test_a_phi3_that_we_write_as_llama_is_no_base_for_our_adapter(tmp_path):
    build("Phi-3").save_pretrained(tmp_path / "phi")
    model = from_hf(tmp_path / "phi")
    assert base_on_the_hub(str(tmp_path / "phi"), model.config) is None
    folder = save_base(model, tmp_path / "base")
    adapted = learn(add_lora(model, lora_config()))
    load_strictly(AutoModelForCausalLM.from_pretrained(folder), save_adapter(adapted, tmp_path / "a"))
