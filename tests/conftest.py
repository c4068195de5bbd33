"""What several test files share: a small text in a cache of its own, and a folder for what scripts write."""

import pytest

from shared.data.corpus import Corpus, load_corpus
from tests.helpers import synthetic_text


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
