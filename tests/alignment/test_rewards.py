"""shared/alignment/rewards.py against rankings that are known, sums written out, and finite differences; and
what the loops got for its sake.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from shared.adapters import LoRAConfig, add_lora
from shared.alignment.loops import DPO, DPOConfig, GRPOConfig, LoopConfig, PPOConfig
from shared.alignment.losses import bradley_terry_loss, preference_batch, scalar_head
from shared.alignment.rewards import (
    RewardModel,
    answer_rewards,
    best_and_worst,
    exclamations,
    pair_accuracy,
    shuffled,
    standardise,
)
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog, read_jsonl

# ---- the rule


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", 0),
        ("What a noble king!", 1),
        ("What a noble king", 0),
        ("a b! a b c! a b c d!", 2),
        ("O! O! O!", 0),
        ("!!! a b c !!!", 1),
        ("KING:\nCome hither, boy! Away? No, no, no!", 2),
        ("Come. Good my lord!", 1),
        ("Come, good; my lord!", 0),
        ("'tis th' end!", 1),
    ],
)
def test_only_phrases_of_words_that_end_in_the_mark_count(text, expected):
    assert exclamations(text) == expected


def test_another_mark_and_fewer_words():
    assert exclamations("Yes. Who is it? No.", mark=".", min_words=1) == 2
    assert exclamations("so be it~ and so on~ no", mark="~") == 2


# ---- preferences


def test_a_pair_is_the_best_and_the_worst_and_ties_are_left_out():
    answers = [[[1], [2], [3]], [[4], [5], [6]], [[7], [8], [9]]]
    pairs, ties = best_and_worst(
        [[0], [10], [20]], answers, torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    )
    assert pairs == [([0], [3], [2]), ([20], [7], [8])] and ties == 1
    preference_batch(pairs)


def test_answers_that_all_score_alike_are_no_preferences():
    with pytest.raises(
        ValueError, match="of 2 prompts each has 3 answers that score alike.*draw more answers"
    ):
        best_and_worst([[0], [1]], [[[1]] * 3] * 2, torch.ones(2, 3))


def test_batches_go_through_everything_in_each_epoch_and_depend_on_the_step_alone():
    rows = shuffled(10, 3, seed=4)
    epochs = [torch.cat([rows(3 * epoch + i) for i in range(3)]).tolist() for epoch in range(5)]
    assert (
        all(len(set(epoch)) == 9 and set(epoch) <= set(range(10)) for epoch in epochs)
        and len({tuple(epoch) for epoch in epochs}) == 5
    )
    assert {i for epoch in epochs for i in epoch} == set(range(10))
    assert torch.equal(shuffled(10, 3, seed=4)(11), rows(11)) and not torch.equal(
        shuffled(10, 3, seed=5)(11), rows(11)
    )


@pytest.mark.parametrize("count, size", [(3, 4), (0, 1), (3, 0)])
def test_a_batch_larger_than_all_there_is_is_refused(count, size):
    with pytest.raises(ValueError, match=f"a batch of {size} cannot be drawn from {count}"):
        shuffled(count, size, 0)


# ---- the reward model


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return scalar_head(
        GPT(GPTConfig(vocab_size=9, block_size=12, n_layer=1, n_head=2, n_embd=16)).eval(),
        generator=torch.Generator().manual_seed(seed),
    )


def test_a_reward_is_read_at_the_answers_last_token_whatever_stands_behind():
    model = small_model().double()
    ids, mask = preference_batch([([5, 6], [1, 2, 3], [1]), ([7], [2], [2, 4])], pad=8)
    expected = [
        model(torch.tensor([row]))[0, -1, 0].item() for row in ([5, 6, 1, 2, 3], [7, 2], [5, 6, 1], [7, 2, 4])
    ]
    assert answer_rewards(model, ids, mask).tolist() == pytest.approx(expected, rel=1e-10)
    chosen, rejected = torch.tensor(expected).chunk(2)
    assert pair_accuracy(model, ids, mask) == (chosen > rejected).double().mean().item()
    mask[0] = False
    with pytest.raises(ValueError, match="an answer has no token"):
        answer_rewards(model, ids, mask)


def test_the_gradient_is_the_finite_difference():
    model = small_model().double()
    batch = preference_batch([([5, 6], [1, 2, 3], [1]), ([7], [2], [2, 4])])

    def loss(weight: Tensor, embedding: Tensor) -> Tensor:
        parameters = {"lm_head.weight": weight, "token_embedding.weight": embedding}
        rewards = answer_rewards(lambda ids: torch.func.functional_call(model, parameters, (ids,)), *batch)
        return bradley_terry_loss(*rewards.chunk(2)).mean()

    given = [
        p.detach().clone().requires_grad_() for p in (model.lm_head.weight, model.token_embedding.weight)
    ]
    assert torch.autograd.gradcheck(loss, given)


class ByLastToken(nn.Module):
    """A reward for each last token, free of all others."""

    def __init__(self, tokens: int):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(tokens, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[ids]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_come_back_from_how_often_each_answer_wins(seed):
    truth = torch.randn(6, generator=torch.Generator().manual_seed(seed))

    def preferences(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        pairs = torch.rand(4096, 6, generator=generator).argsort(1)[:, :2]
        first_wins = (
            torch.rand(4096, generator=generator) < (truth[pairs[:, 0]] - truth[pairs[:, 1]]).sigmoid()
        )
        answers = torch.where(first_wins.unsqueeze(1), pairs, pairs.flip(1)).T.flatten().unsqueeze(1)
        return torch.cat([torch.zeros_like(answers), answers], 1), torch.tensor([False, True]).expand(8192, 2)

    model = ByLastToken(6)
    loop = RewardModel(model, preferences, LoopConfig(steps=150, lr=0.1))
    loop.fit()
    found = model.rows.detach().flatten()
    assert (found - found.mean() - (truth - truth.mean())).abs().max() < 0.1
    assert torch.equal(found.argsort(), truth.argsort()) and loop.history[0]["loss"] == pytest.approx(
        math.log(2), rel=1e-6
    )
    best, worst = truth.argmax().item(), truth.argmin().item()
    assert pair_accuracy(model, *preference_batch([([0], [best], [worst])])) == 1


def test_standardised_rewards_have_mean_0_and_deviation_1_and_keep_their_order():
    model, ids = small_model(), torch.randint(9, (50, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6).expand(50, 6) >= 2
    with torch.no_grad():
        before = answer_rewards(model, ids, mask)
        after = answer_rewards(standardise(model, before), ids, mask)
    assert after.mean().item() == pytest.approx(0, abs=1e-5) and after.std().item() == pytest.approx(
        1, rel=1e-5
    )
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no scale"):
        standardise(model, torch.ones(5))


def small_loop(log: RunLog | None = None, file=None, stop_at: int | None = None) -> RewardModel:
    def preferences(step: int) -> tuple[Tensor, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        return (
            torch.randint(9, (8, 6), generator=torch.Generator().manual_seed(step)),
            torch.arange(6).expand(8, 6) >= 2,
        )

    return RewardModel(
        small_model(), preferences, LoopConfig(steps=6, lr=1e-2, checkpoint_every=2), log, file
    )


def test_a_resumed_reward_model_equals_an_uninterrupted_one(tmp_path):
    whole = small_loop(RunLog(tmp_path / "whole"))
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        small_loop(RunLog(tmp_path / "cut"), tmp_path / "state.safetensors", stop_at=5).fit()
    again = small_loop(RunLog(tmp_path / "cut", resume=True), tmp_path / "state.safetensors")
    again.fit(resume=True)
    assert again.history == whole.history and len(whole.history) == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    rows = read_jsonl(tmp_path / "cut" / "metrics.jsonl")
    assert rows == read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert all(set(row) == {"step", "loss", "grad_norm", "lr", "accuracy", "margin"} for row in rows)


# ---- what the loops do besides


def test_measurements_are_taken_now_and_then_and_at_the_end_and_change_nothing():
    plain, measured, taken = small_loop(), small_loop(), []
    plain.fit()
    measured.fit(measure=lambda: taken.append(measured.step) or {"seen": float(len(taken))}, measure_every=4)
    assert taken == [4, 6] and [row.pop("seen", None) for row in measured.history] == [
        None,
        None,
        None,
        1,
        None,
        2,
    ]
    assert measured.history == plain.history


@pytest.mark.parametrize("config, allowed", [(PPOConfig, True), (GRPOConfig, True), (DPOConfig, False)])
def test_only_the_loops_that_draw_can_do_without_the_kl(config, allowed):
    if allowed:
        assert config(beta=0).beta == 0
    else:
        with pytest.raises(ValueError, match="beta=0: must be above 0"):
            config(beta=0)
    with pytest.raises(ValueError, match="beta=-1"):
        config(beta=-1)


def adapted_loop(file) -> DPO:
    torch.manual_seed(0)
    base = GPT(GPTConfig(vocab_size=9, block_size=12, n_layer=1, n_head=2, n_embd=16)).eval()
    policy = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    add_lora(policy, LoRAConfig(r=2, target_modules=("q_proj", "v_proj")))
    batch = preference_batch([([5, 6], [1, 2, 3], [1]), ([7], [2], [2, 4])])
    return DPO(policy, base, lambda step: batch, DPOConfig(steps=4, lr=1e-2, checkpoint_every=2), file=file)


def test_the_reference_may_be_the_base_below_the_adapters_and_only_they_are_kept(tmp_path):
    loop = adapted_loop(tmp_path / "state.safetensors")
    before, ids = copy.deepcopy(loop.reference.state_dict()), torch.randint(9, (2, 6))
    assert torch.equal(loop.policy(ids), loop.reference(ids))
    assert loop.policy.token_embedding.weight is loop.reference.token_embedding.weight
    loop.fit()
    assert all(torch.equal(t, before[name]) for name, t in loop.reference.state_dict().items())
    assert not torch.equal(loop.policy(ids), loop.reference(ids)) and loop.history[-1]["loss"] < loop.history[
        0
    ]["loss"] == pytest.approx(math.log(2))
    assert (
        (tmp_path / "state.safetensors").stat().st_size
        < 15_000
        < 4 * sum(p.numel() for p in loop.policy.parameters())
    )
    again = adapted_loop(tmp_path / "state.safetensors")
    again.fit(resume=True)
    assert torch.equal(again.policy(ids), loop.policy(ids)) and again.history == loop.history


def test_the_state_of_another_model_is_refused(tmp_path):
    small_loop(file=tmp_path / "state.safetensors").fit()
    loop = small_loop(file=tmp_path / "state.safetensors")
    loop.trained = {
        "reward": scalar_head(GPT(GPTConfig(vocab_size=9, block_size=12, n_layer=2, n_head=2, n_embd=16)))
    }
    with pytest.raises(ValueError, match=r"state of another model: reward\.blocks\.1.* is missing"):
        loop.fit(resume=True)
