"""Week 7. What a training step holds in memory, computed and measured, and the largest batch that fits.

Source: Korthikanti et al., "Reducing Activation Recomputation" (2022), for the count of activations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shared.models.gpt import GPT, GPTConfig
from shared.training.config import TrainConfig
from shared.training.precision import precision
from shared.training.profiling import StepCost, in_own_process
from shared.training.tricks import USUAL, Tricks, measure

# ---- memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the tensors of one process that trains, without what the allocator and the libraries take for
    themselves.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward keeps for the backward, as `saved_bytes` counts it."""
    peak: int
    """The most that is alive at once between two operations of a step, from the second step on."""


def estimate_memory(
    config: GPTConfig, train: TrainConfig, dtype: torch.dtype = torch.float32, recompute: bool = False
) -> MemoryEstimate:
    """What training this model takes, computed from the shapes alone. dtype, recompute: as the step's
    precision and `Processes` have them.

    Raises ValueError for dropout and for a window, whose attention keeps other tensors than these.
    """
    if config.dropout or config.window:
        raise ValueError(
            f"dropout={config.dropout}, window={config.window}: the estimate knows neither; set dropout to 0"
            " and window to none"
        )
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inner = (
        [sorted(m.weight.shape) for n, m in linears.items() if n != "lm_head"]
        if train.optimizer == "muon"
        else []
    )
    weights = 4 * model.num_parameters()
    state = 2 * weights - 4 * sum(a * b for a, b in inner)

    c, kv, hidden, heads, v = (
        config.n_embd,
        config.kv_heads * config.head_dim,
        config.hidden,
        config.n_head,
        config.vocab_size,
    )
    amp = dtype != torch.float32
    e, gated, rms = 2 if amp else 4, config.mlp == "swiglu", config.norm == "rmsnorm"
    tokens = train.batch_size * train.block_size
    norm = (
        8 * c + 4 if rms else 4 * c + 8
    )  # the input and, per token, its statistics; RMSNorm the normed input too
    # Autocast narrows a norm's output once for each linear layer that reads it, and each keeps its copy.
    inputs = 2 * c * (4 + gated) if amp else 8 * c
    attention = (
        e * (2 * c + 2 * kv) + 4 * heads
    )  # queries, keys, values, result; per head the softmax's log-sum
    if config.qk_norm:
        attention += (
            8 * (c + kv) + 4 * (heads + config.kv_heads) + e * c
        )  # and the result once more, in another order
    mlp = e * hidden * (4 if gated else 2)
    block = tokens * (2 * norm + inputs + attention + mlp)
    copies = amp * 2 * sum(m.weight.numel() for m in linears.values())  # of the weights, narrowed
    logits = tokens * 4 * v  # the log of the softmax, in fp32
    ends = tokens * (norm + e * c + 16) + logits
    own = tokens * 4 * c  # a block's input
    activations = ends + (
        config.n_layer * own + amp * 2 * c * v if recompute else config.n_layer * block + copies
    )

    # Where the peak can be: at the loss; in the backward of the last block; in that of the first, or of the
    # embedding; in Muon's step.
    embedding = 4 * c * v
    in_block = tokens * (4 * c + e * hidden * (2 if gated or config.mlp == "relu2" else 1)) + (
        block - own if recompute else 0
    )
    forward = activations + max(2 * logits, recompute * copies + tokens * (e * v + 4 * v * amp))
    last = activations - logits + embedding + in_block
    first = weights + max(in_block + (own if recompute else block), 2 * embedding * config.tie_weights)
    held = weights if train.grad_accum_steps > 1 else 0  # the gradients of the batches before
    # Muon stacks the matrices of one shape, and works on several such stacks at once.
    muon = max((inner.count([a, b]) * 4 * (4 * a * b + 2 * a * a) for a, b in inner), default=0)
    return MemoryEstimate(
        weights,
        weights,
        state,
        activations,
        weights + state + max(held + forward, held + last, first, weights + muon),
    )


# ---- the batch size


def largest_batch(fits: Callable[[int], bool], limit: int = 1024) -> int:
    """The largest batch size up to `limit` for which `fits` is true: doubled until it isn't, then bisected.
    ValueError if 1 doesn't fit.
    """
    if not fits(1):
        raise ValueError(
            "not even a batch of one sequence fits: take a shorter block_size, a smaller model, or recompute"
            " activations"
        )
    good, bad = 1, limit + 1
    while bad - good > 1:
        middle = min(2 * good, limit) if bad > limit else (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def find_batch(
    config: GPTConfig,
    train: TrainConfig,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    tricks: Tricks = USUAL,
    limit: int = 1024,
) -> tuple[int, int, list[dict[str, Any]]]:
    """The largest batch size up to `limit` that fits, the fastest, and a row for each that was timed over
    `train.steps`: the powers of two up to the largest, and itself. A row: batch_size, tokens/s, memory
    (measured, in bytes), estimate (computed).

    memory: how many bytes a step's tensors may hold. On CUDA, None is all there is, and what fits is found by
    trying, each time in a process of its own. Elsewhere it is needed (a CPU swaps or is killed where CUDA
    raises an error): `estimate_memory` says what fits.
    """
    device = torch.device(device)
    if memory is None and device.type != "cuda":
        raise ValueError(
            f"find_batch on {device} needs memory=, in bytes: only CUDA says in time that there is no more"
        )
    dtype = precision(tricks.precision, device).dtype

    def measured(batch: int, steps: int) -> tuple[list[StepCost], int | None]:
        found = in_own_process(
            measure, tricks, config, replace(train, batch_size=batch, steps=steps), device, [train.seed], None
        )
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def estimated(batch: int) -> int:
        return estimate_memory(config, replace(train, batch_size=batch), dtype, tricks.recompute).peak

    def fits(batch: int) -> bool:
        if device.type != "cuda":
            return estimated(batch) <= memory
        try:
            held = measured(batch, 2)[1]
        except torch.OutOfMemoryError:
            return False
        return memory is None or held <= memory

    largest, rows = largest_batch(fits, limit), []
    for batch in sorted({largest, *(2**i for i in range(largest.bit_length()))}):
        (cost,), held = measured(batch, train.steps)
        rows.append(
            {
                "batch_size": batch,
                "tokens/s": cost.tokens_per_second,
                "memory": held,
                "estimate": estimated(batch),
            }
        )
    return largest, max(rows, key=lambda row: row["tokens/s"])["batch_size"], rows
