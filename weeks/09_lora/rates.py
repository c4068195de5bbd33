"""Week 9's studies of what a comparison hides: the learning rate, and how often a base was rounded."""

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from figures import rates_figure
from fine_tuning import (
    load_base,
    observe,
    peak_rate,
    read_talks,
    share_in_form,
    task_of,
    text_perplexity,
    train_config,
    trainable,
)
from names import kept_under, model_name, trial_name
from shared.adapters.sft import Talks
from shared.course.report import save_figure
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.devices import device_of, pick_device
from shared.models.gpt import GPT
from shared.quantization import quantize
from shared.runtime import table
from shared.training import TrainConfig, Trainer

if TYPE_CHECKING:
    from run import Settings


def study_rates(settings: "Settings", preset: "Settings") -> dict[str, float]:
    """Each of `compared` at the same number of learning rates: those that suit its method, times each of
    `rate_factors`. A log for each trial; the best of each is printed.
    """
    talks = read_talks(settings)
    model, corpus = load_base(settings)
    work = Workspace(__file__, settings, corpus.name, torch.device("cpu"), name=kept_under(settings))
    best: dict[str, dict[str, float]] = {}
    for name in settings.compared:
        row = settings.row(name)
        for factor in settings.rate_factors:
            trial = replace(row, lr=float(f"{peak_rate(row) * factor:.3g}"))
            result = _trial(trial, work, deepcopy(model), talks, corpus)
            if name not in best or result["best_val_loss"] < best[name]["best_val_loss"]:
                best[name] = result
    print("\n" + table([{"method": name} | result for name, result in best.items()]))
    save_figure(rates_figure(work.logs), work.reports / "rates.png")
    return {f"{name}_{key}": result[key] for name, result in best.items() for key in ("lr", "best_val_loss")}


def _trial(trial: "Settings", work: Workspace, model: GPT, talks: Talks, corpus: Corpus) -> dict[str, float]:
    """Trains one copy of the base at one rate, and measures what `run.py` measures of a run."""
    device = pick_device(trial.device, say=lambda line: None)
    task = task_of(trial, model, talks)
    questions = [talk[:-1] for talk in talks.held_out[: trial.questions]]
    model.to(device)
    before = text_perplexity(model, corpus, trial)
    first_tokens = task.template.prompt([{"role": "user", "content": "?"}])
    tuned = trainable(model, trial, first_tokens).to(device)
    name = trial_name(trial.run, trial.lr)
    with work.log(name, trial) as log:
        config = train_config(trial, task)
        trainer = Trainer(tuned, task, config, log, work.checkpoints / name, device=device, description=name)
        summary = trainer.fit()
        after = observe(trainer.take_best(), corpus, task.template, questions, trial)
        result = {
            "lr": config.lr,
            "best_val_loss": summary["best_val_loss"],
            "in_form": share_in_form(after.answers, trial),
            "forgotten": after.text_perplexity / before - 1,
        }
        return log.finish(steps=summary["steps"], **{k: v for k, v in result.items() if v is not None})


def study_rounding(settings: "Settings", preset: "Settings") -> dict[str, float]:
    """What rounding the base costs by itself, before anything is trained: the loss on the held-out answers
    and the perplexity on the old text, as the model is loaded and in each scheme. SmolLM2 and Gemma 3 come in
    4 bits: the schemes round them a second time.
    """
    talks = read_talks(settings)
    model, corpus = load_base(settings)
    task = task_of(settings, model, talks)
    work = Workspace(__file__, settings, corpus.name, torch.device("cpu"), name=kept_under(settings))
    rows = []
    with work.log(f"rounding-{model_name(settings.model)}") as log:
        for scheme in (None, "int8", "nf4"):
            rounded = deepcopy(model)
            if scheme is not None:
                quantize(rounded, scheme)
            loss = task.evaluate(rounded, TrainConfig(batch_size=4), device_of(rounded))["val_loss"]
            name = scheme or "as_loaded"
            rows.append(
                {"base": name, "loss": loss, "perplexity": text_perplexity(rounded, corpus, settings)}
            )
        print("\n" + table(rows))
        figures = {f"{row['base']}_{key}": row[key] for row in rows for key in ("loss", "perplexity")}
        return log.finish(**figures)
