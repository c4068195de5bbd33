"""The tokenizers of today's families as ours, against Hugging Face's tokenizers; and through every file."""

import pickle
import unicodedata

import pytest
import tokenizers
from tokenizers import normalizers

from shared.models.tokenizer_files import tokenizer_from_json
from shared.sampling.text import stream_text
from shared.tokenizers import BPETokenizer, SentencePieceTokenizer, Tokenizer
from tests.helpers import ALPHABETS
from tests.models.tokenizer_forms import FORMS, SPACE, texts_with_tokens, theirs_of

COUNT = 20_000
BELOW = "\u0334"  # a mark that stands before all others in the form NFC
THEIR_NFC = normalizers.NFC()
NEWER_MARKS = {
    mark
    for mark in ALPHABETS["any code point"]
    if unicodedata.combining(mark)
    and THEIR_NFC.normalize_str(mark + BELOW) != unicodedata.normalize("NFC", mark + BELOW)
}
"""Combining marks that are newer than the Unicode of the library `tokenizers`, and not than Python's."""


def ours_of(values: dict) -> BPETokenizer | SentencePieceTokenizer:
    tokenizer, left_out = tokenizer_from_json(values)
    assert left_out == []
    return tokenizer


def shown(tokenizer, ids: list[int]) -> str:
    """What Hugging Face's decoders give: without the space that the form puts before a text."""
    text = tokenizer.decode(ids)
    return text.removeprefix(" ") if getattr(tokenizer, "prefix", "never") != "never" else text


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_ids_and_text_are_those_of_tokenizers(form):
    values = FORMS[form]()
    ours, theirs = ours_of(values), theirs_of(values)
    texts = texts_with_tokens(values, COUNT, seed=12)
    if values["normalizer"] == {"type": "NFC"}:
        texts = [text for text in texts if not NEWER_MARKS.intersection(text)]
        assert len(texts) > COUNT * 0.9
    expected = [encoding.ids for encoding in theirs.encode_batch_fast(texts, add_special_tokens=False)]
    for text, ids, said in zip(texts, expected, theirs.decode_batch(expected, skip_special_tokens=False)):
        assert ours.encode(text, allowed_special="all") == ids, ascii(text)
        assert shown(ours, ids) == said, ascii(text)
    for ids in expected[:500]:
        assert "".join(stream_text(ours, ids)) == ours.decode(ids)
    theirs.encode_special_tokens = True
    for text in texts[: COUNT // 10]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, ascii(text)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_goes_through_every_file_of_ours_and_theirs(form, tmp_path):
    values = FORMS[form]()
    ours = ours_of(values)
    ours.save(tmp_path / "own.json")
    written = ours.to_hf_json()
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "own.json"))
    copies = [Tokenizer.load(tmp_path / "own.json"), pickle.loads(pickle.dumps(ours)), ours_of(written)]
    assert {copy.fingerprint for copy in copies} == {ours.fingerprint}
    for text in texts_with_tokens(values, COUNT // 10, seed=13):
        ids = ours.encode(text, allowed_special="all")
        for copy in copies:
            assert copy.encode(text, allowed_special="all") == ids and copy.decode(ids) == ours.decode(ids)
        if not NEWER_MARKS.intersection(text):
            assert theirs.encode(text).ids == ours.prompt("")[:1] + ids, ascii(text)
            assert theirs.decode(ids, skip_special_tokens=False) == shown(ours, ids)


def as_the_form_has_it(ours, text: str) -> str:
    """The text with what the form itself changes: spaces, where it writes them as U+2581."""
    if isinstance(ours, BPETokenizer):
        return text
    text = text.replace(SPACE, " ")
    begins = ours.prefix == "always" or (ours.prefix != "never" and not text.startswith(" "))
    return f" {text}" if text and begins else text


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_all_comes_back_but_what_the_form_itself_changes(form):
    values = FORMS[form]()
    ours = ours_of(values)
    for text in texts_with_tokens(values, 2000, seed=14):
        ids = ours.encode(text)
        if values["normalizer"] == {"type": "NFC"}:
            same = [unicodedata.normalize("NFC", one) for one in (ours.decode(ids), text)]
            assert same[0] == same[1], ascii(text)
        else:
            assert ours.decode(ids) == as_the_form_has_it(ours, text), ascii(text)
        half = len(ids) // 2
        assert ours.decode_bytes(ids[:half]) + ours.decode_bytes(ids[half:]) == ours.decode_bytes(ids)
        more = ours.encode_more(text)
        assert more == ids or ours.decode(more) == text.replace(SPACE, " "), ascii(text)
