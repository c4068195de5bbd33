"""Week 6's longer studies, which `--study NAME` runs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from figures import draw
from shared.course.workspace import Workspace
from shared.data.corpus import read_text, split_text
from shared.data.shards import INDEX
from shared.models.chat import IM_END, QUESTIONS, chat_prompt
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import load_smollm2
from shared.runtime import clock, device_name, pick_device, table
from shared.sampling import generate
from shared.training import TrainConfig
from shared.training.base_model import (
    BASE_PRESETS,
    open_corpus,
    train_model,
)
from shared.training.execution import ALONE, Precision
from shared.training.profiling import CARDS, USUAL_MFU, in_own_process, matmul_peak, measure_training
from shared.zero_shot.scoring import sliding_window
from shared.zero_shot.tasks import load_task, run_task

if TYPE_CHECKING:
    from run import Settings

PUBLISHED = {
    "piqa_acc_norm": 0.669
}  # SmolLM2-135M-Instruct under lm-eval, unquantized, on all 1,838 examples
GPT2 = {
    "lambada_acc": 0.3256,
    "lambada_perplexity": 40.06,
    "piqa_acc": 0.6289,
}  # GPT-2 124M under lm-eval, on all examples
FULL_RUN = 10_000_000_000  # tokens: what takes GPT-2 124M to a validation loss of 3.29 on FineWeb-Edu


def study_text(settings: "Settings") -> tuple[str, str]:
    """The name and the text that a study reads. Shards hold no text: then tinyshakespeare, said aloud."""
    if settings.data == BASE_PRESETS["gpu"].data or (Path(settings.data) / INDEX).exists():
        print(f"{settings.data} is a folder for shards, which hold no text: this study takes tinyshakespeare")
        return read_text("tinyshakespeare")
    return read_text(settings.data)


def study_shape(settings: "Settings") -> dict[str, float]:
    """The same tokens and steps with the blocks that GPT-2 had."""
    corpus = open_corpus(settings)
    work = Workspace(__file__, settings, corpus.name, pick_device(settings.device))
    classic = {
        f: getattr(GPTConfig(), f)
        for f in ("norm", "position", "mlp", "bias", "tie_weights", "qk_norm", "zero_init")
    }
    changed = replace(settings, model=replace(settings.model, **classic))
    with work.log("shape-gpt2", changed) as log:
        result = log.finish(**train_model(changed, corpus, work, log, ALONE, name="shape-gpt2"))
    print(
        "\n"
        + table(
            [
                {
                    "run": "GPT-2's own blocks",
                    "bits per byte": result["best_val_bits_per_byte"],
                    "seconds": result["seconds"],
                }
            ]
        )
    )
    draw(work.logs, work.reports)
    return result


def study_smollm2(settings: "Settings") -> dict[str, float]:
    """A model that others trained, in our GPT: on the week's held-out text, on two tasks, and in
    conversation.
    """
    device = pick_device(settings.device)
    name, text = study_text(settings)
    work = Workspace(__file__, settings, name, device)
    started = clock()
    model, tokenizer = load_smollm2()
    found = {"load_seconds": clock() - started, "parameters": model.num_parameters()}
    model.to(device)
    with work.log("smollm2", settings) as log:
        read = sliding_window(
            model, tokenizer, split_text(text)[1], stride=512, block_size=1024, progress=True
        )
        found |= {
            "bits_per_byte": read.bits_per_byte,
            "text_perplexity": read.perplexity,
            "text_tokens": read.tokens,
        }
        for task in ("lambada", "piqa"):
            result = run_task(model, tokenizer, task, load_task(task)[: settings.limit], progress=True)
            found |= {f"{task}_{metric}": value for metric, value in result.metrics.items()} | {
                f"{task}_examples": len(result.records)
            }
            found |= {f"{task}_{metric}_error": value for metric, value in result.standard_errors.items()}
        talk, written, writing = [], 0, clock()
        for question in QUESTIONS:
            ids = chat_prompt(tokenizer, [{"role": "user", "content": question}])
            answer = list(generate(model, ids, 60, temperature=0, stop=[tokenizer.special_tokens[IM_END]]))
            talk.append((question, tokenizer.decode(answer).removesuffix(IM_END).strip()))
            written += len(answer)
        found["generated_tokens_per_second"] = written / (clock() - writing)
        log.artifact(talk=talk)
        log.finish(**found)
    print("\n" + "\n\n".join(f"> {question}\n{answer}" for question, answer in talk))
    rows = [
        {
            "what": k,
            "SmolLM2 here": found[k],
            "standard error": found.get(f"{k}_error"),
            "published": PUBLISHED.get(k),
            "GPT-2 124M, published": GPT2.get(k),
        }
        for k in (
            "bits_per_byte",
            "text_perplexity",
            "lambada_acc",
            "lambada_perplexity",
            "piqa_acc",
            "piqa_acc_norm",
        )
    ]
    print("\n" + table(rows))
    draw(work.logs, work.reports)
    return found


def study_cost(settings: "Settings") -> dict[str, float]:
    """What steps of a real size take here, each kind in a process of its own; and a whole run's hours and
    dollars on common cards.
    """
    device = pick_device(settings.device)
    work = Workspace(__file__, settings, study_text(settings)[0], device)
    config = GPTConfig.preset(settings.measured)
    train = TrainConfig(
        steps=6, batch_size=1, block_size=config.block_size, lr=6e-4, warmup_steps=10, beta2=0.95
    )
    kinds: dict[str, dict] = {"float32": {}, "float32, recomputed": {"recompute": True}}
    if device.type == "cuda":
        train, bf16 = replace(train, steps=20, batch_size=16), {"precision": Precision(torch.bfloat16)}
        kinds |= {"bfloat16": bf16, "bfloat16, compiled": bf16 | {"compile_model": True}}
        kinds["bfloat16, compiled, recomputed"] = kinds["bfloat16, compiled"] | {"recompute": True}
    peaks = {
        dtype: matmul_peak(device, dtype)
        for dtype in {k.get("precision", Precision()).dtype for k in kinds.values()}
    }
    steps = {}
    for name, how in kinds.items():
        peak = peaks[how.get("precision", Precision()).dtype]
        with work.log("cost-" + name.replace(", ", "-"), settings) as log:
            cost = in_own_process(measure_training, config, train, device, **how)
            steps[name] = log.finish(
                name=name,
                seconds=cost.seconds,
                tokens_per_second=cost.tokens_per_second,
                mfu=cost.flops / peak,
                peak_flops=peak,
                gigabytes=cost.memory and cost.memory / 1e9,
                kept_gigabytes=cost.kept / 1e9,
                first_loss=cost.losses[0],
                last_loss=cost.losses[-1],
            )
    shown = {
        "seconds": "seconds",
        "tokens_per_second": "tokens/s",
        "mfu": "MFU",
        "gigabytes": "peak GB",
        "kept_gigabytes": "kept GB",
        "first_loss": "first loss",
    }
    print(
        f"\n{settings.measured}, {train.batch_size} x {train.block_size} tokens a step, on"
        f" {device_name(device)}"
    )
    print(
        table(
            [
                {"step": name} | {label: step[key] for key, label in shown.items()}
                for name, step in steps.items()
            ]
        )
    )
    reached = ", ".join(
        f"{peak / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype, peak in peaks.items()
    )
    print(
        f"(MFU: of what products of matrices reach here, {reached}; kept: from the forward pass for the"
        " backward)"
    )
    mfu = max(step["mfu"] for step in steps.values())
    bill = price_list(config, mfu)
    years = FULL_RUN / max(step["tokens_per_second"] for step in steps.values()) / (365 * 86400)
    print(
        f"\n{FULL_RUN / 1e9:.0f} B tokens would take {years:.2f} years here. On cards one can rent, computed,"
        f" not measured:\n{table(bill)}"
    )
    print(
        f"(at the best MFU measured above, {mfu:.2f}, and at {USUAL_MFU}, which is usual there; rents are"
        " assumptions)"
    )
    with work.log("cost", settings) as log:
        flat = {
            f"{row['card'].replace(' ', '_')}_{key.replace(' ', '_')}": v
            for row in bill
            for key, v in row.items()
            if key != "card"
        }
        log.artifact(bill=bill)
        log.finish(mfu=mfu, years_here=years, **flat)
    draw(work.logs, work.reports)
    return {name: step["seconds"] for name, step in steps.items()}


def price_list(config: GPTConfig, mfu: float) -> list[dict]:
    """Hours and dollars for FULL_RUN tokens on each card, computed from the model's FLOPs, at `mfu` and at
    USUAL_MFU.
    """
    with torch.device("meta"):
        flops = GPT(config).flops_per_token(config.block_size)
    rows = []
    for card, (teraflops, rent) in CARDS.items():
        row = {"card": card, "TFLOP/s": teraflops, "$ an hour": rent}
        for label, share in (("measured", mfu), ("usual", USUAL_MFU)):
            hours = FULL_RUN * flops / (teraflops * 1e12 * share) / 3600
            row |= {f"hours, {label} MFU": round(hours, 1), f"$, {label} MFU": round(hours * rent)}
        rows.append(row)
    return rows
