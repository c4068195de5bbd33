"""shared/export/gguf.py against gguf's own quantizer and reader, and llama.cpp."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import quantize
from transformers import AutoModelForCausalLM

from shared.export import gguf as gguf_export
from shared.export import save_hf_folder, to_gguf
from shared.models.chat import IM_END, IM_START
from shared.models.gpt import GPT
from shared.models.pretrained import from_gguf
from shared.tokenizers.bpe import END_OF_TEXT
from tests.export.helpers import (
    CHARACTERS,
    CONFIGS,
    TEXT,
    bpe,
    idx,
    made,
    same_logits,
    tokenizer_of,
    with_zeros,
)
from tests.helpers import shake

# ---- GGUF


def permuted(weight: np.ndarray, n_head: int) -> np.ndarray:
    """llama.cpp's order of the channels that RoPE turns: the two halves of each head, by turns."""
    halves = weight.reshape(n_head, 2, -1, weight.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def expected_tensors(name: str, folder: Path) -> dict[str, np.ndarray]:
    """What a GGUF file holds, from transformers' model by gguf's own table of names."""
    model, config = AutoModelForCausalLM.from_pretrained(folder), CONFIGS[name]
    arch = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[
        model.config.model_type
    ]
    names = gguf.get_tensor_name_map(arch, config.n_layer)
    found = {}
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_weights:
            continue
        values = tensor.numpy()
        if (
            model.config.model_type == "gpt2"
            and values.ndim == 2
            and any(part in theirs for part in ("c_attn", "c_proj", "c_fc"))
        ):
            values = values.T
        if model.config.model_type == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            values = permuted(values, config.n_head if "q_proj" in theirs else config.kv_heads)
        found[names.get_name(theirs, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(values)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", gguf_export.KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_ggufs_reader_finds_every_tensor_as_ggufs_own_quantizer_rounds_it(name, kind, tmp_path):
    expected = expected_tensors(name, save_hf_folder(made(name), tmp_path / "m", tokenizer_of(name)))
    read = {
        t.name: t
        for t in GGUFReader(to_gguf(made(name), tmp_path / "m.gguf", tokenizer_of(name), kind)).tensors
    }
    assert read.keys() == expected.keys()
    for tensor, values in expected.items():
        as_kind = Kind[kind] if values.ndim == 2 and tensor != "position_embd.weight" else Kind.F32
        assert read[tensor].tensor_type == as_kind, tensor
        assert read[tensor].shape.tolist() == list(reversed(values.shape)), tensor
        assert np.array_equal(
            read[tensor].data.view(np.uint8).ravel(), quantize(values, as_kind).view(np.uint8).ravel()
        ), tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gguf_file_comes_back_as_our_model_and_tokenizer(name, tmp_path):
    model, tokenizer = made(name), tokenizer_of(name)
    back = from_gguf(to_gguf(model, tmp_path / "deep" / "m.gguf", tokenizer, "F32"))
    expected = with_zeros(model)
    assert back.state_dict().keys() == expected.keys() and all(
        torch.equal(t, expected[n]) for n, t in back.state_dict().items()
    )
    like = dict(
        norm_eps=model.config.norm_eps,
        bias=model.config.bias,
        mlp_hidden=None,
        zero_init=model.config.zero_init,
    )
    assert replace(back.config, **like) == model.config and back.config.norm_eps == np.float32(
        model.config.norm_eps
    )
    same_logits(back(idx()), made(name)(idx()))
    assert [back.tokenizer.encode(text) for text in TEXT.splitlines()] == [
        tokenizer.encode(text) for text in TEXT.splitlines()
    ]
    if (
        tokenizer is CHARACTERS or tokenizer.vocab_size == model.config.vocab_size
    ):  # else the rows left over are special tokens
        assert back.tokenizer.fingerprint == tokenizer.fingerprint
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.gguf"]


def test_a_text_ends_at_the_special_token_and_else_at_a_byte_that_is_in_no_text(tmp_path):
    def metadata(tokenizer):
        reader = GGUFReader(to_gguf(made("GPT-2"), tmp_path / "m.gguf", tokenizer))
        return {
            n.removeprefix("tokenizer.ggml."): f.contents()
            for n, f in reader.fields.items()
            if n.startswith("tokenizer.")
        }

    with_end, without, chat = (
        metadata(bpe()),
        metadata(bpe(special=(), size=320)),
        metadata(bpe(special=(IM_START, IM_END))),
    )
    for found, bos, eos in (
        (with_end, END_OF_TEXT, END_OF_TEXT),
        (without, "\u00ff", "\u00ff"),
        (chat, IM_START, IM_END),
    ):
        assert (found["tokens"][found["bos_token_id"]], found["tokens"][found["eos_token_id"]]) == (bos, eos)
        assert (
            found["add_bos_token"] is found["add_eos_token"] is False
            and len(found["tokens"]) == len(found["token_type"]) == 320
        )
    assert "tokenizer.chat_template" in chat and "tokenizer.chat_template" not in with_end
    assert "eos_token_id" not in metadata(CHARACTERS)


def test_numbers_that_a_kind_cannot_hold_are_refused(tmp_path):
    for value, message in (
        (7e4, "token_embd.weight has values up to 7e\\+04, and F16 can hold"),
        (float("nan"), "not finite"),
    ):
        model = GPT(CONFIGS["GPT-2"])
        model.token_embedding.weight.data[3, 5] = value
        with pytest.raises(ValueError, match=message):
            to_gguf(model, tmp_path / "m.gguf", bpe())
    assert list(tmp_path.iterdir()) == []
    model.token_embedding.weight.data[3, 5] = largest = float(np.finfo(np.float16).max)
    assert from_gguf(to_gguf(model, tmp_path / "m.gguf", bpe())).token_embedding.weight[3, 5] == largest
    assert (
        from_gguf(
            to_gguf(shake(GPT(CONFIGS["GPT-2"])).bfloat16(), tmp_path / "m.gguf", bpe(), "F32")
        ).norm.weight.dtype
        == torch.float32
    )
