"""`load_model`: whatever holds a GPT gives the same model, and what holds none is refused."""

import pytest
import torch

from shared import checkpoint
from shared.models import pretrained
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT
from shared.models.pretrained import from_gguf, from_hf, load_model, load_smollm2, to_hf
from shared.quantization.modules import quantization_of, quantize, save_quantized
from shared.tokenizers import CharTokenizer
from tests.helpers import shake
from tests.models.helpers import (
    OURS,
    VOCAB,
    build,
    gguf_tokenizer,
    ids,
    llama_with_tokens,
    model_with_tokens,
    same_tensors,
    train_bpe,
    write_gguf,
)

TOKENIZER = CharTokenizer("".join(map(chr, range(256, 256 + VOCAB))))


@pytest.fixture
def ours() -> GPT:
    torch.manual_seed(0)
    return shake(GPT(OURS["Llama"]))


@pytest.fixture
def smollm2(tmp_path, monkeypatch) -> GPT:
    """What stands in for SmolLM2's file: a small Llama with a BPE tokenizer."""
    path = tmp_path / "smollm2.gguf"
    write_gguf(path, llama_with_tokens(), tokenizer=gguf_tokenizer(train_bpe()))
    monkeypatch.setattr(pretrained, "fetch", lambda name: {"smollm2": path}[name])
    return from_gguf(path)


def test_smollm2_by_its_name(smollm2):
    model = load_model("smollm2")
    assert same_tensors(model, smollm2) and not model.training
    assert model.tokenizer.fingerprint == smollm2.tokenizer.fingerprint


def test_smollm2s_first_blocks(smollm2):
    model, tokenizer = load_smollm2(blocks=1)
    whole = smollm2.state_dict()
    assert model.config.n_layer == 1 and not model.training and model.tokenizer is tokenizer
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    for blocks in (0, 3):
        message = rf"blocks={blocks}: .*smollm2\.gguf has 2, so it must be from 1 to that"
        with pytest.raises(ValueError, match=message):
            load_smollm2(blocks)


def test_a_checkpoint(ours, tmp_path):
    folder = checkpoint.save(ours.train(), tmp_path / "c", TOKENIZER)
    for name in (folder, str(folder)):
        model = load_model(name)
        assert same_tensors(model, ours) and not model.training
        assert model.tokenizer.fingerprint == TOKENIZER.fingerprint


def test_what_a_killed_save_left_of_a_checkpoint(ours, tmp_path):
    checkpoint.save(ours, tmp_path / "c").rename(tmp_path / "c.old")
    assert same_tensors(load_model(tmp_path / "c"), ours)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_a_quantized_checkpoint(scheme, ours, tmp_path):
    quantize(ours, scheme, group_size=32, say=lambda line: None)
    save_quantized(ours, tmp_path / "q", TOKENIZER)
    model = load_model(tmp_path / "q")
    assert quantization_of(model) == quantization_of(ours) and not model.training
    assert model.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert torch.equal(model(ids()), ours(ids()))


def test_a_hugging_face_folder(tmp_path):
    train_bpe().save(str(model_with_tokens(tmp_path) / "tokenizer.json"))
    model = load_model(tmp_path)
    expected = from_hf(tmp_path)
    assert same_tensors(model, expected) and not model.training
    assert model.tokenizer.fingerprint == expected.tokenizer.fingerprint


def test_a_hugging_face_folder_without_a_tokenizer(ours, tmp_path):
    model = load_model(to_hf(ours, tmp_path))
    assert same_tensors(model, ours) and model.tokenizer is None


def test_a_gguf_file(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", build("Llama"))
    model = load_model(path)
    assert same_tensors(model, from_gguf(path)) and not model.training


def test_a_name_on_the_hub(ours, tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append(name)
        return str(to_hf(ours, tmp_path / "hub"))

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "someone/my-model"):
        assert same_tensors(load_model(name), ours)
    assert asked == ["openai-community/gpt2", "someone/my-model"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_device_and_type(ours, tmp_path, dtype):
    """On the device without memory, which every machine has."""
    checkpoint.save(ours, tmp_path / "c")
    model = load_model(tmp_path / "c", device=torch.device("meta"), dtype=dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", dtype)}
    model = load_model(tmp_path / "c", dtype=dtype)
    expected = ours.to(dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", dtype)}
    assert torch.equal(model(ids()), expected(ids()))


def test_without_a_type_weights_stay_as_they_are(ours, tmp_path):
    checkpoint.save(ours, tmp_path / "c")
    assert {p.dtype for p in load_model(tmp_path / "c").parameters()} == {torch.float32}


def no_hub(*args, **kwargs):
    raise AssertionError("a path is not looked for on the hub")


@pytest.mark.parametrize("name", ["empty", "./empty", "none/of/these", "/none", "run"])
def test_a_folder_that_is_no_model_is_refused(name, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "snapshot_download", no_hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    checkpoint.save(ours, tmp_path / "run" / "best")
    with pytest.raises(ValueError, match=f"no checkpoint in {name}, nor another model: give 'smollm2', 'gem"):
        load_model(name)


def test_a_model_that_is_no_gpt_is_refused(tmp_path):
    checkpoint.save(BigramModel(BigramConfig(5)), tmp_path / "b")
    with pytest.raises(ValueError, match="holds a BigramModel, not a GPT"):
        load_model(tmp_path / "b")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_a_cut_file_of_a_folder_is_named(kind, file, ours, tmp_path):
    folder = checkpoint.save(ours, tmp_path / "m") if kind == "checkpoint" else to_hf(ours, tmp_path / "m")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{file} is missing, cut or damaged"):
        load_model(folder)


def test_a_cut_gguf_file_and_a_file_that_is_none_are_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", build("Llama"))
    path.write_bytes(path.read_bytes()[:1000])
    (tmp_path / "notes.txt").write_text("no model")
    for file in (path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=f"{file.name} is cut, damaged or no GGUF file"):
            load_model(file)
