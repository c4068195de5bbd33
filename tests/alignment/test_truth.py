"""shared/alignment/loops.py against the truth.

Where all answers can be listed, the optimum pi* ∝ pi_ref · exp(r / beta) is known exactly.

The task: a prompt of one token, answers of up to three tokens out of four, one of which ends the answer: 40
answers to each of two prompts. Policy, reference and values are tables with a row for everything that can
have been read.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shared.alignment.logprobs import answer_kl, kl_estimate, sequence_logprobs, token_logprobs
from shared.alignment.loops import DPO, GRPO, PPO, DPOConfig, GRPOConfig, PPOConfig, draw_answers
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import RunLog, read_jsonl

V, LENGTH, END, BETA = 4, 3, 3, 0.5
SEEDS = (0, 1, 2, 3, 4)


def code(ids: Tensor) -> Tensor:
    """A number for each prefix of each row: int64 [batch, time] -> [batch, time]."""
    places = torch.arange(ids.size(1))
    number = (ids.unsqueeze(1) * V ** (places.unsqueeze(1) - places).clamp(min=0)).tril().sum(-1)
    return number + (V ** (places + 1) - V) // (V - 1)


def after_the_end(answers: Tensor) -> Tensor:
    """True for each token behind a row's first END."""
    ends = (answers == END).int()
    return ends.cumsum(1) - ends > 0


