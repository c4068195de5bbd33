"""`python -m shared.serving`: a process that finishes its texts after a signal, and errors in one line."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import openai
import pytest

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, save_adapter
from shared.runtime import ROOT
from shared.serving.__main__ import Settings, wanted_key
from tests.serving.helpers import TOKENIZER, gpt

WITHOUT_END = {"ignore_eos": True}


@pytest.fixture
def folder(tmp_path):
    """With the model "tiny" and its adapter "pirate"."""
    model = add_lora(gpt(), LoRAConfig(r=2), "pirate")
    save_adapter(model, tmp_path / "pirate", "pirate")
    return checkpoint.save(gpt(), tmp_path / "tiny", TOKENIZER).parent


def environment(**variables: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "LLM_WEEKS_TRACE"} | variables


@contextmanager
def process(*args: str):
    """`python -m shared.serving` on a free port: the process, and its address."""
    command = [sys.executable, "-m", "shared.serving", "--device", "cpu", "--port", "0", *args]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(LLM_WEEKS_API_KEY="secret"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            output = ""
            for line in server.stderr:
                output += line
                if "running on" in line:
                    break
            yield server, next(word for word in output.split() if word.startswith("http://127.0.0.1:"))
        finally:
            server.kill()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)


@pytest.mark.slow
def test_sigterm_under_load_finishes_what_is_there_and_refuses_what_comes(folder):
    adapter = f"pirate={folder / 'pirate'}"
    options = ["--quantize", "int8", "--adapters", adapter, "--slots", "2"]
    with process("--model", str(folder / "tiny"), *options) as (server, url):
        theirs = client_of(url)
        assert [m.id for m in theirs.models.list()] == ["tiny", "pirate"]
        body = dict(prompt="a", max_tokens=100, stream=True, n=4, extra_body=WITHOUT_END)
        streams = [theirs.completions.create(model=model, **body) for model in ("tiny", "pirate")]
        firsts = [next(stream) for stream in streams]
        server.send_signal(signal.SIGTERM)
        assert "SIGTERM: finishing" in server.stderr.readline()
        # 503, or nobody listens any more.
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            theirs.completions.create(model="tiny", prompt="a")
        for first, stream in zip(firsts, streams):
            chunks = [first, *stream]
            ended = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
            assert sorted(ended) == [0, 1, 2, 3]
        assert server.wait(60) == 0


@pytest.mark.slow
def test_after_its_grace_a_server_ends_what_is_there(folder):
    with process("--model", str(folder / "tiny"), "--grace", "0", "--slots", "1") as (server, url):
        stream = client_of(url).completions.create(
            model="tiny", prompt="a", max_tokens=120, stream=True, n=60, extra_body=WITHOUT_END
        )
        next(stream)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.wait(60) == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_but_not_by_a_crash(folder):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 120, "stream": True, "n": 60} | WITHOUT_END
    headers = {"Authorization": "Bearer secret"}
    with process("--model", str(folder / "tiny"), "--slots", "1") as (server, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert "SIGTERM: finishing" in server.stderr.readline()
            server.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):  # cut off in the middle
                list(lines)
        assert server.wait(60) == 0


@pytest.mark.slow
def test_a_connection_that_says_nothing_is_ended(folder):
    options = ["--model", str(folder / "tiny"), "--limits.header-seconds", "0.2"]
    with process(*options) as (_, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection:
            assert connection.recv(1) == b""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with a mark"])
def test_a_key_is_read_whatever_editor_wrote_it(tmp_path, encoding):
    path = tmp_path / "key"
    name, _, marked = encoding.partition(" ")
    path.write_bytes(("\ufeff" * bool(marked) + "sésame\r\n").encode(name))
    assert wanted_key(Settings(api_key_file=str(path))) == "sésame"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "nowhere/at/all", "--adapters", "x"), "adapters: 'x' is not NAME=FOLDER"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
        (("--model", "x", "--port", "70000"), "port=70000: must be from 0 to 65535"),
        (("--model", "x", "--threads", "0"), "threads=0: must be at least 1"),
    ],
    ids=["adapter", "model", "port", "threads"],
)
def test_an_error_on_the_command_line_is_one_line(args, message, run_module):
    done = run_module("shared.serving", "--device", "cpu", *args)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
