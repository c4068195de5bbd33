"""Week 12: its builds against the promoted engine, OpenAI's client and laws, and the script with a learner's
code.
"""

import json
from itertools import product

import httpx
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.course.exercise.answers import Shelf, load_module
from shared.models.config import MODERN
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import ROOT, read_json, seed_everything
from shared.sampling import generate
from shared.serving.load import percentile
from tests.weeks.helpers import DATA, script

EXERCISES = load_module(ROOT / "weeks/12_deploy/exercises.py", "week_12_exercises")
ANSWERS = load_module(ROOT / "weeks/12_deploy/answers.py", "week_12_answers")
BOTH = pytest.mark.parametrize("code", [EXERCISES, ANSWERS], ids=["reference", "answer"])


# ---- the engine


@pytest.fixture(scope="module")
def model():
    seed_everything(3)
    return GPT(GPTConfig(30, 32, 2, 2, 16, **MODERN)).eval().requires_grad_(False)


@BOTH
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_each_text_is_what_generate_writes_for_it_alone(code, slots, model):
    generator = torch.Generator().manual_seed(slots)
    engine, wanted = code.TinyEngine(model, slots), []
    for _ in range(12):
        length, new_tokens = (int(torch.randint(1, 12, (), generator=generator)) for _ in "12")
        prompt = torch.randint(30, (length,), generator=generator).tolist()
        alone = list(generate(model, prompt, new_tokens, temperature=0))
        stop = alone[new_tokens // 2] if new_tokens % 2 else None
        ends = () if stop is None else (stop,)
        wanted.append(list(generate(model, prompt, new_tokens, temperature=0, stop=ends)))
        assert engine.submit(prompt, new_tokens, stop) == len(wanted) - 1
        engine.step()
    while engine.waiting or set(engine.slots) != {None}:
        engine.step()
    assert engine.texts == wanted


# ---- the stop filter


def cut(text, stops):
    """The text up to the first place where a stop text begins."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def shown_by(code, stops, pieces):
    stream = code.StopFilter(stops)
    shown = [stream.feed(piece) for piece in pieces]
    return [*shown, stream.end()], stream.stopped


@pytest.mark.slow
@BOTH
@settings(max_examples=300, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("abc", max_size=4), max_size=6),
)
def test_no_cut_changes_what_is_shown(code, stops, pieces):
    text = "".join(pieces)
    shown, stopped = shown_by(code, stops, pieces)
    assert "".join(shown) == cut(text, stops)
    assert stopped == any(stop in text for stop in stops)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("stops", [["ab"], ["aab"], ["abba", "bb"], ["aba", "b"], ["ba", "bba"]])
def test_at_each_moment_all_that_no_continuation_takes_back_is_shown(code, stops):
    """Against all continuations of up to four letters, c among them, which is in no stop text."""
    ends = ["".join(letters) for n in range(5) for letters in product("abc", repeat=n)]
    for text in ("".join(letters) for n in range(6) for letters in product("abc", repeat=n)):
        stream = code.StopFilter(stops)
        shown = "".join(map(stream.feed, text))
        possible = [cut(text + end, stops) for end in ends]
        certain = next(
            (i for i, letters in enumerate(zip(*possible)) if len(set(letters)) > 1), min(map(len, possible))
        )
        assert shown == possible[0][: min(certain, len(text))], (text, stops)


# ---- the stream of events


TEXTS = ["Hello", "", ' "naïve"\n', "data: 🙂\n\n", "\r\n\u2028 end"]
HEAD = {"id": "chatcmpl-7", "created": 7, "model": "tiny"}


def parts(reason="length", fails=False):
    for text in TEXTS:
        yield text, None
    if fails:
        raise RuntimeError('the "engine"\nstopped')
    yield "", reason


def read_by_openai(stream):
    """What OpenAI's client reads of a stream, by a transport that hands it the bytes."""
    answer = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=stream)
    transport = httpx.MockTransport(lambda request: answer)
    client = openai.OpenAI(
        base_url="http://testserver/v1",
        api_key="any",
        http_client=httpx.Client(transport=transport),
        max_retries=0,
    )
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True
    )


@BOTH
@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}])
def test_openais_client_reads_the_stream(code, usage):
    stream = code.event_stream(parts(), HEAD, None if usage is None else usage.copy)
    chunks = list(read_by_openai(stream))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert [choice.delta.content for choice in choices[1:-1]] == [text for text in TEXTS if text]
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert {(chunk.id, chunk.created, chunk.model) for chunk in chunks} == {("chatcmpl-7", 7, "tiny")}
    assert chunks[-1].usage is None if usage is None else chunks[-1].usage.to_dict() == usage


@BOTH
def test_openais_client_raises_the_error_of_a_stream(code):
    with pytest.raises(openai.APIError, match='the "engine"\nstopped'):
        list(read_by_openai(code.event_stream(parts(fails=True), HEAD, None)))


@BOTH
@pytest.mark.parametrize("reader", [EXERCISES, ANSWERS], ids=["by reference", "by answer"])
def test_what_the_one_writes_the_other_reads(code, reader):
    stream = b"".join(code.event_stream(parts(), HEAD, None))
    chunks = [stream[i : i + 5] for i in range(0, len(stream), 5)]
    *events, done = reader.event_data(chunks)
    assert done == "[DONE]"
    read = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(read) == "".join(TEXTS)


# ---- the script


HERS = ("delay_percentile", "TinyEngine")


@pytest.fixture
def solved(tmp_path, monkeypatch):
    """The week's clean solutions, kept as a learner's own."""
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(tmp_path / "answers"))
    for name in HERS:
        assert Shelf("12_deploy").solve(name, getattr(ANSWERS, name)) is None


class Hers:
    """What --mine gives in place of the course's."""

    def mine(self, name, promoted):
        return getattr(ANSWERS, name)


def test_her_percentile_and_her_engine_give_what_the_courses_give(model):
    own = load_module(ROOT / "weeks/12_deploy/own.py", "week_12_own")
    delays = torch.rand(37, generator=torch.Generator().manual_seed(1)).tolist()
    rank = own.percentile_of(Hers())
    for percent in range(1, 101):
        assert rank(delays, percent / 100) == percentile(delays, percent / 100)
    prompts = [[1, 2, 3], [4], [5, 6]]
    alone = [list(generate(model, prompt, 9, temperature=0)) for prompt in prompts]
    assert own.texts_by(ANSWERS.TinyEngine, model, prompts, 9) == alone


@pytest.mark.slow
def test_the_script_with_her_code_finds_the_same_tokens(solved, output, base_model, text_file):
    module, settings = script("12_deploy", data=text_file, mine=True)
    metrics = module.main(settings)
    assert metrics["programs_alike"] == settings.new_tokens and metrics["same_alone"] == 1
    week = read_json(output / "logs/12_deploy/mine/smoke/my-code" / DATA / "week.json")
    assert week["mine"] == list(HERS)
