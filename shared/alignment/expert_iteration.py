"""Week 10. Expert iteration: draw answers, keep those that are right, and learn from them as from a text.

Also called rejection sampling. It needs neither advantages nor ratios nor a reference, and is what the
methods of `loops.py` have to beat. Sources: Anthony et al., "Thinking Fast and Slow with Deep Learning and
Tree Search" (2017); Zelikman et al., "STaR: Bootstrapping Reasoning With Reasoning" (2022).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.alignment.base_loop import AlignmentLoop, LoopConfig
from shared.alignment.logprobs import masked_mean, token_logprobs
from shared.alignment.loops import Prompts, Score, draw_answers
from shared.checks import Checks
from shared.runtime import RunLog


@dataclass(frozen=True)
class ExpertConfig(LoopConfig):
    """How to learn from one's own right answers."""

    max_new_tokens: int = 32
    end: int | None = None
    """The token that ends an answer; none: every answer has max_new_tokens."""
    group_size: int = 8
    """Answers to each prompt."""
    right_from: float = 1.0
    """An answer is kept from this score on."""
    epochs: int = 2
    """How often the kept answers of a batch are learned from."""

    def _check(self, checks: Checks) -> None:
        super()._check(checks)
        checks.at_least(1, "max_new_tokens", "group_size", "epochs")


class ExpertIteration(AlignmentLoop[ExpertConfig]):
    """Supervised learning on the policy's own right answers, batch after batch."""

    def __init__(
        self,
        policy: nn.Module,
        prompts: Prompts,
        score: Score,
        config: ExpertConfig,
        *,
        log: RunLog | None = None,
        file: Path | str | None = None,
    ):
        super().__init__(config, {"policy": policy}, log, file)
        self.policy = policy
        self.prompts = prompts
        self.score = score

    def _given(self, step: int) -> tuple[Tensor, ...]:
        return (self.prompts(step),)

    def update(self) -> dict[str, float]:
        """Draws answers to the prompts of `self.step`, and learns from the right ones, each different one
        once; returns what is logged. Where none is right nothing is learned, and the loss is 0.
        """
        config = self.config
        prompts = self.prompts(self.step).repeat_interleave(config.group_size, 0)
        ids, mask = draw_answers(self.policy, prompts, config.max_new_tokens, config.end, self.generator)
        scores = self.score(ids, mask)
        kept = distinct_rows(ids, scores >= config.right_from)
        metrics = {"score": scores.mean().item(), "kept": float(len(kept)), "loss": 0.0}
        if len(kept):
            for _ in range(config.epochs):
                logp = token_logprobs(self.policy(ids[kept]), ids[kept])
                metrics |= self._descend(-masked_mean(logp, mask[kept, 1:]))
        return metrics


def distinct_rows(ids: Tensor, chosen: Tensor) -> Tensor:
    """The numbers of the chosen rows, of equal ones the first: ids [batch, time], chosen bool [batch] ->
    int64 [rows].
    """
    first: dict[tuple[int, ...], int] = {}
    for row in chosen.nonzero().flatten().tolist():
        first.setdefault(tuple(ids[row].tolist()), row)
    return torch.tensor(list(first.values()), dtype=torch.int64, device=ids.device)
