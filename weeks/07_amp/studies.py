"""Week 7's longer studies, which `--study NAME` runs."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from figures import draw
from own import searching_with
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.devices import device_name
from shared.models.gpt import GPTConfig
from shared.runtime import clock, table
from shared.training.linear_loss import LinearCrossEntropy
from shared.training.memory import LiveTensors, find_batch, largest_batch
from shared.training.profiling import in_own_process
from shared.training.tricks import USUAL, profile_training

if TYPE_CHECKING:
    from run import Settings


def study_batch(settings: "Settings", work: Workspace, config: GPTConfig, corpus: Corpus) -> dict[str, float]:
    """The largest batch within the memory, and the one with the most tokens a second."""
    memory = None if work.device.type == "cuda" else int(settings.memory_gb * 1e9)
    hers = work.mine("largest_batch", None)
    search = largest_batch if hers is None else searching_with(hers)
    with work.log("batch", settings) as log:
        largest, fastest, rows = find_batch(
            config, settings.train, work.device, memory, limit=256, search=search
        )
        log.artifact(rows=rows)
        best = max(row["tokens/s"] for row in rows)
        log.finish(
            largest=largest,
            fastest=fastest,
            tokens_per_second=best,
            one_tokens_per_second=rows[0]["tokens/s"],
            memory_gb=settings.memory_gb,
        )
    print(table(_in_megabytes(row) for row in rows) + "\n(memory in MB)")
    limit = f"fits into {settings.memory_gb:g} GB" if memory else "fits"
    print(
        f"\nthe largest batch that {limit}: {largest} sequences; the fastest: {fastest}, {best:,.0f} tokens/s"
    )
    draw(work.logs, work.reports)
    return {"largest": largest, "fastest": fastest}


def _in_megabytes(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table with both of its memories in megabytes."""
    for name in ("memory", "estimate"):
        if row[name]:
            row = row | {name: round(row[name] / 1e6, 1)}
    return row


def study_profile(
    settings: "Settings", work: Workspace, config: GPTConfig, corpus: Corpus
) -> dict[str, float]:
    """Where a step's time goes, by torch.profiler, in fp32 and in bf16."""
    summaries = {}
    for name in [name for name in ("fp32", "bf16") if name in settings.formats]:
        with work.log(f"profile-{name}", settings) as log:
            rows = in_own_process(
                profile_training, config, settings.train, corpus, work.device, replace(USUAL, precision=name)
            )
            log.artifact(rows=rows)
            summaries[name] = log.finish(
                ms=sum(row["ms"] for row in rows),
                **{row["kind"].replace(" ", "_"): row["share"] for row in rows},
            )
        print(f"\none step in {name}, {summaries[name]['ms']:.0f} ms, on {device_name(work.device)}")
        print(
            table(
                {
                    "kind of operation": row["kind"],
                    "ms": round(row["ms"], 2),
                    "percent": round(100 * row["share"], 1),
                }
                for row in rows
            )
        )
        if "idle" in summaries[name]:
            print(f"the GPU works {1 - summaries[name]['idle']:.0%} of the time")
    draw(work.logs, work.reports)
    return {f"{name}_ms": summary["ms"] for name, summary in summaries.items()}


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden states [tokens, channel], an output layer's weight [vocab_size, channel] and targets [tokens]."""


def study_loss(settings: "Settings", work: Workspace, config: GPTConfig, corpus: Corpus) -> dict[str, float]:
    """Output layer and loss, whole and in chunks, at GPT-2's vocabulary: time, memory, and how far apart."""
    function = work.mine("LinearCrossEntropy", LinearCrossEntropy)
    ways: dict[str, tuple[int | None, Loss]] = {"whole": (None, whole_loss)}
    for size in settings.chunk_sizes:
        ways[f"chunks of {size}"] = (size, partial(chunked_loss, function, size))
    rows = []
    for width in settings.loss_widths:
        inputs = random_inputs(settings.loss_tokens, width, settings.loss_vocab, work.device)
        right = loss_and_gradients(whole_loss, *inputs)
        for way, (chunk_size, loss) in ways.items():
            row = {"width": width, "way": way, "chunk_size": chunk_size, **loss_cost(loss, inputs, right)}
            with work.log(f"loss-{width}-{way.replace(' ', '-')}", settings) as log:
                rows.append(log.finish(**row))
    print(
        f"{settings.loss_tokens:,} tokens, {settings.loss_vocab:,} in the vocabulary, forward and backward,"
        f" on {device_name(work.device)}"
    )
    print(
        table(
            {
                "width": row["width"],
                "logits": row["way"],
                "ms": round(row["ms"], 1),
                "alive at the peak, MB": round(row["bytes"] / 1e6, 2),
                "loss": round(row["loss"], 4),
                "gradients differ by": f"{row['apart']:.0e}",
            }
            for row in rows
        )
    )
    draw(work.logs, work.reports)
    return {f"{row['width']} wide, {row['way']}: MB": row["bytes"] / 1e6 for row in rows}


def random_inputs(tokens: int, width: int, vocab_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Hidden states as a norm leaves them, weights as they are initialized, and any targets."""
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = 0.02 * torch.randn(vocab_size, width, generator=generator)
    targets = torch.randint(vocab_size, (tokens,), generator=generator)
    return tuple(t.to(device) for t in (hidden, weight, targets))


def whole_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def chunked_loss(function: Any, chunk_size: int, *inputs: Tensor) -> Tensor:
    """function: `LinearCrossEntropy`, or the learner's."""
    return function.apply(*inputs, -100, chunk_size)


def loss_and_gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The loss, and its gradients of hidden and of weight."""
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(h, w, targets)
    return value.detach(), *torch.autograd.grad(value, (h, w))


def loss_cost(
    loss: Loss, inputs: tuple[Tensor, ...], right: tuple[Tensor, ...], repeats: int = 3
) -> dict[str, float]:
    """Milliseconds (the median), the bytes that are alive at the peak, the loss, and how far its gradients
    are from the `right` ones, at most.
    """
    seconds = []
    for _ in range(repeats):
        started = clock()
        found = loss_and_gradients(loss, *inputs)
        value = found[0].item()  # waits for a GPU
        seconds.append(clock() - started)
    apart = max((a - b).abs().max().item() for a, b in zip(found[1:], right[1:]))
    del found
    with LiveTensors() as live:
        loss_and_gradients(loss, *inputs)
    copies = inputs[0].nbytes + inputs[1].nbytes  # `loss_and_gradients` makes them
    return {
        "ms": 1000 * statistics.median(seconds),
        "bytes": live.peak - copies,
        "loss": value,
        "apart": apart,
    }


STUDIES = {"batch": study_batch, "profile": study_profile, "loss": study_loss}
