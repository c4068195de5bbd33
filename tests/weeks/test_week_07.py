"""Week 7's script with a learner's own answers. Oracle: the same run with the course's code."""

from dataclasses import replace

import pytest

from shared.course.exercise.answers import Shelf, load_module
from shared.course.report import read_runs
from shared.runtime import ROOT, read_json
from tests.weeks.helpers import DATA, script

NAMES = ("LossScaler", "largest_batch", "LinearCrossEntropy")


@pytest.fixture
def solved(tmp_path, monkeypatch):
    """The week's clean solutions, kept as a learner's own."""
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    answers = load_module(ROOT / "weeks/07_amp/answers.py", "answers_07")
    for name in NAMES:
        assert Shelf("07_amp").solve(name, getattr(answers, name)) is None


def runs_of(output, text_file, **changes) -> list[dict]:
    """The runs of the course's code and of hers, and what the week says of hers."""
    found = []
    for mine in (False, True):
        module, settings = script("07_amp", data=text_file, mine=mine)
        module.main(replace(settings, **changes))
        folder = output / "logs/07_amp/mine/smoke" / ("my-code" if mine else "") / DATA
        found.append(read_runs(folder))
    return found


@pytest.mark.slow
def test_her_scaler_gives_the_scales_and_losses_of_pytorchs(solved, output, text_file):
    few = {"formats": ("fp32",), "tricks": ("eager fp32",), "seeds": (1,)}
    theirs, hers = runs_of(output, text_file, **few)
    assert hers["scaler"].artifacts == theirs["scaler"].artifacts
    assert theirs["scaler"].summary["skipped"] > 0
    week = read_json(output / "logs/07_amp/mine/smoke/my-code" / DATA / "week.json")
    assert week["mine"] == ["LossScaler"]


@pytest.mark.slow
def test_her_loss_in_chunks_is_the_courses(solved, output, text_file):
    theirs, hers = runs_of(output, text_file, study="loss")
    assert hers.keys() == theirs.keys()
    for name, run in hers.items():
        assert run.summary["loss"] == pytest.approx(theirs[name].summary["loss"], abs=1e-6)
        assert run.summary["apart"] < 1e-6


@pytest.mark.slow
def test_her_search_finds_the_courses_batch(solved, output, text_file, capsys):
    theirs, hers = runs_of(output, text_file, study="batch")
    assert hers["batch"].summary["largest"] == theirs["batch"].summary["largest"]
    assert "your search tried 1, 2, 4, 8" in capsys.readouterr().out


def test_two_optimizers_are_too_many_for_her_scaler(solved, refuses, text_file):
    arguments = ["--data", text_file, "--mine", "--train.optimizer", "muon", "--formats", "fp32"]
    refuses(
        "07_amp", [*arguments, "--tricks", "eager fp32", "--seeds", "1"], "your scaler serves one optimizer"
    )
