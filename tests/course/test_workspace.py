"""shared/course/workspace.py: one process at a time does a part of a week; where runs are found again."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from shared.course.report import read_runs
from shared.course.runs import newest_logs, week_results
from shared.course.workspace import WeekSettings, Workspace


@dataclass(frozen=True)
class Settings(WeekSettings):
    study: str | None = None


WORKING = """
import sys, torch
from shared.course.workspace import WeekSettings, Workspace

work = Workspace("weeks/01_bigram/run.py", WeekSettings(), "plays", torch.device("cpu"))
work.log("counts").finish(loss=1.0)
print("between two runs", flush=True)
sys.stdin.readline()
"""


def workspace(**settings) -> Workspace:
    return Workspace("weeks/01_bigram/run.py", Settings(**settings), "plays", torch.device("cpu"))


@pytest.mark.slow
def test_a_week_that_is_run_is_not_begun_by_another_process(output, monkeypatch):
    """Between two of its runs, too, when neither log is open."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "between two runs\n"
        kept = (output / "logs/01_bigram/mine/laptop/plays/counts/run.json").read_bytes()
        with pytest.raises(ValueError, match=rf"in use by process {other.pid} on .* \(01_bigram, run, since"):
            workspace().log("counts")
        assert (output / "logs/01_bigram/mine/laptop/plays/counts/run.json").read_bytes() == kept
        workspace(study="seeds").log("seed-1").finish(loss=1.0)  # another part of the week
        workspace(run_name="second").log("counts").finish(loss=1.0)
        other.communicate("go on\n", timeout=60)
    workspace().log("counts").finish(loss=2.0)


def test_a_week_may_be_run_again_in_one_process(output):
    for _ in range(2):
        work = workspace()
        work.log("counts").finish(loss=1.0)
        work.finish({"loss": 1.0}, lambda logs, reports: [])
    assert not list((output / "logs").rglob("*.lock"))


def test_a_named_run_is_found_by_its_data_and_preset(output):
    for settings in (dict(preset="smoke"), dict(run_name="smoke"), dict(preset="gpu", run_name="wide")):
        workspace(**settings).finish({"loss": len(settings)}, lambda logs, reports: [])
    for preset in ("smoke", "laptop", "gpu"):
        found = newest_logs("01_bigram", "mine", "plays", preset)
        assert json.loads((found / "week.json").read_text())["preset"] == preset
    assert week_results("01_bigram", "mine", "plays")["preset"] != "smoke"


def test_a_log_has_the_weeks_settings_or_those_that_it_is_given(output):
    work = workspace(study="seeds")
    work.log("usual").finish(loss=1.0)
    work.log("own", {"rows": 3}).finish(loss=1.0)
    runs = read_runs(work.logs)
    assert runs["usual"].run["settings"]["study"] == "seeds"
    assert runs["own"].run["settings"] == {"rows": 3}
