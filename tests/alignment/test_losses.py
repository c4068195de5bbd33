"""shared/alignment/losses.py against TRL's frozen numbers (tests/expectations/make_trl.py), PyTorch's
distributions, sums written out, and finite differences.
"""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from shared.alignment import dpo_loss, gae, grpo_loss, ppo_loss
from shared.alignment.losses import (
    DPO_LOSSES,
    SMOOTHED_LOSSES,
    bradley_terry_loss,
    entropy,
    explained_variance,
    group_advantages,
    kl_estimate,
    masked_mean,
    policy_loss,
    preference_batch,
    ratio_diagnostics,
    scalar_head,
    sequence_logprobs,
    token_logprobs,
    token_rewards,
    value_loss,
    whiten,
)
from shared.models.gpt import GPT, GPTConfig

TRL = json.loads((Path(__file__).parents[1] / "expectations" / "trl.json").read_text())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors(found: dict, *names: str) -> list[Tensor]:
    return [
        torch.tensor(found[name], dtype=torch.bool if name == "mask" else torch.float64) for name in names
    ]


def some_mask(batch: int, time: int, seed: int = 0) -> Tensor:
    """Each row's answer begins somewhere, and ends somewhere after it."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, time // 2, (batch, 1), generator=generator)
    length = torch.randint(1, time // 2 + 1, (batch, 1), generator=generator)
    places = torch.arange(time)
    return (places >= start) & (places < start + length)


close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)


# ---- log-probabilities, means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_probabilities_are_minus_cross_entropy_of_the_next_token(dtype):
    logits, ids = (
        random(3, 6, 11).to(dtype),
        torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1)),
    )
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    expected = -F.cross_entropy(logits[:, :-1].to(exact).transpose(1, 2), ids[:, 1:], reduction="none")
    found = token_logprobs(logits, ids)
    close(found, expected)
    assert found.dtype == exact and found.shape == (3, 5)


def test_an_answers_log_probability_leaves_out_prompt_and_padding():
    logits, ids = random(4, 8, 5), torch.randint(5, (4, 8), generator=torch.Generator().manual_seed(1))
    mask = some_mask(4, 8)
    mask[:, 0] = False
    mask[:, 4] = True
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    expected = -F.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100
    ).sum(1)
    close(sequence_logprobs(logits, ids, mask), expected)
    logits[:, :-1][~mask[:, 1:]] = float("nan")  # what is predicted where nobody answers
    close(sequence_logprobs(logits, ids, mask), expected)


def test_all_answers_probabilities_add_up_to_1():
    """All 27 answers of three tokens, by a model: the sum of their probabilities, given the prompt."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=3, block_size=5, n_layer=1, n_head=1, n_embd=8)).double()
    answers = torch.cartesian_prod(*[torch.arange(3)] * 3)
    ids = torch.cat([torch.tensor([[2, 0]]).expand(27, 2), answers], 1)
    mask = torch.arange(5).expand(27, 5) >= 2
    assert sequence_logprobs(model(ids), ids, mask).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("wrong", ["first", "none"])
def test_a_mask_without_answer_or_with_the_first_token_is_refused(wrong):
    mask = torch.tensor([[False, True, True], [False, False, True]])
    mask[1] = torch.tensor([True, True, True]) if wrong == "first" else False
    with pytest.raises(ValueError, match="at least one answer token, and none in the first place"):
        sequence_logprobs(random(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), mask)


