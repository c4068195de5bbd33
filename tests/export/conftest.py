"""What the tests of this folder share: fixtures."""

from pathlib import Path

import pytest

from shared import checkpoint
from tests.export.helpers import bpe, made


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return checkpoint.save(
        made("Qwen3, as in week 4's modern recipe"),
        tmp_path_factory.mktemp("c") / "best",
        bpe(),
        {"val_loss": 1.2345},
    )
