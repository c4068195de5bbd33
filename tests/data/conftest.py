"""What the tests of this folder share: fixtures."""

import pytest

from shared.data.shards import ShardConfig, build
from tests.data.helpers import DOCUMENTS, TOKENIZER, as_jsonl


@pytest.fixture
def config(tmp_path) -> ShardConfig:
    (tmp_path / "documents.jsonl").write_text(as_jsonl(DOCUMENTS), encoding="utf-8")
    return ShardConfig(
        str(tmp_path / "documents.jsonl"),
        str(tmp_path / "out"),
        val_tokens=2000,
        shard_tokens=5000,
        workers=1,
    )


@pytest.fixture
def built(config) -> ShardConfig:
    build(config, TOKENIZER)
    return config
