"""Week 2: a neural model over a window of characters, why its first values matter, and the loop that trains
everything from here on.

python weeks/02_mlp/run.py --preset laptop
python weeks/02_mlp/run.py --preset laptop --study window     # how much each further character of context is worth
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from figures import draw
from shared.commandline import cli
from shared.course.workspace import WeekSettings, Workspace
from shared.data.corpus import Corpus, fixed_windows, load_corpus
from shared.evaluation import known_words
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.runtime import pick_device
from shared.sampling import generate
from shared.training import TrainConfig, Trainer


@dataclass(frozen=True)
class Settings(WeekSettings):
    window: int = 8
    """Characters the model sees."""
    n_embd: int = 32
    n_hidden: int = 256
    init_steps: int = 300
    """Length of the two short runs that compare first values."""
    windows: tuple[int, ...] = (1, 2, 4, 16)
    """For --study window, beside the main run's own."""
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


PRESETS = {
    "smoke": Settings(
        preset="smoke",
        n_embd=8,
        n_hidden=32,
        init_steps=20,
        windows=(1, 4),
        train=TrainConfig(
            steps=60, batch_size=16, block_size=32, lr=3e-3, eval_every=20, eval_windows=50, log_updates=True
        ),
    ),
    "laptop": Settings(preset="laptop"),
    "gpu": Settings(preset="gpu"),
}


def main(settings: Settings) -> dict[str, float]:
    """The bigram and the MLP at one budget, then two short runs with good and bad first values. Returns the
    week's figures.
    """
    device = pick_device(settings.device)
    corpus = load_corpus(settings.data, block_size=settings.train.block_size)
    work = Workspace(__file__, settings, corpus.name, device)
    if settings.study == "window":
        return study_window(settings, corpus, work)
    tokenizer, c = corpus.tokenizer, settings.train
    config = WindowMLPConfig(tokenizer.vocab_size, settings.window, settings.n_embd, settings.n_hidden)

    with work.log("bigram", settings) as log:  # week 1's model, as often and on as much text
        bigram = BigramModel(BigramConfig(tokenizer.vocab_size))
        trainer = Trainer(
            bigram,
            corpus,
            replace(c, lr=0.1, weight_decay=0.0, log_updates=False),
            log,
            work.checkpoints / "bigram",
            device=device,
            description="bigram",
        )
        before = log.finish(**trainer.fit(settings.resume))

    with work.log("mlp", settings) as log:
        torch.manual_seed(c.seed)
        model = WindowMLP(config)
        folder = work.checkpoints / "mlp"
        trainer = Trainer(model, corpus, c, log, folder, device=device, description="MLP")
        result = log.finish(**trainer.fit(settings.resume))
        text = tokenizer.decode(list(generate(model, corpus.start, 2000, seed=1)))
        words = known_words(text, tokenizer.decode(corpus.train.tolist()))
        log.artifact(sample=text[:400], known_words=words)

    first = {}
    for init in ("naive", "scaled"):
        with work.log(f"init-{init}", settings) as log:
            torch.manual_seed(c.seed)
            probe = WindowMLP(replace(config, init=init))
            at_start = activations(probe, corpus, c.block_size)
            short = replace(c, steps=settings.init_steps, eval_every=settings.init_steps)
            trainer = Trainer(probe, corpus, short, log, device=device, description=f"{init} first values")
            first[init] = log.finish(**trainer.fit())
            log.artifact(start=at_start, end=activations(probe.cpu(), corpus, c.block_size))

    print(
        f"\nA sample of the MLP's text ({words:.0%} of its words occur in the text it learned):\n{text[:300]}"
    )
    return work.finish(
        {
            "bits_per_byte": result["val_bits_per_byte"],
            "val_loss": result["val_loss"],
            "bigram_val_loss": before["val_loss"],
            "accuracy": result["val_accuracy"],
            "first_loss_naive": first["naive"]["first_loss"],
            "first_loss_scaled": first["scaled"]["first_loss"],
            "known_words": words,
            "parameters": result["parameters"],
            "train_seconds": result["seconds"],
        },
        draw,
    )


def study_window(settings: Settings, corpus: Corpus, work: Workspace) -> dict[str, float]:
    """The same MLP with windows of several sizes, all else equal."""
    losses = {}
    for window in settings.windows:
        with work.log(f"window-{window}", settings) as log:
            torch.manual_seed(settings.train.seed)
            model = WindowMLP(
                WindowMLPConfig(corpus.tokenizer.vocab_size, window, settings.n_embd, settings.n_hidden)
            )
            trainer = Trainer(
                model,
                corpus,
                settings.train,
                log,
                work.checkpoints / log.folder.name,
                device=work.device,
                description=f"window {window}",
            )
            losses[f"window_{window}"] = log.finish(**trainer.fit(settings.resume), window=window)["val_loss"]
    draw(work.logs, work.reports)
    return losses


@torch.no_grad()
def activations(model: WindowMLP, corpus: Corpus, block_size: int) -> dict:
    """A histogram of the hidden layer's values on fixed text, and the share that is saturated (|tanh| above
    0.97).
    """
    values = model.activations(fixed_windows(corpus.val, block_size, 32)[0])
    counts, edges = np.histogram(values.numpy(), bins=50, range=(-1, 1))
    return {"counts": counts, "edges": edges, "saturated": (values.abs() > 0.97).float().mean().item()}


if __name__ == "__main__":
    cli(main, PRESETS, __doc__)
