"""Week 7. Faster and smaller steps: number formats for the Trainer, what a step holds in memory, the largest batch, a ladder of tricks.

    Trainer(model, corpus, config, device=device, precision=precision("fp16", device))

Sources: Micikevicius et al., "Mixed Precision Training" (2018); Kalamkar et al., "A Study of BFLOAT16" (2019); Korthikanti et al.,
"Reducing Activation Recomputation" (2022), for the count of activations.

>>> precision("bf16").dtype
torch.bfloat16
"""

import os
import platform
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from shared.data import Corpus
from shared.distributed import Processes
from shared.execution import FP32, Precision
from shared.models.gpt import GPT, GPTConfig
from shared.profiling import StepCost, in_own_process, matmul_peak, measure_training, peak_memory
from shared.runtime import CPUINFO
from shared.training import TrainConfig, Trainer

# ---- number formats


@dataclass(frozen=True)
class Float16(Precision):
    """fp16 with a scaled loss, for `Trainer(precision=...)`. fp16 ends at 65504 and, below 6·10⁻⁵, loses bits down to nothing at 6·10⁻⁸:
    the loss is multiplied by a large number, so that small gradients are still there, and the gradients are divided by it before they
    are clipped. A step with a gradient that overflows is left out and halves the number; many good steps double it.

    Where the number has fallen below 1 it is not the number's fault, and the Trainer stops as it does in fp32.
    """

    dtype: torch.dtype = torch.float16
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu"))

    @property
    def skips(self) -> bool:
        return self.scaler.get_scale() >= 1

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale(self, optimizers: list[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)

    def step(self, optimizers: list[torch.optim.Optimizer]) -> None:
        super().step(optimizers)
        before = None if optimizers else self.scaler.get_scale()
        self.scaler.update()
        if before is not None and self.scaler.get_scale() >= before:  # the loss overflowed, and none of the gradients
            self.scaler.update(before * self.scaler.get_backoff_factor())

    def state(self) -> dict[str, float]:
        state = self.scaler.state_dict()
        return {"loss_scale": state["scale"], "steps_since_skip": state["_growth_tracker"]}

    def restore(self, state: dict[str, float]) -> None:
        self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": state["loss_scale"], "_growth_tracker": state["steps_since_skip"]})


def precision(name: str, device: torch.device | str = "cpu") -> Precision:
    """What `Trainer(precision=...)` takes, by name: fp32, bf16 (autocast) or fp16 (autocast and a scaled loss).

    Tries one small step. Raises ValueError for another name, and for a format that the device cannot compute in.
    """
    device = torch.device(device)
    made = {"fp32": lambda: FP32, "bf16": lambda: Precision(torch.bfloat16), "fp16": lambda: Float16(scaler=GradScaler(device.type))}
    if name not in made:
        raise ValueError(f"precision={name!r}: must be fp32, bf16 or fp16")
    with warnings.catch_warnings(action="ignore"):  # where autocast or the scaler switches itself off, it only warns
        chosen = made[name]()
        try:
            layer = nn.Linear(8, 8, device=device)
            with chosen.autocast(device):
                out = layer(torch.ones(1, 8, device=device))
            optimizer = torch.optim.SGD(layer.parameters())
            chosen.backward(out.float().mean())
            chosen.unscale([optimizer])
            works = out.dtype == chosen.dtype and bool(layer.weight.grad.isfinite().all())
        except (RuntimeError, AssertionError):  # a device that torch was built without is an AssertionError
            works = False
    if not works:
        raise ValueError(f"precision={name!r} does not work on {device}: use fp32 there, or another device")
    return made[name]()


def bf16_units(device: torch.device | str = "cpu") -> tuple[bool, str]:
    """Whether the device has units for bf16 products, and in a sentence how one knows and what follows. For CUDA and CPUs.

    A CPU on Linux says so itself; elsewhere a product in bf16 is timed against one in fp32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found, how = major >= 8, f"compute capability {major}.{minor}; they come with 8.0"
    elif device.type == "cpu" and platform.system() == "Linux":
        names = {"avx512_bf16", "amx_bf16", "bf16"}  # Intel's and AMD's, Intel's for tiles, Arm's
        flags = names & set(re.findall(r"\w+", CPUINFO.read_text()))
        found, how = bool(flags), f"/proc/cpuinfo names {', '.join(sorted(flags)) or 'neither avx512_bf16 nor amx_bf16'}"
    else:
        ratio = matmul_peak(device, torch.bfloat16) / matmul_peak(device)
        found, how = ratio > 1.2, f"a bf16 product runs at {ratio:.2f} × the speed of fp32"
    if found:
        return True, f"bf16 units ({how})"
    return False, f"no bf16 units ({how}): each number is widened to fp32 and the result rounded, so bf16 saves memory and costs time"


# ---- memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the tensors of one process that trains, without what the allocator and the libraries take for themselves."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward keeps for the backward, as `saved_bytes` counts it."""
    peak: int
    """The most that is alive at once between two operations of a step, from the second step on."""


def estimate_memory(config: GPTConfig, train: TrainConfig, dtype: torch.dtype = torch.float32, recompute: bool = False) -> MemoryEstimate:
    """What training this model takes, computed from the shapes alone. dtype, recompute: as the step's precision and `Processes` have them.

    Raises ValueError for dropout and for a window, whose attention keeps other tensors than these.
    """
    if config.dropout or config.window:
        raise ValueError(f"dropout={config.dropout}, window={config.window}: the estimate knows neither; set dropout to 0 and window to none")
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inner = [sorted(m.weight.shape) for n, m in linears.items() if n != "lm_head"] if train.optimizer == "muon" else []
    weights = 4 * model.num_parameters()
    state = 2 * weights - 4 * sum(a * b for a, b in inner)

    c, kv, hidden, heads, v = config.n_embd, config.kv_heads * config.head_dim, config.hidden, config.n_head, config.vocab_size
    amp = dtype != torch.float32
    e, gated, rms = 2 if amp else 4, config.mlp == "swiglu", config.norm == "rmsnorm"
    tokens = train.batch_size * train.block_size
    norm = 8 * c + 4 if rms else 4 * c + 8  # the input and, per token, its statistics; RMSNorm the normed input too
    # Autocast narrows a norm's output once for each linear layer that reads it, and each keeps its copy.
    inputs = 2 * c * (4 + gated) if amp else 8 * c
    attention = e * (2 * c + 2 * kv) + 4 * heads  # queries, keys, values, result; per head the softmax's log-sum
    if config.qk_norm:
        attention += 8 * (c + kv) + 4 * (heads + config.kv_heads) + e * c  # and the result once more, in another order
    mlp = e * hidden * (4 if gated else 2)
    block = tokens * (2 * norm + inputs + attention + mlp)
    copies = amp * 2 * sum(m.weight.numel() for m in linears.values())  # of the weights, narrowed
    logits = tokens * 4 * v  # the log of the softmax, in fp32
    ends = tokens * (norm + e * c + 16) + logits
    own = tokens * 4 * c  # a block's input
    activations = ends + (config.n_layer * own + amp * 2 * c * v if recompute else config.n_layer * block + copies)

    # Where the peak can be: at the loss; in the backward of the last block; in that of the first, or of the embedding; in Muon's step.
    embedding = 4 * c * v
    in_block = tokens * (4 * c + e * hidden * (2 if gated or config.mlp == "relu2" else 1)) + (block - own if recompute else 0)
    forward = activations + max(2 * logits, recompute * copies + tokens * (e * v + 4 * v * amp))
    last = activations - logits + embedding + in_block
    first = weights + max(in_block + (own if recompute else block), 2 * embedding * config.tie_weights)
    held = weights if train.grad_accum_steps > 1 else 0  # the gradients of the batches before
    # Muon stacks the matrices of one shape, and works on several such stacks at once.
    muon = max((inner.count([a, b]) * 4 * (4 * a * b + 2 * a * a) for a, b in inner), default=0)
    return MemoryEstimate(weights, weights, state, activations, weights + state + max(held + forward, held + last, first, weights + muon))


# ---- what a step costs, trick by trick


@dataclass(frozen=True)
class Tricks:
    """How a step is carried out."""

    precision: str = "fp32"
    sdpa: bool = False
    """PyTorch's own attention, which never writes down the scores. If not, scores and softmax are tensors ("eager")."""
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
    """Trains `train.steps` steps with each seed on every step of the ladder, each in a process of its own, and gives a row for each.

    A row: step; ms (of the median step), tokens/s, memory (peak bytes beyond what the process held before it built the model; on a CPU,
    some 130 MB of libraries too), MFU (over the peak of that format), first loss and loss (of the first and of the last step, means over the
    seeds), spread (the largest last loss less the smallest), note. What the machine cannot do, and bf16 where it has no units for it, is
    left out of the rows below; the note says why. corpus: None takes random tokens. peaks: FLOP/s by format, as `matmul_peak` measures
    them; those that are not given are measured here.
    """
    device, peaks, rows, now = torch.device(device), dict(peaks or {}), [], Tricks()
    units, why = bf16_units(device)
    for name, change in ladder:
        tricks = replace(now, **change)
        try:
            found = in_own_process(_measure, tricks, config, train, device, seeds, corpus)
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
        middle, ends = sorted(costs, key=lambda cost: cost.seconds)[len(costs) // 2], [cost.losses[-1] for cost in costs]
        row = {"step": name, "ms": 1000 * middle.seconds, "tokens/s": middle.tokens_per_second, "memory": memory}
        row |= {"MFU": middle.flops / peaks[dtype], "first loss": statistics.fmean(cost.losses[0] for cost in costs)}
        row |= {"loss": statistics.fmean(ends), "spread": max(ends) - min(ends)}
        rows.append(row | {"note": f"left out below: {why}" if slow else None})
    return rows


def _measure(
    tricks: Tricks, config: GPTConfig, train: TrainConfig, device: torch.device, seeds: Sequence[int], corpus: Corpus | None
) -> tuple[list[StepCost], int | None] | str:
    """The cost with each seed, and the peak of memory; or why the device cannot do it. For a process of its own."""
    before = peak_memory(device)
    if reason := _cannot(tricks, device):
        return reason
    train = replace(train, batch_size=tricks.batch * train.batch_size)
    with _carried_out(tricks):
        how = [(replace(train, seed=seed), device, precision(tricks.precision, device)) for seed in seeds]
        costs = [measure_training(config, *each, tricks.compiled, tricks.recompute, corpus=corpus) for each in how]
    return costs, None if before is None else costs[0].memory - before  # later seeds find what the first left in memory


@contextmanager
def _carried_out(tricks: Tricks) -> Iterator[None]:
    """Inside, attention and AdamW are as `tricks` has them."""
    with warnings.catch_warnings(), nullcontext() if tricks.sdpa else sdpa_kernel(SDPBackend.MATH), nullcontext() if tricks.fused else _plain_adamw():
        # Under autocast the norms of queries and keys have 16 bits and their gains 32: right, only not fused.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        yield


def _cannot(tricks: Tricks, device: torch.device) -> str | None:
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
    "activation and other elementwise": r"silu|gelu|relu|sigmoid|aten::(mul|add|sub|div|neg|pow|addcmul|sum|mean|roll)_?\b",
}
"""Kinds of operations, by the names of an operation and of those that it is part of; the first that fits. All else is "other"."""


def profile_training(
    config: GPTConfig, train: TrainConfig, corpus: Corpus, device: torch.device | str = "cpu", tricks: Tricks = USUAL, warmup: int = 2
) -> list[dict[str, Any]]:
    """Where a step's time goes, by torch.profiler: a row for each of KINDS with ms and share (of the step), the longest first.

    Of `train.steps` steps the first `warmup` are left out, half of the others are only timed, and the last are looked into. The last row is the
    rest of the step: on CUDA, where ms is what the GPU worked, "idle" in a step that is only timed; on a CPU "between operations", Python.
    Raises ValueError for tricks that the device cannot do, and for fewer than warmup + 2 steps.
    """
    device = torch.device(device)
    if train.steps < warmup + 2:
        raise ValueError(f"steps={train.steps}: a profile needs at least {warmup + 2}")
    if reason := _cannot(tricks, device):
        raise ValueError(reason)
    looked = (train.steps - warmup) // 2
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler, walls = profile(activities=activities), []

    class Profiled(Trainer):
        def _step(self, stream: Iterator) -> None:
            if self.step == train.steps - looked:
                profiler.start()
            before = self.seconds
            super()._step(stream)
            walls.append(self.seconds - before)
            if self.step == train.steps:
                profiler.stop()

    processes = Processes("none", device, tricks.compiled, tricks.recompute)
    quick = replace(train, batch_size=tricks.batch * train.batch_size, eval_every=train.steps, eval_windows=1)
    torch.manual_seed(train.seed)
    trainer = Profiled(
        GPT(config), corpus, quick, device=device, description="profile", precision=precision(tricks.precision, device), processes=processes
    )
    with _carried_out(tricks), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        trainer.fit()
    wall = 1000 * statistics.median(walls[warmup:-looked] if device.type == "cuda" else walls[-looked:])
    found = {kind: ms / looked for kind, ms in time_by_kind(profiler.events(), device.type == "cuda").items()}
    found["idle" if device.type == "cuda" else "between operations"] = max(0.0, wall - sum(found.values()))
    whole = sum(found.values())
    return [{"kind": kind, "ms": ms, "share": ms / whole} for kind, ms in found.items()]


def time_by_kind(events: Sequence[Any], cuda: bool = False) -> dict[str, float]:
    """The milliseconds of each of KINDS in a profiler's events, the longest first: what operations took themselves, on the CPU or, with
    `cuda`, on the GPU. What the backward does is of the kind of the operation that it is the backward of.
    """

    def path(event: Any) -> str:
        return (path(event.cpu_parent) + "/" if event.cpu_parent else "") + event.name

    def node(event: Any) -> Any:
        """The step of the backward that an operation is part of, or None."""
        while event and "autograd::engine" not in event.name:
            event = event.cpu_parent
        return event

    events = [event for event in events if event.device_type == DeviceType.CPU]  # a GPU's kernels are counted with what started them
    forward = {event.sequence_nr: path(event) for event in events if event.sequence_nr >= 0 and not node(event)}
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        back = node(event)
        names = path(event) + "/" + (forward.get(back.sequence_nr, "") if back else "")
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, names)), "other")
        totals[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


# ---- the batch size


def largest_batch(fits: Callable[[int], bool], limit: int = 1024) -> int:
    """The largest batch size up to `limit` for which `fits` is true: doubled until it isn't, then bisected. ValueError if 1 doesn't fit."""
    if not fits(1):
        raise ValueError("not even a batch of one sequence fits: take a shorter block_size, a smaller model, or recompute activations")
    good, bad = 1, limit + 1
    while bad - good > 1:
        middle = min(2 * good, limit) if bad > limit else (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def find_batch(
    config: GPTConfig, train: TrainConfig, device: torch.device | str = "cpu", memory: int | None = None, tricks: Tricks = USUAL, limit: int = 1024
) -> tuple[int, int, list[dict[str, Any]]]:
    """The largest batch size up to `limit` that fits, the fastest, and a row for each that was timed over `train.steps`: the powers of two
    up to the largest, and itself. A row: batch_size, tokens/s, memory (measured, in bytes), estimate (computed).

    memory: how many bytes a step's tensors may hold. On CUDA, None is all there is, and what fits is found by trying, each time in a process
    of its own. Elsewhere it is needed (a CPU swaps or is killed where CUDA raises an error): `estimate_memory` says what fits.
    """
    device = torch.device(device)
    if memory is None and device.type != "cuda":
        raise ValueError(f"find_batch on {device} needs memory=, in bytes: only CUDA says in time that there is no more")
    dtype = precision(tricks.precision, device).dtype

    def measured(batch: int, steps: int) -> tuple[list[StepCost], int | None]:
        found = in_own_process(_measure, tricks, config, replace(train, batch_size=batch, steps=steps), device, [train.seed], None)
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
        rows.append({"batch_size": batch, "tokens/s": cost.tokens_per_second, "memory": held, "estimate": estimated(batch)})
    return largest, max(rows, key=lambda row: row["tokens/s"])["batch_size"], rows
