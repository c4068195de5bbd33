"""shared.models.pretrained.load_tokenizer: from wherever a tokenizer lies, without a model's weights."""

import json
import shutil

import pytest
import tokenizers

from shared import checkpoint
from shared.models import pretrained
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import from_hf, load_tokenizer
from shared.tokenizers import BPETokenizer, CharTokenizer, gpt2_tokenizer
from tests.helpers import fuzz, synthetic_text
from tests.models.helpers import (
    gguf_tokenizer,
    llama_with_tokens,
    model_with_tokens,
    train_bpe,
    write_gguf,
)
from tests.models.tokenizer_forms import FORMS, added, template

OURS = BPETokenizer.train(synthetic_text(), 300, special_tokens=("<|endoftext|>", "<s>"))


def silent(text: str) -> None:
    raise AssertionError(text)


def folder_of_theirs(tmp_path):
    """A Hugging Face folder with a tokenizer and no weights."""
    folder = model_with_tokens(tmp_path / "hf")
    train_bpe().save(str(folder / "tokenizer.json"))
    (folder / "model.safetensors").write_bytes(b"no weights are read")
    return folder


def test_a_tokenizer_json_of_hugging_faces(tmp_path):
    theirs = train_bpe()
    theirs.save(str(tmp_path / "t.json"))
    ours = load_tokenizer(tmp_path / "t.json", silent)
    assert isinstance(ours, BPETokenizer) and list(ours.special_tokens) == ["<|end|>", "<|x|>"]
    for text in fuzz(100, seed=5):
        assert ours.encode(f"{text}<|end|>", "all") == theirs.encode(f"{text}<|end|>").ids, ascii(text)


@pytest.mark.parametrize("form", FORMS)
def test_of_todays_families_what_is_saved_is_what_was_loaded(form, tmp_path):
    (tmp_path / "theirs.json").write_text(json.dumps(FORMS[form]()), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "theirs.json", silent)
    tokenizer.save(tmp_path / "ours.json")
    again = load_tokenizer(tmp_path / "ours.json", silent)
    assert again.fingerprint == tokenizer.fingerprint
    tokenizers.Tokenizer.from_file(str(tmp_path / "ours.json")).save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", silent).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("ours", [OURS, CharTokenizer("abc"), BPETokenizer([], r"\w+")], ids=["1", "2", "3"])
def test_ours_as_a_file_and_in_a_checkpoint(ours, tmp_path):
    """The third has no equivalent at Hugging Face."""
    model = GPT(GPTConfig(vocab_size=ours.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=8))
    folder = checkpoint.save(model, tmp_path / "c", ours)
    (folder / "model.safetensors").write_bytes(b"no weights are read")
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"kind": type(ours).__name__, **ours.to_json()}), encoding="utf-8")
    for place in (folder, folder / "tokenizer.json", old, str(folder)):
        assert load_tokenizer(place, silent).fingerprint == ours.fingerprint
    folder.rename(tmp_path / "c.old")  # what a kill in the middle of a save leaves
    assert load_tokenizer(tmp_path / "c", silent).fingerprint == ours.fingerprint


def test_a_hugging_face_folder_with_what_lies_beside_the_file(tmp_path):
    folder = folder_of_theirs(tmp_path)
    config = {"eos_token": "<|x|>", "chat_template": "{{ messages[0].content }}", "clean_up": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    said = []
    tokenizer = load_tokenizer(folder, said.append)
    assert tokenizer.ends == ("<|x|>",) and tokenizer.chat.template == config["chat_template"]
    assert said == [f"{folder}: of its tokenizer are left out: clean_up (tokenizer_config.json)"]
    alone = load_tokenizer(folder / "tokenizer.json", silent)
    assert alone.ends == () and alone.chat is None and alone.merges == tokenizer.merges


def test_a_folder_with_vocab_and_merges(tmp_path):
    train_bpe().model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    tokenizer = load_tokenizer(tmp_path, silent)
    assert tokenizer.encode("12 ab") == train_bpe().encode("12 ab").ids


def test_our_file_in_a_hugging_face_folder_is_ours(tmp_path):
    """Exactly, with what that form does not say; and whatever the files beside it say."""
    ours = BPETokenizer([], special_tokens=["</s>"], ends=["</s>"])
    folder = model_with_tokens(tmp_path / "hf")
    ours.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}', encoding="utf-8")
    for tokenizer in (load_tokenizer(folder, silent), from_hf(folder, silent).tokenizer):
        assert tokenizer.fingerprint == ours.fingerprint


