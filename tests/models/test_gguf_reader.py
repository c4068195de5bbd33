"""shared/models/gguf_reader.py and `from_gguf` against gguf's writer and transformers; and damaged files."""

import random
import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from shared.models.pretrained import from_gguf, from_hf
from tests.helpers import shake
from tests.models.helpers import (
    build,
    gguf_tensors,
    gguf_tokenizer,
    llama,
    llama_with_tokens,
    same_logits,
    same_tensors,
    train_bpe,
    without,
    write_gguf,
)

FILE_TYPES = {
    "F32": Kind.F32,
    "F16": Kind.F16,
    "BF16": Kind.BF16,
    "Q8_0": Kind.Q8_0,
    "Q4_0": Kind.Q4_0,
    "Q4_1": Kind.Q4_1,
    "Q5_0": Kind.Q5_0,
}
GGUF_MODELS = ["GPT-2", "GPT-2 untied", "Llama", "Llama with grouped queries, tied"]


@torch.no_grad()
def round_matrices(theirs, kind: Kind) -> None:
    """As they are in a file of this kind."""
    if kind == Kind.F32:
        return
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 2:
            transposed = not isinstance(theirs, LlamaForCausalLM) and "c_" in name
            array = (parameter.T if transposed else parameter).contiguous().numpy()
            rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind))
            parameter.copy_(rounded.T if transposed else rounded)


@pytest.mark.parametrize("kind", FILE_TYPES)
@pytest.mark.parametrize("name", GGUF_MODELS)
def test_a_gguf_file_gives_the_logits_of_its_dequantized_weights(name, kind, tmp_path):
    theirs, kind = build(name), FILE_TYPES[kind]
    path = write_gguf(tmp_path / "m.gguf", theirs, kind)
    round_matrices(theirs, kind)
    ours = from_gguf(path)
    assert not ours.training and ours.tokenizer is None
    assert all(p.is_contiguous() and p.requires_grad for p in ours.parameters())
    same_logits(ours, theirs)
    if kind == Kind.F32:
        same = from_hf(theirs)
        said = replace(same.config, mlp_hidden=ours.config.hidden, norm_eps=ours.config.norm_eps)
        assert same_tensors(ours, same) and ours.config == said


@pytest.mark.parametrize("name", GGUF_MODELS[2:])
def test_transformers_reads_the_same_from_a_gguf_file(name, tmp_path):
    write_gguf(tmp_path / "m.gguf", build(name), Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    same_logits(from_gguf(tmp_path / "m.gguf"), theirs)


def test_without_a_rotary_base_it_is_transformers_default(tmp_path):
    torch.manual_seed(0)
    usual = shake(llama(rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}))
    write_gguf(tmp_path / "m.gguf", usual, drop=["add_rope_freq_base"])
    same_logits(from_gguf(tmp_path / "m.gguf"), usual)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    same_logits(from_gguf(tmp_path / "m.gguf"), theirs)


def test_six_bit_weights_are_read_too(tmp_path):
    """gguf cannot write Q6_K, so its blocks are drawn: 210 bytes for 256 weights, the last two of them the
    scale.
    """
    model = llama(hidden_size=256, intermediate_size=256)
    draw = np.random.default_rng(0)
    plain = gguf_tensors(shake(model))

    def six_bits(writer):
        for name, array in plain.items():
            if array.ndim == 2:
                blocks = draw.integers(0, 256, (len(array), array.shape[1] // 256, 210), dtype=np.uint8)
                blocks[..., 192:208] = draw.integers(1, 20, blocks[..., 192:208].shape)
                blocks[..., 208:] = np.frombuffer(np.float16(1e-3).tobytes(), dtype=np.uint8)
                writer.add_tensor(name, blocks.reshape(len(array), -1), raw_dtype=Kind.Q6_K)

    vectors = {name: array for name, array in plain.items() if array.ndim == 1}
    path = write_gguf(tmp_path / "m.gguf", model, change=six_bits, tensors=vectors)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    same_logits(from_gguf(path), theirs, 1e-4)


def scaled_rope(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_factor(2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(change=scaled_rope), "rope.scaling.type='longrope' with .* is more than our GPT can express"),
        (
            dict(change=lambda w: w.add_float32("llama.rope.scaling.attn_factor", 2.0)),
            "llama.rope.scaling.attn_factor=2.0 is more than our GPT can express",
        ),
        (dict(change=lambda w: w.add_expert_count(4)), "expert_count=4"),
        (dict(change=lambda w: w.add_sliding_window(8)), "llama.attention.sliding_window=8"),
        (dict(change=lambda w: w.add_value_length(32)), "attention.value_length=32 with keys of 16"),
        (
            dict(change=lambda w: w.add_tensor("rope_freqs.weight", np.arange(8, dtype=np.float32))),
            "rope_freqs.weight is not the RoPE scaling of a Llama 3",
        ),
        (
            dict(change=lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32))),
            "blk.0.attn_q.bias is not in such a model",
        ),
        (
            dict(change=lambda w: w.add_head_count([4, 4]), drop=["add_head_count"]),
            "n_head=.* is of the wrong kind",
        ),
        (dict(drop=["add_block_count"]), "block_count is missing"),
    ],
)
def test_gguf_settings_and_tensors_that_our_gpt_does_not_have_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_gguf(write_gguf(tmp_path / "m.gguf", build("Llama"), **options))


