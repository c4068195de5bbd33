"""Week 10. The losses of PPO and GRPO, which learn from answers that the policy itself has drawn.

Sources: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), and for language models Ziegler et
al. (2019); Schulman et al., "Generalized Advantage Estimation" (2015); Shao et al., "DeepSeekMath" (GRPO,
2024), with the variants of Liu et al. (Dr. GRPO, 2025), Yu et al. (DAPO, 2025) and Zheng et al. (GSPO, 2025);
Ahmadian et al., "Back to Basics" (RLOO, 2024).

Both methods (GRPO in one of its forms, see `GRPOConfig.kl`), like DPO, look for the same policy: the one with
the greatest mean of r(x, y) - beta · KL(policy ‖ reference). It is known in closed form, pi*(y|x) ∝
pi_ref(y|x) · exp(r(x, y) / beta), so where all answers can be listed, a method can be tested against it.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from shared.alignment.logprobs import check_same_shapes, kl_estimate, last_token, masked_mean


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The reward of each token: -beta · its KL, and at an answer's last token the answer's score as well.

    scores [batch], kl and mask [batch, time] -> [batch, time], 0 outside the mask. Raises ValueError for an
    answer without a token.
    """
    check_same_shapes(kl=kl, mask=mask)
    if not mask.any(1).all():
        raise ValueError(
            "an answer has no token, so nothing can earn its score: each row of the mask needs one"
        )
    last = last_token(mask).unsqueeze(1)  # [batch, 1]
    penalties = (-beta * kl).masked_fill(~mask, 0)
    return penalties.scatter_add(1, last, scores.to(kl.dtype).unsqueeze(1))


