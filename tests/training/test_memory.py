"""shared/training/memory.py: the estimate against torch's own tracker; the largest batch that fits."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from shared.evaluation import cross_entropy
from shared.models.gpt import GPT, GPTConfig
from shared.training import TrainConfig, Trainer
from shared.training import memory as memory_module
from shared.training.distributed import Processes
from shared.training.execution import FP32, Precision
from shared.training.memory import LiveTensors, estimate_memory, find_batch, largest_batch
from shared.training.profiling import StepCost, saved_bytes
from shared.training.tricks import Tricks
from tests.training.helpers import QUICK, TINY, TRAIN, out_of_memory, random_corpus

# ---- the estimate

NANO = GPTConfig.preset("nano")
WIDE = GPTConfig(vocab_size=2000, block_size=64, n_layer=3, n_head=4, n_embd=128)
MODERN = GPTConfig.preset("mini", vocab_size=300, n_embd=64)
GROUPED = GPTConfig(
    vocab_size=1000,
    block_size=128,
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    n_embd=96,
    mlp="relu2",
    tie_weights=False,
)
UNTIED = replace(WIDE, tie_weights=False)
WIDE_MLP = replace(MODERN, n_layer=2, mlp_hidden=64 * 24)
"""Most of what a step holds is inside the MLP."""


@dataclass(frozen=True)
class Cell:
    """A training step whose memory is estimated and tracked."""

    config: GPTConfig
    batch: int
    time: int
    dtype: torch.dtype = torch.float32
    recompute: bool = False
    optimizer: str = "adamw"
    grad_accum_steps: int = 1

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            steps=2,
            batch_size=self.batch,
            block_size=self.time,
            optimizer=self.optimizer,
            grad_accum_steps=self.grad_accum_steps,
            fused=False,  # the tracker does not see what C takes
        )


CELLS = [
    Cell(NANO, 12, 64),
    Cell(NANO, 12, 64, torch.bfloat16),
    Cell(NANO, 12, 64, recompute=True),
    Cell(NANO, 1, 8, optimizer="muon"),
    Cell(NANO, 4, 32, torch.bfloat16, recompute=True, optimizer="muon", grad_accum_steps=2),
    Cell(WIDE, 1, 16),
    Cell(WIDE, 8, 64, optimizer="muon"),
    Cell(WIDE, 8, 64, torch.bfloat16, recompute=True),
    Cell(UNTIED, 1, 16, torch.bfloat16),
    Cell(replace(UNTIED, mlp="swiglu"), 4, 64, recompute=True),
    Cell(MODERN, 8, 128),
    Cell(MODERN, 8, 128, torch.bfloat16, optimizer="muon"),
    Cell(MODERN, 4, 128, recompute=True, optimizer="muon"),
    Cell(MODERN, 2, 64, torch.bfloat16, recompute=True, grad_accum_steps=2),
    Cell(WIDE_MLP, 8, 128, recompute=True),
    Cell(GROUPED, 4, 128, grad_accum_steps=2),
    Cell(GROUPED, 8, 100, torch.bfloat16),
    Cell(GROUPED, 8, 100, recompute=True, optimizer="muon"),
]


def tracked_peak(trainer: Trainer, tracker: MemTracker, stream) -> int:
    """The peak of the second step, in bytes, by torch's tracker."""
    trainer.model.train()
    trainer.train_step(stream)
    tracker.track_external(trainer.model, *trainer.optimizers)
    with tracker:
        trainer.train_step(stream)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_the_estimated_memory_is_what_a_step_takes(cell):
    tracker = MemTracker()

    class Tracked(Processes):
        @contextmanager
        def accumulating(self, call):  # the tracker knows one forward of a module at a time
            yield
            tracker.reset_mod_stats()

    trainer = Trainer(
        GPT(cell.config),
        random_corpus(cell.config.vocab_size),
        cell.train,
        precision=Precision(cell.dtype),
        processes=Tracked(recompute=cell.recompute),
    )
    stream = trainer.task.batches(cell.train, 0, 0, 1)
    peak = tracked_peak(trainer, tracker, stream)
    estimate = estimate_memory(cell.config, cell.train, cell.dtype, cell.recompute)
    assert estimate.peak == pytest.approx(peak, rel=0.1)
    state = sum(t.nbytes for o in trainer.optimizers for s in o.state.values() for t in s.values())
    assert estimate.optimizer == pytest.approx(state, rel=1e-3)

    x, y = next(stream)
    with trainer.precision.autocast(torch.device("cpu")):
        if not cell.recompute:
            kept = saved_bytes(trainer.model, lambda: cross_entropy(trainer.model(x), y))
            assert estimate.activations == pytest.approx(kept, rel=0.1)
        cross_entropy(trainer.model(x), y).backward()
    assert estimate.parameters == sum(p.nbytes for p in trainer.model.parameters())
    assert estimate.gradients == sum(p.grad.nbytes for p in trainer.model.parameters())


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"window": 8}])
def test_what_the_estimate_does_not_know_is_refused(changes):
    with pytest.raises(ValueError, match="the estimate knows no such models"):
        estimate_memory(replace(NANO, **changes), QUICK)


