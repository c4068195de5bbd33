"""Clean solutions of week 10's exercises, each with a word on why; `week.solution(name)` shows them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def answer_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits at t are about token t + 1, so they lose their last position, and ids and mask their
    first. Probabilities multiply, so their logarithms add up.
    """
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logp * mask[:, 1:]).sum(1)


def group_relative_advantages(scores: Tensor, group_size: int) -> Tensor:
    """The mean of the group takes the place of a value model: what is better than its siblings is praised."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def clipped_policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The smaller of the two gains: a good token gains nothing more beyond 1 + clip, and a bad one is still
    punished in full where it became likelier.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """r - 1 has the mean 0 over what the policy draws, so adding it to -log r changes no mean; it makes every
    single value at least 0, and the spread small.
    """
    log_r = ref_logp - logp
    return log_r.exp() - 1 - log_r


def first_gradient(logits: Tensor, ids: Tensor, advantages: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """exp(logp - logp.detach()) is 1, but its gradient is that of logp: the policy that drew stands still."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    ratio = (logp - logp.detach()).exp()
    log_r = ref_logp - logp
    loss = (-ratio * advantages + beta * (log_r.exp() - 1 - log_r)).mean()
    return torch.autograd.grad(loss, logits)[0]


def grpo_update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    old_logp: Tensor,
    minibatches: list[Tensor],
    clip: float,
    divide: bool = True,
    length: int | None = None,
    beta: float = 0.0,
    ref_logp: Tensor | None = None,
) -> list[float]:
    """Advantages are fixed before the loop: they are of the answers as they were drawn. In the loop only logp
    is new, and it alone carries a gradient. Each answer is averaged by itself, so a group that earned the
    same throughout adds nothing.
    """
    if divide:
        advantages = group_relative_advantages(rewards.flatten(), rewards.size(1))
    else:
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    losses = []
    for rows in minibatches:
        inside = mask[rows, 1:]
        logits = policy(ids[rows])[:, :-1]
        logp = logits.log_softmax(-1).gather(-1, ids[rows, 1:].unsqueeze(-1)).squeeze(-1)
        ratio = (logp - old_logp[rows]).exp()
        gains = advantages[rows, None] * torch.stack([ratio, ratio.clamp(1 - clip, 1 + clip)])
        by_token = -gains.amin(0)
        if beta:
            by_token = by_token + beta * kl_k3(logp, ref_logp[rows])
        lengths = inside.sum(1) if length is None else length
        loss = ((by_token * inside).sum(1) / lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def penalised_rewards(scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The penalty falls due at every token; the score is for the whole answer, and comes where it ends,
    which is at another place in each row.
    """
    rewards = -beta * (logp - ref_logp) * mask
    last = (mask * torch.arange(mask.size(1))).argmax(1)
    rewards[torch.arange(len(mask)), last] += scores
    return rewards


def advantages_and_returns(
    rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The sum over the future is a recursion from the end: advantage[t] = delta[t] + gamma lam
    advantage[t + 1]. One pass, and not one for each t.
    """
    advantages = torch.zeros_like(rewards)
    running = following = torch.zeros(len(rewards))
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = delta + gamma * lam * running
        following = values[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def whitened_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean and deviation are of what counts, taken out flat; then they are applied to the whole, and the rest
    is set to 0.
    """
    values = advantages[mask]
    return (advantages - values.mean()) / values.std() * mask


def ppo_update(
    policy: nn.Module,
    value: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    mask: Tensor,
    *,
    scores: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    old_values: Tensor,
    epochs: int,
    beta: float,
    gamma: float,
    lam: float,
    clip: float,
    value_coef: float,
) -> list[float]:
    """What was drawn stays as it is: rewards, advantages and returns come before the loop, whitening after
    the returns. In the loop logp and values are new, and both losses are means over the answers' tokens.
    """
    inside = mask[:, 1:]
    rewards = penalised_rewards(scores, old_logp, ref_logp, inside, beta)
    advantages, returns = advantages_and_returns(rewards, old_values * inside, gamma, lam)
    advantages = whitened_advantages(advantages, inside)
    losses = []
    for _ in range(epochs):
        logp = policy(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        policy_part = clipped_policy_loss(logp[inside], old_logp[inside], advantages[inside], clip)
        values = value(ids)[:, :-1, 0]
        clamped = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum((values - returns).square(), (clamped - returns).square())
        loss = policy_part + value_coef * errors[inside].mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def preference_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Only the difference of two rewards counts, as in a match of two players. F.logsigmoid stays finite
    where log(sigmoid(x)) would be the logarithm of 0.
    """
    chosen = policy_chosen - ref_chosen
    rejected = policy_rejected - ref_rejected
    return -F.logsigmoid(beta * (chosen - rejected))


def dpo_step(
    policy: nn.Module,
    reference: nn.Module,
    ids: Tensor,
    mask: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    beta: float,
) -> tuple[float, float]:
    """The reference is read without a graph, so that nothing can move it. Both models read the same batch,
    and what they say to a pair meets in one number: by how much more the chosen answer has gained.
    """
    chosen, rejected = answer_logprobs(policy(ids), ids, mask).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = answer_logprobs(reference(ids), ids, mask).chunk(2)
    loss = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ranked_right = chosen - ref_chosen > rejected - ref_rejected
    return loss.item(), ranked_right.float().mean().item()