def test_logits_that_were_shifted_already_are_refused():
    with pytest.raises(ValueError, match=r"logits \[2, 3, 4\] and ids \[2, 4\].*not shifted"):
        token_logprobs(random(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


def test_means_and_whitening_are_numpys():
    x, mask = random(4, 9), some_mask(4, 9)
    inside = np.ma.array(x.numpy(), mask=~mask.numpy())
    assert masked_mean(x, mask).item() == pytest.approx(inside.mean(), rel=1e-12)
    assert masked_mean(x).item() == pytest.approx(x.numpy().mean(), rel=1e-12)
    white = whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12) and white[mask].numpy().std(
        ddof=1
    ) == pytest.approx(1, rel=1e-6)
    assert (white[~mask] == 0).all()
    close(white, torch.from_numpy(((inside - inside.mean()) / inside.std(ddof=1)).filled(0)))
    assert masked_mean(whiten(x, mask, shift_mean=False), mask).item() == pytest.approx(
        inside.mean(), rel=1e-9
    )
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        whiten(x[0, :1])


def test_what_is_masked_may_be_nan():
    x, mask = random(2, 4), some_mask(2, 4)
    broken = x.masked_fill(~mask, float("nan"))
    assert masked_mean(broken, mask) == masked_mean(x, mask) and torch.equal(
        whiten(broken, mask), whiten(x, mask)
    )
    for found, expected in zip(gae(broken, broken, mask=mask), gae(x, x, mask=mask)):
        assert torch.equal(found, expected)


def test_entropy_is_torchs():
    logits = random(3, 4, 7)
    close(entropy(logits), Categorical(logits=logits).entropy())
    assert entropy(torch.zeros(5)).item() == pytest.approx(math.log(5), rel=1e-6)


# ---- reward models, KL


def test_bradley_terry_is_logistic_regression_on_the_difference():
    chosen, rejected = random(6), random(6, seed=1)
    close(
        bradley_terry_loss(chosen, rejected),
        F.binary_cross_entropy_with_logits(chosen - rejected, torch.ones(6).double(), reduction="none"),
    )
    assert bradley_terry_loss(torch.zeros(1), torch.zeros(1)).item() == torch.tensor(2.0).log().item()


def test_a_reward_model_learns_the_odds_of_winning():
    """Three answers; how often each beats each follows from rewards, and from those frequencies the rewards
    come back.
    """
    truth = torch.tensor([0.0, 1.0, -0.7], dtype=torch.float64)
    rewards = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    a, b = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).T
    wins = (truth[a] - truth[b]).sigmoid()
    optimizer = torch.optim.LBFGS([rewards], max_iter=100, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        loss = (wins * bradley_terry_loss(rewards[a], rewards[b])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    close(rewards.detach() - rewards[0].detach(), truth, atol=1e-5)


def test_a_scalar_head_gives_a_number_for_each_token_and_leaves_the_model_alone():
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=64))
    ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    before = model(ids)
    value, reward = (
        scalar_head(model, std=0.0),
        scalar_head(model, generator=torch.Generator().manual_seed(0)),
    )
    assert value(ids).shape == (2, 8, 1) and (value(ids) == 0).all()
    assert (
        reward.lm_head.weight.std().item() == pytest.approx(65**-0.5, rel=0.25)
        and (reward.lm_head.bias == 0).all()
    )
    (value(ids) + reward(ids)).sum().backward()
    assert torch.equal(model(ids), before) and all(p.grad is None for p in model.parameters())