# ---- the batch size


@pytest.mark.parametrize("limit", [1, 5, 64, 1000])
@pytest.mark.parametrize("most", [1, 2, 3, 31, 32, 33, 500, 5000])
def test_the_largest_batch_is_found_in_few_tries(most, limit):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    largest = min(most, limit)
    assert largest_batch(fits, limit) == largest
    assert max(tried) <= limit
    assert len(tried) == len(set(tried)) <= 2 * math.log2(2 * largest) + 2


def test_a_model_of_which_not_one_sequence_fits_is_refused():
    with pytest.raises(ValueError, match="not even a batch of one sequence fits"):
        find_batch(TINY, TRAIN, memory=1000)


def test_on_a_cpu_the_batch_is_the_largest_whose_estimate_is_within_the_limit(here):
    def estimate(batch: int) -> int:
        return estimate_memory(TINY, replace(TRAIN, batch_size=batch)).peak

    largest, fastest, rows = find_batch(TINY, TRAIN, memory=estimate(6) + 10)
    assert largest == 6
    assert [row["batch_size"] for row in rows] == [1, 2, 4, 6]
    assert [row["estimate"] for row in rows] == [estimate(batch) for batch in (1, 2, 4, 6)]
    assert fastest == max(rows, key=lambda row: row["tokens/s"])["batch_size"]


def test_a_cpu_needs_to_be_told_how_much_memory():
    with pytest.raises(ValueError, match="find_batch on cpu needs memory=, in bytes"):
        find_batch(TINY, TRAIN)


@pytest.mark.parametrize(("memory", "largest"), [(None, 11), (700, 7)])
def test_on_cuda_the_batch_is_found_by_trying(here, monkeypatch, memory, largest):
    def pretend(tricks, config, train, **how):
        if train.batch_size > 11:
            out_of_memory()
        cost = StepCost(
            seconds=1.0,
            tokens_per_second=1000 - abs(train.batch_size - 4),
            flops=1.0,
            memory=0,
            kept=0,
            losses=[1.0],
        )
        return [cost], 100 * train.batch_size

    monkeypatch.setattr(memory_module, "measure_tricks", pretend)
    monkeypatch.setattr(memory_module, "precision", lambda name, device: FP32)
    found, fastest, rows = find_batch(TINY, TRAIN, "cuda", memory, Tricks())
    assert (found, fastest) == (largest, 4)
    assert rows[-1]["memory"] == 100 * largest


# ---- what is alive


def test_the_bytes_that_are_alive_at_once_are_counted():
    given = torch.ones(1000)
    with LiveTensors() as live:
        a = given + 1  # 4,000
        a.mul_(2)  # in its own memory
        a.view(10, 100)  # in a's
        del a
        b = given[:500] * 2  # 2,000, when a is gone
        c = b.double()  # 4,000 beside it
    assert live.peak == 6000
    assert c.nbytes == 4000


def test_the_backward_is_counted_too():
    x = torch.ones(1000, requires_grad=True)
    with LiveTensors() as forward:
        loss = x.exp().sum()
    with LiveTensors() as both:
        x.exp().sum().backward()
    assert forward.peak == 4004
    assert both.peak > 4004
    assert loss.item() == pytest.approx(1000 * math.e)
