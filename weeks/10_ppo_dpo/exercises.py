"""The graded exercises of week 10: an answer's log-probability, groups, PPO's clip, a KL estimate, what must
not be differentiated, GRPO's whole update; rewards with a penalty, GAE, whitening, PPO's whole update; DPO's
loss and its whole step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.alignment import dpo_loss, gae
from shared.alignment.logprobs import kl_estimate, sequence_logprobs, token_logprobs, whiten
from shared.alignment.loops import DPO, GRPO, PPO
from shared.alignment.policy import group_advantages, grpo_loss, policy_loss, ppo_loss, token_rewards
from shared.course.exercise import Exercise, Mistake, NotRight, random_int


def _mask(generator: Generator, batch: int, time: int) -> Tensor:
    """bool [batch, time]: each row begins with at least one prompt token, has at least two of the answer, and
    the first row ends in padding.
    """
    start = torch.randint(1, time - 3, (batch, 1), generator=generator)
    end = start + 2 + (torch.rand(batch, 1, generator=generator) * (time - 1 - start)).long()
    end[0] = torch.minimum(end[0], torch.tensor(time - 1))
    places = torch.arange(time)
    return (places >= start) & (places < end)


def _randn(generator: Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=generator)


SIZES = (2, 6), (3, 8), (4, 6), (2, 9), (5, 7)


# ---- 1. how likely an answer is


def answer_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return sequence_logprobs(logits, ids, mask)


def _picked(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _padding_counted(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    from_answer_on = mask.cumsum(1) > 0
    return (token_logprobs(logits, ids) * from_answer_on[:, 1:]).sum(1)


def _prompt_counted(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    up_to_answers_end = mask.flip(1).cumsum(1).flip(1) > 0
    return (token_logprobs(logits, ids) * up_to_answers_end[:, 1:]).sum(1)


def _logits_summed(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    picked = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (picked * mask[:, 1:]).sum(1)


def _answer_cases(generator: Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    def case(batch: int, time: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = _randn(generator, batch, time, 5)
        ids = torch.randint(5, (batch, time), generator=generator)
        return logits, ids, _mask(generator, batch, time)

    logits, ids, mask = case(2, 5)
    at_answer = F.one_hot(ids[:, 1:], 5).bool() & mask[:, 1:, None]
    logits[:, :-1][at_answer] = -200.0  # the softmax there is 0 in float32
    return [*(case(*sizes) for sizes in SIZES), (logits, ids, mask)]


def _log_of_softmax(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    logp = logits.softmax(-1).log()[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logp * mask[:, 1:]).sum(1)


ANSWER_LOGPROBS = Exercise(
    task="""How likely is an answer, given its prompt? `ids` is int64 [batch, time]: a prompt, its answer,
    then padding. `mask` is bool [batch, time], True at the answer's tokens. `logits` is float32 [batch, time,
    vocab_size], what the model said to `ids`: those at position t are about token t + 1. Return each answer's
    log-probability, the sum over its tokens, float32 [batch]; it is finite for very unlikely answers, too.
    Each row has a prompt of at least one token.""",
    reference=answer_logprobs,
    forbids=(sequence_logprobs, token_logprobs),
    differentiable=True,
    cases=_answer_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "log-probabilities of the wrong position",
            lambda logits, ids, mask: (_picked(logits, ids) * mask).sum(1),
            "The logits at position t were read as if they were about token t. They are about the token after"
            " it: logits[:, :-1] belong to ids[:, 1:].",
        ),
        Mistake(
            "padding is counted",
            _padding_counted,
            "What comes after the answer was counted too. Padding has a log-probability like any token, and"
            " long batches then look unlikely.",
        ),
        Mistake(
            "the prompt is counted",
            _prompt_counted,
            "The prompt's tokens were counted as well. It was given; only the answer is the model's own.",
        ),
        Mistake(
            "the mask is not shifted",
            lambda logits, ids, mask: (token_logprobs(logits, ids) * mask[:, :-1]).sum(1),
            "The mask stayed where it was while the tokens moved by one. The log-probability with number t is"
            " about token t + 1: take mask[:, 1:].",
        ),
        Mistake(
            "a mean instead of a sum",
            lambda logits, ids, mask: sequence_logprobs(logits, ids, mask) / mask.sum(1),
            "This is the mean over the tokens. Probabilities of tokens multiply, so their logarithms add up.",
        ),
        Mistake(
            "minus the log-probability",
            lambda logits, ids, mask: -sequence_logprobs(logits, ids, mask),
            "The sign is turned: this is a loss. A log-probability is at most 0, and a likelier answer has"
            " the greater one.",
        ),
        Mistake(
            "logits instead of log-probabilities",
            _logits_summed,
            "Logits were added up. They become log-probabilities by log_softmax over the vocabulary.",
        ),
        Mistake(
            "the logarithm of a softmax",
            _log_of_softmax,
            "The softmax of a very unlikely token is 0 in float32, and its logarithm is -inf. log_softmax"
            " takes the logarithm on the way, and stays finite.",
        ),
    ),
    hints=(
        "Which position's logits predict ids[:, 1]? Leave out what has no partner, on both sides.",
        (
            "log_softmax(-1) of logits[:, :-1], then gather the entries at ids[:, 1:]. Which part of the mask"
            " fits?"
        ),
        (
            "logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1); return (logp *"
            " mask[:, 1:]).sum(1)."
        ),
    ),
)


# ---- 2. groups


def group_relative_advantages(scores: Tensor, group_size: int) -> Tensor:
    return group_advantages(scores, group_size)


def _grouped(groups: Tensor, correction: int = 1, epsilon: float = 1e-4) -> Tensor:
    """groups: [prompts, group_size]. epsilon: what keeps the deviation from 0."""
    deviation = groups.std(1, keepdim=True, correction=correction) + epsilon
    return (groups - groups.mean(1, keepdim=True)) / deviation


def _group_cases(generator: Generator) -> list[tuple[Tensor, int]]:
    def case(groups: int, size: int) -> tuple[Tensor, int]:
        spread = 0.5 + torch.arange(groups)[:, None]
        scores = _randn(generator, groups, size) * spread + 2 * _randn(generator, groups, 1)
        return scores.flatten(), size

    cases = [case(2, 3), case(3, 4), case(4, 2), case(5, 8)]
    all_equal = torch.ones(4)
    return [*cases, (torch.cat([all_equal, case(1, 4)[0]]), 4)]


GROUP_RELATIVE_ADVANTAGES = Exercise(
    task="""GRPO needs no value model: an answer is compared with others to the same prompt. `scores` is
    float32 [prompts · group_size], the `group_size` answers to one prompt side by side. An answer's advantage
    is its score less the mean of its group, divided by the group's standard deviation (unbiased) plus 1e-4.
    Return float32, of the shape of scores. A group of equal scores gets zeros.""",
    reference=group_relative_advantages,
    forbids=(group_advantages,),
    cases=_group_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "groups of scattered answers",
            lambda scores, size: _grouped(scores.view(size, -1).T).T.flatten(),
            "Each group takes every n-th answer, from different prompts. A hard prompt's answers then all"
            " look bad. Side by side is view(-1, group_size).",
        ),
        Mistake(
            "the mean of the batch",
            lambda scores, size: (scores - scores.mean()) / (scores.std() + 1e-4),
            "All prompts share one mean. An easy prompt's answers then all look good, whatever they are:"
            " compare within a group.",
        ),
        Mistake(
            "the deviation of the batch",
            lambda scores, size: group_advantages(scores, size, "batch"),
            "The mean is the group's, the deviation that of the whole batch.",
        ),
        Mistake(
            "not divided",
            lambda scores, size: group_advantages(scores, size, "none"),
            "The deviation is missing. Dr. GRPO leaves it out with good reason, but here it is asked for.",
        ),
        Mistake(
            "biased deviation",
            lambda scores, size: _grouped(scores.view(-1, size), correction=0).flatten(),
            "The sum of squares was divided by n. Tensor.std divides by n - 1, unless told otherwise; in a"
            " group of two that is a factor of 1.4.",
        ),
        Mistake(
            "nothing keeps the deviation from 0",
            lambda scores, size: _grouped(scores.view(-1, size), epsilon=0.0).flatten(),
            "Where all answers of a group score the same, this is 0 / 0. Add 1e-4 to the deviation.",
        ),
    ),
    hints=(
        "Give the groups a dimension of their own.",
        "groups = scores.view(-1, group_size); mean and std along dim 1, with keepdim=True.",
        "return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten().",
    ),
)


# ---- 3. PPO's clip


def clipped_policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> Tensor:
    return policy_loss(logp, old_logp, advantages, clip=clip)


def _ratio_loss(
    ratio: Tensor, advantages: Tensor, low: float, high: float, worse: Callable = torch.minimum
) -> Tensor:
    return -worse(ratio * advantages, ratio.clamp(low, high) * advantages).mean()


def _smaller_ratio(logp: Tensor, old: Tensor, a: Tensor, clip: float) -> Tensor:
    ratio = (logp - old).exp()
    return -(torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip)) * a).mean()


def _clip_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, clip: float) -> tuple:
        old_logp = -torch.rand(batch, time, generator=generator)
        logp = old_logp + 0.6 * _randn(generator, batch, time)
        return logp, old_logp, _randn(generator, batch, time), clip

    *picked, clip = case(1, 7, 0.25)
    cases = [case(*sizes, clip) for sizes, clip in zip(SIZES, (0.2, 0.1, 0.3, 0.2, 0.15))]
    return [*cases, (*(tensor[0] for tensor in picked), clip)]


CLIPPED_POLICY_LOSS = Exercise(
    task="""PPO learns from the same answers several times, as long as the policy stays near the one that drew
    them. `logp` and `old_logp`, float32, are the tokens' log-probabilities now and when they were drawn;
    `advantages` is float32. All three have one shape: [batch, time] or, where some tokens were picked,
    [tokens]. With ratio = probability now / then, each token's gain is the smaller of ratio · advantage and
    ratio clamped to 1 - clip .. 1 + clip, times advantage. Return minus the mean gain, a scalar.""",
    reference=clipped_policy_loss,
    forbids=(policy_loss, ppo_loss, grpo_loss),
    cases=_clip_cases,
    mistakes=(
        Mistake(
            "the larger of the two",
            lambda logp, old, a, clip: _ratio_loss((logp - old).exp(), a, 1 - clip, 1 + clip, torch.maximum),
            "The larger gain was taken. The clip then never holds a token back; the smaller one is the"
            " cautious one.",
        ),
        Mistake(
            "only the clipped one",
            lambda logp, old, a, clip: -((logp - old).exp().clamp(1 - clip, 1 + clip) * a).mean(),
            "Without the unclipped gain, a token that went the wrong way beyond the clip has no gradient and"
            " cannot come back.",
        ),
        Mistake(
            "no clip",
            lambda logp, old, a, clip: -((logp - old).exp() * a).mean(),
            "The ratio was not clamped: nothing keeps several steps on one batch from going too far.",
        ),
        Mistake(
            "the difference of logarithms as a ratio",
            lambda logp, old, a, clip: _ratio_loss(logp - old, a, 1 - clip, 1 + clip),
            "logp - old_logp is the logarithm of the ratio. Where nothing changed it is 0, and the ratio is"
            " 1: take exp.",
        ),
        Mistake(
            "then over now",
            lambda logp, old, a, clip: _ratio_loss((old - logp).exp(), a, 1 - clip, 1 + clip),
            "The ratio is the wrong way round: its gradient makes good tokens less likely.",
        ),
        Mistake(
            "a gain, not a loss",
            lambda logp, old, a, clip: -policy_loss(logp, old, a, clip=clip),
            "The sign is that of a gain. An optimizer makes a loss small, and would make the policy worse.",
        ),
        Mistake(
            "the smaller ratio, not the smaller gain",
            _smaller_ratio,
            "The smaller ratio was taken before multiplying. For a negative advantage the smaller gain has"
            " the larger ratio.",
        ),
    ),
    hints=(
        "The ratio of two probabilities is exp of the difference of their logarithms.",
        (
            "Two candidates, ratio * advantages and ratio.clamp(1 - clip, 1 + clip) * advantages."
            " torch.minimum compares them token by token."
        ),
        (
            "ratio = (logp - old_logp).exp(); return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip,"
            " 1 + clip) * advantages).mean()."
        ),
    ),
)


# ---- 4. KL from samples


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    return kl_estimate(logp, ref_logp, "k3")


def _kl_cases(generator: Generator) -> list[tuple[Tensor, Tensor]]:
    return [
        (-torch.rand(*sizes, generator=generator), -torch.rand(*sizes, generator=generator) * 2)
        for sizes in SIZES
    ]


KL_K3 = Exercise(
    task="""The policy drew some tokens; how far is it from the reference? `logp` and `ref_logp`, float32
    [batch, time], are the log-probabilities that policy and reference give to what the *policy* drew. With r
    = reference's probability / policy's, return r - 1 - log r for each token, float32 [batch, time]. Its mean
    over what the policy draws is KL(policy ‖ reference), and no single one is negative.""",
    reference=kl_k3,
    forbids=(kl_estimate,),
    cases=_kl_cases,
    mistakes=(
        Mistake(
            "KL with the wrong sign",
            lambda logp, ref: (logp - ref).exp() - 1 - (logp - ref),
            "r was taken the other way round, policy / reference. Never negative either, but its mean over"
            " what the policy draws is not the KL.",
        ),
        Mistake(
            "k1",
            lambda logp, ref: logp - ref,
            "This is -log r: right on average, but it swings between plus and minus. r - 1 has mean zero, and"
            " adding it calms the estimate.",
        ),
        Mistake(
            "k2",
            lambda logp, ref: (logp - ref).square() / 2,
            "This is half the square of log r. It is near for policies that are near each other, but its mean"
            " is not the KL.",
        ),
        Mistake(
            "the 1 is forgotten",
            lambda logp, ref: (ref - logp).exp() - (ref - logp),
            "Where policy and reference agree this is 1, not 0.",
        ),
        Mistake(
            "the logarithm is added",
            lambda logp, ref: (ref - logp).exp() - 1 + (ref - logp),
            "log r was added, so it can be negative, and its mean is minus the KL. It is r - 1 - log r.",
        ),
    ),
    hints=(
        "What is log r in terms of the two arguments?",
        "log_r = ref_logp - logp. The parts are log_r.exp(), 1 and log_r.",
        "log_r = ref_logp - logp; return log_r.exp() - 1 - log_r.",
    ),
)


# ---- 5. what is a constant


def first_gradient(logits: Tensor, ids: Tensor, advantages: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    return _gradient(logits, ids, lambda logp: _objective(logp, logp.detach(), advantages, ref_logp, beta))


def _gradient(logits: Tensor, ids: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(_picked(logits, ids)), logits)[0]


def _objective(logp: Tensor, old_logp: Tensor, advantages: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    return (-(logp - old_logp).exp() * advantages + beta * kl_estimate(logp, ref_logp)).mean()


def _nothing_detached(logits: Tensor, ids: Tensor, a: Tensor, ref: Tensor, beta: float) -> Tensor:
    return _gradient(logits, ids, lambda logp: _objective(logp, logp, a, ref, beta))


def _shifted_gradient(logits: Tensor, ids: Tensor, a: Tensor, ref: Tensor, beta: float) -> Tensor:
    logits = logits.clone().requires_grad_()
    logp = _picked(logits[:, :-1], ids[:, 1:])
    loss = _objective(logp, logp.detach(), a[:, 1:], ref[:, 1:], beta)
    return torch.autograd.grad(loss, logits)[0]


def _constant_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, beta: float) -> tuple:
        ids = torch.randint(4, (batch, time), generator=generator)
        ref_logp = _picked(_randn(generator, batch, time, 4), ids)
        logits = _randn(generator, batch, time, 4)
        return logits, ids, _randn(generator, batch, time), ref_logp, beta

    return [case(*sizes, beta) for sizes, beta in zip(SIZES, (0.1, 0.5, 1.0, 0.3, 0.2))]


FIRST_GRADIENT = Exercise(
    task="""At the first step after drawing, the policy is still the one that drew, so one forward pass gives
    both log-probabilities. `logits` is float32 [batch, time, vocab_size], `ids` int64 [batch, time]; here
    logits[b, t] are about ids[b, t]. The loss of a token is -ratio · advantage + beta · k3, with ratio =
    policy now / policy that drew, `advantages` float32 [batch, time], and k3 = r - 1 - log r with log r =
    ref_logp - logp, `ref_logp` float32 [batch, time]. The ratio is 1, but its gradient is not 0: the policy
    that drew is a constant (detach). Return the gradient of the mean loss with respect to logits, float32
    like logits. Do not change logits itself: clone it, then requires_grad_().""",
    reference=first_gradient,
    forbids=(kl_estimate, policy_loss, grpo_loss),
    cases=_constant_cases,
    mistakes=(
        Mistake(
            "the old policy is not detached",
            _nothing_detached,
            "Both sides of the ratio carry a gradient, and they cancel: the reward teaches nothing, only the"
            " KL is left. Detach the old one alone: with the whole ratio detached it is the same.",
        ),
        Mistake(
            "the policy in the KL is detached",
            lambda logits, ids, a, ref, beta: first_gradient(logits, ids, a, ref, 0.0),
            "The KL has no gradient: it is measured, but does not hold the policy. The reference is the"
            " constant there.",
        ),
        Mistake(
            "shifted by one",
            _shifted_gradient,
            "The last logits and the first id were left out, as where logits speak of the next token. Here"
            " logits[b, t] are about ids[b, t] already: all positions count, and none moves.",
        ),
        Mistake(
            "summed, not averaged",
            lambda logits, ids, a, ref, beta: first_gradient(logits, ids, a, ref, beta) * ids.numel(),
            "This is the gradient of the sum over all tokens. It is the mean that is asked for.",
        ),
        Mistake(
            "a gain, not a loss",
            lambda logits, ids, a, ref, beta: first_gradient(logits, ids, -a, ref, beta),
            "The advantage has the wrong sign: a step down this loss makes good tokens less likely.",
        ),
        Mistake(
            "KL with the wrong sign",
            lambda logits, ids, a, ref, beta: first_gradient(logits, ids, a, ref, -beta),
            "The KL was taken off the loss. It then drives the policy away from the reference.",
        ),
    ),
    hints=(
        "logp = log_softmax of the logits, gathered at ids. Which of its two uses in the ratio may move?",
        "ratio = (logp - logp.detach()).exp(). For the gradient: torch.autograd.grad(loss, logits)[0].",
        (
            "logits = logits.clone().requires_grad_(); logp = logits.log_softmax(-1).gather(-1, ids[...,"
            " None]).squeeze(-1); log_r = ref_logp - logp; loss = (-(logp - logp.detach()).exp() * advantages"
            " + beta * (log_r.exp() - 1 - log_r)).mean()."
        ),
    ),
)


# ---- 6. GRPO's update


class _Tiny(nn.Module):
    """A policy or a value model of a few dozen numbers: it reads a token and the mean of all up to it. In
    float64, so that steps can be compared closely.
    """

    def __init__(self, vocab_size: int, outputs: int, seed: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 4)
        self.head = nn.Linear(4, outputs)
        self.double()
        generator = Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values)
                parameter.grad = torch.ones_like(parameter)  # left over from somewhere else

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        so_far = x.cumsum(1) / torch.arange(1, ids.size(1) + 1).view(-1, 1)
        return self.head(torch.tanh(x + so_far))


def _when_drawn(now: Tensor, mask: Tensor, stale: float, seed: int) -> Tensor:
    """What a model gave the tokens when they were drawn, float64 [batch, time - 1]: what it gives them now,
    but for `stale` of noise; and outside the mask numbers that mean nothing.
    """
    noise = torch.randn(now.shape, generator=Generator().manual_seed(seed), dtype=now.dtype)
    return torch.where(mask[:, 1:], now.detach() + stale * noise, 3 * noise)


def _drawn(generator: Generator, batch: int, time: int) -> tuple[Tensor, Tensor]:
    """ids and mask of a batch of answers, as `draw_answers` returns them."""
    ids = torch.randint(5, (batch, time), generator=generator)
    return ids, _mask(generator, batch, time)


def _are_drawn(ids: Tensor, mask: Tensor) -> bool:
    """Whether each row has a prompt, and then the tokens of an answer side by side."""
    edges = (mask[:, 1:] != mask[:, :-1]).sum(1) + mask[:, -1].int()
    one_run = bool(((edges == 2) & ~mask[:, 0]).all())
    return ids.shape == mask.shape and ids.dim() == 2 and one_run and int(ids.min()) >= 0


def _are_losses(losses: Any) -> None:
    """Raises NotRight for what is no list of numbers."""
    if not isinstance(losses, list):
        raise NotRight(
            f"it returns {type(losses).__name__}, and a list of losses is wanted, one for each step."
        )
    if any(isinstance(loss, Tensor) for loss in losses):
        raise NotRight(
            "there are tensors among the losses, and each holds its whole graph in memory: .item() makes a"
            " plain number."
        )


def _unchanged(given: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Raises NotRight where the answer has written into a tensor that it was given."""
    for name, tensor in given.items():
        if not torch.equal(tensor, before[name]):
            raise NotRight(
                f"it writes into `{name}`, which belongs to whoever called it: an operation that returns a"
                " new tensor leaves it as it was."
            )


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
    advantages = group_advantages(rewards.flatten(), rewards.size(1), "group" if divide else "none")
    losses = []
    for rows in minibatches:
        logp = token_logprobs(policy(ids[rows]), ids[rows])
        loss = grpo_loss(
            logp,
            old_logp[rows],
            advantages[rows],
            mask[rows, 1:],
            None if ref_logp is None else ref_logp[rows],
            beta=beta,
            clip=clip,
            loss_type="grpo" if length is None else "dr_grpo",
        )
        if length is not None:
            loss = loss * logp.size(1) / length
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


