"""Week 10. The three loops, PPO, DPO and GRPO.

Each is one page (`update`) that calls the formulas of `dpo.py` and `policy.py`. A reward model's is in
`rewards.py`.

The models are those of the course, ids -> logits, handed in and trained in place; a value model gives
[batch, time, 1] (see `rewards.scalar_head`). Every number a run draws comes from its own generator.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared import checkpoint
from shared.alignment.base_loop import AlignmentLoop, LoopConfig
from shared.alignment.dpo import dpo_loss, dpo_problems
from shared.alignment.logprobs import (
    entropy,
    kl_estimate,
    masked_mean,
    sequence_logprobs,
    token_logprobs,
    whiten,
)
from shared.alignment.policy import (
    explained_variance,
    gae,
    group_advantages,
    grpo_loss,
    leave_one_out_advantages,
    ppo_loss,
    ratio_diagnostics,
    token_rewards,
)
from shared.checks import Checks
from shared.runtime import RunLog
from shared.sampling.generate import sample

NO_TOKEN = -1
"""Fills up a prompt that is shorter than others of its batch, on the right."""
Prompts = Callable[[int], Tensor]
"""The prompts of a step: int64 [batch, time], shorter ones filled up with `NO_TOKEN`."""
Score = Callable[[Tensor, Tensor], Tensor]
"""The rewards of answers, (ids, mask) -> float [batch]; ids and mask as `draw_answers` gives them."""
Preferences = Callable[[int], tuple[Tensor, Tensor]]
"""The pairs of a step, (ids, mask), the chosen answers first, as `preference_batch` makes them."""


@dataclass(frozen=True)
class AlignConfig(LoopConfig):
    """What the three loops share."""

    beta: float = 0.1
    """What a nat of KL to the reference costs, in units of the reward. The optimum is the reference times
    exp(reward / beta).
    """


@dataclass(frozen=True)
class DPOConfig(AlignConfig):
    """How to learn from pairs."""

    loss_type: str = "sigmoid"
    """See `dpo_loss`."""
    label_smoothing: float = 0.0

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.above(0, "beta")
        checks.problems += dpo_problems(self.loss_type, self.label_smoothing)


@dataclass(frozen=True)
class OnlineConfig(AlignConfig):
    """What the two loops share that learn from answers they draw themselves.

    With beta=0 nothing holds the policy to the reference.
    """

    max_new_tokens: int = 32
    end: int | None = None
    """The token that ends an answer; none: every answer has max_new_tokens."""
    epochs: int = 4
    """How often each batch of answers is learned from."""
    minibatches: int = 1
    """Into how many steps of the optimizer an epoch is cut."""
    clip: float = 0.2

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.at_least(1, "max_new_tokens", "epochs", "minibatches")
        checks.above(0, "clip")
        checks.require(0 <= self.beta < math.inf, f"beta={self.beta}: must be 0 or more, and finite")


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """How to learn with a value model."""

    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2
    value_coef: float = 0.1

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.between(0, 1, "gamma", "lam")
        checks.above(0, "value_clip")
        checks.not_negative("value_coef")


@dataclass(frozen=True)
class GRPOConfig(OnlineConfig):
    """How to learn from groups of answers."""

    group_size: int = 8
    """Answers to each prompt."""
    baseline: Literal["group", "others"] = "group"
    """What an answer's score is compared with: the mean of its group, or that of the others in it (RLOO)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What the difference is divided by: see `group_advantages`. With baseline others: none."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo"] = "grpo"
    kl: Literal["loss", "reward"] = "loss"
    """loss: as published, k3 of each token in the loss. Its gradient is not that of KL(policy ‖ reference),
    and a group's deviation rescales the reward, so this ends near another policy. reward: an answer's whole
    KL is taken off its score; with scale none and dr_grpo the optimum is the reference times exp(reward /
    beta).
    """

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.at_least(2, "group_size")
        checks.require(
            self.baseline == "group" or self.scale == "none",
            f"baseline={self.baseline!r}, scale={self.scale!r}: RLOO divides by nothing, scale must be none",
        )

    def advantages(self, scores: Tensor) -> Tensor:
        """Of answers with these scores, [groups · group_size] -> the same shape."""
        if self.baseline == "others":
            return leave_one_out_advantages(scores, self.group_size)
        return group_advantages(scores, self.group_size, self.scale)


