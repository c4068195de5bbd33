"""Week 7. Faster and smaller steps: a ladder of tricks, measured one by one, and where the time of a step
goes.
"""

import os
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from shared.data.corpus import Corpus
from shared.models.gpt import GPT, GPTConfig
from shared.training.config import TrainConfig
from shared.training.distributed import Processes
from shared.training.precision import bf16_units, precision
from shared.training.profiling import StepCost, in_own_process, matmul_peak, measure_training, peak_memory
from shared.training.trainer import Trainer

# ---- what a step costs, trick by trick


@dataclass(frozen=True)
class Tricks:
    """How a step is carried out."""

    precision: str = "fp32"
    sdpa: bool = False
    """PyTorch's own attention, which never writes down the scores. If not, scores and softmax are tensors
    ("eager").
    """
    compiled: bool = False
    fused: bool = False
    """AdamW in one pass over all parameters, not tensor by tensor."""
    batch: int = 1
    """How many times the batch size of the settings."""
    recompute: bool = False


USUAL = Tricks(sdpa=True, fused=True)
LADDER: list[tuple[str, dict[str, Any]]] = [
    ("eager fp32", {}),
    ("SDPA", {"sdpa": True}),
    ("bf16", {"precision": "bf16"}),
    ("compile", {"compiled": True}),
    ("fused AdamW", {"fused": True}),
    ("larger batch", {"batch": 4}),
    ("gradient checkpointing", {"recompute": True}),
]
"""Names, and what each step changes in `Tricks`; the changes of the steps above it stay."""

PRECISIONS = [(name, {"precision": name, "sdpa": True, "fused": True}) for name in ("fp32", "bf16", "fp16")]
"""The same training in each format, for `measure_ladder(ladder=PRECISIONS)`."""


