"""shared/serving/bodies.py: what OpenAI's client sends is taken, and what says nothing changes nothing."""

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from shared.models.chat import chat_prompt
from shared.sampling.penalties import Penalties
from shared.serving.generation import later_seed
from tests.serving.helpers import CHAT, COMPLETIONS, PROMPT, TOKENIZER, client, complete, expected, reference

TALK = [{"role": "user", "content": "abc"}]
NOTHING_OF_BOTH = [
    *({name: None} for name in ("temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "user")),
    {"stream_options": None},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"stream_options": {"include_usage": None, "include_obfuscation": False}},
    {"stream_options": {"include_obfuscation": True}},
    {"stop": []},
    {"stop": ""},
    {"stop": ["", ""]},
    {"user": ""},
    {"n": 1},
    {"presence_penalty": 0},
    {"presence_penalty": 0.0, "frequency_penalty": None},
    {"logit_bias": {}},
    {"logit_bias": None},
    {"repetition_penalty": 1.0, "min_p": 0, "min_tokens": 0, "stop_token_ids": []},
    {"metadata": None},
    {"metadata": {}},
    {"store": False},
    {"service_tier": None},
    {"nobody knows": ""},
]
NOTHING_OF_COMPLETIONS = [{"suffix": ""}, {"suffix": None}, {"best_of": 1}, {"best_of": None}, {"echo": None}]
NOTHING_OF_CHATS = [
    {"tools": []},
    {"tools": None, "tool_choice": None},
    {"tools": [], "tool_choice": "none"},
    {"tool_choice": "auto", "parallel_tool_calls": False},
    {"functions": [], "function_call": "none"},
    {"response_format": None},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"], "audio": None},
    {"logprobs": False, "top_logprobs": 0},
    {"top_logprobs": None},
    {"max_completion_tokens": None},
    {"reasoning_effort": "none"},
    {"prediction": None, "web_search_options": None, "verbosity": None},
]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *((COMPLETIONS, fields) for fields in NOTHING_OF_BOTH + NOTHING_OF_COMPLETIONS),
        *((CHAT, fields) for fields in NOTHING_OF_BOTH + NOTHING_OF_CHATS),
    ],
    ids=str,
)
def test_a_field_that_says_nothing_is_as_if_absent(shared_client, path, fields):
    base = {"max_tokens": 6, "temperature": 0}
    if "temperature" in fields:  # which is 1 where it is absent
        base = {"max_tokens": 6, "seed": 3}
    found, plain = complete(shared_client, path, **base, **fields), complete(shared_client, path, **base)
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == plain.json()["choices"] and "x-ignored-fields" not in found.headers


