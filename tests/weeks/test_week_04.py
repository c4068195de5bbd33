"""Week 4: its exercises build the course's GPT; the run with a learner's code; the speedrun's laws."""

from dataclasses import replace

import pytest
import torch

from shared.course.exercise import Week
from shared.course.report import load_script, read_runs
from shared.models.attention import CausalSelfAttention
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import seed_everything
from shared.sampling import generate
from shared.training import TrainConfig
from tests.weeks.helpers import DATA, script

WEEK = Week(4)
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=11)


def exercise(name):
    return WEEK.exercises[name].reference


def both(**changes):
    """The course's GPT and the exercise's, with the same weights."""
    config = GPTConfig.preset("nano", **SIZES, **changes)
    course = GPT(config).eval()
    own = exercise("MiniGPT")(config, CausalSelfAttention, exercise("Block"))
    with torch.no_grad():
        for parameter in course.parameters():
            parameter.copy_(torch.randn_like(parameter))
    own.load_state_dict(course.state_dict())
    return course, own


def test_the_exercises_gpt_is_the_courses_in_logits_gradients_and_writing():
    seed_everything(0)
    course, own = both()
    idx = torch.randint(11, (3, 5))
    assert torch.allclose(course(idx), own(idx), atol=1e-4)
    course(idx).logsumexp(-1).sum().backward()
    own(idx).logsumexp(-1).sum().backward()
    for (name, a), (_, b) in zip(course.named_parameters(), own.named_parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3), name
    written = own.generate(idx[:1], 7)[0].tolist()
    assert written[5:] == list(generate(course, written[:5], 7, temperature=0))


def test_the_exercises_initialization_is_that_of_the_courses_gpt():
    config = GPTConfig.preset("nano", **{**SIZES, "n_embd": 128})
    seed_everything(0)
    course, own = GPT(config), GPT(config)
    exercise("initialize")(own, config.n_layer)
    for (name, a), (_, b) in zip(course.named_parameters(), own.named_parameters()):
        assert torch.equal(a, b) if a.dim() == 1 else abs(a.std() / b.std() - 1) < 0.1, name


@pytest.mark.slow
def test_the_run_with_a_learners_code_has_the_losses_of_the_run_without(output, text_file, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(output / "answers"))
    module, settings = script("04_mini_gpt", data=text_file)
    week = Week(4)
    answers = load_script("04_mini_gpt", "answers")
    for name in ("MiniGPT", "Block", "rotate"):
        assert week.shelf.solve(name, getattr(answers, name)) is None
    plain, mine = module.main(settings), module.main(replace(settings, mine=True))
    logs = output / "logs" / "04_mini_gpt" / "mine" / "smoke"
    steps = [read_runs(logs / name)["headline"].series("train_loss") for name in (DATA, f"my-code/{DATA}")]
    assert steps[0][0] == steps[1][0] and steps[0][1] == pytest.approx(steps[1][1], abs=1e-4)
    assert plain["val_loss"] == pytest.approx(mine["val_loss"], abs=1e-4)


@pytest.mark.slow
def test_the_smoke_speedrun_reaches_its_target_and_tries_both_recipes_alike(output, text_file):
    module, settings = script("04_mini_gpt", data=text_file)
    result = module.main(replace(settings, study="speedrun"))
    runs = read_runs(output / "logs" / "04_mini_gpt" / "mine" / "smoke" / DATA)
    count = {name: sum(run.startswith(f"trial-{name}-") for run in runs) for name in ("classic", "modern")}
    assert count["classic"] == count["modern"] == settings.trials
    assert result["ratio"] > 0 and result["pairs"] == 1 + len(settings.seeds)
    assert all("target_step" in runs[name].summary for name in count)


def test_operations_of_a_step_are_pytorchs_own_count():
    """FlopCounterMode counts the matrix products that are carried out, 2abc each."""
    from torch.utils.flop_counter import FlopCounterMode

    from shared.training.optim import build_optimizers

    studies = load_script("04_mini_gpt", "studies")
    config = GPTConfig.preset("mini", **SIZES)
    train = TrainConfig(batch_size=3, block_size=12, optimizer="muon")
    model = GPT(config)
    optimizers = build_optimizers(model, "muon", 1e-3)
    with FlopCounterMode(display=False) as counted:
        model(torch.randint(11, (3, 12))).sum().backward()
        forward_and_backward = counted.get_total_flops()
        for optimizer in optimizers:
            optimizer.step()
    of_muon = counted.get_total_flops() - forward_and_backward
    without = studies.flops_per_step(model, replace(train, optimizer="adamw"))
    assert studies.flops_per_step(model, train) - without == of_muon


def test_scaled_rotations_keep_fast_pairs_and_slow_the_others():
    studies = load_script("04_mini_gpt", "studies")
    speeds = studies.scaled_speeds(head_dim=32, theta=10000.0, trained=64)
    usual, ntk, yarn = (speeds[name].tolist() for name in ("as trained", "NTK", "YaRN"))
    for scaled in (ntk, yarn):
        assert scaled[0] == usual[0] and scaled[-1] == pytest.approx(usual[-1] / studies.SCALE, rel=1e-4)
        assert all(u / studies.SCALE * 0.999 <= s <= u for u, s in zip(usual, scaled))
