"""A long text through overlapping windows, against plain loops."""

import math

import numpy as np
import pytest
import torch

from shared.evaluation import evaluate
from shared.models.bigram import BigramModel, count_bigrams
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import CharTokenizer
from shared.zero_shot.scoring import sliding_window
from tests.helpers import shake
from tests.zero_shot.helpers import TEXT, one_token

# ---- a long text


CHARS = CharTokenizer.train(TEXT + "Bär")


@pytest.fixture(scope="module")
def by_characters() -> GPT:
    return shake(GPT(GPTConfig(vocab_size=CHARS.vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16)))


@pytest.mark.parametrize(
    "length, block_size, stride",
    [(100, 16, 1), (100, 16, 5), (100, 16, 15), (100, 16, 16), (17, 16, 4), (2, 16, 16), (40, 3, 2)],
)
def test_a_sliding_window_scores_each_token_once_with_enough_before_it(
    by_characters, length, block_size, stride
):
    text = "Bär " + TEXT[: length - 4] if length > 4 else TEXT[:length]
    ids = CHARS.encode(text)
    expected = []
    for i in range(1, length):
        begin = max(
            0, math.ceil((i - block_size) / stride) * stride
        )  # of the first window that reaches token i
        assert min(i, block_size - stride + 1) <= i - begin <= block_size
        expected.append(one_token(by_characters, ids[begin : i + 1]))
    loss = -sum(e[0] for e in expected) / len(expected)
    for max_tokens in (1, 100):
        result = sliding_window(by_characters, CHARS, text, stride, block_size, max_tokens=max_tokens)
        assert result.loss == pytest.approx(loss, rel=1e-5) and result.perplexity == pytest.approx(
            math.exp(loss), rel=1e-4
        )
        assert result.bits_per_byte == pytest.approx(
            loss * (length - 1) / math.log(2) / len(text[1:].encode()), rel=1e-5
        )
        assert (
            result.accuracy == pytest.approx(sum(e[1] for e in expected) / len(expected))
            and result.tokens == length - 1
        )


def test_with_a_stride_of_a_whole_block_it_is_evaluate(by_characters):
    text = TEXT[: 16 * 20 + 1]
    tokens = np.array(CHARS.encode(text), dtype=np.uint16)
    expected = evaluate(
        by_characters, tokens, 16, torch.tensor([len(CHARS.vocab[i]) for i in range(CHARS.vocab_size)])
    )
    got = sliding_window(by_characters, CHARS, text, stride=16)
    assert (
        got.as_metrics() == pytest.approx(expected.as_metrics(), rel=1e-5) and got.tokens == expected.tokens
    )
    assert sliding_window(by_characters, CHARS, text, stride=4).loss != pytest.approx(got.loss, rel=1e-3)


@pytest.mark.parametrize("stride, block_size", [(1, 1), (7, 7), (3, 50), (64, 64), (10**4, None)])
def test_a_model_that_sees_one_token_only_does_not_care_for_the_window(stride, block_size):
    tokens = np.array(CHARS.encode(TEXT), dtype=np.uint16)
    model = BigramModel.from_counts(count_bigrams(tokens[:500], CHARS.vocab_size))
    expected = evaluate(
        model, tokens, len(tokens) - 1, torch.tensor([len(CHARS.vocab[i]) for i in range(CHARS.vocab_size)])
    )
    got = sliding_window(model, CHARS, TEXT, stride, block_size)
    assert (
        got.as_metrics() == pytest.approx(expected.as_metrics(), rel=1e-5) and got.tokens == expected.tokens
    )


@pytest.mark.parametrize(
    "text, stride, block_size, message",
    [
        ("abc", 0, None, "stride=0: must be from 1 .* to block_size=16"),
        ("abc", 17, None, "stride=17: must be"),
        ("abc", 9, 8, "stride=9: must be from 1 .* to block_size=8"),
        ("abc", 1, 17, "block_size=17: must be from 1 to the model's 16"),
        ("abc", 1, 0, "block_size=0: must be"),
        ("a", 1, None, "the text has 1 tokens: at least 2 are needed"),
        ("", 1, None, "the text has 0 tokens"),
    ],
)
def test_a_window_that_cannot_be_is_refused(by_characters, text, stride, block_size, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(by_characters, CHARS, text, stride, block_size)
