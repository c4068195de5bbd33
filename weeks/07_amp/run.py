"""Week 7: what makes a training step faster, and what makes it smaller, measured on this machine.

First the number formats, then a ladder of tricks, with three seeds each.

    python weeks/07_amp/run.py --preset laptop
    # the largest batch that fits, and the fastest
    python weeks/07_amp/run.py --preset laptop --study batch
    # where the time of a step goes, in fp32 and in bf16
    python weeks/07_amp/run.py --preset laptop --study profile
    # the output layer's loss with its logits whole and in chunks, at GPT-2's vocabulary
    python weeks/07_amp/run.py --preset laptop --study loss
    # with your own scaler; --study batch and --study loss take your search and your loss
    python weeks/07_amp/run.py --preset laptop --mine
    # the same with GPT-2's blocks, on a GPU; the studies too
    python weeks/07_amp/run.py --preset gpu
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from figures import draw
from measures import Bench, compare_cards, find_peaks, measure_rungs, peak_figures
from own import check_own_scaler, scaled_training, show_scales
from shared.checks import Checks
from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.data.shards import INDEX
from shared.devices import device_name, pick_device
from shared.models.gpt import GPTConfig
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, open_corpus
from shared.training.precision import PRECISION_NAMES, bf16_units
from shared.training.tricks import LADDER, PRECISIONS
from studies import STUDIES


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run", "batch", "loss")

    vocab_size: int = 1024
    """Of the tokenizer, week 5's."""
    model: GPTConfig = GPTConfig.preset("mini", block_size=256)
    """Week 6's; its vocabulary is the tokenizer's."""
    train: TrainConfig = TrainConfig(
        steps=10, batch_size=3, block_size=256, lr=3e-3, warmup_steps=3, beta2=0.95
    )
    """What is measured: so many steps of so many tokens."""
    seeds: tuple[int, ...] = (1, 2, 3)
    formats: tuple[Literal["fp32", "tf32", "bf16", "fp16", "fp8"], ...] = PRECISION_NAMES
    """What the machine has no units for says so, and is not measured."""
    tricks: tuple[str, ...] = tuple(name for name, _ in LADDER)
    """The rungs of the ladder to measure, in its own order."""
    peak_size: int | None = None
    """Of the matrices whose product is the peak; None: 2048, on a GPU 8192."""
    memory_gb: float = 2.0
    """For --study batch, except on a GPU: how much a step's tensors may hold, as computed. The process takes
    more: allocator, libraries.
    """
    loss_tokens: int = 1024
    """For --study loss: in a batch."""
    loss_vocab: int = 50304
    """For --study loss: GPT-2's vocabulary, up to a multiple of 64."""
    loss_widths: tuple[int, ...] = (256, 768)
    """For --study loss: of the hidden states."""
    chunk_sizes: tuple[int, ...] = (64, 256)
    """For --study loss: tokens whose logits are in memory at a time."""
    study: Literal["batch", "profile", "loss"] | None = None

    READ_BY: ClassVar = {
        "run": ("seeds", "formats", "tricks", "peak_size", "train.batch_size"),
        "batch": ("memory_gb", "train.seed"),
        "profile": ("formats", "train.batch_size", "train.seed"),
        "loss": ("loss_tokens", "loss_vocab", "loss_widths", "chunk_sizes"),
    }

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        idle["resume"] = "measurements are not gone on with"
        idle["model.vocab_size"] = "it is the tokenizer's"
        if (Path(self.data) / INDEX).exists():
            idle["vocab_size"] = "shards bring their tokenizer"
        if self.study == "loss":
            idle["vocab_size"] = "--loss-vocab gives it"
            for part in ("model", "train"):
                for field in fields(getattr(self, part)):
                    idle[f"{part}.{field.name}"] = "a loss alone is measured, without a model"
            return idle
        for name in ("eval_every", "eval_windows", "checkpoint_every", "log_every", "log_updates"):
            idle[f"train.{name}"] = "a few steps are measured, and nothing is kept"
        return idle

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = Checks(self)
        for name in ("seeds", "formats", "tricks", "loss_widths", "chunk_sizes"):
            checks.require(len(getattr(self, name)) > 0, f"{name} is empty: give at least one")
        rungs = [name for name, _ in LADDER]
        for name in self.tricks:
            checks.require(
                name in rungs, f"tricks: {name!r} is not on the ladder; there are: {', '.join(rungs)}"
            )
        checks.require(self.train.steps >= 4, f"train.steps={self.train.steps}: measuring needs at least 4")
        checks.above(0, "memory_gb")
        checks.at_least(1, "loss_tokens", "loss_vocab")
        checks.require(
            min((*self.loss_widths, *self.chunk_sizes), default=1) >= 1,
            f"loss_widths={self.loss_widths}, chunk_sizes={self.chunk_sizes}: must be at least 1",
        )
        checks.finish()


