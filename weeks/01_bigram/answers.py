"""Clean solutions of week 1's exercises, each with a word on why; `week.solution(name)` shows them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


def count_pairs(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """Each pair becomes one number, a * vocab_size + b, so that a single bincount fills the whole table. The
    ids are uint16, where this product would overflow: int64 first.
    """
    pairs = tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]
    counts = np.bincount(pairs, minlength=vocab_size**2)
    return torch.from_numpy(counts).view(vocab_size, vocab_size)


def row_probabilities(counts: Tensor, smoothing: float) -> Tensor:
    """keepdim makes the sums a column, [vocab_size, 1], so that broadcasting divides each row by its own."""
    smoothed = counts + smoothing
    return smoothed / smoothed.sum(dim=1, keepdim=True)


def draw_token(probabilities: Tensor, u: float) -> int:
    """The running sum turns probabilities into pieces of a line; u falls into a piece as often as it is
    long.
    """
    total = 0.0
    for token, p in enumerate(probabilities.tolist()):
        total += p
        if total > u:
            return token
    return len(probabilities) - 1


def write(probabilities: Tensor, start: int, length: int, generator: Generator) -> list[int]:
    """The text so far decides the next token, and of the text a bigram sees only its last one."""
    tokens = [start]
    for _ in range(length):
        row = probabilities[tokens[-1]]
        tokens.append(torch.multinomial(row, 1, generator=generator).item())
    return tokens


def temperature_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Dividing logits scales their differences, and only differences matter to a softmax."""
    return (logits / temperature).softmax(dim=-1)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax takes the logarithm without ever computing a probability, so nothing overflows and nothing
    is rounded to zero; gather picks the target's.
    """
    log_p = logits.log_softmax(dim=-1)
    return -log_p.gather(-1, targets.unsqueeze(-1)).mean()


def loss_in_bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """The whole text costs loss * tokens nats; a bit is ln 2 nats; and the bytes are the same for every
    tokenizer.
    """
    return loss * tokens / math.log(2) / text_bytes


def inputs_and_targets(tokens: np.ndarray, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    """Cut one token more than the block: without its last it is x, without its first it is y."""
    rows = torch.stack([torch.from_numpy(tokens[s : s + block_size + 1].astype(np.int64)) for s in starts])
    return rows[:, :-1], rows[:, 1:]


class Bigram(nn.Module):
    """An embedding looks rows up, which is all that a bigram does. Small first weights make every token
    nearly as likely as any other: the model begins by knowing nothing, and its loss says so, ln V.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        for _ in range(length):
            p = self(idx)[:, -1].softmax(dim=-1)
            drawn = torch.multinomial(p, 1, generator=generator)
            idx = torch.cat([idx, drawn], dim=1)
        return idx


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """backward adds to what is in .grad, so it is cleared first; .item() lets go of the graph."""
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
