"""shared/alignment/dpo.py against TRL's frozen numbers and finite differences."""

import math

import pytest
import torch
from torch import Tensor

from shared.alignment import dpo_loss
from shared.alignment.dpo import DPO_LOSSES, SMOOTHED_LOSSES, dpo_problems
from tests.alignment.helpers import TRL, close, random, tensors

NAMES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")


def dpo_inputs() -> tuple[list[Tensor], dict[str, Tensor]]:
    """TRL's log-probabilities, each requiring gradients, and the answers' lengths."""
    logprobs = tensors(TRL["dpo"], "chosen", "rejected", "ref_chosen", "ref_rejected")
    lengths = {name: torch.tensor(TRL["dpo"][name]) for name in ("chosen_lengths", "rejected_lengths")}
    return [t.requires_grad_() for t in logprobs], lengths


def case_name(case: dict) -> str:
    return f"{case['loss_type']}-{case['beta']}-{case.get('label_smoothing', 0)}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", TRL["dpo"]["cases"], ids=case_name)
def test_dpos_losses_and_gradients_are_trls(case, dtype):
    logprobs, lengths = dpo_inputs()
    options = {name: case[name] for name in ("beta", "loss_type", "label_smoothing") if name in case}
    loss = dpo_loss(*(t.to(dtype) for t in logprobs), **options, **lengths)
    assert loss.shape == (5,)
    assert loss.dtype == dtype
    assert loss.mean().item() == pytest.approx(case["loss"], rel=1e-6, abs=1e-6)
    gradients = torch.autograd.grad(loss.mean(), logprobs[:2], materialize_grads=True)
    expected = torch.tensor(case["gradient"]).double()
    torch.testing.assert_close(torch.cat(gradients), expected, rtol=1e-5, atol=1e-6)


def test_every_type_was_held_against_trl():
    assert {case["loss_type"] for case in TRL["dpo"]["cases"]} == set(DPO_LOSSES)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_the_first_loss_is_exactly_ln_2(beta):
    chosen, rejected = (-30 * random(7, seed=s).abs().float() for s in (0, 1))
    loss = dpo_loss(chosen, rejected, chosen.clone(), rejected.clone(), beta)
    assert (loss == torch.tensor(2.0).log()).all()
    assert loss.mean().item() == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_the_reference_does_not_learn_and_gradients_are_finite_differences(loss_type):
    logprobs, lengths = dpo_inputs()
    smoothing = 0.1 if loss_type in SMOOTHED_LOSSES else 0.0
    options = dict(beta=0.3, loss_type=loss_type, label_smoothing=smoothing, **lengths)
    dpo_loss(*logprobs, **options).sum().backward()
    policy_chosen, _, ref_chosen, ref_rejected = logprobs
    assert policy_chosen.grad is not None
    assert ref_chosen.grad is None
    assert ref_rejected.grad is None
    reference = [t.detach() for t in logprobs[2:]]
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *reference, **options), logprobs[:2])


def test_without_lengths_ipo_takes_the_log_probabilities_as_they_are():
    chosen, rejected, ref_chosen, ref_rejected = (t.detach() for t in dpo_inputs()[0])
    expected = (chosen - ref_chosen - rejected + ref_rejected - 1 / (2 * 0.2)) ** 2
    close(dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.2, "ipo"), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(loss_type="sigmod"), "'sigmod': must be one of sigmoid, hinge, ipo"),
        (dict(beta=0), "beta=0: must be above 0"),
        (dict(beta=math.nan), "beta=nan"),
        (dict(loss_type="exo_pair"), "label_smoothing=0.0: for exo_pair it must be above 0"),
        (dict(loss_type="robust", label_smoothing=0.5), "label_smoothing=0.5: for robust"),
        (dict(label_smoothing=0.1), "label_smoothing=0.1: sigmoid has none"),
        (dict(loss_type="ipo", chosen_lengths=torch.ones(5)), "or neither"),
        (dict(loss_type="sft"), "sft is per token: give chosen_lengths"),
        (dict(loss_type="sigmoid_norm", chosen_lengths=torch.ones(5)), "rejected_lengths"),
        (dict(ref_chosen=torch.ones(4)), r"ref_chosen \[4\]"),
    ],
)
def test_dpo_refuses(change, words):
    inputs = dict(zip(NAMES, dpo_inputs()[0]))
    with pytest.raises(ValueError, match=words):
        dpo_loss(**(inputs | change))


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
@pytest.mark.parametrize("smoothing", [-0.1, 0.0, 0.1, 0.5, math.nan])
def test_settings_are_a_problem_exactly_where_the_loss_refuses_them(loss_type, smoothing):
    logprobs, lengths = dpo_inputs()
    options = dict(loss_type=loss_type, label_smoothing=smoothing, **lengths)
    problems = dpo_problems(loss_type, smoothing)
    if problems:
        with pytest.raises(ValueError) as refusal:
            dpo_loss(*logprobs, **options)
        assert str(refusal.value) == problems[0]
    else:
        assert dpo_loss(*logprobs, **options).isfinite().all()


def test_dpo_refuses_log_probabilities_of_tokens():
    with pytest.raises(ValueError, match=r"summed over each answer, \[batch\], not \[5, 3\]"):
        dpo_loss(*[random(5, 3)] * 4)
