"""shared/sampling: against Hugging Face's filters, expected counts, and a plain search for stop sequences."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import TopKLogitsWarper, TopPLogitsWarper

from shared import checkpoint
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import ROOT
from shared.sampling import generate
from shared.sampling.generate import filter_logits, sample
from shared.sampling.text import stream_text
from shared.tokenizers import BPETokenizer, CharTokenizer


def random_logits(rows: int = 40, vocab_size: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


# ---- what may be drawn


@pytest.mark.parametrize("top_k", [1, 2, 7, 49, 50, 500])
def test_top_k_equals_hugging_faces(top_k):
    logits = random_logits()
    assert torch.equal(filter_logits(logits, top_k=top_k), TopKLogitsWarper(top_k)(None, logits))


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 0.001, 0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_hugging_faces(top_p):
    logits = random_logits()
    assert torch.equal(filter_logits(logits, top_p=top_p), TopPLogitsWarper(top_p)(None, logits))


def test_top_k_and_then_top_p_equal_hugging_faces():
    logits = random_logits()
    theirs = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(10)(None, logits))
    assert torch.equal(filter_logits(logits, 10, 0.8), theirs)


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.95])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p):
    for row in random_logits():
        kept = filter_logits(row, top_p=top_p).isfinite()
        p = row.double().softmax(-1)
        assert p[kept].sum() >= top_p > p[kept].sum() - p[kept].min()
        assert kept.all() or p[kept].min() >= p[~kept].max()


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_top_p_stops_where_p_is_reached_exactly(kept):
    """Four equally likely tokens: quarters add up without rounding."""
    assert filter_logits(torch.zeros(4), top_p=kept / 4).isfinite().sum() == kept


def test_no_filter_changes_nothing():
    logits = random_logits()
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)


# ---- drawing


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
    logits = random_logits()
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))
    assert sample(torch.tensor([1.0, 3.0, 3.0]), temperature=0) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
    ],
    ids=str,
)
def test_tokens_come_up_as_often_as_their_probabilities_say(options):
    logits = random_logits(1, 10, seed=3)[0] / 3
    n = 20_000
    drawn = sample(logits.expand(n, 10), **options, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=10).double()
    allowed = logits / options.get("temperature", 1.0)
    if "top_k" in options:
        allowed = TopKLogitsWarper(options["top_k"])(None, allowed[None])[0]
    if "top_p" in options:
        allowed = TopPLogitsWarper(options["top_p"])(None, allowed[None])[0]
    expected = n * allowed.double().softmax(-1)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 33.7  # the 99.99th percentile at 9 degrees of freedom; fewer only lower it


def test_one_id_is_drawn_per_row_in_the_shape_of_the_rows():
    logits = torch.full((2, 3, 9), -torch.inf)
    logits[..., 4] = 0
    assert sample(logits).tolist() == [[4] * 3] * 2 and sample(logits[0, 0]).shape == ()


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-5])
def test_a_low_temperature_still_draws_among_near_equals(temperature):
    logits = torch.tensor([0.0, temperature]).expand(4000, 2)  # e times as likely
    ones = sample(logits, temperature, generator=torch.Generator().manual_seed(0)).float().mean().item()
    assert ones == pytest.approx(math.e / (1 + math.e), abs=0.03)


def test_a_tiny_temperature_is_as_good_as_greedy():
    logits = random_logits()
    for temperature in (1e-5, 1e-30, 1e-45, 1e-300):
        drawn = sample(logits, temperature=temperature, generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn, logits.argmax(-1)), temperature


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is out of range: from 0"),
        ({"temperature": 101}, "temperature=101 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"top_k": 0}, "top_k=0 is out of range: at least 1"),
        ({"top_p": 0}, "top_p=0 is out of range: above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p=1.1 is out of range"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**32}, f"seed {2**32} is out of range"),
        ({"seed": 1.5}, "seed 1.5 is out of range"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is out of range"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_before_the_first_token(options, message):
    with pytest.raises(ValueError, match=message):
        generate(BigramModel(BigramConfig(5)), [1], **{"max_new_tokens": 3, **options})


def test_no_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token to start from"):
        generate(BigramModel(BigramConfig(5)), [], 3)


# ---- stopping


class Script(nn.Module):
    """Says a fixed sequence, whatever it reads: the token at position t is followed by script[t]."""

    def __init__(self, script: list[int], vocab_size: int = 10):
        super().__init__()
        self.config = None
        self.register_parameter("where", nn.Parameter(torch.zeros(())))
        self.table = nn.functional.one_hot(torch.tensor(script), vocab_size).float()

    def forward(self, idx):
        return self.table[: idx.size(1)][None]


def said(script: list[int], stop=(), n: int | None = None) -> list[int]:
    count = len(script) if n is None else n
    return list(generate(Script(script), [0], count, temperature=0, stop=stop))


def test_greedy_says_what_the_model_says_up_to_max_new_tokens():
    assert said([3, 1, 4, 1, 5]) == [3, 1, 4, 1, 5]
    assert said([3, 1, 4, 1, 5], n=2) == [3, 1] and said([3, 1], n=0) == []


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([4], [3, 1]),
        ([[1, 5]], [3, 1, 4]),
        ([[1, 5], 4], [3, 1]),
        ([[1, 9]], [3, 1, 4, 1, 5, 9, 2]),  # begins twice, never comes
        ([[9, 2, 7]], [3, 1, 4, 1, 5, 9, 2]),  # still held back at the end: not lost
        ([[3]], []),
        ([[1, 4], [3, 1, 4]], []),  # both end here: the longer one goes
        ([[]], [3, 1, 4, 1, 5, 9, 2]),
    ],
    ids=str,
)
def test_what_ends_it_is_not_yielded_and_nothing_else_is_lost(stop, expected):
    assert said([3, 1, 4, 1, 5, 9, 2], stop) == expected


@pytest.mark.slow
def test_random_texts_stop_where_a_plain_search_says():
    draw = random.Random(0)
    stopped = 0
    for _ in range(300):
        script = draw.choices(range(3), k=25)
        stops = [draw.choices(range(3), k=draw.randint(1, 5)) for _ in range(draw.randint(0, 3))]
        expected = script
        for end in range(1, 26):
            ending = [len(s) for s in stops if script[:end][-len(s) :] == s]
            if ending:
                expected = script[: end - max(ending)]
                stopped += 1
                break
        assert said(script, stops) == expected, (script, stops)
    assert 100 < stopped < 300


def test_a_token_is_yielded_as_soon_as_it_cannot_belong_to_a_stop_sequence():
    calls = []

    class Counting(Script):
        def forward(self, idx):
            calls.append(idx.size(1))
            return super().forward(idx)

    stream = generate(Counting([3, 1, 4, 1, 5]), [0], 5, temperature=0, stop=[[1, 5]])
    seen = [(token, len(calls)) for token in stream]
    # The first 1 waits until 4 has come; the second one never appears.
    assert seen == [(3, 1), (1, 3), (4, 3)]


# ---- the seed, the cache, the model's mode


SMALL = GPTConfig(vocab_size=30, block_size=12, n_layer=2, n_head=2, n_embd=16)


def small_gpt(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def test_a_seed_gives_the_same_ids_again_and_another_seed_others():
    model = small_gpt()

    def text(seed):
        return list(generate(model, [1, 2], 40, seed=seed))

    assert text(3) == text(3) != text(4)
    torch.manual_seed(123)  # the global random state plays no part
    before = torch.get_rng_state()
    assert text(3) == text(3) and torch.equal(torch.get_rng_state(), before)
    assert text(None) != text(None)


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "rope", "n_kv_head": 1}, {"position": "rope", "window": 3}, {"block_size": 1}],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 11, 12, 13, 40])
def test_the_cache_changes_nothing_also_past_block_size(options, prompt):
    model = small_gpt(**options)
    ids = [i % 30 for i in range(prompt)]
    with_cache = list(generate(model, ids, 50, seed=1))
    assert with_cache == list(generate(model, ids, 50, seed=1, use_cache=False))
    assert len(with_cache) == 50


def test_past_block_size_the_model_goes_on_with_its_last_half():
    model = small_gpt()
    fed = []
    model.register_forward_pre_hook(lambda module, args: fed.append(args[0][0].tolist()))
    new = list(generate(model, list(range(10)), 9, temperature=0, use_cache=False))
    text = list(range(10)) + new
    assert fed[:3] == [text[:10], text[:11], text[:12]]
    # 13 tokens do not fit: the last 6, then growing again.
    assert fed[3] == text[7:13] and fed[4] == text[7:14]


def test_with_the_cache_only_new_tokens_are_fed():
    model = small_gpt()
    fed = []
    model.register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    list(generate(model, [1, 2, 3], 6, seed=0))
    assert fed == [3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_samples_in_eval_mode_and_comes_back_as_it_was(training):
    model = small_gpt(dropout=0.5)
    model.train(training)
    first = list(generate(model, [1], 8, temperature=0))
    assert model.training == training
    assert list(generate(model, [1], 8, temperature=0)) == first
    stream = generate(model, [1], 8, temperature=0)
    assert [next(stream), next(stream)] == first[:2]
    stream.close()  # a reader that leaves early
    assert model.training == training


def test_a_model_without_a_cache_or_a_block_size_generates_too():
    table = torch.full((4, 4), -1e9)
    table[[0, 1, 2, 3], [1, 2, 3, 0]] = 0
    model = BigramModel(BigramConfig(4))
    with torch.no_grad():
        model.table.weight.copy_(table)
    assert list(generate(model, [2], 6)) == [3, 0, 1, 2, 3, 0]


# ---- streaming


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters are split over several."""

    vocab = {i: bytes([i]) for i in range(256)}