def test_a_gguf_file_whatever_it_is_called(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama_with_tokens(), tokenizer=gguf_tokenizer(train_bpe()))
    expected = pretrained.from_gguf(path, silent).tokenizer
    shutil.copy(path, tmp_path / "model")
    for file in (path, tmp_path / "model"):
        assert load_tokenizer(file, silent).fingerprint == expected.fingerprint
    with pytest.raises(ValueError, match="no tokenizer in .*bare.gguf: give a tokenizer.json"):
        load_tokenizer(write_gguf(tmp_path / "bare.gguf", llama_with_tokens()))


@pytest.mark.slow
def test_by_the_names_of_the_course(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "snapshot_download", no_hub)
    monkeypatch.setattr(pretrained, "build_gpt", silent)  # which would load weights
    smollm2 = load_tokenizer("smollm2", silent)
    assert smollm2.vocab_size == 49152 and "<|im_end|>" in smollm2.special_tokens
    for name in ("gpt2", "gpt2-xl"):
        assert load_tokenizer(name, silent).fingerprint == gpt2_tokenizer().fingerprint
    OURS.save(tmp_path / "gpt2" / "tokenizer.json")
    assert load_tokenizer("gpt2", silent).fingerprint == OURS.fingerprint  # as load_model: a folder first


def no_hub(*args, **kwargs):
    raise AssertionError("the hub is not needed")


def test_a_name_on_the_hub_of_which_no_weights_are_fetched(tmp_path, monkeypatch):
    folder = folder_of_theirs(tmp_path)
    asked = []

    def download(name, revision, allow_patterns, local_files_only):
        asked.append((name, revision, [pattern for pattern in allow_patterns if "safetensors" in pattern]))
        return str(folder)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer("someone/my-model", silent).vocab_size == 350
    assert asked == [("someone/my-model", None, [])]


# ---- what is refused


def theirs_with(tmp_path, **sections) -> str:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(json.loads(train_bpe().to_str()) | sections), encoding="utf-8")
    return str(path)


def test_what_ours_cannot_be_is_refused_with_the_reason(tmp_path):
    path = theirs_with(tmp_path, normalizer={"type": "Lowercase"})
    with pytest.raises(ValueError, match="t.json: ours cannot be its tokenizer: it changes the text first"):
        load_tokenizer(path)
    path = theirs_with(tmp_path, model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0})
    with pytest.raises(ValueError, match="ours cannot be its tokenizer: its model is Unigram"):
        load_tokenizer(path)
    (tmp_path / "spm").mkdir()
    (tmp_path / "spm" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"spm: ours cannot be its tokenizer: of tokenizer.json, .* not enough"
    ):
        load_tokenizer(tmp_path / "spm")
    metadata = gguf_tokenizer(train_bpe(), pre="viking")
    with pytest.raises(ValueError, match="m.gguf: its tokenizer's rule .* tokenizer.ggml.pre='viking'"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", llama_with_tokens(), tokenizer=metadata))


def test_what_ours_leaves_out_is_said(tmp_path):
    after = template("<|x|>", 1)
    after["single"].reverse()
    tokens = [added("<|end|>", 0), added("<|x|>", 1)]
    said = []
    load_tokenizer(theirs_with(tmp_path, post_processor=after, added_tokens=tokens), said.append)
    assert len(said) == 1 and "are left out: the tokens after a text ('<|x|>')" in said[0]


@pytest.mark.parametrize("content", ["", "no tokenizer", "[]", "{}", '{"model": {}}', '{"kind": "X"}'])
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="t.json"):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize("name", ["empty", "./empty", "none/of/these", "/none", "no name"])
def test_a_place_without_a_tokenizer_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "snapshot_download", no_hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"no tokenizer in {name}: give a tokenizer.json, a folder with one"):
        load_tokenizer(name)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    checkpoint.save(GPT(GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=1, n_embd=8)), tmp_path / "c")
    with pytest.raises(ValueError, match="no tokenizer in .*c: give a tokenizer.json"):
        load_tokenizer(tmp_path / "c")


def test_without_a_network_the_message_says_what_to_do(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    with pytest.raises(ValueError, match="neither a folder here nor a model that the Hugging Face hub gives"):
        load_tokenizer("someone/model")