def policies(seed: int = 0) -> tuple[Tensor, Tensor]:
    return random(9, seed=seed).requires_grad_(), random(9, seed=seed + 100)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_kl_estimators_have_the_means_that_are_claimed(seed):
    """By enumeration: the mean over what the policy draws, each outcome weighed by its probability."""
    logits, ref = (x.detach() for x in policies(seed))
    p, logp, ref_logp = logits.softmax(0), logits.log_softmax(0), ref.log_softmax(0)
    exact = kl_divergence(Categorical(logits=logits), Categorical(logits=ref)).item()
    means = {kind: (p * kl_estimate(logp, ref_logp, kind)).sum().item() for kind in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(exact, rel=1e-10) and means["k3"] == pytest.approx(exact, rel=1e-10)
    assert (
        means["k2"] == pytest.approx((p * (logp - ref_logp) ** 2).sum().item() / 2, rel=1e-12)
        and abs(means["k2"] - exact) > 0.01 * exact
    )
    assert (kl_estimate(logp, ref_logp, "k3") >= 0).all() and (kl_estimate(logp, ref_logp, "k1") < 0).any()
    assert (kl_estimate(logp, logp, "k3") == 0).all()
    close(kl_estimate(logp, ref_logp, "k3"), (ref_logp - logp).exp() - 1 - (ref_logp - logp))


def test_as_a_loss_k2_pulls_towards_the_reference_by_kls_gradient_and_k3_by_that_of_the_reverse():
    logits, ref = policies()
    divergence = lambda a, b: kl_divergence(Categorical(logits=a), Categorical(logits=b))
    gradient = lambda y: torch.autograd.grad(y, logits)[0]
    drawn = logits.softmax(
        0
    ).detach()  # how often each outcome is drawn does not depend on the parameters any more
    of = lambda kind: gradient((drawn * kl_estimate(logits.log_softmax(0), ref.log_softmax(0), kind)).sum())
    close(of("k1"), torch.zeros(9).double())
    close(of("k2"), gradient(divergence(logits, ref)))
    close(of("k3"), gradient(divergence(ref, logits)))


# ---- PPO


def test_the_score_is_earned_at_the_last_token_and_kl_is_paid_at_each():
    mask, kl, scores = some_mask(5, 8), random(5, 8), random(5, seed=1)
    expected = torch.zeros(5, 8).double()
    for i, row in enumerate(mask.tolist()):
        places = [t for t, told in enumerate(row) if told]
        for t in places:
            expected[i, t] -= 0.3 * kl[i, t]
        expected[i, max(places)] += scores[i]
    close(token_rewards(scores, kl, mask, 0.3), expected)
    mask[2] = False
    with pytest.raises(ValueError, match="an answer has no token"):
        token_rewards(scores, kl, mask, 0.3)


def advantages_by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[float]:
    """The O(T²) sum over one row."""
    r, v = rewards.tolist(), [*values.tolist(), 0.0]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("time", [1, 2, 17])
def test_gae_is_the_sum_that_defines_it(gamma, lam, time):
    rewards, values = random(3, time), random(3, time, seed=1)
    advantages, returns = gae(rewards, values, gamma, lam)
    expected = torch.tensor(
        [advantages_by_definition(r, v, gamma, lam) for r, v in zip(rewards, values)]
    ).double()
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)
    close(returns, advantages + values)
    close(gae(rewards[0], values[0], gamma, lam)[0], advantages[0])


def test_gae_of_masked_rows_is_that_of_the_rows_cut_out():
    mask, rewards, values = some_mask(6, 10), random(6, 10), random(6, 10, seed=1)
    advantages, returns = gae(rewards, values, 0.97, 0.9, mask)
    for i in range(6):
        cut = gae(rewards[i, mask[i]], values[i, mask[i]], 0.97, 0.9)
        close(advantages[i, mask[i]], cut[0]), close(returns[i, mask[i]], cut[1])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_with_lambda_1_is_what_came_less_what_was_expected():
    rewards, values = random(2, 12), random(2, 12, seed=1)
    later = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, 1.0, 1.0)
    close(advantages, later - values), close(returns, later)


@pytest.mark.parametrize("options", [dict(gamma=1.1), dict(lam=-0.1), dict(gamma=math.nan)])
def test_gae_refuses_what_does_not_converge(options):
    with pytest.raises(ValueError, match="both must be from 0 to 1"):
        gae(torch.ones(3), torch.ones(3), **options)
    with pytest.raises(ValueError, match=r"shapes differ.*rewards \[3\], values \[4\]"):
        gae(torch.ones(3), torch.ones(4))


def test_gae_and_whitening_are_trls():
    found = TRL["ppo"]
    rewards, values, mask, advantages, returns, white = tensors(
        found, "rewards", "values", "mask", "plain_advantages", "returns", "advantages"
    )
    ours = gae(rewards, values, found["settings"]["gamma"], found["settings"]["lam"], mask)
    close(ours[0], advantages), close(ours[1], returns), close(whiten(ours[0], mask), white)


