"""Week 2's study, which `--study window` runs."""

from typing import TYPE_CHECKING

import torch

from figures import draw
from shared.course.workspace import Workspace
from shared.data.corpus import Corpus
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.training import Trainer

if TYPE_CHECKING:
    from run import Settings


def study_window(settings: "Settings", corpus: Corpus, work: Workspace) -> dict[str, float]:
    """The same MLP with windows of several sizes, all else equal."""
    losses = {}
    for window in settings.windows:
        run = f"window-{window}"
        with work.log(run, settings) as log:
            torch.manual_seed(settings.train.seed)
            vocab_size = corpus.tokenizer.vocab_size
            config = WindowMLPConfig(vocab_size, window, settings.n_embd, settings.n_hidden)
            trainer = Trainer(
                WindowMLP(config),
                corpus,
                settings.train,
                log,
                work.checkpoints / run,
                device=work.device,
                description=f"window {window}",
            )
            summary = log.finish(**trainer.fit(settings.resume), window=window)
        losses[f"window_{window}"] = summary["val_loss"]
    draw(work.logs, work.reports)
    return losses


STUDIES = {"window": study_window}
