"""shared/training/tasks.py: what is no task is refused when the Trainer is made, and told what to be."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from shared.evaluation import IGNORED, cross_entropy
from shared.training import NextToken, Task, Trainer
from shared.training.tasks import NEEDED
from tests.training.helpers import QUICK, all_equal, small_gpt, weights


class Bare:
    """A task by what it has, derived from nothing: what `NextToken` does, by hand."""

    def __init__(self, corpus):
        inner = NextToken(corpus)
        self.name, self.tokenizer, self.fingerprints = inner.name, inner.tokenizer, inner.fingerprints
        self.batches, self.evaluate = inner.batches, inner.evaluate

    def loss(self, call, ids, targets):
        return cross_entropy(call(ids), targets)

    def learned_tokens(self, ids, targets):
        return targets.numel()


class Derived(Task):
    """A task that takes from `Task` what it has."""

    tokenizer = None

    def __init__(self, corpus):
        self.inner = NextToken(corpus)
        self.name = "derived"

    def batches(self, config, start_step, rank, world_size, *, every=1):
        return self.inner.batches(config, start_step, rank, world_size, every=every)

    def evaluate(self, model, config, device):
        return self.inner.evaluate(model, config, device)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Bare, Derived])
def test_a_task_of_ones_own_trains_saves_and_resumes_as_the_usual_one(corpus, tmp_path, kind):
    usual = Trainer(small_gpt(corpus), corpus, QUICK)
    usual.fit()
    assert isinstance(kind(corpus), Task)
    own = Trainer(small_gpt(corpus), kind(corpus), QUICK, checkpoints=tmp_path)
    summary = own.fit()
    assert all_equal(weights(usual.model), weights(own.model))
    assert summary["val_loss"] == usual.final["val_loss"]
    again = Trainer(small_gpt(corpus), kind(corpus), QUICK, checkpoints=tmp_path)
    assert again.fit(resume=True) == summary


@pytest.mark.parametrize("missing", NEEDED)
def test_each_attribute_that_is_missing_is_named_with_what_it_must_be(corpus, missing):
    class Lacking:
        pass

    task = Lacking()
    for name in set(NEEDED) - {missing}:
        setattr(task, name, getattr(NextToken(corpus), name))
    with pytest.raises(ValueError) as error:
        Trainer(small_gpt(corpus), task, QUICK)
    assert f"a Lacking is no task for the Trainer: it lacks {missing}, {NEEDED[missing]}" in str(error.value)
    assert "derived from shared.training.Task" in str(error.value)
    assert str(error.value).count("it lacks") == 1


def test_all_that_is_missing_is_named_at_once(corpus):
    class Named:
        name = "mine"

    with pytest.raises(ValueError) as error:
        Trainer(small_gpt(corpus), Named(), QUICK)
    assert str(error.value).count("it lacks") == len(NEEDED) - 1


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("name", None, "name=None: must be a str"),
        ("tokenizer", "gpt2", "its tokenizer is a str: must be a Tokenizer, or None"),
        ("loss", 3.0, "loss is no method"),
        ("batches", lambda config: iter(()), "batches cannot be called as the Trainer does"),
    ],
)
def test_what_is_there_but_wrong_is_named(corpus, attribute, value, message):
    task = NextToken(corpus)
    setattr(task, attribute, value)
    with pytest.raises(ValueError, match=message):
        Trainer(small_gpt(corpus), task, QUICK)


def test_what_is_data_and_no_task_is_told_how_it_becomes_one(corpus):
    loader = DataLoader(TensorDataset(torch.zeros(8, 9, dtype=torch.int64)), batch_size=4)
    for data, message in (
        ("book.txt", "load_corpus"),
        (loader, r"a DataLoader is no task .* BatchesTask\("),
        ([torch.zeros(1, 2)], r"a list is no task .* BatchesTask\("),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(small_gpt(corpus), data, QUICK)


def test_the_check_computes_no_fingerprint(corpus):
    """Of a large corpus that takes minutes."""

    class Costly(NextToken):
        @property
        def fingerprints(self):
            raise AssertionError("computed")

    Trainer(small_gpt(corpus), Costly(corpus), QUICK)


def test_a_class_without_batches_cannot_be_made():
    class Half(Task):
        name = "half"
        tokenizer = None

    with pytest.raises(TypeError, match="abstract methods? batches, evaluate"):
        Half()


def test_the_loss_that_a_task_brings_leaves_out_what_is_ignored(corpus):
    task = Derived(corpus)
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 4]])
    by_hand = -sum(logits[r, t].log_softmax(-1)[targets[r, t]] for r, t in ((0, 0), (0, 2), (1, 2))) / 3
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert task.loss(lambda ids: logits, ids, targets).item() == pytest.approx(by_hand.item())
    assert task.learned_tokens(ids, targets) == 3


@pytest.mark.parametrize(("accumulate", "given", "step"), [(1, 4, 5), (2, 7, 4), (2, 0, 1)])
def test_batches_that_end_before_the_steps_are_an_error_that_says_where(corpus, accumulate, given, step):
    class Ending(NextToken):
        def batches(self, *arguments, **named):
            return itertools.islice(super().batches(*arguments, **named), given)

    config = replace(QUICK, grad_accum_steps=accumulate)
    trainer = Trainer(small_gpt(corpus), Ending(corpus), config)
    with pytest.raises(ValueError, match=rf"ended in step {step} of 6: give some that begin again"):
        trainer.fit()
    assert trainer.step == step - 1


def test_an_evaluation_without_the_loss_is_an_error(corpus):
    class Accuracy(NextToken):
        def evaluate(self, model, config, device):
            return {"accuracy": 1.0}

    with pytest.raises(ValueError, match="gave accuracy: val_loss must be among its metrics"):
        Trainer(small_gpt(corpus), Accuracy(corpus), QUICK).fit()
