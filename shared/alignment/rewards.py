"""Week 10. What is to be learned: a rule that text can be checked against, preferences, and a reward model.

The reward model is the proxy that PPO and GRPO maximise; the rule is what was meant. The two come apart on
text that the reward model has not been trained on.
"""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.alignment.base_loop import AlignmentLoop, LoopConfig
from shared.alignment.logprobs import check_same_shapes, last_token
from shared.models.gpt import GPT
from shared.models.layers import Linear
from shared.runtime import RunLog, check_seed

Pair = tuple[list[int], list[int], list[int]]
"""A prompt, its chosen and its rejected answer, as token ids; see `preference_batch`."""


# ---- the rule


def exclamations(text: str, mark: str = "!", min_words: int = 3) -> int:
    """How many phrases of at least `min_words` words end in `mark`.

    A phrase reaches from one of . ! ? : ; or the text's beginning to the next of these. Marks without words
    do not count, nor does a phrase that is cut off at the end.

    >>> exclamations("O, what a noble king! Ay! Come, my good lord! And so we")
    2
    >>> exclamations("! ! ! !")
    0
    """
    ends = re.escape(".!?:;" + mark)
    count = 0
    for phrase in re.findall(f"[^{ends}]*[{ends}]", text):
        words = re.findall(r"[A-Za-z']+", phrase)
        if phrase.endswith(mark) and len(words) >= min_words:
            count += 1
    return count


# ---- preferences


def preference_batch(
    pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], pad: int = 0
) -> tuple[Tensor, Tensor]:
    """(prompt, chosen, rejected) as token ids -> (ids, mask), int64 and bool [2 · batch, time].

    All chosen answers come first. pad: fills the shorter rows on the right; no token looks to its right, so
    any id will do. Raises ValueError, naming the pairs, for identical answers, which prefer nothing, for an
    empty answer, and for an empty prompt, without which nothing predicts the first token.
    """
    problems = [] if len(pairs) else ["there are no pairs"]
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        if list(chosen) == list(rejected):
            problems.append(f"pair {i} has two identical answers: leave it out")
        if not len(prompt):
            problems.append(f"pair {i} has an empty prompt: each needs a token")
        elif not (len(chosen) and len(rejected)):
            problems.append(f"pair {i} has an empty answer: each needs a token")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"preferences: {'; '.join(problems[:3])}{more}")
    rows = [(list(prompt), list(chosen)) for prompt, chosen, _ in pairs]
    rows += [(list(prompt), list(rejected)) for prompt, _, rejected in pairs]
    ids = torch.full((len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, len(prompt) : end] = True
    return ids, mask


def best_and_worst(
    prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]], scores: Tensor
) -> tuple[list[Pair], int]:
    """A pair for each prompt, its best answer and its worst, and how many prompts were left out.

    A prompt is left out where all its answers score alike; of equal scores the first is taken. scores is
    [prompts, answers]. Raises ValueError where no prompt has a pair.
    """
    best = scores.max(1)
    worst = scores.min(1)
    pairs: list[Pair] = []
    for i, prompt in enumerate(prompts):
        if best.values[i] > worst.values[i]:
            chosen = answers[i][int(best.indices[i])]
            rejected = answers[i][int(worst.indices[i])]
            pairs.append((list(prompt), list(chosen), list(rejected)))
    if not pairs:
        raise ValueError(
            f"of {len(prompts)} prompts each has {scores.size(1)} answers that score alike, so there is no"
            " preference to learn from: draw more answers to each, or choose a reward that the model earns"
            " now and then"
        )
    return pairs, len(prompts) - len(pairs)


