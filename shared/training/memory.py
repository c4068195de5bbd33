"""Week 7. What a training step holds in memory, computed and measured, and the largest batch that fits.

Source: Korthikanti et al., "Reducing Activation Recomputation" (2022), for the count of activations.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.models.gpt import GPT, GPTConfig
from shared.registry import without_memory
from shared.training.config import TrainConfig
from shared.training.precision import precision
from shared.training.profiling import StepCost, in_own_process
from shared.training.tricks import USUAL, Tricks, measure_tricks

# ---- what is alive, operation by operation


class LiveTensors(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that operations make, for as long as they are alive: `peak`.

    What was there before does not count, nor what an operation needs within itself. It is the same on every
    machine, for the forward and for the backward.

    >>> with LiveTensors() as live:
    ...     total = (torch.ones(1000) + 1).sum()  # ones and their sum with 1, both of 4,000 bytes
    >>> live.peak
    8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in given:
                self._made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        self._made = {key: made for key, made in self._made.items() if made[0]() is not None}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return result


def _storages(values: Any) -> list[UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


# ---- the estimate


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the tensors of one process that trains.

    What the allocator and the libraries take for themselves comes on top.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward keeps for the backward, as `saved_bytes` counts it."""
    peak: int
    """The most that is alive at once between two operations of a step, from the second step on."""


USUAL_CONFIG = GPTConfig()
UNKNOWN = (
    *("dropout", "window", "layers", "head_size", "norm_place", "qk_norm_over", "rope_share", "qkv_bias"),
    *("embedding_scale", "attention_softcap", "logit_softcap"),
)
"""Settings of which the estimate knows the usual value only."""


def estimate_memory(
    config: GPTConfig, train: TrainConfig, dtype: torch.dtype = torch.float32, recompute: bool = False
) -> MemoryEstimate:
    """What training this model takes by PyTorch's operations, computed from the shapes alone. With
    `TrainConfig.fused` a step on a CPU takes no more.

    dtype, recompute: as the step's precision and `Processes` have them. Raises ValueError for dropout, a
    window and what sets rarer families apart: they keep other tensors than these.
    """
    unknown = [name for name in UNKNOWN if getattr(config, name) != getattr(USUAL_CONFIG, name)]
    if config.mlp == "geglu":
        unknown.append("mlp")
    if config.norm == "rmsnorm_plus_one":
        unknown.append("norm")
    if unknown:
        given = ", ".join(f"{name}={getattr(config, name)}" for name in unknown)
        raise ValueError(f"{given}: the estimate knows no such models, only those with the usual values")
    step = _Step(config, train, dtype != torch.float32, recompute)
    return MemoryEstimate(
        parameters=step.weights,
        gradients=step.weights,
        optimizer=step.optimizer,
        activations=step.activations,
        peak=step.peak,
    )


