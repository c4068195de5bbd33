"""shared/serving/load.py against a server whose every moment is known: a clock that ticks with each word it
sends.
"""

import asyncio
import json

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from shared.serving import load
from shared.serving.load import Load, percentile


def chunk(choices: list[dict], usage: dict | None = None) -> str:
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


class Stub:
    """Sends the words that are asked for, each when all requests that are there have had one; a second of its
    clock for each round of them.
    """

    def __init__(self, monkeypatch, broken: str | None = None):
        self.now = 0.0
        self.busy = 0
        self.most: list[int] = []
        self.asked: list[dict] = []
        self.broken = broken
        monkeypatch.setattr(load, "clock", lambda: self.now)
        monkeypatch.setattr(load, "client", self.client)

    def client(self, url: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app()), base_url=url)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        async def health():
            return {}

        @app.post("/v1/completions")
        async def completions(request: Request):
            body = await request.json()
            if self.broken == "refuses":
                return JSONResponse({"error": {"message": "too much"}}, 400)
            self.asked.append(body)
            return StreamingResponse(self.events(body), media_type="text/event-stream")

        return app

    async def events(self, body):
        self.busy += 1
        self.most.append(self.busy)
        tokens = body["max_tokens"]
        for _ in range(tokens):
            await asyncio.sleep(0)
            self.now += 1 / self.busy
            yield chunk([{"text": "word "}])
        self.busy -= 1
        if self.broken != "breaks off":
            usage = {"completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 5}}
            yield chunk([], usage)
            yield "data: [DONE]\n\n"


def test_throughput_asks_for_the_same_work_each_way_in_turns(monkeypatch):
    stub = Stub(monkeypatch)
    asked = Load(tokens=6, texts=4, at_once=(1, 4), turns=3, clients=2)
    rates = asyncio.run(load.throughput("http://stub/v1", lambda number: [number], asked))
    assert {n: len(values) for n, values in rates.items()} == {1: 3, 4: 3}
    assert rates[1] == pytest.approx([1.0] * 3) and min(rates[4]) > 2  # a second a word alone; four share one
    measured = stub.most[2:]
    assert [max(measured[i : i + 4]) for i in range(0, 24, 4)] == [1, 4, 1, 4, 1, 4]
    prompts = [body["prompt"] for body in stub.asked]
    assert len({str(p) for p in prompts}) == len(prompts) == 2 + 24  # never the same one twice
    assert all(body["ignore_eos"] and body["stream"] for body in stub.asked)
    assert [body["max_tokens"] for body in stub.asked] == [8] * 2 + [6] * 24


def test_delays_of_every_request_and_never_more_clients_than_said(monkeypatch):
    stub = Stub(monkeypatch)
    asked = Load(tokens=5, requests=7, clients=3)
    found = asyncio.run(load.delays("http://stub/v1", lambda number: "x", asked))
    assert len(found.first) == 7 and len(found.between) == 7 * 4 and found.health
    assert max(stub.most) == 3


def test_a_text_is_timed_from_asking_and_knows_what_was_reused(monkeypatch):
    stub = Stub(monkeypatch)

    async def one():
        async with load.client("http://stub/v1") as http:
            return await load.ask_for_text(http, "x", 3)

    text = asyncio.run(one())
    assert (text.tokens, text.reused, len(text.times)) == (3, 5, 3) and stub.now == 3


@pytest.mark.parametrize(
    "broken, words", [("refuses", "the server says 400: .*too much"), ("breaks off", "broke off a text")]
)
def test_what_the_server_does_not_do_is_said(broken, words, monkeypatch):
    Stub(monkeypatch, broken)
    asked = Load(tokens=2, texts=1, at_once=(1,), turns=1)
    with pytest.raises(ValueError, match=words):
        asyncio.run(load.throughput("http://stub/v1", lambda number: "x", asked))


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(ValueError, match="the server did not start: .*nothing-here"):
        with load.served(str(tmp_path / "nothing-here")):
            pass


@pytest.mark.parametrize("q", [0, 0.01, 0.25, 0.5, 0.9, 0.95, 1])
def test_percentiles_are_numpys(q):
    values = np.random.default_rng(0).exponential(size=41).tolist()
    assert percentile(values, q) == np.quantile(values, q, method="inverted_cdf")


def test_loads_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="tokens=0: must be at least 1; at_once of 0=0"):
        Load(tokens=0, at_once=(1, 0))
