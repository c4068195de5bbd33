"""shared/runtime.py: seeds, files that are whole or not there, and run logs that survive a kill."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.runtime import RunLog, plain, read_jsonl, seed_everything, table, write_atomically

# ---- seeds


def test_a_seed_makes_all_three_generators_repeat_themselves():
    def draw():
        seed_everything(2**32 - 1)
        return random.random(), np.random.random(), torch.rand(1).item()

    assert draw() == draw()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, True, "1", None])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="is out of range: choose a whole number from 0 to 4294967295"):
        seed_everything(seed)


# ---- files


@pytest.mark.parametrize("data", ["text ä\n", b"\x00bytes", ""])
def test_a_file_is_written_with_its_folder_and_nothing_beside_it(tmp_path, data):
    write_atomically(tmp_path / "deep" / "file", data)
    assert (tmp_path / "deep" / "file").read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, where, error):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- the run log


@dataclass(frozen=True)
class Train:
    steps: int = 10
    lr: float = 1e-3
    windows: int | None = None
    seed: int = 5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be at least 1")


@dataclass(frozen=True)
class Settings:
    preset: str = "laptop"
    train: Train = field(default_factory=Train)
    stop: tuple[str, ...] = ()
    quick: bool = False


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_run_leaves_its_identity_its_metrics_and_its_summary(tmp_path):
    settings = Settings(stop=("a",))
    with RunLog(tmp_path / "log", settings, "cpu") as log:
        assert run_json(tmp_path / "log")["state"] == "running"
        log.log(1, loss=2.5)
        log.log(2, loss=0.1 + 0.2, lr=1e-3)
        assert log.finish(val_loss=1.0) == {"val_loss": 1.0}
    run = run_json(tmp_path / "log")
    assert run["state"] == "finished" and run["seed"] == 5 and run["device"].startswith("cpu: ")
    assert run["settings"] == {
        "preset": "laptop",
        "train": {"steps": 10, "lr": 1e-3, "windows": None, "seed": 5},
        "stop": ["a"],
        "quick": False,
    }
    assert run["versions"]["torch"] == torch.__version__ and run["started"] <= run["ended"]
    assert read_jsonl(tmp_path / "log" / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 0.1 + 0.2, "lr": 1e-3},
    ]
    assert json.loads((tmp_path / "log" / "summary.json").read_text()) == {"val_loss": 1.0}


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.log(step, loss=1.0)
        steps = [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
        assert steps == list(range(1, step + 1)) and len(log.rows()) == step
    log.close("finished")


def test_a_new_run_replaces_the_old_ones_files_and_a_resumed_one_keeps_them(tmp_path):
    with RunLog(tmp_path) as log:
        log.log(1, loss=1.0)
        log.artifact(a=1)
        log.finish(done=1)
    with RunLog(tmp_path, resume=True) as log:
        log.log(2, loss=2.0)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "summary.json").exists()
    with RunLog(tmp_path) as log:
        assert log.rows() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "summary.json"]
    assert summary_json(tmp_path) == {}


def test_rewinding_drops_what_comes_after_also_in_a_log_that_is_being_written(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, loss=float(step))
        log.rewind(3)
        log.log(4, loss=40.0)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_last_line_cut_short_is_left_out_and_gone_after_rewinding(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    with RunLog(tmp_path, resume=True) as log:
        log.rewind(9)
        log.log(3, loss=3.0)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 3.0}\n'


@pytest.mark.parametrize("text", ['{"step": 1\n{"step": 2}\n', '{"step": 1}\nnonsense\n'])
def test_a_damaged_line_that_is_not_a_cut_last_one_is_named(tmp_path, text):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError, match="m.jsonl, line [12]: not JSON"):
        read_jsonl(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("loss is nan"), "failed: loss is nan"),
    ],
)
def test_a_run_that_does_not_finish_says_how_it_ended(tmp_path, error, state):
    try:
        with RunLog(tmp_path) as log:
            log.log(1, loss=1.0)
            raise error
    except BaseException as raised:
        assert raised is error  # not swallowed
    run = run_json(tmp_path)
    assert run["state"] == state and "ended" in run and len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "summary.json").exists()


def summary_json(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_a_run_that_is_left_without_an_error_is_finished_with_its_last_metrics(tmp_path):
    with RunLog(tmp_path) as log:
        log.log(1, loss=3.0, lr=0.1)
        log.log(2, loss=2.0)
        log.log(2, val_loss=2.5)
    assert run_json(tmp_path)["state"] == "finished"
    assert summary_json(tmp_path) == {"step": 2, "loss": 2.0, "lr": 0.1, "val_loss": 2.5}
    with RunLog(tmp_path, resume=True) as log:
        log.log(3, loss=1.0)
    assert summary_json(tmp_path) == {"step": 3, "loss": 1.0, "lr": 0.1, "val_loss": 2.5}


def test_a_summary_that_was_given_stays_where_a_run_is_opened_again_for_its_artifacts(tmp_path):
    with RunLog(tmp_path) as log:
        log.log(1, loss=3.0)
        log.finish(best=1.5)
    with RunLog(tmp_path, resume=True) as log:
        log.artifact(a=1)
    assert run_json(tmp_path)["state"] == "finished" and summary_json(tmp_path) == {"best": 1.5}


@pytest.mark.parametrize("tracked", ["tensorboard/events.1", "wandb/offline-run-1/run-1.wandb"])
def test_a_new_run_does_not_draw_into_the_curves_of_the_old_one(tmp_path, tracked):
    """Whether or not it has a tracker itself; a resumed run keeps them until its tracker writes anew."""
    file = tmp_path / tracked
    file.parent.mkdir(parents=True)
    file.touch()
    RunLog(tmp_path, resume=True).close("finished")
    assert file.exists()
    RunLog(tmp_path).close("finished")
    assert not file.exists()


def test_artifacts_are_kept_and_replaced_by_name(tmp_path):
    log = RunLog(tmp_path)
    log.artifact(counts=torch.tensor([[1, 2]]), note="a")
    log.artifact(note="b", weights=np.array([0.5]))
    assert json.loads((tmp_path / "artifacts.json").read_text()) == {
        "counts": [[1, 2]],
        "note": "b",
        "weights": [0.5],
    }


def test_plain_turns_everything_into_json(tmp_path):
    value = {
        "t": torch.tensor([1, 2]),
        "p": tmp_path,
        3: (1, None),
        "s": Settings(),
        "f": 1 / 3,
        "n": np.array(2.0),
        "inf": math.inf,
    }
    out = plain(value)
    assert json.loads(json.dumps(out)) == out
    assert out["t"] == [1, 2] and out["3"] == [1, None] and out["p"] == str(tmp_path)
    assert out["f"] == 0.333333 and out["inf"] == math.inf


# ---- a table


def test_a_table_is_aligned_and_leaves_blank_what_a_row_does_not_have():
    shown = table([{"a": "x", "loss": 1.23456}, {"a": "long", "n": 3}])
    assert shown.splitlines() == ["a     loss   n", "x     1.235", "long         3"]
    assert table([]) == ""


# ---- one run in a folder


RUNNING = """
import sys
from shared.runtime import RunLog

with RunLog(sys.argv[1]) as log:
    log.log(1, loss=1.0)
    print("held", flush=True)
    sys.stdin.readline()
    log.log(2, loss=0.5)
"""


@pytest.fixture
def running(tmp_path):
    """A process in the middle of a run; it goes on when it gets a line."""
    command = [sys.executable, "-c", RUNNING, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_touches_nothing_until_the_first_is_gone(running, tmp_path):
    before = (tmp_path / "run" / "run.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(ValueError, match=rf"in use by process {running.pid} on .* \(the run run, since"):
            RunLog(tmp_path / "run", {"other": True}, resume=resume)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    running.kill()
    running.wait(timeout=60)
    with RunLog(tmp_path / "run", resume=True) as log:
        assert [row["step"] for row in log.rows()] == [1]


def test_a_closed_run_leaves_its_files_and_nothing_else(tmp_path):
    log = RunLog(tmp_path)
    log.log(1, loss=1.0)
    log.finish(loss=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.json", "summary.json"]
