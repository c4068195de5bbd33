"""shared/commandline.py: settings from presets, files and flags, and errors that are one line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from io import BytesIO, TextIOWrapper
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from shared import commandline
from shared.commandline import cli, errors_for_people, flags, parse, parse_args, without_idle
from shared.course.workspace import WeekSettings
from shared.models.config import GPTConfig, LayerKind, RopeScaling
from shared.runtime import ROOT, RunLog, write_json
from shared.training import TrainConfig


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


PRESETS = {"laptop": Settings(), "smoke": Settings("smoke", Train(steps=1))}


def test_a_preset_and_flags_make_the_settings():
    assert parse(PRESETS, ["--preset", "smoke"]) == PRESETS["smoke"]
    line = "--train.lr 0.5 --preset=smoke --stop a b --train.windows 7 --quick"
    got = parse(PRESETS, line.split())
    assert got == Settings("smoke", Train(steps=1, lr=0.5, windows=7), ("a", "b"), True)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--lr=0.5", "--steps", "4"], Settings("smoke", Train(steps=4, lr=0.5))),
        (["--quick=True"], Settings("smoke", Train(steps=1), quick=True)),
        (["--quick", "--no-quick"], Settings("smoke", Train(steps=1))),
        (["--quick=False", "--seed=7"], Settings("smoke", Train(steps=1, seed=7))),
    ],
    ids=str,
)
def test_a_flag_may_leave_out_its_group_and_a_switch_may_have_a_value(args, expected):
    assert parse(PRESETS, ["--preset", "smoke", *args]) == expected


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(train=Train(steps=4, lr=1e-7, windows=3)),
        Settings(stop=("a", "b c"), quick=True),
        Settings(train=Train(windows=None, seed=-1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "preset",
    [Settings(), Settings(train=Train(lr=0.5, windows=9), stop=("x",), quick=True)],
    ids=["plain", "other"],
)
def test_flags_are_what_parse_reads_back(settings, preset):
    assert parse({"laptop": preset}, ["--preset", "laptop", *flags(settings, preset)]) == settings


def test_groups_of_settings_that_may_be_absent_are_flags_with_json(tmp_path):
    plain = GPTConfig.preset("mini")
    scaled = replace(
        plain, rope_scaling=RopeScaling("linear", 2.0), layers=(LayerKind(window=4), LayerKind())
    )
    assert flags(plain, plain) == []
    assert parse_args(GPTConfig, flags(scaled, plain), default=plain) == scaled
    assert parse_args(GPTConfig, flags(plain, scaled), default=scaled) == plain
    with pytest.raises(ValueError, match="--layers: Unterminated string"):
        parse_args(GPTConfig, ["--layers", '{"x'], default=plain)
    with pytest.raises(ValueError, match="--rope-scaling: RopeScaling: factor=-2: must be above 0"):
        parse_args(GPTConfig, ["--rope-scaling", '{"kind": "linear", "factor": -2}'], default=plain)


def test_a_flag_that_two_groups_have_is_not_guessed():
    @dataclass(frozen=True)
    class Two:
        preset: str = "laptop"
        first: Train = Train()
        second: Train = Train()

    with pytest.raises(ValueError, match="--steps"):
        parse({"laptop": Two()}, ["--preset", "laptop", "--steps", "3"])
    assert parse({"laptop": Two()}, ["--preset", "laptop", "--second.steps", "3"]).second.steps == 3


def test_what_settings_inside_of_settings_refuse_is_told_with_the_beginning_of_their_flags():
    @dataclass(frozen=True)
    class Week:
        preset: str = "laptop"
        own_train: TrainConfig = TrainConfig(steps=100, warmup_steps=50)

    with pytest.raises(ValueError) as error:
        parse({"laptop": Week()}, ["--preset", "laptop", "--own-train.steps", "10"])
    assert "warmup_steps=50 of steps=10" in str(error.value)
    assert str(error.value).endswith("(--help lists the settings; these begin with --own-train.)")


def test_without_a_preset_the_hardware_chooses_and_says_so(monkeypatch, capsys):
    gpu = PRESETS | {"gpu": Settings("gpu")}
    monkeypatch.setattr(commandline, "devices", lambda: [torch.device("cpu")])
    assert parse(gpu, []).preset == "laptop"
    said = "preset: laptop (chosen for this machine's cpu; there are: laptop, smoke, gpu)\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(commandline, "devices", lambda: [torch.device("cuda"), torch.device("cpu")])
    assert parse(gpu, []).preset == "gpu" and "chosen for this machine's cuda" in capsys.readouterr().out
    assert parse(PRESETS, []).preset == "laptop"  # where there is no preset for a GPU


def test_a_runs_own_file_gives_its_settings_again(tmp_path):
    settings = replace(PRESETS["smoke"], stop=("x", "y"), train=Train(3, 0.02, 4))
    with RunLog(tmp_path, settings):
        pass
    assert parse(PRESETS, ["--preset", "laptop", "--config", str(tmp_path / "run.json")]) == settings


def test_a_file_of_a_run_with_the_former_switch_for_tensorboard_is_understood(tmp_path):
    for switch, tracker in ((True, "tensorboard"), (False, "none")):
        (tmp_path / "run.json").write_text(json.dumps({"settings": {"tensorboard": switch}}))
        presets = {"laptop": WeekSettings()}
        assert (
            parse(presets, ["--preset", "laptop", "--config", str(tmp_path / "run.json")]).tracker == tracker
        )


def test_a_partial_file_lies_between_the_preset_and_the_flags(tmp_path):
    (tmp_path / "c.json").write_text('{"train": {"lr": 1, "steps": 7}, "stop": ["z"]}')
    got = parse(PRESETS, ["--preset", "smoke", "--config", str(tmp_path / "c.json"), "--train.steps", "8"])
    assert got == Settings("smoke", Train(steps=8, lr=1), ("z",))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "huge"], "no preset is called 'huge'; there are: laptop, smoke"),
        (["--preset"], "--preset needs a value"),
        (["--train.stepz", "3"], "--train.stepz.*--train.steps"),
        (["--nothing"], "--nothing"),
        (["--train.steps", "many"], "--train.steps.*'many'"),
        (["--train.lr"], "--train.lr"),
        (["--train.steps", "0"], "steps=0: must be at least 1"),
    ],
    ids=str,
)
def test_a_command_line_that_will_not_do_is_one_line(args, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(PRESETS, args if "--preset" in args else ["--preset", "smoke", *args])
    assert "\n" not in str(error.value) and "│" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"trian": {}}', "no setting 'trian'; there are: preset, train, stop, quick"),
        ('{"train": {"step": 1}}', "no setting 'step'; there are: steps, lr, windows, seed"),
        ('{"train": {"steps": 0}}', "steps=0: must be at least 1"),
        ('{"train": {"steps": "many"}}', "steps='many' is not of the kind of 1"),
        ('{"train": {"steps": 1.5}}', "steps=1.5 is not of the kind of 1"),
        ('{"train": 5}', "train=5, but train is a group of settings"),
        ('{"train": null}', "train=None, but train is a group of settings"),
        ('{"train": {"steps": null}}', "steps must have a value, such as 1"),
        ('{"quick": 1}', "quick=1 is not of the kind of False"),
        ('{"stop": "abc"}', "stop='abc' is not of the kind of"),
        ("[]", "holds no settings"),
        ('{"settings": null}', "holds no settings"),
        ("{", "cannot be read as JSON"),
        (None, "cannot be read as JSON: No such file or directory"),
    ],
)
def test_a_config_file_that_will_not_do_is_one_line_that_names_it(tmp_path, content, message):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        parse(PRESETS, ["--preset", "smoke", "--config", str(path)])
    assert "\n" not in str(error.value)


def test_help_lists_the_settings_and_leaves_with_zero(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(PRESETS, ["--help-all"], "What it does.")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "What it does." in out and "--train.lr" in out
    for preset in PRESETS:
        assert preset in out.partition("--preset")[2].partition("\n")[0]
    assert "--config FILE.json" in out


def test_help_has_a_line_for_each_group_and_hides_none_of_the_plain_settings(capsys):
    shown = {}
    for flag in ("-h", "--help-all"):
        with pytest.raises(SystemExit):
            parse(PRESETS, [flag], "What it does.")
        shown[flag] = capsys.readouterr().out
    assert "--train.lr" not in shown["-h"] and len(shown["-h"]) < len(shown["--help-all"])
    count = shown["--help-all"].count("\n  --train.")
    assert f"--train.*  {count} settings" in " ".join(shown["-h"].split(" "))
    plain = [word for word in shown["--help-all"].split() if word.startswith("--") and "." not in word]
    assert all(word in shown["-h"] for word in plain if not set(word) <= {"-"})


def test_arguments_without_a_preset_are_parsed_too():
    assert parse_args(Train, ["--steps", "3"]) == Train(steps=3)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("lr=0: must be above 0"), 2, "error: lr=0: must be above 0\n"),
        (OSError(28, "No space left on device"), 3, "error: the disk is full: "),
        (KeyboardInterrupt(), 130, "\nstopped (Ctrl-C)"),
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (OSError(122, "Disk quota exceeded"), 3, "error: your quota on this disk is used up: "),
        (OSError(30, "x", "/r/a"), 3, "error: /r/a: the file system is read-only: "),
        (PermissionError(13, "x", "/r/a"), 3, "error: /r/a: permission denied: "),
        (PermissionError(1, "x", "/a", None, "/b"), 3, "error: /a -> /b: not permitted: "),
        (OSError(98, "Address already in use"), 3, "error: another program listens there: "),
        (
            SafetensorError("I/O error: Read-only file system (os error 30)"),
            3,
            "error: the file system is read-",
        ),
        (MemoryError(), 3, "error: there is not enough memory: "),
        (RecursionError("maximum depth"), 2, "error: something that was read is nested too deeply"),
    ],
    ids=repr,
)
def test_errors_for_people_are_one_line_and_a_status(monkeypatch, capsys, error, code, message):
    monkeypatch.delenv("LLM_WEEKS_TRACE", raising=False)
    with pytest.raises(SystemExit) as stop, errors_for_people():
        raise error
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert err.startswith(message) and err.strip().count("\n") == 0


def test_output_that_finds_no_room_is_said_before_the_program_ends(monkeypatch, capsys):
    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop, errors_for_people():
        patch.setattr(sys, "stdout", SimpleNamespace(closed=False, flush=full))
    assert stop.value.code == 3 and capsys.readouterr().err.startswith("error: the disk is full: ")


def child_of_a_file(folder):
    (folder / "file").write_text("")
    (folder / "file" / "child").write_text("")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (child_of_a_file, "child: a part of this path is a file, not a folder"),
        (lambda folder: write_json(folder / ("n" * 300), 1), "this name is too long"),
        (lambda folder: write_json(folder, 1), "this is a folder, and a file is needed"),
        (lambda folder: (folder / "no").read_text(), "no: no such file or folder"),
        (lambda folder: save_file({}, folder / "no" / "a"), "no such file or folder"),
        (lambda folder: torch.empty(2**60), "there is not enough memory"),
        (lambda folder: bytearray(2**60), "there is not enough memory"),
        (lambda folder: json.loads("[" * 10**5), "nested too deeply"),
    ],
    ids=["under a file", "long name", "a folder", "nowhere", "safetensors", "torch", "Python", "deep"],
)
def test_what_the_system_refuses_is_one_line(act, words, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LLM_WEEKS_TRACE", raising=False)
    with pytest.raises(SystemExit) as stop, errors_for_people():
        act(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code in (2, 3) and err.startswith("error: ")
    assert words in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 20_000], ids=["at the end", "while it runs"])
def test_output_that_nobody_reads_ends_a_program_in_one_line(lines):
    program = f"""
