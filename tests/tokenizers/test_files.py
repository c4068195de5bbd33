"""Files of tokenizers: the library `tokenizers` reads them and gives the same ids, ours comes back exactly,
and what earlier versions of the course saved is still read.
"""

import itertools
import json
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from shared.tokenizers import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    BPETokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    gpt2_tokenizer,
)
from shared.tokenizers.base import OWN, Chat
from tests.helpers import fuzz, synthetic_text

COUNT = 2000
TEXT = synthetic_text() + "12 1234 don't I'LL é中 <b>\n\n"
SPECIAL = ("<|endoftext|>", "<s>", "</s>")


def sentencepiece(**how) -> SentencePieceTokenizer:
    """Five tokens, the bytes and <s>."""
    vocab = [b" ", b"a", b"b", b"ab", b" ab", *(bytes([byte]) for byte in range(256)), b"<s>"]
    return SentencePieceTokenizer(
        vocab, range(5, 261), {"<s>": 261}, prefix="first", begins_with="<s>", **how
    )


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def own_form(tokenizer: Tokenizer) -> dict:
    """What every version up to now saved."""
    return {"kind": type(tokenizer).__name__, **tokenizer.to_json()}


MERGES = [(b"a", b"\xc3"), (b"a\xc3", b"\xa9")]
SEVERAL = {
    "vocab": dict(enumerate([b"<s>", b"a", b"\xc3", b"\xa9", b"a\xc3", b"a\xc3\xa9", b"</s>", b"<tool>"])),
    "begins_with": "<s>",
    "ends": ["</s>"],
    "chat": Chat("{{ bos_token }}", {"bos_token": "<s>"}),
    "added_tokens": {"<tool>": 7},
    "rstrip": ["<tool>"],
    "nfc": True,
    "ignore_merges": True,
}
TOKENIZERS = {
    "characters": lambda: CharTokenizer.train(TEXT + "\x00\u2028\\\"'\ud7ff\U0001f600"),
    "GPT-2's pattern": lambda: BPETokenizer.train(TEXT, 350),
    "GPT-4's pattern, special tokens": lambda: BPETokenizer.train(TEXT, 350, GPT4_PATTERN, SPECIAL),
    "a text begins and ends": lambda: BPETokenizer(
        [(b"a", b"b")], GPT2_PATTERN, SPECIAL, begins_with="<s>", ends=["</s>"]
    ),
    "nothing but bytes": lambda: BPETokenizer([]),
    "GPT-2": gpt2_tokenizer,
    "SentencePiece by merges": lambda: sentencepiece(merges=[(b"a", b"b"), (b" ", b"ab")]),
    "SentencePiece by scores": lambda: sentencepiece(scores=[-float(i) for i in range(262)]),
}


