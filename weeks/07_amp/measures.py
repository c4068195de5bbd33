"""What week 7 measures: formats and tricks as rungs of a ladder, this machine's peaks, and other GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from figures import NOTES, reason
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.devices import device_name
from shared.models.gpt import GPT, GPTConfig
from shared.registry import without_memory
from shared.runtime import table
from shared.training.precision import format_peak, needed_card
from shared.training.profiling import CARDS, USUAL_MFU
from shared.training.tricks import measure_ladder

if TYPE_CHECKING:
    from run import Settings

PEAK_NAMES = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16", "fp16": "float16"}
"""The formats whose products are timed alone, and their names in the logs."""
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
class Bench:
    """What every measurement of the week needs."""

    settings: "Settings"
    work: Workspace
    config: GPTConfig
    corpus: Corpus
    peaks: dict[str, float]
    """The FLOP/s of a large product of matrices, by format."""


def find_peaks(settings: "Settings", device: torch.device) -> dict[str, float]:
    """The peaks of the formats that are measured, and of fp32 and bf16, printed and returned by name."""
    peaks = {}
    for name in PEAK_NAMES:
        if name in (*settings.formats, "fp32", "bf16") and needed_card(name, device) is None:
            peaks[name] = format_peak(name, device, settings.peak_size)
    shares = []
    for name, peak in peaks.items():
        shares.append(f"{peak / 1e9:,.0f} GFLOP/s in {name} ({peak / peaks['fp32']:.2f} x)")
    print(f"products of matrices reach {', '.join(shares)}: the peaks of MFU\n")
    return peaks


def peak_figures(peaks: dict[str, float]) -> dict[str, float]:
    """The peaks under their names in the logs."""
    return {f"{PEAK_NAMES[name]}_peak_flops": peak for name, peak in peaks.items()}


def measure_rungs(kind: str, rungs: Sequence[tuple[str, dict]], bench: Bench) -> list[dict[str, Any]]:
    """Measures rungs, keeps a run for each, and prints the table.

    Returns the rows that could be measured, under the logs' names. Raises ValueError if there is none.
    """
    train = bench.settings.train
    seeds = bench.settings.seeds
    device = bench.work.device
    print(
        f"{TITLES[kind]}: {train.steps} steps of {train.batch_size} x {train.block_size} tokens,"
        f" {len(seeds)} seeds",
        flush=True,
    )
    measured = measure_ladder(
        bench.config, train, device, seeds=seeds, corpus=bench.corpus, ladder=rungs, peaks=bench.peaks
    )
    rows = with_changes([_logged(row, kind) for row in measured], one_base=kind == "format")
    for row in rows:
        with bench.work.log(f"{kind}-{row['step'].replace(' ', '-')}", bench.settings) as log:
            log.finish(**row, **peak_figures(bench.peaks))
    print(table(shown(row) for row in rows))
    print("".join(f"{row['step']}: {row['note']}\n" for row in rows if row["note"] and "ms" in row))
    possible = [row for row in rows if "ms" in row]
    if not possible:
        raise ValueError(f"nothing on this list could be measured on {device}: {rows[0]['note']}")
    return possible


def _logged(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """A measured row under the logs' names."""
    note = row["note"]
    if note and "ms" in row:
        note = note.replace("left out below", NOTES[kind])
    return {"step": row["step"], "note": note} | {KEYS[key]: row[key] for key in row if key in KEYS}


def with_changes(rows: Sequence[dict[str, Any]], one_base: bool) -> list[dict[str, Any]]:
    """The rows with `change`: how many more tokens a second than the row above that was kept, as a share.

    one_base: than the first row.
    """
    changed = []
    base = None
    for row in rows:
        speed = row.get("tokens_per_second")
        changed.append(row | {"change": speed / base - 1 if speed and base else None})
        if speed and not (base and one_base) and not row["note"]:
            base = speed
    return changed


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A logged row for people."""
    if "ms" not in row:
        return {"step": row["step"], "ms": reason(row)}
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
    with without_memory():
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