def test_ppos_losses_gradients_and_diagnostics_are_trls():
    found, c = TRL["ppo"], TRL["ppo"]["settings"]
    logp, old, advantages, values, old_values, returns, mask = tensors(
        found, "new_logprobs", "logprobs", "advantages", "vpred", "values", "returns", "mask"
    )
    logp.requires_grad_(), values.requires_grad_()
    assert policy_loss(logp, old, advantages, mask, c["cliprange"]).item() == pytest.approx(
        found["pg_loss"], abs=1e-6
    )
    assert value_loss(values, old_values, returns, mask, c["cliprange_value"]).item() == pytest.approx(
        found["vf_loss"], abs=1e-6
    )
    loss = ppo_loss(
        logp,
        old,
        advantages,
        values,
        old_values,
        returns,
        mask,
        c["cliprange"],
        c["cliprange_value"],
        c["vf_coef"],
    )
    assert loss.item() == pytest.approx(found["loss"], abs=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, (logp, values)), found["gradients"]):
        close(ours, torch.tensor(theirs).double())
    diagnostics = ratio_diagnostics(logp, old, advantages, mask, c["cliprange"])
    assert 0 < diagnostics["clipfrac"] == pytest.approx(found["pg_clipfrac"], abs=1e-6)
    assert diagnostics["approx_kl"] == pytest.approx((0.5 * (logp - old) ** 2)[mask].mean().item(), rel=1e-9)
    assert diagnostics["ratio"] == pytest.approx(tensors(found, "ratio")[0][mask].mean().item(), rel=1e-9)
    close(kl_estimate(old, logp.detach())[mask], tensors(found, "k3")[0][mask])


def ppo_inputs(seed: int = 0) -> dict[str, Tensor]:
    draw = lambda n: random(3, 5, seed=10 * seed + n)
    return dict(
        logp=-draw(0).exp() + 0.3 * draw(1),
        old_logp=-draw(0).exp(),
        advantages=draw(2),
        values=draw(3),
        old_values=draw(3) + 0.3 * draw(4),
        returns=draw(5),
        mask=some_mask(3, 5, seed),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_by_finite_differences(seed):
    given = ppo_inputs(seed)
    logp, values = given.pop("logp").requires_grad_(), given.pop("values").requires_grad_()
    assert torch.autograd.gradcheck(lambda p, v: ppo_loss(logp=p, values=v, **given), (logp, values))
    advantages = random(3, seed=seed)
    for importance in ("token", "sequence"):
        call = lambda p: grpo_loss(
            p,
            given["old_logp"],
            advantages,
            given["mask"],
            given["old_logp"] + 0.2,
            0.5,
            importance=importance,
        )  # noqa: B023
        assert torch.autograd.gradcheck(call, (logp,))


def test_at_the_first_step_ppos_gradient_is_the_policy_gradient():
    given = ppo_inputs()
    logp = given["old_logp"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        policy_loss(logp, given["old_logp"], given["advantages"], given["mask"]), logp
    )
    close(gradient, -given["advantages"] * given["mask"] / given["mask"].sum())


def test_only_policy_and_values_learn_from_ppos_loss():
    given = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in ppo_inputs().items()}
    given = {name: t.detach().requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    ppo_loss(**given).backward()
    assert {name for name, t in given.items() if t.grad is not None} == {"logp", "values"}


@pytest.mark.parametrize(
    "change, words",
    [(dict(clip=0), "clip=0, value_clip=0.2"), (dict(returns=random(3, 4)), r"returns \[3, 4\]")],
)
def test_ppo_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        ppo_loss(**(ppo_inputs() | change))


def test_explained_variance_is_that_of_the_residuals():
    values, returns, mask = random(4, 6), random(4, 6, seed=1), some_mask(4, 6)
    expected = 1 - np.var((returns - values)[mask].numpy()) / np.var(returns[mask].numpy())
    assert explained_variance(values, returns, mask) == pytest.approx(expected, rel=1e-9)
    assert (
        explained_variance(returns, returns) == 1
        and explained_variance(torch.zeros(4, 6), returns.float()) == 0
    )
    assert math.isnan(explained_variance(values, torch.ones(4, 6)))


# ---- DPO


def dpo_inputs(requires_grad: bool = True) -> tuple[list[Tensor], dict[str, Tensor]]:
    four = tensors(TRL["dpo"], "chosen", "rejected", "ref_chosen", "ref_rejected")
    return [t.requires_grad_(requires_grad) for t in four], {
        name: torch.tensor(TRL["dpo"][name]) for name in ("chosen_lengths", "rejected_lengths")
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "case", TRL["dpo"]["cases"], ids=lambda c: f"{c['loss_type']}-{c['beta']}-{c.get('label_smoothing', 0)}"
)
def test_dpos_losses_and_gradients_are_trls(case, dtype):
    four, lengths = dpo_inputs()
    options = {name: case[name] for name in ("beta", "loss_type", "label_smoothing") if name in case}
    loss = dpo_loss(*(t.to(dtype) for t in four), **options, **lengths)
    assert loss.shape == (5,) and loss.dtype == dtype
    assert loss.mean().item() == pytest.approx(case["loss"], rel=1e-6, abs=1e-6)
    gradients = torch.autograd.grad(loss.mean(), four[:2], materialize_grads=True)
    torch.testing.assert_close(
        torch.cat(gradients), torch.tensor(case["gradient"]).double(), rtol=1e-5, atol=1e-6
    )


def test_every_type_was_held_against_trl():
    assert {case["loss_type"] for case in TRL["dpo"]["cases"]} == set(DPO_LOSSES)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_the_first_loss_is_exactly_ln_2(beta):
    chosen, rejected = (-30 * random(7, seed=s).abs().float() for s in (0, 1))
    loss = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone(), beta)
    assert (loss == torch.tensor(2.0).log()).all() and loss.mean().item() == pytest.approx(
        math.log(2), rel=1e-7
    )


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_the_reference_does_not_learn_and_gradients_are_finite_differences(loss_type):
    four, lengths = dpo_inputs()
    options = dict(
        beta=0.3, loss_type=loss_type, label_smoothing=0.1 if loss_type in SMOOTHED_LOSSES else 0.0, **lengths
    )
    dpo_loss(*four, **options).sum().backward()
    assert four[0].grad is not None and four[2].grad is None and four[3].grad is None
    assert torch.autograd.gradcheck(
        lambda c, r: dpo_loss(c, r, *(t.detach() for t in four[2:]), **options), four[:2]
    )


