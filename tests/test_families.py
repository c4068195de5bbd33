"""What is done with any GPT, done with one of each family: cached decoding at every chunking, a batch of
different lengths, serving, quantization, LoRA, checkpoints, ONNX.
"""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, merge_lora
from shared.export import to_onnx
from shared.export.onnx import OnnxModel
from shared.models.config import GPTConfig, LayerKind
from shared.models.gpt import GPT
from shared.quantization import quantize
from shared.quantization.modules import dequantize
from shared.sampling import generate
from shared.serving.engine import Engine
from shared.serving.generation import Request
from shared.serving.slots import SlotCache
from tests.family_configs import DYNAMIC, FAMILIES, MISTRAL
from tests.helpers import shake

CONFIGS = {**FAMILIES, "Mistral": MISTRAL, "Llama, dynamic scaling": DYNAMIC}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request) -> GPT:
    torch.manual_seed(0)
    return shake(GPT(CONFIGS[request.param]))


def ids(rows: int = 2, time: int = 48) -> torch.Tensor:
    return torch.randint(300, (rows, time), generator=torch.Generator().manual_seed(1))


def test_its_settings_survive_json(model):
    assert GPTConfig(**json.loads(json.dumps(asdict(model.config)))) == model.config


def test_a_later_token_changes_no_earlier_logits(model):
    other = ids().clone()
    other[:, 30:] = 7
    with torch.no_grad():
        short = model(ids()[:, :30])
        # Up to 32 tokens dynamic scaling changes nothing; beyond, a longer text turns otherwise.
        torch.testing.assert_close(model(other[:, :32])[:, :30], short, atol=1e-4, rtol=1e-4)
        if model.config.rope_scaling is None or model.config.rope_scaling.kind != "dynamic":
            torch.testing.assert_close(model(other)[:, :30], short, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_rows_of_different_lengths_are_what_each_is_alone(model):
    lengths = (3, 17, 30)
    cache = SlotCache(model.config, len(lengths))
    rows = ids(len(lengths))
    for slot, length in enumerate(lengths):
        model(rows[slot : slot + 1, :length], cache.rows(slot, [0]))
    last = torch.stack([rows[slot, length] for slot, length in enumerate(lengths)])[:, None]
    together = model(last, cache.rows(0, list(lengths)))
    for slot, length in enumerate(lengths):
        own = model.new_cache()
        model(rows[slot : slot + 1, :length], own)
        alone = model(rows[slot : slot + 1, length : length + 1], own)
        torch.testing.assert_close(together[slot], alone[0], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_packed_in_8_bits_it_computes_with_the_weights_that_these_stand_for(model):
    packed = quantize(shake(GPT(model.config)), "int8", say=lambda line: None, kernels=())
    unpacked = dequantize(quantize(shake(GPT(model.config)), "int8", say=lambda line: None, kernels=()))
    torch.testing.assert_close(packed(ids()), unpacked(ids()), atol=1e-4, rtol=1e-4)


def test_served_beside_others_it_writes_what_it_writes_alone(model):
    prompts = [row[:length].tolist() for row, length in zip(ids(3), (5, 21, 30))]
    engine = Engine(model, slots=2, chunk=8, start=False)  # the third joins where one has left
    running = [engine.submit(Request(prompt, 8, temperature=0)) for prompt in prompts]
    while engine.step():
        pass
    for prompt, generation in zip(prompts, running):
        assert [token.id for token in generation] == list(generate(model, prompt, 8, temperature=0))


@torch.no_grad()
def test_a_merged_adapter_computes_what_it_computes_beside_the_weights(model):
    adapted = add_lora(shake(GPT(model.config)), LoRAConfig(r=2, target_modules=("all-linear",)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    beside = adapted(ids())
    assert (beside - model(ids())).abs().max() > 0.1
    torch.testing.assert_close(merge_lora(adapted)(ids()), beside, atol=1e-3, rtol=1e-3)


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "c")).model
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(ids()), model(ids()))


@pytest.mark.slow
def test_onnx_runtime_writes_the_same_tokens(tmp_path):
    torch.manual_seed(0)
    # In one graph what single families have: soft caps and windows (Gemma 2), layers without RoPE (SmolLM3),
    # a part of it (Phi-4 mini).
    layers = (LayerKind(window=9), LayerKind(rope=False))
    model = shake(GPT(replace(FAMILIES["Gemma 2"], layers=layers, rope_share=0.5)))
    runtime = OnnxModel(to_onnx(model, tmp_path / "m.onnx"), threads=1)
    logits, _ = runtime(ids().numpy().astype(np.int64), runtime.new_cache(2))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(ids()), atol=1e-3, rtol=1e-3)
    prompt = ids(1, 12)[0].tolist()
    assert runtime.generate([prompt], 16)[0] == list(generate(model, prompt, 16, temperature=0))


def test_dynamic_scaling_is_refused_for_onnx(tmp_path):
    with pytest.raises(ValueError, match="dynamic scaling of RoPE .* cannot be a fixed graph"):
        to_onnx(GPT(DYNAMIC), tmp_path / "m.onnx")
