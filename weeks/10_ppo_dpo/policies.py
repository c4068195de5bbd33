"""Week 10's methods: a run of each, what it costs, and what the policy has learned."""

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from names import NAMES
from preferences import Start, answer_texts, learned_rewards, pair_batches, rule_reward
from shared import checkpoint
from shared.alignment.base_loop import AlignmentLoop
from shared.alignment.logprobs import answer_kl
from shared.alignment.loops import DPO, GRPO, PPO, OnlineConfig, draw_answers
from shared.alignment.rewards import answer_rewards, shuffled
from shared.course.workspace import Workspace
from shared.evaluation import known_words
from shared.runtime import RunLog, clock, table

if TYPE_CHECKING:
    from run import Settings

HELD_OUT_SEED = 5
SAMPLES = 4
"""So many answers are kept in the log and shown."""
FORWARD_PASSES = {"ppo": 5, "grpo": 4, "dpo": 1}
"""Without a gradient, for each token: drawing, policy, reference, reward model, and PPO's value model; of DPO
the reference alone.
"""
TRAINED_MODELS = {"ppo": 2, "grpo": 1, "dpo": 1}
"""PPO's value model learns too."""


def align(name: str, method: str, settings: "Settings", start: Start, work: Workspace) -> dict[str, float]:
    """One run of a method, measured on held-out prompts as it goes, its model kept. Returns its metrics.

    name: what the run is called in the logs.
    """
    config = settings.config_of(method)
    print(f"{name}: {config.steps} steps at beta={config.beta:g}", flush=True)
    with work.log(name, settings) as log:
        loop = make_loop(method, settings, start, log, work.checkpoints / f"{name}.safetensors")

        def measure() -> dict[str, float]:
            measured = measure_policy(loop.policy, start, settings)
            return {f"held_out_{key}": value for key, value in measured.items()}

        began = clock()
        loop.fit(settings.resume, measure, max(1, config.steps // settings.measurements))
        metrics = measure_policy(loop.policy, start, settings, log)
        metrics |= cost(method, settings)
        metrics |= {"beta": config.beta, "seconds": clock() - began}
        checkpoint.save(loop.policy, work.checkpoints / name, start.corpus.tokenizer, metrics)
        return log.finish(**metrics)


def make_loop(
    method: str, settings: "Settings", start: Start, log: RunLog | None, file: Path | None
) -> AlignmentLoop:
    """A method's loop, its policy a copy of week 6's model. PPO's value model begins as the reward model,
    which knows what an answer will get.
    """
    policy = copy.deepcopy(start.base).requires_grad_()
    if method == "dpo":
        pairs = pair_batches(start.pairs, settings.rows // 2, settings.dpo.seed, start.prompts.device)
        return DPO(policy, start.base, pairs, settings.dpo, log=log, file=file)
    answers_to_each = 1 if method == "ppo" else settings.grpo.group_size
    rows = shuffled(len(start.prompts), settings.rows // answers_to_each, settings.config_of(method).seed)

    def prompts(step: int) -> Tensor:
        return start.prompts[rows(step)]

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return answer_rewards(start.reward, ids, mask)

    if method == "grpo":
        return GRPO(policy, start.base, prompts, score, settings.grpo, log=log, file=file)
    value = copy.deepcopy(start.reward).requires_grad_()
    return PPO(policy, value, start.base, prompts, score, config=settings.ppo, log=log, file=file)


def cost(method: str, settings: "Settings") -> dict[str, float]:
    """Answers drawn, and tokens that went through a model without a gradient and with one."""
    config = settings.config_of(method)
    answers = config.steps * settings.rows
    tokens = answers * (settings.prompt_tokens + settings.answer_tokens)
    online = isinstance(config, OnlineConfig)
    epochs = config.epochs if online else 1
    return {
        "answers_drawn": answers if online else 0,
        "forward_tokens": FORWARD_PASSES[method] * tokens,
        "policy_backward_tokens": epochs * tokens,
        "backward_tokens": TRAINED_MODELS[method] * epochs * tokens,
    }


@torch.no_grad()
def measure_policy(
    policy: nn.Module, start: Start, settings: "Settings", log: RunLog | None = None
) -> dict[str, float]:
    """One answer to each held-out prompt: both rewards, KL to week 6's model, standard errors, words. With a
    log, samples are kept there.

    The seed is always the same, so that two policies differ by what they have learned.
    """
    generator = Generator().manual_seed(HELD_OUT_SEED)
    ids, mask = draw_answers(policy, start.held_out, settings.answer_tokens, generator=generator)
    kl = [answer_kl(policy(i), start.base(i), m) for i, m in zip(ids.split(64), mask.split(64))]
    answers = answer_texts(ids, start.corpus, settings)
    values = {
        "reward": torch.tensor([rule_reward(answer, settings) for answer in answers]),
        "learned": learned_rewards(start.reward, ids, settings),
        "kl": torch.cat(kl),
    }
    metrics = {key: v.mean().item() for key, v in values.items()}
    metrics |= {f"{key}_error": v.std().item() / math.sqrt(len(v)) for key, v in values.items()}
    known = known_words(" ".join(answers), start.text)
    metrics["known_words"] = known if math.isfinite(known) else 0.0
    metrics["words"] = sum(len(answer.split()) for answer in answers) / len(answers)
    if log:
        prompts = [start.corpus.tokenizer.decode(prompt) for prompt in start.held_out[:SAMPLES].tolist()]
        log.artifact(samples=list(zip(prompts, answers)))
    return metrics


def show_policies(rows: dict[str, dict[str, float]]) -> None:
    """Prints the table for people: a row for each policy, its metrics by name."""

    def with_error(row: dict[str, float], key: str) -> str:
        return f"{row[key]:.2f} ± {row[f'{key}_error']:.2f}"

    cells = [
        {
            "policy": NAMES.get(name, name),
            "beta": row.get("beta"),
            "rule's reward": with_error(row, "reward"),
            "learned reward": with_error(row, "learned"),
            "KL (nats)": with_error(row, "kl"),
            "known words": f"{row['known_words']:.1%}",
            "s": row.get("seconds"),
        }
        for name, row in rows.items()
    ]
    print("\n" + table(cells))
