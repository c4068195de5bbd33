"""shared/models/tokenizer_files.py against Hugging Face's tokenizers: folders, GGUF files, and llama.cpp's
patterns.
"""

import json

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from shared.models.pretrained import from_gguf, from_hf
from shared.models.tokenizer_gguf import DEFAULT_PATTERN
from shared.tokenizers.bpe import to_printable
from shared.tokenizers.char import EVERY_CHARACTER
from shared.tokenizers.cutting import Cutter
from shared.tokenizers.patterns import GPT2_PATTERN, SMOLLM_PATTERN
from tests.helpers import fuzz, synthetic_text
from tests.models.helpers import (
    TOKENS,
    gguf_tokenizer,
    llama_with_tokens,
    model_with_tokens,
    train_bpe,
    write_gguf,
)


@pytest.mark.slow
@pytest.mark.parametrize("digits", [False, True], ids=["GPT-2's pattern", "SmolLM's pattern"])
def test_a_folders_tokenizer_json_becomes_ours(digits, tmp_path):
    theirs = train_bpe(digits)
    theirs.save(str(model_with_tokens(tmp_path) / "tokenizer.json"))
    ours = from_hf(tmp_path).tokenizer
    assert ours.pattern == (SMOLLM_PATTERN if digits else GPT2_PATTERN)
    assert ours.special_tokens == {"<|end|>": 0, "<|x|>": 1}
    for text in [*fuzz(2000, seed=2), synthetic_text(300)]:
        assert ours.encode(text) == theirs.encode(text).ids, ascii(text)
        special = f"<|end|>{text}<|x|>"
        assert ours.encode(special, allowed_special="all") == theirs.encode(special).ids, ascii(text)
        assert ours.decode(ours.encode(text)) == text


def test_a_folder_with_vocab_and_merges_gives_the_same_tokenizer(tmp_path):
    theirs = train_bpe()
    theirs.save(str(model_with_tokens(tmp_path) / "tokenizer.json"))
    from_json = from_hf(tmp_path).tokenizer
    (tmp_path / "tokenizer.json").unlink()
    theirs.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert from_hf(tmp_path).tokenizer.fingerprint == from_json.fingerprint and len(vocab) == TOKENS


def with_(**changes):
    """Changes a tokenizer.json: each value is the new one, or makes it of the old one."""

    def change(values):
        for key, value in changes.items():
            values[key] = value(values[key]) if callable(value) else value

    return change


def after_punctuation(pre_tokenizer):
    return {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, pre_tokenizer]}


