"""What several test files share: a small text, tokenized into a cache of its own; a folder for what scripts write; a server."""

import random
import threading
from contextlib import contextmanager

import pytest
import uvicorn

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


@pytest.fixture
def output(tmp_path, monkeypatch):
    """Where logs, reports and checkpoints go."""
    monkeypatch.setenv("LLM_WEEKS_OUTPUT", str(tmp_path))
    return tmp_path


@contextmanager
def serving(app):
    """A real server on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
