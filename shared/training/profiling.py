"""Week 6. What a training step costs: seconds, memory, and how much of the machine's arithmetic it uses.

MFU, model FLOPs utilisation (Chowdhery et al., PaLM, 2022, appendix B), is the arithmetic that the model
needs over what the machine could have done in the same time. What it could have done is measured here, not
read from a data sheet.
"""

import math
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.data.corpus import Corpus, batches, token_dtype
from shared.evaluation import cross_entropy
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import clock
from shared.tokenizers import CharTokenizer
from shared.training.config import TrainConfig
from shared.training.distributed import Processes
from shared.training.execution import FP32, Precision
from shared.training.trainer import Trainer

CARDS = {"T4": (65, 0.35), "L4": (121, 0.7), "RTX 4090": (165, 0.5), "A100": (312, 1.6), "H100": (989, 2.8)}
"""Peak TFLOP/s in 16 bits, dense, by the makers' data sheets, and dollars an hour to rent one: an assumption,
prices change by the month.
"""
USUAL_MFU = 0.4  # of such runs on such cards; assumed


def matmul_peak(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    repeats: int = 10,
) -> float:
    """FLOP/s of the fastest of `repeats` products of two square matrices.

    size: of the matrices; None is 8192 on CUDA, 2048 elsewhere.
    """
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    best = math.inf
    for _ in range(repeats + 1):  # the first one sets up what the others reuse; it will not be the fastest
        _finish(device)
        started = clock()
        # Transposed as in a linear layer: some CPUs are slow in bf16 with any other layout.
        torch.matmul(a, b.T, out=out)
        _finish(device)
        best = min(best, clock() - started)
    return 2 * size**3 / best


def _finish(device: torch.device) -> None:
    """Waits until the device has done what it was given; an accelerator works on while Python goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second that all threads together read from memory.

    It is the best of several sums over an array that no cache holds.
    """
    array = torch.ones(megabytes * 2**18)
    best = math.inf
    for _ in range(repeats):
        started = clock()
        array.sum()
        best = min(best, clock() - started)
    return array.numel() * 4 / best


def peak_memory(device: torch.device | str) -> int | None:
    """The most bytes held at once since the process began.

    On a GPU, what tensors held; on a CPU, the whole process. None where the system doesn't say (Windows;
    Apple's GPUs).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "linux":
        # Not getrusage: its peak is handed down from the process that started this one.
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        )
        return 1024 * int(status["VmHWM"].split()[0])
    if device.type == "cpu" and sys.platform == "darwin":
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def reset_peak_memory(device: torch.device | str) -> None:
    """From here on `peak_memory` is the most since now.

    On a CPU this works on Linux only; elsewhere nothing happens.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        # proc(5): sets VmHWM back to what is resident now
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@dataclass(frozen=True)
class StepCost:
    """What training steps cost."""

    seconds: float
    """Of a step: the median, the first ones left out."""
    tokens_per_second: float
    flops: float
    """FLOP/s that the model needed, by `GPT.flops_per_token`; over `matmul_peak` it is the MFU."""
    memory: int | None
    """`peak_memory`, in bytes."""
    kept: int
    """Bytes that a forward pass keeps for the backward, by `saved_bytes`."""
    losses: list[float]
    """Of the training batches, step by step."""


def measure_training(
    config: GPTConfig,
    train: TrainConfig,
    device: torch.device | str = "cpu",
    precision: Precision = FP32,
    *,
    compile_model: bool = False,
    recompute: bool = False,
    warmup: int = 1,
    corpus: Corpus | None = None,
) -> StepCost:
    """Trains a new GPT, and says what a step costs once the first `warmup` steps have compiled and allocated.

    corpus: None takes random tokens. They cost the same, but there is nothing in them to learn. `train` is
    the Trainer's, with more steps than `warmup`, or ValueError. See `in_own_process` for a peak of memory
    that is this run's own.
    """
    if train.steps <= warmup:
        raise ValueError(f"steps={train.steps}: measuring needs more steps than the {warmup} of warmup")
    train = replace(train, log_every=1, eval_every=train.steps, eval_windows=1)
    torch.manual_seed(train.seed)
    if corpus is None:
        count = 4 * train.batch_size * train.block_size + 1
        corpus = _random_tokens(config.vocab_size, count, train.seed)
    model = GPT(config).to(device)
    trainer = Trainer(
        model,
        corpus,
        train,
        device=device,
        description="measuring",
        precision=precision,
        processes=Processes("none", device, compile_model, recompute),
    )
    # not the Trainer's own messages
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        trainer.fit()
    rows = [row for row in trainer.history if "train_loss" in row]
    ends = [0.0, *(row["seconds"] for row in rows)]
    seconds = statistics.median(b - a for a, b in zip(ends[warmup:], ends[warmup + 1 :]))
    speed = train.batch_size * train.block_size * train.grad_accum_steps / seconds
    flops = speed * model.flops_per_token(train.block_size)
    memory = peak_memory(device)
    x, y = next(batches(corpus.train, train.block_size, train.batch_size, train.seed))
    with precision.autocast(torch.device(device)):
        kept = saved_bytes(model, lambda: cross_entropy(model(x.to(device)), y.to(device)))
    return StepCost(
        seconds=seconds,
        tokens_per_second=speed,
        flops=flops,
        memory=memory,
        kept=kept,
        losses=[row["train_loss"] for row in rows],
    )


def _random_tokens(vocab_size: int, count: int, seed: int) -> Corpus:
    tokenizer = CharTokenizer.train("".join(chr(0x10000 + i) for i in range(vocab_size)))
    tokens = np.random.default_rng(seed).integers(vocab_size, size=count).astype(token_dtype(vocab_size))
    return Corpus("random tokens", tokenizer, tokens, tokens)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward()` keeps for the backward.

    Each piece of memory counts once, the model's parameters not at all.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def in_own_process(function: Callable, *args: Any, **named: Any) -> Any:
    """function(*args, **named) in a fresh process, whose peak memory is then its own.

    The function must be a module's, and its arguments plain data.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args, **named).result()
