"""What all of week 10's methods begin with: prompts, the model's own answers, preferences, a reward model."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Generator, Tensor, nn

from shared import checkpoint
from shared.alignment.loops import draw_answers
from shared.alignment.rewards import (
    Pair,
    RewardModel,
    answer_rewards,
    best_and_worst,
    exclamations,
    pair_accuracy,
    preference_batch,
    scalar_head,
    shuffled,
    standardise,
)
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.models.gpt import GPT

if TYPE_CHECKING:
    from run import Settings

SEARCHED_TOKENS = 2**22
"""In so many tokens of a text, from the first, beginnings of lines are looked for."""
READ_TOKENS = 2**20
"""So many tokens of the training text have the words that count as known."""
ROWS_AT_ONCE = 256
STANDARDISED_PROMPTS = 32
"""On the answers to so many prompts, the reward model's mean and deviation are set to 0 and 1."""


@dataclass(frozen=True)
class Start:
    """What all methods begin with."""

    base: GPT
    corpus: Corpus
    text: str
    """What the model has read, for the words in it."""
    prompts: Tensor
    """int64 [prompts, time]; so are those held out."""
    held_out: Tensor
    pairs: list[Pair]
    reward: nn.Module


@dataclass(frozen=True)
class Drawn:
    """Answers of the untouched model, judged by the rule."""

    pairs: list[Pair]
    ties: int
    """Prompts left out, because all their answers score alike."""
    ids: Tensor
    """Prompts with their answers, int64 [prompts · answers, time]."""
    scores: Tensor
    """What the rule gives them, [prompts, answers]."""


def prepare(settings: "Settings", base: GPT, corpus: Corpus, work: Workspace) -> Start:
    """Draws the preferences from the model itself, and trains the reward model; a study takes the week's,
    where it is there. Raises ValueError where prompt and answer do not fit into the model's context.
    """
    length = settings.prompt_tokens + settings.answer_tokens
    if length > base.config.block_size:
        raise ValueError(
            f"prompt_tokens and max_new_tokens make {length}, more than the model's"
            f" block_size={base.config.block_size}"
        )
    prompts = cut_prompts(corpus.train, corpus, settings.prompt_tokens, settings.prompts, 1).to(work.device)
    held_out = cut_prompts(corpus.val, corpus, settings.prompt_tokens, settings.held_out, 2).to(work.device)
    drawn = draw_preferences(base, corpus, prompts, settings, seed=3)
    print(
        f"preferences: {settings.answers} answers to each of {len(prompts)} prompts;"
        f" {len(drawn.pairs)} pairs, {drawn.ties} prompts left out as ties",
        flush=True,
    )
    reward = kept_reward_model(corpus, settings, work)
    if reward is None:
        reward = train_reward_model(base, corpus, drawn, settings, work, held_out=held_out)
    text = corpus.tokenizer.decode(corpus.train[:READ_TOKENS].tolist())
    return Start(base, corpus, text, prompts, held_out, pairs=drawn.pairs, reward=reward)


# ---- prompts and preferences


def cut_prompts(tokens: np.ndarray, corpus: Corpus, length: int, count: int, seed: int) -> Tensor:
    """`count` beginnings of lines, drawn by chance, of `length` tokens each: int64 [count, length].

    Raises ValueError for a text with fewer lines than that.
    """
    tokens = np.asarray(tokens[:SEARCHED_TOKENS])
    breaks = [i for i, token in corpus.tokenizer.vocab.items() if token.endswith(b"\n")]
    beginnings = np.flatnonzero(np.isin(tokens[:-length], breaks)) + 1
    if len(beginnings) < count:
        raise ValueError(
            f"the text of {len(tokens)} tokens has {len(beginnings)} lines to cut prompts from, and {count}"
            " are needed: take fewer"
        )
    chosen = np.random.default_rng(seed).choice(beginnings, count, replace=False)
    return torch.from_numpy(tokens[chosen[:, None] + np.arange(length)].astype(np.int64))


def draw_preferences(base: GPT, corpus: Corpus, prompts: Tensor, settings: "Settings", seed: int) -> Drawn:
    """Draws `settings.answers` answers to each prompt; the best and the worst by the rule are a pair."""
    generator = Generator().manual_seed(seed)
    repeated = prompts.repeat_interleave(settings.answers, 0)
    parts = [
        draw_answers(base, part, settings.answer_tokens, generator=generator)[0]
        for part in repeated.split(ROWS_AT_ONCE)
    ]
    ids = torch.cat(parts)
    texts = answer_texts(ids, corpus, settings)
    scores = torch.tensor([rule_reward(text, settings) for text in texts]).view(len(prompts), -1)
    answers = ids[:, settings.prompt_tokens :].view(*scores.shape, -1).tolist()
    pairs, ties = best_and_worst(prompts.tolist(), answers, scores)
    return Drawn(pairs, ties, ids, scores)


def rule_reward(text: str, settings: "Settings") -> float:
    """The reward that can be verified: what preferences are labelled by, and what is reported. No method sees
    it.
    """
    return float(exclamations(text, settings.mark, settings.min_words))


