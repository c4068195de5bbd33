"""What a format cannot hold is named, and nothing is written."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from shared.adapters import LoRAConfig, add_lora
from shared.export import save_hf_folder, to_gguf, to_onnx
from shared.models.config import RopeScaling
from shared.models.gpt import GPT, GPTConfig
from shared.quantization import quantize as quantize_model
from shared.tokenizers import BPETokenizer
from shared.tokenizers.patterns import GPT4_PATTERN
from tests.export.helpers import CHARACTERS, CONFIGS, TEXT, bpe, made

# ---- what is refused

NO_EQUIVALENT = {
    "a window and biases": (
        replace(CONFIGS["Llama with grouped queries"], window=8, bias=True),
        "a llama has no .*window=8",
    ),
    "squared ReLU with RoPE": (
        replace(CONFIGS["Llama with grouped queries"], mlp="relu2"),
        "a llama has no mlp='relu2'",
    ),
    "qk_norm in a GPT-2": (replace(CONFIGS["GPT-2"], qk_norm=True), "a gpt2 has no qk_norm=True"),
    "qk_norm with biases": (
        replace(CONFIGS["Qwen3, as in week 4's modern recipe"], bias=True),
        "a qwen3 has no bias=True",
    ),
    "grouped queries in a GPT-2": (replace(CONFIGS["GPT-2"], n_kv_head=2), "a gpt2 has no n_kv_head=2"),
}
ONLY_GGUF = {
    "dynamic scaling": (
        replace(
            CONFIGS["Llama with grouped queries"],
            rope_scaling=RopeScaling("dynamic", 2.0, CONFIGS["Llama with grouped queries"].block_size // 2),
        ),
        "a llama has no rope_scaling=RopeScaling\\(kind='dynamic'",
    ),
    "the exact GELU": (replace(CONFIGS["GPT-2"], mlp="gelu"), "a gpt2 has no mlp='gelu'"),
    "a Llama with biases": (
        replace(CONFIGS["Llama with grouped queries"], bias=True),
        "a llama has no bias=True",
    ),
}


@pytest.mark.parametrize("name", [*NO_EQUIVALENT, *ONLY_GGUF])
def test_what_a_format_cannot_hold_is_named_and_nothing_is_written(name, tmp_path):
    config, message = (NO_EQUIVALENT | ONLY_GGUF)[name]
    model = GPT(config)
    with pytest.raises(ValueError, match=f"no exact equivalent in GGUF: .*{message}"):
        to_gguf(model, tmp_path / "deep" / "m.gguf", bpe())
    if name in NO_EQUIVALENT:
        with pytest.raises(ValueError, match=f"no exact equivalent at Hugging Face: .*{message}"):
            save_hf_folder(model, tmp_path / "deep" / "m", bpe())
    assert list(tmp_path.iterdir()) == []


TO = {
    "hf": lambda path, model, tokenizer: save_hf_folder(model, path, tokenizer),
    "gguf": lambda path, model, tokenizer: to_gguf(model, path, tokenizer),
    "onnx": lambda path, model, tokenizer: to_onnx(model, path),
}


@pytest.mark.parametrize(
    "format, change",
    [(f, lambda m: add_lora(m, LoRAConfig())) for f in TO]
    + [(f, lambda m: quantize_model(m, "int8")) for f in TO if f != "gguf"],
)
def test_swapped_layers_are_refused(format, change, tmp_path):
    model = GPT(CONFIGS["GPT-2"])
    change(model)
    with pytest.raises(ValueError, match="merge adapters, or export it before it is quantized"):
        TO[format](tmp_path / "m", model, bpe())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "a model is exported with its tokenizer"),
        (bpe(special=(), size=330), "the tokenizer has 330 tokens and the model 320"),
        (BPETokenizer.train(TEXT, 300, r"\w+|\W+"), "for cutting text"),
        (
            BPETokenizer([(b"a", b"b")], special_tokens=["ab"]),
            "the special token 'ab' is written like an ordinary one",
        ),
    ],
    ids=["none", "too large", "a rule of its own", "a special token like a word"],
)
@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_tokenizers_that_do_not_fit_are_refused(format, tokenizer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TO[format](tmp_path / "m", made("GPT-2"), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_more_that_gguf_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="for cutting text is none of llama.cpp's"):
        to_gguf(made("GPT-2"), tmp_path / "m", bpe(GPT4_PATTERN))
    with pytest.raises(ValueError, match="kind='Q5_K' is not one of F32, F16, Q8_0, Q4_0"):
        to_gguf(made("GPT-2"), tmp_path / "m", bpe(), "Q5_K")
    narrow = GPT(GPTConfig(vocab_size=320, block_size=8, n_layer=1, n_head=2, n_embd=40))
    with pytest.raises(
        ValueError,
        match=(
            "Q8_0 packs 32 weights of a row together: token_embd.weight has rows of 40, no multiple of 32:"
            " use F16"
        ),
    ):
        to_gguf(narrow, tmp_path / "m", bpe(), "Q8_0")
    vocab = {i: bytes([i]) for i in range(128)}
    with pytest.raises(ValueError, match="llama.cpp needs a token that ends a text"):
        to_gguf(made("GPT-2"), tmp_path / "m", BPETokenizer([], vocab=vocab))
    assert list(tmp_path.iterdir()) == []
    for format in ("gguf", "onnx"):
        with pytest.raises(ValueError, match="is a folder: give the name of a file"):
            TO[format](tmp_path, made("GPT-2"), bpe())


@pytest.mark.parametrize(
    "format", ["gguf", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hf", "onnx"))]
)
def test_every_file_is_synced_whole_before_it_gets_its_name(format, tmp_path, monkeypatch):
    synced: dict[int, int] = {}  # by inode: how long the file was
    named: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def noted_sync(handle):
        status = os.fstat(handle)
        synced[status.st_ino] = status.st_size
        fsync(handle)

    def check(path):
        for file in [path, *path.rglob("*")]:
            status = file.stat()
            assert file.is_dir() or synced.get(status.st_ino) == status.st_size, file.name
            named.append(file.name)

    def noted_replace(old, new):
        check(Path(old))
        replace(old, new)

    def noted_rename(old, new):
        check(old)
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(Path, "rename", noted_rename)
    TO[format](tmp_path / "m", made("Llama with grouped queries"), CHARACTERS)
    assert named


@pytest.mark.parametrize(
    ("format", "where"),
    [
        ("hf", "shared.export.huggingface.model_card"),
        ("gguf", "shared.export.gguf.quantize"),
        ("onnx", "torch.onnx.export"),
    ],
)
def test_an_export_that_fails_leaves_what_was_there_and_nothing_else(format, where, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if format == "hf":
        save_hf_folder(made("GPT-2"), tmp_path / "m", bpe())
    else:
        (tmp_path / "m").write_bytes(b"before")
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="No space left"):
        TO[format](tmp_path / "m", made("Llama with grouped queries"), CHARACTERS)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before and len(
        list(tmp_path.iterdir())
    ) == 1
