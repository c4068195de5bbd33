"""Week 2. A neural language model over a fixed window, after Bengio et al., "A Neural Probabilistic Language
Model" (2003).

>>> model = WindowMLP(WindowMLPConfig(vocab_size=65, window=8))
>>> model(torch.zeros(2, 20, dtype=torch.int64)).shape
torch.Size([2, 20, 65])
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.checks import Checks
from shared.registry import LanguageModel, register_model


@dataclass(frozen=True)
class WindowMLPConfig:
    """The shape of a `WindowMLP`."""

    vocab_size: int
    window: int = 8
    """How many tokens the model sees, the present one included."""
    n_embd: int = 32
    n_hidden: int = 256
    init: Literal["scaled", "naive"] = "scaled"
    """naive: every weight from N(0, 1), to see what goes wrong; scaled: see `WindowMLP.init_weights`."""

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "vocab_size", "window", "n_embd", "n_hidden")
        checks.one_of("init", ("scaled", "naive"))
        checks.finish()


@register_model(WindowMLPConfig)
class WindowMLP(LanguageModel):
    """Embeds the last `window` tokens and their places, concatenates them, and computes the next token's
    logits with one tanh layer.

    int64 [batch, time] -> [batch, time, vocab_size]: each position is predicted from its own window, so there
    is no limit to `time`. Before the text begins stands a padding token with an embedding of its own.
    """

    config: WindowMLPConfig

    def __init__(self, config: WindowMLPConfig):
        super().__init__()
        self.config = config
        padding = 1  # the last row of the table: the token before the text
        self.token_embedding = nn.Embedding(config.vocab_size + padding, config.n_embd)
        self.position_embedding = nn.Embedding(config.window, config.n_embd)
        self.hidden = nn.Linear(config.window * config.n_embd, config.n_hidden)
        self.lm_head = nn.Linear(config.n_hidden, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The initialization.

        naive: N(0, 1) throughout. scaled: tanh stays out of saturation and the first loss is ln V:

        | parameter | value |
        | --- | --- |
        | token embedding | N(0, 1) |
        | position embedding | N(0, 0.1²) |
        | hidden weight | N(0, (5/3)² / inputs): Kaiming's gain for tanh |
        | lm_head weight | N(0, 0.01²) |
        | biases | 0 |
        """
        naive = self.config.init == "naive"
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.position_embedding.weight, std=1.0 if naive else 0.1)
        nn.init.normal_(self.hidden.weight, std=1.0 if naive else 5 / 3 / self.hidden.in_features**0.5)
        nn.init.normal_(self.lm_head.weight, std=1.0 if naive else 0.01)
        for bias in (self.hidden.bias, self.lm_head.bias):
            if naive:
                nn.init.normal_(bias)
            else:
                nn.init.zeros_(bias)

    def activations(self, idx: Tensor) -> Tensor:
        """The hidden layer after tanh, to look at: [batch, time, n_hidden]."""
        window = self.config.window
        padded = F.pad(idx, (window - 1, 0), value=self.config.vocab_size)  # [batch, window - 1 + time]
        windows = padded.unfold(1, window, 1)  # [batch, time, window]
        x = self.token_embedding(windows) + self.position_embedding.weight  # [batch, time, window, n_embd]
        return torch.tanh(self.hidden(x.flatten(-2)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))
