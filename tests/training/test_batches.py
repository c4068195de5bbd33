"""shared/training/batches.py: batches that somebody else makes, against the corpus's own, and resumed."""

import math
import os
import signal
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from shared.data.corpus import batches as corpus_batches
from shared.data.corpus import fixed_windows
from shared.evaluation import IGNORED, cross_entropy, evaluate
from shared.training import BatchesTask, NextToken, Trainer
from shared.training.batches import next_tokens
from tests.training.helpers import QUICK, all_equal, at_training_step, small_gpt, timeless, weights

LONGER = replace(QUICK, steps=12, eval_every=6, checkpoint_every=4)


def held_out(corpus, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids, targets = fixed_windows(corpus.val, 8, 10)
    return list(zip(ids.split(size), targets.split(size)))


def rows(corpus, count: int = 22) -> torch.Tensor:
    """So many rows of nine tokens: of a batch of four, an epoch has five whole ones and one of two."""
    return torch.from_numpy(corpus.train[: 9 * count].astype("int64")).view(count, 9)


def shuffled(corpus, **options) -> DataLoader:
    return DataLoader(TensorDataset(rows(corpus)), batch_size=4, shuffle=True, **options)


class Drawn(IterableDataset):
    """Rows drawn from torch's random numbers, thirty in an epoch."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        for _ in range(30):
            yield self.data[torch.randint(len(self.data), ())]


@pytest.mark.slow
def test_the_corpus_own_batches_from_outside_train_the_same(corpus, capsys):
    usual = Trainer(small_gpt(corpus, dropout=0.2), corpus, QUICK)
    usual.fit()
    stream = islice(corpus_batches(corpus.train, 8, 4, QUICK.seed), 6)
    own = Trainer(small_gpt(corpus, dropout=0.2), BatchesTask(stream, held_out(corpus)), QUICK)
    summary = own.fit()
    assert all_equal(weights(usual.model), weights(own.model))
    assert "no effect" not in capsys.readouterr().out
    measured = evaluate(own.model, corpus.val, 8, corpus.token_bytes, max_windows=10)
    assert summary["val_loss"] == pytest.approx(measured.loss, rel=1e-6)
    assert summary["val_accuracy"] == pytest.approx(measured.accuracy)
    assert summary["val_perplexity"] == pytest.approx(measured.perplexity)


@pytest.mark.slow
def test_ids_alone_are_learned_each_from_those_before_it(corpus):
    ids = rows(corpus)
    runs = []
    for data in (ids.split(4), [(part[:, :-1], part[:, 1:]) for part in ids.split(4)]):
        trainer = Trainer(small_gpt(corpus), BatchesTask(list(data), held_out(corpus)), LONGER)
        trainer.fit()
        runs.append([timeless(row) for row in trainer.history])
    assert runs[0] == runs[1]


def test_a_list_is_gone_through_again_and_an_iterator_is_not(corpus):
    parts = list(rows(corpus, 16).split(4))
    seen = [ids for ids, _ in islice(BatchesTask(parts, parts).batches(QUICK, 0, 0, 1), 10)]
    assert all(torch.equal(ids, parts[n % 4][:, :-1]) for n, ids in enumerate(seen))
    assert len(list(BatchesTask(iter(parts), parts).batches(QUICK, 0, 0, 1))) == 4


def test_a_loader_is_shuffled_anew_each_epoch_and_by_the_seed(corpus):
    task = BatchesTask(shuffled(corpus), held_out(corpus))

    def order(seed: int, epochs: int = 2) -> list[list[list[int]]]:
        stream = task.batches(replace(QUICK, seed=seed), 0, 0, 1)
        return [[ids.tolist() for ids, _ in islice(stream, 6)] for _ in range(epochs)]

    first, second = order(1)
    assert first != second
    everything = sorted(row for batch in first for row in batch)
    assert everything == sorted(row for batch in second for row in batch)
    assert everything == sorted(rows(corpus)[:, :-1].tolist())
    assert order(1) == [first, second] and order(2) != [first, second]


LOADERS = {
    "shuffled": shuffled,
    "shuffled by workers": lambda corpus: shuffled(corpus, num_workers=1),
    "shuffled by a generator": lambda corpus: shuffled(corpus, generator=torch.Generator().manual_seed(5)),
    "drawn": lambda corpus: DataLoader(Drawn(rows(corpus)), batch_size=4),
    "a list": lambda corpus: list(rows(corpus).split(4)),
    "an iterator": lambda corpus: corpus_batches(corpus.train, 8, 4, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_learns_what_it_would_have_learned(corpus, tmp_path, kind, accumulate):
    """Stopped in its second epoch, with dropout: bit for bit."""
    config = replace(LONGER, grad_accum_steps=accumulate)

    def trainer(folder: str) -> Trainer:
        model = small_gpt(corpus, dropout=0.2)
        task = BatchesTask(LOADERS[kind](corpus), held_out(corpus))
        return Trainer(model, task, config, checkpoints=tmp_path / folder)

    whole = trainer("whole")
    whole.fit()
    cut = trainer("cut")
    at_training_step(cut.model, 7 * accumulate, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    assert cut.step == 7
    resumed = trainer("cut")
    resumed.fit(resume=True)
    assert all_equal(weights(whole.model), weights(resumed.model))
    rest = [timeless(row) for row in whole.history if row["step"] > 7]
    assert [timeless(row) for row in resumed.history] == rest


def test_reading_batches_draws_none_of_the_training_s_random_numbers(corpus):
    torch.manual_seed(3)
    expected = torch.rand(4)
    task = BatchesTask(shuffled(corpus), shuffled(corpus))
    model = small_gpt(corpus)
    torch.manual_seed(3)
    stream = task.batches(QUICK, 0, 0, 1)
    drawn = []
    for _ in range(4):
        next(stream)
        task.evaluate(model, QUICK, "cpu")
        drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)


@pytest.mark.parametrize(("rank", "world_size", "every", "start"), [(1, 2, 1, 0), (0, 2, 2, 3), (3, 4, 3, 7)])
def test_a_process_gets_its_rows_of_its_batches(corpus, rank, world_size, every, start):
    data = list(rows(corpus, 20).split(4))
    task = BatchesTask(data, data)
    own = islice(task.batches(QUICK, start, rank, world_size, every=every), 6)
    for number, (ids, targets) in enumerate(own):
        batch = data[(start + number * every) % len(data)][rank::world_size]
        assert torch.equal(ids, batch[:, :-1]) and torch.equal(targets, batch[:, 1:])


def test_a_batch_that_cannot_be_shared_is_refused(corpus):
    task = BatchesTask(shuffled(corpus), held_out(corpus))
    with pytest.raises(ValueError, match="a batch of 2 rows cannot be shared by 4 processes"):
        list(islice(task.batches(QUICK, 0, 0, 4), 6))


def test_sizes_are_the_batches_and_that_is_said(corpus, capsys):
    data = [rows(corpus, 3), rows(corpus, 5)[:, :6]]
    trainer = Trainer(small_gpt(corpus), BatchesTask(data, held_out(corpus), name="mine"), QUICK)
    trainer.fit()
    assert "mine: the first batch has 3 x 8 tokens; the settings' batch_size=4" in capsys.readouterr().out
    assert trainer.tokens == 3 * (3 * 8 + 5 * 5)
    assert trainer.summary()["tokens_per_second"] == trainer.tokens / trainer.seconds


def test_tokens_are_counted_as_the_settings_say_them(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, grad_accum_steps=3))
    trainer.fit()
    assert trainer.tokens == 6 * trainer.config.tokens_per_step


def test_what_is_measured_leaves_out_what_is_ignored_and_ends_after_so_many_rows(corpus):
    ids = rows(corpus, 6)
    targets = ids.clone()
    targets[:, :5] = IGNORED
    targets[3] = ids[3]
    model = small_gpt(corpus, block_size=9)
    task = BatchesTask([ids], [(ids[:2], targets[:2]), (ids[2:4], targets[2:4]), (ids[4:], targets[4:])])
    for limit, count in ((None, 6), (3, 4), (4, 4), (1, 2)):
        with torch.no_grad():
            expected = cross_entropy(model(ids[:count]), targets[:count]).item()
        measured = task.evaluate(model, replace(QUICK, eval_windows=limit), "cpu")
        assert measured["val_loss"] == pytest.approx(expected, rel=1e-5)
        assert measured["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": 1, "labels": 2}, r"a batch has a dict of input_ids, labels: .* collate_fn"),
        ("text", "a batch has a str"),
        (torch.zeros(2, 3), r"\[2, 3\] of torch.float32: it must be ids, int64"),
        (torch.zeros(3, dtype=torch.int64), r"\[3\] of torch.int64"),
        ((torch.zeros(2, 3, dtype=torch.int64),) * 3, r"\[2, 3\] and \[2, 3\] and \[2, 3\]"),
        (
            (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)),
            r"parts of \[2, 3\] and \[2, 4\]: give ids, or \(ids, targets\) of one shape",
        ),
        (torch.zeros(2, 1, dtype=torch.int64), "nothing to learn"),
        (7, "a batch has a int"),
    ],
)
def test_a_batch_of_another_form_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        next_tokens(batch)


def test_what_gives_no_batches_is_refused(corpus):
    good = held_out(corpus)
    with pytest.raises(ValueError, match="train is a int: give a list, a DataLoader or an iterator"):
        BatchesTask(7, good)
    with pytest.raises(ValueError, match="train is a Tensor"):
        BatchesTask(rows(corpus), good)
    with pytest.raises(ValueError, match=r"val is an iterator, .* list\(val\)"):
        BatchesTask(good, iter(good))
    data = TensorDataset(rows(corpus))
    split = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ValueError, match="train has a DistributedSampler"):
        BatchesTask(split, good)
    too_few = DataLoader(data, batch_size=100, drop_last=True)
    with pytest.raises(ValueError, match="train gave no batch"):
        Trainer(small_gpt(corpus), BatchesTask(too_few, good), QUICK).fit()
    with pytest.raises(ValueError, match="val gave no batch"):
        Trainer(small_gpt(corpus), BatchesTask(good, too_few), QUICK).fit()


def test_it_has_no_tokenizer_or_the_one_given(corpus):
    good = held_out(corpus)
    assert BatchesTask(good, good).tokenizer is None
    assert BatchesTask(good, good, tokenizer=corpus.tokenizer).tokenizer is NextToken(corpus).tokenizer