@pytest.mark.parametrize("text", ["hello", "naïve €5 😀!", "😀😀", "日本語", ""])
def test_streamed_pieces_are_whole_characters_and_together_the_text(text):
    pieces = list(stream_text(Bytes, iter(text.encode())))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert pieces == list(text)  # each as soon as its last byte is there


def test_a_character_that_is_never_finished_shows_at_the_end():
    assert "".join(stream_text(Bytes, iter("a€".encode()[:-1]))) == "a\ufffd"
    assert "".join(stream_text(Bytes, iter(b"a\xffb"))) == "a\ufffdb"


def test_a_stop_text_is_found_wherever_tokens_begin_and_end():
    tokenizer = BPETokenizer.train("the User: a User: an User " * 9, 263)
    ids = tokenizer.encode("so the User: ends here")
    assert " User" in {tokenizer.decode([i]) for i in ids}
    asked = iter(ids)
    assert "".join(stream_text(tokenizer, asked, ["User:"])) == "so the "
    assert tokenizer.decode(list(asked)) == " ends here"  # nothing is drawn beyond it
    assert "".join(stream_text(tokenizer, ids, ["User!", ""])) == "so the User: ends here"


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_said(temperature, value):
    model = BigramModel(BigramConfig(3))
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor([[0.0, 99.0, 0.0], [0.0, 0.0, value], [0.0, 0.0, 0.0]]))
    drawn = generate(model, [0], 5, temperature, seed=0)
    assert next(drawn) == 1
    with pytest.raises(ValueError, match="the model's logits after 2 tokens are not finite"):
        next(drawn)


