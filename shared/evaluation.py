"""Week 1. How good a language model is: loss in nats per token, perplexity, bits per byte, accuracy.

Bits per byte is the one that compares models with different tokenizers: it asks how many bits the model needs
for each byte of the original text (Shannon, "Prediction and Entropy of Printed English", 1951).
"""

import math
import re
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.data.corpus import Tokens, fixed_windows
from shared.devices import device_of


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, a scalar.

    logits: [batch, time, vocab_size]. targets: int64 [batch, time].
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def perplexity(loss: float) -> float:
    """exp(loss): the model is as uncertain as if it had to choose among that many equally likely tokens.

    >>> round(perplexity(math.log(65)), 6)
    65.0
    """
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """A loss in nats per token as bits per byte of text.

    So many tokens were predicted, and stand for so many bytes.

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
        """All but `tokens`, by name, with the prefix before each name."""
        return {prefix + name: value for name, value in asdict(self).items() if name != "tokens"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tokens,
    block_size: int,
    token_bytes: Tensor,
    *,
    batch_size: int = 32,
    max_windows: int | None = None,
) -> Evaluation:
    """Measures `model` on windows of `tokens` that lie side by side, the same ones every time.

    Each token but the split's first (and what fills no last window) is predicted once, from those before it
    in its window. token_bytes: how many bytes of text each token stands for, int64 [vocab_size]. max_windows:
    fewer, spread evenly over the split; None takes the whole split. The model comes back in the mode (train
    or eval) it was in.
    """
    device = device_of(model)
    ids, targets = fixed_windows(tokens, block_size, max_windows)
    was_training = model.training
    model.eval()
    loss = 0.0
    correct = 0
    for batch, wanted in zip(ids.split(batch_size), targets.split(batch_size)):
        wanted = wanted.to(device)
        logits = model(batch.to(device))
        loss += cross_entropy(logits, wanted).item() * wanted.numel()
        correct += int((logits.argmax(-1) == wanted).sum())
    model.train(was_training)
    count = targets.numel()
    mean = loss / count
    return Evaluation(
        loss=mean,
        perplexity=perplexity(mean),
        bits_per_byte=bits_per_byte(mean, count, int(token_bytes[targets].sum())),
        accuracy=correct / count,
        tokens=count,
    )


def known_words(sample: str, text: str) -> float:
    """Share of the words in `sample` that occur in `text`; nan without words.

    A crude measure of how far a model's spelling reaches.

    >>> known_words("the kqng, the king", "long live the king")
    0.75
    """
    words = re.findall(r"[A-Za-z']+", sample)
    if not words:
        return math.nan
    vocabulary = set(re.findall(r"[A-Za-z']+", text))
    return sum(word in vocabulary for word in words) / len(words)