def measure_ladder(
    config: GPTConfig,
    train: TrainConfig,
    device: torch.device | str = "cpu",
    seeds: Sequence[int] = (1, 2, 3),
    corpus: Corpus | None = None,
    ladder: list[tuple[str, dict[str, Any]]] = LADDER,
    peaks: Mapping[torch.dtype, float] | None = None,
) -> list[dict[str, Any]]:
    """Trains `train.steps` steps with each seed on every step of the ladder, each in a process of its own,
    and gives a row for each.

    A row: step; ms (of the median step), tokens/s, memory (peak bytes beyond what the process held before it
    built the model; on a CPU, some 130 MB of libraries too), MFU (over the peak of that format), first loss
    and loss (of the first and of the last step, means over the seeds), spread (the largest last loss less the
    smallest), note. What the machine cannot do, and bf16 where it has no units for it, is left out of the
    rows below; the note says why. corpus: None takes random tokens. peaks: FLOP/s by format, as `matmul_peak`
    measures them; those that are not given are measured here.
    """
    device, peaks, rows, now = torch.device(device), dict(peaks or {}), [], Tricks()
    units, why = bf16_units(device)
    for name, change in ladder:
        tricks = replace(now, **change)
        try:
            found = in_own_process(measure, tricks, config, train, device, seeds, corpus)
        except torch.OutOfMemoryError:
            found = f"out of memory with batch_size={tricks.batch * train.batch_size}"
        if isinstance(found, str):
            rows.append({"step": name, "note": f"not measured, and left out below: {found}"})
            continue
        costs, memory = found
        dtype = precision(tricks.precision, device).dtype
        slow = dtype == torch.bfloat16 and not units
        now = now if slow else tricks
        peaks[dtype] = peaks.get(dtype) or matmul_peak(device, dtype)
        middle, ends = (
            sorted(costs, key=lambda cost: cost.seconds)[len(costs) // 2],
            [cost.losses[-1] for cost in costs],
        )
        row = {
            "step": name,
            "ms": 1000 * middle.seconds,
            "tokens/s": middle.tokens_per_second,
            "memory": memory,
        }
        row |= {
            "MFU": middle.flops / peaks[dtype],
            "first loss": statistics.fmean(cost.losses[0] for cost in costs),
        }
        row |= {"loss": statistics.fmean(ends), "spread": max(ends) - min(ends)}
        rows.append(row | {"note": f"left out below: {why}" if slow else None})
    return rows


def measure(
    tricks: Tricks,
    config: GPTConfig,
    train: TrainConfig,
    device: torch.device,
    seeds: Sequence[int],
    corpus: Corpus | None,
) -> tuple[list[StepCost], int | None] | str:
    """The cost with each seed, and the peak of memory; or why the device cannot do it. For a process of its
    own.
    """
    before = peak_memory(device)
    if reason := cannot(tricks, device):
        return reason
    train = replace(train, batch_size=tricks.batch * train.batch_size)
    with carried_out(tricks):
        how = [(replace(train, seed=seed), device, precision(tricks.precision, device)) for seed in seeds]
        costs = [
            measure_training(config, *each, tricks.compiled, tricks.recompute, corpus=corpus) for each in how
        ]
    return costs, (
        None if before is None else costs[0].memory - before
    )  # later seeds find what the first left in memory


@contextmanager
def carried_out(tricks: Tricks) -> Iterator[None]:
    """Inside, attention and AdamW are as `tricks` has them."""
    with (
        warnings.catch_warnings(),
        nullcontext() if tricks.sdpa else sdpa_kernel(SDPBackend.MATH),
        nullcontext() if tricks.fused else _plain_adamw(),
    ):
        # Under autocast the norms of queries and keys have 16 bits and their gains 32: right, only not fused.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def cannot(tricks: Tricks, device: torch.device) -> str | None:
    """Why a step cannot be carried out like this here, or None."""
    try:
        precision(tricks.precision, device)
    except ValueError as error:
        return str(error)
    if tricks.fused and device.type not in ("cpu", "cuda"):
        return f"{device} has no fused AdamW"
    if tricks.compiled:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
        except RuntimeError as error:
            return f"torch.compile does not work here ({str(error).strip().splitlines()[0]})"
    return None


@contextmanager
def _plain_adamw() -> Iterator[None]:
    """Inside, every AdamW updates one tensor after the other, whatever it was built for."""

    def unfuse(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=False)

    with register_optimizer_step_pre_hook(unfuse):
        yield


# ---- where the time of a step goes

KINDS = {
    "optimizer and clipping": r"Optimizer\.|_foreach_|_fused_adamw|linalg_vector_norm",
    "attention": r"attention",
    "loss": r"log_softmax|nll_loss|cross_entropy",
    "norms": r"rms_norm|layer_norm",
    "copies and casts": r"_to_copy|aten::copy_|aten::clone|aten::cat|memcpy",
    "matrix products": r"aten::(addmm|mm|bmm|matmul|linear)\b",
    "activation and other elementwise": (
        r"silu|gelu|relu|sigmoid|aten::(mul|add|sub|div|neg|pow|addcmul|sum|mean|roll)_?\b"
    ),
}
"""Kinds of operations, by the names of an operation and of those that it is part of; the first that fits. All
else is "other".
"""


def profile_training(
    config: GPTConfig,
    train: TrainConfig,
    corpus: Corpus,
    device: torch.device | str = "cpu",
    tricks: Tricks = USUAL,
    warmup: int = 2,
) -> list[dict[str, Any]]:
    """Where a step's time goes, by torch.profiler: a row for each of KINDS with ms and share (of the step),
    the longest first.

    Of `train.steps` steps the first `warmup` are left out, half of the others are only timed, and the last
    are looked into. The last row is the rest of the step: on CUDA, where ms is what the GPU worked, "idle" in
    a step that is only timed; on a CPU "between operations", Python. Raises ValueError for tricks that the
    device cannot do, and for fewer than warmup + 2 steps.
    """
    device = torch.device(device)
    if train.steps < warmup + 2:
        raise ValueError(f"steps={train.steps}: a profile needs at least {warmup + 2}")
    if reason := cannot(tricks, device):
        raise ValueError(reason)
    looked = (train.steps - warmup) // 2
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler, walls = profile(activities=activities), []

    class Profiled(Trainer):
        def train_step(self, batches: Iterator) -> None:
            if self.step == train.steps - looked:
                profiler.start()
            before = self.seconds
            super().train_step(batches)
            walls.append(self.seconds - before)
            if self.step == train.steps:
                profiler.stop()

    processes = Processes("none", device, tricks.compiled, tricks.recompute)
    quick = replace(train, batch_size=tricks.batch * train.batch_size, eval_every=train.steps, eval_windows=1)
    torch.manual_seed(train.seed)
    trainer = Profiled(
        GPT(config),
        corpus,
        quick,
        device=device,
        description="profile",
        precision=precision(tricks.precision, device),
        processes=processes,
    )
    with carried_out(tricks), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        trainer.fit()
    wall = 1000 * statistics.median(walls[warmup:-looked] if device.type == "cuda" else walls[-looked:])
    found = {kind: ms / looked for kind, ms in time_by_kind(profiler.events(), device.type == "cuda").items()}
    found["idle" if device.type == "cuda" else "between operations"] = max(0.0, wall - sum(found.values()))
    whole = sum(found.values())
    return [{"kind": kind, "ms": ms, "share": ms / whole} for kind, ms in found.items()]


def time_by_kind(events: Sequence[Any], cuda: bool = False) -> dict[str, float]:
    """The milliseconds of each of KINDS in a profiler's events, the longest first: what operations took
    themselves, on the CPU or, with `cuda`, on the GPU. What the backward does is of the kind of the operation
    that it is the backward of.
    """

    def path(event: Any) -> str:
        return (path(event.cpu_parent) + "/" if event.cpu_parent else "") + event.name

    def node(event: Any) -> Any:
        """The step of the backward that an operation is part of, or None."""
        while event and "autograd::engine" not in event.name:
            event = event.cpu_parent
        return event

    events = [
        event for event in events if event.device_type == DeviceType.CPU
    ]  # a GPU's kernels are counted with what started them
    forward = {
        event.sequence_nr: path(event) for event in events if event.sequence_nr >= 0 and not node(event)
    }
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        back = node(event)
        names = path(event) + "/" + (forward.get(back.sequence_nr, "") if back else "")
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, names)), "other")
        totals[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
