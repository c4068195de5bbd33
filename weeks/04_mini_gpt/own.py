"""Week 4's run with a learner's own code: her GPT, her block and her rotation on the course's parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from shared.course.exercise.building import computed_by
from shared.models.attention import CausalSelfAttention
from shared.models.gpt import GPT, GPTConfig
from shared.models.layers import RMSNorm

Rotate = Callable[[Tensor, int, float], Tensor]
"""Turns [batch, n_head, time, head_dim] from a start position on, with a given theta: week 4's `rotate`."""


class SelfTurningAttention(CausalSelfAttention):
    """The attention of a configuration, which turns its queries and keys itself: a block hands it x alone."""

    def __init__(self, config: GPTConfig, rotate: Rotate | None):
        super().__init__(
            config.n_embd,
            config.n_head,
            config.n_kv_head,
            bias=config.bias,
            window=config.window,
            qk_norm=partial(RMSNorm, eps=config.norm_eps) if config.qk_norm else None,
        )
        self.rotate = rotate
        self.theta = config.rope_theta

    def turned(self, x: Tensor) -> Tensor:
        """Queries or keys [batch, n_head, time, head_dim], turned by their positions from 0 on."""
        return x if self.rotate is None else self.rotate(x, 0, self.theta)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """[batch, time, n_embd] -> the same, for positions from 0 on; whatever else is given is not used."""
        return super().forward(x, rotate=self.turned)


def with_own_code(
    model: GPT, gpt: Callable[..., nn.Module], block: Callable[..., nn.Module], rotate: Rotate
) -> GPT:
    """The model, computed by a learner's `MiniGPT`, made of her `Block` and, where it has RoPE, her `rotate`.

    Raises ValueError for a configuration with dropout, which her classes do not have.
    """
    config = model.config
    if config.dropout:
        raise ValueError(
            f"your GPT has no dropout, and the model wants {config.dropout}: add --model.dropout 0"
        )
    turn = rotate if config.position == "rope" else None

    def attention(n_embd: int, n_head: int) -> nn.Module:
        return SelfTurningAttention(config, turn)

    return computed_by(model, gpt(config, attention, block))
