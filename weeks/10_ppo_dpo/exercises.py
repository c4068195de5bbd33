"""The graded exercises of week 10: an answer's log-probability, DPO's loss, a KL estimate, rewards with a
penalty, GAE, whitening, PPO's clip, groups, and what must not be differentiated.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from shared.alignment import dpo_loss, gae
from shared.alignment.logprobs import kl_estimate, sequence_logprobs, token_logprobs, whiten
from shared.alignment.policy import group_advantages, policy_loss, token_rewards
from shared.course.exercise import Exercise, Mistake


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

    return [case(*sizes) for sizes in SIZES]


ANSWER_LOGPROBS = Exercise(
    task="""How likely is an answer, given its prompt? `ids` is int64 [batch, time]: a prompt, its answer,
    then padding. `mask` is bool [batch, time], True at the answer's tokens. `logits` is float32 [batch, time,
    vocab_size], what the model said to `ids`: those at position t are about token t + 1. Return each answer's
    log-probability, the sum over its tokens, float32 [batch]. Each row has a prompt of at least one
    token.""",
    reference=answer_logprobs,
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


# ---- 2. DPO


def preference_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    return dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)


def _preference_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, beta: float) -> tuple:
        logprobs = [-5 * torch.rand(batch, generator=generator) - 1 for _ in range(4)]
        return *logprobs, beta

    return [case(1, 0.5), case(3, 0.1), case(5, 0.3), case(4, 1.0), case(2, 2.0)]


PREFERENCE_LOSS = Exercise(
    task="""DPO's loss for each pair. The arguments are float32 [batch]: the log-probability of the chosen and
    of the rejected answer, by the policy and by the reference. An answer's implicit reward is `beta` times
    its log-ratio, log policy - log reference. Return minus the log of the probability that the chosen answer
    wins, which is the sigmoid of the difference of rewards: float32 [batch].""",
    reference=preference_loss,
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


# ---- 3. KL from samples


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


# ---- 4. rewards with a penalty


def penalised_rewards(scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    return token_rewards(scores, logp - ref_logp, mask, beta)


def _at_last(scores: Tensor, mask: Tensor) -> Tensor:
    return token_rewards(scores, torch.zeros_like(mask, dtype=torch.float32), mask, 0.0)


def _at_end(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(mask), mask.size(1) - 1), scores.unsqueeze(1)], 1)


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
    cases=_reward_cases,
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


# ---- 5. GAE


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


# ---- 6. whitening


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


# ---- 7. PPO's clip


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

    return [case(*sizes, clip) for sizes, clip in zip(SIZES, (0.2, 0.1, 0.3, 0.2, 0.15))]


CLIPPED_POLICY_LOSS = Exercise(
    task="""PPO learns from the same answers several times, as long as the policy stays near the one that drew
    them. `logp` and `old_logp`, float32 [batch, time], are the tokens' log-probabilities now and when they
    were drawn; `advantages` is float32 [batch, time]. With ratio = probability now / then, each token's gain
    is the smaller of ratio · advantage and ratio clamped to 1 - clip .. 1 + clip, times advantage. Return
    minus the mean gain, a scalar.""",
    reference=clipped_policy_loss,
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


# ---- 8. groups


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


# ---- 9. what is a constant


def first_gradient(logits: Tensor, ids: Tensor, advantages: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    return _gradient(logits, ids, lambda logp: _objective(logp, logp.detach(), advantages, ref_logp, beta))


def _gradient(logits: Tensor, ids: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(_picked(logits, ids)), logits)[0]


def _objective(logp: Tensor, old_logp: Tensor, advantages: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    return (-(logp - old_logp).exp() * advantages + beta * kl_estimate(logp, ref_logp)).mean()


def _nothing_detached(logits: Tensor, ids: Tensor, a: Tensor, ref: Tensor, beta: float) -> Tensor:
    return _gradient(logits, ids, lambda logp: _objective(logp, logp, a, ref, beta))


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


EXERCISES: tuple[Exercise, ...] = (
    ANSWER_LOGPROBS,
    PREFERENCE_LOSS,
    KL_K3,
    PENALISED_REWARDS,
    ADVANTAGES_AND_RETURNS,
    WHITENED_ADVANTAGES,
    CLIPPED_POLICY_LOSS,
    GROUP_RELATIVE_ADVANTAGES,
    FIRST_GRADIENT,
)
