"""shared/alignment/logprobs.py against PyTorch's distributions, NumPy, and enumeration."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from shared.alignment import gae
from shared.alignment.logprobs import (
    entropy,
    kl_estimate,
    masked_mean,
    sequence_logprobs,
    token_logprobs,
    whiten,
)
from shared.alignment.rewards import preference_batch
from shared.models.gpt import GPT, GPTConfig
from tests.alignment.helpers import close, random, random_ids, some_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_are_minus_cross_entropy_of_the_next_token(dtype):
    logits = random(3, 6, 11).to(dtype)
    ids = random_ids(11, 3, 6)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = -F.cross_entropy(logits[:, :-1].to(exact).transpose(1, 2), ids[:, 1:], reduction="none")
    logp = token_logprobs(logits, ids)
    close(logp, expected)
    assert logp.dtype == exact
    assert logp.shape == (3, 5)


def test_an_answers_log_probability_leaves_out_prompt_and_padding():
    logits = random(4, 8, 5)
    ids = random_ids(5, 4, 8)
    mask = some_mask(4, 8)
    mask[:, 0] = False
    mask[:, 4] = True
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    expected = -losses.sum(1)
    close(sequence_logprobs(logits, ids, mask), expected)
    logits[:, :-1][~mask[:, 1:]] = float("nan")  # predictions outside the answers
    close(sequence_logprobs(logits, ids, mask), expected)


def test_all_answers_probabilities_add_up_to_1():
    """All 27 answers of three tokens, by a model: the sum of their probabilities, given the prompt."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=3, block_size=5, n_layer=1, n_head=1, n_embd=8)).double()
    answers = torch.cartesian_prod(*[torch.arange(3)] * 3)
    ids = torch.cat([torch.tensor([[2, 0]]).expand(27, 2), answers], 1)
    mask = torch.arange(5).expand(27, 5) >= 2
    assert sequence_logprobs(model(ids), ids, mask).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_padding_does_not_change_a_log_probability():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=8, n_layer=2, n_head=2, n_embd=16)).double()
    pairs = [([5, 6], [1, 2, 3], [1]), ([7], [2], [2, 4])]
    ids, mask = preference_batch(pairs)
    together = sequence_logprobs(model(ids), ids, mask)
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs]
    rows += [(prompt, rejected) for prompt, _, rejected in pairs]
    for i, (prompt, answer) in enumerate(rows):
        logp = model(torch.tensor([prompt + answer])).log_softmax(-1)[0]
        alone = sum(logp[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
        assert together[i].item() == pytest.approx(alone, rel=1e-10)


@pytest.mark.parametrize("wrong", ["first", "none"])
def test_a_mask_without_answer_or_with_the_first_token_is_refused(wrong):
    mask = torch.tensor([[False, True, True], [False, False, True]])
    mask[1] = wrong == "first"
    with pytest.raises(ValueError, match="at least one answer token, and none in the first place"):
        sequence_logprobs(random(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), mask)


def test_logits_that_were_shifted_already_are_refused():
    with pytest.raises(ValueError, match=r"logits \[2, 3, 4\] and ids \[2, 4\].*not shifted"):
        token_logprobs(random(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


# ---- means and entropy


def test_means_and_whitening_are_numpys():
    x = random(4, 9)
    mask = some_mask(4, 9)
    inside = np.ma.array(x.numpy(), mask=~mask.numpy())
    assert masked_mean(x, mask).item() == pytest.approx(inside.mean(), rel=1e-12)
    assert masked_mean(x).item() == pytest.approx(x.numpy().mean(), rel=1e-12)
    white = whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].numpy().std(ddof=1) == pytest.approx(1, rel=1e-6)
    assert (white[~mask] == 0).all()
    close(white, torch.from_numpy(((inside - inside.mean()) / inside.std(ddof=1)).filled(0)))
    kept_mean = masked_mean(whiten(x, mask, shift_mean=False), mask)
    assert kept_mean.item() == pytest.approx(inside.mean(), rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        whiten(x[0, :1])


def test_what_is_masked_may_be_nan():
    x = random(2, 4)
    mask = some_mask(2, 4)
    broken = x.masked_fill(~mask, float("nan"))
    assert masked_mean(broken, mask) == masked_mean(x, mask)
    assert torch.equal(whiten(broken, mask), whiten(x, mask))
    for ours, expected in zip(gae(broken, broken, mask=mask), gae(x, x, mask=mask)):
        assert torch.equal(ours, expected)


def test_entropy_is_torchs():
    logits = random(3, 4, 7)
    close(entropy(logits), Categorical(logits=logits).entropy())
    assert entropy(torch.zeros(5)).item() == pytest.approx(math.log(5), rel=1e-6)


# ---- KL


def policy_and_reference(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of two distributions over nine outcomes; the first requires gradients."""
    return random(9, seed=seed).requires_grad_(), random(9, seed=seed + 100)


def kl(logits: Tensor, other: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=logits), Categorical(logits=other))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_kl_estimators_have_the_means_that_are_claimed(seed):
    """By enumeration: the mean over what the policy draws, each outcome weighed by its probability."""
    logits, ref = (x.detach() for x in policy_and_reference(seed))
    p = logits.softmax(0)
    logp = logits.log_softmax(0)
    ref_logp = ref.log_softmax(0)
    exact = kl(logits, ref).item()
    estimates = {kind: kl_estimate(logp, ref_logp, kind) for kind in ("k1", "k2", "k3")}
    means = {kind: (p * estimate).sum().item() for kind, estimate in estimates.items()}
    assert means["k1"] == pytest.approx(exact, rel=1e-10)
    assert means["k3"] == pytest.approx(exact, rel=1e-10)
    assert means["k2"] == pytest.approx((p * (logp - ref_logp) ** 2).sum().item() / 2, rel=1e-12)
    assert abs(means["k2"] - exact) > 0.01 * exact
    assert (estimates["k3"] >= 0).all()
    assert (estimates["k1"] < 0).any()
    assert (kl_estimate(logp, logp, "k3") == 0).all()
    close(estimates["k3"], (ref_logp - logp).exp() - 1 - (ref_logp - logp))


def test_as_a_loss_k2_pulls_towards_the_reference_by_kls_gradient_and_k3_by_that_of_the_reverse():
    logits, ref = policy_and_reference()
    # How often each outcome is drawn: a constant, as the answers are drawn before the loss is computed.
    drawn = logits.softmax(0).detach()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    def gradient_of(kind: str) -> Tensor:
        return gradient((drawn * kl_estimate(logits.log_softmax(0), ref.log_softmax(0), kind)).sum())

    close(gradient_of("k1"), torch.zeros(9).double())
    close(gradient_of("k2"), gradient(kl(logits, ref)))
    close(gradient_of("k3"), gradient(kl(ref, logits)))
