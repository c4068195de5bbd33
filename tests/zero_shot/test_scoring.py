"""shared/zero_shot/scoring.py against lm-eval on tiny models of transformers, and one token at a time."""

import numpy as np
import pytest
import torch

from shared import evaluation
from shared.evaluation import score_tokens
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import CharTokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.zero_shot import LMEvalAdapter
from shared.zero_shot.scoring import encode_pair, loglikelihoods
from tests.helpers import shake
from tests.zero_shot.helpers import (
    BLOCK,
    TEXT,
    TOKENIZER,
    VOCAB,
    gpt2,
    greedy_continuation,
    one_token,
    requests,
    same_tokenizer,
)

PAIRS = [
    ("Question: How do you bake a cake?\nAnswer:", " Mix the flour"),
    ("Question: How do you bake a cake?\nAnswer: ", "Mix the flour"),  # the space moves over
    ("Mix the \n  ", "  flour"),
    ("M", "ix"),
    ("", "Mix the flour, then stir."),
    ("Der Bär", " läuft 😀 über die Brücke"),
    (TEXT[:300], " the end"),  # longer than the block
    ("a", " " + TEXT[:60]),
]


# ---- log-likelihoods


def test_the_two_tokenizers_are_the_same_one():
    theirs = same_tokenizer()
    for text in [TEXT, *(context + continuation for context, continuation in PAIRS)]:
        assert TOKENIZER.encode(text) == theirs.encode(text)
    assert theirs.eos_token_id == TOKENIZER.special_tokens[END_OF_TEXT]


@pytest.mark.parametrize("context, continuation", [p for p in PAIRS if p[0].strip()])
def test_a_pair_is_cut_where_lm_eval_cuts_it(context, continuation, model):
    assert encode_pair(TOKENIZER, context, continuation) == LMEvalAdapter(model, TOKENIZER)._encode_pair(
        context, continuation
    )


def test_log_likelihoods_equal_lm_evals(pair):
    ours, theirs = pair
    expected = theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    got = loglikelihoods(ours, TOKENIZER, PAIRS)
    adapted = LMEvalAdapter(ours, TOKENIZER).loglikelihood(
        requests("loglikelihood", *PAIRS), disable_tqdm=True
    )
    assert [g.loglikelihood for g in got] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [g.greedy for g in got] == [e[1] for e in expected]
    assert adapted == got


def test_greedy_flags_equal_lm_evals(pair):
    """Continuations that the model would write itself, and the same with one token changed."""
    ours, theirs = pair
    drawn = torch.Generator().manual_seed(0)
    tokens = []
    for n in range(1, 9):
        context = torch.randint(VOCAB, (3 * n,), generator=drawn).tolist()
        greedy = greedy_continuation(ours, context, n)
        other = list(greedy)
        other[n // 2] = (other[n // 2] + 1) % VOCAB
        tokens += [(("", ""), context, greedy), (("", ""), context, other)]
    got = LMEvalAdapter(ours, TOKENIZER)._loglikelihood_tokens(tokens, disable_tqdm=True)
    expected = theirs._loglikelihood_tokens(tokens, disable_tqdm=True)
    assert [g.greedy for g in got] == [e[1] for e in expected] == [True, False] * 8
    assert [g.loglikelihood for g in got] == pytest.approx([e[0] for e in expected], abs=1e-4)


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("max_tokens", [1, 50, 10**6])
def test_scores_are_those_of_one_token_at_a_time_however_texts_are_batched(
    model, monkeypatch, chunk, max_tokens
):
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    random = np.random.default_rng(0)
    rows = [
        (random.integers(0, VOCAB, length).tolist(), n)
        for length, n in [(5, 1), (40, 39), (2, 1), (17, 4), (40, 10), (5, 4), (49, 20)]
    ]
    rows.append((greedy_continuation(model, [1], 7), 3))
    for (ids, n), (logprobs, greedy) in zip(rows, score_tokens(model, rows, max_tokens), strict=True):
        expected = [one_token(model, ids[: end + 1]) for end in range(len(ids) - n, len(ids))]
        assert logprobs.tolist() == pytest.approx([e[0] for e in expected], abs=1e-4)
        assert greedy.tolist() == [e[1] for e in expected]


def test_in_bf16_the_probabilities_are_worked_out_in_fp32():
    model, ids = gpt2()[0].to(torch.bfloat16), [3, 1, 4, 1, 5]
    ((logprobs, _),) = score_tokens(model, [(ids, 4)])
    assert logprobs.dtype == torch.float32
    assert logprobs.tolist() == pytest.approx(
        [one_token(model, ids[: end + 1])[0] for end in range(1, 5)], abs=0.05
    )
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0].float()
    torch.testing.assert_close(
        logprobs, logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    )


@pytest.mark.parametrize("max_tokens", [64, 200])
def test_a_forward_pass_holds_at_most_max_tokens(model, max_tokens):
    sizes = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(args[0].numel()))
    score_tokens(model, [(list(range(2, 2 + n)), 1) for n in range(2, 49)], max_tokens)
    handle.remove()
    assert max(sizes) <= max_tokens and sum(sizes) >= sum(range(1, 48)) and len(sizes) < 47


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_eval_mode_and_comes_back_as_it_was(training):
    torch.manual_seed(0)
    model = shake(
        GPT(GPTConfig(vocab_size=VOCAB, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    ).train(training)
    first = loglikelihoods(model, TOKENIZER, [("Mix", " the flour")])
    assert loglikelihoods(model, TOKENIZER, [("Mix", " the flour")]) == first and model.training == training
    with pytest.raises(ValueError, match="max_tokens=0: must be at least 1"):
        score_tokens(model, [], 0)


def test_a_context_that_is_too_long_loses_its_beginning(model):
    ids = TOKENIZER.encode(TEXT)[: BLOCK + 20]
    context, continuation = TOKENIZER.decode(ids[:-1]), TOKENIZER.decode(ids[-1:])
    assert encode_pair(TOKENIZER, context, continuation) == (ids[:-1], ids[-1:])
    (score,) = loglikelihoods(model, TOKENIZER, [(context, continuation)])
    assert score.loglikelihood == pytest.approx(one_token(model, ids[-BLOCK - 1 :])[0], abs=1e-5)


@pytest.mark.parametrize(
    "tokenizer, context, continuation, message",
    [
        (
            TOKENIZER,
            "Mix",
            " " + TEXT[:400],
            r"a continuation of \d+ tokens does not fit in the model's block_size=48",
        ),
        (TOKENIZER, "Mix", "", "need at least one token each"),
        (CharTokenizer("abc"), " ", "abc", "no <|endoftext|>: give a context"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, tokenizer, context, continuation, message):
    with pytest.raises(ValueError, match=message):
        loglikelihoods(model, tokenizer, [(context, continuation)])
