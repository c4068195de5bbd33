"""shared/alignment/policy.py against TRL's frozen numbers, sums written out, and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.alignment import gae, grpo_loss, ppo_loss
from shared.alignment.logprobs import kl_estimate, whiten
from shared.alignment.policy import (
    explained_variance,
    group_advantages,
    leave_one_out_advantages,
    policy_loss,
    ratio_diagnostics,
    token_rewards,
    value_loss,
)
from tests.alignment.helpers import TRL, close, random, some_mask, tensors

# ---- rewards and advantages


def test_the_score_is_earned_at_the_last_token_and_kl_is_paid_at_each():
    mask = some_mask(5, 8)
    kl = random(5, 8)
    scores = random(5, seed=1)
    expected = torch.zeros(5, 8).double()
    for i, row in enumerate(mask.tolist()):
        places = [t for t, is_answer in enumerate(row) if is_answer]
        for t in places:
            expected[i, t] -= 0.3 * kl[i, t]
        expected[i, max(places)] += scores[i]
    close(token_rewards(scores, kl, mask, 0.3), expected)
    mask[2] = False
    with pytest.raises(ValueError, match="an answer has no token"):
        token_rewards(scores, kl, mask, 0.3)


def advantages_by_definition(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> list[float]:
    """The O(T²) sum over one row."""
    r = rewards.tolist()
    v = [*values.tolist(), 0.0]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("time", [1, 2, 17])
def test_gae_is_the_sum_that_defines_it(gamma, lam, time):
    rewards = random(3, time)
    values = random(3, time, seed=1)
    advantages, returns = gae(rewards, values, gamma, lam)
    expected = [advantages_by_definition(r, v, gamma, lam) for r, v in zip(rewards, values)]
    close(advantages, torch.tensor(expected).double())
    close(returns, advantages + values)
    close(gae(rewards[0], values[0], gamma, lam)[0], advantages[0])


def test_gae_of_masked_rows_is_that_of_the_rows_cut_out():
    mask = some_mask(6, 10)
    rewards = random(6, 10)
    values = random(6, 10, seed=1)
    advantages, returns = gae(rewards, values, 0.97, 0.9, mask)
    for i in range(6):
        cut_advantages, cut_returns = gae(rewards[i, mask[i]], values[i, mask[i]], 0.97, 0.9)
        close(advantages[i, mask[i]], cut_advantages)
        close(returns[i, mask[i]], cut_returns)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_gae_with_lambda_1_is_what_came_less_what_was_expected():
    rewards = random(2, 12)
    values = random(2, 12, seed=1)
    later = rewards.flip(1).cumsum(1).flip(1)
    advantages, returns = gae(rewards, values, 1.0, 1.0)
    close(advantages, later - values)
    close(returns, later)


@pytest.mark.parametrize("options", [dict(gamma=1.1), dict(lam=-0.1), dict(gamma=math.nan)])
def test_gae_refuses_what_does_not_converge(options):
    with pytest.raises(ValueError, match="both must be from 0 to 1"):
        gae(torch.ones(3), torch.ones(3), **options)
    with pytest.raises(ValueError, match=r"shapes differ.*rewards \[3\], values \[4\]"):
        gae(torch.ones(3), torch.ones(4))


def test_gae_and_whitening_are_trls():
    frozen = TRL["ppo"]
    settings = frozen["settings"]
    rewards, values, mask = tensors(frozen, "rewards", "values", "mask")
    expected_advantages, expected_returns, white = tensors(
        frozen, "plain_advantages", "returns", "advantages"
    )
    advantages, returns = gae(rewards, values, settings["gamma"], settings["lam"], mask)
    close(advantages, expected_advantages)
    close(returns, expected_returns)
    close(whiten(advantages, mask), white)


# ---- PPO


def test_ppos_losses_gradients_and_diagnostics_are_trls():
    frozen = TRL["ppo"]
    settings = frozen["settings"]
    clip = settings["cliprange"]
    value_clip = settings["cliprange_value"]
    logp, old_logp, advantages, mask = tensors(frozen, "new_logprobs", "logprobs", "advantages", "mask")
    values, old_values, returns = tensors(frozen, "vpred", "values", "returns")
    logp.requires_grad_()
    values.requires_grad_()
    policy = policy_loss(logp, old_logp, advantages, mask, clip)
    assert policy.item() == pytest.approx(frozen["pg_loss"], abs=1e-6)
    value = value_loss(values, old_values, returns, mask, value_clip)
    assert value.item() == pytest.approx(frozen["vf_loss"], abs=1e-6)
    loss = ppo_loss(
        logp,
        old_logp,
        advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        mask=mask,
        clip=clip,
        value_clip=value_clip,
        value_coef=settings["vf_coef"],
    )
    assert loss.item() == pytest.approx(frozen["loss"], abs=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, (logp, values)), frozen["gradients"]):
        close(ours, torch.tensor(theirs).double())
    diagnostics = ratio_diagnostics(logp, old_logp, advantages, mask, clip)
    assert 0 < diagnostics["clipfrac"] == pytest.approx(frozen["pg_clipfrac"], abs=1e-6)
    approx_kl = (0.5 * (logp - old_logp) ** 2)[mask].mean().item()
    assert diagnostics["approx_kl"] == pytest.approx(approx_kl, rel=1e-9)
    ratio, k3 = tensors(frozen, "ratio", "k3")
    assert diagnostics["ratio"] == pytest.approx(ratio[mask].mean().item(), rel=1e-9)
    close(kl_estimate(old_logp, logp.detach())[mask], k3[mask])


def ppo_inputs(seed: int = 0) -> dict[str, Tensor]:
    draws = [random(3, 5, seed=10 * seed + n) for n in range(6)]
    return dict(
        logp=-draws[0].exp() + 0.3 * draws[1],
        old_logp=-draws[0].exp(),
        advantages=draws[2],
        values=draws[3],
        old_values=draws[3] + 0.3 * draws[4],
        returns=draws[5],
        mask=some_mask(3, 5, seed),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_by_finite_differences(seed):
    inputs = ppo_inputs(seed)
    logp = inputs.pop("logp").requires_grad_()
    values = inputs.pop("values").requires_grad_()
    assert torch.autograd.gradcheck(lambda p, v: ppo_loss(logp=p, values=v, **inputs), (logp, values))
    answer_advantages = random(3, seed=seed)

    def grpo(logp: Tensor, importance: str) -> Tensor:
        old_logp = inputs["old_logp"]
        return grpo_loss(
            logp,
            old_logp,
            answer_advantages,
            inputs["mask"],
            ref_logp=old_logp + 0.2,
            beta=0.5,
            importance=importance,
        )

    for importance in ("token", "sequence"):
        assert torch.autograd.gradcheck(grpo, (logp, importance))


def test_at_the_first_step_ppos_gradient_is_the_policy_gradient():
    inputs = ppo_inputs()
    logp = inputs["old_logp"].clone().requires_grad_()
    loss = policy_loss(logp, inputs["old_logp"], inputs["advantages"], inputs["mask"])
    (gradient,) = torch.autograd.grad(loss, logp)
    close(gradient, -inputs["advantages"] * inputs["mask"] / inputs["mask"].sum())


def test_only_policy_and_values_learn_from_ppos_loss():
    inputs = ppo_inputs()
    mask = inputs.pop("mask")
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    ppo_loss(**leaves, mask=mask).backward()
    assert {name for name, t in leaves.items() if t.grad is not None} == {"logp", "values"}


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(clip=0), "clip=0, value_clip=0.2"),
        (dict(returns=random(3, 4)), r"returns \[3, 4\]"),
    ],
)
def test_ppo_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        ppo_loss(**(ppo_inputs() | change))


def test_explained_variance_is_that_of_the_residuals():
    values = random(4, 6)
    returns = random(4, 6, seed=1)
    mask = some_mask(4, 6)
    expected = 1 - np.var((returns - values)[mask].numpy()) / np.var(returns[mask].numpy())
    assert explained_variance(values, returns, mask) == pytest.approx(expected, rel=1e-9)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.zeros(4, 6), returns.float()) == 0
    assert math.isnan(explained_variance(values, torch.ones(4, 6)))


# ---- GRPO


def case_name(case: dict) -> str:
    return "-".join(str(case[name]) for name in ("loss_type", "beta", "importance", "clip_high"))


@pytest.mark.parametrize("case", TRL["grpo"]["cases"], ids=case_name)
def test_grpos_losses_and_gradients_are_trls(case):
    logp, old_logp, ref_logp = tensors(TRL["grpo"], "logp", "old_logp", "ref_logp")
    advantages, mask = tensors(TRL["grpo"], "advantages", "mask")
    logp.requires_grad_()
    options = {name: case[name] for name in ("loss_type", "beta", "importance", "clip_high")}
    loss = grpo_loss(logp, old_logp, advantages, mask, ref_logp, **options)
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


def test_rloos_advantages_are_trls_and_each_is_against_the_mean_of_the_others():
    frozen = TRL["rloo"]
    scores, expected = tensors(frozen, "scores", "advantages")
    advantages = leave_one_out_advantages(scores, frozen["group_size"])
    close(advantages, expected)
    for group, own in zip(scores.view(-1, 4), advantages.view(-1, 4)):
        for i in range(4):
            others = torch.cat([group[:i], group[i + 1 :]])
            close(own[i], group[i] - others.mean())


def test_rloos_advantages_are_dr_grpos_times_a_constant_that_adam_does_not_see():
    scores = random(16)
    close(leave_one_out_advantages(scores, 8), group_advantages(scores, 8, "none") * 8 / 7)


def test_a_group_of_equal_scores_teaches_nothing():
    assert (group_advantages(torch.full((8,), 3.0), 4) == 0).all()


@pytest.mark.parametrize(
    "size, scale, words",
    [(1, "group", "group_size=1"), (5, "group", "divide"), (4, "std", "scale='std'")],
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
    inputs = dict(logp=torch.zeros(3, 5), old_logp=torch.zeros(3, 5), advantages=torch.ones(3))
    with pytest.raises(ValueError, match=words):
        grpo_loss(**(inputs | change))


def test_grpo_without_mask_counts_every_token():
    logp = random(3, 5)
    old_logp = random(3, 5, seed=1)
    advantages = random(3, seed=2)
    everything = torch.ones(3, 5).bool()
    assert grpo_loss(logp, old_logp, advantages) == grpo_loss(logp, old_logp, advantages, everything)
    losses = [grpo_loss(logp, old_logp, advantages, loss_type=t).item() for t in ("grpo", "bnpo", "dr_grpo")]
    # Answers of one length: all averages are the same.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)
