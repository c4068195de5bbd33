"""shared/serving/llama_cpp.py: llama.cpp in a process of its own, with our model."""

import asyncio
import importlib.util
from contextlib import closing

import pytest

from shared.export import to_gguf
from shared.serving import llama_cpp
from shared.serving.llama_cpp import LlamaCpp
from shared.serving.load import Load, throughput
from tests.export.helpers import NEW, greedy, made, prompt, tokenizer_of

NAME = "Llama with grouped queries"


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="xllamacpp.*requirements-test.txt"):
        LlamaCpp(tmp_path / "m.gguf", 128, threads=1)


if importlib.util.find_spec("xllamacpp"):

    @pytest.fixture(scope="module")
    def file(tmp_path_factory):
        return to_gguf(made(NAME), tmp_path_factory.mktemp("llama") / "m.gguf", tokenizer_of(NAME), "F32")

    @pytest.mark.slow
    @pytest.mark.parametrize("half_cache", [False, True], ids=["F32", "F16"])
    def test_it_writes_our_64_tokens_and_says_when_each_came(file, half_cache):
        length = len(prompt(NAME)) + NEW
        with closing(LlamaCpp(file, length, threads=1, half_cache=half_cache)) as server:
            assert server.tokens(prompt(NAME), NEW) == greedy(NAME)
            times = server.times(prompt(NAME), NEW)
            assert len(server.times(prompt(NAME), 1)) == 2
        assert "CPU" in server.system
        assert len(times) == NEW + 1 and times[0] == 0
        assert all(earlier < later for earlier, later in zip(times, times[1:]))
        assert server.process.poll() is not None  # it has ended

    @pytest.mark.slow
    def test_a_load_of_several_texts_at_once_is_measured_as_of_our_server(file):
        load = Load(tokens=4, texts=6, at_once=(1, 2), turns=2, clients=2)
        ids = prompt(NAME)
        with closing(LlamaCpp(file, 40, threads=1, slots=2)) as server:
            rates = asyncio.run(throughput(server.url, lambda number: ids[number % 7 :], load))
        assert {number: len(values) for number, values in rates.items()} == {1: 2, 2: 2}
        assert min(map(min, rates.values())) > 0

    @pytest.mark.slow
    def test_a_file_that_it_cannot_read_is_named(tmp_path):
        path = tmp_path / "broken.gguf"
        path.write_bytes(b"GGUF")
        with pytest.raises(ValueError, match="llama.cpp cannot serve broken.gguf"):
            LlamaCpp(path, 128, threads=1)