GRPO_STUB = """def grpo_update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,  # int64 [answers, time]
    mask: torch.Tensor,  # bool [answers, time]
    rewards: torch.Tensor,  # [prompts, group_size]
    *,
    old_logp: torch.Tensor,  # [answers, time - 1]
    minibatches: list[torch.Tensor],  # each int64 [rows]
    clip: float,
    divide: bool = True,
    length: int | None = None,
    beta: float = 0.0,
    ref_logp: torch.Tensor | None = None,  # [answers, time - 1]
) -> list[float]:
    # of your own: group_relative_advantages, kl_k3
    # your code here
    ...
"""


def _group_update_cases(generator: Generator) -> list[tuple]:
    def case(prompts: int, group_size: int, time: int, steps: int, **changes: Any) -> tuple:
        answers = prompts * group_size
        ids, mask = _drawn(generator, answers, time)
        rewards = (torch.rand(prompts, group_size, generator=generator) < 0.4).float()
        rewards[:, 0], rewards[:, 1] = 1, 0  # in each group there is something to learn
        seed_of_models = random_int(generator, 0, 1000)
        first, second = (torch.randperm(answers, generator=generator) for _ in range(2))
        options = (
            dict(clip=0.2, divide=True, length=None, beta=0.0, noise_in_old_logp=0.0, rewards=rewards)
            | changes
        )
        minibatches = [first] if steps == 1 else list(torch.cat([first, second]).chunk(steps))
        rewards = options.pop("rewards")
        return seed_of_models, ids, mask, rewards, minibatches, *options.values()

    return [
        case(1, 2, 5, 1),
        case(1, 3, 6, 1, divide=False, length=4),
        case(2, 4, 7, 1, noise_in_old_logp=0.5),
        case(2, 3, 6, 4, noise_in_old_logp=0.3, clip=0.1),
        case(3, 4, 8, 4, divide=False, length=11, clip=0.3),
        case(2, 4, 6, 2, beta=0.5),
        case(3, 2, 6, 3, beta=0.2, noise_in_old_logp=0.4, length=5),
        case(2, 3, 6, 2, rewards=torch.tensor([[1.0, 1, 1], [0, 0, 0]])),
        case(2, 3, 7, 2, rewards=torch.tensor([[0.0, 0, 0], [2, -1, 0]]), divide=False),
    ]


