"""shared/adapters/peft_lora.py against the library PEFT, both ways, on tiny random GPT-2s and Llamas."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from shared.adapters import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter
from shared.adapters.lora import LoRALinear
from shared.adapters.peft_files import CONFIG, WEIGHTS
from shared.models.pretrained import from_hf
from tests.adapters.helpers import (
    ALL,
    CONFIGS,
    KINDS,
    OTHER,
    TARGETS,
    adapted,
    assert_same_bits,
    bits,
    close,
    gpt,
    hf,
    learn,
    load_strictly,
    peft_model,
    rewrite,
    without_first,
)

BOTH = [(family, targets) for family, kinds in TARGETS.items() for targets in kinds]
OURS = {
    "all": ALL,
    "queries and values": ("q_proj", "v_proj"),
    "keys and up": ("k_proj", "up_proj"),
    "one layer": ("blocks.1.attn.o_proj",),
    "one of three": ("blocks.0.attn.v_proj", "down_proj"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, targets", BOTH)
def test_we_load_pefts_adapters(family, targets, kind, tmp_path, idx):
    theirs = peft_model(family, kind, targets)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(from_hf(hf(family)), tmp_path)
    assert (model(idx) - from_hf(hf(family))(idx)).abs().max() > 0.01
    close(model(idx), theirs(idx).logits)
    close(merge_lora(deepcopy(model))(idx), theirs(idx).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, targets", BOTH)
def test_what_we_loaded_we_write_as_peft_did(family, targets, kind, tmp_path):
    peft_model(family, kind, targets).save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(from_hf(hf(family)), tmp_path / "theirs"), tmp_path / "ours")
    assert_same_bits(load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS))
    ours, theirs = (json.loads((tmp_path / side / CONFIG).read_text()) for side in ("ours", "theirs"))
    same = (
        "peft_type",
        "task_type",
        "bias",
        "inference_mode",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
    )
    for key in same:
        assert ours[key] == theirs[key], key
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        assert ours[key] == theirs[key], key


@pytest.mark.filterwarnings("error:.*(missing|unexpected|fan_in_fan_out).*")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", OURS)
@pytest.mark.parametrize("family", TARGETS)
def test_peft_loads_our_adapters(family, targets, kind, tmp_path, idx):
    base = hf(family)
    config = LoRAConfig(r=3, lora_alpha=5, target_modules=OURS[targets], **KINDS[kind])
    model = learn(add_lora(from_hf(base), config))
    theirs = load_strictly(base, save_adapter(model, tmp_path))
    assert (model(idx) - base(idx).logits).abs().max() > 0.01
    close(theirs(idx).logits, model(idx))
    layers = {name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {f"base_model.model.{name}" for name in written_layers(tmp_path)} == layers


def written_layers(folder: Path) -> set[str]:
    names = load_file(folder / WEIGHTS)
    return {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in names}


@pytest.mark.filterwarnings("error:.*missing.*")
def test_a_key_that_is_missing_would_be_noticed(tmp_path):
    save_adapter(add_lora(from_hf(hf("llama")), LoRAConfig(target_modules=ALL)), tmp_path)
    rewrite(tmp_path, tensors=without_first)
    with pytest.raises(UserWarning, match="missing"):
        load_strictly(hf("llama"), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", OURS)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_we_write_we_read_back_bit_for_bit(config, targets, kind, tmp_path, idx):
    model = adapted(CONFIGS[config], target_modules=OURS[targets], **KINDS[kind])
    again = load_adapter(gpt(CONFIGS[config]), save_adapter(model, tmp_path))
    assert_same_bits(bits(again), bits(model))
    assert torch.equal(again(idx), model(idx))
    assert scales(again) == scales(model)


def scales(model: nn.Module) -> list[float]:
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    return [layer.adapters["default"].config.scale for layer in layers]


def test_peft_on_our_own_model_writes_what_we_load(tmp_path, idx):
    """A GPT that has no equivalent at Hugging Face: PEFT swaps the same linear layers in it."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    theirs = learn(peft.get_peft_model(gpt(OTHER), config).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(gpt(OTHER), tmp_path / "theirs")
    close(model(idx), theirs(idx))
    close(load_strictly(gpt(OTHER), save_adapter(model, tmp_path / "ours"))(idx), model(idx))


def test_ranks_that_differ_by_layer(tmp_path, idx):
    ranks = {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7}
    theirs = peft_model("llama", "rslora", rank_pattern=ranks, alpha_pattern={"up_proj": 11})
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_adapter(from_hf(hf("llama")), tmp_path / "theirs")
    close(model(idx), theirs(idx).logits)
    close(load_strictly(hf("llama"), save_adapter(model, tmp_path / "ours"))(idx).logits, model(idx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_training_goes_as_pefts_does(family, kind, tmp_path, idx):
    """GPT-2's A belongs to queries, keys and values, and is trained as one."""
    theirs = peft_model(family, kind)
    theirs.save_pretrained(tmp_path)
    model = load_adapter(from_hf(hf(family)), tmp_path)
    ours = train(model, lambda: model(idx), idx)
    assert ours == pytest.approx(train(theirs, lambda: theirs(idx).logits, idx), abs=1e-4)
    assert ours[-1] < ours[0] - 0.01


def train(model: nn.Module, logits: Callable[[], Tensor], idx: Tensor) -> list[float]:
    """The losses of five steps of gradient descent on `idx`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(logits()[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
