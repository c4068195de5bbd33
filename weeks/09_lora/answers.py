"""Clean solutions of week 9's exercises, each with a word on why; `week.solution(name)` shows them."""

import math

import torch
from torch import Tensor, nn


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


def answer_labels(
    parts: list[tuple[list[int], bool]], end: list[int], block_size: int
) -> tuple[Tensor, Tensor]:
    """What is learned is decided token by token, before the shift; the shift then moves both alike, and
    cutting last keeps each label with its token.
    """
    ids: list[int] = []
    wanted: list[int] = []
    for part, is_answer in parts:
        said = part + end if is_answer else part
        ids += said
        wanted += said if is_answer else [-100] * len(said)
    return torch.tensor(ids[:-1])[:block_size], torch.tensor(wanted[1:])[:block_size]


def pack_examples(
    examples: list[tuple[Tensor, Tensor]], block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First which example goes where, by lengths alone; then each gets its square of the mask, a triangle
    within which it is causal, and outside of which nobody sees it.
    """
    free: list[int] = []
    places = []
    for ids, labels in examples:
        n = len(ids)
        if n > block_size:
            continue
        row = next((r for r, room in enumerate(free) if room >= n), len(free))
        if row == len(free):
            free.append(block_size)
        start = block_size - free[row]
        places.append((row, slice(start, start + n), ids, labels))
        free[row] -= n
    all_ids = torch.zeros(len(free), block_size, dtype=torch.int64)
    all_labels = torch.full_like(all_ids, -100)
    positions = torch.zeros_like(all_ids)
    mask = torch.eye(block_size, dtype=torch.bool).repeat(len(free), 1, 1)
    for row, part, ids, labels in places:
        all_ids[row, part] = ids
        all_labels[row, part] = labels
        positions[row, part] = torch.arange(len(ids))
        mask[row, part, part] = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return all_ids, all_labels, positions, mask


class LoRALinear(nn.Module):
    """The adapter stands beside the base and is added to its output; merged, it is in the weight, and forward
    is the base's. The weight as it was is kept for unmerge, since subtracting would round.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / r
        self.original: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.original is not None:
            return y
        dropped = self.dropout(x.to(self.lora_A.dtype))
        return y + (dropped @ self.lora_A.T @ self.lora_B.T * self.scale).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        if self.original is None:
            self.original = self.base.weight.clone()
            self.base.weight += self.scale * self.lora_B @ self.lora_A

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.original is not None:
            self.base.weight.copy_(self.original)
            self.original = None