def _observe_grpo(
    answer: Callable,
    seed_of_models: int,
    ids: Tensor,
    mask: Tensor,
    rewards: Tensor,
    minibatches: list[Tensor],
    clip: float,
    divide: bool,
    length: int | None,
    beta: float,
    noise_in_old_logp: float,
) -> Iterator[tuple[str, Any]]:
    policy, reference = _Tiny(5, 5, seed_of_models), _Tiny(5, 5, seed_of_models + 1)
    given = {
        "old_logp": _when_drawn(
            token_logprobs(policy(ids), ids), mask, noise_in_old_logp, seed_of_models + 2
        ),
        "ref_logp": _when_drawn(token_logprobs(reference(ids), ids), mask, 0.0, seed_of_models + 3),
    }
    before = {name: tensor.clone() for name, tensor in given.items()}
    losses = answer(
        policy,
        torch.optim.SGD(policy.parameters(), lr=1.0),
        ids,
        mask,
        rewards,
        minibatches=minibatches,
        clip=clip,
        divide=divide,
        length=length,
        beta=beta,
        old_logp=given["old_logp"],
        ref_logp=given["ref_logp"] if beta else None,
    )
    _are_losses(losses)
    _unchanged(given, before)
    yield "how many losses", len(losses)
    yield "the loss before the first step", losses[:1]
    nothing_to_learn = beta == 0 and bool((rewards == rewards[:, :1]).all())
    when = "after groups whose answers all earn the same" if nothing_to_learn else "after the last step"
    for name, parameter in policy.named_parameters():
        yield f"{name} {when}", parameter.detach().clone()
    yield "the losses", losses


def _is_group_update(
    seed_of_models: int,
    ids: Tensor,
    mask: Tensor,
    rewards: Tensor,
    minibatches: list[Tensor],
    clip: float,
    divide: bool,
    length: int | None,
    beta: float,
    noise_in_old_logp: float,
) -> bool:
    """Whether the task allows a case."""
    rows = [int(row) for part in minibatches for row in part]
    return (
        _are_drawn(ids, mask)
        and int(ids.max()) < 5
        and rewards.dim() == 2
        and rewards.size(1) >= 2
        and rewards.numel() == len(ids)
        and all(len(part) > 0 for part in minibatches)
        and all(0 <= row < len(ids) for row in rows)
        and 0 < clip < 1
        and beta >= 0
        and (length is None or length >= 1)
    )


