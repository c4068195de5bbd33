"""Week 7: what makes a training step faster, and what makes it smaller, measured on this machine.

python weeks/07_amp/run.py --preset laptop                    # number formats, then a ladder of tricks, three seeds each
python weeks/07_amp/run.py --preset laptop --study batch      # the largest batch that fits, and the fastest
python weeks/07_amp/run.py --preset laptop --study profile    # where the time of a step goes, in fp32 and in bf16
python weeks/07_amp/run.py --preset gpu                       # the same with GPT-2's blocks, on a GPU; the studies too
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from figures import NOTES, draw
from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import device_name, pick_device, table
from shared.training import TrainConfig
from shared.training.base_model import BASE_PRESETS, open_corpus
from shared.training.precision import bf16_units
from shared.training.profiling import CARDS, USUAL_MFU, matmul_peak
from shared.training.tricks import LADDER, PRECISIONS, measure_ladder
from studies import study_batch, study_profile

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEYS = {
    "ms": "ms",
    "tokens/s": "tokens_per_second",
    "memory": "bytes",
    "MFU": "mfu",
    "first loss": "first_loss",
    "loss": "loss",
    "spread": "spread",
}
"""A measured row's names, and those in the logs."""
TITLES = {"format": "the same training in each number format", "ladder": "one trick after the other"}


@dataclass(frozen=True)
class Settings(WeekSettings):
    vocab_size: int = 1024
    """Of the tokenizer, week 5's."""
    model: GPTConfig = GPTConfig.preset("mini", block_size=256)
    """Week 6's; its vocabulary is the tokenizer's."""
    train: TrainConfig = TrainConfig(
        steps=10, batch_size=3, block_size=256, lr=3e-3, warmup_steps=3, beta2=0.95
    )
    """What is measured: so many steps of so many tokens."""
    seeds: tuple[int, ...] = (1, 2, 3)
    formats: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
    tricks: tuple[str, ...] = tuple(name for name, _ in LADDER)
    """The rungs of the ladder to measure, in its own order."""
    peak_size: int | None = None
    """Of the matrices whose product is the peak; None: 2048, on a GPU 8192."""
    memory_gb: float = 2.0
    """For --study batch, except on a GPU: how much a step's tensors may hold, as computed. The process takes
    more: allocator, libraries.
    """
    study: Literal["batch", "profile"] | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is empty: give at least one"
            for name in ("seeds", "formats", "tricks")
            if not getattr(self, name)
        ]
        names = [name for name, _ in LADDER]
        problems += [
            f"tricks: {name!r} is not on the ladder; there are: {', '.join(names)}"
            for name in self.tricks
            if name not in names
        ]
        problems += [f"train.steps={self.train.steps}: measuring needs at least 4"] * (self.train.steps < 4)
        problems += [f"memory_gb={self.memory_gb}: must be above 0"] * (not self.memory_gb > 0)
        if problems:
            raise ValueError("; ".join(problems))