def test_gguf_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = gguf_tensors(build("Llama"))
    for change, message in (
        (lambda t: without(t, "blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        (lambda t: without(t, "token_embd.weight"), "token_embd.weight is missing"),
        (
            lambda t: t | {"output_norm.weight": np.ones(32, np.float32)},
            r"output_norm.weight is \[32\], not \[64\]",
        ),
        (
            lambda t: t | {"output_norm.weight": np.ones(64, np.int8)},
            "output_norm.weight is of type I8, which .* cannot dequantize",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_gguf(write_gguf(tmp_path / "m.gguf", build("Llama"), tensors=change(dict(tensors))))


def test_a_foreign_file_is_refused_as_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    build("Llama").save_pretrained(tmp_path)
    for content in (
        b"",
        b"GGUF",
        b"GGUF" + bytes(4),
        b"GGUF" + b"\xff" * 400,
        b"not a model at all" * 50,
        (tmp_path / "model.safetensors").read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is cut, damaged or no GGUF file"):
            from_gguf(path)
    with pytest.raises(ValueError, match="is cut, damaged or no GGUF file"):
        from_gguf(tmp_path / "nothing.gguf")


def one_field(kind: int, value: bytes, *, tensors: int = 0, fields: int = 1) -> bytes:
    """A GGUF file of version 3 with one field "a" of this kind."""
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)
    return header + struct.pack("<Q", 1) + b"a" + struct.pack("<I", kind) + value


LIST = 9
"""GGUF's kind of an array: its items' kind, their number, the items."""


@pytest.mark.parametrize(
    "content",
    [
        one_field(LIST, struct.pack("<IQ", LIST, 1) * 20_000),
        one_field(LIST, struct.pack("<IQ", 0, 2**62)),
        one_field(LIST, struct.pack("<IQ", LIST, 2**62)),
        one_field(8, struct.pack("<Q", 2**63)),
        one_field(0, b"x", fields=2**62),
        one_field(0, b"x", tensors=2**62),
        one_field(0, b"x", tensors=1)
        + struct.pack("<Q", 1)
        + b"t"
        + struct.pack("<I4QIQ", 4, *[2**62] * 4, 0, 0),
        one_field(0, b"x", tensors=1) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31),
    ],
    ids=["nested", "array", "arrays", "text", "fields", "tensors", "shape", "dimensions"],
)
def test_sizes_and_depths_beyond_the_file_are_a_value_error(content, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content + bytes(64))
    with pytest.raises(ValueError, match="is cut, damaged or no GGUF file"):
        from_gguf(tmp_path / "m.gguf")


def test_another_architecture_byte_order_or_tensor_type_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", build("Llama"))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"llama", b"mamba"))
    with pytest.raises(ValueError, match="architecture 'mamba' is not one of gpt2, llama"):
        from_gguf(path)
    path.write_bytes(whole.replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(ValueError, match="architecture None"):
        from_gguf(path)
    name = b"output_norm.weight"
    at = whole.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the one dimension
    path.write_bytes(whole[:at] + (99).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ValueError, match=r"99\) is not a valid GGMLQuantizationType"):
        from_gguf(path)
    write_gguf(path, build("Llama"), endian=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="another kind of machine"):
        from_gguf(path)


@pytest.mark.slow
def test_a_gguf_file_cut_anywhere_is_a_value_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama_with_tokens(), tokenizer=gguf_tokenizer(train_bpe()))
    whole = path.read_bytes()
    draw = random.Random(0)
    for end in sorted(draw.sample(range(len(whole) - 64), 60)) + list(range(0, 120, 7)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="m.gguf"):
            from_gguf(path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value")  # scales that the wrong bit has made NaN
def test_a_gguf_header_with_a_wrong_bit_raises_nothing_but_value_error(tmp_path):
    theirs, key = llama_with_tokens(), b"llama.context_length"
    path = write_gguf(tmp_path / "m.gguf", theirs, tokenizer=gguf_tokenizer(train_bpe()))
    whole = path.read_bytes()
    header = len(whole) - sum(array.nbytes for array in gguf_tensors(theirs).values())
    # A longer context is no damage that one could see, but takes memory: it stays.
    value = whole.index(key) + len(key) + 4
    places = [i for i in range(header) if not value <= i < value + 4]
    draw, refused = random.Random(1), 0
    for at in [*draw.sample(places, 200), *range(24), *range(value + 4, value + 100)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        try:
            from_gguf(path)
        except ValueError:
            refused += 1
    assert refused > 150