@dataclass(frozen=True)
class _Step:
    """A training step whose tensors are counted, in bytes.

    A number takes 4 bytes; under autocast, those that matrix products and attention read and write take 2.
    """

    config: GPTConfig
    train: TrainConfig
    amp: bool
    """Whether matrix products and the like are computed in 16 bits, under autocast."""
    recompute: bool

    @cached_property
    def model(self) -> GPT:
        with without_memory():
            return GPT(self.config)

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        return {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear)}

    @cached_property
    def muon_shapes(self) -> list[tuple[int, int]]:
        """The shapes of Muon's matrices, each with its smaller side first."""
        if self.train.optimizer != "muon":
            return []
        inner = [linear for name, linear in self.linears.items() if name != "lm_head"]
        return [(min(m.weight.shape), max(m.weight.shape)) for m in inner]

    @property
    def tokens(self) -> int:
        return self.train.batch_size * self.train.block_size

    @property
    def width(self) -> int:
        """Bytes of a number in a matrix product's result."""
        return 2 if self.amp else 4

    # Weights and their optimizers.

    @cached_property
    def weights(self) -> int:
        return 4 * self.model.num_parameters()

    @property
    def optimizer(self) -> int:
        """AdamW has two moments for each weight, Muon one."""
        return 2 * self.weights - sum(4 * rows * columns for rows, columns in self.muon_shapes)

    @property
    def embedding(self) -> int:
        """The gradient of the embedding, or of the output layer."""
        return 4 * self.config.n_embd * self.config.vocab_size

    @property
    def narrowed_weights(self) -> int:
        """Autocast's copies of the linear layers' weights."""
        if not self.amp:
            return 0
        return sum(2 * linear.weight.numel() for linear in self.linears.values())

    # What a token leaves for the backward.

    @property
    def norm(self) -> int:
        """A norm keeps its input and, for each token, its statistics; RMSNorm the normed input too."""
        if self.config.norm == "rmsnorm":
            return 8 * self.config.n_embd + 4
        return 4 * self.config.n_embd + 8

    @property
    def linear_inputs(self) -> int:
        """The two norms' outputs, as the linear layers that read them keep them."""
        if not self.amp:
            return 2 * 4 * self.config.n_embd
        # Autocast narrows a norm's output once for each linear layer that reads it, and each keeps its copy.
        readers = 5 if self.config.mlp == "swiglu" else 4
        return 2 * self.config.n_embd * readers

    @property
    def attention(self) -> int:
        """Queries, keys, values and the result; for each head the softmax's log-sum."""
        config = self.config
        keys = config.kv_heads * config.head_dim
        kept = self.width * (2 * config.n_embd + 2 * keys) + 4 * config.n_head
        if config.qk_norm:
            # Both norms' inputs and statistics; and the result once more, in another order.
            kept += 8 * (config.n_embd + keys) + 4 * (config.n_head + config.kv_heads)
            kept += self.width * config.n_embd
        return kept

    @property
    def mlp(self) -> int:
        hidden_tensors = 4 if self.config.mlp == "swiglu" else 2
        return self.width * self.config.hidden * hidden_tensors

    # What the whole batch leaves for the backward.

    @property
    def block(self) -> int:
        """A block's activations."""
        return self.tokens * (2 * self.norm + self.linear_inputs + self.attention + self.mlp)

    @property
    def block_input(self) -> int:
        return self.tokens * 4 * self.config.n_embd

    @property
    def logits(self) -> int:
        """The log of the softmax, in fp32."""
        return self.tokens * 4 * self.config.vocab_size

    @cached_property
    def activations(self) -> int:
        """Of all blocks, of the last norm, the output layer and the loss."""
        ends = self.tokens * (self.norm + self.width * self.config.n_embd + 16) + self.logits
        if not self.recompute:
            return ends + self.config.n_layer * self.block + self.narrowed_weights
        narrowed_output_layer = 2 * self.config.n_embd * self.config.vocab_size if self.amp else 0
        return ends + self.config.n_layer * self.block_input + narrowed_output_layer

    # Where the peak can be, beyond weights and moments.

    @property
    def peak(self) -> int:
        # The gradients of the batches before are there from the second one of a step on.
        accumulated = self.weights if self.train.grad_accum_steps > 1 else 0
        candidates = [
            accumulated + self.at_the_loss,
            accumulated + self.in_the_last_block,
            self.in_the_first_layers,
            self.in_muons_step,
        ]
        return self.weights + self.optimizer + max(candidates)

    @property
    def at_the_loss(self) -> int:
        """At the end of the forward, or at the beginning of the backward."""
        forward = self.tokens * self.width * self.config.vocab_size
        if self.amp:
            forward += self.logits  # the logits in 16 bits, and in fp32
        if self.recompute:
            forward += self.narrowed_weights
        return self.activations + max(2 * self.logits, forward)

    @property
    def in_the_last_block(self) -> int:
        """In its backward, when the logits are gone."""
        return self.activations - self.logits + self.embedding + self.block_backward

    @property
    def in_the_first_layers(self) -> int:
        """In the backward of the first block, or of the embedding, when all other gradients are there."""
        in_block = self.block_backward + (self.block_input if self.recompute else self.block)
        tied_gradients = 2 * self.embedding if self.config.tie_weights else 0
        return self.weights + max(in_block, tied_gradients)

    @property
    def block_backward(self) -> int:
        """What the backward of a block holds besides what the forward kept."""
        config = self.config
        hidden_tensors = 2 if config.mlp in ("swiglu", "relu2") else 1
        held = self.tokens * (4 * config.n_embd + self.width * config.hidden * hidden_tensors)
        if self.recompute:
            held += self.block - self.block_input
        return held

    @property
    def in_muons_step(self) -> int:
        """Muon stacks the matrices of one shape, and works on several such stacks at once."""
        stacks = [
            self.muon_shapes.count((rows, columns)) * 4 * (4 * rows * columns + 2 * rows * rows)
            for rows, columns in self.muon_shapes
        ]
        return self.weights + max(stacks, default=0)