def answer_texts(ids: Tensor, corpus: Corpus, settings: "Settings") -> list[str]:
    """The answers as text. ids: with the prompts, [batch, time]."""
    return [corpus.tokenizer.decode(row) for row in ids[:, settings.prompt_tokens :].tolist()]


def pair_batches(
    pairs: Sequence[Pair], count: int, seed: int, device: torch.device
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """step -> a batch of `count` pairs, as the loops take them: ids and mask, the chosen answers first."""
    rows = shuffled(len(pairs), count, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        ids, mask = preference_batch([pairs[i] for i in rows(step).tolist()])
        return ids.to(device), mask.to(device)

    return batch


# ---- the reward model


def with_reward_head(model: nn.Module, judges: Any) -> nn.Module:
    """A new model in the form that a reward model was saved in; judges: the rule it was trained on."""
    return scalar_head(model)


checkpoint.register_form("judges", with_reward_head)


def kept_reward_model(corpus: Corpus, settings: "Settings", work: Workspace) -> nn.Module | None:
    """For a study the week's reward model, in eval mode; None where it must be trained.

    One that was trained on another rule, or in another way, is named, and its training is not gone on with.
    """
    kept = checkpoint.find(work.checkpoints / "reward")
    if kept is None:
        return None
    config = json.loads((kept / "config.json").read_text(encoding="utf-8"))
    wanted = settings.judges
    if config.get("judges") == wanted:
        if not settings.study:
            return None
        how = trained_with(state_file(work))
        if how is None or how == asdict(settings.reward):
            return checkpoint.load(work.checkpoints / "reward", corpus.tokenizer, work.device).model
        wanted = {name: value for name, value in asdict(settings.reward).items() if how.get(name) != value}
    print(f"the reward model in {kept} was not trained for {wanted}: it is trained anew", flush=True)
    state_file(work).unlink(missing_ok=True)  # --resume would go on from it
    return None


def trained_with(state: Path) -> dict[str, Any] | None:
    """The settings of the training that left this state; None where there is none that can be read."""
    try:
        with safe_open(state, "pt") as file:
            return json.loads(file.metadata()["state"])["config"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def state_file(work: Workspace) -> Path:
    """Where the reward model's training is kept."""
    return work.checkpoints / "reward.safetensors"


def train_reward_model(
    base: GPT, corpus: Corpus, drawn: Drawn, settings: "Settings", work: Workspace, *, held_out: Tensor
) -> nn.Module:
    """Trains a reward model on pairs, measures it on answers to held-out prompts, and keeps it. In eval mode.

    It is scaled so that the untouched model's answers have mean 0 and standard deviation 1.
    """
    with work.log("reward", settings) as log:
        model = scalar_head(base, generator=Generator().manual_seed(settings.reward.seed))
        batches = pair_batches(drawn.pairs, settings.rows // 2, 1, work.device)
        RewardModel(model, batches, settings.reward, log, state_file(work)).fit(settings.resume)
        own_answers = drawn.ids[: STANDARDISED_PROMPTS * settings.answers]
        standardise(model, learned_rewards(model, own_answers, settings))
        others = draw_preferences(base, corpus, held_out, settings, seed=4)
        ids, mask = preference_batch(others.pairs)
        accuracy = pair_accuracy(model, ids.to(work.device), mask.to(work.device))
        metrics = {
            "held_out_accuracy": accuracy,
            "held_out_pairs": len(others.pairs),
            "held_out_ties": others.ties,
            "pairs": len(drawn.pairs),
            "ties": drawn.ties,
            "answers_drawn": len(drawn.ids),
            "base_reward": others.scores.mean().item(),
            "correlation": correlation_with_rule(model, others, settings),
            "held_out_accuracy_error": math.sqrt(accuracy * (1 - accuracy) / len(others.pairs)),
        }
        log.finish(**{key: value for key, value in metrics.items() if math.isfinite(value)})
    print(f"reward model: right on {accuracy:.1%} of {len(others.pairs)} held-out pairs")
    kept = {"held_out_accuracy": accuracy}
    folder = work.checkpoints / "reward"
    checkpoint.save(model, folder, corpus.tokenizer, metrics=kept, more={"judges": settings.judges})
    return model.eval()


def correlation_with_rule(model: nn.Module, drawn: Drawn, settings: "Settings") -> float:
    """Of the learned reward with the rule's; nan where one of them is always the same."""
    learned = learned_rewards(model, drawn.ids, settings).cpu()
    return torch.corrcoef(torch.stack([learned, drawn.scores.flatten()]))[0, 1].item()


@torch.no_grad()
def learned_rewards(reward: nn.Module, ids: Tensor, settings: "Settings") -> Tensor:
    """What the reward model gives answers of the full length: [batch]."""
    parts = [answer_rewards(reward, part, answer_mask(part, settings)) for part in ids.split(ROWS_AT_ONCE)]
    return torch.cat(parts)


def answer_mask(ids: Tensor, settings: "Settings") -> Tensor:
    """True at the answers' tokens, all but the prompts': bool [batch, time]."""
    return (torch.arange(ids.size(1), device=ids.device) >= settings.prompt_tokens).expand_as(ids)
