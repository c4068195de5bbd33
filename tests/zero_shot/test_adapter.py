"""shared/zero_shot/adapter.py: lm-eval finds with it what it finds with transformers."""

import subprocess
import sys

import numpy as np
import pytest
from lm_eval.api.model import LM

from shared.models.bigram import BigramModel, count_bigrams
from shared.runtime import ROOT
from shared.tokenizers.bpe import END_OF_TEXT
from shared.zero_shot import LMEvalAdapter, adapter
from shared.zero_shot.scoring import Likelihood
from tests.zero_shot.helpers import BLOCK, TEXT, TOKENIZER, VOCAB, requests

# ---- the adapter


def test_the_adapter_is_a_model_of_lm_evals(model):
    adapter = LMEvalAdapter(model, TOKENIZER)
    assert (
        isinstance(adapter, LM)
        and adapter.eot_token_id == adapter.prefix_token_id == TOKENIZER.special_tokens[END_OF_TEXT]
    )


def test_rolling_log_likelihoods_equal_lm_evals(pair):
    ours, theirs = pair
    texts = [
        ("Mix",),
        (TEXT[:1000],),
        ("Mix the flour. " * 3,),
        (TOKENIZER.decode(TOKENIZER.encode(TEXT)[: 2 * BLOCK]),),
    ]
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    got = LMEvalAdapter(ours, TOKENIZER).loglikelihood_rolling(
        requests("loglikelihood_rolling", *texts), disable_tqdm=True
    )
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_what_the_adapter_writes_is_what_lm_evals_writes(pair):
    ours, theirs = pair
    ascii = "Mix the flour, then stir."
    (whole,) = theirs.generate_until(
        requests("generate_until", (ascii, {"until": [], "max_gen_toks": 20, "do_sample": False})),
        disable_tqdm=True,
    )
    asked = [
        {"until": [], "max_gen_toks": 20},
        {"until": [whole[5:7], "never"], "max_gen_toks": 20},
        {"until": whole[9], "max_gen_toks": 12},
    ]
    for context in (ascii, TEXT[:300]):
        for settings in asked:
            request = requests("generate_until", (context, settings | {"do_sample": False}))
            adapter = LMEvalAdapter(ours, TOKENIZER)
            assert adapter.generate_until(request, disable_tqdm=True) == theirs.generate_until(
                request, disable_tqdm=True
            )
    with pytest.raises(ValueError, match="max_gen_toks=48 leaves no room for a prompt in block_size=48"):
        adapter.generate_until(requests("generate_until", (ascii, {"max_gen_toks": 48})), disable_tqdm=True)


def test_writing_ends_at_a_special_token():
    ids = TOKENIZER.encode(f"Mix the flour.{END_OF_TEXT}Mix the flour.", allowed_special="all")
    model = BigramModel.from_counts(count_bigrams(np.array(ids), VOCAB))
    (text,) = LMEvalAdapter(model, TOKENIZER).generate_until(
        requests("generate_until", ("Mi", {"until": []})), disable_tqdm=True
    )
    assert text == "x the flour."


@pytest.mark.parametrize("quiet", [True, False])
def test_a_bar_is_wanted_unless_lm_eval_asks_for_none(model, monkeypatch, quiet):
    wanted = []

    def noted(model, pairs, max_tokens, bar):
        wanted.append(bar)
        return [Likelihood(0.0, True)] * len(pairs)

    monkeypatch.setattr(adapter, "score_pairs", noted)
    asked = LMEvalAdapter(model, TOKENIZER)
    asked._loglikelihood_tokens([(("", ""), [1], [2])], disable_tqdm=quiet)
    asked.loglikelihood_rolling(requests("loglikelihood_rolling", ("Mix",)), disable_tqdm=quiet)
    assert wanted == [not quiet] * 2


@pytest.mark.slow
def test_all_but_the_adapter_works_without_lm_eval():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from shared.zero_shot import LMEvalAdapter\n"
        "from shared.zero_shot.scoring import loglikelihoods\n"
        "from shared.models.gpt import GPT, GPTConfig\nfrom shared.tokenizers import CharTokenizer\n"
        "model, tokenizer = GPT(GPTConfig.preset('nano', vocab_size=2)), CharTokenizer('ab')\n"
        "print(len(loglikelihoods(model, tokenizer, [('a', 'b')])))\nLMEvalAdapter(model, tokenizer)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n"
    assert (
        done.stderr.splitlines()[-1]
        == 'ValueError: LMEvalAdapter needs lm-eval: pip install "llm-weeks[zero-shot]"'
    )
