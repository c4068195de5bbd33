"""Before any test, and before the kernels that run the notebooks: a person's own answers are out of sight."""

import itertools
import os
import tempfile
from pathlib import Path

import pytest

_ANSWERS = tempfile.TemporaryDirectory(prefix="llm-weeks-answers-")
_COUNT = itertools.count()
os.environ["LLM_WEEKS_ANSWERS"] = _ANSWERS.name  # a kernel inherits it


@pytest.fixture(autouse=True)
def answers_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for the answers of this test, which is made when something is kept there."""
    folder = Path(_ANSWERS.name, f"test-{next(_COUNT)}")
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(folder))
    return folder
