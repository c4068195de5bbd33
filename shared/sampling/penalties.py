"""Week 1. What a text has said already, or a request wishes, changes what may come next.

Sources: Keskar et al., "CTRL" (2019), for the repetition penalty; OpenAI's API reference for presence and
frequency penalties and `logit_bias`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LARGEST_BIAS = 100.0
"""As in OpenAI's API: -100 all but forbids a token, 100 all but forces it."""
MOST_BIASES = 1000
"""How many tokens a request may name."""


@dataclass(frozen=True)
class Penalties:
    """Changes of a text's logits before a token is drawn. The defaults change nothing.

    Raises ValueError for values out of range, naming the field.
    """

    repetition: float = 1.0
    """For each token that the prompt or the text has: a positive logit is divided by it, a negative one
    multiplied, so that values above 1 make repeating less likely.
    """
    presence: float = 0.0
    """Subtracted once from the logit of each token that the text has; the prompt does not count."""
    frequency: float = 0.0
    """Subtracted as often as the token is in the text; the prompt does not count."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""

    def __post_init__(self) -> None:
        if not 0 < self.repetition <= 100:
            raise ValueError(
                f"repetition_penalty={self.repetition} is out of range: above 0 and at most 100; 1 changes"
                " nothing"
            )
        for name, value in (("presence_penalty", self.presence), ("frequency_penalty", self.frequency)):
            if not -2 <= value <= 2:
                raise ValueError(f"{name}={value} is out of range: from -2 to 2; 0 changes nothing")
        if len(self.bias) > MOST_BIASES:
            raise ValueError(f"logit_bias={len(self.bias)} tokens are too many: up to {MOST_BIASES}")
        for token, value in self.bias.items():
            if not -LARGEST_BIAS <= value <= LARGEST_BIAS:
                raise ValueError(
                    f"logit_bias={value} of token {token} is out of range: from {-LARGEST_BIAS:g} to"
                    f" {LARGEST_BIAS:g}"
                )

    @property
    def change_nothing(self) -> bool:
        """Whether all are at their defaults."""
        return self.repetition == 1 and not (self.presence or self.frequency or self.bias)

    def apply(self, logits: Tensor, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
        """The logits [vocab_size] of what follows prompt and written text, changed; a new tensor, float32.

        First the repetition penalty, then the other two, then the bias. The ids are those of the vocabulary.
        """
        changed = logits.float().clone()
        if self.repetition != 1:
            seen = torch.tensor(sorted({*prompt, *written}), dtype=torch.int64, device=logits.device)
            found = changed[seen]
            changed[seen] = torch.where(found > 0, found / self.repetition, found * self.repetition)
        if written and (self.presence or self.frequency):
            ids = torch.tensor(written, dtype=torch.int64, device=logits.device)
            counts = ids.bincount(minlength=changed.numel()).to(changed.dtype)
            changed -= self.frequency * counts + self.presence * (counts > 0)
        for token, value in self.bias.items():
            changed[token] += value
        return changed
