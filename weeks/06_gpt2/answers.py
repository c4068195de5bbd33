"""Clean solutions of week 6's exercises, each with a word on why; `week.solution(name)` shows them."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def initial_std(name: str, shape: tuple[int, ...], n_layer: int) -> float:
    """The variances of 2 n_layer independent additions sum up to that of one if each is divided by
    2 n_layer; the deviation takes the root.
    """
    if len(shape) < 2:
        return 0.0
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 0.02 / math.sqrt(2 * n_layer)
    return 0.02


def split_c_attn(weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """Transposed, the outputs are the rows: queries on top, then keys, then values. The heads lie one after
    the other within each third, as ours do, so their number is not needed.
    """
    return *weight.T.chunk(3), *bias.chunk(3)


INSIDE = {
    "ln_1": "attn_norm",
    "attn.c_proj": "attn.o_proj",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
OUTSIDE = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "norm", "lm_head": "lm_head"}


def load_hf_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """All is translated first, and load_state_dict, which is strict, finds what is missing, left over or of
    another shape. It copies, and leaves a tied head tied.
    """
    ours = {}
    for key, tensor in state.items():
        name = key.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # masks
        module, kind = name.rsplit(".", 1)
        if not module.startswith("h."):
            ours[f"{OUTSIDE[module]}.{kind}"] = tensor
            continue
        _, number, part = module.split(".", 2)
        if kind == "weight" and part.startswith(("attn.", "mlp.")):
            tensor = tensor.T  # a Conv1D keeps [in, out]
        if part == "attn.c_attn":
            for letter, third in zip("qkv", tensor.chunk(3)):
                ours[f"blocks.{number}.attn.{letter}_proj.{kind}"] = third
        else:
            ours[f"blocks.{number}.{INSIDE[part]}.{kind}"] = tensor
    if model.config.tie_weights:
        ours["lm_head.weight"] = ours["token_embedding.weight"]
    model.load_state_dict(ours)


def score_choices(
    logits: list[Tensor], ids: list[Tensor], n_context: int, choices: list[str]
) -> tuple[list[float], int]:
    """The logits of a place speak about the token after it: so from n_context - 1 on, without the last."""
    scores = []
    for x, row, text in zip(logits, ids, choices):
        logprobs = x[n_context - 1 : -1].log_softmax(dim=-1)
        picked = logprobs.gather(1, row[n_context:, None])
        scores.append(picked.sum().item() / len(text))
    return scores, scores.index(max(scores))


def pack_documents(documents: list[list[int]], end_of_text: int, block_size: int) -> tuple[Tensor, Tensor]:
    """A stream of n tokens has n - 1 targets, so (n - 1) // block_size rows. The last target of a row is the
    first input of the next one.
    """
    stream = []
    for document in documents:
        stream += [end_of_text, *document]
    rows = max(0, len(stream) - 1) // block_size
    tokens = torch.tensor(stream[: rows * block_size + 1], dtype=torch.int64)
    inputs = tokens[: rows * block_size].view(rows, block_size)
    targets = tokens[1 : rows * block_size + 1].view(rows, block_size)
    return inputs, targets


class ShardReader:
    """One number says how far all processes have come; a rank's place follows from it. A slice of a memmap
    reads only what is in it, and is empty where a shard has nothing of what is wanted.
    """

    def __init__(
        self, paths: list[str], batch_size: int, block_size: int, rank: int = 0, world_size: int = 1
    ):
        self.shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in paths]
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))
        self.batch_size = batch_size
        self.block_size = block_size
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        for begin, shard in zip(self.starts, self.shards):
            parts.append(shard[max(0, start - begin) : max(0, stop - begin)])
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        own = self.batch_size * self.block_size
        together = own * self.world_size
        if self.position + together + 1 > self.starts[-1]:
            self.position = 0
        start = self.position + self.rank * own
        tokens = self.read(start, start + own + 1)
        self.position += together
        inputs = tokens[:-1].view(self.batch_size, self.block_size)
        targets = tokens[1:].view(self.batch_size, self.block_size)
        return inputs, targets

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def accumulated_gradient(weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """backward adds to .grad, and frees the graph of its micro-batch. Each mean counts by its share of the
    examples.
    """
    weight = weight.clone().requires_grad_()
    total = sum(len(y) for _, y in batches)
    for x, y in batches:
        loss = F.cross_entropy(x @ weight.T, y)
        (loss * (len(y) / total)).backward()
    return weight.grad


def decay_groups(shapes: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """Names differ from library to library; the number of dimensions does not."""
    decayed = [name for name, shape in shapes.items() if len(shape) >= 2]
    others = [name for name, shape in shapes.items() if len(shape) < 2]
    return decayed, others


def ddp_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[Tensor, Tensor]],
    group: Any,
) -> float:
    """Gradients of a mean over all processes are the mean of their gradients. They add up in .grad first, so
    that each travels once a step.
    """
    optimizer.zero_grad()
    total = torch.zeros(())
    for x, y in micro_batches:
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(micro_batches)
        loss.backward()
        total += loss.detach()
    for parameter in model.parameters():
        if parameter.grad is not None:
            group.all_reduce(parameter.grad)
            parameter.grad /= group.world_size
    optimizer.step()
    group.all_reduce(total)
    return total.item() / group.world_size


def mfu(
    n_layer: int, n_embd: int, vocab_size: int, block_size: int, tokens_per_second: float, peak_flops: float
) -> float:
    """Three times the forward: 2 operations for each weight, and the scores' own."""
    weights = 12 * n_layer * n_embd**2 + vocab_size * n_embd
    forward = 2 * weights + 4 * n_layer * n_embd * block_size
    return 3 * forward * tokens_per_second / peak_flops