def gae(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2015): (advantages, returns), [..., time] each.

    advantage_t = Σ_k (gamma · lam)^k · delta_(t+k), with delta_t = reward_t + gamma · value_(t+1) - value_t;
    after the last token the value is 0. returns = advantages + values: what the value model learns. mask:
    True for each row's tokens, which must be adjacent; both results are 0 elsewhere. Raises ValueError for a
    gamma or lam outside 0 to 1, and where shapes differ.

    >>> gae(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.5]), gamma=1.0, lam=1.0)
    (tensor([0.5000, 0.5000, 0.5000]), tensor([1., 1., 1.]))
    """
    check_same_shapes(rewards=rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma={gamma}, lam={lam}: both must be from 0 to 1")
    if mask is not None:
        rewards = rewards.masked_fill(~mask, 0)
        values = values.masked_fill(~mask, 0)
    advantage = torch.zeros_like(rewards[..., 0])
    next_value = advantage
    backwards = []
    for t in reversed(range(rewards.size(-1))):
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantage = delta + gamma * lam * advantage
        next_value = values[..., t]
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], -1)
    if mask is not None:
        advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, clip: float = 0.2
) -> Tensor:
    """PPO's clipped loss of the policy, a scalar; all tensors [batch, time].

    The mean over tokens of -min(ratio · A, clamp(ratio, 1 - clip, 1 + clip) · A), where the ratio is
    exp(logp - old_logp). Beyond the clip a token has no gradient in the direction in which it has already
    moved. The old log-probabilities are constants.
    """
    return masked_mean(_clipped_losses(logp - old_logp, advantages, clip, clip), mask)


def _clipped_losses(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(ratio · A, clamp(ratio, 1 - low, 1 + high) · A), elementwise."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None = None, clip: float = 0.2
) -> Tensor:
    """PPO's clipped loss of the value model, a scalar; all tensors [batch, time].

    Half the mean of the larger of two squared errors: the value's own, and that of the value clamped to at
    most `clip` from the old one.
    """
    check_same_shapes(values=values, old_values=old_values, returns=returns)
    clamped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clamped - returns).square())
    return 0.5 * masked_mean(errors, mask)


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
) -> Tensor:
    """PPO's loss, policy_loss + value_coef · value_loss, a scalar; all tensors [batch, time], mask bool.

    Only `logp` and `values` get a gradient, whatever the others carry. Raises ValueError where shapes differ,
    and for a clip that is not above 0.
    """
    check_same_shapes(
        logp=logp,
        old_logp=old_logp,
        advantages=advantages,
        values=values,
        old_values=old_values,
        returns=returns,
        mask=mask,
    )
    if not (clip > 0 and value_clip > 0):
        raise ValueError(f"clip={clip}, value_clip={value_clip}: both must be above 0; 0.2 is usual")
    policy = policy_loss(logp, old_logp.detach(), advantages.detach(), mask, clip)
    return policy + value_coef * value_loss(values, old_values.detach(), returns.detach(), mask, value_clip)


@torch.no_grad()
def ratio_diagnostics(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, clip: float = 0.2
) -> dict[str, float]:
    """How far the policy has moved since it drew the answers; all tensors [batch, time].

    approx_kl: the KL divergence by k2, nats per token; clipfrac: the share of tokens whose gradient the clip
    removes; ratio: its mean, 1 at the first step. With approx_kl above about 0.02 or clipfrac above 0.2, take
    fewer epochs or a lower learning rate.
    """
    ratio = (logp - old_logp).exp()
    clipped = -ratio.clamp(1 - clip, 1 + clip) * advantages > -ratio * advantages
    by_token = {
        "approx_kl": kl_estimate(old_logp, logp, "k2"),
        "clipfrac": clipped.to(ratio.dtype),
        "ratio": ratio,
    }
    return {name: masked_mean(values, mask).item() for name, values in by_token.items()}


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> float:
    """1 - var(returns - values) / var(returns); nan where the returns do not vary.

    It is 1 for perfect values, 0 for a constant, and below 0 for values that are worse than a constant.
    """
    check_same_shapes(values=values, returns=returns, mask=mask)
    if mask is not None:
        values = values[mask]
        returns = returns[mask]
    total = returns.var().item()
    if not total > 0:
        return math.nan
    return 1 - (returns - values).var().item() / total


def group_advantages(
    scores: Tensor, group_size: int, scale: Literal["group", "batch", "none"] = "group"
) -> Tensor:
    """Each answer's score less the mean of its group, over a standard deviation (Shao et al., 2024).

    scores [groups · group_size], the answers to one prompt side by side -> the same shape. The deviation
    (unbiased, + 1e-4) is that of the group or of the batch; "none" divides by nothing, as Dr. GRPO does (Liu
    et al., 2025). Dividing by the group's makes one beta mean something else for each prompt, and so changes
    the optimum. Raises ValueError for groups of one, and for a batch that group_size does not divide.
    """
    if group_size < 2 or scores.numel() % group_size:
        raise ValueError(
            f"group_size={group_size} for {scores.numel()} scores: it must be at least 2 and divide them"
        )
    groups = scores.view(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        advantages = advantages / (scores.std() + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale={scale!r}: must be group, batch or none")
    return advantages.flatten()


def leave_one_out_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Each answer's score less the mean of the *other* answers of its group (RLOO, Ahmadian et al., 2024).

    scores [groups · group_size] -> the same shape. The baseline does not depend on the answer, so the policy
    gradient stays unbiased. It is group_size / (group_size - 1) times the deviation from the group's mean.
    Raises ValueError as `group_advantages` does.
    """
    return group_advantages(scores, group_size, "none") * group_size / (group_size - 1)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    ref_logp: Tensor | None = None,
    *,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_high: float | None = None,
    loss_type: Literal["grpo", "bnpo", "dr_grpo"] = "grpo",
    importance: Literal["token", "sequence"] = "token",
) -> Tensor:
    """GRPO's loss, a scalar: PPO's clipped loss, with beta · k3 to the reference added.

    logp, old_logp, ref_logp and mask are [batch, time]; advantages [batch], one for a whole answer. beta
    needs ref_logp. Only `logp` gets a gradient.

    loss_type: how tokens are averaged. "grpo": over each answer, then over answers, so that a token of a
    short answer weighs more. "bnpo": over all tokens. "dr_grpo": the sum over batch · time, the same for each
    token however long the answer is (Liu et al., 2025).
    importance: "sequence" takes one ratio for a whole answer, the geometric mean (GSPO, Zheng et al., 2025).
    clip_high: the upper clip, where it is another than the lower (DAPO, Yu et al., 2025).

    Raises ValueError where shapes differ, for an unknown type, and for a beta without ref_logp.
    """
    check_same_shapes(logp=logp, old_logp=old_logp, ref_logp=ref_logp, mask=mask)
    check_same_shapes(advantages=advantages, rows=logp[:, 0])
    if loss_type not in ("grpo", "bnpo", "dr_grpo") or importance not in ("token", "sequence"):
        raise ValueError(
            f"loss_type={loss_type!r}, importance={importance!r}: must be grpo, bnpo or dr_grpo, and token or"
            " sequence"
        )
    if mask is None:
        mask = torch.ones_like(logp, dtype=torch.bool)
    lengths = mask.sum(1).clamp(min=1)
    log_ratio = (logp - old_logp.detach()).masked_fill(~mask, 0)
    if importance == "sequence":
        log_ratio = (log_ratio.sum(1) / lengths).unsqueeze(1).expand_as(logp)
    high = clip if clip_high is None else clip_high
    losses = _clipped_losses(log_ratio, advantages.detach().unsqueeze(1), clip, high)
    if beta:
        if ref_logp is None:
            raise ValueError(f"beta={beta} needs ref_logp, the reference's log-probabilities")
        losses = losses + beta * kl_estimate(logp, ref_logp.detach())
    losses = losses.masked_fill(~mask, 0)
    if loss_type == "grpo":
        return (losses.sum(1) / lengths).mean()
    if loss_type == "bnpo":
        return losses.sum() / mask.sum().clamp(min=1)
    return losses.sum() / losses.numel()
