"""How long a training step takes, in our ways and beside a plain loop: one machine, one run, in turns.

    python benchmarks/training.py                          # nanoGPT's CPU sizes: batch 12, context 64
    python benchmarks/training.py --model mini             # week 4's headline, with Muon
    python benchmarks/training.py --model mini --no-starts # without the seconds to the first step

Our ways: with PyTorch's operations, with what can be fused computed in C (`shared/training/fused.c`), and
with torch.compile. The plain loop is what one writes first, of the model "nano": attention and GPT-2's GELU
written out as in the papers, one Linear for queries, keys and values, windows cut one by one, AdamW as it
comes. It is timed a second time with PyTorch's own GELU. It is checked that, with the same weights, the
logits are equal.

What is compiled costs time before the first step. In a process of its own each way is timed to the end of
that step, with an empty cache and with what the run before left there (TORCHINDUCTOR_CACHE_DIR for
torch.compile).
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import cos, pi, sqrt
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.commandline import errors_for_people, parse_args
from shared.data.corpus import Corpus
from shared.devices import device_name
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import clock, table
from shared.tokenizers import CharTokenizer
from shared.training import TrainConfig, Trainer
from shared.training.distributed import Processes
from shared.training.profiling import in_own_process, matmul_peak

RECIPES = {
    "nano": TrainConfig(batch_size=12, block_size=64, lr=1e-3, warmup_steps=10),
    "mini": TrainConfig(
        batch_size=6,
        block_size=128,
        optimizer="muon",
        lr=0.006,
        muon_momentum=0.9,
        warmup_steps=30,
        weight_decay=0.0,
        beta2=0.95,
        grad_clip=0.0,
    ),
}
"""By model: as week 4 trains it."""
WAYS = {
    "fused": (True, False),
    "not fused": (False, False),
    "compiled": (False, True),
    "compiled, Muon in C": (True, True),
}
"""Whether C and whether torch.compile computes what it can."""


@dataclass(frozen=True)
class Settings:
    """Times the ways to train, and prints the ratios."""

    model: Literal["nano", "mini"] = "nano"
    steps: int = 40
    """Of one turn."""
    turns: int = 7
    compiled: bool = True
    """Whether torch.compile is among the ways."""
    starts: bool = True
    """Whether the seconds to the first step are measured too."""


class OurSteps:
    """Steps of the Trainer on random tokens, some at a time."""

    def __init__(self, config: GPTConfig, train: TrainConfig, way: str):
        fused, compiled = WAYS[way]
        train = replace(train, fused=fused)
        tokens = np.random.default_rng(train.seed).integers(config.vocab_size, size=10**6).astype(np.uint16)
        tokenizer = CharTokenizer.train("".join(chr(0x10000 + i) for i in range(config.vocab_size)))
        torch.manual_seed(train.seed)
        self.trainer = Trainer(
            GPT(config),
            Corpus("random tokens", tokenizer, tokens, tokens),
            train,
            processes=Processes(compile_model=compiled),
        )
        self.trainer.model.train()
        self.batches = self.trainer.task.batches(train, 0, 0, 1)

    def take(self, count: int) -> list[float]:
        """The seconds of each of the next `count` steps."""
        seconds = []
        with self.trainer.fusion.training(self.trainer.model):
            for _ in range(count):
                before = self.trainer.seconds
                self.trainer.train_step(self.batches)
                seconds.append(self.trainer.seconds - before)
        return seconds


def seconds_to_first_step(model: str, way: str, caches: str, threads: int) -> float:
    """From the model to the end of its first step, in a process that has loaded PyTorch and the course."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["LLM_WEEKS_DATA"] = caches
    torch.set_num_threads(threads)
    started = clock()
    OurSteps(GPTConfig.preset(model, block_size=RECIPES[model].block_size), RECIPES[model], way).take(1)
    return clock() - started


def starts(model: str, ways: list[str]) -> list[dict]:
    """A row for each way: the seconds to its first step without and with what the run before left."""
    rows = []
    for way in ways:
        with tempfile.TemporaryDirectory() as caches:
            arguments = (model, way, caches, torch.get_num_threads())
            cold, warm = [in_own_process(seconds_to_first_step, *arguments) for _ in range(2)]
        rows.append({"to the end of the first step": way, "s, empty cache": cold, "s, kept cache": warm})
    return rows


