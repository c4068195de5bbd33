"""What several test files share: a small text in a cache of its own, and a folder for what scripts write."""

import runpy
import subprocess

import pytest
from hypothesis import settings

from shared.data.corpus import Corpus, load_corpus
from tests.helpers import synthetic_text

settings.register_profile("seeded", derandomize=True, deadline=None)  # timings are no tests
settings.load_profile("seeded")
collect_ignore = ["mutants.py"]  # a program, whose library `make mutants` installs


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Corpus:
    """The synthetic text by characters, its file and its tokens under `tmp_path`."""
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(synthetic_text(), encoding="utf-8")
    return load_corpus(str(path))


@pytest.fixture
def output(tmp_path, monkeypatch):
    """Where logs, reports and checkpoints go."""
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    return tmp_path


@pytest.fixture
def run_module(monkeypatch, capsys):
    """`python -m NAME ARGUMENTS`, in this process: a new one would import PyTorch for seconds."""

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *arguments])
        code = 0
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return run
