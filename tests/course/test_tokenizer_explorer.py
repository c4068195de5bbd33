"""The tokenizers' explorer: its ids are those of Python, and the merges are replayed in order."""

import random
import re
from types import SimpleNamespace

import pytest

from shared.course.explorers import tokenizer_explorer
from shared.course.explorers.tokenizer import javascript_pattern
from shared.tokenizers import (
    GPT2_PATTERN,
    GPT4_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    gpt2_tokenizer,
)
from shared.tokenizers.patterns import SMOLLM_PATTERN
from tests.course.test_explorers import PLAYGROUND, status, tokenizer

SIGNS = [
    *" \n\t\r'’.,;:-–!?()",
    *"\x00\x1c\x1f\x7f\x85\xa0\u2028\u3000\ufeff\u180e\u200b\u200d",
    *"aAbBsStTmMdDlLvVeErRyzſéßюЖהアक中한\u0301\u0327",
    *"0123456789½²٣५",
    *"😀👍🏽",
]
PIECES = [
    "'s",
    "'S",
    "'ſ",
    "'ll",
    "'RE",
    "'Ve",
    "the",
    " the",
    "\r\n",
    "  ",
    "1234",
    "don't",
    "e\u0301",
    "fi",
]
PATTERNS = {
    "GPT-2's": GPT2_PATTERN,
    "GPT-4's": GPT4_PATTERN,
    "Llama 3's": LLAMA3_PATTERN,
    "Qwen's": QWEN2_PATTERN,
    "SmolLM2's": SMOLLM_PATTERN,
}


def strings(seed: int, n: int = 400) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(SIGNS + PIECES, k=chance.randrange(1, 24))) for _ in range(n)]


def ids_in_javascript(seen, texts: list[str]) -> list[list[list[int]]]:
    """For each vocabulary, for each text."""
    return seen.frame.evaluate(
        """async (texts) => {
            const { vocabularies } = JSON.parse(document.getElementById("data").textContent);
            const tokenizers = await Promise.all(vocabularies.map(tokenizerOf));
            const idsOf = (t, text) => t.pieces(text).flat().map((token) => t.id(token));
            return tokenizers.map((t) => texts.map((text) => idsOf(t, text)));
        }""",
        texts,
    )


@pytest.mark.slow
def test_ids_are_those_of_python_for_every_pattern(visit):
    text = "".join(strings(0, 600))
    trained = {name: BPETokenizer.train(text, 600, pattern) for name, pattern in PATTERNS.items()}
    trained["normed"] = BPETokenizer(trained["GPT-2's"].merges, nfc=True)
    seen = visit(tokenizer_explorer(trained))
    texts = strings(1)
    for (name, own), found in zip(trained.items(), ids_in_javascript(seen, texts), strict=True):
        wrong = [text for text, ids in zip(texts, found) if own.encode(text) != ids]
        assert wrong == [], name


@pytest.mark.slow
def test_ids_are_those_of_python_for_gpt2s_vocabulary_and_characters(visit):
    texts = strings(2)
    chars = CharTokenizer.train("".join(texts[:200]))
    vocabularies = {"GPT-2": gpt2_tokenizer(), "characters": chars}
    seen = visit(tokenizer_explorer(vocabularies, texts[0]))
    gpt2, characters = ids_in_javascript(seen, texts)
    assert gpt2 == [vocabularies["GPT-2"].encode(text) for text in texts]
    known = {c: i for i, c in enumerate(chars.chars)}
    assert characters == [[known.get(c) for c in text] for text in texts]


def pieces_of(seen, where: str) -> list[str]:
    return [piece.text_content() for piece in seen.frame.locator(f"{where} .piece").all()]


@pytest.mark.slow
def test_what_is_typed_is_cut_and_counted_for_each_vocabulary(visit):
    seen = visit(tokenizer())
    seen.frame.locator("#text").fill("then the x")
    for name, vocabulary in PLAYGROUND.items():
        section = f'section[aria-label="{name}"]'
        counts = seen.frame.locator(f"{section} .counts").text_content()
        if name == "characters":
            assert pieces_of(seen, section) == list("then␣the␣x") and "1 not in the vocabulary" in counts
            continue
        tokens = [vocabulary.vocab[i].decode() for i in vocabulary.encode("then the x")]
        assert pieces_of(seen, section) == [token.replace(" ", "␣") for token in tokens]
        assert counts == f"{len(tokens)} tokens, {10 / len(tokens):.2f} characters per token"
    first = seen.frame.locator('section[aria-label="270"] .piece').first
    first.focus()
    assert "is id" in status(seen) and "merge" in status(seen)
    seen.page.keyboard.press("End")
    assert "‹x› is id 120; 1 byte: 120." in status(seen)


@pytest.mark.slow
def test_the_merges_are_replayed_in_the_order_of_the_vocabulary(visit):
    seen = visit(tokenizer())
    vocabulary, text = PLAYGROUND["270"], "the teeth that he ate"
    seen.frame.get_by_role("button", name="Next merge").focus()
    steps = 0
    while True:
        said = seen.frame.locator(".merge").text_content()
        done = int(re.search(r"Merge (\d+)", said)[1]) if steps else 0
        expected = BPETokenizer(vocabulary.merges[:done])
        shown = pieces_of(seen, ".stage")
        assert shown == [expected.vocab[i].decode().replace(" ", "␣") for i in expected.encode(text)]
        if "No other merge fits" in said:
            break
        seen.page.keyboard.press("Enter")
        steps += 1
    assert steps >= 4 and shown == pieces_of(seen, 'section[aria-label="270"]')


@pytest.mark.parametrize("pattern", [r"\w+", r"\bx", r"a\Gb", r"\X"])
def test_a_pattern_that_javascript_might_read_otherwise_is_refused(pattern):
    with pytest.raises(ValueError, match="not known to mean the same"):
        javascript_pattern(pattern)


def test_a_tokenizer_without_merges_is_refused():
    with pytest.raises(ValueError, match="odd: a SimpleNamespace has no merges"):
        tokenizer_explorer({"odd": SimpleNamespace()})
    with pytest.raises(ValueError, match="whole: .* tokens that need none"):
        tokenizer_explorer({"whole": BPETokenizer([], ignore_merges=True)})
    with pytest.raises(ValueError, match="no tokenizers"):
        tokenizer_explorer({})