def after_split(pattern):
    def change(level):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_(normalizer={"type": "Lowercase"}), "it changes the text first"),
        (with_(pre_tokenizer={"type": "Whitespace"}), "cuts the text by another rule"),
        (with_(pre_tokenizer=None), "cuts the text by another rule"),
        (with_(pre_tokenizer=lambda p: p | {"add_prefix_space": True}), "cuts the text by another rule"),
        (with_(pre_tokenizer=lambda p: p | {"use_regex": False}), "cuts the text by another rule"),
        (with_(pre_tokenizer=after_punctuation), "cuts the text by another rule"),
        (with_(model={"type": "WordPiece", "vocab": {}}), "its model is WordPiece"),
        (with_(model=lambda m: m | {"byte_fallback": True}), "it has no token <0x00>, and byte_fallback"),
        (with_(model=lambda m: m | {"dropout": 0.1}), "dropout=0.1"),
        (with_(pre_tokenizer=after_split(r"\w+")), "whose part '\\\\w+' is unclear"),
        (with_(added_tokens=lambda a: [a[0] | {"single_word": True}]), "'<|end|>' is found only where"),
        (
            with_(added_tokens=lambda a: [a[0] | {"normalized": True}], normalizer={"type": "NFC"}),
            "'<|end|>' is looked for in the normalized text",
        ),
        (
            with_(added_tokens=lambda a: [a[0], a[1] | {"content": "d|>", "normalized": True}]),
            "'<|end|>' is looked for before 'd|>', which it overlaps with",
        ),
        (with_(added_tokens=lambda a: [a[0] | {"id": 349}, a[1]]), "no token has the id 0"),
        (with_(model=lambda m: m | {"vocab": m["vocab"] | {"b": 66}}), "'a' and 'b' have one id, 66"),
        (with_(model=lambda m: m | {"vocab": m["vocab"] | {"b": 400}}), "no token has the id 67"),
        (
            with_(added_tokens=lambda a: a + [a[0] | {"id": TOKENS, "content": "<|more|>"}]),
            "it has 351 tokens, and the model 350",
        ),
    ],
)
def test_a_tokenizer_that_ours_cannot_be_is_left_out_aloud(change, reason, tmp_path):
    train_bpe().save(str(model_with_tokens(tmp_path) / "tokenizer.json"))
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    said = []
    assert from_hf(tmp_path, said.append).tokenizer is None
    assert len(said) == 1 and reason in said[0] and "the model comes without its tokenizer" in said[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"merges"', '"merge"'),
    ],
)
def test_a_damaged_tokenizer_json_is_named(damage, tmp_path):
    train_bpe().save(str(model_with_tokens(tmp_path) / "tokenizer.json"), pretty=True)
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(damage(text), encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json"):
        from_hf(tmp_path)


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    cuts = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


GPT2_OF_LLAMA_CPP = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "theirs"),
    [
        (SMOLLM_PATTERN, split(r"\p{N}", GPT2_OF_LLAMA_CPP)),
        (DEFAULT_PATTERN, split(r"[\p{P}\$\+<=>\^~\|]+", GPT2_OF_LLAMA_CPP, r"\p{N}+", "[0-9][0-9][0-9]")),
    ],
    ids=["smollm", "default"],
)
def test_one_pattern_cuts_as_llama_cpps_patterns_one_after_the_other(pattern, theirs):
    """llama.cpp's lists of patterns, each of which cuts what those before it left, run by Hugging Face's
    tokenizers.
    """
    cut = Cutter(pattern)
    for text in [*fuzz(10_000, seed=3), "12345 1234567,89  1 x  ,y \n 3", "٣٣123٣4567"]:
        pieces = [to_printable(piece.encode()) for some in cut(text) for piece in some]
        assert pieces == [piece for piece, _ in theirs.pre_tokenize_str(text)], ascii(text)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_a_gguf_files_tokenizer_is_ours(pre, tmp_path):
    theirs = train_bpe(digits=pre == "smollm")
    path = write_gguf(tmp_path / "m.gguf", llama_with_tokens(), tokenizer=gguf_tokenizer(theirs, pre))
    ours = from_gguf(path).tokenizer
    assert ours.special_tokens == {"<|end|>": 0, "<|x|>": 1}
    for text in fuzz(1000, seed=4):
        special = f"<|x|>{text}"
        assert ours.encode(special, allowed_special="all") == theirs.encode(special).ids, ascii(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(add_tokenizer_pre="tekken"),
            "tokenizer.ggml.pre='tekken', is not one of gpt-2, olmo, smollm, default, llama-bpe",
        ),
        (dict(add_tokenizer_pre=None), "tokenizer.ggml.pre=None"),
        (dict(add_tokenizer_model="t5"), "its tokenizer is 't5', and ours can only be 'gpt2'"),
        (dict(add_tokenizer_model="llama"), "its tokenizer lacks scores"),
        (dict(add_tokenizer_model="llama", add_token_scores=[0.0] * TOKENS), "it has no token <0x00>"),
        (dict(add_add_space_prefix=True), "a space before the text"),
        (dict(add_token_merges=None), "its tokenizer lacks merges"),
        (dict(add_token_types=None), "its tokenizer lacks token_type"),
        (dict(add_token_types=[1] * 349), "350 tokens with 349 kinds"),
        (dict(add_token_types=[6] * TOKENS), "'<|end|>' is of kind 6"),
        (dict(add_token_types=[4] * TOKENS), "the vocabulary lacks"),
        (
            dict(add_token_list=["a"] * 351, add_token_types=[1] * 351),
            "351 tokens .* do not fit a model of 350",
        ),
        (dict(add_token_merges=["a b c"]), "not two tokens"),
        (dict(add_token_merges=["Ġzz qq"]), "the vocabulary lacks"),
        (dict(add_token_merges=["a →"]), "stands for no byte"),
    ],
)
def test_a_gguf_tokenizer_that_ours_cannot_be_is_refused(changes, message, tmp_path):
    tokenizer = {k: v for k, v in (gguf_tokenizer(train_bpe()) | changes).items() if v is not None}
    path = write_gguf(tmp_path / "m.gguf", llama_with_tokens(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=message):
        from_gguf(path)


def test_a_gguf_tokenizer_of_numbers_is_damaged(tmp_path):
    def add_numbers(writer):
        writer.add_array("tokenizer.ggml.tokens", list(range(TOKENS)))

    tokenizer = gguf_tokenizer(train_bpe())
    del tokenizer["add_token_list"]
    path = write_gguf(tmp_path / "m.gguf", llama_with_tokens(), tokenizer=tokenizer, change=add_numbers)
    with pytest.raises(ValueError, match="damaged"):
        from_gguf(path)


@pytest.mark.parametrize(
    ("vocab", "reason"),
    [
        ({"a": 0, "b": 2}, "no token has the id 1"),
        ({"a": 0, "b": 0}, "'a' and 'b' have one id, 0"),
        ({"a": 0, "bc": 1}, "its model is WordLevel"),
    ],
    ids=["gap", "one id twice", "two characters"],
)
def test_characters_whose_ids_ours_cannot_have_are_left_out_aloud(vocab, reason, tmp_path):
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="?"))
    theirs.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(EVERY_CHARACTER), "isolated")
    values = json.loads(theirs.to_str())
    values["model"]["vocab"] = vocab
    (model_with_tokens(tmp_path) / "tokenizer.json").write_text(json.dumps(values))
    said = []
    assert from_hf(tmp_path, said.append).tokenizer is None
    assert len(said) == 1 and reason in said[0]
