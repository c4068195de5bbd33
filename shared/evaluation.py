"""Week 1. How good a language model is, in the field's units: loss in nats per token, perplexity, bits per
byte, accuracy.

Bits per byte is the one that compares models with different tokenizers: it asks how many bits the model needs
for each byte of the original text (Shannon, "Prediction and Entropy of Printed English", 1951).
"""

import math
import re
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.data.corpus import fixed_windows


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats. logits [batch, time, vocab_size], targets int64 [batch, time] ->
    scalar.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def perplexity(loss: float) -> float:
    """exp(loss): the model is as uncertain as if it had to choose among that many equally likely tokens.

    >>> round(perplexity(math.log(65)), 6)
    65.0
    """
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """A loss in nats per token as bits per byte of text. `tokens` were predicted, and stand for `text_bytes`
    bytes.

    >>> bits_per_byte(math.log(2), tokens=100, text_bytes=200)
    0.5
    """
    return loss * tokens / text_bytes / math.log(2)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    accuracy: float
    """Share of tokens that the model's first guess gets right."""
    tokens: int
    """How many were predicted."""

    def as_metrics(self, prefix: str = "val_") -> dict[str, float]:
        return {prefix + k: v for k, v in asdict(self).items() if k != "tokens"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: np.ndarray,
    block_size: int,
    token_bytes: Tensor,
    batch_size: int = 32,
    max_windows: int | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Measures `model` on windows of `tokens` that lie side by side, the same ones every time.

    Each token but the split's first (and what fills no last window) is predicted once, from those before it
    in its window. max_windows: fewer, spread evenly over the split; None takes the whole split. The model
    comes back in the mode (train or eval) it was in.
    """
    x, y = fixed_windows(tokens, block_size, max_windows)
    was_training = model.training
    model.eval()
    loss, right = 0.0, 0
    for xb, yb in zip(x.split(batch_size), y.split(batch_size)):
        xb, yb = xb.to(device), yb.to(device)
        logits = model(xb)
        loss += cross_entropy(logits, yb).item() * yb.numel()
        right += (logits.argmax(-1) == yb).sum().item()
    model.train(was_training)
    count = y.numel()
    mean = loss / count
    return Evaluation(
        loss=mean,
        perplexity=perplexity(mean),
        bits_per_byte=bits_per_byte(mean, count, int(token_bytes[y].sum())),
        accuracy=right / count,
        tokens=count,
    )


def known_words(sample: str, text: str) -> float:
    """Share of the words in `sample` that occur in `text`: a crude measure of how far a model's spelling
    reaches. nan without words.

    >>> known_words("the kqng, the king", "long live the king")
    0.75
    """
    words = re.findall(r"[A-Za-z']+", sample)
    known = set(re.findall(r"[A-Za-z']+", text))
    return sum(w in known for w in words) / len(words) if words else math.nan
