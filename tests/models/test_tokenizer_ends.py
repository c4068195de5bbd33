"""shared/models/tokenizer_ends.py: what stands before a text, against Hugging Face's libraries; and that no
part of a tokenizer's file is dropped in silence.
"""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import checkpoint
from shared.export import save_hf_folder, to_gguf
from shared.models.chat import CHAT_TEMPLATE, IM_END, IM_START, is_known_template
from shared.models.gpt import GPT
from shared.models.pretrained import from_gguf, from_hf
from shared.models.tokenizer_ends import ends_of_gguf
from shared.sampling import generate
from shared.serving.api import create_app
from shared.tokenizers import BPETokenizer
from shared.tokenizers.base import ends_of
from shared.zero_shot import LMEvalAdapter
from shared.zero_shot.scoring import encode_pair
from tests.expectations.make_smollm2 import metadata
from tests.helpers import fuzz, shake, synthetic_text
from tests.models.helpers import (
    TOKENS,
    gguf_tokenizer,
    llama_with_tokens,
    model_with_tokens,
    train_bpe,
    write_gguf,
)

TEXTS = [*fuzz(300, seed=5), "", "<s>", "a</s> b", synthetic_text(50)]
SPECIAL = ("<s>", "</s>")
S, END = ("<s>", 0), ("</s>", 1)
PROCESSORS = {
    "a template": processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [S]),
    "Llama 3's": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [S]),
        ]
    ),
    "offsets only": processors.ByteLevel(trim_offsets=True),
    "an empty template": processors.TemplateProcessing("$A", "$A $B", []),
}
WITH_MORE = {
    "an end": (
        processors.TemplateProcessing("<s> $A </s>", None, [S, END]),
        "the tokens after a text ('</s>')",
    ),
    "RoBERTa's": (processors.RobertaProcessing(END, S), "the tokens after a text ('</s>')"),
    "only an end": (
        processors.TemplateProcessing("$A </s>", None, [END]),
        "the tokens after a text ('</s>')",
    ),
    "two before": (
        processors.TemplateProcessing("</s> <s> $A", None, [S, END]),
        "the tokens before a text ('</s>', '<s>')",
    ),
    "an ordinary token": (
        processors.TemplateProcessing("a $A", None, [("a", 66)]),
        "the tokens before a text (66)",
    ),
}


def folder_with(folder, processor=None, **config) -> Tokenizer:
    """Writes a model with a tokenizer of Hugging Face's, which is returned."""
    theirs = train_bpe(special=SPECIAL)
    if processor is not None:
        theirs.post_processor = processor
    theirs.save(str(model_with_tokens(folder) / "tokenizer.json"))
    if config:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return theirs


def as_theirs(theirs, ours) -> None:
    """Whether both give the same ids, with what is added and without."""
    for text in TEXTS:
        assert ours.prompt(text)[ours.begins_with is not None :] == ours.encode(text)
        allowed = ours.encode(text, allowed_special="all")
        first = ours.prompt("")
        assert theirs.encode(text, add_special_tokens=True) == first + allowed, ascii(text)
        assert theirs.encode(text, add_special_tokens=False) == allowed, ascii(text)


class Ids:
    """A tokenizer of the library `tokenizers`, with the ids alone."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text, add_special_tokens):
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_token_that_begins_every_text_is_taken_along(name, tmp_path):
    theirs = folder_with(tmp_path, PROCESSORS[name])
    said = []
    ours = from_hf(tmp_path, said.append).tokenizer
    assert said == [] and (ours.begins_with == "<s>") == (theirs.encode("").ids == [0])
    as_theirs(Ids(theirs), ours)


@pytest.mark.parametrize("name", WITH_MORE)
def test_what_else_is_put_round_a_text_is_left_out_aloud(name, tmp_path):
    processor, words = WITH_MORE[name]
    theirs = folder_with(tmp_path, processor)
    said = []
    ours = from_hf(tmp_path, said.append).tokenizer
    assert said == [f"{tmp_path}: of its tokenizer are left out: {words}"]
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text, allowed_special="all")
    added = theirs.encode("").ids
    assert ours.prompt("") == (added[:1] if name in ("an end", "RoBERTa's") else [])


def test_processors_that_add_one_after_the_other_are_left_out_aloud(tmp_path):
    """Hugging Face's tokenizers do not put one's tokens round the other's, as one would think."""
    steps = [processors.TemplateProcessing(f"{token} $A", None, [(token, i)]) for token, i in (S, END)]
    theirs = folder_with(tmp_path, processors.Sequence(steps))
    assert theirs.encode("a").ids == [0, 66]
    said = []
    assert from_hf(tmp_path, said.append).tokenizer.begins_with is None
    words = "what 2 steps of its post_processor do together"
    assert said == [f"{tmp_path}: of its tokenizer are left out: {words}"]


