"""Clean solutions of week 10's exercises, each with a word on why; `week.solution(name)` shows them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits at t are about token t + 1, so they lose their last position, and ids and mask their
    first. Probabilities multiply, so their logarithms add up.
    """
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logp * mask[:, 1:]).sum(1)


def preference_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Only the difference of two rewards counts, as in a match of two players. F.logsigmoid stays finite
    where log(sigmoid(x)) would be the logarithm of 0.
    """
    chosen = policy_chosen - ref_chosen
    rejected = policy_rejected - ref_rejected
    return -F.logsigmoid(beta * (chosen - rejected))


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """r - 1 has the mean 0 over what the policy draws, so adding it to -log r changes no mean; it makes every
    single value at least 0, and the spread small.
    """
    log_r = ref_logp - logp
    return log_r.exp() - 1 - log_r


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


def clipped_policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The smaller of the two gains: a good token gains nothing more beyond 1 + clip, and a bad one is still
    punished in full where it became likelier.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def group_relative_advantages(scores: Tensor, group_size: int) -> Tensor:
    """The mean of the group takes the place of a value model: what is better than its siblings is praised."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


def first_gradient(logits: Tensor, ids: Tensor, advantages: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """exp(logp - logp.detach()) is 1, but its gradient is that of logp: the policy that drew stands still."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    ratio = (logp - logp.detach()).exp()
    log_r = ref_logp - logp
    loss = (-ratio * advantages + beta * (log_r.exp() - 1 - log_r)).mean()
    return torch.autograd.grad(loss, logits)[0]