def pad_prompts(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Prompts of any lengths as one tensor, int64 [prompts, longest]: shorter ones end in `NO_TOKEN`.

    Raises ValueError for an empty prompt, after which nothing can be drawn.
    """
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("each prompt needs at least one token, and there must be a prompt")
    longest = max(len(prompt) for prompt in prompts)
    rows = [[*prompt, *[NO_TOKEN] * (longest - len(prompt))] for prompt in prompts]
    return torch.tensor(rows)


@torch.no_grad()
def draw_answers(
    model: nn.Module,
    prompts: Tensor,
    max_new_tokens: int,
    end: int | None = None,
    generator: Generator | None = None,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Answers to prompts, drawn at temperature 1 unless another is given.

    prompts: int64 [batch, time]; a shorter one ends in `NO_TOKEN` (see `pad_prompts`). Returns ids and mask,
    both [batch, time + max_new_tokens]. Each answer follows its prompt without a gap, so that its tokens have
    the positions that they would have alone, and all padding is on the right. An answer's `end` belongs to
    it; what comes after is `end` again (without one: 0), outside the mask. The methods leave the temperature
    at 1, because they need the probabilities with which the tokens were drawn; at 0 each is the likeliest.
    With a model that has `new_cache`, each token is read once. All rows draw from the one generator, so that
    a batch is a run's, and repeatable; for texts that do not depend on their neighbours there is
    `shared.sampling.generate_batch`.
    """
    lengths = (prompts != NO_TOKEN).sum(1)
    last_places = lengths + max_new_tokens - 1
    padding = 0 if end is None else end
    ids = F.pad(prompts.masked_fill(prompts == NO_TOKEN, padding), (0, max_new_tokens), value=padding)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    new_cache = getattr(model, "new_cache", None)
    cache = None if new_cache is None else new_cache(*ids.shape)
    alive = torch.ones_like(lengths, dtype=torch.bool)
    read = 0
    # All rows go on together, from the end of the shortest prompt: where a longer one goes on, its own tokens
    # are read, and what was drawn is not used.
    for place in range(int(lengths.min()), ids.size(1)):
        logits = model(ids[:, :place]) if cache is None else model(ids[:, read:place], cache)
        read = place
        drawn = sample(logits[:, -1], temperature, generator=generator)
        writing = alive & (place >= lengths)
        ids[writing, place] = drawn[writing]
        mask[:, place] = writing
        alive = alive & (place < last_places)
        if end is not None:
            alive = alive & ~(writing & (drawn == end))
        if not alive.any():
            break
    return ids, mask


Aligning = TypeVar("Aligning", bound=AlignConfig)


class PolicyLoop(AlignmentLoop[Aligning]):
    """What the loops share that train a policy and compare it with a reference.

    reference: what the KL is taken to; it is put in eval mode and frozen. It may share weights with the
    policy that do not learn (a base below adapters). Raises ValueError where it shares one that does.
    """

    def __init__(
        self,
        config: Aligning,
        trained: Mapping[str, nn.Module],
        reference: nn.Module,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        own = {id(p) for module in trained.values() for p in module.parameters() if p.requires_grad}
        if not own or any(id(p) in own for p in reference.parameters()):
            raise ValueError(
                "the reference must be a copy of the policy (copy.deepcopy), and the policy must have"
                " parameters that require gradients"
            )
        super().__init__(config, trained, log, file)
        self.policy = trained["policy"]
        self.reference = reference.eval().requires_grad_(False)

    def _fixed(self) -> dict[str, Tensor]:
        reference = checkpoint.unshared(self.reference)
        return super()._fixed() | {f"reference.{name}": tensor for name, tensor in reference.items()}


Online = TypeVar("Online", bound=OnlineConfig)


class OnlineLoop(PolicyLoop[Online]):
    """What PPO and GRPO share: they learn several times from each batch of answers that they have drawn."""

    prompts: Prompts
    score: Score

    def _given(self, step: int) -> tuple[Tensor, ...]:
        return (self.prompts(step),)

    def _minibatches(self, answers: int) -> Iterator[Tensor]:
        """The rows of each step of the optimizer: every epoch has all answers once, in a new order."""
        for _ in range(self.config.epochs):
            yield from torch.randperm(answers, generator=self.generator).chunk(self.config.minibatches)


class PPO(OnlineLoop[PPOConfig]):
    """Proximal policy optimization with a value model and a KL penalty on each token."""

    def __init__(
        self,
        policy: nn.Module,
        value: nn.Module,
        reference: nn.Module,
        prompts: Prompts,
        score: Score,
        *,
        config: PPOConfig,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"policy": policy, "value": value}, reference, log, file)
        self.value = value
        self.prompts = prompts
        self.score = score

    def update(self) -> dict[str, float]:
        """Draws answers to the prompts of `self.step`, and learns from them; returns what is logged."""
        config = self.config
        with torch.no_grad():
            # 1. Answers, and what the policy, the reference and the value model make of each token.
            prompts = self.prompts(self.step)
            ids, answers = draw_answers(
                self.policy, prompts, config.max_new_tokens, config.end, self.generator
            )
            mask = answers[:, 1:]  # of the tokens that are predicted: [batch, time - 1], as all that follows
            logits = self.policy(ids)
            old_logp = token_logprobs(logits, ids)
            ref_logp = token_logprobs(self.reference(ids), ids)
            old_values = self.value(ids)[:, :-1, 0]
            # 2. What each token earned, and how much better that was than expected.
            scores = self.score(ids, answers)
            kl = kl_estimate(old_logp, ref_logp, "k1")
            rewards = token_rewards(scores, kl, mask, config.beta)
            advantages, returns = gae(rewards, old_values, config.gamma, config.lam, mask)
            advantages = whiten(advantages, mask)
            metrics = {
                "score": scores.mean().item(),
                "kl": kl.masked_fill(~mask, 0).sum(1).mean().item(),  # of a whole answer
                "entropy": masked_mean(entropy(logits[:, :-1]), mask).item(),
                "explained_variance": explained_variance(old_values, returns, mask),
                "length": mask.sum(1).float().mean().item(),
            }
        # 3. Several steps on these answers, none so far that the ratios leave the clip.
        for rows in self._minibatches(len(ids)):
            logp = token_logprobs(self.policy(ids[rows]), ids[rows])
            loss = ppo_loss(
                logp,
                old_logp[rows],
                advantages[rows],
                values=self.value(ids[rows])[:, :-1, 0],
                old_values=old_values[rows],
                returns=returns[rows],
                mask=mask[rows],
                clip=config.clip,
                value_clip=config.value_clip,
                value_coef=config.value_coef,
            )
            metrics |= self._descend(loss)
        return metrics | ratio_diagnostics(logp, old_logp[rows], advantages[rows], mask[rows], config.clip)


class GRPO(OnlineLoop[GRPOConfig]):
    """Group-relative policy optimization: no value model, but several answers to each prompt.

    Each prompt gets group_size answers, and an answer is compared with the others of its group.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        prompts: Prompts,
        score: Score,
        config: GRPOConfig,
        *,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"policy": policy}, reference, log, file)
        self.prompts = prompts
        self.score = score

    def update(self) -> dict[str, float]:
        """Draws answers to the prompts of `self.step`, and learns from them; returns what is logged."""
        config = self.config
        with torch.no_grad():
            prompts = self.prompts(self.step).repeat_interleave(config.group_size, 0)
            ids, answers = draw_answers(
                self.policy, prompts, config.max_new_tokens, config.end, self.generator
            )
            mask = answers[:, 1:]
            logits = self.policy(ids)
            old_logp = token_logprobs(logits, ids)
            ref_logp = token_logprobs(self.reference(ids), ids)
            scores = self.score(ids, answers)
            kl = (old_logp - ref_logp).masked_fill(~mask, 0).sum(1)  # k1 of a whole answer
            rewards = scores - config.beta * kl if config.kl == "reward" else scores
            advantages = config.advantages(rewards)
            metrics = {
                "score": scores.mean().item(),
                "kl": kl.mean().item(),
                "entropy": masked_mean(entropy(logits[:, :-1]), mask).item(),
                "length": mask.sum(1).float().mean().item(),
            }
        for rows in self._minibatches(len(ids)):
            logp = token_logprobs(self.policy(ids[rows]), ids[rows])
            loss = grpo_loss(
                logp,
                old_logp[rows],
                advantages[rows],
                mask[rows],
                ref_logp[rows],
                beta=config.beta if config.kl == "loss" else 0.0,
                clip=config.clip,
                loss_type=config.loss_type,
            )
            metrics |= self._descend(loss)
        by_token = advantages[rows].unsqueeze(1)
        return metrics | ratio_diagnostics(logp, old_logp[rows], by_token, mask[rows], config.clip)


class DPO(PolicyLoop[DPOConfig]):
    """Direct preference optimization: neither a reward model nor drawing, only pairs."""

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module,
        preferences: Preferences,
        config: DPOConfig,
        log: RunLog | None = None,
        *,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"policy": policy}, reference, log, file)
        self.preferences = preferences

    def _given(self, step: int) -> tuple[Tensor, ...]:
        return self.preferences(step)

    def update(self) -> dict[str, float]:
        """One step of the optimizer on the pairs of `self.step`; returns what is logged."""
        config = self.config
        ids, mask = self.preferences(self.step)
        chosen_lengths, rejected_lengths = mask.sum(1).chunk(2)
        chosen, rejected = sequence_logprobs(self.policy(ids), ids, mask).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = sequence_logprobs(self.reference(ids), ids, mask).chunk(2)
        losses = dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=config.beta,
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )
        metrics = self._descend(losses.mean())
        chosen_rewards = config.beta * (chosen - ref_chosen).detach()
        rejected_rewards = config.beta * (rejected - ref_rejected).detach()
        return metrics | {
            "accuracy": (chosen_rewards > rejected_rewards).float().mean().item(),
            "margin": (chosen_rewards - rejected_rewards).mean().item(),
            "chosen_reward": chosen_rewards.mean().item(),
            "rejected_reward": rejected_rewards.mean().item(),
            "chosen_logp": chosen.mean().item(),
        }