@pytest.mark.slow
@pytest.mark.parametrize("processor", [None, PROCESSORS["a template"]], ids=["plain", "template"])
@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>"},
        {"bos_token": "<s>", "add_bos_token": True},
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": True},
        {"bos_token": "<s>", "add_bos_token": False},
        {"bos_token": "<s>", "add_eos_token": False},
        {"bos_token": None, "add_bos_token": True},
    ],
    ids=repr,
)
def test_tokenizer_config_counts_as_it_does_with_transformers(processor, config, tmp_path):
    folder_with(tmp_path, processor, **config)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    said = []
    as_theirs(theirs, from_hf(tmp_path, said.append).tokenizer)
    assert said == []


def two_files(folder, added=None, **config):
    """vocab.json and merges.txt without the last ten tokens that merges make, and what else is asked for."""
    theirs = train_bpe(special=())
    theirs.model.save(str(model_with_tokens(folder)))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    kept = {token: i for token, i in vocab.items() if i < TOKENS - 10}
    (folder / "vocab.json").write_text(json.dumps(kept), encoding="utf-8")
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (folder / "merges.txt").write_text("\n".join(merges[:-10]) + "\n", encoding="utf-8")
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    config = {"tokenizer_class": "GPT2Tokenizer", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def listed(token, i, **changes):
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {str(i): {"content": token} | plain | changes}


NAMED = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
FIRST = {"<|endoftext|>": TOKENS - 10, "<s>": TOKENS - 9}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("added", "config"),
    [
        (FIRST, NAMED),
        (FIRST, NAMED | {"add_bos_token": True}),
        (FIRST, NAMED | {"add_bos_token": True, "bos_token": {"content": "<s>", "__type": "AddedToken"}}),
        (FIRST, NAMED | {"add_bos_token": False}),
        (None, NAMED | {"added_tokens_decoder": listed("<|endoftext|>", 340) | listed("<s>", 341)}),
    ],
    ids=[
        "added_tokens.json",
        "added_tokens.json, first",
        "first, an object",
        "not first",
        "added_tokens_decoder",
    ],
)
def test_tokens_added_beside_vocab_and_merges_are_taken_along(added, config, tmp_path):
    two_files(tmp_path, added, **config)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    said = []
    ours = from_hf(tmp_path, said.append).tokenizer
    assert said == [] and ours.special_tokens == FIRST
    as_theirs(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("added", "config"),
    [
        ({"<tool>": 340}, {}),
        (None, {"added_tokens_decoder": listed("<tool>", 340, special=False, rstrip=True)}),
        (None, {"added_tokens_decoder": listed("<s>", 340, lstrip=True)}),
    ],
    ids=["plain text", "spaces behind", "spaces before"],
)
def test_added_tokens_are_found_as_transformers_finds_them(added, config, tmp_path):
    two_files(tmp_path, added, **config)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    said = []
    ours = from_hf(tmp_path, said.append).tokenizer
    assert said == []
    for text in [*TEXTS, "a <tool> b", "<tool>\n\n<tool>  c", "a  <s>\t <s> b"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allowed_special="all") == ids, ascii(text)


@pytest.mark.parametrize(
    ("added", "config", "reason"),
    [
        ({"<s>": 341}, NAMED, "no token has the id 340"),
        ({"<s>": 339}, NAMED, "have one id, 339"),
        (None, {"added_tokens_decoder": listed("<s>", 340, single_word=True)}, "'<s>' is found only where"),
        (FIRST, NAMED | {"add_prefix_space": True}, "it puts a space before the text"),
    ],
    ids=["gap", "one id twice", "a word", "a space before"],
)
def test_added_tokens_that_ours_cannot_have_leave_the_tokenizer_out_aloud(added, config, reason, tmp_path):
    two_files(tmp_path, added, **config)
    said = []
    assert from_hf(tmp_path, said.append).tokenizer is None
    assert len(said) == 1 and reason in said[0] and "the model comes without its tokenizer" in said[0]


