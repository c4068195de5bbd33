"""Clean solutions of week 9's exercises, each with a word on why; `week.solution(name)` shows them."""

import math

import torch
from torch import Tensor


def first_values(noise_a: Tensor, noise_b: Tensor) -> tuple[Tensor, Tensor]:
    """With B at 0 the sum B A is 0, so the model starts as the base; with A random, B's first gradient is
    not 0. Were both 0, neither would ever move.
    """
    return noise_a / math.sqrt(noise_a.size(1)), torch.zeros_like(noise_b)


def lora_output(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """First down to r numbers, then up again: two thin products, where b @ a would be a matrix as large as
    the weight.
    """
    return x @ weight.T + alpha / len(a) * (x @ a.T @ b.T)


def lora_step(
    x: Tensor, grad: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients are of the old a and b: compute them before either moves. The base has none."""
    grad_a = scale * (grad @ b).T @ x
    grad_b = scale * grad.T @ (x @ a.T)
    return weight, a - lr * grad_a, b - lr * grad_b


def merge_once(weight: Tensor, a: Tensor, b: Tensor, scale: float, merged: bool) -> tuple[Tensor, bool]:
    """The flag makes a second call harmless: without it, every call would add the adapter once more."""
    if merged:
        return weight, True
    return weight + scale * (b @ a), True


def alpha_for_rank(alpha: float, r: int, new_r: int, use_rslora: bool) -> float:
    """The product B A is the same, so its scale has to be: solve new_alpha / new_r = alpha / r, or the same
    with roots.
    """
    if use_rslora:
        return alpha * math.sqrt(new_r / r)
    return alpha * new_r / r


def dora_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """LoRA moves the whole row; dividing by its length leaves the direction, and the magnitude gives it the
    length that was learned.
    """
    moved = weight + scale * (b @ a)
    return magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)


def answer_targets(prompt: Tensor, answer: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Targets are the text moved by one place. The prompt's last token predicts the answer's first, so
    len(prompt) - 1 targets are hidden and not len(prompt).
    """
    text = torch.cat([prompt, answer])
    read = len(text) - 1
    inputs = torch.zeros(length, dtype=torch.long)
    targets = torch.full((length,), -100)
    inputs[:read] = text[:-1]
    targets[:read] = text[1:]
    targets[: len(prompt) - 1] = -100
    return inputs, targets


def join_adapters(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, factors: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Rows under rows and columns beside columns: row i of a meets column i of b only, so no cross terms
    arise, and the sum is exact.
    """
    return torch.cat([factors[0] * a1, factors[1] * a2]), torch.cat([b1, b2], dim=1)