def test_what_is_not_known_is_not_read_and_named_and_counted():
    unknown = {"metadata": {"a": "b"}, "store": True, "safety_identifier": "x", "ignored\r\nX-A: 1": 5}
    talk = [TALK[0] | {"id": "m1"}, {"role": "assistant", "content": [{"type": "text", "text": "a", "x": 1}]}]
    named = "metadata, store, safety_identifier, ?, messages[0].id, messages[1].content[0].x"
    with client() as found:
        for stream in (False, True):
            answer = complete(found, CHAT, messages=talk, max_tokens=1, stream=stream, **unknown)
            assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == named
        many = {f"field_{i}": 1 for i in range(1000)}
        headers = complete(found, max_tokens=1, **many).headers["x-ignored-fields"]
        assert headers.startswith("field_0, field_1, ") and headers.endswith("field_9, and 990 more")
        families = text_string_to_metric_families(found.get("/metrics").text)
        samples = {s.name: s.value for family in families for s in family.samples}
    assert samples["llm_ignored_fields_total"] == 2 * 6 + 1000


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
        {"reasoning_effort": "high"},
        {"min_p": 0.1},
        {"min_tokens": 3},
    ],
    ids=str,
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(shared_client, fields):
    (name,) = fields
    answer = complete(shared_client, CHAT, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == name
    assert error["message"].startswith(f"{name}: this server cannot do it: ")


def test_a_penalty_on_repeating_reaches_the_sampler(shared_client):
    """A large one forbids a second occurrence of any token; a forced token is written again and again."""
    ids = TOKENIZER.encode("abc def")
    fields = {"prompt": ids, "max_tokens": 30, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    plain = complete(shared_client, **fields).json()["choices"][0]["logprobs"]["tokens"]
    punished = complete(shared_client, **fields, frequency_penalty=2, presence_penalty=2)
    punished = punished.json()["choices"][0]["logprobs"]["tokens"]
    assert len(set(punished)) > len(set(plain))
    forced = complete(shared_client, **fields, logit_bias={str(ids[0]): 100})
    assert set(forced.json()["choices"][0]["logprobs"]["tokens"]) == {TOKENIZER.decode(ids[:1])}


def test_penalties_are_those_of_the_sampler(shared_client):
    """The server's text is the one that a loop with the same penalties writes."""
    penalties = Penalties(repetition=1.3, presence=0.5, frequency=0.7, bias={9: 1.5})
    prompt, written = TOKENIZER.encode(PROMPT), []
    for _ in range(12):
        with torch.no_grad():
            logits = reference()(torch.tensor([prompt + written]))[0, -1]
        written.append(int(penalties.apply(logits, prompt, written).argmax()))
    fields = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7}
    answer = complete(
        shared_client,
        max_tokens=12,
        temperature=0,
        ignore_eos=True,
        logit_bias={"9": 1.5},
        **fields,
    )
    assert answer.json()["choices"][0]["text"] == TOKENIZER.decode(written)


# OpenAI's client.


@pytest.fixture
def theirs(shared_client):
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="any", http_client=shared_client, max_retries=0
    )


@pytest.mark.parametrize("dump", ["model_dump", "to_dict"])
def test_a_history_of_dumped_messages_goes_on(theirs, dump):
    options = dict(model="tiny", max_completion_tokens=6, seed=1)
    talk = [{"role": "developer", "content": "def", "name": "ada"}, *TALK]
    first = theirs.chat.completions.create(messages=talk, **options).choices[0].message
    talk = [*talk, getattr(first, dump)(), {"role": "user", "content": "hij", "name": None}]
    second = theirs.chat.completions.create(messages=talk, **options).choices[0].message.content
    read = [{"role": m["role"], "content": m["content"]} for m in talk]
    read[0]["role"] = "system"  # which the developer's messages were called before
    assert second == expected(chat_prompt(TOKENIZER, read), 6, seed=1)


def test_an_answer_without_text_may_stand_in_a_history(theirs):
    talk = [*TALK, {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}, *TALK]
    found = theirs.chat.completions.create(model="tiny", messages=talk, max_tokens=6, seed=1)
    read = [message | {"content": message["content"] or ""} for message in talk]
    assert found.choices[0].message.content == expected(
        chat_prompt(TOKENIZER, [{k: m[k] for k in ("role", "content")} for m in read]), 6, seed=1
    )


def test_a_clients_usual_options_are_taken(theirs):
    options = dict(
        model="tiny", messages=TALK, max_tokens=6, seed=1, metadata={"run": "1"}, store=True, user="ada"
    )
    options |= dict(service_tier="auto", parallel_tool_calls=True, stream=True, safety_identifier="a")
    options |= dict(stream_options={"include_usage": True, "include_obfuscation": False})
    *parts, last = theirs.chat.completions.create(**options)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == expected(chat_prompt(TOKENIZER, TALK), 6, seed=1) and last.usage.completion_tokens == 6


# Seeds.


@pytest.mark.parametrize("seed", [0, -1, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1, -(2**63)])
def test_seeds_have_64_bits_and_a_sign(shared_client, seed):
    def texts(**body) -> list[str]:
        return [
            c["text"] for c in complete(shared_client, prompt=PROMPT, max_tokens=12, **body).json()["choices"]
        ]

    both = texts(seed=seed, n=2)
    later = seed + 1 if seed < 2**63 - 1 else -(2**63)
    assert both == texts(seed=seed) + texts(seed=later) and both[0] != both[1]
    assert later_seed(seed, 1) == later
    if 0 <= seed < 2**32:
        assert both[0] == expected(PROMPT, 12, seed=seed)