@pytest.mark.parametrize("names", [["tokenizer.model"], ["vocab.json"], ["merges.txt"], ["vocab.txt"]])
def test_a_tokenizer_of_another_kind_is_left_out_aloud(names, tmp_path):
    model_with_tokens(tmp_path)
    for name in names:
        (tmp_path / name).write_text("{}")
    said = []
    assert from_hf(tmp_path, said.append).tokenizer is None
    assert len(said) == 1 and names[0] in said[0]


# ---- every field of a file


def in_section(*path):
    def change(values):
        for key in path:
            values = values[key]
        values["newest_idea"] = True

    return change


@pytest.mark.parametrize("section", [(), ("model",), ("added_tokens", 0)], ids=repr)
def test_a_field_of_tokenizer_json_that_nobody_knows_is_named(section, tmp_path):
    folder_with(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    in_section(*section)(values)
    file.write_text(json.dumps(values), encoding="utf-8")
    said = []
    model = from_hf(tmp_path, said.append)
    assert len(said) == 1 and (model.tokenizer is None) == bool(section)
    assert "newest_idea" in said[0] or "'<s>' is found only where" in said[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"truncation": {"max_length": 8}}, "truncation of texts"),
        ({"padding": {"pad_id": 0}}, "padding of texts"),
        ({"decoder": {"type": "WordPiece"}}, "its rule for decoding (WordPiece)"),
        ({"post_processor": {"type": "Newest"}}, "what its post_processor of type 'Newest' does"),
    ],
)
def test_a_section_that_ours_has_not_is_named(changes, words, tmp_path):
    folder_with(tmp_path)
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(values), encoding="utf-8")
    said = []
    assert from_hf(tmp_path, said.append).tokenizer is not None
    assert said == [f"{tmp_path}: of its tokenizer are left out: {words}"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"newest_idea": True}, "newest_idea (tokenizer_config.json)"),
        ({"pad_token": "[PAD]"}, "special tokens without an id ('[PAD]')"),
        ({"extra_special_tokens": ["<a>", "<s>"]}, "special tokens without an id ('<a>')"),
    ],
)
def test_what_tokenizer_config_asks_for_and_ours_has_not_is_named(config, words, tmp_path):
    folder_with(tmp_path, **config)
    said = []
    assert from_hf(tmp_path, said.append).tokenizer is not None
    assert len(said) == 1 and words in said[0]


def test_an_end_of_its_own_is_taken_along(tmp_path):
    folder_with(tmp_path, eos_token="</s>")
    tokenizer = from_hf(tmp_path).tokenizer
    assert ends_of(tokenizer) == [tokenizer.special_tokens["</s>"]]


def test_a_chat_template_is_read_from_the_configuration_or_a_file_of_its_own(tmp_path):
    """SmolLM2's is known, and needs no other program; of several named ones the default counts."""
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ d }}"}]
    for given, kept in (("{{ messages }}", "{{ messages }}"), (several, "{{ d }}"), (CHAT_TEMPLATE, None)):
        folder_with(tmp_path, chat_template=given)
        chat = from_hf(tmp_path).tokenizer.chat
        assert (chat and chat.template) == kept
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}", encoding="utf-8")
    assert from_hf(tmp_path).tokenizer.chat.template == "{{ bos_token }}"


@pytest.mark.parametrize(
    ("changes", "begins_with", "words"),
    [
        (dict(add_add_bos_token=True, add_bos_token_id=0), "<s>", None),
        (dict(add_add_bos_token=False, add_bos_token_id=0), None, None),
        (dict(add_bos_token_id=0), None, None),
        (dict(add_add_bos_token=True), None, "the tokens before a text (-1)"),
        (dict(add_add_bos_token=True, add_bos_token_id=70), None, "the tokens before a text (70)"),
        (dict(add_add_eos_token=True, add_eos_token_id=0), None, "the tokens after a text ('<s>')"),
        (dict(add_eos_token_id=1), None, None),
        (dict(add_chat_template="{{ messages }}"), None, None),
        (dict(add_remove_extra_whitespaces=True), None, "tokenizer.ggml.remove_extra_whitespaces"),
    ],
)
def test_a_gguf_files_ends_are_taken_along_or_named(changes, begins_with, words, tmp_path):
    tokenizer = gguf_tokenizer(train_bpe(special=SPECIAL)) | changes
    path = write_gguf(tmp_path / "m.gguf", llama_with_tokens(), tokenizer=tokenizer)
    said = []
    ours = from_gguf(path, said.append).tokenizer
    assert ours.begins_with == begins_with
    assert ours.prompt("a b") == [0] * (begins_with is not None) + ours.encode("a b")
    assert [words in line for line in said] == [True] * (words is not None)


