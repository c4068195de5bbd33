"""shared/tokenizers: text comes back whole, a saved tokenizer is the same, and mistakes are named."""

import hashlib
import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, base
from tests.helpers import fuzz

TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


@pytest.mark.slow
@given(TEXT)
def test_any_text_comes_back_whole(text):
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert set(ids) == set(range(tokenizer.vocab_size))  # trained on the text: every id is used


@given(TEXT)
def test_the_vocabularys_bytes_spell_the_text(text):
    tokenizer = CharTokenizer.train(text)
    assert b"".join(tokenizer.vocab[i] for i in tokenizer.encode(text)) == text.encode("utf-8")


def test_ids_follow_the_order_of_code_points():
    tokenizer = CharTokenizer.train("zä😀a\n")
    assert tokenizer.decode(list(range(5))) == "\nazä😀"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@pytest.mark.parametrize("text", ["hello\n", "a\r\nb\u2028c", '"\\', "naïve 😀\x00"])
def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path, text):
    tokenizer = CharTokenizer.train(text)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert type(loaded) is CharTokenizer and loaded.vocab == tokenizer.vocab
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.decode(tokenizer.encode(text)) == text


def test_fingerprints_differ_where_ids_differ():
    prints = [CharTokenizer(chars).fingerprint for chars in ("ab", "ba", "abc", string.ascii_letters)]
    assert len(set(prints)) == 4
    assert prints[0] == CharTokenizer("ab").fingerprint
    assert len(prints[0]) == len(hashlib.sha256().hexdigest())


def test_an_unknown_character_is_named_with_its_place():
    message = r"character 'x' \(U\+0078\) at position 3 is not in the vocabulary of 4 characters"
    with pytest.raises(ValueError, match=message):
        CharTokenizer.train("hello").encode("helxlo?")


@pytest.mark.parametrize("i", [-1, 4, 1000])
def test_an_id_outside_the_vocabulary_is_refused(i):
    with pytest.raises(ValueError, match=f"id {i} is not in the vocabulary: ids go from 0 to 3"):
        CharTokenizer.train("hello").decode([0, i])


def test_an_empty_text_and_a_doubled_character_are_refused():
    with pytest.raises(ValueError, match="text is empty"):
        CharTokenizer.train("")
    with pytest.raises(ValueError, match="names a character twice"):
        CharTokenizer("aba")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b'{"kind": "CharTokenizer", "chars": "ab',
        b'{"chars": "ab"}',
        b"[]",
        b"3",
        b'"kind"',
        b"\xff\xfe",
        b'{"kind": "CharTokenizer"}',
        b'{"kind": "CharTokenizer", "chars": 7}',
        b'{"kind": "CharTokenizer", "chars": ""}',
    ],
)
def test_a_damaged_file_is_a_value_error_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer"):
        Tokenizer.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: No such file"):
        Tokenizer.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "kind", ["WordTokenizer", "Tokenizer", "gpt2_tokenizer", "os", 3, ["CharTokenizer"], None]
)
def test_an_unknown_kind_is_named_with_the_known_ones(tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"kind": kind, "chars": "ab"}))
    with pytest.raises(ValueError, match=f"of kind {re.escape(repr(kind))}; known are: .*CharTokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("ab é"), BPETokenizer.train("ab ab", 258)], ids=["characters", "bytes"]
)
def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts = ["ab", "", "é ab ab"]
    batch = tokenizer.encode_batch(iter(texts))
    assert batch == [tokenizer.encode(text) for text in texts] and tokenizer.decode_batch(batch) == texts
    with pytest.raises(ValueError, match=r"takes several texts, and was given one: use encode, or \[text\]"):
        tokenizer.encode_batch("ab")
    with pytest.raises(ValueError, match="id 999 is not in the vocabulary"):
        tokenizer.decode_batch([[0], [999]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_several_processes_give_what_one_gives(kind, monkeypatch):
    monkeypatch.setattr(base, "GROUP", 300)  # many groups, so that processes overtake each other
    texts = [f"{text} {i}" for i, text in enumerate(fuzz(500, seed=12))]
    tokenizer = CharTokenizer.train("".join(texts))
    if kind == "bytes":
        tokenizer = BPETokenizer.train(texts, 400, special_tokens=("<s>",))
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(iter(texts), processes=2) == expected
    texts[321] += "\ud800"
    with pytest.raises(ValueError, match=r"texts\[321\]: .*U\+D800"):
        tokenizer.encode_batch(texts, processes=2)


def test_a_text_that_cannot_be_encoded_is_named_by_its_number():
    with pytest.raises(ValueError, match=r"texts\[1\]: character 'x' \(U\+0078\) at position 0"):
        CharTokenizer("ab").encode_batch(["ab", "xa", "x"])
    with pytest.raises(ValueError, match="processes=0: must be at least 1"):
        CharTokenizer("ab").encode_batch(["ab"], processes=0)


def test_a_prompt_is_the_token_that_every_text_begins_with_and_the_text():
    tokenizer = BPETokenizer.train("ab", 257, special_tokens=("<s>",))
    assert tokenizer.prompt("ab") == tokenizer.encode("ab")
    tokenizer.begins_with = "<s>"
    assert tokenizer.prompt("ab") == [tokenizer.special_tokens["<s>"], *tokenizer.encode("ab")]
