"""shared/serving/answer.py and gate.py: what is given up, counted and timed, with clients played by hand."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.sampling import generate
from shared.serving.api import create_app
from shared.serving.gate import Limits
from shared.serving.generation import Generation
from shared.tokenizers import BPETokenizer
from tests.helpers import synthetic_text
from tests.serving.helpers import (
    CHAT,
    COMPLETIONS,
    JSON,
    PROMPT,
    TOKENIZER,
    before_each_read,
    check_error,
    client,
    complete,
    gpt,
)
from tests.serving.test_overload import Held, scope_of_a_completion


def metrics_of(talk) -> dict[tuple, float]:
    """Samples by name and labels."""
    families = text_string_to_metric_families(talk.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


@pytest.mark.parametrize(("path", "stream"), [(COMPLETIONS, False), (COMPLETIONS, True), (CHAT, False)])
def test_a_mistake_of_the_server_is_a_500_in_openais_form_and_counted_once(monkeypatch, path, stream):
    tokenizer = BPETokenizer.train(synthetic_text(400), 300, special_tokens=list(TOKENIZER.special_tokens))
    with client(tokenizer=tokenizer) as talk:
        with monkeypatch.context() as broken:
            broken.setattr(tokenizer, "encode", lambda text, *rest: 1 / 0)
            check_error(complete(talk, path, stream=stream), 500, "its log says which")
        assert complete(talk, path, max_tokens=1).status_code == 200
        found = metrics_of(talk)
    counted = {key[1:]: count for key, count in found.items() if key[0] == "llm_requests_total"}
    assert counted[path, "500"] == counted[path, "200"] == 1


def test_every_answer_is_counted_once_by_its_status():
    with client(api_key="k", limits=Limits(body=500)) as talk:
        talk.headers["Authorization"] = "Bearer k"
        complete(talk, max_tokens=1)
        complete(talk, max_tokens=1, stream=True)
        complete(talk, n=0)
        talk.post(COMPLETIONS, content=b" " * 501)
        talk.post(COMPLETIONS, content=(b" " * 100 for _ in range(6)), headers=JSON)
        talk.get("/v1/models", headers={"Authorization": "Bearer no"})
        found = metrics_of(talk)
    counted = {key[1:]: count for key, count in found.items() if key[0] == "llm_requests_total"}
    assert counted == {
        (COMPLETIONS, "200"): 2,
        (COMPLETIONS, "400"): 1,
        (COMPLETIONS, "413"): 2,
        ("/v1/models", "401"): 1,
    }


def test_the_times_of_tokens_are_those_of_the_clock(monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(
        "shared.serving.answer.time", SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    )
    with client() as talk:
        complete(talk, max_tokens=7, ignore_eos=True)
        found = metrics_of(talk)
    # The clock ticks with each look at it: at the start, and at each token.
    assert found[("llm_time_to_first_token_seconds_sum",)] == 1
    assert found[("llm_time_between_tokens_seconds_sum",)] == 6


def test_texts_of_a_request_that_is_refused_halfway_are_given_up():
    held = Held()
    with client(held.model, slots=2, queue=1) as talk, held:
        check_error(
            complete(talk, n=4, max_tokens=100, ignore_eos=True), 429, "again later", code="queue_full"
        )
        held.may.set()
        assert talk.engine.wait_idle(20)
        assert talk.engine.ended["cancelled"] == 3 and talk.engine.ended["length"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_a_stop_text_ended_is_given_up_while_another_goes_on(monkeypatch, stream):
    model, cancelled, waited = gpt(), threading.Event(), []
    cancel = Generation.cancel

    def note(self):
        cancel(self)
        cancelled.set()

    monkeypatch.setattr(Generation, "cancel", note)
    first, second = (TOKENIZER.decode(list(generate(model, [5], 100, seed=seed))) for seed in (8, 9))
    stop = first[3:12]
    assert stop not in second
    with client(model) as talk:

        def wait_for_the_server():
            if talk.engine.generated_tokens >= 60 and not waited:  # the stop text is among them
                waited.append(cancelled.wait(5))

        before_each_read(talk.engine, wait_for_the_server)
        options = {"max_tokens": 100, "seed": 8, "n": 2, "stop": stop, "stream": stream, "ignore_eos": True}
        assert complete(talk, prompt=[5], **options).status_code == 200
        assert talk.engine.wait_idle(20)
        assert waited == [True]
        assert talk.engine.ended["cancelled"] == talk.engine.ended["length"] == 1


def test_a_text_in_more_characters_than_there_may_be_tokens_is_read():
    text = PROMPT * 3
    count = len(TOKENIZER.encode(text))
    assert len(text) > count
    with client(limits=Limits(prompt=count)) as talk:
        assert complete(talk, prompt=text, max_tokens=1).status_code == 200
        assert complete(talk, prompt=text + "a", max_tokens=1).status_code == 400


@pytest.mark.parametrize("length", [499, 500, 501])
def test_a_body_may_have_as_many_bytes_as_is_said(length):
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 1}).encode().ljust(length)
    with client(limits=Limits(body=500)) as talk:
        status = 200 if length <= 500 else 413
        assert talk.post(COMPLETIONS, content=body, headers=JSON).status_code == status
        parts = (body[i : i + 50] for i in range(0, length, 50))
        assert talk.post(COMPLETIONS, content=parts, headers=JSON).status_code == status


class Clock:
    """A clock that is set by hand, in place of the gate's."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("shared.serving.gate.time", SimpleNamespace(monotonic=lambda: self.now))


def status_of(parts: list[bytes], clock: Clock, seconds: float) -> int:
    """The status for a body that comes in parts, each so many seconds after the one before."""
    app = create_app(gpt(), TOKENIZER, name="tiny", limits=Limits(body_seconds=10))
    statuses = []

    async def play() -> None:
        left = list(parts)

        async def receive():
            await asyncio.sleep(0)
            clock.now += seconds
            if left:
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
            await asyncio.Event().wait()  # the client stays

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await app(scope_of_a_completion(), receive, send)

    try:
        asyncio.run(play())
    finally:
        app.state.server.engine.close()
    (status,) = statuses
    return status


def test_all_of_a_body_has_its_time_together(monkeypatch):
    clock = Clock(monkeypatch)
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 1}).encode()
    parts = [body[i : i + 8] for i in range(0, len(body), 8)]
    assert len(parts) > 5
    assert status_of(parts, clock, seconds=1) == 200
    assert status_of(parts, clock, seconds=4) == 408


def test_an_answer_may_take_longer_than_a_body(monkeypatch):
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 5}).encode()
    assert status_of([body], Clock(monkeypatch), seconds=1000) == 200