def smoke() -> Settings:
    s = Settings()
    return replace(
        s,
        preset="smoke",
        vocab_size=280,
        seeds=(1, 2),
        formats=("fp32", "tf32", "bf16"),
        tricks=("eager fp32", "SDPA", "larger batch"),
        peak_size=128,
        memory_gb=0.0015,
        loss_tokens=64,
        loss_vocab=300,
        loss_widths=(16, 32),
        chunk_sizes=(8, 16),
        model=replace(s.model, n_layer=2, n_head=2, n_embd=16, block_size=32),
        train=replace(s.train, steps=4, batch_size=2, block_size=32),
    )


PRESETS = {
    "smoke": smoke(),
    "laptop": Settings(),
    "gpu": Settings(
        preset="gpu",
        model=GPTConfig.preset("gpt2"),
        train=replace(Settings().train, batch_size=8, block_size=1024),
    ),
}


def main(settings: Settings) -> dict[str, float]:
    """Measures formats and tricks, or runs a study. Returns the week's figures."""
    device = pick_device(settings.device)
    base = replace(
        BASE_PRESETS[settings.preset],
        data=settings.data,
        vocab_size=settings.vocab_size,
        train=settings.train,
    )
    corpus = open_corpus(base)
    # Every measurement runs in a process of its own, which gets a copy.
    corpus = replace(corpus, train=corpus.train[: 1 << 22], val=corpus.val[: 1 << 20])
    config = replace(settings.model, vocab_size=corpus.tokenizer.vocab_size)
    work = Workspace(__file__, settings, corpus.name, device)
    if settings.study:
        return STUDIES[settings.study](settings, work, config, corpus)

    check_own_scaler(settings)
    units, why = bf16_units(device)
    print(f"{device_name(device)}: {why}\n")
    bench = Bench(settings, work, config, corpus, find_peaks(settings, device))
    formats = measure_rungs("format", [rung for rung in PRECISIONS if rung[0] in settings.formats], bench)
    ladder = measure_rungs("ladder", [rung for rung in LADDER if rung[0] in settings.tricks], bench)
    fastest = max(ladder, key=lambda row: row["tokens_per_second"])
    log_cards(bench, fastest)
    scales = scaled_training(bench)
    if scales is not None:
        show_scales(scales)
    return work.finish(
        {
            "speedup": fastest["tokens_per_second"] / ladder[0]["tokens_per_second"],
            "tokens_per_second": fastest["tokens_per_second"],
            **format_times(formats),
            "bf16_units": float(units),
            "first_loss": ladder[0]["first_loss"],
            "ln_vocab_size": math.log(config.vocab_size),
            "vocab_size": config.vocab_size,
            **peak_figures(bench.peaks),
        },
        draw,
    )


def log_cards(bench: Bench, fastest: dict[str, Any]) -> None:
    """This machine's fastest row beside GPUs, as a run."""
    rows = compare_cards(bench.config, bench.settings.train.block_size, fastest, bench.work.device)
    here, *cards = rows
    with bench.work.log("cards", bench.settings) as log:
        log.artifact(rows=rows)
        log.finish(
            here_tokens_per_second=here["tokens/s"],
            **{f"{row['where'].replace(' ', '_')}_tokens_per_second": row["tokens/s"] for row in cards},
        )


def format_times(formats: list[dict[str, Any]]) -> dict[str, float | None]:
    """The milliseconds of a step in each format, and bf16's as a multiple of fp32's."""
    milliseconds = {row["step"]: row["ms"] for row in formats}
    times = {f"{name}_ms": ms for name, ms in milliseconds.items()}
    ratio = None
    if "bf16" in milliseconds and "fp32" in milliseconds:
        ratio = milliseconds["bf16"] / milliseconds["fp32"]
    return {**times, "bf16_time_over_fp32": ratio}


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
