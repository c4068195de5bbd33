"""shared/alignment/rewards.py against known rankings, sums written out, and finite differences.

Also what the loops can do that reward models need.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.adapters import LoRAConfig, add_lora
from shared.alignment.base_loop import LoopConfig
from shared.alignment.loops import DPO, DPOConfig, GRPOConfig, PPOConfig
from shared.alignment.rewards import (
    RewardModel,
    answer_rewards,
    best_and_worst,
    bradley_terry_loss,
    exclamations,
    pair_accuracy,
    preference_batch,
    scalar_head,
    shuffled,
    standardise,
)
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog, read_jsonl
from tests.alignment.helpers import close, random, random_ids

PAIRS = [([5, 6], [1, 2, 3], [1]), ([7], [2], [2, 4])]
"""Prompt, chosen and rejected answer."""

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


def test_a_batch_of_preferences_has_the_chosen_first_and_only_answers_in_the_mask():
    ids, mask = preference_batch(PAIRS, pad=9)
    assert ids.tolist() == [[5, 6, 1, 2, 3], [7, 2, 9, 9, 9], [5, 6, 1, 9, 9], [7, 2, 4, 9, 9]]
    assert ids.dtype == torch.int64
    assert [ids[i, mask[i]].tolist() for i in range(4)] == [[1, 2, 3], [2], [1], [2, 4]]


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([*PAIRS, ([1], [2, 3], [2, 3])], "pair 2 has two identical answers: leave it out"),
        ([([1], [2], [])], "pair 0 has an empty answer"),
        ([([], [2], [3])], "pair 0 has an empty prompt"),
        ([], "there are no pairs"),
        ([([1], [2], [2])] * 5, r"pair 2 .*\(and 2 more\)"),
        ([([1], torch.tensor([2, 3]), (2, 3))], "identical"),
    ],
)
def test_preferences_that_prefer_nothing_are_refused(pairs, words):
    with pytest.raises(ValueError, match=words):
        preference_batch(pairs)


def test_a_pair_is_the_best_and_the_worst_and_ties_are_left_out():
    answers = [[[1], [2], [3]], [[4], [5], [6]], [[7], [8], [9]]]
    scores = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    pairs, ties = best_and_worst([[0], [10], [20]], answers, scores)
    assert pairs == [([0], [3], [2]), ([20], [7], [8])]
    assert ties == 1
    preference_batch(pairs)


def test_answers_that_all_score_alike_are_no_preferences():
    message = "of 2 prompts each has 3 answers that score alike.*draw more answers"
    with pytest.raises(ValueError, match=message):
        best_and_worst([[0], [1]], [[[1]] * 3] * 2, torch.ones(2, 3))


def test_batches_go_through_everything_in_each_epoch_and_depend_on_the_step_alone():
    rows = shuffled(10, 3, seed=4)
    epochs = [torch.cat([rows(3 * epoch + i) for i in range(3)]).tolist() for epoch in range(5)]
    for epoch in epochs:
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert {i for epoch in epochs for i in epoch} == set(range(10))
    assert torch.equal(shuffled(10, 3, seed=4)(11), rows(11))
    assert not torch.equal(shuffled(10, 3, seed=5)(11), rows(11))


@pytest.mark.parametrize("count, size", [(3, 4), (0, 1), (3, 0)])
def test_a_batch_larger_than_all_there_is_is_refused(count, size):
    with pytest.raises(ValueError, match=f"a batch of {size} cannot be drawn from {count}"):
        shuffled(count, size, 0)


# ---- the reward model

SMALL = GPTConfig(vocab_size=9, block_size=12, n_layer=1, n_head=2, n_embd=16)


def small_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(SMALL).eval()
    return scalar_head(model, generator=torch.Generator().manual_seed(seed))


def test_a_scalar_head_gives_a_number_for_each_token_and_leaves_the_model_alone():
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=64))
    ids = random_ids(11, 2, 8, seed=0)
    before = model(ids)
    value = scalar_head(model, std=0.0)
    reward = scalar_head(model, generator=torch.Generator().manual_seed(0))
    assert value(ids).shape == (2, 8, 1)
    assert (value(ids) == 0).all()
    assert reward.lm_head.weight.std().item() == pytest.approx(65**-0.5, rel=0.25)
    assert (reward.lm_head.bias == 0).all()
    (value(ids) + reward(ids)).sum().backward()
    assert torch.equal(model(ids), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_reward_heads_first_weights_have_the_size_of_the_papers_details():
    """N(0, 1 / (n_embd + 1)): so narrow a model tells that from 1 / n_embd."""
    model = GPT(GPTConfig(vocab_size=2, block_size=2, n_layer=1, n_head=1, n_embd=2))
    generator = torch.Generator().manual_seed(0)
    weights = torch.cat([scalar_head(model, generator=generator).lm_head.weight for _ in range(60)])
    assert weights.std().item() == pytest.approx(3**-0.5, rel=0.1)
    assert abs(weights.mean().item()) < 0.15


def test_bradley_terry_is_logistic_regression_on_the_difference():
    chosen = random(6)
    rejected = random(6, seed=1)
    labels = torch.ones(6).double()
    expected = F.binary_cross_entropy_with_logits(chosen - rejected, labels, reduction="none")
    close(bradley_terry_loss(chosen, rejected), expected)
    assert bradley_terry_loss(torch.zeros(1), torch.zeros(1)).item() == torch.tensor(2.0).log().item()


def test_a_reward_model_learns_the_odds_of_winning():
    """Three answers: rewards say how often each beats each, and those frequencies give the rewards back."""
    truth = torch.tensor([0.0, 1.0, -0.7], dtype=torch.float64)
    rewards = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    a, b = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).T
    wins = (truth[a] - truth[b]).sigmoid()
    optimizer = torch.optim.LBFGS([rewards], max_iter=100, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        loss = (wins * bradley_terry_loss(rewards[a], rewards[b])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    close(rewards.detach() - rewards[0].detach(), truth, atol=1e-5)


def test_a_reward_is_read_at_the_answers_last_token_whatever_stands_behind():
    model = small_model().double()
    ids, mask = preference_batch(PAIRS, pad=8)
    rows = ([5, 6, 1, 2, 3], [7, 2], [5, 6, 1], [7, 2, 4])
    expected = [model(torch.tensor([row]))[0, -1, 0].item() for row in rows]
    assert answer_rewards(model, ids, mask).tolist() == pytest.approx(expected, rel=1e-10)
    chosen, rejected = torch.tensor(expected).chunk(2)
    assert pair_accuracy(model, ids, mask) == (chosen > rejected).double().mean().item()
    mask[0] = False
    with pytest.raises(ValueError, match="an answer has no token"):
        answer_rewards(model, ids, mask)


@pytest.mark.slow
def test_the_gradient_is_the_finite_difference():
    model = small_model().double()
    batch = preference_batch(PAIRS)

    def loss(weight: Tensor, embedding: Tensor) -> Tensor:
        parameters = {"lm_head.weight": weight, "token_embedding.weight": embedding}
        rewards = answer_rewards(lambda ids: torch.func.functional_call(model, parameters, (ids,)), *batch)
        return bradley_terry_loss(*rewards.chunk(2)).mean()

    weights = [model.lm_head.weight, model.token_embedding.weight]
    assert torch.autograd.gradcheck(loss, [p.detach().clone().requires_grad_() for p in weights])


class ByLastToken(nn.Module):
    """A reward for each last token, free of all others."""

    def __init__(self, tokens: int):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(tokens, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[ids]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_come_back_from_how_often_each_answer_wins(seed):
    truth = torch.randn(6, generator=torch.Generator().manual_seed(seed))

    def preferences(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        pairs = torch.rand(4096, 6, generator=generator).argsort(1)[:, :2]
        odds = (truth[pairs[:, 0]] - truth[pairs[:, 1]]).sigmoid()
        first_wins = torch.rand(4096, generator=generator) < odds
        answers = torch.where(first_wins.unsqueeze(1), pairs, pairs.flip(1)).T.flatten().unsqueeze(1)
        return torch.cat([torch.zeros_like(answers), answers], 1), torch.tensor([False, True]).expand(8192, 2)

    model = ByLastToken(6)
    loop = RewardModel(model, preferences, LoopConfig(steps=150, lr=0.1))
    loop.fit()
    rewards = model.rows.detach().flatten()
    assert (rewards - rewards.mean() - (truth - truth.mean())).abs().max() < 0.1
    assert torch.equal(rewards.argsort(), truth.argsort())
    assert loop.history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    best = truth.argmax().item()
    worst = truth.argmin().item()
    assert pair_accuracy(model, *preference_batch([([0], [best], [worst])])) == 1


def test_standardised_rewards_have_mean_0_and_deviation_1_and_keep_their_order():
    model = small_model()
    ids = random_ids(9, 50, 6, seed=0)
    mask = torch.arange(6).expand(50, 6) >= 2
    with torch.no_grad():
        before = answer_rewards(model, ids, mask)
        after = answer_rewards(standardise(model, before), ids, mask)
    assert after.mean().item() == pytest.approx(0, abs=1e-5)
    assert after.std().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no scale"):
        standardise(model, torch.ones(5))


def small_loop(log: RunLog | None = None, file=None, stop_at: int | None = None) -> RewardModel:
    def preferences(step: int) -> tuple[Tensor, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        return random_ids(9, 8, 6, seed=step), torch.arange(6).expand(8, 6) >= 2

    config = LoopConfig(steps=6, lr=1e-2, checkpoint_every=2)
    return RewardModel(small_model(), preferences, config, log, file)


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
    plain = small_loop()
    plain.fit()
    measured = small_loop()
    steps = []

    def measure() -> dict[str, float]:
        steps.append(measured.step)
        return {"seen": float(len(steps))}

    measured.fit(measure=measure, measure_every=4)
    assert steps == [4, 6]
    assert [row.pop("seen", None) for row in measured.history] == [None, None, None, 1, None, 2]
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
    base = GPT(SMALL).eval()
    policy = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    add_lora(policy, LoRAConfig(r=2, target_modules=("q_proj", "v_proj")))
    batch = preference_batch(PAIRS)
    return DPO(policy, base, lambda step: batch, DPOConfig(steps=4, lr=1e-2, checkpoint_every=2), file=file)


def test_the_reference_may_be_the_base_below_the_adapters_and_only_they_are_kept(tmp_path):
    loop = adapted_loop(tmp_path / "state.safetensors")
    before = copy.deepcopy(loop.reference.state_dict())
    ids = torch.randint(9, (2, 6))
    assert torch.equal(loop.policy(ids), loop.reference(ids))
    assert loop.policy.token_embedding.weight is loop.reference.token_embedding.weight
    loop.fit()
    assert all(torch.equal(t, before[name]) for name, t in loop.reference.state_dict().items())
    assert not torch.equal(loop.policy(ids), loop.reference(ids))
    assert loop.history[-1]["loss"] < loop.history[0]["loss"] == pytest.approx(math.log(2))
    all_weights = 4 * sum(p.numel() for p in loop.policy.parameters())  # bytes
    assert (tmp_path / "state.safetensors").stat().st_size < 15_000 < all_weights
    again = adapted_loop(tmp_path / "state.safetensors")
    again.fit(resume=True)
    assert torch.equal(again.policy(ids), loop.policy(ids))
    assert again.history == loop.history


def test_the_state_of_another_model_is_refused(tmp_path):
    small_loop(file=tmp_path / "state.safetensors").fit()
    loop = small_loop(file=tmp_path / "state.safetensors")
    loop.trained = {"reward": scalar_head(GPT(replace(SMALL, n_layer=2)))}
    with pytest.raises(ValueError, match=r"state of another model: reward\.blocks\.1.* is missing"):
        loop.fit(resume=True)