def gelu(x: Tensor) -> Tensor:
    """GPT-2's approximation of the GELU, written out."""
    return 0.5 * x * (1 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


class PlainBlock(nn.Module):
    """A block of GPT-2 without biases: attention and an MLP, each behind a LayerNorm, added to the input."""

    def __init__(self, config: GPTConfig, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.activation = activation
        self.down = nn.Linear(4 * width, width, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(config.block_size, config.block_size)))

    def attention(self, x: Tensor) -> Tensor:
        """Causal attention with several heads: [batch, time, channels] -> the same."""
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
        config = model.config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config, activation) for _ in range(config.n_layer))
        self.ln = nn.LayerNorm(config.n_embd, bias=False)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        self.copy_weights(model)

    @torch.no_grad()
    def copy_weights(self, model: GPT) -> None:
        """Takes the weights of our model. Its norms' are 1, as here."""
        self.tokens.weight.copy_(model.token_embedding.weight)
        self.positions.weight.copy_(model.position_embedding.weight)
        for mine, other in zip(self.blocks, model.blocks):
            attn = other.attn
            qkv = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
            mine.qkv.weight.copy_(qkv)
            mine.proj.weight.copy_(attn.o_proj.weight)
            mine.up.weight.copy_(other.mlp.up_proj.weight)
            mine.down.weight.copy_(other.mlp.down_proj.weight)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [batch, time, vocab_size] and, with targets, the loss."""
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warmup, then a cosine down to a tenth."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + cos(pi * progress)))


def windows(data: np.ndarray, starts: Tensor, block_size: int) -> Tensor:
    """[batch, block_size]: the tokens from each start on."""
    cuts = [data[start : start + block_size].astype(np.int64) for start in starts]
    return torch.stack([torch.from_numpy(cut) for cut in cuts])


def plain_loop(model: PlainGPT, data: np.ndarray, config: TrainConfig) -> list[float]:
    """Trains as one writes it first. Returns the seconds of each step."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
    )
    model.train()
    times = []
    for step in range(config.steps):
        started = clock()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        starts = torch.randint(len(data) - config.block_size, (config.batch_size,))
        x = windows(data, starts, config.block_size)
        y = windows(data, starts + 1, config.block_size)
        _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(clock() - started)
    return times


def plain_models(config: GPTConfig, train: TrainConfig) -> dict[str, PlainGPT]:
    """The plain loop's, once it is sure that they compute what ours does."""
    torch.manual_seed(train.seed)
    ours = GPT(config)
    plain = {
        "the plain loop": PlainGPT(ours, gelu),
        "with PyTorch's GELU": PlainGPT(ours, nn.GELU(approximate="tanh")),
    }
    idx = torch.arange(train.block_size)[None] % config.vocab_size
    for model in plain.values():
        torch.testing.assert_close(model(idx)[0], ours(idx))
    return plain


def main(settings: Settings) -> None:
    """Prints the times of a step, and their ratios."""
    train = replace(RECIPES[settings.model], steps=10**6)
    config = GPTConfig.preset(settings.model, block_size=train.block_size)
    names = [way for way, (fused, compiled) in WAYS.items() if settings.compiled or not compiled]
    if train.optimizer != "muon":
        names = [way for way in names if "Muon" not in way]
    ways = {name: OurSteps(config, train, name) for name in names}
    for way in ways.values():
        way.take(5)
    plain = plain_models(config, train) if settings.model == "nano" else {}
    data = np.random.default_rng(train.seed).integers(config.vocab_size, size=10**6).astype(np.uint16)
    times: dict[str, list[float]] = {name: [] for name in (*ways, *plain)}
    for _ in range(settings.turns):
        for name, model in plain.items():
            of_steps = plain_loop(model, data, replace(train, steps=settings.steps))
            times[name].append(statistics.median(of_steps[1:]))
        for name, way in ways.items():
            times[name].append(statistics.median(way.take(settings.steps)[1:]))
    flops = GPT(config).flops_per_token(train.block_size) * train.batch_size * train.block_size
    print(
        f"{device_name(torch.device('cpu'))}; {settings.model}, {train.batch_size} × {train.block_size}"
        f" tokens a step, {settings.turns} turns of {settings.steps} steps, {torch.get_num_threads()} threads"
    )
    print("\n" + table(comparison(times, flops / matmul_peak())))
    if settings.starts:
        print("\n" + table(starts(settings.model, names)))


def comparison(times: dict[str, list[float]], seconds_at_peak: float) -> list[dict]:
    """A row for each way to train: its times, its share of the peak, and the fused step's time over its, turn
    by turn. The share counts the model's products alone, not Muon's.
    """
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratios = [ours / this for ours, this in zip(times["fused"], seconds)]
        rows.append(
            {
                "step": name,
                "ms, median": 1000 * median,
                "ms, best": 1000 * min(seconds),
                "MFU": seconds_at_peak / median,
                "fused / this": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return rows


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