def test_without_lengths_ipo_takes_the_log_probabilities_as_they_are():
    chosen, rejected, ref_chosen, ref_rejected = (t.detach() for t in dpo_inputs()[0])
    expected = (chosen - ref_chosen - rejected + ref_rejected - 1 / (2 * 0.2)) ** 2
    close(dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.2, "ipo"), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(loss_type="sigmod"), "'sigmod': must be one of sigmoid, hinge, ipo"),
        (dict(beta=0), "beta=0: must be above 0"),
        (dict(beta=math.nan), "beta=nan"),
        (dict(loss_type="exo_pair"), "label_smoothing=0.0: for exo_pair it must be above 0"),
        (dict(loss_type="robust", label_smoothing=0.5), "label_smoothing=0.5: for robust"),
        (dict(label_smoothing=0.1), "label_smoothing=0.1: sigmoid has none"),
        (dict(loss_type="ipo", chosen_lengths=torch.ones(5)), "or neither"),
        (dict(loss_type="sft"), "sft is per token: give chosen_lengths"),
        (dict(loss_type="sigmoid_norm", chosen_lengths=torch.ones(5)), "rejected_lengths"),
        (dict(ref_chosen=torch.ones(4)), r"ref_chosen \[4\]"),
    ],
)
def test_dpo_refuses(change, words):
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    with pytest.raises(ValueError, match=words):
        dpo_loss(**(dict(zip(names, dpo_inputs()[0])) | change))


def test_dpo_refuses_log_probabilities_of_tokens():
    with pytest.raises(ValueError, match=r"summed over each answer, \[batch\], not \[5, 3\]"):
        dpo_loss(*[random(5, 3)] * 4)


PAIRS = [([5, 6], [1, 2, 3], [1]), ([7], [2], [2, 4])]


def test_a_batch_of_preferences_has_the_chosen_first_and_only_answers_in_the_mask():
    ids, mask = preference_batch(PAIRS, pad=9)
    assert (
        ids.tolist() == [[5, 6, 1, 2, 3], [7, 2, 9, 9, 9], [5, 6, 1, 9, 9], [7, 2, 4, 9, 9]]
        and ids.dtype == torch.int64
    )
    assert [ids[i, mask[i]].tolist() for i in range(4)] == [[1, 2, 3], [2], [1], [2, 4]]