from shared.commandline import errors_for_people
with errors_for_people():
    for line in range({lines}):
        print(line)
"""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nobody:
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 141
    assert ran.stderr == "stopped: nobody reads the output any more; what was there is kept\n"


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(5, "disk broken"), AssertionError("ours")])
def test_what_a_person_cannot_mend_keeps_its_traceback(monkeypatch, error):
    monkeypatch.delenv("LLM_WEEKS_TRACE", raising=False)
    with pytest.raises(type(error)), errors_for_people():
        raise error


def test_the_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_TRACE", "1")
    with pytest.raises(ValueError), errors_for_people():
        raise ValueError("lr")


def test_cli_prints_the_settings_and_runs_main(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "--preset", "smoke", "--train.lr", "0.25"])
    seen = []
    cli(seen.append, PRESETS)
    assert seen == [Settings("smoke", Train(steps=1, lr=0.25))]
    assert capsys.readouterr().out.splitlines() == [
        "settings: preset=smoke, stop=(), quick=False",
        "train: steps=1, lr=0.25",
    ]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_that_lacks_a_character_does_not_end_a_run(monkeypatch, encoding):
    """What is printed reads back as the text, by the escapes of Python's own source."""
    streams = {name: TextIOWrapper(BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    text = "Ἄνδρα μοι ἔννεπε ▏█ 船"
    with errors_for_people():
        print(text)
    with pytest.raises(SystemExit), errors_for_people():
        raise ValueError(text)
    for stream, printed in zip(streams.values(), [text, f"error: {text}"]):
        stream.flush()
        assert stream.buffer.getvalue().decode("unicode_escape").strip() == printed


@dataclass(frozen=True)
class Choosy(Settings):
    """What `stop` is for, and the seed, goes with `quick`."""

    def idle(self) -> dict[str, str]:
        return {} if self.quick else {"stop": "quick is off", "train.seed": "quick is off"}


CHOOSY = {"laptop": Choosy()}


@pytest.mark.parametrize(
    "args", [["--stop", "a"], ["--train.seed=5"], ["--train.seed", "6"], ["--stop", "a", "--seed", "6"]]
)
def test_a_flag_that_is_not_read_is_refused_also_with_the_value_it_has_anyway(args):
    with pytest.raises(
        ValueError, match=r"has no effect in this run \(quick is off\).*Leave out what"
    ) as error:
        parse(CHOOSY, ["--preset", "laptop", *args])
    assert str(error.value).count("has no effect in") == sum(arg.startswith("--") for arg in args)
    assert parse(CHOOSY, ["--preset", "laptop", *args, "--quick"]).quick


def test_settings_that_are_not_read_are_not_shown_and_can_be_taken_from_the_preset(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "--preset", "laptop", "--lr", "0.25"])
    cli(do_nothing, CHOOSY)
    assert capsys.readouterr().out.splitlines() == ["settings: preset=laptop, quick=False", "train: lr=0.25"]
    changed = Choosy(train=Train(lr=0.5, seed=9), stop=("a",))
    assert without_idle(changed, Choosy()) == Choosy(train=Train(lr=0.5))
    assert without_idle(replace(changed, quick=True), Choosy()) == replace(changed, quick=True)


def do_nothing(settings: Choosy) -> None:
    """A week's `main` that does nothing."""
