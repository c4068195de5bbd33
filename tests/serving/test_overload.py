"""A server under more than it can do: a full queue, texts that take too long, a failing model, and clients
that leave.
"""

import asyncio
import json
import random
import threading
from collections import Counter

import httpx
import openai
import pytest

from shared.serving.api import create_app
from shared.serving.gate import Limits
from tests.helpers import serving
from tests.serving.helpers import (
    COMPLETIONS,
    JSON,
    PROMPT,
    TOKENIZER,
    before_each_read,
    check_error,
    client,
    complete,
    expected,
    gpt,
)


class Held:
    """A model whose forward pass waits until it may, at the latest until the end of `with`."""

    def __init__(self):
        self.model = gpt()
        self.entered = threading.Event()
        self.may = threading.Event()
        self.model.register_forward_pre_hook(self._wait)

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *error) -> None:
        self.may.set()

    def _wait(self, module, args) -> None:
        self.entered.set()
        assert self.may.wait(20)


def test_a_full_queue_and_a_server_that_shuts_down_say_so_while_health_answers():
    # In this order: what is held goes on before the client waits for its end.
    held = Held()
    with client(held.model, slots=1, queue=1) as talk, held:
        answers: list = []

        def ask() -> None:
            answers.append(complete(talk, max_tokens=5, seed=1))

        running, waiting = (threading.Thread(target=ask, daemon=True) for _ in range(2))
        running.start()
        assert held.entered.wait(20)
        waiting.start()
        while talk.engine.busy + talk.engine.waiting < 2:
            pass
        full = complete(talk)
        check_error(full, 429, "1 texts are being written and 1 wait", code="queue_full")
        assert full.headers["retry-after"] == "1"
        check_error(complete(talk, stream=True), 429, "ask again later", code="queue_full")
        check_error(complete(talk, n=3), 429, "ask again later", code="queue_full")
        assert talk.get("/ready").status_code == 200
        talk.engine.drain()
        drained = complete(talk)
        check_error(drained, 503, "shutting down", code="shutting_down")
        assert drained.headers["retry-after"] == "1"
        assert talk.get("/ready").status_code == 503 and talk.get("/health").status_code == 200
        held.may.set()
        running.join(20)
        waiting.join(20)
        assert [a.json()["choices"][0]["text"] for a in answers] == [expected(PROMPT, 5, seed=1)] * 2
        assert talk.engine.busy == talk.engine.waiting == 0


