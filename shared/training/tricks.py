"""Week 7. Faster and smaller steps: a ladder of tricks, measured one by one, and where the time of a step
goes.
"""

import os
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from shared.data.corpus import Corpus
from shared.models.gpt import GPT, GPTConfig
from shared.training.config import TrainConfig
from shared.training.distributed import Processes
from shared.training.precision import PRECISION_NAMES, bf16_units, format_peak, needed_card, precision
from shared.training.profiling import StepCost, in_own_process, measure_training, peak_memory
from shared.training.trainer import Trainer

# ---- what a step costs, trick by trick


@dataclass(frozen=True)
class Tricks:
    """How a step is carried out."""

    precision: str = "fp32"
    sdpa: bool = False
    """PyTorch's own attention, which never writes down the scores. If not, scores and softmax are tensors."""
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

PRECISIONS: list[tuple[str, dict[str, Any]]] = [
    (name, {"precision": name, "sdpa": True, "fused": True}) for name in PRECISION_NAMES
]
"""The same training in each format, for `measure_ladder(ladder=PRECISIONS)`."""
NOT_MEASURED = "not measured, and left out below: "
"""How the note of a row begins that has no figures."""


def measure_ladder(
    config: GPTConfig,
    train: TrainConfig,
    device: torch.device | str = "cpu",
    *,
    seeds: Sequence[int] = (1, 2, 3),
    corpus: Corpus | None = None,
    ladder: Sequence[tuple[str, dict[str, Any]]] = LADDER,
    peaks: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Trains `train.steps` steps with each seed on every step of the ladder, each in a process of its own,
    and gives a row for each.

    A row: step; ms (of the median step), tokens/s, memory (peak bytes beyond what the process held before it
    built the model; on a CPU, some 130 MB of libraries too), MFU (over the peak of that format), first loss
    and loss (of the first and of the last step, means over the seeds), spread (the largest last loss less the
    smallest), note. What the machine cannot do, and bf16 where it has no units for it, is left out of the
    rows below; the note says why. corpus: None takes random tokens. peaks: FLOP/s by the format's name, as
    `format_peak` measures them; those that are not given are measured here.
    """
    device = torch.device(device)
    known_peaks = dict(peaks or {})
    has_bf16_units, why_not = bf16_units(device)
    rows: list[dict[str, Any]] = []
    kept = Tricks()
    for name, change in ladder:
        tricks = replace(kept, **change)
        try:
            result = in_own_process(
                measure_tricks, tricks, config, train, device=device, seeds=seeds, corpus=corpus
            )
        except torch.OutOfMemoryError:
            result = f"out of memory with batch_size={tricks.batch * train.batch_size}"
        if isinstance(result, str):
            rows.append({"step": name, "note": f"{NOT_MEASURED}{result}"})
            continue
        costs, memory = result
        if tricks.precision not in known_peaks:
            known_peaks[tricks.precision] = format_peak(tricks.precision, device)
        note = None
        if tricks.precision == "bf16" and not has_bf16_units:
            note = f"left out below: {why_not}"
        else:
            kept = tricks
        rows.append({"step": name, **_summary(costs, memory, known_peaks[tricks.precision]), "note": note})
    return rows


def _summary(costs: list[StepCost], memory: int | None, peak: float) -> dict[str, Any]:
    """The numbers of a row, from the cost with each seed. peak: FLOP/s."""
    median = sorted(costs, key=lambda cost: cost.seconds)[len(costs) // 2]
    last_losses = [cost.losses[-1] for cost in costs]
    return {
        "ms": 1000 * median.seconds,
        "tokens/s": median.tokens_per_second,
        "memory": memory,
        "MFU": median.flops / peak,
        "first loss": statistics.fmean(cost.losses[0] for cost in costs),
        "loss": statistics.fmean(last_losses),
        "spread": max(last_losses) - min(last_losses),
    }


def measure_tricks(
    tricks: Tricks,
    config: GPTConfig,
    train: TrainConfig,
    *,
    device: torch.device,
    seeds: Sequence[int],
    corpus: Corpus | None,
) -> tuple[list[StepCost], int | None] | str:
    """The cost with each seed, and the peak of memory; or why the device cannot do it.

    For a process of its own: the peak is what it has held beyond what it held at first.
    """
    before = peak_memory(device)
    reason = cannot(tricks, device)
    if reason is not None:
        return reason
    # PyTorch's operations alone: fused.c would compute several rungs at once, attention among them
    train = replace(train, batch_size=tricks.batch * train.batch_size, fused=False)
    with carried_out(tricks):
        costs = [
            measure_training(
                config,
                replace(train, seed=seed),
                device,
                precision(tricks.precision, device),
                compile_model=tricks.compiled,
                recompute=tricks.recompute,
                corpus=corpus,
            )
            for seed in seeds
        ]
    peak = costs[0].memory  # later seeds find what the first left in memory
    if before is None or peak is None:
        return costs, None
    return costs, peak - before


@contextmanager
def carried_out(tricks: Tricks) -> Iterator[None]:
    """Inside, attention and AdamW are as `tricks` has them."""
    attention: AbstractContextManager = nullcontext() if tricks.sdpa else sdpa_kernel(SDPBackend.MATH)
    adamw: AbstractContextManager = nullcontext() if tricks.fused else _plain_adamw()
    with warnings.catch_warnings(), attention, adamw:
        # Under autocast the norms of queries and keys have 16 bits and their gains 32: right, only not fused.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def cannot(tricks: Tricks, device: torch.device) -> str | None:
    """Why a step cannot be carried out like this here, or None."""
    needed = needed_card(tricks.precision, device)
    if needed is not None:
        return needed
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
"""Kinds of operations, by the names of an operation and of those that it is part of; the first that fits.

All else is "other".
"""


def profile_training(
    config: GPTConfig,
    train: TrainConfig,
    corpus: Corpus,
    device: torch.device | str = "cpu",
    tricks: Tricks = USUAL,
    *,
    warmup: int = 2,
) -> list[dict[str, Any]]:
    """Where a step's time goes, by torch.profiler: a row for each of KINDS with ms and share (of the step),
    the longest first.

    Of `train.steps` steps the first `warmup` are left out, half of the others are only timed, and the last
    are profiled. The last row is the rest of the step: on CUDA, where ms is what the GPU worked, "idle" in a
    step that is only timed; on a CPU "between operations", Python. Raises ValueError for tricks that the
    device cannot do, and for fewer than warmup + 2 steps.
    """
    device = torch.device(device)
    if train.steps < warmup + 2:
        raise ValueError(f"steps={train.steps}: a profile needs at least {warmup + 2}")
    reason = cannot(tricks, device)
    if reason is not None:
        raise ValueError(reason)
    on_cuda = device.type == "cuda"
    profiled = (train.steps - warmup) // 2
    activities = [ProfilerActivity.CPU]
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    seconds = _profiled_steps(config, train, corpus, device, tricks, last=profiled, profiler=profiler)
    times = {kind: ms / profiled for kind, ms in time_by_kind(profiler.events(), on_cuda).items()}
    timed = seconds[warmup:-profiled] if on_cuda else seconds[-profiled:]
    rest = max(0.0, 1000 * statistics.median(timed) - sum(times.values()))
    times["idle" if on_cuda else "between operations"] = rest
    step = sum(times.values())
    return [{"kind": kind, "ms": ms, "share": ms / step} for kind, ms in times.items()]


def _profiled_steps(
    config: GPTConfig,
    train: TrainConfig,
    corpus: Corpus,
    device: torch.device,
    tricks: Tricks,
    *,
    last: int,
    profiler: profile,
) -> list[float]:
    """The seconds of each step of a training; the `last` ones run under the profiler."""
    seconds: list[float] = []

    class Profiled(Trainer):
        def train_step(self, batches: Iterator[tuple[Tensor, ...]]) -> None:
            if self.step == train.steps - last:
                profiler.start()
            before = self.seconds
            super().train_step(batches)
            seconds.append(self.seconds - before)
            if self.step == train.steps:
                profiler.stop()

    # PyTorch's operations alone: the profiler does not see what fused.c computes
    quick = replace(train, batch_size=tricks.batch * train.batch_size, eval_every=train.steps, fused=False)
    quick = replace(quick, eval_windows=1)
    torch.manual_seed(train.seed)
    trainer = Profiled(
        GPT(config),
        corpus,
        quick,
        device=device,
        description="profile",
        precision=precision(tricks.precision, device),
        processes=Processes("none", device, tricks.compiled, tricks.recompute),
    )
    with carried_out(tricks), open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        trainer.fit()
    return seconds


def time_by_kind(events: Sequence[Any], cuda: bool = False) -> dict[str, float]:
    """The milliseconds of each of KINDS in a profiler's events, the longest first.

    An operation counts with what it took itself, on the CPU or, with `cuda`, on the GPU. What the backward
    does is of the kind of the operation that it is the backward of.
    """
    # A GPU's kernels are counted with the operations that started them.
    operations = [event for event in events if event.device_type == DeviceType.CPU]
    forward_paths = {
        event.sequence_nr: _path(event)
        for event in operations
        if event.sequence_nr >= 0 and _backward_node(event) is None
    }
    totals: dict[str, float] = defaultdict(float)
    for event in operations:
        node = _backward_node(event)
        names = _path(event) + "/"
        if node is not None:
            names += forward_paths.get(node.sequence_nr, "")
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, names)), "other")
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        totals[kind] += microseconds / 1000
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _path(event: Any) -> str:
    """The names of the operations that a profiler's event is part of, the outermost first, and its own."""
    if event.cpu_parent is None:
        return event.name
    return f"{_path(event.cpu_parent)}/{event.name}"


def _backward_node(event: Any) -> Any:
    """The step of the backward that a profiler's event is part of, or None."""
    while event is not None and "autograd::engine" not in event.name:
        event = event.cpu_parent
    return event
