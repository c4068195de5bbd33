"""The commands of the course: run, status, doctor."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from shared import commandline
from shared.assets import Wheel
from shared.course import __main__ as course
from shared.course import doctor, runs, workspace
from shared.course.report import load_script
from shared.runtime import ROOT


def call(*arguments, **environment):
    command = [sys.executable, "-m", "shared.course", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


@pytest.mark.slow
def test_run_ends_with_a_table_of_weeks_metrics_and_plots(tmp_path):
    done = call("run", "--weeks", "1", "--preset", "smoke", LLM_WEEKS_OUTPUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("week ") :]
    assert re.search(r"01_bigram +\d+ s +bits per byte \d\.\d+, val loss \d\.\d+", table) and "mine/" in table


@pytest.mark.slow
def test_run_names_the_weeks_that_exist_and_fails_for_another(run_module):
    done = run_module("shared.course", "run", "--weeks", "99")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no week 99; there are: 1, 2")


@pytest.mark.slow
def test_run_goes_on_after_a_week_that_fails_and_exits_1(tmp_path, monkeypatch, capsys):
    weeks = tmp_path / "weeks"
    for topic, code in (("01_bigram", 3), ("02_mlp", 4)):
        (weeks / topic).mkdir(parents=True)
        (weeks / topic / "run.py").write_text(f"raise SystemExit({code})")
    monkeypatch.setattr(course, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        course.run(course.Run(preset="smoke"))
    out = capsys.readouterr()
    assert stop.value.code == 1 and "failed: 01_bigram, 02_mlp" in out.err
    assert "failed with exit status 4" in out.out


@pytest.mark.slow
def test_the_table_of_a_run_has_the_figures_of_that_run(output, monkeypatch, capsys):
    """Beside results of another preset, newer ones too; a week without results of its own says so."""
    week = """
