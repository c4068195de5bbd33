"""Week 2: a neural model over a window of characters, why its initialization matters, and the loop that
trains everything from here on.

    python weeks/02_mlp/run.py --preset laptop
    # with your own WindowMLP and your own training loop, as far as they are solved
    python weeks/02_mlp/run.py --preset laptop --mine
    # how much each further character of context is worth
    python weeks/02_mlp/run.py --preset laptop --study window
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from figures import draw
from own_loop import check_own_loop, fit_with
from shared import checkpoint
from shared.commandline import cli
from shared.course.exercise.building import computed_by
from shared.course.report import read_runs
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, fixed_windows, load_corpus
from shared.devices import pick_device
from shared.evaluation import known_words
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.sampling import generate
from shared.training import TrainConfig, Trainer
from studies import STUDIES


@dataclass(frozen=True)
class Settings(WeekSettings):
    ANSWERS_IN: ClassVar = ("run",)

    window: int = 8
    """Characters the model sees."""
    n_embd: int = 32
    n_hidden: int = 256
    init_steps: int = 300
    """Length of the two short runs that compare initializations."""
    windows: tuple[int, ...] = (1, 2, 4, 16)
    """For --study window, beside the main run's own."""
    sample_tokens: int = 2000
    """Of the text that the trained model writes."""
    study: Literal["window"] | None = None
    train: TrainConfig = TrainConfig(
        steps=1500,
        batch_size=64,
        block_size=64,
        lr=3e-3,
        warmup_steps=50,
        final_lr=0.05,
        weight_decay=0.01,
        eval_every=250,
        log_updates=True,
    )

    READ_BY: ClassVar = {
        "run": ("window", "init_steps", "sample_tokens"),
        "window": ("windows",),
    }


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        n_embd=8,
        n_hidden=32,
        init_steps=20,
        windows=(1, 4),
        sample_tokens=200,
        train=TrainConfig(
            steps=60, batch_size=16, block_size=32, lr=3e-3, eval_every=20, eval_windows=50, log_updates=True
        ),
    ),
    "laptop": Settings(preset="laptop"),
    "gpu": Settings(preset="gpu"),
}


def main(settings: Settings) -> dict[str, float]:
    """The bigram and the MLP at one budget, then two short runs with a good and a bad initialization.

    Or the study. Returns the week's metrics.
    """
    device = pick_device(settings.device)
    corpus = load_corpus(settings.data, block_size=settings.train.block_size)
    work = Workspace(__file__, settings, corpus.name, device)
    if settings.study:
        return STUDIES[settings.study](settings, corpus, work)
    her_loop = work.mine("train", None)
    if her_loop is not None:
        check_own_loop(settings)
    bigram = train_bigram(settings, corpus, work)
    mlp = train_mlp(settings, corpus, work, her_loop)
    starts = train_from_both_initializations(settings, corpus, work)
    share = f"{mlp['known_words']:.0%}"
    sample = read_runs(work.logs)["mlp"].artifacts["sample"]
    print(
        f"\nA sample of the MLP's text ({share} of its words occur in the text it learned):\n{sample[:300]}"
    )
    return work.finish(
        {
            "bits_per_byte": mlp["val_bits_per_byte"],
            "val_loss": mlp["val_loss"],
            "bigram_val_loss": bigram["val_loss"],
            "accuracy": mlp["val_accuracy"],
            "first_loss_naive": starts["naive"]["first_loss"],
            "first_loss_scaled": starts["scaled"]["first_loss"],
            "known_words": mlp["known_words"],
            "parameters": mlp["parameters"],
            "train_seconds": mlp["seconds"],
        },
        draw,
    )


def train_bigram(settings: Settings, corpus: Corpus, work: Workspace) -> dict[str, Any]:
    """Week 1's model, trained as often and on as much text as the MLP."""
    config = replace(settings.train, lr=0.1, weight_decay=0.0, log_updates=False)
    with work.log("bigram", settings) as log:
        torch.manual_seed(settings.train.seed)
        model = BigramModel(BigramConfig(corpus.tokenizer.vocab_size))
        folder = work.checkpoints / "bigram"
        trainer = Trainer(model, corpus, config, log, folder, device=work.device, description="bigram")
        return log.finish(**trainer.fit(settings.resume))


def mlp_config(settings: Settings, corpus: Corpus) -> WindowMLPConfig:
    """The MLP's sizes on this text."""
    vocab_size = corpus.tokenizer.vocab_size
    return WindowMLPConfig(vocab_size, settings.window, settings.n_embd, settings.n_hidden)


def train_mlp(
    settings: Settings, corpus: Corpus, work: Workspace, her_loop: Callable[..., Any] | None
) -> dict[str, Any]:
    """The MLP's summary, with the share of known words in what it writes.

    With --mine, the learner's `WindowMLP` computes it, where it is solved. her_loop: her `train`; None takes
    the Trainer.
    """
    tokenizer = corpus.tokenizer
    with work.log("mlp", settings) as log:
        torch.manual_seed(settings.train.seed)
        config = mlp_config(settings, corpus)
        model = WindowMLP(config)
        her_model = work.mine("WindowMLP", None)
        if her_model is not None:
            computed_by(model, her_model(config.vocab_size, config.window, config.n_embd, config.n_hidden))
        folder = work.checkpoints / "mlp"
        trainer = Trainer(model, corpus, settings.train, log, folder, device=work.device, description="MLP")
        if her_loop is None:
            summary = trainer.fit(settings.resume)
        else:
            summary = fit_with(her_loop, trainer, log)
            checkpoint.save(model, folder / "last", tokenizer, trainer.final)
        result = log.finish(**summary)
        text = tokenizer.decode(list(generate(model, corpus.start, settings.sample_tokens, seed=1)))
        words = known_words(text, tokenizer.decode(corpus.train.tolist()))
        log.artifact(sample=text[:400], known_words=words)
    return result | {"known_words": words}


def train_from_both_initializations(
    settings: Settings, corpus: Corpus, work: Workspace
) -> dict[str, dict[str, Any]]:
    """A short run from the naive and one from the scaled initialization, with the hidden layer's values in
    both.
    """
    block_size = settings.train.block_size
    steps = settings.init_steps
    warmup = min(settings.train.warmup_steps, steps)
    short = replace(settings.train, steps=steps, eval_every=steps, warmup_steps=warmup)
    summaries = {}
    for init in ("naive", "scaled"):
        with work.log(f"init-{init}", settings) as log:
            torch.manual_seed(settings.train.seed)
            model = WindowMLP(replace(mlp_config(settings, corpus), init=init))
            start = activations(model, corpus, block_size)
            name = f"{init} initialization"
            trainer = Trainer(model, corpus, short, log, device=work.device, description=name)
            summaries[init] = log.finish(**trainer.fit())
            log.artifact(start=start, end=activations(model.cpu(), corpus, block_size))
    return summaries


@torch.no_grad()
def activations(model: WindowMLP, corpus: Corpus, block_size: int) -> dict[str, Any]:
    """The hidden layer's values on fixed text: a histogram, and the share that is saturated.

    A value counts as saturated where |tanh| is above 0.97.
    """
    values = model.activations(fixed_windows(corpus.val, block_size, 32)[0])
    counts, edges = np.histogram(values.numpy(), bins=50, range=(-1, 1))
    return {"counts": counts, "edges": edges, "saturated": (values.abs() > 0.97).float().mean().item()}


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
