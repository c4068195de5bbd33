"""shared/training/linear_loss.py against torch's cross-entropy of whole logits, and torch's own in chunks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.data.corpus import batches
from shared.training import Trainer
from shared.training.distributed import pad_output_layer
from shared.training.execution import Precision
from shared.training.linear_loss import ChunkedNextToken, linear_cross_entropy
from shared.training.memory import LiveTensors
from shared.training.tasks import NextToken
from tests.training.helpers import QUICK, small_gpt


def drawn(tokens: int, channel: int = 6, vocab_size: int = 11, ignored: float = 0.0, scale: float = 1.0):
    generator = torch.Generator().manual_seed(tokens)
    hidden = scale * torch.randn(tokens, channel, generator=generator)
    weight = torch.randn(vocab_size, channel, generator=generator)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def whole(hidden, weight, targets, ignore_index=-100):
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=ignore_index)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100])
@pytest.mark.parametrize(("ignored", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.0, 200.0)])
def test_loss_and_gradients_are_those_of_whole_logits(chunk_size, ignored, scale):
    hidden, weight, targets = drawn(8, ignored=ignored, scale=scale)
    expected = whole(hidden, weight, targets)
    found = linear_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    right = torch.autograd.grad(-2.5 * expected, (hidden, weight))
    ours = torch.autograd.grad(-2.5 * found, (hidden, weight))
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6 * scale)


def test_torchs_own_in_chunks_agrees():
    hidden, weight, targets = drawn(64)
    theirs = F.linear_cross_entropy(hidden, weight, targets, options=nn.LinearCrossEntropyOptions())
    ours = linear_cross_entropy(hidden, weight, targets, chunk_size=10)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_the_gradients_are_those_of_finite_differences():
    hidden, weight, targets = (t.double() if t.is_floating_point() else t for t in drawn(4, 2, 3))
    eps = 1e-3
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad(linear_cross_entropy(h, w, targets, chunk_size=3), [w])
    moved = torch.zeros_like(w)
    moved[1, 0] = eps
    up, down = (whole(hidden, weight + sign * moved, targets) for sign in (1, -1))
    assert grad[1, 0].item() == pytest.approx(((up - down) / (2 * eps)).item(), rel=1e-4)


def test_any_number_can_be_ignored_and_any_shape_given():
    hidden, weight, _ = drawn(12)
    targets = torch.tensor([0, 3, 0, 5, 7, 0, 1, 2, 0, 10, 9, 0]).view(3, 4)
    found = linear_cross_entropy(hidden.view(3, 4, 6), weight, targets, ignore_index=0, chunk_size=5)
    assert found.item() == pytest.approx(whole(hidden, weight, targets.flatten(), 0).item(), rel=1e-6)


def test_without_a_target_that_counts_the_loss_is_nan_and_the_gradients_are_0():
    hidden, weight, targets = drawn(5, ignored=1.1)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert math.isnan(loss.item())
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_backward_can_run_twice():
    hidden, weight, targets = drawn(9)
    loss = 3 * linear_cross_entropy(hidden, weight, targets, chunk_size=4)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (hidden, weight))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_as_near_to_fp32_as_whole_logits_are(dtype):
    hidden, weight, targets = drawn(40)
    exact = torch.autograd.grad(whole(hidden, weight, targets), (hidden, weight))
    errors = []
    for way in (whole, linear_cross_entropy):
        with torch.autocast("cpu", dtype):
            loss = way(hidden, weight, targets)
        found = torch.autograd.grad(loss, (hidden, weight))
        assert [g.dtype for g in found] == [torch.float32] * 2
        errors.append(max((a - b).abs().max().item() for a, b in zip(found, exact)))
    assert errors[1] < 2 * errors[0] + 1e-6


def test_the_logits_are_never_whole():
    """Whole, they are in memory three times: logits, log-softmax and the logits' gradient."""
    hidden, weight, targets = drawn(128, 8, 1000)
    peaks = []
    for way in (whole, lambda *case: linear_cross_entropy(*case, chunk_size=8)):
        with LiveTensors() as live:
            way(hidden, weight, targets).backward()
        peaks.append(live.peak / (4 * 128 * 1000))
    assert peaks[0] == pytest.approx(3, abs=0.01)
    assert peaks[1] < 0.5


@pytest.mark.parametrize(
    ("shapes", "chunk_size", "message"),
    [
        (((3, 4), (5, 6), (3,)), 2, "give hidden"),
        (((3, 4), (5, 4), (2,)), 2, "give hidden"),
        (((3, 4), (5, 4), (3,)), 0, "chunk_size=0: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, chunk_size, message):
    hidden, weight, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets.long(), chunk_size=chunk_size)


# ---- as a training's task


@pytest.mark.parametrize("tied", [False, True])
def test_a_training_is_the_same(corpus, tied):
    trained = []
    for task in (NextToken(corpus), ChunkedNextToken(corpus, chunk_size=5)):
        trainer = Trainer(small_gpt(corpus, tie_weights=tied), task, QUICK)
        trainer.fit()
        trained.append(trainer)
    rows = [[row["train_loss"] for row in t.history if "train_loss" in row] for t in trained]
    assert rows[1] == pytest.approx(rows[0], abs=1e-5)
    assert trained[1].final["val_loss"] == pytest.approx(trained[0].final["val_loss"], abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_models_loss_and_gradients_are_the_same(corpus, tied):
    model = small_gpt(corpus, tie_weights=tied)
    batch = next(batches(corpus.train, 8, 4, 1))
    found = []
    for task in (NextToken(corpus), ChunkedNextToken(corpus, chunk_size=5)):
        model.zero_grad()
        loss = task.loss(model, *batch)
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-6)
    assert model(batch[0]).size(-1) == corpus.tokenizer.vocab_size  # the output layer is back


def test_a_padded_output_layer_is_padded_again_afterwards(corpus):
    model = small_gpt(corpus)
    pad_output_layer(model)
    padded = model.lm_head.forward
    batch = next(batches(corpus.train, 8, 4, 1))
    loss = ChunkedNextToken(corpus, chunk_size=5).loss(model, *batch)
    assert loss.item() == pytest.approx(NextToken(corpus).loss(model, *batch).item(), abs=1e-6)
    assert model.lm_head.forward is padded


def test_it_trains_in_bf16(corpus):
    losses = []
    for task in (NextToken(corpus), ChunkedNextToken(corpus)):
        config = replace(QUICK, eval_windows=2)
        trainer = Trainer(small_gpt(corpus), task, config, precision=Precision(torch.bfloat16))
        trainer.fit()
        losses.append(trainer.last_loss)
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def test_another_output_layer_is_refused(corpus):
    model = small_gpt(corpus)
    model.lm_head = nn.Identity()
    with pytest.raises(ValueError, match="needs an output layer `lm_head`.*and this is Identity"):
        ChunkedNextToken(corpus).loss(model, *next(batches(corpus.train, 8, 4, 1)))
