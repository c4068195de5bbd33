"""shared/quantization/adamw.py against torch.optim.AdamW and bitsandbytes."""

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from shared.evaluation import cross_entropy
from shared.quantization.adamw import BLOCK_SIZE, SMALLEST, AdamW8bit, state_bytes, unsigned_levels
from shared.quantization.packing import dynamic_levels
from tests.quantization.helpers import TIED, gpt, random

SETTINGS = dict(lr=3e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)


def test_the_levels_are_bitsandbytes():
    for levels, signed in ((dynamic_levels(), True), (unsigned_levels(), False)):
        torch.testing.assert_close(levels, bnb.create_dynamic_map(signed=signed), atol=0, rtol=1e-6)


def unpacked(state: dict, name: str, signed: bool) -> torch.Tensor:
    """A moment by bitsandbytes' own dequantizer."""
    codes = state[name]
    if codes.dtype != torch.uint8:
        return codes.clone()
    levels = bnb.create_dynamic_map(signed=signed)
    quant_state = bnb.QuantState(
        absmax=state[f"{name}_absmax"], code=levels, blocksize=BLOCK_SIZE, dtype=torch.float32
    )
    return bnb.dequantize_blockwise(codes.view(-1), quant_state).view(codes.shape)


@pytest.mark.parametrize("shape", [(80, 60), (SMALLEST - 1,), (3, 1000, 2)])
def test_each_step_is_adamws_from_the_moments_that_were_kept(shape):
    weight = nn.Parameter(random(*shape))
    ours = AdamW8bit([weight], **SETTINGS)
    for step in range(1, 8):
        theirs = nn.Parameter(weight.detach().clone())
        theirs.grad = weight.grad = random(*shape, seed=step) * 10.0 ** -(step % 4)
        reference = torch.optim.AdamW([theirs], **SETTINGS)
        if step > 1:
            kept = ours.state[weight]
            moments = {
                "exp_avg": unpacked(kept, "exp_avg", True),
                "exp_avg_sq": unpacked(kept, "exp_avg_sq", False),
            }
            reference.state[theirs] = {"step": kept["step"].clone(), **moments}
        reference.step()
        ours.step()
        torch.testing.assert_close(weight, theirs, atol=2e-6, rtol=1e-5)


def test_a_second_moment_never_becomes_0_while_the_first_is_not():
    """A column whose gradients are 10,000 times smaller than its neighbours' moves no further than they."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW8bit([weight], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    scale = torch.ones(64)
    scale[7] = 1e-4
    for step in range(20):
        before = weight.detach().clone()
        weight.grad = random(64, 64, seed=step) * scale
        optimizer.step()
        assert (weight - before).abs().max() < 0.1  # 10 learning rates: AdamW's own bound
    assert not weight.isnan().any()


def test_a_model_learns_as_with_adamw_on_a_quarter_of_the_memory():
    idx = torch.randint(53, (8, 33), generator=torch.Generator().manual_seed(0))
    losses, sizes = [], []
    for kind in (torch.optim.AdamW, AdamW8bit):
        model = gpt(TIED)
        optimizer = kind(model.parameters(), lr=1e-3)
        for _ in range(30):
            loss = cross_entropy(model(idx[:, :-1]), idx[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        sizes.append(state_bytes(optimizer))
    assert losses[0] < 3.5 and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert sizes[1] < 0.31 * sizes[0]  # small parameters stay in fp32


def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path):
    def run(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = random(80, 60, seed=step)
            optimizer.step()

    whole = nn.Parameter(random(80, 60))
    optimizer = AdamW8bit([whole], **SETTINGS)
    run(whole, optimizer, range(4))
    torch.save(copy.deepcopy(optimizer.state_dict()), tmp_path / "state.pt")
    resumed = nn.Parameter(whole.detach().clone())
    other = AdamW8bit([resumed], lr=1.0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(whole, optimizer, range(4, 8))
    run(resumed, other, range(4, 8))
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize(
    "wrong", [dict(lr=-1.0), dict(betas=(0.9, 1.0)), dict(eps=0.0), dict(weight_decay=-0.1)]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match="lr and weight_decay must be at least 0"):
        AdamW8bit([nn.Parameter(torch.zeros(2))], **wrong)


def test_parameters_in_another_type_are_refused():
    with pytest.raises(ValueError, match="is for parameters in fp32"):
        AdamW8bit([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