@dataclass(frozen=True)
class _Groups:
    """GRPO's update with one of its parts exchanged."""

    advantages: Callable[[Tensor], Tensor] | None = None
    """Of rewards [prompts, group_size] with the group's deviation; None: the right ones."""
    divide: bool | None = None
    """Whether by the deviation, whatever was asked for."""
    per_token: bool = False
    """Whether the mean is over all tokens, so that a longer answer has more weight."""
    always_own_length: bool = False
    everywhere: bool = False
    """Whether prompt and padding count."""
    logprobs: Callable[[Tensor, Tensor], Tensor] = token_logprobs
    fresh_ratio: bool = False
    of_the_rows: bool = False
    """Whether the groups are made anew of each minibatch's answers."""
    kl_to_old: bool = False
    """Whether the KL is that to the policy that drew."""
    clipped: bool = True
    worse: Callable[[Tensor, Tensor], Tensor] = torch.minimum
    kl: Callable[[Tensor, Tensor], Tensor] = kl_estimate
    kl_sign: float = 1.0
    clear: bool = True
    sign: float = 1.0
    fewer: int = 0
    """Steps that are left out at the end."""
    whole: bool = False
    """Whether each step takes all answers."""

    def __call__(self, policy, optimizer, ids, mask, rewards, *, old_logp, minibatches, **options):
        losses = []
        advantages = self._advantages(rewards, options["divide"])
        for rows in minibatches[: len(minibatches) - self.fewer]:
            rows = torch.arange(len(ids)) if self.whole else rows
            logp = self.logprobs(policy(ids[rows]), ids[rows])
            old = logp.detach() if self.fresh_ratio else old_logp[rows]
            own = advantages[rows]
            if self.of_the_rows:
                own = self._advantages(rewards.view(-1)[rows].view(-1, rewards.size(1)), options["divide"])
            by_token = self._by_token(logp, old, own[:, None], options["clip"])
            if options["beta"]:
                kl = self.kl(logp, old_logp[rows] if self.kl_to_old else options["ref_logp"][rows])
                by_token = by_token + self.kl_sign * options["beta"] * kl
            loss = self.sign * self._mean(by_token, mask[rows, 1:], options["length"])
            if self.clear:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def _advantages(self, rewards: Tensor, divide: bool) -> Tensor:
        divide = divide if self.divide is None else self.divide
        if self.advantages is not None:
            return self.advantages(rewards)
        return group_advantages(rewards.flatten(), rewards.size(1), "group" if divide else "none")

    def _by_token(self, logp: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
        ratio = (logp - old).exp()
        if not self.clipped:
            return -ratio * advantages
        return -self.worse(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)

    def _mean(self, by_token: Tensor, mask: Tensor, length: int | None) -> Tensor:
        if self.everywhere:
            mask = torch.ones_like(mask)
        if self.per_token:
            return (by_token * mask).sum() / mask.sum()
        own = length is None or self.always_own_length
        return ((by_token * mask).sum(1) / (mask.sum(1) if own else length)).mean()


def _over_the_batch(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()).flatten() / (rewards.std() + 1e-4)


def _column_after_column(rewards: Tensor) -> Tensor:
    return _grouped(rewards).T.flatten()


def _unshifted(logits: Tensor, ids: Tensor) -> Tensor:
    return _picked(logits, ids)[:, 1:]


GRPO_UPDATE = Exercise(
    task="""GRPO's whole update. The policy has drawn `group_size` answers to each of some prompts, and each
    was given a reward; now it learns from them, in one step of `optimizer` for each of `minibatches`.

    `ids` is int64 [answers, time], prompts with their answers; `mask` is bool [answers, time], True at the
    answers' tokens. `policy(ids)` gives logits [answers, time, vocab_size]; those at position t are about
    token t + 1. `rewards` is [prompts, group_size], and answer number i · group_size + j belongs to its row i
    and column j. `old_logp`, [answers, time - 1], has the log-probability that each token but the first had
    when it was drawn.

    1. Each answer's advantage is that of your `group_relative_advantages`, over all answers, before the first
    step; with `divide=False` it is the reward less the mean of the group, not divided by anything.

    2. Each of `minibatches` is int64 [rows]: the answers of one step. For their tokens, with ratio =
    probability now / when drawn, the loss is minus the smaller of ratio · advantage and ratio clamped to
    1 - clip .. 1 + clip, times advantage. Where `beta` is not 0, add beta · your `kl_k3(logp, ref_logp)`.

    3. Only tokens of the answer count. Sum an answer's losses and divide by the number of its tokens; where
    `length` is given, divide by `length` instead, whatever number of tokens there are (Dr. GRPO). The step's
    loss is the mean of that over its answers.

    4. Clear the old gradients (there may be some from before), compute the new ones, let the optimizer step.

    Return the loss of each step, before it, as a list of floats. (The grader makes small models and their
    log-probabilities from `seed_of_models`; with `noise_in_old_logp` of 0, the policy is the one that
    drew).""",
    reference=grpo_update,
    stub=GRPO_STUB,
    cases=_group_update_cases,
    observe=_observe_grpo,
    valid=_is_group_update,
    points=3,
    forbids=(GRPO, grpo_loss),
    mistakes=(
        Mistake(
            "the last minibatch is skipped",
            _Groups(fewer=1),
            "There is one step too few: each of `minibatches` is one step of the optimizer.",
        ),
        Mistake(
            "all answers in every step",
            _Groups(whole=True),
            "Each step took all answers. It is for the rows of its minibatch alone: ids[rows], mask[rows],"
            " old_logp[rows].",
        ),
        Mistake(
            "a gain, not a loss",
            _Groups(sign=-1.0),
            "The sign is that of a gain. The optimizer makes it small, and the answers that earned less"
            " become likelier.",
        ),
        Mistake(
            "log-probabilities of the wrong position",
            _Groups(logprobs=_unshifted),
            "The logits at position t were read as if they were about token t. They are about the token after"
            " it: logits[:, :-1] belong to ids[:, 1:].",
        ),
        Mistake(
            "prompt and padding count",
            _Groups(everywhere=True),
            "Prompt and padding have a part in the loss, and in what it is divided by. The policy did not"
            " choose them: only where mask[:, 1:] is True is there something to praise or to blame.",
        ),
        Mistake(
            "the mean over all tokens",
            _Groups(per_token=True),
            "The losses of all tokens were averaged at once, so that an answer counts as often as it has"
            " tokens. Average within each answer first, or divide by `length`, and then over the answers.",
        ),
        Mistake(
            "the constant is not used",
            _Groups(always_own_length=True),
            "`length` plays no part. Divided by its own length, a long wrong answer is blamed less for each"
            " token than a short one; Dr. GRPO divides all by the same constant.",
        ),
        Mistake(
            "always divided by the deviation",
            _Groups(divide=True),
            "The advantages are divided by the group's deviation even where `divide` is False.",
        ),
        Mistake(
            "never divided by the deviation",
            _Groups(divide=False),
            "The deviation is missing. With `divide=True` the advantages are those of your"
            " `group_relative_advantages`.",
        ),
        Mistake(
            "one mean for all prompts",
            _Groups(advantages=_over_the_batch),
            "All prompts share one mean and one deviation: answers to an easy prompt are then praised for the"
            " prompt. A group whose answers all earn the same has nothing to learn from.",
        ),
        Mistake(
            "groups of scattered answers",
            _Groups(advantages=_column_after_column),
            "The rewards were flattened in the wrong order, so that answers get the advantages of others: the"
            " answers to one prompt stand side by side, and rewards.flatten() has their order.",
        ),
        Mistake(
            "the groups of a minibatch",
            _Groups(of_the_rows=True),
            "The advantages were computed from a minibatch's rewards. Its rows are answers to different"
            " prompts, in any order: compute the advantages of all answers before the loop, and pick"
            " advantages[rows].",
        ),
        Mistake(
            "the ratio is always 1",
            _Groups(fresh_ratio=True),
            "The ratio compares the policy with itself: the old log-probabilities were computed anew in each"
            " step. `old_logp` is of the time when the answers were drawn, or nothing is ever clipped.",
        ),
        Mistake(
            "no clip",
            _Groups(clipped=False),
            "The ratio is not clamped: nothing keeps several steps on the same answers from going too far.",
        ),
        Mistake(
            "the larger of the two",
            _Groups(worse=torch.maximum),
            "The larger gain was taken. The clip then never holds a token back.",
        ),
        Mistake(
            "no KL",
            _Groups(kl_sign=0.0),
            "`beta` plays no part: where it is not 0, beta · k3 is added to each token's loss.",
        ),
        Mistake(
            "the KL to the old policy",
            _Groups(kl_to_old=True),
            "k3 was computed with `old_logp`. That is the policy of a moment ago, which the clip already"
            " holds to; the price is for the distance from the reference, `ref_logp`.",
        ),
        Mistake(
            "the KL is taken off",
            _Groups(kl_sign=-1.0),
            "The KL was subtracted from the loss. The policy is then paid for leaving the reference.",
        ),
        Mistake(
            "the gradients are not cleared",
            _Groups(clear=False),
            "backward adds to the gradients that are there. Without zero_grad each step repeats all earlier"
            " ones.",
        ),
    ),
    hints=(
        "One loop over `minibatches`, and before it what does not change: the advantages of all answers.",
        (
            "In the loop: logp = policy(ids[rows])[:, :-1].log_softmax(-1).gather(-1, ids[rows][:, 1:,"
            " None]).squeeze(-1), the ratio from it and old_logp[rows], the losses [rows, time - 1], times"
            " mask[rows, 1:]."
        ),
        (
            "by_token = -torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a) with a ="
            " advantages[rows, None]; divisor = length or mask[rows, 1:].sum(1); loss = ((by_token *"
            " mask[rows, 1:]).sum(1) / divisor).mean()."
        ),
    ),
)


# ---- 7. rewards with a penalty


def penalised_rewards(scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    return token_rewards(scores, logp - ref_logp, mask, beta)


def _at_last(scores: Tensor, mask: Tensor) -> Tensor:
    return token_rewards(scores, torch.zeros_like(mask, dtype=torch.float32), mask, 0.0)


def _at_end(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(mask), mask.size(1) - 1), scores.unsqueeze(1)], 1)


def _at_length(scores: Tensor, logp: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Tensor:
    rewards = -beta * (logp - ref) * mask
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] += scores
    return rewards


def _score_replaces_penalty(scores: Tensor, logp: Tensor, ref: Tensor, mask: Tensor, beta: float) -> Tensor:
    is_last = _at_last(torch.ones(len(mask)), mask) > 0
    return torch.where(is_last, scores[:, None], -beta * (logp - ref) * mask)


def _reward_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, beta: float) -> tuple:
        scores = _randn(generator, batch)
        logp = _randn(generator, batch, time)
        ref_logp = _randn(generator, batch, time)
        return scores, logp, ref_logp, _mask(generator, batch, time), beta

    return [case(*sizes, beta) for sizes, beta in zip(SIZES, (0.1, 0.5, 1.0, 0.3, 0.2))]


