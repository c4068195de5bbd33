"""What models are called, and that every command says the same of what it takes."""

import importlib
from dataclasses import fields
from typing import get_type_hints

import pytest

from shared import checkpoint
from shared.models.gpt import GPT
from shared.models.names import ANY_MODEL, model_label, named_run, run_slug
from shared.models.pretrained import load_model
from tests.models.helpers import OURS, ids

COMMANDS = {
    "shared.models.__main__": "Settings",
    "shared.quantization.__main__": "Settings",
    "shared.adapters.sft": "SFTSettings",
    "shared.serving.__main__": "Settings",
    "shared.serving.chat": "ChatSettings",
    "shared.export.__main__": "Settings",
    "shared.zero_shot.__main__": "Settings",
}


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_says_the_same_of_its_model(module):
    settings = getattr(importlib.import_module(module), COMMANDS[module])
    assert "model" in {field.name for field in fields(settings)}
    (argument,) = get_type_hints(settings, include_extras=True)["model"].__metadata__
    assert argument.help.endswith(ANY_MODEL) and "gemma3-270m" in ANY_MODEL


def test_runs_with_models_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").touch()
    slugs = {run_slug(str(tmp_path / name / "m.gguf")) for name in ("a", "b")}
    assert len(slugs) == 2 and all(slug.startswith("m-") and "/" not in slug for slug in slugs)
    for slug in slugs:
        assert model_label(slug) == slug == run_slug(slug)
    assert named_run("smollm2", "memory") == "memory" and run_slug("smollm2") == "smollm2"


def test_the_first_blocks_of_a_checkpoint(tmp_path):
    whole = GPT(OURS["Llama"]).eval()
    checkpoint.save(whole, tmp_path / "c")
    first = load_model(tmp_path / "c", blocks=1)
    assert first.config.n_layer == len(first.blocks) == 1
    expected = whole.state_dict()
    assert all(bool((tensor == expected[name]).all()) for name, tensor in first.state_dict().items())
    assert first(ids()).shape == whole(ids()).shape
    cache = first.new_cache(batch_size=2, max_length=40)
    first(ids(), cache)
    for blocks in (0, 3):
        with pytest.raises(ValueError, match=f"blocks={blocks}: .* has 2, so it must be from 1 to that"):
            load_model(tmp_path / "c", blocks=blocks)