def smoke() -> Settings:
    s = Settings()
    return replace(
        s,
        preset="smoke",
        vocab_size=280,
        seeds=(1, 2),
        formats=("fp32", "bf16"),
        tricks=("eager fp32", "SDPA", "larger batch"),
        peak_size=128,
        memory_gb=0.0015,
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
    corpus = open_corpus(
        replace(
            BASE_PRESETS[settings.preset],
            data=settings.data,
            vocab_size=settings.vocab_size,
            train=settings.train,
        )
    )
    corpus = replace(
        corpus, train=corpus.train[: 1 << 22], val=corpus.val[: 1 << 20]
    )  # every measurement's process gets a copy
    config = replace(settings.model, vocab_size=corpus.tokenizer.vocab_size)
    work = Workspace(__file__, settings, corpus.name, device)
    if settings.study:
        return {"batch": study_batch, "profile": study_profile}[settings.study](
            settings, work, config, corpus
        )
    units, why = bf16_units(device)
    print(f"{device_name(device)}: {why}\n")
    peaks = {
        dtype: matmul_peak(device, dtype, settings.peak_size)
        for name, dtype in FORMATS.items()
        if name in (*settings.formats, "fp32", "bf16")
    }
    share = lambda dtype: (
        f"{peaks[dtype] / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}"
        f" ({peaks[dtype] / peaks[torch.float32]:.2f} x)"
    )
    print("products of matrices reach " + ", ".join(map(share, peaks)) + ": the peaks of MFU\n")
    formats = measure(
        "format",
        [rung for rung in PRECISIONS if rung[0] in settings.formats],
        settings,
        work,
        config,
        corpus,
        peaks,
    )
    ladder = measure(
        "ladder",
        [rung for rung in LADDER if rung[0] in settings.tricks],
        settings,
        work,
        config,
        corpus,
        peaks,
    )
    fastest = max(ladder, key=lambda row: row["tokens_per_second"])
    rows = compare_cards(config, settings.train.block_size, fastest, device)
    with work.log("cards", settings) as log:
        log.artifact(rows=rows)
        log.finish(
            here_tokens_per_second=rows[0]["tokens/s"],
            **{f"{row['where'].replace(' ', '_')}_tokens_per_second": row["tokens/s"] for row in rows[1:]},
        )
    by_format = {row["step"]: row["ms"] for row in formats}
    return work.finish(
        {
            "speedup": fastest["tokens_per_second"] / ladder[0]["tokens_per_second"],
            "tokens_per_second": fastest["tokens_per_second"],
            **{f"{name}_ms": ms for name, ms in by_format.items()},
            "bf16_time_over_fp32": (
                by_format["bf16"] / by_format["fp32"] if {"bf16", "fp32"} <= by_format.keys() else None
            ),
            "bf16_units": float(units),
            "first_loss": ladder[0]["first_loss"],
            "ln_vocab_size": math.log(config.vocab_size),
            "vocab_size": config.vocab_size,
            **{f"{str(dtype).removeprefix('torch.')}_peak_flops": peak for dtype, peak in peaks.items()},
        },
        draw,
    )


def measure(
    kind: str,
    rungs: list[tuple[str, dict]],
    settings: Settings,
    work: Workspace,
    config: GPTConfig,
    corpus: Corpus,
    peaks: dict[torch.dtype, float],
) -> list[dict[str, Any]]:
    """Measures rungs, keeps a run for each, prints the table, and returns the rows that could be measured,
    under the logs' names.
    """
    t = settings.train
    print(
        f"{TITLES[kind]}: {t.steps} steps of {t.batch_size} x {t.block_size} tokens, {len(settings.seeds)}"
        " seeds",
        flush=True,
    )
    found = measure_ladder(
        config, t, work.device, seeds=settings.seeds, corpus=corpus, ladder=rungs, peaks=peaks
    )
    for row in found:
        row["note"] = row["note"] and row["note"].replace("left out below", NOTES[kind])
    named = [
        {"step": row["step"], "note": row["note"]}
        | {KEYS[key]: value for key, value in row.items() if key in KEYS}
        for row in found
    ]
    rows = with_changes(named, one_base=kind == "format")
    for row in rows:
        with work.log(f"{kind}-{row['step'].replace(' ', '-')}", settings) as log:
            log.finish(
                **row,
                **{f"{str(dtype).removeprefix('torch.')}_peak_flops": peak for dtype, peak in peaks.items()},
            )
    print(table(shown(row) for row in rows))
    print("".join(f"{row['step']}: {row['note']}\n" for row in rows if row["note"]))
    measured = [row for row in rows if "ms" in row]
    if not measured:
        raise ValueError(f"nothing on this list could be measured on {work.device}: {rows[0]['note']}")
    return measured


def with_changes(rows: Sequence[dict[str, Any]], one_base: bool) -> list[dict[str, Any]]:
    """The rows, with `change`: how many more tokens a second than the row above that was kept, or (one_base)
    than the first.
    """
    changed, base = [], None
    for row in rows:
        speed = row.get("tokens_per_second")
        changed.append(row | {"change": speed / base - 1 if speed and base else None})
        if speed and not (base and one_base) and not row["note"]:
            base = speed
    return changed


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A logged row for people."""
    if "ms" not in row:
        return {"step": row["step"], "ms": "not measured"}
    return {
        "step": row["step"],
        "ms": round(row["ms"], 1),
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "change": None if row["change"] is None else f"{100 * row['change']:+.0f} %",
        "peak MB": row["bytes"] and round(row["bytes"] / 1e6),
        "MFU": round(row["mfu"], 2),
        "loss": f"{row['loss']:.3f}",
        "seeds differ by": f"{row['spread']:.3f}",
    }


def compare_cards(
    config: GPTConfig, block_size: int, fastest: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    """This machine's fastest row beside cards, computed from the same FLOPs; printed and returned."""
    with torch.device("meta"):
        flops = GPT(config).flops_per_token(block_size)
    rows = [
        {
            "where": device_name(device),
            "tokens/s": fastest["tokens_per_second"],
            "MFU": fastest["mfu"],
            "how": f"measured ({fastest['step']})",
        }
    ]
    for card, (teraflops, _) in CARDS.items():
        rows.append(
            {
                "where": card,
                "tokens/s": teraflops * 1e12 * USUAL_MFU / flops,
                "MFU": USUAL_MFU,
                "how": "computed, not measured",
            }
        )
    print(f"this machine beside GPUs, {flops / 1e6:,.1f} MFLOP for each token")
    print(table(row | {"tokens/s": f"{row['tokens/s']:,.0f}", "MFU": round(row["MFU"], 2)} for row in rows))
    print(
        f"(computed: the maker's 16-bit FLOP/s times an assumed MFU of {USUAL_MFU}. Only large models keep a"
        " GPU so busy: read upper bounds)"
    )
    return rows


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