# ---- where it is used, and that it is exported


@pytest.fixture
def beginning() -> BPETokenizer:
    made = BPETokenizer.train(synthetic_text(), 340, special_tokens=("</s>", "<s>"))
    return BPETokenizer(made.merges, special_tokens=made.special_tokens, begins_with="<s>")


@pytest.mark.slow
@torch.no_grad()
def test_text_is_written_and_scored_as_transformers_does_with_the_first_token(beginning, tmp_path):
    torch.manual_seed(0)
    model = shake(from_hf(llama_with_tokens()))
    model.tokenizer = beginning
    folder = save_hf_folder(model, tmp_path / "m", beginning)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = synthetic_text(5)
    inputs = tokenizer(text, return_tensors="pt")
    expected = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
    assert expected[0] == beginning.special_tokens["<s>"]
    ids = beginning.prompt(text)
    assert ids + list(generate(model, ids, 12, temperature=0)) == expected
    assert model.generate(text, 12, temperature=0) == beginning.decode(expected[len(ids) :])
    context, continuation = encode_pair(beginning, text, " and so")
    assert context + continuation == tokenizer(text + " and so")["input_ids"]
    assert LMEvalAdapter(model, beginning).tok_encode(text) == inputs["input_ids"][0].tolist()


@pytest.mark.slow
def test_the_first_token_survives_every_file(beginning, tmp_path):
    config = from_hf(llama_with_tokens()).config
    model = GPT(replace(config, vocab_size=beginning.vocab_size))  # else GGUF fills up the tokenizer
    folder = save_hf_folder(model, tmp_path / "m", beginning)
    as_theirs(AutoTokenizer.from_pretrained(folder), beginning)
    path = to_gguf(model, tmp_path / "m.gguf", beginning)
    beginning.save(tmp_path / "own.json")
    said = []
    for back in (
        from_hf(folder, said.append).tokenizer,
        from_gguf(path, said.append).tokenizer,
        BPETokenizer.load(tmp_path / "own.json"),
    ):
        assert back.fingerprint == beginning.fingerprint and back.prompt("a") == beginning.prompt("a")
    assert said == []


@pytest.mark.slow
def test_the_programs_that_write_text_put_the_first_token_before_it(beginning, tmp_path, run_module):
    torch.manual_seed(0)
    model = shake(GPT(replace(from_hf(llama_with_tokens()).config, vocab_size=beginning.vocab_size)))
    expected = beginning.decode(list(generate(model, beginning.prompt("ab c"), 8, temperature=0)))
    assert expected != beginning.decode(list(generate(model, beginning.encode("ab c"), 8, temperature=0)))
    folder = checkpoint.save(model, tmp_path / "own", beginning)
    options = ["--max-new-tokens", "8", "--temperature", "0", "--device", "cpu"]
    ran = run_module("shared.models", "--model", str(folder), "--prompt", "ab c", *options)
    assert ran.stdout.endswith(f"ab c{expected}\n")
    request = {"model": "m", "prompt": "ab c", "max_tokens": 8, "temperature": 0}
    with TestClient(create_app(model, beginning, name="m")) as talk:
        answer = talk.post("/v1/completions", json=request).json()
    assert answer["choices"][0]["text"] == expected
    assert answer["usage"]["prompt_tokens"] == len(beginning.prompt("ab c"))


def test_a_first_token_must_be_special_and_goes_to_other_processes(beginning):
    again = pickle.loads(pickle.dumps(beginning))
    assert again.prompt("ab") == beginning.prompt("ab") and again.begins_with == "<s>"
    with pytest.raises(ValueError, match="begins_with='a' is not one of the special tokens"):
        BPETokenizer(beginning.merges, special_tokens=beginning.special_tokens, begins_with="a")


@pytest.mark.slow
def test_of_smollm2s_file_nothing_is_left_out():
    assert is_known_template(metadata()["tokenizer.chat_template"])
    known = {key: value for key, value in metadata().items() if key.startswith("tokenizer.")}
    assert ends_of_gguf(known, {IM_START: 1, IM_END: 2}) == (None, (), None, [])