PENALISED_REWARDS = Exercise(
    task="""PPO wants a reward for each token, but an answer is scored as a whole. `scores` is float32
    [batch]; `logp` and `ref_logp`, float32 [batch, time], are what policy and reference gave to each token;
    `mask` is bool [batch, time], True at the answer's tokens, each row having some. Each token of the answer
    earns -beta · (logp - ref_logp), and its last one the score as well. Return float32 [batch, time], 0
    outside the mask.""",
    reference=penalised_rewards,
    forbids=(token_rewards,),
    cases=_reward_cases,
    valid=lambda scores, logp, ref_logp, mask, beta: (
        logp.shape == ref_logp.shape == mask.shape and len(scores) == len(mask) and bool(mask.any(1).all())
    ),
    mistakes=(
        Mistake(
            "KL with the wrong sign",
            lambda scores, logp, ref, mask, beta: token_rewards(scores, logp - ref, mask, -beta),
            "The policy is paid for leaving the reference. What it made likelier than the reference did has"
            " to cost something.",
        ),
        Mistake(
            "the score behind the padding",
            lambda scores, logp, ref, mask, beta: -beta * (logp - ref) * mask + _at_end(scores, mask),
            "The score stands in the last column. For a shorter answer that is padding, which is masked out"
            " later: it earns nothing.",
        ),
        Mistake(
            "the prompt is forgotten",
            _at_length,
            "The score stands where the last token would be if the answer began at place 0: mask.sum(1) - 1."
            " A prompt comes before it. Look for each row's last True.",
        ),
        Mistake(
            "the score for every token",
            lambda scores, logp, ref, mask, beta: (scores[:, None] - beta * (logp - ref)) * mask,
            "Every token earns the score, so a longer answer earns it more often: the policy learns to go on"
            " and on.",
        ),
        Mistake(
            "the score divided by the length",
            lambda scores, logp, ref, mask, beta: token_rewards(scores / mask.sum(1), logp - ref, mask, beta),
            "The score was divided by the number of the answer's tokens, so that a long answer earns less for"
            " the same score. It stands at the last token, whole.",
        ),
        Mistake(
            "padding pays KL",
            lambda scores, logp, ref, mask, beta: _at_last(scores, mask) - beta * (logp - ref),
            "Prompt and padding pay for their KL. The policy did not choose them.",
        ),
        Mistake(
            "no penalty",
            lambda scores, logp, ref, mask, beta: _at_last(scores, mask),
            "Only the score is there. Without the penalty the policy goes wherever the score's weaknesses"
            " lead it.",
        ),
        Mistake(
            "the last token pays no KL",
            _score_replaces_penalty,
            "At the last token the score took the penalty's place. It is added to it.",
        ),
    ),
    hints=(
        "Begin with the penalty for all tokens, masked. Then where is each row's last True?",
        (
            "(mask * torch.arange(time)).argmax(1) is each row's last True. Add the score there, to what"
            " stands there already."
        ),
        (
            "rewards = -beta * (logp - ref_logp) * mask; last = (mask *"
            " torch.arange(mask.size(1))).argmax(1); rewards[torch.arange(len(mask)), last] += scores; return"
            " rewards."
        ),
    ),
)


# ---- 8. GAE


