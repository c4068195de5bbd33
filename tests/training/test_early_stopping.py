"""shared/training/trainer.py: stopping early on the validation loss."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from shared.training import Callback, TrainConfig, Trainer
from shared.training.tasks import NextToken
from tests.training.helpers import QUICK, all_equal, at_training_step, small_gpt, weights

LOSSES = [3.0, 2.0, 2.5, 1.5, 1.6, 1.5, 1.7, 1.0]
"""The lowest before a patience of 3 is at an end is the fourth: an equal one is not lower."""
EACH = replace(QUICK, steps=8, eval_every=1, checkpoint_every=100)


class Measured(NextToken):
    """Its evaluations give the validation losses of a list, by the number of the step."""

    def __init__(self, corpus, losses):
        super().__init__(corpus)
        self.losses = iter(losses)

    def evaluate(self, model, config, device):
        return {"val_loss": next(self.losses)}


@pytest.mark.parametrize(
    ("patience", "losses", "steps", "best"),
    [
        (3, LOSSES, 7, 4),
        (1, LOSSES, 3, 2),
        (4, LOSSES, 8, 8),
        (None, LOSSES, 8, 8),
        (2, [1.0, math.nan, math.nan, 0.5], 3, 1),
    ],
)
def test_training_stops_after_so_many_evaluations_without_a_new_lowest_loss(
    corpus, tmp_path, capsys, *, patience, losses, steps, best
):
    """By a reference written out here: count since the minimum."""
    config = replace(EACH, patience=patience)
    trainer = Trainer(small_gpt(corpus), Measured(corpus, losses), config, checkpoints=tmp_path)
    summary = trainer.fit()
    assert (summary["steps"], summary["best_step"]) == (steps, best)
    assert ("stopped early, at step" in capsys.readouterr().out) == (steps < 8)


def test_a_run_that_stopped_early_is_saved_and_stays_stopped_when_resumed(corpus, tmp_path):
    config = replace(EACH, patience=3)
    first = Trainer(small_gpt(corpus), Measured(corpus, LOSSES), config, checkpoints=tmp_path)
    first.fit()
    again = Trainer(small_gpt(corpus), Measured(corpus, []), config, checkpoints=tmp_path)
    assert again.fit(resume=True)["steps"] == 7
    assert all_equal(weights(first.model), weights(again.model))


def test_the_count_survives_an_interruption(corpus, tmp_path):
    """Interrupted two evaluations after the lowest: the third after it ends the run."""

    config = replace(EACH, patience=3)
    first = Trainer(small_gpt(corpus), Measured(corpus, LOSSES), config, checkpoints=tmp_path)
    at_training_step(first.model, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    assert first.step == 6
    again = Trainer(small_gpt(corpus), Measured(corpus, LOSSES[6:]), config, checkpoints=tmp_path)
    assert again.fit(resume=True)["steps"] == 7


def test_a_patience_of_no_evaluation_is_refused():
    with pytest.raises(ValueError, match="patience=0: must be at least 1"):
        TrainConfig(patience=0)


def test_early_stopping_keeps_the_weights_of_the_lowest_loss(corpus, tmp_path):
    kept: dict[int, list[torch.Tensor]] = {}

    class Keep(Callback):
        def on_step(self, trainer):
            kept[trainer.step] = weights(trainer.model)

    config = replace(EACH, patience=3)
    trainer = Trainer(
        small_gpt(corpus),
        Measured(corpus, LOSSES),
        config,
        checkpoints=tmp_path,
        callbacks=[Keep()],
    )
    trainer.fit()
    assert all_equal(weights(trainer.take_best()), kept[4])
