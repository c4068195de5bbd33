"""shared/serving/loading.py: what is served, and how its weights are rounded."""

from dataclasses import replace

import pytest
import torch

from shared import checkpoint
from shared.models.gpt import GPT
from shared.quantization.modules import quantization_of, quantize, save_quantized
from shared.serving.loading import load_served
from tests.helpers import shake
from tests.serving.helpers import CONFIG, TOKENIZER


def saved(folder, **changes) -> str:
    model = shake(GPT(replace(CONFIG, **changes)))
    return str(checkpoint.save(model, folder / "m", TOKENIZER))


@pytest.mark.parametrize(
    ("changes", "settings", "line"),
    [
        ({"n_embd": 64}, {"scheme": "int8", "group_size": 64}, "in groups of 64"),
        ({"n_embd": 32}, {"scheme": "int8", "group_size": 32}, "in groups of 32"),
        ({"n_embd": 24}, None, "stay as they are"),
    ],
    ids=["64", "32", "24"],
)
def test_auto_rounds_to_8_bits_in_the_groups_that_fit_and_says_so(tmp_path, capsys, changes, settings, line):
    model, _ = load_served(saved(tmp_path, **changes, mlp_hidden=64), scheme="auto", device="cpu")
    assert quantization_of(model) == settings
    assert line in capsys.readouterr().out


def test_auto_leaves_what_is_rounded_already(tmp_path, capsys):
    model = quantize(shake(GPT(CONFIG)), "int4", say=lambda line: None)
    save_quantized(model, tmp_path / "m", TOKENIZER)
    loaded, _ = load_served(str(tmp_path / "m"), scheme="auto", device="cpu")
    assert quantization_of(loaded) == {"scheme": "int4", "group_size": 32}
    assert "groups" not in capsys.readouterr().out


def test_none_keeps_the_weights(tmp_path):
    model, _ = load_served(saved(tmp_path), device="cpu")
    assert quantization_of(model) is None and model.lm_head.weight.dtype == torch.float32
