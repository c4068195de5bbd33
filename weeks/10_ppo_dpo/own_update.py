"""GRPO's loop with the learner's own `grpo_update`, for `run.py --mine`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shared.alignment.logprobs import token_logprobs
from shared.alignment.loops import GRPO, GRPOConfig, draw_answers

Update = Callable[..., list[float]]
"""A `grpo_update`, as week 10's exercise wants it."""


def problems_with_yours(config: GRPOConfig) -> list[str]:
    """What a form of GRPO asks for that `grpo_update` does not have, in sentences; empty: nothing."""
    wanted = (
        ("baseline", config.baseline, ("group",)),
        ("scale", config.scale, ("group", "none")),
        ("loss_type", config.loss_type, ("grpo", "dr_grpo")),
        ("kl", config.kl, ("loss",) if config.beta else (config.kl,)),
    )
    return [
        f"countdown.grpo.{name}={value}: with --mine it must be {' or '.join(allowed)}"
        for name, value, allowed in wanted
        if value not in allowed
    ]


class OwnGRPO(GRPO):
    """Draws answers and has them scored as `GRPO` does; what is learned from them is the learner's code.

    It is handed an optimizer that clips the gradient and has the step's learning rate, as in the course's
    loop, so that both learn the same.
    """

    def __init__(self, grpo_update: Update, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._grpo_update = grpo_update
        self._norms: list[float] = []
        self.optimizer.register_step_pre_hook(self._clip_gradient)

    def update(self) -> dict[str, float]:
        """Draws answers to the prompts of `self.step`, and learns from them; returns what is logged."""
        config = self.config
        with torch.no_grad():
            prompts = self.prompts(self.step).repeat_interleave(config.group_size, 0)
            ids, mask = draw_answers(self.policy, prompts, config.max_new_tokens, config.end, self.generator)
            old_logp = token_logprobs(self.policy(ids), ids)
            ref_logp = token_logprobs(self.reference(ids), ids)
            scores = self.score(ids, mask)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * (1 - (1 - config.final_lr) * self.step / config.steps)
        losses = self._grpo_update(
            self.policy,
            self.optimizer,
            ids,
            mask,
            scores.view(-1, config.group_size),
            old_logp=old_logp,
            minibatches=list(self._minibatches(len(ids))),
            clip=config.clip,
            divide=config.scale == "group",
            length=None if config.loss_type == "grpo" else ids.size(1) - 1,
            beta=config.beta,
            ref_logp=ref_logp,
        )
        return {"score": scores.mean().item(), "loss": losses[-1], "grad_norm": self._norms[-1]}

    def _clip_gradient(self, *_: Any) -> None:
        """As the course's loop does before each step of the optimizer."""
        longest = self.config.grad_clip or float("inf")
        self._norms.append(nn.utils.clip_grad_norm_(self.parameters, longest).item())
