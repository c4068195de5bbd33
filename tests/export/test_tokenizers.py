"""The tokenizers of today's families in GGUF: read again as they were, and llama.cpp gives the same ids."""

import importlib.util
import json
import os
from dataclasses import replace
from functools import cache

import pytest
import tokenizers

from shared.export import to_gguf
from shared.models.gguf_reader import read_gguf
from shared.models.gpt import GPT
from shared.models.pretrained import from_gguf
from shared.models.tokenizer_files import tokenizer_from_json
from shared.models.tokenizer_gguf import tokenizer_from_gguf
from shared.tokenizers import BPETokenizer, SentencePieceTokenizer, Tokenizer
from tests.export.helpers import CONFIGS
from tests.models.tokenizer_forms import FORMS, texts_with_tokens

RUNS = ["\n\n", "\n\n\n", "  ", "    ", "<b>"]


@cache
def scored(prefix: str, runs: bool) -> SentencePieceTokenizer:
    """As Llama 2's and Gemma's GGUF files have it: the vocabulary of `FORMS`, merged by scores."""
    given, _ = tokenizer_from_json(FORMS["Llama 2"]())
    vocab = list(given.vocab.values())
    # Tokens that overlap with themselves, and one with a space inside.
    more = [b"ba", b"bab", b"abab", b"ab", b"a b", b" a", b" ab", b"aa", b"aaa"]
    vocab += [token for token in more if token not in vocab]
    added = {token: len(vocab) + i for i, token in enumerate(RUNS)} if runs else {}
    vocab += [token.encode() for token in added]
    return SentencePieceTokenizer(
        vocab,
        given.byte_ids,
        given.special_tokens,
        scores=[-float(i * 7919 % 10007) for i in range(len(vocab))],
        prefix=prefix,
        added_tokens=added,
        begins_with="<s>",
        ends=["</s>"],
    )


def ours_of(form: str) -> Tokenizer:
    tokenizer, _ = tokenizer_from_json(FORMS[form]())
    return tokenizer


TOKENIZERS = {
    "Llama 3": lambda: ours_of("Llama 3"),
    "Qwen, whose texts are in the form NFC": lambda: ours_of("Qwen"),
    "OLMo 2": lambda: ours_of("OLMo 2"),
    "SentencePiece, a space before": lambda: scored("always", False),
    "SentencePiece, tokens found in every text": lambda: scored("never", True),
}


def model_for(tokenizer: Tokenizer) -> GPT:
    return GPT(replace(CONFIGS["Llama with grouped queries"], vocab_size=tokenizer.vocab_size))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_is_read_again_as_it_was(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    said = []
    back = from_gguf(to_gguf(model_for(tokenizer), tmp_path / "m.gguf", tokenizer), said.append).tokenizer
    assert said == []
    if isinstance(tokenizer, BPETokenizer):  # what the format cannot say, and llama.cpp does not do
        tokenizer.nfc = False
    assert {**back.to_json(), "ends": 0} == {**tokenizer.to_json(), "ends": 0}
    assert tokenizer.ends in ((), back.ends)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("Phi-3", "'</s>' takes the white space beside it, which GGUF cannot say"),
        ("Mistral", "llama.cpp has no prefix='first'"),
        ("every space by itself", "llama.cpp has no prefix='never' with each_space"),
        ("Llama 2", "llama.cpp merges any two tokens that together are one, by its score"),
        ("GPT-4o", "for cutting text is none of llama.cpp's"),
    ],
)
def test_what_gguf_cannot_say_is_refused(form, message, tmp_path):
    tokenizer = ours_of(form)
    with pytest.raises(ValueError, match=message):
        to_gguf(model_for(tokenizer), tmp_path / "m.gguf", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_merges_that_scores_lead_to_are_written_as_scores(tmp_path):
    by_scores = scored("always", False)
    values = by_scores.to_hf_json()
    by_merges, _ = tokenizer_from_json(values)
    assert by_merges.scores is None
    back = from_gguf(to_gguf(model_for(by_merges), tmp_path / "m.gguf", by_merges)).tokenizer
    assert back.scores is not None and back.merges == by_scores.merges


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["always", "never"])
def test_written_for_tokenizers_scores_give_the_same_ids(prefix):
    ours = scored(prefix, prefix == "never")
    values = ours.to_hf_json()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(values))
    for text in texts_with_tokens(values, 5000, seed=15):
        ids = ours.encode(text, allowed_special="all")
        assert theirs.encode(text, add_special_tokens=False).ids == ids, ascii(text)


if importlib.util.find_spec("xllamacpp"):
    from tests.export.test_huggingface import llama_cpp

    @pytest.mark.slow
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_llama_cpp_gives_the_same_ids(name, tmp_path):
        tokenizer = TOKENIZERS[name]()
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.nfc = False
        run = llama_cpp(to_gguf(model_for(tokenizer), tmp_path / "m.gguf", tokenizer))
        values = tokenizer.to_hf_json()
        for text in filter(None, texts_with_tokens(values, 400, seed=16)):
            if "ſ" not in text:  # an s in another form, which only some count as one
                assert run.tokenize(text) == tokenizer.encode(text, allowed_special="all"), ascii(text)

    GEMMA = os.environ.get("LLM_WEEKS_GEMMA")
    if GEMMA:
        SPELLED = ["<start_of_turn>", "<bos>", "[multimodal]", "\n\n\n", "\t\t", "    ", "\u2581", "<table>"]

        @pytest.mark.slow
        def test_gemma_3_from_its_gguf_file_gives_llama_cpps_ids():
            """LLM_WEEKS_GEMMA: the path of a GGUF file of Gemma 3."""
            metadata, _ = read_gguf(GEMMA)
            tokenizer, left_out = tokenizer_from_gguf(metadata, len(metadata["tokenizer.ggml.tokens"]), GEMMA)
            assert left_out == [] and tokenizer.begins_with == "<bos>"
            run = llama_cpp(GEMMA)
            values = {"added_tokens": [{"content": token} for token in SPELLED]}
            for text in filter(None, texts_with_tokens(values, 1000, seed=17)):
                ids = tokenizer.encode(text, allowed_special="all")
                assert run.tokenize(text) == ids, ascii(text)
                assert tokenizer.decode(ids) == text.replace("\u2581", " "), ascii(text)
