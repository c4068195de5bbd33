"""shared/evaluation.py against torch, and against models whose loss is known beforehand."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.evaluation import bits_per_byte, cross_entropy, evaluate, known_words, perplexity
from shared.models.bigram import BigramModel, count_bigrams
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import CharTokenizer


class Uniform(nn.Module):
    """Believes in every token alike."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, idx):
        return torch.zeros(*idx.shape, self.vocab_size)


def some_tokens(n: int = 500, vocab_size: int = 13) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, n).astype(np.uint16)


ONE_BYTE = torch.ones(13, dtype=torch.int64)


def small_gpt() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def test_cross_entropy_is_the_mean_of_minus_log_softmax_at_the_target():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    targets = torch.randint(7, (3, 5), generator=generator)
    by_hand = []
    for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist()):
        by_hand.append(-math.log(math.exp(row[target]) / sum(map(math.exp, row))))
    loss = cross_entropy(logits, targets).item()
    assert loss == pytest.approx(sum(by_hand) / 15, rel=1e-5)
    assert loss == pytest.approx(F.cross_entropy(logits.transpose(1, 2), targets).item(), rel=1e-6)


@pytest.mark.parametrize("vocab_size", [13, 65, 300])
def test_a_uniform_model_has_loss_ln_v_and_perplexity_v(vocab_size):
    result = evaluate(Uniform(vocab_size), some_tokens(), 16, torch.ones(vocab_size, dtype=torch.int64))
    assert result.loss == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert result.perplexity == pytest.approx(vocab_size, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(vocab_size), rel=1e-6)
    assert result.tokens == 499 // 16 * 16


def test_perplexity_of_an_infinite_loss_is_infinite_not_an_overflow():
    assert perplexity(math.inf) == perplexity(1e6) == math.inf
    assert perplexity(699.9) == math.exp(699.9)
    assert perplexity(0) == 1


def test_bits_per_byte_counts_the_bytes_of_characters_that_have_several():
    text = "aä€😀" + "".join(random.Random(0).choices("aä€😀", weights=(1, 2, 3, 9), k=76))  # 1 to 4 bytes
    tokenizer = CharTokenizer.train(text)
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    sizes = torch.tensor([len(tokenizer.vocab[i]) for i in range(4)])
    result = evaluate(Uniform(4), tokens, 8, sizes)
    # 79 tokens to predict, since the first is not: 9 windows of 8.
    predicted_bytes = len(text[1:73].encode())
    assert predicted_bytes not in (len(text[:72].encode()), len(text[:73].encode()), len(text[7:79].encode()))
    expected = 72 * 2 / predicted_bytes  # 2 bits for each of 4 equally likely tokens
    assert result.tokens == 72
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert bits_per_byte(math.log(4), 72, predicted_bytes) == pytest.approx(expected, rel=1e-12)


def test_bits_per_byte_does_not_depend_on_how_the_text_is_cut():
    """The same bits spread over half as many tokens: the loss per token doubles, bits per byte stay."""
    coarse = bits_per_byte(2.4, tokens=50, text_bytes=150)
    assert bits_per_byte(1.2, tokens=100, text_bytes=150) == pytest.approx(coarse)


def test_accuracy_is_the_share_of_first_guesses_that_are_right():
    # After 0 comes 1 three times of four, after 1 and 2 always 0.
    tokens = np.array([0, 1, 0, 2, 0, 1, 0, 1, 0], dtype=np.uint16)
    model = BigramModel.from_counts(count_bigrams(tokens, 3))
    assert evaluate(model, tokens, 4, ONE_BYTE).accuracy == 7 / 8


def test_the_loss_is_that_of_the_whole_split_computed_at_once():
    model = small_gpt()
    tokens = some_tokens(100)
    result = evaluate(model, tokens, 8, ONE_BYTE)
    model.eval()
    windows = torch.from_numpy(tokens[:97].astype(np.int64))
    x, y = windows[:96].view(12, 8), windows[1:].view(12, 8)
    with torch.no_grad():
        assert result.loss == pytest.approx(F.cross_entropy(model(x).transpose(1, 2), y).item(), rel=1e-6)
        assert result.accuracy == (model(x).argmax(-1) == y).double().mean().item()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_measured_in_eval_mode_and_comes_back_as_it_was(training):
    model = small_gpt().train(training)
    first = evaluate(model, some_tokens(), 8, ONE_BYTE)
    assert model.training == training and all(m.training == training for m in model.modules())
    assert evaluate(model, some_tokens(), 8, ONE_BYTE) == first  # dropout of 0.5 would show
    assert all(p.grad is None for p in model.parameters())


def test_the_batch_size_does_not_matter():
    model = small_gpt()
    results = [evaluate(model, some_tokens(), 8, ONE_BYTE, batch_size=n) for n in (1, 7, 32, 1000)]
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert result.accuracy == results[0].accuracy
        assert result.tokens == results[0].tokens == 496


def test_fewer_windows_measure_fewer_tokens():
    result = evaluate(small_gpt(), some_tokens(), 8, ONE_BYTE, max_windows=5)
    assert result.tokens == 40
    assert result.loss != evaluate(small_gpt(), some_tokens(), 8, ONE_BYTE).loss


def test_metrics_carry_the_splits_name():
    result = evaluate(Uniform(13), some_tokens(), 8, ONE_BYTE)
    assert result.as_metrics() == {
        "val_loss": result.loss,
        "val_perplexity": result.perplexity,
        "val_bits_per_byte": result.bits_per_byte,
        "val_accuracy": result.accuracy,
    }
    names = {"train_loss", "train_perplexity", "train_bits_per_byte", "train_accuracy"}
    assert set(result.as_metrics("train_")) == names


def test_known_words_is_the_share_of_words_that_the_text_has():
    assert known_words("To be, or nqt to be", "to be or not To") == 5 / 6
    assert known_words("king's kings", "the king's") == 0.5
    assert math.isnan(known_words("1 2 3", "one two three"))
