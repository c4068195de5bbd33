"""Week 7's longer studies, which `--study NAME` runs."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from figures import draw
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.models.gpt import GPTConfig
from shared.runtime import device_name, table
from shared.training.memory import find_batch
from shared.training.profiling import in_own_process
from shared.training.tricks import USUAL, profile_training

if TYPE_CHECKING:
    from run import Settings


def study_batch(settings: "Settings", work: Workspace, config: GPTConfig, corpus: Corpus) -> dict[str, float]:
    """The largest batch within the memory, and the one with the most tokens a second."""
    memory = None if work.device.type == "cuda" else int(settings.memory_gb * 1e9)
    with work.log("batch", settings) as log:
        largest, fastest, rows = find_batch(config, settings.train, work.device, memory, limit=256)
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


STUDIES = {"batch": study_batch, "profile": study_profile}
