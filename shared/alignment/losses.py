"""Week 10. From what people prefer to what the model says: reward models, PPO, DPO, GRPO.

Pure functions, each of which is one formula. The loops that call them are in `alignment_loops.py`.

All three methods (GRPO in one of its forms, see `GRPOConfig.kl`) look for the same policy: the one with the
greatest mean of r(x, y) - beta · KL(policy ‖ reference). It is known in closed form, pi*(y|x) ∝ pi_ref(y|x) ·
exp(r(x, y) / beta); where all answers can be listed, a method can be held against it.

Words used throughout: `ids` are int64 [batch, time], a prompt, its answer, and padding to the right. `mask`
is bool [batch, time], True at the answer's tokens. What belongs to a prediction (log-probabilities, values,
rewards) has the shape [batch, time - 1], and entry t is about token t + 1; its mask is mask[:, 1:].
Log-probabilities and KL are in nats.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


def _same_shapes(**tensors: Tensor | None) -> None:
    shapes = {name: list(t.shape) for name, t in tensors.items() if t is not None}
    if len({tuple(s) for s in shapes.values()}) > 1:
        raise ValueError(
            f"shapes differ, and all must be one: {', '.join(f'{n} {s}' for n, s in shapes.items())}"
        )


# ---- log-probabilities, means, entropy


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token but the first, given those before it: logits [batch, time, vocab_size] ->
    [batch, time - 1].

    The logits at position t are about token t + 1; the last ones are about nothing that is there. Half
    precision is computed in fp32.
    """
    if logits.shape[:2] != ids.shape:
        raise ValueError(
            f"logits {list(logits.shape)} and ids {list(ids.shape)} differ: pass the ids that the model has"
            " read, not shifted"
        )
    logits = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    return logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def sequence_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each answer given its prompt: the sum over the tokens where `mask` is True. ->
    [batch].

    Raises ValueError where an answer has no token, or where the mask takes in the first token, which nothing
    predicts.
    """
    _same_shapes(ids=ids, mask=mask)
    if mask[:, 0].any() or not mask.any(1).all():
        raise ValueError(
            "each row of the mask needs at least one answer token, and none in the first place: the prompt"
            " stands there"
        )
    return token_logprobs(logits, ids).masked_fill(~mask[:, 1:], 0).sum(1)


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of x where mask is True, over all its dimensions -> a scalar. What is masked may be nan. No mask:
    the plain mean.
    """
    _same_shapes(x=x, mask=mask)
    return x.mean() if mask is None else x.masked_fill(~mask, 0).sum() / mask.sum()


