"""What several test files share: a small text in a cache of its own, a folder for what scripts write, and a
browser.
"""

import os
import runpy
import shutil
import subprocess
import sys

import pytest
from hypothesis import settings
from playwright.sync_api import sync_playwright

from shared.data.corpus import Corpus, load_corpus
from tests.helpers import synthetic_text

settings.register_profile("seeded", derandomize=True, deadline=None)  # timings are no tests
settings.load_profile("seeded")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
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


@pytest.fixture(scope="module")
def chromium():
    """A browser that reaches this machine alone. Where it is missing, tests are skipped; in CI they fail."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        message = "tests in a browser need Chromium: install it (Debian: apt-get install chromium)"
        if os.environ.get("CI") and sys.platform == "linux":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        offline = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=path, args=[*FLAGS, offline])
        yield browser
        browser.close()
