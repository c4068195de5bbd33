"""Week 2's script with a learner's own answers. Oracle: the same run with the course's code."""

import pytest

from shared.course.exercise.answers import Shelf, load_module
from shared.runtime import ROOT, read_json
from tests.weeks.helpers import DATA, script


@pytest.fixture
def solved(tmp_path, monkeypatch):
    """The week's clean solutions, kept as a learner's own."""
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    answers = load_module(ROOT / "weeks/02_mlp/answers.py", "answers_02")
    for name in ("WindowMLP", "train"):
        assert Shelf("02_mlp").solve(name, getattr(answers, name)) is None


@pytest.mark.slow
def test_her_model_and_her_loop_give_the_losses_of_the_course(solved, output, text_file):
    metrics = {}
    for mine in (False, True):
        module, settings = script("02_mlp", data=text_file, mine=mine)
        metrics[mine] = module.main(settings)
    for name in ("val_loss", "accuracy", "known_words", "parameters"):
        assert metrics[True][name] == pytest.approx(metrics[False][name], rel=1e-5)
    week = read_json(output / "logs/02_mlp/mine/smoke/my-code" / DATA / "week.json")
    assert week["mine"] == ["train", "WindowMLP"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--train.schedule", "linear"], "your training loop cannot do this: train.schedule=linear."),
        (["--train.grad-clip", "0", "--resume"], "cannot do this: resume, train.grad_clip=0."),
    ],
)
def test_what_her_loop_cannot_do_is_refused(solved, refuses, text_file, arguments, words):
    refuses("02_mlp", ["--data", text_file, "--mine", *arguments], words)
