"""What the tests of the weeks share."""

import multiprocessing
import os
from shutil import copytree

import pytest

from shared import commandline
from shared.course import report
from shared.training import profiling
from shared.training.base_model import trained_base_model
from tests.pictures import unrendered
from tests.weeks.helpers import RHYME


@pytest.fixture(autouse=True)
def processes_that_have_pytorch(monkeypatch):
    """What has a process of its own has one here too, but forked from one that has imported PyTorch and its
    compiler, which takes a new one seconds.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "shared.training.tricks"])
    monkeypatch.setattr(profiling, "get_context", lambda method: context)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nobody waits for the disk: no machine fails here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def trained_on_the_rhyme(tmp_path_factory):
    """A folder with RHYME, rhyme.txt, and what week 6's run left there: a small model trained on it."""
    folder = tmp_path_factory.mktemp("week-6")
    text = folder / "rhyme.txt"
    text.write_text(RHYME, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_WEEKS_OUTPUT", str(folder))
        trained_base_model("smoke", data=str(text))
    return folder


@pytest.fixture
def base_model(output, trained_on_the_rhyme):
    """Week 6's model is there already."""
    copytree(trained_on_the_rhyme, output, dirs_exist_ok=True)


@pytest.fixture
def unrendered_plots():
    """No pictures: test_scripts.py looks at them."""
    with unrendered():
        yield


@pytest.fixture
def error_lines(output, monkeypatch, capsys):
    """Starts a week's script from the command line, where it must fail; returns what stderr says."""

    def start(topic, *arguments):
        module = report.load_script(topic)
        monkeypatch.setattr("sys.argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            commandline.cli(module.main, module.PRESETS, module.__doc__)
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()

    return start


@pytest.fixture
def refuses(output, error_lines):
    """Starts a week's script: it must end in one line that has `words`, and log nothing."""

    def start(topic, arguments, words):
        last = error_lines(topic, "--preset", "smoke", *arguments)[-1]
        assert last.startswith("error: ") and words in last
        assert not (output / "logs" / topic).exists()

    return start


@pytest.fixture
def text_file(tmp_path):
    """A small text of its own, so that nothing is fetched."""
    path = tmp_path / "rhyme.txt"
    path.write_text(RHYME, encoding="utf-8")
    return str(path)
