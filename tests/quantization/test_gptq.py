"""shared/quantization/gptq.py: what it keeps that rounding to nearest loses."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.models.gpt import GPT
from shared.quantization.gptq import gptq, gptq_round
from shared.quantization.modules import load_quantized, quantization_of, quantize, save_quantized
from shared.quantization.packing import Int4Weight, group_ranges
from tests.quantization.helpers import CONFIGS, TIED, gpt, quiet, random


def correlated(samples: int, columns: int, seed: int) -> Tensor:
    common = random(samples, 8, seed=seed) @ random(8, columns, seed=99)
    return common + 0.1 * random(samples, columns, seed=seed + 1)


@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_rounding_keeps_products_on_inputs_it_has_not_seen(group_size):
    weight, seen, unseen = random(96, 256), correlated(2000, 256, 1), correlated(500, 256, 3)
    scale, zero = group_ranges(weight, group_size)
    nearest = Int4Weight(weight, group_size).rows(slice(None))
    rounded = gptq_round(weight, seen.T @ seen, scale, zero)
    expressed = Int4Weight(rounded, group_size, (scale, zero)).rows(slice(None))
    assert torch.equal(expressed, rounded)

    def loss(w: Tensor) -> Tensor:
        return (unseen @ (w - weight).T).square().mean()

    assert loss(rounded) < 0.3 * loss(nearest)
    assert (rounded - weight).norm() > (nearest - weight).norm()  # at the cost of the single weight


def test_gptq_rounding_is_to_nearest_where_inputs_do_not_hang_together():
    weight = random(16, 64)
    scale, zero = group_ranges(weight, 32)
    nearest = Int4Weight(weight, 32).rows(slice(None))
    torch.testing.assert_close(gptq_round(weight, 3 * torch.eye(64), scale, zero), nearest, atol=0, rtol=0)
    torch.testing.assert_close(gptq_round(weight, torch.zeros(64, 64), scale, zero), nearest, atol=0, rtol=0)


def test_the_column_of_the_largest_inputs_comes_first():
    """It is rounded to nearest: only the others make up for columns before them."""
    weight, inputs = random(16, 64), correlated(500, 64, 1)
    inputs[:, 40] *= 10
    scale, zero = group_ranges(weight, 32)
    nearest = Int4Weight(weight, 32).rows(slice(None))
    rounded = gptq_round(weight, inputs.T @ inputs, scale, zero)
    as_nearest = (rounded == nearest).all(0)
    assert as_nearest[40] and not as_nearest.all()


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**12])
def test_how_large_the_inputs_are_changes_nothing(factor):
    """What is added to the Hessian's diagonal is a share of its mean."""
    weight, inputs = random(16, 64), correlated(500, 64, 1)
    hessian = inputs.T @ inputs
    scale, zero = group_ranges(weight, 32)
    expected = gptq_round(weight, hessian, scale, zero)
    assert torch.equal(gptq_round(weight, factor * hessian, scale, zero), expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_gptq_recovers_at_least_half_of_what_rounding_to_nearest_loses(config):
    """In nats: how much worse than the model itself its quantized form predicts what the model would say."""
    config = replace(CONFIGS[config], n_embd=128, mlp_hidden=256)
    model = gpt(config)
    draw = torch.Generator().manual_seed(5)
    seen, unseen = (torch.randint(53, (48, 32), generator=draw) for _ in range(2))

    @torch.no_grad()
    def loss(other: GPT) -> float:
        truth, got = model(unseen).log_softmax(-1), other(unseen).log_softmax(-1)
        divergence = F.kl_div(got, truth, log_target=True, reduction="none").sum(-1)
        return divergence.mean().item()

    nearest = loss(quantize(deepcopy(model), "int4", group_size=128, say=quiet))
    recovered = gptq(deepcopy(model), seen, group_size=128, say=quiet)
    assert quantization_of(recovered) == {"scheme": "int4", "group_size": 128} and not recovered.training
    # A tied embedding is rounded for what the output layer makes of it, not for what reads it.
    assert 0 < loss(recovered) < (0.7 if config.tie_weights else 0.5) * nearest


def test_gptq_gives_int4s_layout(tmp_path):
    tokens = torch.randint(53, (4, 16), generator=torch.Generator().manual_seed(0))
    model, plain = gptq(gpt(TIED), tokens, say=quiet), quantize(gpt(TIED), "int4", say=quiet)
    a, b = model.state_dict(), plain.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
    assert model.token_embedding.packed is model.lm_head.packed
    loaded = load_quantized(save_quantized(model, tmp_path / "m"), "int4").model
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize(
    "tokens, damp, message",
    [
        (
            torch.zeros(4, dtype=torch.int64),
            0.01,
            r"tokens must be ids of shape \[texts, time\]; these are torch.int64 of shape \[4\]",
        ),
        (torch.zeros(2, 4), 0.01, "tokens must be ids"),
        (torch.zeros(2, 0, dtype=torch.int64), 0.01, "tokens must be ids"),
        (torch.zeros(2, 4, dtype=torch.int64), 0.0, "damp=0.0: must be above 0"),
    ],
)
def test_gptq_refuses_what_it_cannot_use(tokens, damp, message):
    with pytest.raises(ValueError, match=message):
        gptq(gpt(TIED), tokens, damp=damp, say=quiet)
