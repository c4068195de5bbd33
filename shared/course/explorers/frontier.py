"""Week 0. For week 10: reward against KL. The best policy for each beta, and where trained policies stand."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.course.explorers.attention import TextAndIds
from shared.course.explorers.page import Explorer
from shared.course.explorers.pictures import as_image
from shared.course.report import figure
from shared.course.style import style

Judge = Callable[[Tensor, Tensor], Tensor]
"""ids, int64 [answers, time], prompts with their answers and padding, and mask, bool, True at the answers'
tokens -> a reward for each answer."""


def frontier_explorer(
    policies: Mapping[str, nn.Module],
    prompts: Sequence[str],
    rewards: Mapping[str, Judge],
    tokenizer: TextAndIds,
    *,
    end: int,
    longest: int,
    least: float = 2e-3,
    title: str = "Reward against KL",
) -> Explorer:
    """Drag beta, and see the policy reference · exp(reward / beta) move along the frontier of reward and KL.

    The world of a prompt is all answers to which one of `policies` gives at least the probability `least`, up
    to the token `end` or to `longest` tokens; each policy is brought to sum 1 on it. policies: by the names
    that are shown, the reference first; ids [batch, time] -> logits [batch, time, vocab_size]. rewards: one
    or two, by name. Raises ValueError for no policy or prompt, other numbers of rewards, a `least` that is
    not between 0 and 1, rewards that are not finite, and a prompt with fewer than two such answers.
    """
    if not policies or not prompts or len(rewards) not in (1, 2) or not 0 < least < 1 or longest < 1:
        raise ValueError(
            f"{len(policies)} policies, {len(prompts)} prompts, {len(rewards)} rewards, least={least},"
            f" longest={longest}: needed are a policy (the reference), a prompt, one reward or two, a"
            " probability and a length of 1 or more"
        )
    entries = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        answers, logprobs = likely_answers(
            list(policies.values()), ids, end=end, longest=longest, least=least
        )
        if len(answers) < 2:
            raise ValueError(
                f"{prompt!r} has {len(answers)} answers of probability {least} or more: take a smaller least"
            )
        scores = [_judged(judge, ids, answers, end) for judge in rewards.values()]
        entries.append(
            {
                "prompt": prompt,
                "answers": [_text(tokenizer, answer, end) for answer in answers],
                "logprobs": [[round(value, 5) for value in row] for row in logprobs.tolist()],
                "rewards": [[round(value, 5) for value in row] for row in scores],
            }
        )
    data: dict[str, Any] = {"policies": list(policies), "rewards": list(rewards), "prompts": entries}
    words = (
        f"The most of the reward ({data['rewards'][0]}) that a policy can have at each KL from"
        f" {data['policies'][0]}, on {len(prompts)} prompts, and what the trained policies have."
    )
    return Explorer(title, ("frontier.js",), data, as_image(_picture(data), words))


@torch.no_grad()
def likely_answers(
    models: Sequence[nn.Module], prompt: Sequence[int], *, end: int, longest: int, least: float
) -> tuple[list[list[int]], Tensor]:
    """All answers to a prompt that one of the models gives with probability `least` or more, as ids.

    An answer has its `end`, or `longest` tokens. Also the models' log-probabilities of them, float64 [models,
    answers], the likeliest by the first model first.
    """
    threshold = torch.tensor(least, dtype=torch.float64).log()
    open_answers: list[list[int]] = [[]]
    so_far = torch.zeros(len(models), 1, dtype=torch.float64)
    answers: list[list[int]] = []
    found: list[Tensor] = []
    for place in range(longest):
        rows = torch.tensor([[*prompt, *answer] for answer in open_answers])
        steps = [model(rows)[:, -1].double().log_softmax(-1).cpu() for model in models]
        logprobs = so_far[:, :, None] + torch.stack(steps)  # [models, answers, vocab_size]
        grown: list[list[int]] = []
        following: list[Tensor] = []
        for row, token in (logprobs.amax(0) >= threshold).nonzero().tolist():
            answer = [*open_answers[row], token]
            done = token == end or place == longest - 1
            (answers if done else grown).append(answer)
            (found if done else following).append(logprobs[:, row, token])
        if not grown:
            break
        open_answers, so_far = grown, torch.stack(following, dim=1)
    if not answers:
        return [], torch.zeros(len(models), 0)
    table = torch.stack(found, dim=1)
    order = table[0].argsort(descending=True, stable=True)
    return [answers[i] for i in order.tolist()], table[:, order]


@torch.no_grad()
def _judged(judge: Judge, prompt: Sequence[int], answers: Sequence[Sequence[int]], end: int) -> list[float]:
    """A reward for each answer."""
    ids = torch.full((len(answers), len(prompt) + max(map(len, answers))), end)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, answer in enumerate(answers):
        whole = [*prompt, *answer]
        ids[i, : len(whole)] = torch.tensor(whole)
        mask[i, len(prompt) : len(whole)] = True
    scores = judge(ids, mask)
    if scores.shape != (len(answers),) or not torch.isfinite(scores).all():
        raise ValueError(
            f"rewards of shape {list(scores.shape)} for {len(answers)} answers, or some that are not finite:"
            " a reward takes ids and mask, and gives a number for each answer"
        )
    return scores.tolist()


def _text(tokenizer: TextAndIds, answer: Sequence[int], end: int) -> str:
    """An answer without its end; one that has none ends in dots."""
    return tokenizer.decode(list(answer[:-1])) if answer[-1] == end else f"{tokenizer.decode(list(answer))}…"


def _picture(data: dict[str, Any]) -> Any:
    """The frontier of the first reward, and the policies."""
    worlds = [torch.tensor(entry["logprobs"]).log_softmax(-1) for entry in data["prompts"]]
    scores = [torch.tensor(entry["rewards"][0]) for entry in data["prompts"]]

    def mean(chosen: Sequence[Tensor]) -> tuple[float, float]:
        """KL and reward of a policy, given by its log-probabilities in each world."""
        kl = [(p.exp() * (p - world[0])).sum() for p, world in zip(chosen, worlds)]
        earned = [(p.exp() * score).sum() for p, score in zip(chosen, scores)]
        return torch.stack(kl).mean().item(), torch.stack(earned).mean().item()

    best = [
        mean([(world[0] + score / beta).log_softmax(-1) for world, score in zip(worlds, scores)])
        for beta in torch.logspace(1, -2, 60).tolist()
    ]
    with style():
        fig, ax = figure(7, 5)
        ax.plot(*zip(*best), label="the best policies")
        for number, name in enumerate(data["policies"]):
            ax.scatter(*mean([world[number] for world in worlds]), label=name, zorder=3)
        ax.set(xlabel=f"KL from {data['policies'][0]} (nats)", ylabel=f"mean reward: {data['rewards'][0]}")
        ax.legend()
        return fig