def advantages_and_returns(
    rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    return gae(rewards, values, gamma, lam)


def _recursion(
    deltas: Tensor, values: Tensor, decay: float, order: Callable = reversed
) -> tuple[Tensor, Tensor]:
    """deltas, values: [batch, time]. order: in which the steps are gone through."""
    running, advantages = torch.zeros(len(deltas)), torch.zeros_like(deltas)
    for t in order(range(deltas.size(1))):
        running = deltas[:, t] + decay * running
        advantages[:, t] = running
    return advantages, advantages + values


def _deltas(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    return rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values


def _last_value_goes_on(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    following = torch.cat([values[:, 1:], values[:, -1:]], 1)
    return _recursion(rewards + gamma * following - values, values, gamma * lam)


def _returns_without_values(
    rewards: Tensor, values: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    advantages = gae(rewards, values, gamma, lam)[0]
    return advantages, advantages


def _returns_of_rewards(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages, _ = gae(rewards, values, gamma, lam)
    return advantages, _recursion(rewards, values, gamma)[0]


def _forwards(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    before = F.pad(values[:, :-1], (1, 0))
    steps = rewards + gamma * before - values
    return _recursion(steps, values, gamma * lam, order=lambda steps: steps)


def _returns_with_rewards(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages = gae(rewards, values, gamma, lam)[0]
    return advantages, advantages + rewards


def _whitened_too_early(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages = whiten(gae(rewards, values, gamma, lam)[0])
    return advantages, advantages + values


def _gae_cases(generator: Generator) -> list[tuple]:
    decays = (0.9, 0.8), (0.95, 0.9), (0.8, 0.5), (0.99, 0.7), (0.7, 0.95)
    cases = []
    for sizes, (gamma, lam) in zip(SIZES, decays):
        rewards = _randn(generator, *sizes)
        cases.append((rewards, _randn(generator, *sizes), gamma, lam))
    return cases


ADVANTAGES_AND_RETURNS = Exercise(
    task="""How much better was a token than expected? `rewards` and `values` are float32 [batch, time]; after
    the last token nothing more is expected, a value of 0. With delta[t] = rewards[t] + gamma · values[t + 1]
    - values[t], the advantage at t is the sum of (gamma · lam)ᵏ · delta[t + k] over all k from 0 on. Return
    (advantages, returns), both float32 [batch, time]; returns = advantages + values is what the value model
    learns. It can be done in one pass.""",
    reference=advantages_and_returns,
    forbids=(gae,),
    cases=_gae_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "lambda is forgotten",
            lambda rewards, values, gamma, lam: _recursion(_deltas(rewards, values, gamma), values, gamma),
            "What comes later decays by gamma only. It is gamma times lam: lam decides how far to trust the"
            " values instead of the rewards.",
        ),
        Mistake(
            "gamma is forgotten in the decay",
            lambda rewards, values, gamma, lam: _recursion(_deltas(rewards, values, gamma), values, lam),
            "What comes later decays by lam only. It is gamma times lam.",
        ),
        Mistake(
            "summed from the front",
            lambda rewards, values, gamma, lam: _recursion(
                _deltas(rewards, values, gamma), values, gamma * lam, order=lambda steps: steps
            ),
            "The sum runs over the past. A token cannot be praised for what came before it: begin at the"
            " end.",
        ),
        Mistake(
            "the loop runs forwards",
            _forwards,
            "The loop goes from the first token to the last, so that what it carries along comes from the"
            " past: the value before in place of the next one, and the sum of earlier surprises. Begin at the"
            " end.",
        ),
        Mistake(
            "the last value goes on",
            _last_value_goes_on,
            "After the last token its own value was expected once more. The answer is over, so the next value"
            " is 0.",
        ),
        Mistake(
            "no next value",
            lambda rewards, values, gamma, lam: _recursion(rewards - values, values, gamma * lam),
            "delta lacks the next value. Each token is then charged for all the reward that is still expected"
            " after it.",
        ),
        Mistake(
            "returns without values",
            _returns_without_values,
            "The returns are the advantages. Those say how much better it was than expected; the value model"
            " learns the expectation, so add values.",
        ),
        Mistake(
            "returns with the rewards added",
            _returns_with_rewards,
            "The returns are advantages + rewards. The advantages have the rewards in them already, less what"
            " was expected: add values, and what is left is all that was still to come.",
        ),
        Mistake(
            "returns of the rewards alone",
            _returns_of_rewards,
            "The returns are the discounted sums of the rewards (Monte Carlo). Those of GAE are advantages +"
            " values: with lam below 1 they trust the value model in part, and vary less.",
        ),
        Mistake(
            "returns of whitened advantages",
            _whitened_too_early,
            "The advantages were whitened. That comes later, and only for the policy's loss: the value model"
            " has to learn in units of the reward.",
        ),
    ),
    hints=(
        "advantage[t] = delta[t] + something · advantage[t + 1]. What is it?",
        (
            "Go through time backwards, and keep the running advantage [batch] and the following value"
            " [batch], both 0 at first."
        ),
        (
            "for t in reversed(range(time)): delta = rewards[:, t] + gamma * following - values[:, t];"
            " running = delta + gamma * lam * running; following = values[:, t]; advantages[:, t] = running."
            " Then return advantages, advantages + values."
        ),
    ),
)


# ---- 9. whitening


def whitened_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    return whiten(advantages, mask)


def _scaled(
    x: Tensor, mask: Tensor, values: Tensor, *, power: float = 1, shift: bool = True, correction: int = 1
) -> Tensor:
    """By the mean and the standard deviation of `values`.

    power: of the deviation, by which is divided. shift: take the mean off. correction: n minus this divides
    the sum of squares.
    """
    if shift:
        x = x - values.mean()
    return x / values.std(correction=correction) ** power * mask


def _whiten_cases(generator: Generator) -> list[tuple[Tensor, Tensor]]:
    def case(batch: int, time: int) -> tuple[Tensor, Tensor]:
        row_scales = 1 + torch.arange(batch)[:, None]
        advantages = 2 * _randn(generator, batch, time) * row_scales + 1.5
        return advantages, _mask(generator, batch, time)

    return [case(*sizes) for sizes in SIZES]


WHITENED_ADVANTAGES = Exercise(
    task="""Advantages come in any size; the step should not. `advantages` is float32 [batch, time], `mask`
    bool [batch, time], True at the answers' tokens. Over all tokens of the batch that the mask lets through,
    make the mean 0 and the standard deviation 1 (unbiased: the sum of squares divided by n - 1). Return
    float32 [batch, time], 0 outside the mask.""",
    reference=whitened_advantages,
    forbids=(whiten,),
    cases=_whiten_cases,
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "padding counts",
            lambda x, mask: _scaled(x, mask, x),
            "Mean and deviation were taken over everything, padding included: how much padding a batch has"
            " then changes the step.",
        ),
        Mistake(
            "padding counts as zeros",
            lambda x, mask: _scaled(x, mask, x * mask),
            "The masked entries were set to 0 and then counted. They pull the mean to 0 and make the"
            " deviation small.",
        ),
        Mistake(
            "whitened per answer, not per batch",
            lambda x, mask: torch.stack([_scaled(a, m, a[m]) for a, m in zip(x, mask)]),
            "Each row was whitened by itself. A good answer and a bad one then look alike: what differs"
            " between answers is what is to be learned.",
        ),
        Mistake(
            "not whitened, only centred",
            lambda x, mask: _scaled(x, mask, x[mask], power=0),
            "The mean is 0 but the deviation was left. The learning rate then depends on the size of the"
            " rewards.",
        ),
        Mistake(
            "divided by the variance",
            lambda x, mask: _scaled(x, mask, x[mask], power=2),
            "Divided by the variance, not by its root: large advantages become small ones.",
        ),
        Mistake(
            "the mean stays",
            lambda x, mask: _scaled(x, mask, x[mask], shift=False),
            "The mean was not taken off. If all advantages are positive, all tokens become likelier, the"
            " worse ones too.",
        ),
        Mistake(
            "biased variance",
            lambda x, mask: _scaled(x, mask, x[mask], correction=0),
            "The sum of squares was divided by n. The mean was estimated from the same values, so it is n"
            " - 1.",
        ),
    ),
    hints=(
        "advantages[mask] is a flat tensor of just those that count.",
        (
            "Tensor.std is unbiased already. Apply mean and deviation to the whole tensor, then set the rest"
            " to 0."
        ),
        "values = advantages[mask]; return (advantages - values.mean()) / values.std() * mask.",
    ),
)


# ---- 10. PPO's update


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
    mask = mask[:, 1:]
    rewards = token_rewards(scores, old_logp - ref_logp, mask, beta)
    advantages, returns = gae(rewards, old_values, gamma, lam, mask)
    advantages = whiten(advantages, mask)
    losses = []
    for _ in range(epochs):
        loss = ppo_loss(
            token_logprobs(policy(ids), ids),
            old_logp,
            advantages,
            values=value(ids)[:, :-1, 0],
            old_values=old_values,
            returns=returns,
            mask=mask,
            clip=clip,
            value_clip=clip,
            value_coef=value_coef,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


PPO_STUB = """def ppo_update(
    policy: nn.Module,
    value: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,  # int64 [batch, time]
    mask: torch.Tensor,  # bool [batch, time]
    *,
    scores: torch.Tensor,  # [batch]
    old_logp: torch.Tensor,  # [batch, time - 1], as the next two
    ref_logp: torch.Tensor,
    old_values: torch.Tensor,
    epochs: int,
    beta: float,
    gamma: float,
    lam: float,
    clip: float,
    value_coef: float,
) -> list[float]:
    # of your own: penalised_rewards, advantages_and_returns,
    # whitened_advantages, clipped_policy_loss
    # your code here
    ...
"""


def _ppo_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, epochs: int, **changes: float) -> tuple:
        ids, mask = _drawn(generator, batch, time)
        scores = 2 * torch.randn(batch, generator=generator)
        seed_of_models = random_int(generator, 0, 1000)
        options = dict(beta=0.3, gamma=0.9, lam=0.8, clip=0.2, value_coef=0.5, noise_when_drawn=0.0) | changes
        return seed_of_models, ids, mask, scores, epochs, *options.values()

    return [
        case(2, 5, 1),
        case(3, 6, 1, beta=0.0, gamma=1.0, lam=1.0),
        case(3, 7, 1, noise_when_drawn=0.6),
        case(4, 8, 2),
        case(3, 7, 3, clip=0.1, value_coef=1.0),
        case(5, 6, 3, noise_when_drawn=0.3, gamma=0.95, lam=0.9),
        case(4, 9, 4, clip=0.3, value_coef=0.2, beta=1.0),
    ]


def _observe_ppo(
    answer: Callable,
    seed_of_models: int,
    ids: Tensor,
    mask: Tensor,
    scores: Tensor,
    epochs: int,
    beta: float,
    gamma: float,
    lam: float,
    clip: float,
    value_coef: float,
    noise_when_drawn: float,
) -> Iterator[tuple[str, Any]]:
    policy, value, reference = (
        _Tiny(5, 5, seed_of_models),
        _Tiny(5, 1, seed_of_models + 1),
        _Tiny(5, 5, seed_of_models + 2),
    )
    given = {
        "old_logp": _when_drawn(token_logprobs(policy(ids), ids), mask, noise_when_drawn, seed_of_models + 3),
        "ref_logp": _when_drawn(token_logprobs(reference(ids), ids), mask, 0.0, seed_of_models + 4),
        "old_values": _when_drawn(value(ids)[:, :-1, 0], mask, noise_when_drawn, seed_of_models + 5),
    }
    before = {name: tensor.clone() for name, tensor in given.items()}
    losses = answer(
        policy,
        value,
        torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.5),
        ids,
        mask,
        scores=scores,
        epochs=epochs,
        beta=beta,
        gamma=gamma,
        lam=lam,
        clip=clip,
        value_coef=value_coef,
        **given,
    )
    _are_losses(losses)
    _unchanged(given, before)
    yield "how many losses", len(losses)
    yield "the loss before the first step", losses[:1]
    for which, module in (("value", value), ("policy", policy)):
        for name, parameter in module.named_parameters():
            yield f"the {which} model's {name} after the last step", parameter.detach().clone()
    yield "the losses", losses


def _is_ppo_case(
    seed_of_models: int,
    ids: Tensor,
    mask: Tensor,
    scores: Tensor,
    epochs: int,
    beta: float,
    gamma: float,
    lam: float,
    clip: float,
    value_coef: float,
    noise_when_drawn: float,
) -> bool:
    """Whether the task allows a case."""
    return (
        _are_drawn(ids, mask)
        and int(ids.max()) < 5
        and int(mask.sum()) >= 2
        and scores.shape == ids.shape[:1]
        and epochs >= 1
        and beta >= 0
        and 0 <= gamma <= 1
        and 0 <= lam <= 1
        and 0 < clip < 1
        and value_coef >= 0
    )


@dataclass(frozen=True)
class _Proximal:
    """PPO's update with one of its parts exchanged."""

    penalty: float = 1.0
    """What beta is multiplied by."""
    values_end: bool = True
    """Whether nothing is expected after an answer's last token."""
    returns: str = "gae"
    whitened: bool = True
    fresh_advantages: bool = False
    fresh_ratio: bool = False
    everywhere: bool = False
    """Whether prompt and padding count in both losses."""
    policy_everywhere: bool = False
    """Whether prompt and padding count in the policy's loss alone."""
    logprobs: Callable[[Tensor, Tensor], Tensor] = token_logprobs
    late_values: bool = False
    """Whether a token's value is that after it."""
    worse_value: Callable[[Tensor, Tensor], Tensor] = torch.maximum
    half: float = 0.5
    coefficient: float | None = None
    clear: bool = True
    sign: float = 1.0
    fewer: int = 0

    def __call__(self, policy, value, optimizer, ids, mask, *, scores, old_logp, **options):
        mask, old_values = mask[:, 1:], options["old_values"]
        rewards = token_rewards(scores, old_logp - options["ref_logp"], mask, self.penalty * options["beta"])
        advantages, returns = self._advantages(rewards, old_values, mask, options)
        losses = []
        for _ in range(options["epochs"] - self.fewer):
            logp = self.logprobs(policy(ids), ids)
            values = value(ids)[:, 1:, 0] if self.late_values else value(ids)[:, :-1, 0]
            if self.fresh_advantages:
                advantages, returns = self._advantages(rewards, values.detach(), mask, options)
            counted = torch.ones_like(mask) if self.everywhere else mask
            old = logp.detach() if self.fresh_ratio else old_logp
            coefficient = options["value_coef"] if self.coefficient is None else self.coefficient
            chosen = torch.ones_like(mask) if self.policy_everywhere else counted
            policy_part = policy_loss(logp, old, advantages, chosen, options["clip"])
            value_part = self._value_loss(values, old_values, returns, options["clip"])[counted].mean()
            loss = self.sign * policy_part + coefficient * value_part
            if self.clear:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def _advantages(
        self, rewards: Tensor, values: Tensor, mask: Tensor, options: dict
    ) -> tuple[Tensor, Tensor]:
        decay = options["gamma"], options["lam"]
        advantages, returns = gae(rewards, values, *decay, mask if self.values_end else None)
        white = whiten(advantages, mask) if self.whitened else advantages
        if self.returns == "of the rewards":
            returns = _recursion(rewards, values, options["gamma"])[0].to(values.dtype)
        elif self.returns == "whitened":
            returns = white + values
        return white, returns

    def _value_loss(self, values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
        clamped = old_values + (values - old_values).clamp(-clip, clip)
        return self.half * self.worse_value((values - returns).square(), (clamped - returns).square())


PPO_UPDATE = Exercise(
    task="""PPO's whole update: the policy has drawn answers, each has a score, and policy and value model
    learn from them, `epochs` times from the same.

    `ids` is int64 [batch, time], prompts with their answers; `mask` is bool [batch, time], True at the
    answers' tokens, which stand side by side. `policy(ids)` gives logits [batch, time, vocab_size], those at
    position t about token t + 1, and `value(ids)` gives [batch, time, 1], at position t what is expected
    before token t + 1 is drawn. What was noted when the answers were drawn is [batch, time - 1], for each
    token but the first: `old_logp`, `ref_logp` (the reference's) and `old_values`; outside the mask these are
    any numbers, and must have no effect. `optimizer` has the parameters of both models.

    1. Before the first step: your `penalised_rewards` with `old_logp`; of these and of `old_values` your
    `advantages_and_returns` (after an answer's last token nothing more is expected, so set the values outside
    the mask to 0); of the advantages your `whitened_advantages`. All three stay as they are in all epochs.

    2. In each epoch one step on all answers. The policy's loss is your `clipped_policy_loss`, the mean over
    the answers' tokens alone. The value model's is half the mean, over the same tokens, of the larger of
    (value - return)² and (clamped - return)², with clamped = the value, held to at most `clip` from
    old_values. The loss is the policy's plus `value_coef` times the value model's. Clear the old gradients
    (there may be some from before), compute the new ones, let the optimizer step.

    Return the loss of each epoch, before its step, as a list of floats. (The grader makes small models, and
    what they noted, from `seed_of_models`; with `noise_when_drawn` of 0, they are those that drew).""",
    reference=ppo_update,
    stub=PPO_STUB,
    cases=_ppo_cases,
    observe=_observe_ppo,
    valid=_is_ppo_case,
    points=3,
    forbids=(PPO, ppo_loss),
    mistakes=(
        Mistake(
            "one epoch is missing",
            _Proximal(fewer=1),
            "There is one step too few: `epochs` of them, each on all answers.",
        ),
        Mistake(
            "Monte-Carlo returns",
            _Proximal(returns="of the rewards"),
            "The value model learns the discounted sums of the rewards (Monte Carlo). Those of GAE are"
            " advantages + values: with lam below 1 they trust the value model in part, and vary less.",
        ),
        Mistake(
            "returns of whitened advantages",
            _Proximal(returns="whitened"),
            "The returns were made of whitened advantages. Whitening is for the policy's loss alone: the"
            " value model has to learn in units of the reward.",
        ),
        Mistake(
            "advantages are not whitened",
            _Proximal(whitened=False),
            "The advantages came into the policy's loss as they were, so that the step's length depends on"
            " the size of the rewards.",
        ),
        Mistake(
            "advantages are computed anew in each epoch",
            _Proximal(fresh_advantages=True),
            "Advantages and returns were computed from what the value model says now. Then the value model"
            " runs after a target that it moves itself: both belong to the time of drawing, and stay.",
        ),
        Mistake(
            "the ratio is always 1",
            _Proximal(fresh_ratio=True),
            "The ratio compares the policy with itself. `old_logp` is of the time when the answers were"
            " drawn, and stays; the ratio is 1 in the first epoch alone.",
        ),
        Mistake(
            "something is expected after the end",
            _Proximal(values_end=False),
            "The values outside the mask take part in GAE: after an answer's last token the padding's value"
            " is expected. Set old_values to 0 there.",
        ),
        Mistake(
            "prompt and padding count",
            _Proximal(everywhere=True),
            "Both losses were averaged over prompt and padding too. The policy did not choose them: pick the"
            " answers' tokens, logp[mask[:, 1:]].",
        ),
        Mistake(
            "prompt and padding count in the policy's loss",
            _Proximal(policy_everywhere=True),
            "The policy's loss is the mean over all positions. Outside the mask the advantages are 0, so it"
            " comes out too small, by another factor in each batch: give `clipped_policy_loss` the answers'"
            " tokens alone, as logp[mask[:, 1:]].",
        ),
        Mistake(
            "log-probabilities of the wrong position",
            _Proximal(logprobs=_unshifted),
            "The logits at position t were read as if they were about token t. They are about the token after"
            " it: logits[:, :-1] belong to ids[:, 1:].",
        ),
        Mistake(
            "values of the wrong position",
            _Proximal(late_values=True),
            "The value was taken after the token instead of before it: value(ids)[:, :-1, 0]. What was"
            " expected is to be compared with what came, and must not know it yet.",
        ),
        Mistake(
            "the smaller of the squared errors",
            _Proximal(worse_value=torch.minimum),
            "Of the value's two squared errors the smaller was taken. The larger one is the cautious one.",
        ),
        Mistake(
            "the value is not clipped",
            _Proximal(worse_value=lambda plain, clamped: plain),
            "The value's loss is the plain squared error: the clamped value plays no part.",
        ),
        Mistake(
            "the half is missing",
            _Proximal(half=1.0),
            "The value's loss is twice what it should be: half the mean of the squared errors.",
        ),
        Mistake(
            "value_coef is forgotten",
            _Proximal(coefficient=1.0),
            "The two losses were added as they are. `value_coef` says how much the value model's counts.",
        ),
        Mistake(
            "KL with the wrong sign",
            _Proximal(penalty=-1.0),
            "The policy is paid for leaving the reference. What it made likelier than the reference did has"
            " to cost something.",
        ),
        Mistake(
            "a gain, not a loss",
            _Proximal(sign=-1.0),
            "The policy's part has the sign of a gain. An optimizer makes a loss small, and would make the"
            " policy worse.",
        ),
        Mistake(
            "the gradients are not cleared",
            _Proximal(clear=False),
            "backward adds to the gradients that are there. Without zero_grad each epoch repeats all earlier"
            " ones.",
        ),
    ),
    hints=(
        (
            "Two parts: what is fixed before the loop (rewards, advantages, returns), and what each epoch"
            " computes anew (logp and values)."
        ),
        (
            "inside = mask[:, 1:]; rewards = penalised_rewards(scores, old_logp, ref_logp, inside, beta);"
            " advantages, returns = advantages_and_returns(rewards, old_values * inside, gamma, lam). Whiten"
            " only then."
        ),
        (
            "In the loop: loss = clipped_policy_loss(logp[inside], old_logp[inside], advantages[inside],"
            " clip) + value_coef * 0.5 * torch.maximum((values - returns).square(), (clamped -"
            " returns).square())[inside].mean(), with values = value(ids)[:, :-1, 0]."
        ),
    ),
)


# ---- 11. DPO


def preference_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    return dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)


def _preference_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, beta: float) -> tuple:
        logprobs = [-5 * torch.rand(batch, generator=generator) - 1 for _ in range(4)]
        return *logprobs, beta

    one = torch.ones(1)
    far_wrong = -340 * one, -30 * one, -35 * one, -25 * one, 1.0  # the rewards differ by -315
    return [case(1, 0.5), case(3, 0.1), case(5, 0.3), case(4, 1.0), case(2, 2.0), far_wrong]


PREFERENCE_LOSS = Exercise(
    task="""DPO's loss for each pair. The arguments are float32 [batch]: the log-probability of the chosen and
    of the rejected answer, by the policy and by the reference. An answer's implicit reward is `beta` times
    its log-ratio, log policy - log reference. Return minus the log of the probability that the chosen answer
    wins, which is the sigmoid of the difference of rewards: float32 [batch]. It stays finite where that
    probability is too small for float32, as it is for rewards that differ by -300.""",
    reference=preference_loss,
    forbids=(dpo_loss,),
    cases=_preference_cases,
    mistakes=(
        Mistake(
            "the reference is forgotten",
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr)),
            "The reference does not occur. Without it nothing holds the policy near it, and an answer that"
            " was likely from the start counts as liked.",
        ),
        Mistake(
            "beta behind the sigmoid",
            lambda pc, pr, rc, rr, beta: -beta * F.logsigmoid(pc - rc - pr + rr),
            "beta multiplies the loss. It belongs inside, before the sigmoid: there it says how far the"
            " policy may go for a preference.",
        ),
        Mistake(
            "chosen and rejected swapped",
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(-beta * (pc - rc - pr + rr)),
            "The loss falls as the rejected answer gains. The difference is chosen minus rejected.",
        ),
        Mistake(
            "the reference has the wrong sign",
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr + rc - rr)),
            "The reference's difference was added. Log-ratios are policy minus reference, so it is taken"
            " away: the first loss is then ln 2.",
        ),
        Mistake(
            "no logarithm",
            lambda pc, pr, rc, rr, beta: -torch.sigmoid(beta * (pc - rc - pr + rr)),
            "This is minus the probability, not minus its logarithm. Its gradient vanishes for the pairs that"
            " are most wrong.",
        ),
        Mistake(
            "the logarithm of a sigmoid",
            lambda pc, pr, rc, rr, beta: -torch.sigmoid(beta * (pc - rc - pr + rr)).log(),
            "The sigmoid of a very negative number is 0 in float32, and the logarithm of 0 is -inf: the loss"
            " is infinite and its gradient nan for the pairs that are most wrong. F.logsigmoid does both in"
            " one, and stays finite.",
        ),
        Mistake(
            "the mean over the pairs",
            lambda pc, pr, rc, rr, beta: preference_loss(pc, pr, rc, rr, beta).mean(),
            "The losses of the pairs are right, and then their mean was taken. Asked for is one loss for each"
            " pair, [batch]: whoever trains takes the mean.",
        ),
        Mistake(
            "a reward for each answer alone",
            lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - rc)) - F.logsigmoid(-beta * (pr - rr)),
            "Each answer was judged alone. A preference says only which of two is better: one sigmoid, of the"
            " difference.",
        ),
    ),
    hints=(
        "Two log-ratios first: chosen and rejected, each policy minus reference.",
        "What does beta · (chosen - rejected) become under the sigmoid? Use F.logsigmoid: it stays finite.",
        "return -F.logsigmoid(beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))).",
    ),
)