def entropy(logits: Tensor) -> Tensor:
    """Of the next token's distribution, in nats: [..., vocab_size] -> [...]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """x with variance 1 (unbiased) and mean 0 over what the mask lets through; 0 elsewhere. shift_mean=False
    keeps the mean.

    Raises ValueError for fewer than two values, which have no variance.
    """
    _same_shapes(x=x, mask=mask)
    values = x if mask is None else x[mask]
    if values.numel() < 2:
        raise ValueError(f"whitening needs at least 2 values, got {values.numel()}: use a larger batch")
    white = (x - values.mean()) * torch.rsqrt(values.var() + 1e-8) + (0 if shift_mean else values.mean())
    return white if mask is None else white.masked_fill(~mask, 0)


# ---- reward models, KL


def scalar_head(model: nn.Module, std: float | None = None, generator: Generator | None = None) -> nn.Module:
    """A copy of `model` whose lm_head gives one number per position: ids -> [batch, time, 1]; a value model,
    or a reward model.

    std: of the head's first weights. None takes 1 / sqrt(n_embd + 1), as a reward model's; 0 suits a value
    model, which then starts by expecting nothing. ("The N implementation details of RLHF with PPO", 2023.)
    """
    model = copy.deepcopy(model)
    width = model.config.n_embd
    head = nn.Linear(width, 1, device=model.lm_head.weight.device)
    with torch.no_grad():
        head.bias.zero_()
        head.weight.copy_(
            torch.randn(1, width, generator=generator) * ((width + 1) ** -0.5 if std is None else std)
        )
    model.lm_head = head
    return model


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Loss of a reward model, -log sigmoid(chosen - rejected), for each pair of rewards: [batch] -> [batch].

    It says that the chosen answer wins with probability sigmoid of the difference (Bradley and Terry, 1952;
    Stiennon et al., 2020).
    """
    _same_shapes(chosen=chosen, rejected=rejected)
    return -F.logsigmoid(chosen - rejected)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimates KL(policy ‖ reference) from log-probabilities of what the *policy* drew, one value each. Same
    shape, nats.

    With d = logp - ref_logp: k1 = d, unbiased, of either sign; k2 = d² / 2, biased, never negative; k3 =
    exp(-d) - 1 + d, unbiased and never negative (Schulman, "Approximating KL Divergence", 2020). That holds
    for values: on the policy, k2's gradient is the KL's, k3's is not.
    """
    _same_shapes(logp=logp, ref_logp=ref_logp)
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind={kind!r}: must be k1, k2 or k3")


def answer_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """KL(policy ‖ reference) of whole answers that the *policy* drew, an estimate for each: [batch], nats.

    logits, ref_logits: [batch, time, vocab_size]; mask as everywhere. The sum over the answer's tokens of the
    exact KL of the next token. Like the sum of k1 it is unbiased, and it scatters far less: only what was
    read is left to chance, not what was drawn next. It is what reports should use; a gradient through it
    leaves out that other answers would be drawn.
    """
    _same_shapes(logits=logits, ref_logits=ref_logits)
    logp, ref_logp = logits[:, :-1].log_softmax(-1), ref_logits[:, :-1].log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1).masked_fill(~mask[:, 1:], 0).sum(1)


# ---- PPO (Schulman et al., 2017; for language models Ziegler et al., 2019)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """What each token earns: -beta · its KL, and the whole answer's score at its last token. scores [batch],
    kl and mask [batch, time] -> [batch, time], 0 outside the mask. Raises ValueError for an answer without a
    token.
    """
    _same_shapes(kl=kl, mask=mask)
    if not mask.any(1).all():
        raise ValueError(
            "an answer has no token, so nothing can earn its score: each row of the mask needs one"
        )
    places = torch.arange(mask.size(1), device=mask.device)
    last = (mask * places).argmax(1, keepdim=True)  # [batch, 1]
    return (-beta * kl).masked_fill(~mask, 0).scatter_add(1, last, scores.to(kl.dtype).unsqueeze(1))


def gae(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2015) -> (advantages, returns), both like `rewards`,
    [..., time].

    advantage_t = sum over k of (gamma · lam)^k · delta_(t+k), with delta_t = reward_t + gamma · value_(t+1) -
    value_t; after the last token the value is 0. returns = advantages + values: what the value model learns.
    mask: True for each row's tokens, which lie side by side; both results are 0 elsewhere. Raises ValueError
    for a gamma or lam outside 0 to 1.

    >>> gae(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.5]), gamma=1.0, lam=1.0)
    (tensor([0.5000, 0.5000, 0.5000]), tensor([1., 1., 1.]))
    """
    _same_shapes(rewards=rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma={gamma}, lam={lam}: both must be from 0 to 1")
    if mask is not None:
        rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    running = following = torch.zeros_like(rewards[..., 0])
    backwards = []
    for t in reversed(range(rewards.size(-1))):
        delta = rewards[..., t] + gamma * following - values[..., t]
        running = delta + gamma * lam * running
        following = values[..., t]
        backwards.append(running)
    advantages = torch.stack(backwards[::-1], -1)
    if mask is not None:
        advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor | None = None, clip: float = 0.2
) -> Tensor:
    """PPO's clipped loss of the policy, the mean over tokens: -min(ratio · A, clamp(ratio, 1 - clip, 1 +
    clip) · A). All [batch, time].

    Beyond the clip a token has no gradient any more in the direction it already went. The old
    log-probabilities are constants.
    """
    return masked_mean(_clipped(logp - old_logp, advantages, clip, clip), mask)


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor | None = None, clip: float = 0.2
) -> Tensor:
    """PPO's clipped loss of the values: half the mean of the larger of two squared errors, the value's own
    and that of the value held within `clip` of the old one. All [batch, time].
    """
    _same_shapes(values=values, old_values=old_values, returns=returns)
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (held - returns).square()), mask)


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
) -> Tensor:
    """policy_loss + value_coef · value_loss, a scalar to descend on. All tensors [batch, time], mask bool.
    Only `logp` and `values` get a gradient, whatever the others carry. Raises ValueError where shapes differ,
    and for a clip that is not above 0.
    """
    _same_shapes(
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
    """How far the policy has gone since it drew: approx_kl (k2, nats per token), clipfrac (share of tokens
    whose gradient the clip takes away), ratio (its mean, 1 at the first step). Above about 0.02 and 0.2, take
    fewer epochs or a lower learning rate.
    """
    ratio = (logp - old_logp).exp()
    clipped = -ratio.clamp(1 - clip, 1 + clip) * advantages > -ratio * advantages
    found = {
        "approx_kl": kl_estimate(old_logp, logp, "k2"),
        "clipfrac": clipped.to(ratio.dtype),
        "ratio": ratio,
    }
    return {name: masked_mean(x, mask).item() for name, x in found.items()}


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> float:
    """1 - var(returns - values) / var(returns): 1 for perfect values, 0 for a constant, below 0 for worse;
    nan where returns don't vary.
    """
    _same_shapes(values=values, returns=returns, mask=mask)
    if mask is not None:
        values, returns = values[mask], returns[mask]
    total = returns.var().item()
    return 1 - (returns - values).var().item() / total if total > 0 else math.nan


# ---- DPO (Rafailov et al., 2023) and its relatives

DPO_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
_NEED_SMOOTHING = {
    "exo_pair": "above 0 and below 0.5; 0.001 is usual",
    "robust": "from 0 up to, not including, 0.5",
}


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    tau: float = 0.05,
) -> Tensor:
    """Loss for each pair [batch], from four summed log-probabilities [batch]: of the chosen and the rejected
    answer, by policy and reference.

    With c and r the log-ratios log pi - log pi_ref of the chosen and the rejected answer, and m = beta · (c -
    r):

    | loss_type | loss | source |
    | --- | --- | --- |
    | sigmoid | -log σ(m); ln 2 at the first step | Rafailov et al., 2023 |
    | hinge | max(0, 1 - m) | Zhao et al., SLiC, 2023 |
    | ipo | (c - r - 1 / (2 beta))², c and r per token where lengths are given | Azar et al., 2023 |
    | robust | (-(1 - e) log σ(m) + e log σ(-m)) / (1 - 2e), e = label_smoothing | Chowdhury et al., 2024 |
    | exo_pair | KL of (σ(m), σ(-m)) from (1 - e, e) | Ji et al., 2024 |
    | nca_pair | -log σ(beta c) - ½ log σ(-beta c) - ½ log σ(-beta r) | Chen et al., 2024 |
    | bco_pair | -log σ(beta c) - log σ(-beta r) | Jung et al., 2024, without its moving mean |
    | sppo_hard | (c - 1 / (2 beta))² + (r + 1 / (2 beta))² | Wu et al., 2024 |
    | aot, aot_unpaired | -log σ of beta · differences of sorted values over the batch, smoothed by e | Melnyk et al., 2024 |
    | apo_zero, apo_down | 1 - σ(beta c) + σ(beta r), σ(beta c) + 1 - σ(m) | D'Oosterlinck et al., 2024 |
    | discopop | -log σ(m) (1 - s) + exp(-m) s, s = σ(m / tau) | Lu et al., 2024 |
    | sft | -log pi(chosen), per token over the batch; needs chosen_lengths | |
    | sigmoid_norm | sigmoid with c and r per token; needs both lengths | Meng et al., SimPO, 2024, with a reference |

    The reference is a constant: no gradient reaches it. lengths: the answers' tokens, [batch]. Raises
    ValueError for an unknown type, a beta that is not above 0, other shapes than [batch], and for what a type
    needs and is not given.
    """
    tensors = dict(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    _same_shapes(**tensors, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    if policy_chosen.dim() != 1:
        raise ValueError(
            f"log-probabilities must be summed over each answer, [batch], not {list(policy_chosen.shape)}:"
            " see sequence_logprobs"
        )
    if loss_type not in DPO_LOSSES:
        raise ValueError(f"loss_type={loss_type!r}: must be one of {', '.join(DPO_LOSSES)}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta}: must be above 0; 0.1 is usual")
    if not 0 <= label_smoothing < 0.5 or (loss_type == "exo_pair" and not label_smoothing):
        raise ValueError(
            f"label_smoothing={label_smoothing}: for {loss_type} it must be"
            f" {_NEED_SMOOTHING.get(loss_type, _NEED_SMOOTHING['robust'])}"
        )
    if label_smoothing and loss_type not in SMOOTHED_LOSSES:
        raise ValueError(
            f"label_smoothing={label_smoothing}: {loss_type} has none; leave it at 0, or choose one of"
            f" {', '.join(SMOOTHED_LOSSES)}"
        )
    if loss_type == "ipo" and (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError(
            "ipo is per token where it is given lengths: give both chosen_lengths and rejected_lengths"
            " [batch], or neither"
        )
    if (loss_type in ("sft", "sigmoid_norm") and chosen_lengths is None) or (
        loss_type == "sigmoid_norm" and rejected_lengths is None
    ):
        raise ValueError(
            f"{loss_type} is per token: give chosen_lengths and rejected_lengths, the answers' numbers of"
            " tokens [batch]"
        )
    chosen, rejected = policy_chosen - ref_chosen.detach(), policy_rejected - ref_rejected.detach()
    margin = beta * (chosen - rejected)
    if loss_type in ("ipo", "sigmoid_norm") and chosen_lengths is not None:
        margin = beta * (chosen / chosen_lengths - rejected / rejected_lengths)
    log_sigmoid, e = F.logsigmoid, label_smoothing
    match loss_type:
        case "sigmoid" | "sigmoid_norm":
            return -log_sigmoid(margin)
        case "hinge":
            return F.relu(1 - margin)
        case "ipo":
            return (margin / beta - 1 / (2 * beta)).square()
        case "robust":
            return (-(1 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / (1 - 2 * e)
        case "exo_pair":
            wins, loses = log_sigmoid(margin), log_sigmoid(-margin)
            return wins.exp() * (wins - math.log1p(-e)) + loses.exp() * (loses - math.log(e))
        case "nca_pair":
            return (
                -log_sigmoid(beta * chosen)
                - 0.5 * log_sigmoid(-beta * chosen)
                - 0.5 * log_sigmoid(-beta * rejected)
            )
        case "bco_pair":
            return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)
        case "sppo_hard":
            return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
        case "aot" | "aot_unpaired":
            if loss_type == "aot":
                gap = (policy_chosen - policy_rejected).sort().values - (
                    ref_chosen - ref_rejected
                ).detach().sort().values
            else:
                gap = chosen.sort().values - rejected.sort().values
            return -log_sigmoid(beta * gap) * (1 - e) - log_sigmoid(-beta * gap) * e
        case "apo_zero":
            return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()
        case "apo_down":
            return (beta * chosen).sigmoid() + 1 - margin.sigmoid()
        case "discopop":
            share = (margin / tau).sigmoid()
            return -log_sigmoid(margin) * (1 - share) + torch.exp(-margin) * share
        case "sft":
            return -policy_chosen * len(policy_chosen) / chosen_lengths.sum()


def preference_batch(
    pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], pad: int = 0
) -> tuple[Tensor, Tensor]:
    """(prompt, chosen, rejected) as token ids -> (ids int64 [2 · batch, time], mask bool of the same shape),
    all chosen answers first.

    pad: stands to the right of what is shorter; no token looks to its right, so any id will do. Raises
    ValueError, naming the pairs, for identical answers, which prefer nothing, for an empty answer, and for an
    empty prompt, without which nothing predicts the first token.
    """
    problems = ["there are no pairs"] if not len(pairs) else []
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        if list(chosen) == list(rejected):
            problems.append(f"pair {i} has two identical answers: leave it out")
        if not (len(chosen) and len(rejected) and len(prompt)):
            problems.append(
                f"pair {i} has an empty {'prompt' if not len(prompt) else 'answer'}: each needs a token"
            )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"preferences: {'; '.join(problems[:3])}{more}")
    rows = [(list(p), list(c)) for p, c, _ in pairs] + [(list(p), list(r)) for p, _, r in pairs]
    ids = torch.full((len(rows), max(len(p) + len(a) for p, a in rows)), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end], mask[i, len(prompt) : end] = torch.tensor(prompt + answer), True
    return ids, mask


# ---- GRPO (Shao et al., DeepSeekMath, 2024)


def group_advantages(
    scores: Tensor, group_size: int, scale: Literal["group", "batch", "none"] = "group"
) -> Tensor:
    """Each answer's score less the mean of its group, divided by the standard deviation (unbiased, + 1e-4) of
    its group, of the batch, or by nothing. scores [groups · group_size], the answers to one prompt side by
    side -> the same shape.

    "none" is Dr. GRPO's (Liu et al., 2025). Dividing by the group's makes one beta mean something else for
    each prompt: then the optimum is another one. Raises ValueError for groups of one, and for a batch that
    group_size does not divide.
    """
    if group_size < 2 or scores.numel() % group_size:
        raise ValueError(
            f"group_size={group_size} for {scores.numel()} scores: it must be at least 2 and divide them"
        )
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r}: must be group, batch or none")
    groups = scores.view(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale != "none":
        advantages = advantages / ((groups.std(1, keepdim=True) if scale == "group" else scores.std()) + 1e-4)
    return advantages.flatten()


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_high: float | None = None,
    loss_type: Literal["grpo", "bnpo", "dr_grpo"] = "grpo",
    importance: Literal["token", "sequence"] = "token",
) -> Tensor:
    """GRPO's loss, a scalar. logp, old_logp, ref_logp, mask [batch, time]; advantages [batch], one for a
    whole answer.

    PPO's clipped loss, with beta · k3 to the reference added (needs ref_logp). loss_type: how tokens are
    averaged: "grpo", over each answer, then over answers (short answers weigh more for each token); "bnpo",
    over all tokens; "dr_grpo", the sum over batch · time, the same for each token however long the answer
    (Liu et al., 2025). importance "sequence": one ratio for a whole answer, the geometric mean (GSPO, Zheng
    et al., 2025). clip_high: the upper clip, if another (DAPO, Yu et al., 2025). Only `logp` gets a gradient.
    Raises ValueError where shapes differ, for an unknown type, and for a beta without ref_logp.
    """
    _same_shapes(logp=logp, old_logp=old_logp, ref_logp=ref_logp, mask=mask)
    _same_shapes(advantages=advantages, rows=logp[:, 0])
    if loss_type not in ("grpo", "bnpo", "dr_grpo") or importance not in ("token", "sequence"):
        raise ValueError(
            f"loss_type={loss_type!r}, importance={importance!r}: must be grpo, bnpo or dr_grpo, and token or"
            " sequence"
        )
    if beta and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp, the reference's log-probabilities")
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    lengths = mask.sum(1).clamp(min=1)
    log_ratio = (logp - old_logp.detach()).masked_fill(~mask, 0)
    if importance == "sequence":
        log_ratio = (log_ratio.sum(1) / lengths).unsqueeze(1).expand_as(logp)
    losses = _clipped(
        log_ratio, advantages.detach().unsqueeze(1), clip, clip if clip_high is None else clip_high
    )
    if beta:
        losses = losses + beta * kl_estimate(logp, ref_logp.detach())
    losses = losses.masked_fill(~mask, 0)
    if loss_type == "grpo":
        return (losses.sum(1) / lengths).mean()
    return losses.sum() / (mask.sum().clamp(min=1) if loss_type == "bnpo" else losses.numel())