def texts_for(tokenizer: Tokenizer, count: int) -> list[str]:
    if isinstance(tokenizer, CharTokenizer):
        draw = random.Random(3)
        return ["".join(draw.choices(tokenizer.chars, k=draw.randint(0, 30))) for _ in range(count)]
    texts = fuzz(count, seed=3)
    return [text + (f"{SPECIAL[at % 3]}{text[:5]} ab ab" if at % 2 else "") for at, text in enumerate(texts)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_reads_the_file_and_gives_the_same_ids(name, tmp_path):
    ours = TOKENIZERS[name]()
    path = tmp_path / "tokenizer.json"
    ours.save(path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    assert theirs.get_vocab_size() == ours.vocab_size
    begins = ours.prompt("")
    for text in texts_for(ours, COUNT):
        ids = ours.encode(text)
        allowed = ids if isinstance(ours, CharTokenizer) else ours.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == begins + allowed, ascii(text)
        theirs.encode_special_tokens = True
        assert theirs.encode(text, add_special_tokens=False).ids == ids, ascii(text)
        theirs.encode_special_tokens = False
        assert theirs.decode(ids, skip_special_tokens=False) == (
            ours.decode(ids).removeprefix(" ") if "SentencePiece" in name else ours.decode(ids)
        ), ascii(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ours_comes_back_exactly_and_is_not_there_twice(name, tmp_path):
    ours = TOKENIZERS[name]()
    ours.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert type(loaded) is type(ours) and loaded.fingerprint == ours.fingerprint
    assert own_form(loaded) == own_form(ours) and loaded.vocab == ours.vocab
    own = read(tmp_path / "tokenizer.json")["model"][OWN]
    assert not own.keys() & {"vocab", "merges", "chars"}
    (tmp_path / "old.json").write_text(json.dumps(own_form(ours)), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "old.json").fingerprint == ours.fingerprint


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1), st.lists(st.text(min_size=2), unique=True), st.data()
)
def test_of_any_text_and_special_tokens(tmp_path_factory, text, special, data):
    special = [token for token in special if token.isprintable()]
    sizes = st.integers(0, 5)
    path = tmp_path_factory.mktemp("any") / "t.json"
    try:
        ours = BPETokenizer.train(text * 2, 256 + len(special) + data.draw(sizes), special_tokens=special)
    except ValueError as error:
        assert "has pairs for" in str(error)
        return
    for each in (ours, CharTokenizer.train(text)):
        each.save(path)
        assert Tokenizer.load(path).fingerprint == each.fingerprint
        if OWN in read(path).get("model", {}):
            theirs = tokenizers.Tokenizer.from_file(str(path))
            theirs.encode_special_tokens = True
            assert theirs.encode(text).ids == each.encode(text)


@pytest.mark.slow
def test_transformers_reads_the_file(tmp_path):
    ours = BPETokenizer.train(TEXT, 350, special_tokens=SPECIAL)
    ours.save(tmp_path / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = f"{TEXT[:200]}<s> é"
    assert theirs(text)["input_ids"] == ours.encode(text, allowed_special="all")
    theirs.save_pretrained(tmp_path / "theirs")  # without what is ours alone
    with pytest.raises(ValueError, match="that this course did not write: read it with .*load_tokenizer"):
        Tokenizer.load(tmp_path / "theirs" / "tokenizer.json")


@pytest.mark.slow
def test_gpt2s_file_is_hardly_larger_than_before(tmp_path):
    gpt2_tokenizer().save(tmp_path / "tokenizer.json")
    before = len(json.dumps(own_form(gpt2_tokenizer()), ensure_ascii=False).encode())
    assert (tmp_path / "tokenizer.json").stat().st_size < 1.2 * before


# ---- what earlier versions of the course wrote, and the sums that checkpoints carry

OLD = {
    "characters": (
        '{"kind": "CharTokenizer", "chars": "\\n abé"}',
        "d3e37eaa7dbbbe91feb02191b9df5678c018a4e0769806dba05d871aa94c02e2",
        CharTokenizer("\n abé"),
    ),
    "bytes": (
        r"""{"kind": "BPETokenizer", "pattern":
        "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
        "special_tokens": {"<|endoftext|>": 259}, "merges": [["l", "o"], ["lo", "w"], [" ", "low"]]}""",
        "8ec22cf10b01b7401559447c9706fceacffc73552c6415377aaa0fbde9d3ee7e",
        BPETokenizer([(b"l", b"o"), (b"lo", b"w"), (b" ", b"low")], special_tokens=["<|endoftext|>"]),
    ),
    "bytes, with all that there is": (
        r"""{"kind": "BPETokenizer", "pattern": "[^\\r\\n\\p{L}]?\\p{L}+|\\s",
        "special_tokens": {"<s>": 0, "</s>": 6}, "merges": [["a", "Ã"], ["aÃ", "©"]],
        "vocab": ["<s>", "a", "Ã", "©", "aÃ", "aÃ©", "</s>", "<tool>"], "begins_with": "<s>",
        "ends": ["</s>"], "chat": {"template": "{{ bos_token }}", "tokens": {"bos_token": "<s>"}},
        "added_tokens": {"<tool>": 7}, "rstrip": ["<tool>"], "nfc": true, "ignore_merges": true}""",
        "34cb154711deca2a00c50d1f82542b525d35b1a84b4f0e406a2adf85c190a214",
        BPETokenizer(MERGES, r"[^\r\n\p{L}]?\p{L}+|\s", {"<s>": 0, "</s>": 6}, **SEVERAL),
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_the_old_form_is_read_and_sums_are_what_they_were(name, tmp_path):
    content, fingerprint, same = OLD[name]
    (tmp_path / "old.json").write_text(content, encoding="utf-8")
    loaded = Tokenizer.load(tmp_path / "old.json")
    assert loaded.fingerprint == fingerprint == same.fingerprint
    loaded.save(tmp_path / "new.json")
    assert Tokenizer.load(tmp_path / "new.json").fingerprint == fingerprint
    assert read(tmp_path / "new.json")["version"] == "1.0"
    tokenizers.Tokenizer.from_file(str(tmp_path / "new.json"))


@pytest.mark.parametrize(
    ("how", "fingerprint"),
    [
        (
            {"merges": [(b"a", b"b"), (b" ", b"ab")]},
            "0bdd00631a94be0840d3c38e1c2dde294f7893b6ae87129bb99d3987ace04791",
        ),
        (
            {"scores": [-float(i) for i in range(262)]},
            "c223375c666bf979dcecfe25e0af9586bc43ad6f49544d3d14161193a6576a1b",
        ),
    ],
    ids=["merges", "scores"],
)
def test_the_sums_of_sentencepieces_tokenizers_are_what_they_were(how, fingerprint):
    assert sentencepiece(**how).fingerprint == fingerprint


def test_a_file_of_the_new_form_as_it_is_today(tmp_path):
    """Of which later versions must read every field."""
    ours = CharTokenizer("\n é")
    ours.save(tmp_path / "t.json")
    assert (tmp_path / "t.json").read_text(encoding="utf-8") == (
        '{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,'
        ' "added_tokens": [], "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\\\s\\\\S]"},'
        ' "behavior": "Isolated", "invert": false}, "decoder": {"type": "Fuse"}, "model": {"type":'
        ' "WordLevel", "vocab": {"\\n": 0, " ": 1, "é": 2}, "unk_token": "<|unknown|>", "llm_weeks":'
        ' {"kind": "CharTokenizer"}}}\n'
    )


# ---- what has no equal at Hugging Face


class Words(Tokenizer):
    """One that Hugging Face's form does not know."""

    vocab = {0: b"word"}

    def encode(self, text: str) -> list[int]:
        return [0 for _ in text.split()]

    def to_json(self) -> dict:
        return {}

    @classmethod
    def from_json(cls, values: dict) -> "Words":
        return cls()


OURS_ALONE = {
    "a pattern": (lambda: BPETokenizer([], r"\w+"), "no known equivalent at Hugging Face: train"),
    "a token twice": (lambda: BPETokenizer([], special_tokens=["a"]), "special token 'a' is written like"),
    "a kind": (Words, "a Words has no equivalent at Hugging Face"),
}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_what_cannot_be_said_there_is_saved_in_the_old_form(name, tmp_path):
    ours, reason = OURS_ALONE[name][0](), OURS_ALONE[name][1]
    with pytest.raises(ValueError, match=reason):
        ours.to_hf_json()
    ours.save(tmp_path / "t.json")
    assert read(tmp_path / "t.json") == own_form(ours)
    assert Tokenizer.load(tmp_path / "t.json").fingerprint == ours.fingerprint


@pytest.mark.slow
def test_scores_by_which_different_pairs_make_one_token(tmp_path):
    """Theirs has no scores: it ranks such pairs one after the other (see `Tokenizer.to_hf_json`)."""
    draw = random.Random(8)
    words = ["".join(word) for n in range(2, 6) for word in itertools.product("ab", repeat=n)]
    several = 0
    for _ in range(200):
        tokens = ["a", "b", *draw.sample(words, draw.randint(4, 20))]
        vocab = [*(token.encode() for token in tokens), *(bytes([byte]) for byte in range(256))]
        scores = [-float(i) for i in draw.sample(range(len(vocab)), len(vocab))]
        ours = SentencePieceTokenizer(vocab, range(len(tokens), len(vocab)), scores=scores)
        several += len(ours.merges) - len({left + right for left, right in ours.merges})
        ours.save(tmp_path / "t.json")
        assert Tokenizer.load(tmp_path / "t.json").fingerprint == ours.fingerprint
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
        for _ in range(20):
            text = "".join(draw.choices("ab", k=draw.randint(3, 20)))
            assert theirs.encode(text).ids == ours.encode(text), text
    assert several > 200


# ---- damaged and foreign files


def changed(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train(TEXT, 300, special_tokens=SPECIAL).save(path)
    values = read(path)
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].pop("merges"), "damaged: it does not describe a BPETokenizer"),
        (lambda v: v["model"].update(vocab=3), "damaged: it does not describe a BPETokenizer"),
        (lambda v: v["model"]["vocab"].update({" ": 400}), "damaged: it does not describe a BPETokenizer"),
        (lambda v: v["model"]["merges"].append("a b c"), "damaged: it does not describe a BPETokenizer"),
        (lambda v: v["model"]["merges"].append(["a", "b"]), "damaged: it does not describe a BPETokenizer"),
        (lambda v: v["model"][OWN].pop("pattern"), "damaged: it does not describe a BPETokenizer"),
        (lambda v: v["model"][OWN].update(kind="Syllables"), "of kind 'Syllables'; known are: "),
        (lambda v: v["model"][OWN].update(kind=[]), r"of kind \[\]; known are: "),
        (lambda v: v["model"].pop(OWN), "that this course did not write: read it with .*load_tokenizer"),
        (lambda v: v["model"].update({OWN: 3}), "that this course did not write"),
        (lambda v: v.update(model=[]), "that this course did not write"),
        (lambda v: v["added_tokens"].pop(), "its added_tokens are not those of the BPETokenizer that was"),
        (lambda v: v["added_tokens"][0].update(id=0), "its added_tokens are not those"),
        (lambda v: v.pop("added_tokens"), "its added_tokens are not those"),
    ],
)
def test_a_damaged_or_changed_file_is_named(change, message, tmp_path):
    path = changed(tmp_path, change)
    with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
        Tokenizer.load(path)


def test_a_merge_that_another_program_took_out_is_gone_here_too(tmp_path):
    """Vocabulary and merges are there once, for both."""
    path = changed(tmp_path, lambda values: values["model"]["merges"].pop())
    ours, theirs = Tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.encode(TEXT) == theirs.encode(TEXT).ids
