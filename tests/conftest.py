"""What several test files share: a small text, tokenized into a cache of its own."""

import random

import pytest

from shared.data import Corpus, load_corpus


def synthetic_text(words: int = 3000) -> str:
    """Made of thirty words in random order: about 17,000 characters in which there is something to learn."""
    draw = random.Random(7)
    known = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(30)]
    return " ".join(draw.choice(known) + draw.choice(["", "", "", ",", ".\n"]) for _ in range(words))


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Corpus:
    """The synthetic text by characters, its file and its tokens under `tmp_path`."""
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(synthetic_text(), encoding="utf-8")
    return load_corpus(str(path))
