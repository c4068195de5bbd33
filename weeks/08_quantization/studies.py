"""Week 8's study: a real model by every scheme of ours and by other libraries."""

import tempfile
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from figures import draw
from measure import (
    as_it_decodes,
    compared,
    file_bytes,
    keep,
    load_studied,
    memory_limit,
    quantized,
    recovered,
    show,
    size_of,
    stored_bytes,
    window_by_window,
)
from memory import study_memory
from names import MEMORY, OUTLIERS
from other_libraries import quiet_libraries, with_others, with_transformers
from outliers import study_outliers
from shared.course.report import read_runs
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus, TokenDataset, fixed_windows, load_corpus, read_text, split_text
from shared.devices import device_name
from shared.evaluation import Evaluation
from shared.models.chat import BASE_MODEL, QUESTIONS, answer_to, is_chat
from shared.models.gpt import GPT
from shared.models.names import run_slug
from shared.quantization.race import SHORT_PROMPT, Contender, our_times, race
from shared.training.profiling import bandwidth

if TYPE_CHECKING:
    from run import Settings

CPU = torch.device("cpu")  # where there are kernels of ours


def study_real_model(settings: "Settings") -> dict[str, float]:
    """`--model` on a CPU: size, perplexity of held-out text, speed, and what it says.

    By every scheme, and by other libraries where they are installed and `settings.others` wants them.
    """
    name, text = read_text(settings.data)
    held_out = np.frombuffer(split_text(text)[1].encode(), np.uint8)
    TokenDataset(
        held_out, settings.study_block_size
    )  # refuses a text that is too short before anything is loaded
    work = Workspace(__file__, settings, name, CPU)
    model = load_studied(settings)
    corpus = load_corpus(settings.data, model.tokenizer, settings.study_block_size)
    windows = fixed_windows(corpus.train, settings.study_block_size, settings.study_calibration_windows)
    ours = quantized(model, windows[0], settings.group_size)
    prompt = corpus.train[: settings.prompt_tokens].tolist()
    speed = bandwidth()
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        contenders = {row: Contender(m, our_times) for row, m in ours.items()}
        if settings.others:
            contenders = with_transformers(model, folder) | contenders | with_others(model)
        times = race(contenders, prompt, settings.new_tokens, settings.rounds)
        rows = _measure(settings, work, corpus, contenders, times, ours=ours, speed=speed)
    with work.log(run_slug(settings.model), settings) as log:
        log.finish(bandwidth=speed, parameters=model.num_parameters(), tokens=rows["fp32"]["tokens"])
    show(rows)
    print(
        f"({device_name(CPU)}, {speed / 1e9:.1f} GB/s; a prompt of {len(prompt)} tokens;"
        f" {settings.new_tokens} new ones after {SHORT_PROMPT})"
    )
    _print_talks(work, settings.model, list(ours))
    if not is_chat(model.tokenizer):
        print(f"({settings.model} is {BASE_MODEL})")
    draw(work.logs, work.reports)
    kept = ("decode_tokens_per_second", "worse")
    return {f"{row}_{key}": metrics[key] for row, metrics in rows.items() for key in kept if key in metrics}


def _measure(
    settings: "Settings",
    work: Workspace,
    corpus: Corpus,
    contenders: dict[str, Contender],
    times: dict[str, dict[str, float]],
    *,
    ours: dict[str, GPT],
    speed: float,
) -> dict[str, dict[str, float]]:
    """The metrics of each contender, kept in the logs. fp32 comes first: the others are compared with it."""
    model = ours["fp32"]
    theirs = "transformers-fp32"
    rows: dict[str, dict[str, float]] = {}

    def evaluations(measured: nn.Module) -> list[Evaluation]:
        return window_by_window(measured, corpus, settings.study_block_size, settings.study_windows)

    base = evaluations(model)
    for row in sorted(contenders, key=lambda row: row != "fp32"):
        measured = contenders[row].model
        metrics = times[row] | {"ours": float(row in ours)}
        if row == theirs:  # the same weights, so the same perplexity
            metrics |= size_of(model, model) | memory_limit(model, speed)
        else:
            metrics |= size_of(measured, model)
            metrics |= compared(base if measured is model else evaluations(measured), base)
            metrics |= memory_limit(measured, speed, None if row in ours else stored_bytes(measured))
            if row in ours:
                windows = (settings.study_block_size, settings.study_windows)
                metrics |= as_it_decodes(ours[row], corpus, *windows, base)
        talk = []
        if row in ours:
            metrics["file_megabytes"] = file_bytes(ours[row]) / 1e6
            metrics |= recovered(rows, row, metrics)
            talk = answers(ours[row], settings.sample_tokens)
        if theirs in times:
            key = "decode_tokens_per_second"
            metrics["over_transformers"] = times[row][key] / times[theirs][key]
        rows[row] = keep(work, f"{run_slug(settings.model)}-{row}", settings, metrics, talk=talk)
        print(f"{row}: measured", flush=True)
    return rows


def answers(model: GPT, tokens: int) -> list[tuple[str, str]]:
    """The course's questions and what the model says, greedily."""
    return [
        (question, answer_to(model, model.tokenizer, question, min(tokens, 40))) for question in QUESTIONS
    ]


def _print_talks(work: Workspace, model: str, rows: list[str]) -> None:
    runs = read_runs(work.logs)
    for row in rows:
        talk = runs[f"{run_slug(model)}-{row}"].artifacts["talk"]
        print(f"\n{row}:\n" + "\n".join(f"> {question}\n{answer}" for question, answer in talk))


STUDIES = {"real": study_real_model, OUTLIERS: study_outliers, MEMORY: study_memory}