class Table(nn.Module):
    """Logits (or a value) for each prefix, independent of all others."""

    def __init__(self, outputs: int):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros((V ** (LENGTH + 2) - V) // (V - 1), outputs))

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows[code(ids)]


class Task:
    """A random reference, a random reward for each answer, and what follows from them."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.reference = Table(V)
        with torch.no_grad():
            self.reference.rows.copy_(0.7 * torch.randn(self.reference.rows.shape, generator=generator))
        self.rewards = torch.randn(V ** (LENGTH + 1), generator=generator)
        answers = torch.cartesian_prod(*[torch.arange(V)] * LENGTH)
        answers = answers[~(after_the_end(answers) & (answers != END)).any(1)]  # after END, only END again
        count = len(answers)
        with_prompts = [torch.cat([torch.full((count, 1), prompt), answers], 1) for prompt in (0, 1)]
        self.ids = torch.stack(with_prompts)  # [prompt, answer, time]
        prompt_mask = torch.zeros(count, 1, dtype=torch.bool)
        self.mask = torch.cat([prompt_mask, ~after_the_end(answers)], 1).expand_as(self.ids)
        self.reward = torch.stack([self.score(ids, None) for ids in self.ids])
        self.optimum = (self.log_probabilities(self.reference) + self.reward / BETA).log_softmax(1)

    def score(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.rewards[(ids * V ** torch.arange(LENGTH, -1, -1)).sum(1)]

    @torch.no_grad()
    def log_probabilities(self, policy: nn.Module) -> Tensor:
        """Of each answer to each prompt: [prompt, answer]."""
        rows = [sequence_logprobs(policy(ids), ids, mask) for ids, mask in zip(self.ids, self.mask)]
        return torch.stack(rows).double()

    def distance(self, policy: nn.Module) -> float:
        """KL(policy ‖ optimum) in nats, of the prompt where it is larger."""
        logp = self.log_probabilities(policy)
        return (logp.exp() * (logp - self.optimum)).sum(1).max().item()

    def prompts(self, step: int, n: int = 256) -> Tensor:
        return torch.arange(n).remainder(2).unsqueeze(1)

    def preferences(self, step: int, n: int = 2048) -> tuple[Tensor, Tensor]:
        """Pairs of any two answers; the better one wins as often as Bradley and Terry say.

        Which pairs are shown does not change the optimum. Those that the reference would draw leave out what
        it finds unlikely, however good.
        """
        generator = torch.Generator().manual_seed(1000 + step)
        prompt = torch.randint(2, (n,), generator=generator)
        a, b = torch.randint(self.ids.size(1), (2, n), generator=generator)
        prompt, a, b = (x[a != b] for x in (prompt, a, b))  # identical answers prefer nothing
        odds = (self.reward[prompt, a] - self.reward[prompt, b]).sigmoid()
        a_wins = torch.rand(len(a), generator=generator) < odds
        chosen = torch.where(a_wins, a, b)
        rejected = torch.where(a_wins, b, a)
        rows = prompt.repeat(2), torch.cat([chosen, rejected])
        return self.ids[rows], self.mask[rows]


def ppo(task: Task, seed: int = 0) -> PPO:
    config = PPOConfig(
        steps=150,
        lr=0.1,
        beta=BETA,
        seed=seed,
        max_new_tokens=LENGTH,
        end=END,
        epochs=4,
        minibatches=1,
        value_coef=0.5,
        value_clip=1.0,
    )
    return PPO(
        copy.deepcopy(task.reference),
        Table(1),
        task.reference,
        lambda step: task.prompts(step, 512),
        task.score,
        config=config,
    )


GRPO_TRUE = GRPOConfig(
    steps=150,
    lr=0.1,
    beta=BETA,
    max_new_tokens=LENGTH,
    end=END,
    epochs=4,
    group_size=8,
    scale="none",
    loss_type="dr_grpo",
    kl="reward",
)


def grpo(task: Task, seed: int = 0, config: GRPOConfig = GRPO_TRUE) -> GRPO:
    return GRPO(
        copy.deepcopy(task.reference),
        task.reference,
        lambda step: task.prompts(step, 64),
        task.score,
        replace(config, seed=seed),
    )


def dpo(task: Task, seed: int = 0) -> DPO:
    config = DPOConfig(steps=300, lr=0.3, beta=BETA, seed=seed)
    return DPO(copy.deepcopy(task.reference), task.reference, task.preferences, config)


def test_the_task_is_what_it_says():
    task = Task(0)
    ref_logp = task.log_probabilities(task.reference)
    assert task.ids.shape == (2, 40, 4)
    assert ref_logp.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)

    def value(p: Tensor) -> Tensor:
        return (p * (task.reward - BETA * (p.log() - ref_logp))).sum(1)

    best = value(task.optimum.exp())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # every other policy earns less
        other = (task.optimum + 0.1 * torch.randn(task.optimum.shape, generator=generator)).softmax(1)
        assert (value(other) < best).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", [ppo, dpo, grpo])
def test_each_method_comes_to_the_optimum(method, seed):
    task = Task(seed)
    loop = method(task, seed)
    assert task.distance(loop.policy) > 0.3
    loop.fit()
    assert task.distance(loop.policy) < 0.02


@pytest.mark.slow
def test_grpo_as_published_comes_to_another_policy():
    """With k3 in the loss and scores divided by their group's deviation, beta is not KL(policy ‖ ref)'s."""
    task = Task(0)
    loop = grpo(task, config=replace(GRPO_TRUE, scale="group", loss_type="grpo", kl="loss"))
    loop.fit()
    assert 0.04 < task.distance(loop.policy) < task.distance(task.reference)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_of_answers_has_the_true_mean_and_scatters_less_than_k1(seed):
    task = Task(seed)
    policy = Task(seed + 100).reference
    log_p = task.log_probabilities(policy)
    log_ref = task.log_probabilities(task.reference)
    for prompt, (ids, mask) in enumerate(zip(task.ids, task.mask)):
        p = log_p[prompt].exp()
        exact = (p * (log_p[prompt] - log_ref[prompt])).sum().item()
        with torch.no_grad():
            logp = token_logprobs(policy(ids), ids)
            ref_logp = token_logprobs(task.reference(ids), ids)
            ours = answer_kl(policy(ids), task.reference(ids), mask).double()
            k1 = kl_estimate(logp, ref_logp, "k1").masked_fill(~mask[:, 1:], 0).sum(1)
        assert (p * ours).sum().item() == pytest.approx(exact, rel=1e-5)
        assert (ours >= 0).all()
        assert (p * (ours - exact) ** 2).sum() < 0.5 * (p * (k1 - exact) ** 2).sum()
    with pytest.raises(ValueError, match="shapes differ"):
        answer_kl(policy(ids), task.reference(ids)[:, :2], mask)


# ---- drawing


@pytest.mark.slow
def test_answers_are_drawn_as_often_as_they_are_likely_and_end_where_they_end():
    task = Task(1)
    prompts = torch.zeros(20000, 1, dtype=torch.long)
    ids, mask = draw_answers(task.reference, prompts, LENGTH, END, torch.Generator().manual_seed(0))
    numbers = {tuple(row): i for i, row in enumerate(task.ids[0].tolist())}
    drawn = torch.tensor([numbers[tuple(row)] for row in ids.tolist()])
    assert torch.equal(mask, task.mask[0][drawn])
    p = task.log_probabilities(task.reference)[0].exp()
    frequencies = drawn.bincount(minlength=40) / 20000
    assert ((frequencies - p).abs() < 4 * (p * (1 - p) / 20000).sqrt() + 1e-4).all()


def small_gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=7, block_size=12, n_layer=1, n_head=2, n_embd=8, dropout=0.3)).eval()


def test_a_cache_changes_nothing():
    model = small_gpt()
    prompts = torch.randint(7, (16, 3), generator=torch.Generator().manual_seed(0))
    with_cache = draw_answers(model, prompts, 6, 2, torch.Generator().manual_seed(0))

    class WithoutCache(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return model(ids)

    without = draw_answers(WithoutCache(), prompts, 6, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(with_cache, without))
    ids, mask = with_cache
    assert ids.shape == (16, 9)
    assert not mask[:, :3].any()
    assert mask.sum(1).unique().numel() > 1


# ---- the loops themselves


def small_loop(method: str, log: RunLog | None = None, file=None, stop_at: int | None = None, **changes):
    """A loop on a tiny GPT; stop_at: is interrupted in this step."""
    policy = small_gpt()
    reference = copy.deepcopy(policy)
    common = {"steps": 6, "lr": 1e-2, "seed": 3, "checkpoint_every": 2, **changes}
    online = dict(max_new_tokens=3, end=2, epochs=2)

    def given(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        return torch.randint(V, (8, 1), generator=torch.Generator().manual_seed(step))

    def preferences(step: int) -> tuple[Tensor, Tensor]:
        answers = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(step))
        return torch.cat([given(step), answers], 1), torch.arange(6).expand(8, 6) >= 2

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        return (ids * mask).sum(1).float()

    if method == "PPO":
        config = PPOConfig(**common, **online, minibatches=2)
        value = nn.Embedding(7, 1)
        return PPO(policy, value, reference, given, score, config=config, log=log, file=file)
    if method == "GRPO":
        config = GRPOConfig(**common, **online, group_size=4)
        return GRPO(policy, reference, given, score, config, log=log, file=file)
    return DPO(policy, reference, preferences, DPOConfig(**common), log, file=file)


METHODS = pytest.mark.parametrize("method", ["PPO", "GRPO", "DPO"])


@pytest.mark.slow
@METHODS
def test_a_resumed_run_equals_an_uninterrupted_one(method, tmp_path):
    uninterrupted = small_loop(method, RunLog(tmp_path / "uninterrupted"))
    torch.manual_seed(0)
    uninterrupted.fit()
    first = small_loop(method, RunLog(tmp_path / "cut"), tmp_path / "state.safetensors", stop_at=5)
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    again = small_loop(method, RunLog(tmp_path / "cut", resume=True), tmp_path / "state.safetensors")
    torch.manual_seed(2)
    again.fit(resume=True)
    assert again.step == 6
    assert again.history == uninterrupted.history
    for name, module in uninterrupted.trained.items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, again.trained[name].state_dict()[key]), key
    rows, expected = (read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("cut", "uninterrupted"))
    assert rows == expected


@METHODS
def test_the_usual_diagnostics_are_logged(method, tmp_path):
    small_loop(method, RunLog(tmp_path)).fit()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    common = {"step", "loss", "grad_norm", "lr"}
    online = {"score", "kl", "entropy", "length", "approx_kl", "clipfrac", "ratio"}
    offline = {"accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp"}
    own = {"PPO": online | {"explained_variance"}, "GRPO": online, "DPO": offline}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) == common | own[method] for row in rows)
    assert all(math.isfinite(v) for row in rows for v in row.values())
    if method == "DPO":
        assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert rows[0]["margin"] == pytest.approx(0, abs=1e-6)
    else:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert 0 < rows[-1]["entropy"] < math.log(7) + 1e-6


@METHODS
def test_the_reference_stays_and_the_policy_moves(method):
    loop = small_loop(method)
    before = copy.deepcopy(loop.reference.state_dict())
    loop.fit()
    assert all(torch.equal(t, before[k]) for k, t in loop.reference.state_dict().items())
    assert any(not torch.equal(t, before[k]) for k, t in loop.policy.state_dict().items())


def test_resuming_without_a_state_starts_anew_and_says_so(tmp_path, capsys):
    loop = small_loop("DPO", file=tmp_path / "state.safetensors")
    loop.fit(resume=True)
    assert "no state to resume from" in capsys.readouterr().out
    assert loop.step == 6
    done = small_loop("DPO", file=tmp_path / "state.safetensors")
    assert done.fit(resume=True) == loop.history[-1]


@pytest.mark.parametrize(
    "method, changes, words",
    [("DPO", dict(lr=0.5), "lr=0.01 then, 0.5 now"), ("GRPO", {}, "loop=DPO then, GRPO now")],
)
def test_other_settings_cannot_resume(tmp_path, method, changes, words):
    small_loop("DPO", file=tmp_path / "state.safetensors").fit()
    with pytest.raises(ValueError, match=f"cannot be resumed with other settings: .*{words}"):
        small_loop(method, file=tmp_path / "state.safetensors", **changes).fit(resume=True)


@METHODS
def test_other_data_or_another_reference_cannot_resume(method, tmp_path):
    file = tmp_path / "state.safetensors"
    small_loop(method, file=file).fit()
    prompts = "preferences" if method == "DPO" else "prompts"
    loop = small_loop(method, file=file)
    first = getattr(loop, prompts)
    setattr(loop, prompts, lambda step: first(step + 1))
    with pytest.raises(ValueError, match="on other contents: training data="):
        loop.fit(resume=True)
    loop = small_loop(method, file=file)
    with torch.no_grad():
        loop.reference.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="on other contents: frozen weights="):
        loop.fit(resume=True)


def test_a_damaged_state_is_named(tmp_path):
    file = tmp_path / "state.safetensors"
    small_loop("DPO", file=file).fit()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="state.safetensors is damaged"):
        small_loop("DPO", file=file).fit(resume=True)


def test_a_policy_cannot_be_its_own_reference():
    policy = small_gpt()
    with pytest.raises(ValueError, match="copy.deepcopy"):
        DPO(policy, policy, lambda step: None, DPOConfig())


def test_a_loss_that_is_not_finite_stops_the_run():
    loop = small_loop("GRPO")
    loop.score = lambda ids, mask: torch.full((len(ids),), math.nan)
    before = copy.deepcopy(loop.policy.state_dict())
    with pytest.raises(ValueError, match="step 1: the loss is nan"):
        loop.fit()
    assert all(torch.equal(t, before[k]) for k, t in loop.policy.state_dict().items())


@pytest.mark.parametrize(
    "config, changes, words",
    [
        (DPOConfig, dict(beta=0, steps=0), "steps=0: must be at least 1; beta=0: must be above 0"),
        (PPOConfig, dict(lam=1.5), "lam=1.5: must be from 0 to 1"),
        (GRPOConfig, dict(clip=-1), "clip=-1"),
        (GRPOConfig, dict(group_size=1), "group_size=1: must be at least 2"),
        (DPOConfig, dict(lr=math.nan), "lr=nan"),
        (DPOConfig, dict(final_lr=-0.5), "final_lr=-0.5: must be from 0 to 1"),
        (DPOConfig, dict(loss_type="apo"), "loss_type='apo': must be one of sigmoid, hinge, "),
        (DPOConfig, dict(beta=-1, label_smoothing=0.1), "beta=-1: .*; label_smoothing=0.1: sigmoid has none"),
        (DPOConfig, dict(loss_type="exo_pair"), "label_smoothing=0.0: for exo_pair it must be above 0"),
        (PPOConfig, dict(grad_clip=-1), "grad_clip=-1"),
    ],
)
def test_settings_out_of_range_are_named(config, changes, words):
    with pytest.raises(ValueError, match=f"{config.__name__}: .*{words}"):
        config(**changes)