import json, os, sys
from pathlib import Path
topic = Path(__file__).parent.name
results = {"01_bigram": ("smoke", 1.25), "02_mlp": ("laptop", 2.25)}
preset, value = results[topic]
folder = Path(os.environ["LLM_WEEKS_OUTPUT"], "logs", topic, "mine", preset, "toy")
folder.mkdir(parents=True)
written = {"preset": preset, "data": "toy", "seconds": 1, "metrics": {"val_loss": value}}
(folder / "week.json").write_text(json.dumps(written))
"""
    for topic in ("01_bigram", "02_mlp"):
        script = output / "weeks" / topic / "run.py"
        script.parent.mkdir(parents=True)
        script.write_text(week)
    other = output / "logs" / "01_bigram" / "mine" / "laptop" / "toy"
    other.mkdir(parents=True)
    earlier = {"preset": "laptop", "data": "toy", "seconds": 1, "metrics": {"val_loss": 9.75}}
    (other / "week.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(course, "ROOT", output)
    monkeypatch.setattr(course.subprocess, "run", in_silence(course.subprocess.run))
    course.run(course.Run(weeks=(1, 2), preset="smoke"))
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("01_", "02_"))}
    assert "val loss 1.25" in rows["01_bigram"] and "9.75" not in out
    assert "no results" in rows["02_mlp"] and "2.25" not in out


def in_silence(run):
    """`subprocess.run` that leaves out the report, which would draw every plot."""

    def call(command, **options):
        if "shared.course.report" in command:
            return subprocess.CompletedProcess(command, 0)
        return run(command, **options)

    return call


@pytest.mark.slow
def test_unknown_command_is_one_line(run_module):
    done = run_module("shared.course", "walk")
    assert done.returncode == 2
    assert done.stderr == "error: usage: python -m shared.course notebooks | run | status | doctor\n"


def test_status_shows_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    folder = tmp_path / "logs" / "01_bigram" / "mine" / "laptop" / "tinyshakespeare"
    folder.mkdir(parents=True)
    week = {"preset": "laptop", "data": "tinyshakespeare", "seconds": 1, "metrics": {"bits_per_byte": 3.5}}
    (folder / "week.json").write_text(json.dumps(week))
    course.status(course.Status())
    lines = capsys.readouterr().out.splitlines()
    (bigram,) = [line for line in lines if line.startswith("01_bigram")]
    assert "laptop, tinyshakespeare" in bigram and "bits per byte 3.500" in bigram
    assert "next exercise: count_pairs, in weeks/01_bigram/my_notebook.ipynb" in lines[-2]
    assert lines[-1] == "next script: python weeks/02_mlp/run.py --mine"


def test_results_of_a_smoke_run_give_way_to_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    for preset in ("laptop", "smoke"):  # the smoke run is the newer one
        folder = tmp_path / "logs" / "01_bigram" / "mine" / preset / "shakespeare"
        folder.mkdir(parents=True)
        (folder / "week.json").write_text(json.dumps({"preset": preset}))
    assert runs.week_results("01_bigram", "mine") == {"preset": "laptop"}
    assert runs.week_results("01_bigram", "mine", "tinyshakespeare") is None
    newest = tmp_path / "logs" / "01_bigram" / "mine" / "laptop" / "shakespeare"
    assert runs.newest_logs("01_bigram", "mine") == newest


PIP_ANSWERS = [("3.0.1, 3.0.0, 2.0", True), ("3.0.1, 2.0", False), ("13.0.0", False)]


@pytest.mark.slow
@pytest.mark.parametrize("versions, found", PIP_ANSWERS)
def test_doctor_asks_pip_for_the_version_that_is_wanted(monkeypatch, versions, found):
    commands = []

    def pip(command, **options):
        commands.append(command)
        newest = versions.split(",")[0]
        return subprocess.CompletedProcess(
            command, 0, f"thing ({newest})\nAvailable versions: {versions}\n", ""
        )

    wheel = Wheel("thing==3.0.0", "0" * 64, lambda archive: b"")
    with monkeypatch.context() as patch:
        patch.setattr(doctor.subprocess, "run", pip)
        assert doctor.reachable(wheel)[0] is found
    # This machine's pip knows the command and its options.
    assert subprocess.run([*commands[0], "--help"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_doctor_finds_this_machine_fit(capsys):
    doctor.doctor(doctor.Doctor(offline=True))
    out = capsys.readouterr().out
    for check in ("Python", "PyTorch", "device cpu", "disk", "memory", "shakespeare", "Jupyter kernel"):
        assert check in out
    assert "ready" in out


@pytest.mark.slow
def test_doctor_names_a_device_that_computes_wrong_and_its_cure(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("mps"), torch.device("cpu")])
    monkeypatch.setattr(doctor, "wrong_by", lambda device: 0.3)
    monkeypatch.setattr(doctor, "device_name", lambda device: "a device")
    doctor.doctor(doctor.Doctor(offline=True))
    out = capsys.readouterr().out
    assert "differ from the CPU's by 3.0e-01" in out and "will not be used" in out


@pytest.mark.slow
def test_doctor_fails_on_a_full_disk(monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e8})())
    with pytest.raises(SystemExit):
        doctor.doctor(doctor.Doctor(offline=True))
    out = capsys.readouterr().out
    assert "PROBLEM" in out and "free some space" in out


def test_doctor_only_notes_that_there_is_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "total_memory", lambda: 3.0)
    findings = doctor.Findings()
    doctor.check_space(findings)
    assert findings.problems == 0
    assert {"check": "memory", "": "note", "found": "3 GB"} in findings.rows


def test_every_preset_of_every_week_is_there():
    for topic in runs.weeks():
        presets = load_script(topic).PRESETS
        assert tuple(presets) == workspace.PRESETS and all(s.preset == name for name, s in presets.items())
        assert commandline.parse(presets, ["--preset", "laptop"]) == presets["laptop"]