# ---- 12. DPO's step


def dpo_step(
    policy: nn.Module,
    reference: nn.Module,
    ids: Tensor,
    mask: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    beta: float,
) -> tuple[float, float]:
    chosen, rejected = sequence_logprobs(policy(ids), ids, mask).chunk(2)
    with torch.no_grad():
        ref_chosen, ref_rejected = sequence_logprobs(reference(ids), ids, mask).chunk(2)
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ranked_right = chosen - ref_chosen > rejected - ref_rejected
    return loss.item(), ranked_right.double().mean().item()


DPO_STUB = """def dpo_step(
    policy: nn.Module,
    reference: nn.Module,
    ids: torch.Tensor,  # int64 [2 * pairs, time]
    mask: torch.Tensor,  # bool [2 * pairs, time]
    *,
    optimizer: torch.optim.Optimizer,
    beta: float,
) -> tuple[float, float]:
    # of your own: answer_logprobs, preference_loss
    # your code here
    ...
"""


def _dpo_cases(generator: Generator) -> list[tuple]:
    def case(pairs: int, time: int, beta: float, has_moved: bool) -> tuple[int, Tensor, Tensor, float, bool]:
        ids, mask = _drawn(generator, 2 * pairs, time)
        return random_int(generator, 0, 1000), ids, mask, beta, has_moved

    return [
        case(1, 5, 0.5, False),
        case(2, 6, 0.1, False),
        case(3, 7, 0.3, True),
        case(4, 6, 0.1, True),
        case(5, 8, 0.5, True),
        case(2, 9, 1.0, True),
    ]


