"""shared/alignment/expert_iteration.py against supervised learning written out, and on a task with a known
best answer.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.alignment.expert_iteration import ExpertConfig, ExpertIteration, distinct_rows
from shared.alignment.loops import draw_answers, pad_prompts
from shared.models.gpt import GPT, GPTConfig

CONFIG = ExpertConfig(steps=30, lr=1e-2, max_new_tokens=3, end=0, group_size=8, epochs=1)
PROMPTS = pad_prompts([[1, 2], [3]])


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=16))


def says_four_twice(ids: Tensor, mask: Tensor) -> Tensor:
    answers = [ids[i, mask[i]].tolist() for i in range(len(ids))]
    return torch.tensor([float(answer[:2] == [4, 4]) for answer in answers])


def loop(policy: GPT, config: ExpertConfig = CONFIG, score=says_four_twice, file=None) -> ExpertIteration:
    return ExpertIteration(policy, lambda step: PROMPTS, score, config, file=file)


def test_of_equal_rows_the_first_is_kept_and_only_chosen_ones():
    ids = torch.tensor([[1, 2], [3, 4], [1, 2], [3, 4], [5, 6]])
    chosen = torch.tensor([True, False, True, True, False])
    assert distinct_rows(ids, chosen).tolist() == [0, 3]
    assert distinct_rows(ids, torch.zeros(5).bool()).tolist() == []


def test_a_step_is_one_of_supervised_learning_on_the_right_answers():
    policy = model()
    other = copy.deepcopy(policy)
    expert = loop(policy, replace(CONFIG, group_size=64))
    metrics = expert.update()
    prompts = PROMPTS.repeat_interleave(64, 0)
    ids, mask = draw_answers(other, prompts, 3, 0, torch.Generator().manual_seed(CONFIG.seed))
    right = [i for i in range(len(ids)) if says_four_twice(ids[i : i + 1], mask[i : i + 1])]
    rows = list({tuple(ids[i].tolist()): i for i in reversed(right)}.values())
    assert metrics["kept"] == len(rows) < len(right) and metrics["score"] == len(right) / len(ids)
    logp = other(ids[rows]).log_softmax(-1)[:, :-1].gather(-1, ids[rows, 1:, None]).squeeze(-1)
    loss = -logp[mask[rows, 1:]].mean()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    optimizer = torch.optim.Adam(other.parameters(), lr=CONFIG.lr, eps=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), CONFIG.grad_clip)
    optimizer.step()
    for ours, expected in zip(policy.parameters(), other.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_where_nothing_is_right_nothing_is_learned():
    policy = model()
    before = copy.deepcopy(policy.state_dict())
    metrics = loop(policy, score=lambda ids, mask: torch.zeros(len(ids))).update()
    assert metrics == {"score": 0, "kept": 0, "loss": 0}
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


@pytest.mark.slow
def test_it_learns_what_is_right_and_goes_on_where_it_was(tmp_path):
    whole = loop(model(), file=tmp_path / "whole.safetensors")
    last = whole.fit()
    assert whole.history[0]["score"] < 0.3 < 0.8 < last["score"]
    file = tmp_path / "part.safetensors"
    part = loop(model(), replace(CONFIG, checkpoint_every=10), file=file)

    def stop() -> dict[str, float]:
        if part.step == 20:
            raise RuntimeError("cut")
        return {}

    with pytest.raises(RuntimeError, match="cut"):
        part.fit(measure=stop, measure_every=20)
    resumed = loop(model(), replace(CONFIG, checkpoint_every=10), file=file)
    resumed.fit(resume=True)
    for ours, expected in zip(resumed.policy.parameters(), whole.policy.parameters()):
        assert torch.equal(ours, expected)
