"""How long a training step takes, beside a plain loop round the same model: one machine, one run, in turns.

    python benchmarks/training.py                  # nanoGPT's CPU sizes: 4 layers, 128 wide, batch 12, context 64

The plain loop is what one writes first: attention and GPT-2's GELU written out as in the papers, one Linear
for queries, keys and values, windows cut one by one, AdamW as it comes. It is timed a second time with
PyTorch's own GELU. All compute the same: it is checked that, with the same weights, the logits are equal.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from math import cos, pi, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.commandline import errors_for_people, parse_args
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import clock, device_name, table
from shared.training import TrainConfig
from shared.training.profiling import matmul_peak, measure_training


@dataclass(frozen=True)
class Settings:
    """Times both, and prints the ratio."""

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=40, batch_size=12, block_size=64, lr=1e-3, warmup_steps=10)
    )
    """Of one turn."""
    turns: int = 7


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


class PlainBlock(nn.Module):
    def __init__(self, c: GPTConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.n_head = c.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(c.n_embd, bias=False), nn.LayerNorm(c.n_embd, bias=False)
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.activation = activation
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(c.block_size, c.block_size)))

    def attention(self, x: Tensor) -> Tensor:
        batch, time, channels = x.shape
        q, k, v = (
            part.view(batch, time, self.n_head, -1).transpose(1, 2)
            for part in self.qkv(x).split(channels, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) / sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:time, :time] == 0, float("-inf"))
        out = F.softmax(scores, dim=-1) @ v
        return self.proj(out.transpose(1, 2).contiguous().view(batch, time, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.down(self.activation(self.up(self.ln_2(x))))


class PlainGPT(nn.Module):
    """The model of the preset "nano", with our model's weights."""

    def __init__(self, model: GPT, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        c = model.config
        self.tokens, self.positions = (
            nn.Embedding(c.vocab_size, c.n_embd),
            nn.Embedding(c.block_size, c.n_embd),
        )
        self.blocks = nn.ModuleList(PlainBlock(c, activation) for _ in range(c.n_layer))
        self.ln = nn.LayerNorm(c.n_embd, bias=False)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        with torch.no_grad():
            self.tokens.weight.copy_(model.token_embedding.weight)
            self.positions.weight.copy_(model.position_embedding.weight)
            for mine, other in zip(self.blocks, model.blocks):
                a = other.attn
                mine.qkv.weight.copy_(torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]))
                mine.proj.weight.copy_(a.o_proj.weight)
                mine.up.weight.copy_(other.mlp.up_proj.weight)
                mine.down.weight.copy_(other.mlp.down_proj.weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        return logits, (
            None
            if targets is None
            else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))
        )


def plain_loop(model: PlainGPT, data: np.ndarray, c: TrainConfig) -> list[float]:
    """Seconds of each step."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=c.lr,
        betas=(c.beta1, c.beta2),
    )
    model.train()
    times = []
    for step in range(c.steps):
        started = clock()
        if step < c.warmup_steps:
            lr = c.lr * (step + 1) / c.warmup_steps
        else:
            lr = c.lr * (
                0.1 + 0.9 * 0.5 * (1 + cos(pi * (step - c.warmup_steps) / (c.steps - c.warmup_steps)))
            )
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(data) - c.block_size, (c.batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + c.block_size].astype(np.int64)) for i in starts])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + c.block_size].astype(np.int64)) for i in starts]
        )
        _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(clock() - started)
    return times


def main(s: Settings) -> None:
    """Prints the times of a step, and their ratios."""
    config = GPTConfig.preset("nano", block_size=s.train.block_size)
    torch.manual_seed(s.train.seed)
    ours = GPT(config)
    plain = {
        "the plain loop": PlainGPT(ours, gelu),
        "with PyTorch's GELU": PlainGPT(ours, nn.GELU(approximate="tanh")),
    }
    data = np.random.default_rng(s.train.seed).integers(config.vocab_size, size=10**6).astype(np.uint16)
    idx = torch.from_numpy(data[: s.train.block_size].astype(np.int64))[None]
    for model in plain.values():
        torch.testing.assert_close(model(idx)[0], ours(idx))
    times: dict[str, list[float]] = {name: [] for name in ("ours", *plain)}
    for _ in range(s.turns):
        for name, model in plain.items():
            times[name].append(statistics.median(plain_loop(model, data, s.train)[1:]))
        times["ours"].append(measure_training(config, s.train).seconds)
    flops = ours.flops_per_token(s.train.block_size) * s.train.batch_size * s.train.block_size
    peak = matmul_peak()
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(times["ours"], seconds)]
        row = {"step": name, "ms, median": 1000 * statistics.median(seconds), "ms, best": 1000 * min(seconds)}
        row |= {"MFU": flops / statistics.median(seconds) / peak, "ours / this": statistics.median(ratios)}
        rows.append(row | {"lowest": min(ratios), "highest": max(ratios)})
    print(
        f"{device_name(torch.device('cpu'))}; {s.train.batch_size} × {s.train.block_size} tokens a step,"
        f" {s.turns} turns of {s.train.steps} steps"
    )
    print("\n" + table(rows))


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
