"""shared/training/diagnosis.py with the Trainer: where numbers stopped being finite is named, a parameter
before an output before a gradient, and nothing is updated.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared import checkpoint
from shared.training import Trainer
from shared.training.diagnosis import gradient_to_blame, where_not_finite
from shared.training.trainer import TrainingStopped
from tests.training.helpers import QUICK, at_training_step, small_gpt


def stopped(trainer: Trainer) -> str:
    """The message of a training that must stop, and whose weights must be those from before the step."""
    before = {}

    def remember(module, args):
        if module.training:
            before.update(copy.deepcopy(dict(module.named_parameters())))

    trainer.model.register_forward_pre_hook(remember)
    with pytest.raises(TrainingStopped) as error:
        trainer.fit()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, before[name], atol=0, rtol=0, equal_nan=True)
    return str(error.value)


@pytest.fixture
def hiding_kernel(monkeypatch):
    """Attention as some fused kernels compute it: a nan in a key leaves the result finite, not its gradient.

    AVX-512's does so at 8 tokens and a head size of 8. Without fused kernels nothing is hidden.
    """
    attention = F.scaled_dot_product_attention

    def hiding(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        is_fused = torch.backends.cuda.flash_sdp_enabled()  # the switch for CPUs too
        with sdpa_kernel(SDPBackend.MATH):
            out = attention(query, key, value, **options)
        return out.nan_to_num() if is_fused else out

    monkeypatch.setattr(F, "scaled_dot_product_attention", hiding)


def spoil_a_key(trainer: Trainer, step: int) -> None:
    """Puts a nan into the weight of a key's projection."""
    weight = trainer.model.blocks[1].attn.k_proj.weight.data
    at_training_step(trainer.model, step, lambda: weight[3, 5].fill_(math.nan))


def test_a_nan_in_a_parameter_stops_the_training_and_is_named_with_its_step(corpus, tmp_path):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK, checkpoints=tmp_path / "c")
    spoil_a_key(trainer, step=4)
    with sdpa_kernel(SDPBackend.MATH):  # whatever this processor's own kernel makes of it
        message = stopped(trainer)
    assert message.startswith(
        "step 4: the loss is nan; it began in the parameter blocks.1.attn.k_proj.weight. Nothing was updated"
    )
    assert f"The last checkpoint is in {tmp_path / 'c' / 'last'}" in message
    assert "(now " in message
    assert checkpoint.load(tmp_path / "c" / "last").state["step"] == 2  # from before, and whole


def test_a_nan_in_a_parameter_is_named_on_every_processor(corpus):
    """By the kernel that this one has; the loss may be finite or not."""
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    spoil_a_key(trainer, step=2)
    message = stopped(trainer)
    assert message.startswith(("step 2: the loss is nan", "step 2: a gradient is not finite"))
    assert "it began in the parameter blocks.1.attn.k_proj.weight." in message


def test_a_parameter_is_named_though_a_kernel_hides_it_from_the_loss(corpus, hiding_kernel):
    trainer = Trainer(small_gpt(corpus), corpus, replace(QUICK, fused=False))
    spoil_a_key(trainer, step=2)
    assert stopped(trainer).startswith(
        "step 2: a gradient is not finite; it began in the parameter blocks.1.attn.k_proj.weight."
    )


def test_an_output_is_named_though_a_kernel_hides_it_from_the_loss(corpus, hiding_kernel):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    keys = trainer.model.blocks[1].attn.k_proj

    def spoil_keys() -> None:
        keys.register_forward_hook(lambda module, args, out: out * math.nan)

    at_training_step(trainer.model, 2, spoil_keys)
    assert stopped(trainer).startswith(
        "step 2: a gradient is not finite; it began in the output of blocks.1.attn.k_proj."
    )


def test_an_output_that_overflows_is_named(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    weight = trainer.model.blocks[1].mlp.up_proj.weight.data
    at_training_step(trainer.model, 2, lambda: weight.normal_(std=3e37))
    message = stopped(trainer)
    assert message.startswith("step 2: the loss is nan; it began in the output of blocks.1.mlp.up_proj.")
    assert "checkpoint" not in message


def test_an_infinite_loss_from_finite_logits_is_named(corpus):
    trainer = Trainer(small_gpt(corpus, tie_weights=False), corpus, QUICK)
    weight = trainer.model.lm_head.weight.data
    at_training_step(trainer.model, 1, lambda: weight.normal_().mul_(1e38))
    message = stopped(trainer)
    assert message.startswith("step 1: the loss is ")
    assert "lm_head" in message or "the loss itself" in message


@pytest.mark.parametrize("kernel", ["this processor's", "a hiding one"])
def test_a_gradient_that_is_not_finite_is_named(corpus, request, kernel):
    if kernel == "a hiding one":
        request.getfixturevalue("hiding_kernel")
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    trainer.model.blocks[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    assert stopped(trainer).startswith(
        "step 1: a gradient is not finite; it began in the gradient of blocks.0.mlp.up_proj.weight."
    )


def test_finite_gradients_whose_length_overflows_stop_the_training_too(corpus):
    trainer = Trainer(small_gpt(corpus), corpus, QUICK)
    trainer.model.blocks[0].mlp.up_proj.weight.register_hook(lambda grad: torch.full_like(grad, 1e30))
    message = stopped(trainer)
    assert message.startswith("step 1: the gradient's length overflows; it began in the gradient of ")
    assert "blocks.0.mlp.up_proj.weight" in message


@pytest.mark.parametrize("fails", [False, True])
def test_looking_for_the_place_leaves_the_model_as_it_was(corpus, fails):
    model = small_gpt(corpus)
    fused = []

    def forward() -> None:
        fused.append(torch.backends.cuda.flash_sdp_enabled())
        model(torch.zeros(1, 8, dtype=torch.int64))
        if fails:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError) if fails else nullcontext():
        assert where_not_finite(model, forward) is None
    assert fused == [False]
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gradient_to_blame_is_the_first_that_is_not_finite_or_else_the_largest():
    gradients = {"a": torch.tensor([1.0, -9.0]), "b": torch.tensor([5.0]), "c": torch.tensor([0.0])}
    assert gradient_to_blame(gradients) == ("a", True)
    gradients |= {"c": torch.tensor([1.0, math.inf]), "d": torch.tensor([math.nan])}
    assert gradient_to_blame(gradients) == ("c", False)
