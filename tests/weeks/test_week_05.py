"""Week 5: its builds against the promoted tokenizer and tiktoken, and the script with a learner's code."""

import random
from dataclasses import replace

import pytest
import regex
import tiktoken

from shared.course.exercise import Week, grade
from shared.course.exercise.answers import load_module
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.tokenizers.patterns import GPT2_PATTERN
from tests.helpers import fuzz, synthetic_text
from tests.weeks.helpers import script

ANSWERS = load_module(ROOT / "weeks" / "05_bpe" / "answers.py", "week_05_answers")


def small_text(seed: int) -> str:
    """Words of few letters, so that many pairs are equally frequent."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abé", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 30))]
    return "".join(word + draw.choice([" ", ", ", "\n"]) for word in words)


@pytest.mark.parametrize("seed", range(30))
def test_the_learned_merges_are_the_promoted_ones(seed):
    text = small_text(seed)
    every_merge = ANSWERS.train_bpe(text, 10_000)
    size = 256 + len(every_merge)
    assert every_merge == BPETokenizer.train(text, size).merges
    with pytest.raises(ValueError, match=f"pairs for {size} tokens only"):
        BPETokenizer.train(text, size + 1)
    for smaller in (256, (256 + size) // 2):
        assert ANSWERS.train_bpe(text, smaller) == BPETokenizer.train(text, smaller).merges


@pytest.mark.slow
def test_ids_and_texts_are_those_of_the_promoted_class_and_of_tiktoken():
    merges = ANSWERS.train_bpe(synthetic_text(), 400)
    specials = (END_OF_TEXT, "[turn]")
    built = ANSWERS.BPE(merges, specials)
    promoted = BPETokenizer(merges, special_tokens=specials)
    ranks = {token: i for i, token in built.vocab.items() if i < 400}
    theirs = tiktoken.Encoding(
        "ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=promoted.special_tokens
    )
    assert built.vocab == promoted.vocab
    draw = random.Random(0)
    for text in fuzz(3000, seed=5):
        assert built.decode(built.encode(text)) == text
        text += draw.choice(["", *specials]) + synthetic_text(3)
        ids = built.encode(text)
        assert ids == promoted.encode(text) == theirs.encode(text, disallowed_special=())
        allowed = built.encode(text, specials[:1])
        assert allowed == promoted.encode(text, specials[:1])
        assert allowed == theirs.encode(text, allowed_special=set(specials[:1]), disallowed_special=())
        some = draw.choices(range(len(built.vocab)), k=8)
        assert built.decode(some) == promoted.decode(some) == theirs.decode(some)


@pytest.mark.slow
def test_the_script_with_her_code_ends_at_the_same_figures(output, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    module, settings = script("05_bpe", data=text_file)
    promoted = module.main(settings)
    assert "yours" not in capsys.readouterr().out
    week = Week(5)
    for name in ("train_bpe", "BPE"):
        week.check(getattr(ANSWERS, name))
    hers = module.main(replace(settings, mine=True))
    said = capsys.readouterr().out
    assert "train_bpe: yours" in said and "BPE: yours" in said
    timed = {"tokenizer_seconds", "train_seconds", "wall_seconds"}
    assert {k: v for k, v in hers.items() if k not in timed} == {
        k: v for k, v in promoted.items() if k not in timed
    }


SPACES_AND_SIGNS = r"| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    "pattern, words",
    [
        (r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d]+| ?\d+" + SPACES_AND_SIGNS, "the underscore is a letter"),
        (r"'(?i:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+" + SPACES_AND_SIGNS, "case is ignored"),
        (r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]" + SPACES_AND_SIGNS, "by rule 3, a run of digits"),
        (r"'(?:[sdmt]|ll)| ?[A-Za-z]+| ?[0-9]+" + SPACES_AND_SIGNS, "by rule 1, a contraction"),
    ],
)
def test_a_wrong_pattern_is_told_which_rule_it_breaks(pattern, words):
    verdict = grade(Week(5).exercises["cut"], regex.compile(pattern).findall)
    assert verdict.status == "wrong" and words in verdict.message


def test_a_merge_that_is_not_the_most_frequent_is_named():
    def learn_merges(words, n):
        return [(right, left) for left, right in ANSWERS.learn_merges(words, n)]

    assert "side by side nowhere" in grade(Week(5).exercises["learn_merges"], learn_merges).message
