"""shared/training/optim.py with the Trainer: optimizers that somebody else made are scheduled, saved and
resumed as the built ones.
"""

import copy
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from shared.quantization.adamw import AdamW8bit
from shared.training import Trainer, lr_at
from shared.training.optim import build_optimizers
from shared.training.resume import optimizer_tensors, restore_optimizer
from tests.training.helpers import QUICK, all_equal, at_training_step, small_gpt, timeless, weights

SCHEDULED = replace(QUICK, steps=8, warmup_steps=2, schedule="linear", eval_every=4, checkpoint_every=3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def in_8_bits(model):
    return AdamW8bit(model.parameters(), lr=1e-2)


def two(model):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [torch.optim.NAdam(matrices, lr=1e-2), torch.optim.RMSprop([{"params": others, "lr": 1e-3}])]


class OwnCount(torch.optim.SGD):
    """Keeps its steps as a plain number, as some optimizers do, and nothing as None."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["decay"] = state.get("decay", 1.0) * 0.9
                state["unused"] = None
                p.data.mul_(1 - state["decay"] / 10 ** state["count"])


def counting(model):
    return OwnCount(model.parameters(), lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sgd, plain_sgd, in_8_bits, two, counting])
def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path, make):
    def trainer(folder):
        model = small_gpt(corpus, dropout=0.2)
        return Trainer(model, corpus, SCHEDULED, checkpoints=tmp_path / folder, optimizers=make(model))

    whole = trainer("whole")
    whole.fit()
    cut = trainer("cut")
    at_training_step(cut.model, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    resumed = trainer("cut")
    resumed.fit(resume=True)
    assert all_equal(weights(whole.model), weights(resumed.model))
    rest = [timeless(row) for row in whole.history if row["step"] > 5]
    assert [timeless(row) for row in resumed.history] == rest


@pytest.mark.slow
def test_sgd_follows_the_schedule_from_its_groups_own_rates_against_a_loop_written_out(corpus):
    model = small_gpt(corpus)
    own = copy.deepcopy(model)
    groups = [[p for p in model.parameters() if (p.dim() >= 2) == wide] for wide in (True, False)]
    optimizer = torch.optim.SGD([{"params": groups[0], "lr": 0.1}, {"params": groups[1], "lr": 0.5}])
    config = replace(SCHEDULED, grad_clip=0.0)
    trainer = Trainer(model, corpus, config, optimizers=optimizer)
    trainer.fit()
    stream = trainer.task.batches(config, 0, 0, 1)
    for step in range(config.steps):
        ids, targets = next(stream)
        loss = nn.functional.cross_entropy(own(ids).flatten(0, 1), targets.flatten())
        gradients = torch.autograd.grad(loss, list(own.parameters()))
        share = lr_at(step, config) / config.lr
        with torch.no_grad():
            for p, gradient in zip(own.parameters(), gradients):
                p -= gradient * share * (0.1 if p.dim() >= 2 else 0.5)
    for a, b in zip(model.parameters(), own.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    logged = [row["lr"] for row in trainer.history if "lr" in row]
    assert logged == pytest.approx([0.1 * lr_at(s, config) / config.lr for s in range(config.steps)])


@pytest.mark.slow
def test_the_built_optimizer_given_from_outside_trains_the_same(corpus):
    usual = Trainer(small_gpt(corpus), corpus, SCHEDULED)
    usual.fit()
    model = small_gpt(corpus)
    given = build_optimizers(model, "adamw", SCHEDULED.lr, weight_decay=0.1)
    Trainer(model, corpus, SCHEDULED, optimizers=given).fit()
    assert all_equal(weights(usual.model), weights(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        lambda model: None,
        lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
    ],
)
def test_a_run_is_not_resumed_with_other_optimizers(corpus, tmp_path, other):
    for make, resume in ((sgd, False), (other, True)):
        model = small_gpt(corpus)
        trainer = Trainer(model, corpus, QUICK, checkpoints=tmp_path, optimizers=make(model))
        if not resume:
            trainer.fit()
    with pytest.raises(ValueError, match=r"cannot be resumed with other settings: optimizers="):
        trainer.fit(resume=True)


def test_what_is_no_optimizer_of_the_model_is_refused(corpus):
    model = small_gpt(corpus)
    for given, message in (
        (torch.optim.SGD, "is no torch optimizer"),
        ([sgd], "is no torch optimizer"),
        ([], "0 of their 0 parameters"),
        (sgd(small_gpt(corpus)), r"(\d+) of their \1 parameters are not the model's"),
        ([sgd(model), sgd(model)], "the same parameter"),
        (torch.optim.LBFGS(model.parameters()), "LBFGS computes a step's loss several times"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(model, corpus, QUICK, optimizers=given)


def test_a_state_that_cannot_be_saved_is_named():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"directions": [torch.zeros(2)]}
    with pytest.raises(ValueError, match="SGD keeps a list under 'directions', and only tensors and numbers"):
        optimizer_tensors(optimizer, {weight: "weight"}, "0")


def test_plain_numbers_of_a_state_come_back_as_they_were():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"count": 3, "decay": 0.1, "sum": torch.ones(2), "nothing": None}
    saved = optimizer_tensors(optimizer, {weight: "a.weight"}, "0")
    assert sorted(saved) == ["0.a.weight.count:int", "0.a.weight.decay:float", "0.a.weight.sum"]
    fresh = torch.optim.SGD([weight], lr=0.1)
    restore_optimizer(fresh, {weight: "a.weight"}, "0", saved)
    state = fresh.state[weight]
    assert (state["count"], state["decay"]) == (3, 0.1) and type(state["count"]) is int
    assert torch.equal(state["sum"], torch.ones(2))
