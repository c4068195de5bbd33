"""Week 1. The bigram model: the next character depends on the present one and on nothing else.

One table, found in two ways: by counting pairs, and by gradient descent on the same table as a network.

>>> counts = count_bigrams(np.array([0, 1, 0, 1, 1]), vocab_size=2)
>>> counts.tolist()
[[0, 2], [1, 1]]
>>> BigramModel.from_counts(counts, smoothing=0)(torch.tensor([[1]])).softmax(-1).tolist()
[[[0.5, 0.5]]]
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shared.checks import Checks
from shared.registry import LanguageModel, register_model


def count_bigrams(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """How often each token follows each other one: int64 [vocab_size, vocab_size].

    The first token of a pair is the row, the second the column.
    """
    pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    return torch.from_numpy(np.bincount(pairs, minlength=vocab_size**2)).view(vocab_size, vocab_size)


def bigram_probabilities(counts: Tensor, smoothing: float = 1.0) -> Tensor:
    """Each row of `counts` + smoothing, divided by its sum: fp32 [vocab_size, vocab_size].

    With smoothing 0 this is the table of maximum likelihood for the counted text. Smoothing keeps pairs
    possible that were never seen. A row without any counts becomes uniform.
    """
    smoothed = counts.double() + smoothing
    empty = smoothed.sum(dim=1, keepdim=True) == 0
    smoothed = smoothed.masked_fill(empty, 1.0)
    return (smoothed / smoothed.sum(dim=1, keepdim=True)).float()


@dataclass(frozen=True)
class BigramConfig:
    """The shape of a `BigramModel`."""

    vocab_size: int

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "vocab_size")
        checks.finish()


@register_model(BigramConfig)
class BigramModel(LanguageModel):
    """A row of logits for each token: int64 [batch, time] -> [batch, time, vocab_size].

    The table starts at N(0, 0.02²): nearly uniform, so that the first loss is ln(vocab_size).
    """

    config: BigramConfig

    def __init__(self, config: BigramConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.normal_(self.table.weight, std=0.02)

    @classmethod
    def from_counts(cls, counts: Tensor, smoothing: float = 1.0) -> "BigramModel":
        """The table that counting gives. With smoothing 0, a pair never seen has logit -inf."""
        return cls.from_probabilities(bigram_probabilities(counts, smoothing))

    @classmethod
    def from_probabilities(cls, probabilities: Tensor) -> "BigramModel":
        """The model whose softmax gives these rows: [vocab_size, vocab_size]."""
        model = cls(BigramConfig(len(probabilities)))
        with torch.no_grad():
            model.table.weight.copy_(probabilities.log())
        return model

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)
