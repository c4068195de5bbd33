"""shared/models/bigram.py: counts against a plain count, and the counted table as the minimum that gradient
descent looks for.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from shared.evaluation import cross_entropy
from shared.models.bigram import BigramConfig, BigramModel, bigram_probabilities, count_bigrams

VOCAB = 11


def tokens(n: int = 2000, dtype=np.uint16) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.minimum(random.geometric(0.25, n) - 1, VOCAB - 2).astype(dtype)  # the last id never occurs


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_counts_equal_a_plain_count_of_pairs(dtype):
    text = tokens(dtype=dtype).tolist()
    counts = count_bigrams(np.array(text, dtype=dtype), VOCAB)
    assert counts.shape == (VOCAB, VOCAB) and counts.dtype == torch.int64
    expected = Counter(zip(text, text[1:]))
    assert {(i, j): int(counts[i, j]) for i in range(VOCAB) for j in range(VOCAB) if counts[i, j]} == expected


def test_counts_do_not_overflow_uint16():
    text = np.full(70_000, 300, dtype=np.uint16)
    assert count_bigrams(text, 301)[300, 300] == 69_999


@pytest.mark.parametrize("n", [0, 1])
def test_a_text_without_pairs_counts_none(n):
    assert count_bigrams(np.zeros(n, dtype=np.uint16), 3).sum() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_probabilities_are_smoothed_counts_divided_by_their_sum(smoothing):
    counts = count_bigrams(tokens(), VOCAB)
    table = bigram_probabilities(counts, smoothing)
    for i in range(VOCAB - 1):
        row = [c + smoothing for c in counts[i].tolist()]
        assert table[i].tolist() == pytest.approx([c / sum(row) for c in row], rel=1e-6)
    assert table[VOCAB - 1].tolist() == pytest.approx([1 / VOCAB] * VOCAB)  # never seen: uniform
    torch.testing.assert_close(table.sum(1), torch.ones(VOCAB))


def test_the_models_softmax_gives_the_probabilities_back():
    counts = count_bigrams(tokens(), VOCAB)
    model = BigramModel.from_counts(counts, smoothing=0)
    idx = torch.arange(VOCAB)[None]
    torch.testing.assert_close(model(idx).softmax(-1)[0], bigram_probabilities(counts, 0))
    assert model(torch.tensor([[0]]))[0, 0, VOCAB - 1] == -math.inf


def test_the_counted_table_is_the_minimum_of_cross_entropy():
    text = torch.from_numpy(tokens().astype(np.int64))
    counts = count_bigrams(tokens(), VOCAB)
    model = BigramModel.from_counts(counts, smoothing=0)
    with torch.no_grad():  # finite logits, so that a gradient exists: e^-40 is as good as never
        model.table.weight.clamp_(min=-40)
    loss = cross_entropy(model(text[None, :-1]), text[None, 1:])
    loss.backward()
    assert model.table.weight.grad.abs().max() < 1e-7
    entropy = -sum(
        c * math.log(c / counts[i].sum()) for i in range(VOCAB) for c in counts[i].tolist() if c
    ) / (len(text) - 1)
    assert loss.item() == pytest.approx(entropy, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = BigramModel(BigramConfig(VOCAB))
        with torch.no_grad():
            other.table.weight.copy_(
                model.table.weight + 0.1 * torch.randn(VOCAB, VOCAB, generator=generator)
            )
            assert cross_entropy(other(text[None, :-1]), text[None, 1:]) > loss


def test_gradient_descent_finds_the_counted_table():
    text = torch.from_numpy(tokens(300).astype(np.int64))
    torch.manual_seed(0)
    model = BigramModel(BigramConfig(VOCAB))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(model(text[None, :-1]), text[None, 1:]).backward()
        optimizer.step()
    counts = count_bigrams(text.numpy(), VOCAB)
    seen = counts.sum(1) > 0
    torch.testing.assert_close(
        model.table.weight.softmax(-1)[seen], bigram_probabilities(counts, 0)[seen], atol=0.01, rtol=0
    )


def test_the_first_loss_is_ln_of_the_vocabulary_size():
    torch.manual_seed(0)
    idx = torch.randint(65, (8, 65))
    assert cross_entropy(BigramModel(BigramConfig(65))(idx[:, :-1]), idx[:, 1:]).item() == pytest.approx(
        math.log(65), abs=0.05
    )


def test_only_the_present_token_counts():
    torch.manual_seed(0)
    model = BigramModel(BigramConfig(VOCAB))
    assert torch.equal(model(torch.tensor([[1, 2, 3]]))[0, 2], model(torch.tensor([[3]]))[0, 0])


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=0: must be at least 1"):
        BigramConfig(0)