def test_several_texts_are_taken_together_or_not_at_all():
    with client(slots=2, queue=1) as talk:
        check_error(complete(talk, n=4), 429, "ask again later", code="queue_full")
        assert talk.engine.wait_idle(10)
        assert len(complete(talk, n=3, max_tokens=3).json()["choices"]) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_takes_too_long_is_an_error(stream):
    with client(limits=Limits(seconds=1e-9)) as talk:
        answer = complete(talk, stream=stream)
        if not stream:
            check_error(answer, 504, "not finished within 1e-09 s", code="timeout")
        else:
            assert json.loads(answer.text.removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_failing_model_is_an_error_of_the_server_and_it_goes_on():
    with client(gpt()) as talk:
        restore = before_each_read(talk.engine, lambda: 1 / 0)
        check_error(complete(talk), 500, "could not be finished")
        restore()
        (choice,) = complete(talk, max_tokens=5, seed=1).json()["choices"]
        assert choice["text"] == expected(PROMPT, 5, seed=1)


def scope_of_a_completion() -> dict:
    """The ASGI scope of a POST to /v1/completions."""
    return {
        "type": "http",
        "asgi": {"spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": COMPLETIONS,
        "raw_path": b"",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("x", 1),
        "client": ("y", 2),
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_the_text_of_a_client_that_leaves_is_given_up_within_a_step(stream, after):
    """The server's side of a connection, played by hand: the client is gone when `after` tokens have been
    drawn.
    """
    model = gpt()
    app = create_app(model, TOKENIZER, name="tiny", slots=1)
    engine = app.state.server.engine
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 100,
        "stream": stream,
        "ignore_eos": True,
        "seed": 1,
    }
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    steps, left_at = [], []

    async def play() -> None:
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        noticed = threading.Event()

        def hold():
            steps.append(engine.generated_tokens)
            if engine.generated_tokens >= after and not left_at:
                left_at.append(len(steps))
                loop.call_soon_threadsafe(gone.set)
                assert noticed.wait(20)  # whatever is drawn after this would be too much

        before_each_read(engine, hold)

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        try:
            await app(scope_of_a_completion(), receive, send)
        finally:
            noticed.set()
        assert await asyncio.to_thread(engine.wait_idle, 10)

    try:
        asyncio.run(play())
    finally:
        engine.close()
    assert left_at and len(steps) <= left_at[0] + 1
    assert engine.ended["cancelled"] == 1 and engine.generated_tokens <= after + 2


WEIGHTS = {
    "whole": 24,
    "stream": 24,
    "leave": 30,
    "malformed": 7,
    "too long": 7,
    "too large": 4,
    "too many": 4,
}
REFUSED = {"malformed": 400, "too long": 400, "too large": 413, "too many": 429}


class Crowd:
    """Clients of a server: those who read their text, those who leave, and those whose requests are wrong."""

    def __init__(self, kinds: list[str]):
        self.kinds = kinds
        self.seen: Counter[tuple[str, int]] = Counter()
        self.health: list[int] = []

    async def visit(self, url: str) -> None:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
            gate = asyncio.Semaphore(14)
            clients = [self.one(http, number, kind, gate) for number, kind in enumerate(self.kinds)]
            work = asyncio.gather(*clients)
            while not work.done():
                self.health.append((await http.get("/health")).status_code)
                await asyncio.wait([work], timeout=0.2)
            await work

    async def one(self, http: httpx.AsyncClient, number: int, kind: str, gate: asyncio.Semaphore) -> None:
        body = self.body(number, kind)
        content = json.dumps(body).encode()
        if kind == "malformed":
            content = b'{"model": "tiny", "prompt"'
        elif kind == "too large":
            content = b" " * 6000
        text = ""
        if kind in ("whole", "stream"):  # the others do not read theirs to its end
            text = expected(body["prompt"], body["max_tokens"], seed=number)
        async with gate:
            status = await self.ask(http, content, kind, text)
            while status == 429 and kind not in REFUSED:  # a client does what it is told: it asks again
                self.seen[kind, 429] += 1
                status = await self.ask(http, content, kind, text)
        assert status == REFUSED.get(kind, 200)
        self.seen[kind, status] += 1

    def body(self, number: int, kind: str) -> dict:
        body = {
            "model": "tiny",
            "prompt": [number % 300, 7, number % 11] * (1 + number % 9),
            "max_tokens": 4 + number % 30,
            "seed": number,
            "stream": kind in ("stream", "leave"),
        }
        if kind == "too long":
            body["prompt"] = [1] * 200
        if kind == "too many":
            # More than slots and queue together. Whoever comes at the same moment finds them full too.
            body["n"] = 25
        return body

    async def ask(self, http: httpx.AsyncClient, content: bytes, kind: str, right_text: str) -> int:
        async with http.stream("POST", COMPLETIONS, content=content, headers=JSON) as answer:
            text = ""
            async for line in answer.aiter_lines():
                if answer.status_code == 200 and line.startswith("data: {"):
                    text += "".join(c["text"] for c in json.loads(line[6:])["choices"])
                elif answer.status_code == 200 and line.startswith("{"):
                    text = json.loads(line)["choices"][0]["text"]
                if kind == "leave" and answer.status_code == 200:
                    return 200
        assert answer.status_code != 200 or text == right_text
        return answer.status_code


@pytest.mark.slow
def test_it_survives_500_requests_of_which_many_leave_or_are_wrong():
    app = create_app(gpt(), TOKENIZER, name="tiny", slots=8, queue=16, chunk=8, limits=Limits(body=5000))
    engine = app.state.server.engine
    kinds = random.Random(0).choices(list(WEIGHTS), list(WEIGHTS.values()), k=500)
    crowd = Crowd(kinds)
    with serving(app) as url:
        asyncio.run(crowd.visit(url))
        assert engine.wait_idle(30) and engine.busy == engine.waiting == 0
        theirs = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = theirs.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, seed=1)
        assert answer.choices[0].text == expected(PROMPT, 5, seed=1)
    assert {kind: crowd.seen[kind, REFUSED.get(kind, 200)] for kind in set(kinds)} == Counter(kinds)
    assert set(crowd.health) == {200}
    assert engine.ended["error"] == engine.ended["timeout"] == 0
