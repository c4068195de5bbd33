"""shared/trackers.py: what a tracker's own files hold is what the run's log holds."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shared import trackers
from shared.runtime import ROOT, RunLog, read_jsonl

RESUMED_RUN = """
import sys
from pathlib import Path
from shared.runtime import RunLog

folder, tracker = Path(sys.argv[1]), sys.argv[2]
with RunLog(folder, {"lr": 0.5, "parts": [1, 2]}, tracker=tracker) as log:
    for step in (1, 2, 3, 4):
        log.log(step, loss=1 / step, lr=0.5)
    log.log(4, val_loss=0.125)
with RunLog(folder, {"lr": 0.5, "parts": [1, 2]}, tracker=tracker, resume=True) as log:
    log.rewind(2)
    for step in (3, 4, 5):
        log.log(step, loss=2 / step, lr=0.25)
    log.log(5, val_loss=0.0625)
    log.finish(loss=1.0)
"""
"""A run that is resumed from its second step: its third and fourth are written again, with other numbers."""
BLOCK = 32768
TRACKIO = pytest.mark.skipif(
    find_spec("trackio") is None,
    reason="trackio is no test package: it brings uvloop, on which the server would then be tested",
)


def points(rows: list[dict]) -> set[tuple[str, int, float]]:
    """(metric, step, value) of each number, in fp32 where a tracker keeps no more."""
    return {(name, row["step"], round(v, 6)) for row in rows for name, v in row.items() if name != "step"}


def in_tensorboard(folder: Path) -> list[dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [{"step": e.step, tag: e.value} for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]


def in_wandb(folder: Path) -> list[dict]:
    """The history in W&B's file: LevelDB's log format after seven bytes, each record a message of W&B's."""
    from wandb.proto.wandb_internal_pb2 import Record

    file = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    data = file.read_bytes()
    rows, at, held = [], 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # the rest of a block is too short for a header
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(held)
            held = b""
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                step = items["_step"]
                rows.append({"step": step} | {k: v for k, v in items.items() if not k.startswith("_")})
    return rows


def in_trackio(folder: Path) -> list[dict]:
    script = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage;"
        "runs = SQLiteStorage.get_run_records(sys.argv[1]);"
        "last = max(runs, key=lambda run: run['created_at']);"
        "print(json.dumps(SQLiteStorage.get_logs(sys.argv[1], last['name'], run_id=last['id'])))"
    )
    done = in_own_process(["-c", script, trackers.PROJECT], folder)
    rows = json.loads(done.stdout.splitlines()[-1])
    return [{k: v for k, v in row.items() if k != "timestamp"} for row in rows]


def in_own_process(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Python, with all that trackers keep for themselves inside `folder`, and no way out for W&B."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "TRACKIO_DIR": str(folder / "trackio"), "GRADIO_ANALYTICS_ENABLED": "0"}
    environment = {name: v for name, v in os.environ.items() if not name.startswith("WANDB_")} | own
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "tracker, read",
    [
        ("tensorboard", in_tensorboard),
        ("wandb", in_wandb),
        pytest.param("trackio", in_trackio, marks=TRACKIO),
    ],
)
def test_a_trackers_files_hold_what_the_log_holds_also_of_a_resumed_run(tracker, read, tmp_path):
    in_own_process(["-c", RESUMED_RUN, str(tmp_path), tracker], tmp_path)
    expected = points(read_jsonl(tmp_path / "metrics.jsonl"))
    assert len(expected) == 11  # five steps of two numbers, and the second evaluation: the first is dropped
    assert points(read(tmp_path)) == expected


def test_a_tracker_that_is_none_or_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be one of none, tensorboard, wandb, trackio"):
        RunLog(tmp_path / "a", tracker="mlflow")
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'wandb' needs a package that is not installed: pip install wandb"):
        RunLog(tmp_path / "a", tracker="wandb")
    assert not (tmp_path / "a").exists()
