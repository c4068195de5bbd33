"""benchmarks/gpu.sh, gpu.py and gpu_logs.py at smoke size on a CPU: what they print and what they refuse."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from shared.commandline import parse
from shared.course.report import load_script
from shared.runtime import ROOT, RunLog, write_json
from shared.serving.static import StaticCache
from shared.training.tricks import NOT_MEASURED

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("gpu")


@pytest.fixture
def gpu_logs(monkeypatch, output):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("gpu_logs")


def script(*arguments, **environment):
    """(exit status, output, errors) of gpu.sh."""
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_script_carries_on_when_a_step_fails_and_names_it(tmp_path):
    folder = tmp_path / "out"
    missing = str(tmp_path / "no-such-text.txt")
    status, printed, errors = script("--smoke", folder, "training", "decode", DATA=missing)
    assert status == 1 and errors == ""
    lines = printed.splitlines()
    assert lines[1].startswith("training   FAILED") and "no-such-text.txt" in lines[1]
    assert lines[2].startswith("decode     ok") and "static shapes" in lines[2]
    assert lines[3:6] == [
        "not on this device: decode: CUDA graph: CUDA graphs need CUDA",
        "left out at smoke size: decode: compiled",
        "not on this device: decode: compiled, CUDA graph: CUDA graphs need CUDA",
    ]
    assert lines[-1] == "failed: training"
    assert "no-such-text.txt" in (folder / "training.log").read_text(encoding="utf-8")
    assert "times as fast as generate" in (folder / "decode.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_step_for_which_no_time_is_left_has_failed(tmp_path):
    status, printed, _ = script("--smoke", tmp_path, "engine", LIMIT="0")
    assert status == 1 and "no time left" in printed and printed.endswith("failed: engine\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["out", "decode", "fly"], "no step is called fly; there are: table gpt2 loss"),
        (["--tiny"], "no option is called --tiny; there is: --smoke"),
    ],
    ids=["step", "option"],
)
def test_the_script_refuses_what_it_does_not_know(tmp_path, arguments, expected):
    status, printed, errors = script(*arguments)
    assert status == 2 and printed == "" and expected in errors


def test_decoding_says_what_needs_cuda_and_measures_the_rest(gpu, capsys):
    gpu.main(gpu.Settings("decode", "cpu", smoke=True, turns=1))
    printed = capsys.readouterr().out
    assert printed.count("not on this device:") == 2
    summary = next(line for line in printed.splitlines() if line.startswith("summary: "))
    assert "generate" in summary and "static shapes" in summary


def test_a_decoder_that_computes_something_else_fails(gpu, monkeypatch):
    monkeypatch.setattr(StaticCache, "clear", lambda self: None)
    with pytest.raises(ValueError, match="static shapes: .* one of the two is wrong"):
        gpu.main(gpu.Settings("decode", "cpu", smoke=True, turns=1))


def test_the_engines_texts_are_those_of_generate_or_the_step_fails(gpu, capsys, monkeypatch):
    gpu.main(gpu.Settings("engine", "cpu", smoke=True))
    assert "summary: 4 of 4 texts" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "generate", lambda *args, **options: [0])
    with pytest.raises(ValueError, match="4 of 4 texts are not those of generate"):
        gpu.main(gpu.Settings("engine", "cpu", smoke=True))


def test_without_tritons_interpreter_the_kernel_is_named_as_not_on_a_cpu(gpu, capsys):
    gpu.main(gpu.Settings("cross-entropy", "cpu", smoke=True, turns=1))
    printed = capsys.readouterr().out
    assert "not on this device: our fused cross-entropy" in printed and "summary: PyTorch" in printed


def test_a_loss_that_is_not_pytorchs_fails(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "fused_cross_entropy", lambda x, y: gpu.by_pytorch(x, y.roll(1)))
    with pytest.raises(ValueError, match="ours, Triton: .* differs by"):
        gpu.main(gpu.Settings("cross-entropy", "cpu", smoke=True, turns=1))


def test_the_mfu_is_the_share_of_the_data_sheets_peak(gpu, monkeypatch):
    """A token costs 6 operations for each weight of a matrix, and 12 a layer, channel and position."""
    config = gpu.gpt2(gpu.Settings("gpt2"))
    weights = 12 * 12 * 768**2 + 50304 * 768
    flops = 6 * weights + 12 * 12 * 768 * 1024
    assert gpu.share_of_data_sheet(config, 1024, 1e5, CPU) is None
    for name, teraflops in (("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312), ("another", None)):
        monkeypatch.setattr(gpu, "device_name", lambda device, name=name: name)
        share = gpu.share_of_data_sheet(config, 1024, 1e5, torch.device("cuda"))
        expected = teraflops and pytest.approx(1e5 * flops / (teraflops * 1e12))
        assert share == expected


def log_training(folder, losses):
    with RunLog(folder) as log:
        for step, loss in enumerate(losses):
            log.log(step, train_loss=loss, lr=1.0)


@pytest.mark.parametrize(
    ("last", "fails"), [(2.0, False), (2.001, False), (2.01, True), (float("nan"), True)]
)
def test_two_trainings_must_have_the_same_losses(gpu_logs, output, capsys, last, fails):
    runs = output / "logs" / "06_gpt2" / "mine" / "smoke"
    log_training(runs / "alone" / "text" / "gpt2", [3.0, 2.0])
    log_training(runs / "fsdp" / "text" / "gpt2", [3.0, last])
    settings = gpu_logs.Settings("06_gpt2", alike=("alone", "fsdp"))
    with pytest.raises(ValueError, match="is allowed") if fails else nullcontext():
        gpu_logs.main(settings)
    assert ("summary: 2 losses" in capsys.readouterr().out) is not fails


def test_trainings_that_are_not_there_are_refused(gpu_logs, output):
    log_training(output / "logs" / "06_gpt2" / "mine" / "smoke" / "alone" / "text" / "gpt2", [3.0])
    with pytest.raises(ValueError, match="0 trainings called 'fsdp'"):
        gpu_logs.main(gpu_logs.Settings("06_gpt2", alike=("alone", "fsdp")))
    with pytest.raises(ValueError, match="give the names of two runs"):
        gpu_logs.main(gpu_logs.Settings("06_gpt2", alike=("alone",)))
    with pytest.raises(ValueError, match="no run of 07_amp has ended"):
        gpu_logs.main(gpu_logs.Settings("07_amp", ("speedup",)))


def test_a_weeks_line_has_the_figures_and_names_what_was_not_measured(gpu_logs, output, capsys):
    logs = output / "logs" / "07_amp" / "mine" / "gpu" / "text"
    write_json(logs / "week.json", {"metrics": {"speedup": 4.5, "fp32_ms": 120.25}})
    with RunLog(logs / "format-fp8") as log:
        log.finish(step="fp8", note=f"{NOT_MEASURED}needs a newer card")
    gpu_logs.main(gpu_logs.Settings("07_amp", ("fp32_ms", "fp8_ms", "speedup")))
    assert capsys.readouterr().out == (
        "not on this device: fp8: needs a newer card\nsummary: fp32 ms 120.2, speedup 4.5\n"
    )
    with pytest.raises(ValueError, match="has none of loss; it has: speedup, fp32_ms"):
        gpu_logs.main(gpu_logs.Settings("07_amp", ("loss",)))


@pytest.mark.parametrize(
    ("topic", "size", "study"),
    [("06_gpt2", "TRAINING_SIZE", ()), ("07_amp", "LOSS_SIZE", ("--study", "loss"))],
    ids=["training", "loss"],
)
def test_the_weeks_take_the_settings_of_the_real_size(topic, size, study):
    """A run on a CPU never reads them."""
    source = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    given = re.search(rf'^{size}="(--[^"]+)"', source, flags=re.M)[1].split()
    arguments = ["--preset", "gpu", "--device", "cuda", "--data", "tinyshakespeare", *study, *given]
    settings = parse(load_script(topic).PRESETS, arguments)
    values = dict(zip(given[::2], given[1::2]))
    if topic == "06_gpt2":
        assert settings.train.steps == int(values["--train.steps"]) == 300
        assert (settings.train.batch_size, settings.train.block_size) == (32, 1024)
        assert settings.dtype == "bfloat16" and settings.compile_model
        assert settings.train.grad_accum_steps == 1
    else:
        assert settings.loss_tokens == 32 * 1024 and settings.chunk_sizes == (1024, 4096)
