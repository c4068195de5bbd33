"""A quantized model's codes in a GGUF file, against gguf's own quantizer and reader."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import quantize as ggufs_quantize

from shared.export import to_gguf
from shared.models.pretrained import from_gguf, from_hf
from shared.quantization.gptq import gptq
from shared.quantization.modules import dequantize, quantize, save_quantized
from tests.export.helpers import CONFIGS, idx, made, run, same_logits, tokenizer_of, with_zeros

QUANTIZED = {
    "int8": dict(scheme="int8"),
    "int8 in groups of 64": dict(scheme="int8", group_size=64),
    "int4": dict(scheme="int4"),
    "int4 in groups of 64": dict(scheme="int4", group_size=64),
    "all but the output layer": dict(scheme="int4", skip=("lm_head",)),
}


def quiet(line: str) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [(), ("torch",), ("native",)])
@pytest.mark.parametrize("how", QUANTIZED)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_holds_the_quantized_weights_but_for_the_scales_last_bits(name, how, kernels, tmp_path):
    model = quantize(deepcopy(made(name)), **QUANTIZED[how], say=quiet, kernels=kernels)
    back = from_gguf(to_gguf(model, tmp_path / "m.gguf", tokenizer_of(name), "F32"))
    expected = with_zeros(dequantize(model))
    for parameter, tensor in back.state_dict().items():
        # fp16 rounds d and m by 2 ** -11 of themselves; other levels would be off by up to a thirtieth.
        largest = float(expected[parameter].abs().amax())
        torch.testing.assert_close(tensor, expected[parameter], atol=largest / 512, rtol=0)
    same_logits(back(idx()), model(idx()), 0.03)


def test_gptqs_codes_are_kept_where_rounding_again_would_lose_them(tmp_path):
    name = "Llama with grouped queries"
    model = gptq(deepcopy(made(name)), idx(16, 64), group_size=64, say=quiet)
    path = to_gguf(model, tmp_path / "m.gguf", tokenizer_of(name))
    read = {t.name: t for t in GGUFReader(path).tensors}
    matrices = [t for t in read.values() if len(t.shape) == 2]
    assert {t.tensor_type for t in matrices} == {Kind.Q4_1}
    ours = dequantize(deepcopy(model))
    kept = from_gguf(path).blocks[0].mlp.up_proj.weight
    weight = ours.blocks[0].mlp.up_proj.weight
    again = torch.from_numpy(np.ascontiguousarray(ggufs_quantize(weight.detach().numpy(), Kind.Q4_1)))
    codes = read["blk.0.ffn_up.weight"].data.reshape(again.shape)
    assert not np.array_equal(codes, again.numpy())
    assert (kept - weight).abs().max() < 1e-3 * weight.abs().max()


def test_what_gguf_cannot_hold_is_refused(tmp_path):
    nf4 = quantize(deepcopy(made("GPT-2")), "nf4", say=quiet)
    with pytest.raises(ValueError, match=r"is in nf4, which GGUF has no type for: quantize the original"):
        to_gguf(nf4, tmp_path / "m.gguf", tokenizer_of("GPT-2"))
    mixed = quantize(deepcopy(made("GPT-2")), "int4", skip=("*.q_proj",), say=quiet)
    with pytest.raises(ValueError, match=r"attn_qkv.weight is made of .*quantize all of them, or skip all"):
        to_gguf(mixed, tmp_path / "m.gguf", tokenizer_of("GPT-2"))
    large = deepcopy(made("GPT-2"))
    large.blocks[0].mlp.up_proj.weight.data[0, 0] = 1e9
    with pytest.raises(ValueError, match=r"up_proj.weight has scales up to .*with --kind F32"):
        to_gguf(quantize(large, "int8", say=quiet), tmp_path / "m.gguf", tokenizer_of("GPT-2"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_quantized_checkpoint_is_exported_from_the_command_line(format, tmp_path):
    name = "Llama with grouped queries"
    model = quantize(deepcopy(made(name)), "int4", say=quiet)
    folder = save_quantized(model, tmp_path / "q", tokenizer_of(name))
    said = run("--model", str(folder), "--format", format, "--out", str(tmp_path / "out"))
    assert ("hf has no form for int4: its weights are written as 16-bit numbers" in said) == (format == "hf")
    load = {"hf": from_hf, "gguf": from_gguf}[format]
    back = load(tmp_path / "out", dtype=torch.float32)
    same_logits(back(idx()), model(idx()), 0.03)
