"""Week 10. What is to be learned: a rule that text can be checked against, preferences, and a reward model
trained on them.

The reward model is the proxy that PPO and GRPO climb; the rule is what was meant. The two come apart where
the proxy has never looked.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.alignment.loops import AlignmentLoop, LoopConfig
from shared.alignment.losses import bradley_terry_loss
from shared.runtime import RunLog, check_seed

Pair = tuple[list[int], list[int], list[int]]
"""A prompt, its chosen and its rejected answer, as token ids; see `preference_batch`."""


# ---- the rule


def exclamations(text: str, mark: str = "!", min_words: int = 3) -> int:
    """How many phrases of at least `min_words` words end in `mark`. A phrase lies between two of . ! ? : ; or
    at the text's beginning.

    Marks alone are worth nothing, and what is cut off at the end is not counted.

    >>> exclamations("O, what a noble king! Ay! Come, my good lord! And so we")
    2
    >>> exclamations("! ! ! !")
    0
    """
    ends = re.escape(".!?:;" + mark)
    phrases = re.findall(f"[^{ends}]*[{ends}]", text)
    return sum(p.endswith(mark) and len(re.findall(r"[A-Za-z']+", p)) >= min_words for p in phrases)


# ---- preferences


def best_and_worst(
    prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]], scores: Tensor
) -> tuple[list[Pair], int]:
    """A pair for each prompt, its best answer and its worst, and the number of prompts left out because all
    their answers score alike.

    scores: [prompts, answers]. Of equals the first is taken. Raises ValueError where no prompt has a pair.
    """
    best, worst = scores.max(1), scores.min(1)
    pairs = [
        (list(prompt), list(answers[i][best.indices[i]]), list(answers[i][worst.indices[i]]))
        for i, prompt in enumerate(prompts)
        if best.values[i] > worst.values[i]
    ]
    if not pairs:
        raise ValueError(
            f"of {len(prompts)} prompts each has {scores.size(1)} answers that score alike, so there is no"
            " preference to learn from: draw more answers to each, or choose a reward that the model earns"
            " now and then"
        )
    return pairs, len(prompts) - len(pairs)


def shuffled(count: int, batch_size: int, seed: int) -> Callable[[int], Tensor]:
    """step -> the rows of that batch, int64 [batch_size]: all of 0 … count - 1 in a new random order each
    epoch; what is left over sits out.

    A batch depends on seed and step alone, so a resumed run draws what it would have drawn. Raises ValueError
    for a batch larger than all.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"a batch of {batch_size} cannot be drawn from {count}: take smaller batches, of at least 1, or"
            " have more to draw from"
        )
    check_seed(seed)

    def rows(step: int) -> Tensor:
        epoch, at = divmod(step, count // batch_size)
        order = torch.randperm(
            count, generator=torch.Generator().manual_seed((seed + 1_000_003 * epoch) % 2**63)
        )
        return order[at * batch_size : (at + 1) * batch_size]

    return rows


# ---- the reward model


def answer_rewards(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """What a reward model (`scalar_head`: ids -> [batch, time, 1]) gives each answer, read at its last token:
    [batch].

    Raises ValueError for an answer without a token.
    """
    if not mask.any(1).all():
        raise ValueError(
            "an answer has no token, so there is nothing to judge: each row of the mask needs one"
        )
    last = (mask * torch.arange(mask.size(1), device=mask.device)).argmax(1)
    return model(ids)[torch.arange(len(ids), device=ids.device), last, 0]


@torch.no_grad()
def pair_accuracy(model: nn.Module, ids: Tensor, mask: Tensor) -> float:
    """The share of pairs in which the reward model gives the chosen answer more. ids, mask: the chosen first,
    as `preference_batch` makes them.
    """
    chosen, rejected = answer_rewards(model, ids, mask).chunk(2)
    return (chosen > rejected).float().mean().item()


@torch.no_grad()
def standardise(model: nn.Module, rewards: Tensor) -> nn.Module:
    """Shifts and scales a reward model's head, so that `rewards`, which it gave, would have mean 0 and
    standard deviation 1. The same model.

    Pairs say nothing about the level of a reward, and how far apart rewards are depends on how long the model
    was trained. After this, beta is counted in standard deviations of the reward among the reference's own
    answers (Ziegler et al., 2019, do the same).
    """
    mean, std = rewards.mean(), rewards.std()
    if not std > 0:
        raise ValueError(
            f"{rewards.numel()} rewards that are all {mean.item():.4g} have no scale: train the reward model"
            " first"
        )
    head = model.lm_head
    head.weight.div_(std)
    head.bias.sub_(mean).div_(std)
    return model


class RewardModel(AlignmentLoop):
    """Trains a reward model on preferences, by Bradley and Terry's loss.

    model: see `scalar_head`. preferences: step -> (ids, mask), the chosen answers first, as
    `preference_batch` makes them.
    """

    def __init__(
        self,
        model: nn.Module,
        preferences: Callable[[int], tuple[Tensor, Tensor]],
        config: LoopConfig,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"reward": model}, None, log, file)
        self.model, self.preferences = model, preferences

    def update(self) -> dict[str, float]:
        chosen, rejected = answer_rewards(self.model, *self.preferences(self.step)).chunk(2)
        row = self._descend(bradley_terry_loss(chosen, rejected).mean())
        gap = (chosen - rejected).detach()
        return row | {"accuracy": (gap > 0).float().mean().item(), "margin": gap.mean().item()}