@pytest.mark.parametrize("ids", [[0, 3], [1, -1]])
def test_an_id_outside_the_vocabulary_is_named(ids):
    with pytest.raises(ValueError, match=f"the id {ids[1]} at position 1 is outside .* from 0 to 2"):
        generate(BigramModel(BigramConfig(3)), ids, 5)


def test_a_gpt_writes_up_to_a_stop_text(monkeypatch):
    tokenizer = BPETokenizer.train("the User: a User: an User " * 9, 263)
    drawn = tokenizer.encode(" is the User: the")
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=8, n_layer=1, n_head=1, n_embd=4))
    model.tokenizer = tokenizer

    def forward(idx, cache=None):
        forward.calls += 1
        return torch.eye(tokenizer.vocab_size)[drawn[forward.calls - 1]].expand(*idx.shape, -1)

    monkeypatch.setattr(model, "forward", forward)
    for stop, expected in (("User:", " is the "), (["Usher", "the"], " is "), ((), " is the User: the")):
        forward.calls = 0
        assert model.generate("so", len(drawn), temperature=0, stop=stop) == expected
        forward.calls = 0
        assert "".join(model.stream("so", len(drawn), temperature=0, stop=stop)) == expected


# ---- the command line


@pytest.fixture
def folder(tmp_path):
    tokenizer = CharTokenizer("abcdefgh\n ")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=16, n_layer=1, n_head=2, n_embd=8))
    return checkpoint.save(model, tmp_path / "model", tokenizer)


