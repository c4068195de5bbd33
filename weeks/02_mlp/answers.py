"""Clean solutions of week 2's exercises, each with a word on why; `week.solution(name)` shows them."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def context_windows(idx: Tensor, window: int, padding: int) -> Tensor:
    """With window - 1 paddings in front, every position has a full window; unfold takes them all at once,
    without copying.
    """
    padded = F.pad(idx, (window - 1, 0), value=padding)
    return padded.unfold(1, window, 1)


def scaled_weights(noise: Tensor, gain: float) -> Tensor:
    """A sum of n independent terms has n times the variance of one, so each weight's variance is divided by
    the number of inputs; the standard deviation is the root.
    """
    inputs = noise.size(1)
    return noise * gain / math.sqrt(inputs)


class WindowMLP(nn.Module):
    """The embeddings of the window, side by side, are the input of an ordinary network. Each position is
    predicted from its own window, so one call trains on all of them.
    """

    def __init__(self, vocab_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.window = window
        self.padding = vocab_size  # the first free id
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.position_embedding.weight, std=0.1)
        with torch.no_grad():
            noise = torch.randn(n_hidden, window * n_embd)
            self.hidden.weight.copy_(scaled_weights(noise, 5 / 3))
        nn.init.normal_(self.lm_head.weight, std=0.01)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.lm_head.bias)

    def activations(self, idx: Tensor) -> Tensor:
        windows = context_windows(idx, self.window, self.padding)
        x = self.token_embedding(windows) + self.position_embedding.weight
        return torch.tanh(self.hidden(x.flatten(-2)))

    def forward(self, idx: Tensor) -> Tensor:
        return self.lm_head(self.activations(idx))


def logit_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of a position is log-sum-exp of its logits minus the target's logit: their derivatives are the
    softmax and a 1 at the target. The mean divides both by the number of positions.
    """
    hit = F.one_hot(targets, logits.size(-1))
    return (logits.softmax(dim=-1) - hit) / targets.numel()


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, final_fraction: float) -> float:
    """A cosine that falls from 1 to 0 is stretched over the distance between peak and floor."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (final_fraction + (1 - final_fraction) * cosine)


def adamw_step(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The corrected means are needed for this step alone; the next one goes on with the uncorrected. The
    decay stands beside the step and is not divided by anything: that is the W.
    """
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    m = first / (1 - beta1**step)
    v = second / (1 - beta2**step)
    new_weight = weight - lr * m / (v.sqrt() + eps) - lr * weight_decay * weight
    return new_weight, first, second


def clip_gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """One factor for all tensors keeps the direction; it is never above 1, so that short gradients stay."""
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    factor = min(1.0, max_norm / norm)
    return [g * factor for g in gradients]


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    *,
    optimizer: torch.optim.Optimizer,
    peak: float,
    warmup_steps: int,
    final_fraction: float,
    max_norm: float,
    evaluate: Callable[[nn.Module], float],
    eval_every: int,
) -> tuple[list[float], list[tuple[int, float]]]:
    """zip asks the range first, so no batch is taken that is not used. What is left behind is as it should
    be: the model in train mode, and gradients on.
    """
    losses, evaluations = [], []
    model.train()
    for step, (x, y) in zip(range(steps), batches):
        rate = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        clipped = clip_gradients([p.grad for p in model.parameters()], max_norm)
        for p, gradient in zip(model.parameters(), clipped):
            p.grad = gradient
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % eval_every == 0 or done == steps:
            model.eval()
            with torch.no_grad():
                evaluations.append((done, evaluate(model)))
            model.train()
    return losses, evaluations