def shuffled(count: int, batch_size: int, seed: int) -> Callable[[int], Tensor]:
    """A function of the step that gives the row numbers of that step's batch, int64 [batch_size].

    In each epoch all of 0 … count - 1 are drawn in a new random order; an incomplete last batch is left out.
    A batch depends on seed and step alone, so a resumed run draws what it would have drawn. Raises ValueError
    for a batch larger than `count`.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"a batch of {batch_size} cannot be drawn from {count}: take smaller batches, of at least 1, or"
            " have more to draw from"
        )
    check_seed(seed)
    batches_per_epoch = count // batch_size

    def rows(step: int) -> Tensor:
        epoch, batch = divmod(step, batches_per_epoch)
        generator = Generator().manual_seed((seed + 1_000_003 * epoch) % 2**63)
        order = torch.randperm(count, generator=generator)
        return order[batch * batch_size : (batch + 1) * batch_size]

    return rows


# ---- the reward model


def scalar_head(model: GPT, std: float | None = None, generator: Generator | None = None) -> GPT:
    """A copy of `model` whose lm_head gives one number per position, ids -> [batch, time, 1].

    It serves as a reward model or as a value model. std: of the head's first weights. None takes 1 /
    sqrt(n_embd + 1), as for a reward model; 0 suits a value model, whose first values are then all 0 ("The N
    implementation details of RLHF with PPO", 2023).
    """
    model = copy.deepcopy(model)
    width = model.config.n_embd
    if std is None:
        std = (width + 1) ** -0.5
    head = Linear(width, 1, device=model.lm_head.weight.device)
    with torch.no_grad():
        head.bias.zero_()
        head.weight.copy_(torch.randn(1, width, generator=generator) * std)
    model.lm_head = head
    return model


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Loss of a reward model, -log σ(chosen - rejected), for each pair of rewards: [batch] -> [batch].

    It says that the chosen answer wins with probability σ of the difference (Bradley and Terry, 1952;
    Stiennon et al., 2020).
    """
    check_same_shapes(chosen=chosen, rejected=rejected)
    return -F.logsigmoid(chosen - rejected)


def answer_rewards(model: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """The reward of each answer, read at its last token: [batch].

    model: see `scalar_head`. Raises ValueError for an answer without a token.
    """
    if not mask.any(1).all():
        raise ValueError(
            "an answer has no token, so there is nothing to judge: each row of the mask needs one"
        )
    rows = torch.arange(len(ids), device=ids.device)
    return model(ids)[rows, last_token(mask), 0]


@torch.no_grad()
def pair_accuracy(model: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor) -> float:
    """The share of pairs in which the reward model gives the chosen answer more.

    ids and mask have the chosen answers first, as `preference_batch` makes them.
    """
    chosen, rejected = answer_rewards(model, ids, mask).chunk(2)
    return (chosen > rejected).float().mean().item()


@torch.no_grad()
def standardise(model: GPT, rewards: Tensor) -> GPT:
    """Shifts and scales a reward model's head: `rewards`, which it gave, would have mean 0 and deviation 1.

    Pairs say nothing about the level of a reward, and how far apart rewards are depends on how long the model
    was trained. After this, beta is counted in standard deviations of the reward among the reference's own
    answers, as in Ziegler et al. (2019). Returns the same model. Raises ValueError for rewards that are all
    alike.
    """
    mean = rewards.mean()
    std = rewards.std()
    if not std > 0:
        raise ValueError(
            f"{rewards.numel()} rewards that are all {mean.item():.4g} have no scale: train the reward model"
            " first"
        )
    head = model.lm_head
    head.weight.div_(std)
    head.bias.sub_(mean).div_(std)
    return model


class RewardModel(AlignmentLoop[LoopConfig]):
    """Trains a reward model on preferences, by Bradley and Terry's loss.

    model: see `scalar_head`. preferences: a function of the step that gives (ids, mask), the chosen answers
    first, as `preference_batch` makes them.
    """

    def __init__(
        self,
        model: nn.Module,
        preferences: Callable[[int], tuple[Tensor, Tensor]],
        config: LoopConfig,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"reward": model}, log, file)
        self.model = model
        self.preferences = preferences

    def _given(self, step: int) -> tuple[Tensor, ...]:
        return self.preferences(step)

    def update(self) -> dict[str, float]:
        """One step of the optimizer on the pairs of `self.step`; returns what is logged."""
        ids, mask = self.preferences(self.step)
        chosen, rejected = answer_rewards(self.model, ids, mask).chunk(2)
        metrics = self._descend(bradley_terry_loss(chosen, rejected).mean())
        margins = (chosen - rejected).detach()
        return metrics | {
            "accuracy": (margins > 0).float().mean().item(),
            "margin": margins.mean().item(),
        }