def command(*args: str, text: str | None = None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "LLM_WEEKS_TRACE"}
    return subprocess.run(
        [sys.executable, "-m", "shared.models", "--device", "cpu", *args],
        capture_output=True,
        text=True,
        input=text,
        cwd=ROOT,
        env=environment,
    )


@pytest.mark.slow
def test_the_command_line_writes_the_prompt_and_what_follows(folder):
    options = "--prompt abc --max-new-tokens 20 --seed 1".split()
    done = command("--model", str(folder), *options)
    assert done.returncode == 0 and done.stderr == ""
    said, text = done.stdout.split("\n", 1)
    assert said == "device: cpu (asked for)"
    loaded = checkpoint.load(folder)
    ids = generate(loaded.model, loaded.tokenizer.encode("abc"), 20, seed=1)
    assert text == "abc" + loaded.tokenizer.decode(list(ids)) + "\n"


@pytest.mark.slow
def test_without_a_prompt_it_asks_again_and_again_and_survives_an_unknown_character(folder):
    options = "--max-new-tokens 5 --temperature 0".split()
    done = command("--model", str(folder), *options, text="abc\nxyz\ncab\n\n")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("> ") == 4
    assert "> abc" in done.stdout and "> cab" in done.stdout
    assert "error: character 'x' (U+0078) at position 0 is not in the vocabulary" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--prompt", "abz"), "character 'z' (U+007A) at position 2 is not in the vocabulary"),
        (("--prompt", "ab", "--temperature", "-1"), "temperature=-1.0 is out of range"),
        (("--prompt", "ab", "--temprature", "1"), "temprature"),
        (("--prompt", "ab", "--model", "none/of/these"), "no checkpoint in none/of/these"),
    ],
    ids=["unknown character", "temperature", "unknown flag", "no checkpoint"],
)
def test_an_error_on_the_command_line_is_one_line_and_a_status_that_is_not_zero(
    folder, change, message, run_module
):
    done = run_module("shared.models", "--model", str(folder), *change)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr


@pytest.mark.slow
def test_a_checkpoint_without_a_tokenizer_cannot_speak(tmp_path, run_module):
    checkpoint.save(BigramModel(BigramConfig(3)), tmp_path / "model")
    done = run_module("shared.models", "--model", str(tmp_path / "model"), "--prompt", "a")
    assert done.returncode == 2 and "has no tokenizer of ours" in done.stderr


@pytest.mark.slow
def test_counts_of_a_long_text_follow_the_bigram_model_it_came_from():
    """From end to end: the pairs in a generated text are as frequent as the model's table says."""
    table = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.0, 0.5], [0.25, 0.25, 0.5]])
    model = BigramModel(BigramConfig(3))
    with torch.no_grad():
        model.table.weight.copy_(table.log())
    text = list(generate(model, [0], 3000, seed=0))
    pairs, firsts = Counter(zip(text, text[1:])), Counter(text[:-1])
    for i in range(3):
        for j in range(3):
            assert pairs[i, j] / firsts[i] == pytest.approx(table[i, j].item(), abs=0.04)
    assert pairs[1, 1] == 0
