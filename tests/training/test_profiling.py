"""shared/training/profiling.py against a clock of our own, torch's count of operations, and real memory."""

import math
import sys
from itertools import count

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.models.gpt import GPT, GPTConfig
from shared.training import TrainConfig, profiling
from shared.training import trainer as training
from shared.training.profiling import (
    in_own_process,
    matmul_peak,
    measure_training,
    peak_memory,
    reset_peak_memory,
    saved_bytes,
)

SMALL = GPTConfig(vocab_size=97, block_size=32, n_layer=2, n_head=2, n_embd=32)
TRAIN = TrainConfig(steps=4, batch_size=3, block_size=32, grad_accum_steps=2)


def take(megabytes: int) -> int:
    """Writes to so much memory, lets it go, and says what the process's peak was."""
    torch.ones(megabytes * 2**18)
    return peak_memory("cpu")


def take_and_forget(megabytes: int) -> int:
    """The same, but the peak is looked for afresh once the memory is let go."""
    take(megabytes)
    reset_peak_memory("cpu")
    return peak_memory("cpu")


def test_the_peak_counts_two_operations_for_each_multiplication(monkeypatch):
    ticks = count()
    monkeypatch.setattr(profiling, "clock", lambda: next(ticks) / 4)  # each product takes a quarter second
    with FlopCounterMode(display=False) as counter:
        assert matmul_peak(size=64, repeats=2) == 4 * 2 * 64**3
    assert counter.get_total_flops() == 3 * 2 * 64**3


def test_a_step_costs_what_the_clock_says(monkeypatch):
    ticks = count()
    monkeypatch.setattr(training, "clock", lambda: 2.0 * next(ticks))
    cost = measure_training(SMALL, TRAIN)
    assert cost.seconds == 2
    assert cost.tokens_per_second == 3 * 32 * 2 / 2
    assert len(cost.losses) == 4
    assert cost.losses[0] == pytest.approx(math.log(97), abs=0.1)
    model = GPT(SMALL)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 32, dtype=torch.int64)).sum().backward()
    flops_per_token = counter.get_total_flops() / (3 * 32)
    assert cost.flops == pytest.approx(cost.tokens_per_second * flops_per_token, rel=0.01)


@pytest.mark.slow
def test_a_process_of_its_own_has_a_peak_of_its_own():
    taken = torch.ones(300 * 2**18)  # what this process holds is not counted there
    little = in_own_process(take, 1)
    much = in_own_process(take, 200)
    assert 190 * 2**20 < much - little < 230 * 2**20
    assert taken.sum() > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process forget its peak")
def test_a_peak_can_be_forgotten():
    assert in_own_process(take_and_forget, 600) < in_own_process(take, 600) - 500 * 2**20


def test_what_a_linear_layer_keeps_is_its_input():
    layer, x = torch.nn.Linear(40, 7), torch.randn(3, 40)
    assert saved_bytes(layer, lambda: layer(x).sum()) == 4 * 3 * 40
    assert saved_bytes(layer, lambda: (layer(x) + layer(x)).sum()) == 4 * 3 * 40


@pytest.mark.slow
def test_recomputing_keeps_a_blocks_input_only_and_gives_the_same_losses():
    config = GPTConfig(vocab_size=97, block_size=64, n_layer=12, n_head=2, n_embd=64)
    train = TrainConfig(steps=3, batch_size=4, block_size=64, fused=False)
    all_kept = measure_training(config, train)
    recomputed = measure_training(config, train, recompute=True)
    assert recomputed.losses == all_kept.losses
    block_inputs = 12 * 4 * 4 * 64 * 64
    both_ends = 4 * 4 * 64 * (3 * 97 + 4 * 64)
    assert block_inputs < recomputed.kept < block_inputs + both_ends
    assert recomputed.kept < all_kept.kept / 8


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="steps=2: measuring needs more steps than the 3 of warmup"):
        measure_training(SMALL, TrainConfig(steps=2), warmup=3)