def test_padding_does_not_change_a_log_probability():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=10, block_size=8, n_layer=2, n_head=2, n_embd=16)).double()
    ids, mask = preference_batch(PAIRS)
    together = sequence_logprobs(model(ids), ids, mask)
    for i, (prompt, answer) in enumerate(
        [
            (PAIRS[0][0], PAIRS[0][1]),
            (PAIRS[1][0], PAIRS[1][1]),
            (PAIRS[0][0], PAIRS[0][2]),
            (PAIRS[1][0], PAIRS[1][2]),
        ]
    ):
        logp = model(torch.tensor([prompt + answer])).log_softmax(-1)[0]
        alone = sum(logp[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
        assert together[i].item() == pytest.approx(alone, rel=1e-10)


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([*PAIRS, ([1], [2, 3], [2, 3])], "pair 2 has two identical answers: leave it out"),
        ([([1], [2], [])], "pair 0 has an empty answer"),
        ([([], [2], [3])], "pair 0 has an empty prompt"),
        ([], "there are no pairs"),
        ([([1], [2], [2])] * 5, r"pair 2 .*\(and 2 more\)"),
        ([([1], torch.tensor([2, 3]), (2, 3))], "identical"),
    ],
)
def test_preferences_that_prefer_nothing_are_refused(pairs, words):
    with pytest.raises(ValueError, match=words):
        preference_batch(pairs)


# ---- GRPO


@pytest.mark.parametrize("case", TRL["grpo"]["cases"], ids=lambda c: "-".join(map(str, list(c.values())[:4])))
def test_grpos_losses_and_gradients_are_trls(case):
    logp, old, ref, advantages, mask = tensors(
        TRL["grpo"], "logp", "old_logp", "ref_logp", "advantages", "mask"
    )
    logp.requires_grad_()
    options = {name: case[name] for name in ("loss_type", "beta", "importance", "clip_high")}
    loss = grpo_loss(logp, old, advantages, mask, ref, **options)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6, abs=1e-6)
    close(torch.autograd.grad(loss, logp)[0], torch.tensor(case["gradient"]).double())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_in_a_group_are_deviations_from_its_mean(scale):
    scores = random(12).numpy()
    expected = []
    for group in scores.reshape(3, 4):
        divisor = {"group": group.std(ddof=1) + 1e-4, "batch": scores.std(ddof=1) + 1e-4, "none": 1}[scale]
        expected += [(s - group.mean()) / divisor for s in group]
    close(group_advantages(torch.from_numpy(scores), 4, scale), torch.tensor(expected).double())


def test_a_group_of_equal_scores_teaches_nothing():
    assert (group_advantages(torch.full((8,), 3.0), 4) == 0).all()


@pytest.mark.parametrize(
    "size, scale, words", [(1, "group", "group_size=1"), (5, "group", "divide"), (4, "std", "scale='std'")]
)
def test_group_advantages_refuse(size, scale, words):
    with pytest.raises(ValueError, match=words):
        group_advantages(torch.ones(12), size, scale)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(loss_type="dapo"), "loss_type='dapo'"),
        (dict(importance="word"), "importance='word'"),
        (dict(beta=0.1), "needs ref_logp"),
        (dict(advantages=torch.ones(3, 5)), r"advantages \[3, 5\]"),
        (dict(mask=torch.ones(3, 4).bool()), r"mask \[3, 4\]"),
    ],
)
def test_grpo_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        grpo_loss(
            **(dict(logp=torch.zeros(3, 5), old_logp=torch.zeros(3, 5), advantages=torch.ones(3)) | change)
        )


def test_grpo_without_mask_counts_every_token():
    logp, old, advantages = random(3, 5), random(3, 5, seed=1), random(3, seed=2)
    assert grpo_loss(logp, old, advantages) == grpo_loss(logp, old, advantages, torch.ones(3, 5).bool())
    everywhere = [grpo_loss(logp, old, advantages, loss_type=t).item() for t in ("grpo", "bnpo", "dr_grpo")]
    assert everywhere == pytest.approx(
        [everywhere[0]] * 3, rel=1e-12
    )  # answers of one length: all averages are one