# ---- the batch size


def largest_batch(fits: Callable[[int], bool], limit: int = 1024) -> int:
    """The largest batch size up to `limit` for which `fits` is true: doubled until it isn't, then bisected.

    Raises ValueError if 1 doesn't fit.
    """
    if not fits(1):
        raise ValueError(
            "not even a batch of one sequence fits: take a shorter block_size, a smaller model, or recompute"
            " activations"
        )
    good = 1
    bad = limit + 1
    while bad - good > 1:
        if bad > limit:  # nothing so far was too large
            middle = min(2 * good, limit)
        else:
            middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


@dataclass(frozen=True)
class _BatchTrials:
    """A training whose batch size is looked for."""

    config: GPTConfig
    train: TrainConfig
    device: torch.device
    tricks: Tricks
    memory: int | None

    @cached_property
    def dtype(self) -> torch.dtype:
        return precision(self.tricks.precision, self.device).dtype

    def estimated(self, batch: int) -> int:
        """The computed peak, in bytes."""
        train = replace(self.train, batch_size=batch)
        return estimate_memory(self.config, train, self.dtype, self.tricks.recompute).peak

    def measured(self, batch: int, steps: int) -> tuple[StepCost, int | None]:
        """What a step costs, and the bytes that were held, in a process of its own."""
        train = replace(self.train, batch_size=batch, steps=steps, warmup_steps=0)
        seeds = [train.seed]
        result = in_own_process(
            measure_tricks, self.tricks, self.config, train, device=self.device, seeds=seeds, corpus=None
        )
        if isinstance(result, str):
            raise ValueError(result)
        costs, held = result
        return costs[0], held

    def fits(self, batch: int) -> bool:
        available = math.inf if self.memory is None else self.memory
        if self.device.type != "cuda":
            return self.estimated(batch) <= available
        try:
            _, held = self.measured(batch, steps=2)
        except torch.OutOfMemoryError:
            return False
        return held is None or held <= available

    def row(self, batch: int) -> dict[str, Any]:
        cost, held = self.measured(batch, self.train.steps)
        return {
            "batch_size": batch,
            "tokens/s": cost.tokens_per_second,
            "memory": held,
            "estimate": self.estimated(batch),
        }


def find_batch(
    config: GPTConfig,
    train: TrainConfig,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    tricks: Tricks = USUAL,
    *,
    limit: int = 1024,
    search: Callable[[Callable[[int], bool], int], int] = largest_batch,
) -> tuple[int, int, list[dict[str, Any]]]:
    """The largest batch size up to `limit` that fits, the fastest, and a row for each that was timed over
    `train.steps`: the powers of two up to the largest, and itself.

    A row: batch_size, tokens/s, memory (measured, in bytes), estimate (computed). search: what looks for the
    largest, as `largest_batch` does.

    memory: how many bytes a step's tensors may hold. On CUDA, None is all there is, and what fits is found by
    trying, each time in a process of its own. Elsewhere it is needed (a CPU swaps or is killed where CUDA
    raises an error): `estimate_memory` says what fits.
    """
    device = torch.device(device)
    if memory is None and device.type != "cuda":
        raise ValueError(
            f"find_batch on {device} needs memory=, in bytes: only CUDA says in time that there is no more"
        )
    trials = _BatchTrials(config, train, device, tricks, memory)
    largest = search(trials.fits, limit)
    powers_of_two = [2**i for i in range(largest.bit_length())]
    rows = [trials.row(batch) for batch in sorted({largest, *powers_of_two})]
    fastest = max(rows, key=lambda row: row["tokens/s"])
    return largest, fastest["batch_size"], rows