def _observe_dpo(
    answer: Callable, seed_of_models: int, ids: Tensor, mask: Tensor, beta: float, has_moved: bool
) -> Iterator[tuple[str, Any]]:
    """has_moved: whether the policy is another than the reference, as after some steps."""
    policy, reference = _Tiny(5, 5, seed_of_models), _Tiny(5, 5, seed_of_models + int(has_moved))
    for parameter in reference.parameters():
        parameter.grad = None
    before = [parameter.detach().clone() for parameter in reference.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    result = answer(policy, reference, ids, mask, optimizer=optimizer, beta=beta)
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise NotRight(
            f"it returns {type(result).__name__}, and (loss, share of pairs ranked right) is wanted."
        )
    if any(isinstance(number, Tensor) for number in result):
        raise NotRight(
            "a result is a tensor, and Python floats are wanted: .item() takes the number out, and the graph"
            " is not held in memory."
        )
    loss, share = result
    yield "the loss" if has_moved else "the loss of a policy that is still the reference", loss
    for name, parameter in policy.named_parameters():
        yield f"{name} after the step", parameter.detach().clone()
    for old, parameter in zip(before, reference.parameters()):
        if not torch.equal(old, parameter):
            raise NotRight("the reference has changed: it is what the policy is compared with, and stays.")
        if parameter.grad is not None:
            raise NotRight(
                "a gradient reached the reference. It is a constant here: read it under torch.no_grad(),"
                " which also keeps no graph for it."
            )
    yield "the share of pairs that are ranked right", share


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    return x.chunk(2)


def _gained_more(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return chosen - ref_chosen > rejected - ref_rejected


def _loss_by_hand(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float) -> Tensor:
    """`preference_loss`, but that the course's detaches the reference."""
    return -F.logsigmoid(beta * (pc - rc - pr + rr))


@dataclass(frozen=True)
class _Preferring:
    """DPO's step with one of its parts exchanged."""

    logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] = sequence_logprobs
    halves: Callable[[Tensor], tuple[Tensor, ...]] = _halves
    loss: Callable[..., Tensor] = preference_loss
    mean: bool = True
    no_grad: bool = True
    clear: bool = True
    after: bool = False
    """Whether the loss is that after the step."""
    ranked: Callable[..., Tensor] = _gained_more

    def __call__(self, policy, reference, ids, mask, *, optimizer, beta):
        parts = self._parts(policy, reference, ids, mask)
        loss = self._loss(parts, beta)
        if self.clear:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown = self._loss(self._parts(policy, reference, ids, mask), beta) if self.after else loss
        return shown.item(), self.ranked(*parts).double().mean().item()

    def _parts(self, policy: nn.Module, reference: nn.Module, ids: Tensor, mask: Tensor) -> list[Tensor]:
        own = self.halves(self.logprobs(policy(ids), ids, mask))
        with torch.set_grad_enabled(not self.no_grad):
            other = self.halves(self.logprobs(reference(ids), ids, mask))
        return [*own, *other]

    def _loss(self, parts: list[Tensor], beta: float) -> Tensor:
        losses = self.loss(*parts, beta)
        return losses.mean() if self.mean else losses.sum()


DPO_STEP = Exercise(
    task="""DPO's whole step. `ids` is int64 [2 · pairs, time], prompts with their answers and then padding:
    the chosen answers of all pairs first, and after them, in the same order, the rejected ones. `mask` is
    bool [2 · pairs, time], True at the answers' tokens. `policy(ids)` and `reference(ids)` give logits [2 ·
    pairs, time, vocab_size].

    Compute the mean over the pairs of your `preference_loss`, from your `answer_logprobs` by both models.
    The reference is a constant: no gradient may reach it. Clear the old gradients (there may be some from
    before), compute the new ones, and let `optimizer`, which has the policy's parameters, take one step.

    Return (loss, share), two floats, both of before the step: the share of pairs in which the chosen answer's
    implicit reward is greater than that of the rejected one. At the first step policy and reference are the
    same, and the loss is ln 2. (The grader makes small models from `seed_of_models`; with `has_moved` the
    policy is no longer the reference).""",
    reference=dpo_step,
    stub=DPO_STUB,
    cases=_dpo_cases,
    observe=_observe_dpo,
    valid=lambda seed_of_models, ids, mask, beta, has_moved: (
        _are_drawn(ids, mask) and len(ids) % 2 == 0 and int(ids.max()) < 5 and beta > 0
    ),
    points=3,
    forbids=(DPO,),
    mistakes=(
        Mistake(
            "the reference gets a gradient",
            _Preferring(no_grad=False, loss=_loss_by_hand),
            "The loss was differentiated through the reference as well. It is what the policy is compared"
            " with, and stays: with torch.no_grad() round it no gradient reaches it, and its graph costs no"
            " memory.",
        ),
        Mistake(
            "the rejected answers are preferred",
            _Preferring(halves=lambda x: x.chunk(2)[::-1]),
            "The step makes the rejected answers likelier. The chosen ones come first in the batch, and the"
            " difference is chosen minus rejected.",
        ),
        Mistake(
            "pairs side by side",
            _Preferring(halves=lambda x: (x[::2], x[1::2])),
            "Every second row was taken for a rejected answer. All chosen ones come first: .chunk(2) cuts in"
            " halves.",
        ),
        Mistake(
            "a gain, not a loss",
            _Preferring(loss=lambda *given: -preference_loss(*given)),
            "The sign of the log-likelihood is turned: this is the logarithm of the probability that the"
            " chosen answers win, and the optimizer makes it small. The loss is minus that.",
        ),
        Mistake(
            "a mean over the tokens",
            _Preferring(
                logprobs=lambda logits, ids, mask: sequence_logprobs(logits, ids, mask) / mask.sum(1)
            ),
            "An answer's log-probability was averaged over its tokens. It is their sum: DPO compares"
            " probabilities of whole answers.",
        ),
        Mistake(
            "the prompt is counted",
            _Preferring(logprobs=_prompt_counted),
            "The prompts' tokens were counted as well. They were given; only the answers are the policy's"
            " own.",
        ),
        Mistake(
            "padding is counted",
            _Preferring(logprobs=_padding_counted),
            "What comes after an answer was counted too, and is learned as if it had been preferred.",
        ),
        Mistake(
            "log-probabilities of the wrong position",
            _Preferring(logprobs=lambda logits, ids, mask: (_picked(logits, ids) * mask).sum(1)),
            "The logits at position t were read as if they were about token t. They are about the token after"
            " it: logits[:, :-1] belong to ids[:, 1:].",
        ),
        Mistake(
            "beta behind the sigmoid",
            _Preferring(loss=lambda pc, pr, rc, rr, beta: -beta * F.logsigmoid(pc - rc - pr + rr)),
            "beta multiplies the loss. It belongs inside, before the sigmoid; then the first loss is ln 2.",
        ),
        Mistake(
            "the reference is forgotten",
            _Preferring(loss=lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr))),
            "The reference does not occur. An answer that was likely from the start then counts as liked.",
        ),
        Mistake(
            "the sum over the pairs",
            _Preferring(mean=False),
            "The losses of the pairs were added up: with twice as many pairs the step is twice as long. It is"
            " their mean.",
        ),
        Mistake(
            "the gradients are not cleared",
            _Preferring(clear=False),
            "backward adds to the gradients that are there. Without zero_grad each step repeats all earlier"
            " ones.",
        ),
        Mistake(
            "the loss after the step",
            _Preferring(after=True),
            "The loss was computed once more after the step. It is that of the step: one pass is enough.",
        ),
        Mistake(
            "ranked by the policy alone",
            _Preferring(ranked=lambda pc, pr, rc, rr: pc > pr),
            "The ranking asks which answer is likelier. The implicit reward is the log-ratio to the"
            " reference: it says which of the two has gained.",
        ),
        Mistake(
            "a tie counts as right",
            _Preferring(ranked=lambda pc, pr, rc, rr: pc - rc >= pr - rr),
            "Where both rewards are the same, as at the first step, the pair counts as ranked right. Nothing"
            " has been learned yet: greater, not equal.",
        ),
    ),
    hints=(
        "Two models, one batch: answer_logprobs gives [2 · pairs] of each; .chunk(2) halves it.",
        "with torch.no_grad(): for the reference. The loss is preference_loss(...).mean().",
        (
            "chosen, rejected = answer_logprobs(policy(ids), ids, mask).chunk(2), and the same for the"
            " reference; the share is ((chosen - ref_chosen) > (rejected - ref_rejected)).float().mean()."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    ANSWER_LOGPROBS,
    GROUP_RELATIVE_ADVANTAGES,
    CLIPPED_POLICY_LOSS,
    KL_K3,
    FIRST_GRADIENT,
    GRPO_UPDATE,
    PENALISED_REWARDS,
    ADVANTAGES_AND_RETURNS,
    WHITENED_ADVANTAGES,
    PPO_UPDATE,
    PREFERENCE_LOSS,
    DPO_STEP,
)
