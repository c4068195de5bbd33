"""Week 10's script with a learner's own update. Oracle: the same run with the course's code."""

import json

import pytest

from shared.course.exercise.answers import Shelf, load_module
from shared.runtime import ROOT, read_json
from tests.weeks.helpers import DATA, script


@pytest.fixture
def solved(tmp_path, monkeypatch):
    """The week's clean solutions, kept as a learner's own."""
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    answers = load_module(ROOT / "weeks/10_ppo_dpo/answers.py", "answers_10")
    assert Shelf("10_ppo_dpo").solve("grpo_update", answers.grpo_update) is None


@pytest.mark.slow
def test_her_update_learns_what_the_course_s_does(solved, output, text_file):
    metrics = {}
    for mine in (False, True):
        module, settings = script("10_ppo_dpo", data=text_file, mine=mine)
        metrics[mine] = module.main(settings)
    for name in ("base_pass_at_1", "grpo_pass_at_1", "grpo_pass_at_8"):
        assert metrics[True][name] == pytest.approx(metrics[False][name], rel=1e-5)
    logs = output / "logs/10_ppo_dpo/mine/smoke"
    losses = [
        [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (
            logs / DATA / "countdown-grpo-1/metrics.jsonl",
            logs / "my-code" / DATA / "countdown-grpo-1/metrics.jsonl",
        )
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
    assert read_json(logs / "my-code" / DATA / "week.json")["mine"] == ["grpo_update"]


def test_what_her_update_does_not_have_is_refused(solved, refuses, text_file):
    arguments = ["--countdown.grpo.loss-type", "bnpo", "--countdown.grpo.baseline", "group"]
    words = "countdown.grpo.loss_type=bnpo: with --mine it must be grpo or dr_grpo"
    refuses("10_ppo_dpo", ["--data", text_file, "--mine", *arguments], words)
