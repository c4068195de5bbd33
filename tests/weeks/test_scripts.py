"""Every week's script at the smoke preset, its studies, and what it says to wrong input."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shared import commandline
from shared.course import report
from shared.runtime import ROOT
from tests.pictures import assert_shows_something, drawn_figures, unrendered
from tests.weeks.helpers import (
    DATA,
    LADDER,
    RHYME,
    TEXT,
    WEEKS,
    assert_flags_have_effects,
    noting_reads,
    script,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("topic", WEEKS)
def test_smoke_run_writes_logs_metrics_and_plots(topic, output, text_file, monkeypatch):
    figures = drawn_figures(monkeypatch)
    module, settings = script(topic, **{TEXT.get(topic, "data"): text_file})
    noted, read = noting_reads(settings)
    metrics = module.main(noted)
    assert_flags_have_effects(topic, settings, read)
    logs = output / "logs" / topic / "mine" / "smoke" / DATA
    week = json.loads((logs / "week.json").read_text())
    assert week["preset"] == "smoke" and week["data"] == DATA
    assert metrics and all(math.isfinite(v) for v in metrics.values())
    if topic in (*LADDER, "07_amp"):
        first = metrics.get("first_loss", metrics.get("first_loss_scaled"))
        vocabulary = metrics.get("vocab_size") or len(set((output / "rhyme.txt").read_text()))
        assert abs(first - math.log(vocabulary)) < 0.1
    assert ("bits_per_byte" in metrics) == (topic in LADDER)  # what the ladder shows
    runs = report.read_runs(logs)
    assert runs and all(r.run["state"] == "finished" and r.summary for r in runs.values())
    assert figures.keys() == set((output / "reports" / topic / "mine").glob("*.png")) and len(figures) >= 2
    for path, figure in figures.items():
        assert_shows_something(figure, path.name)


STUDIES = {
    "02_mlp": ["window"],
    "03_attention": [],
    "04_mini_gpt": ["speedrun", "ablation", "seeds", "cache", "length"],
    "05_bpe": ["vocab"],
    "06_gpt2": ["shape", "cost", "smollm2"],
    "07_amp": ["batch", "profile", "loss"],
    "08_quantization": ["real", "outliers", "memory"],
    "09_lora": ["rates", "rounding", "compare"],
    "10_ppo_dpo": ["methods", "rates", "form", "longer", "exclaim", "frontier", "hacking", "real"],
    "11_rag": ["answers", "windows", "index", "own", "depths"],
    "12_deploy": ["real", "real-programs"],
}


@pytest.fixture
def later_processes_here(monkeypatch):
    """Of the processes that week 9's study starts, the first is one; the others' scripts run in this process
    with the same flags, where PyTorch is imported already.
    """
    started = []

    def run(command):
        started.append(command)
        python, run_script, *flags = command
        assert (python, run_script) == (sys.executable, str(ROOT / "weeks" / "09_lora" / "run.py"))
        if len(started) == 1:
            return subprocess.run(command)
        module = report.load_script("09_lora")
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", [run_script, *flags])
            commandline.cli(module.main, module.PRESETS, module.__doc__)
        return subprocess.CompletedProcess(command, 0)

    def patch_study():
        monkeypatch.setattr(sys.modules["weeks.09_lora.studies"], "subprocess", SimpleNamespace(run=run))

    return patch_study


@pytest.mark.parametrize("topic", STUDIES)
def test_studies_run(topic, output, text_file, later_processes_here):
    module, settings = script(topic, **{TEXT.get(topic, "data"): text_file})
    if topic == "09_lora":
        later_processes_here()
    if "cache" in STUDIES[topic]:  # reads the headline's checkpoint
        module.main(settings)
    logs = output / "logs" / topic / "mine" / "smoke" / DATA
    before = set()
    for study in STUDIES[topic]:
        chosen = replace(settings, study=study)
        noted, read = noting_reads(chosen)
        with nullcontext() if study == STUDIES[topic][-1] else unrendered():  # the last draws all plots
            module.main(noted)
        if topic != "09_lora":  # whose study starts processes
            assert_flags_have_effects(topic, chosen, read)
        runs = report.read_runs(logs)
        assert runs.keys() > before and all(r.run["state"] == "finished" and r.summary for r in runs.values())
        before = runs.keys()


@pytest.mark.parametrize("topic", ["04_mini_gpt", "10_ppo_dpo"])
def test_resuming_a_finished_week_changes_nothing(topic, output, text_file, unrendered_plots):
    module, settings = script(topic, data=text_file)
    once = module.main(settings)
    again = module.main(replace(settings, resume=True))
    same = [k for k in once if k not in ("train_seconds", "wall_seconds")]
    assert {k: once[k] for k in same} == {k: again[k] for k in same}


WRONG = {
    "unknown preset": (["--preset", "huge"], "no preset is called 'huge'"),
    "unknown setting": (["--preset", "smoke", "--train.lrr", "1"], "--train.lrr"),
    "a value of another type": (["--preset", "smoke", "--train.steps", "many"], "--train.steps"),
    "a value out of range": (["--preset", "smoke", "--train.lr", "-1"], "lr=-1.0"),
    "a seed out of range": (["--preset", "smoke", "--train.seed", "-5"], "seed -5"),
    "a run's name that is a path": (["--preset", "smoke", "--run-name", "../x"], "run_name='../x'"),
    "unknown data": (["--preset", "smoke", "--data", "moby-dick"], "moby-dick"),
    "unknown device": (["--preset", "smoke", "--device", "abacus"], "abacus"),
    "an empty text": (["--preset", "smoke", "--data", "EMPTY"], "is empty"),
    "a block longer than the text": (["--preset", "smoke", "--data", "SHORT"], "block_size"),
    "a text that is not UTF-8": (["--preset", "smoke", "--data", "LATIN"], "not UTF-8"),
}


@pytest.mark.parametrize("topic", WEEKS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_line_and_leaves_nothing(topic, case, output, error_lines):
    arguments, words = WRONG[case]
    if topic in TEXT:  # `data` is another thing
        arguments = [a.replace("--data", f"--{TEXT[topic]}") for a in arguments]
    if topic == "10_ppo_dpo":  # the week itself reads no text
        arguments = [*arguments, "--study", "exclaim"]
    if topic == "09_lora":  # no group `train`
        *arguments, words = (a.replace("--train.", "--") for a in (*arguments, words))
    files = {"EMPTY": b" \n", "SHORT": b"to be or not", "LATIN": "café au lait ".encode("latin-1") * 50}
    for name, content in files.items():
        (output / name).write_bytes(content)
    lines = error_lines(topic, *(str(output / a) if a in files else a for a in arguments))
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not (output / "logs").exists() and not (output / "checkpoints").exists()


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(error_lines, text_file):
    flags = ["--data", text_file, "--train.lr", "1e30", "--train.optimizer", "adamw"]
    assert "is not finite" in error_lines("04_mini_gpt", "--preset", "smoke", *flags)[-1]


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_runs_on_files_of_one_name_and_runs_with_names_stay_apart(
    output, text_file, tmp_path, capsys, unrendered_plots
):
    module, settings = script("01_bigram", data=text_file)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "rhyme.txt"
    other.write_text(RHYME.swapcase(), encoding="utf-8")
    module.main(settings)
    kept = {name: files_in(output / name / "01_bigram") for name in ("logs", "checkpoints")}
    for changes in (dict(data=str(other)), dict(run_name="mine-2")):
        module.main(replace(settings, **changes))
        for name, files in kept.items():
            assert files.items() < files_in(output / name / "01_bigram").items()
    named = output / "logs" / "01_bigram" / "mine" / "smoke" / "mine-2" / DATA
    assert report.read_runs(named).keys() == {"counts", "network"}
    capsys.readouterr()
    module.main(replace(settings, resume=True))
    assert "resumed at step 60" in capsys.readouterr().out


def test_a_changed_text_is_another_run(output, text_file, tmp_path, capsys, unrendered_plots):
    module, settings = script("01_bigram", data=text_file)
    module.main(settings)
    (tmp_path / "rhyme.txt").write_text(RHYME.replace("Toad", "Newt"), encoding="utf-8")
    module.main(replace(settings, resume=True))
    assert "no checkpoint to resume from" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(shared_tokens=31), "shared_tokens=31: must be at least 32"),
        (dict(new_tokens=1), "new_tokens=1: must be at least 2"),
        (dict(rounds=0), "rounds=0"),
    ],
)
def test_week_12_refuses_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        script("12_deploy", **changes)
