"""/v1/chat/completions of shared/serving/api.py: answers are what the sampler writes behind the template."""

import json

import pytest

from shared.models.chat import chat_prompt
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from shared.tokenizers import CharTokenizer
from tests.serving.helpers import (
    CHAT,
    ENDS,
    JSON,
    TOKENIZER,
    TOO_LONG,
    check_error,
    client,
    complete,
    events,
    gpt,
)

HI = {"role": "user", "content": "hi"}
PART = {"type": "text", "text": "a"}


@pytest.fixture(
    params=[[("user", "abc")], [("system", "def"), ("user", "hij"), ("assistant", "ok"), ("user", "abc")]],
    ids=len,
)
def messages(request):
    return [{"role": role, "content": content} for role, content in request.param]


def test_a_chat_answer_is_what_the_sampler_writes_behind_the_template(shared_client, messages):
    ids = list(generate(gpt(), chat_prompt(TOKENIZER, messages), 15, seed=6, stop=ENDS))
    text, reason = TOKENIZER.decode(ids), "length" if len(ids) == 15 else "stop"
    options = {"max_completion_tokens": 15, "logprobs": True, "top_logprobs": 2}
    answer = complete(shared_client, CHAT, messages=messages, seed=6, **options).json()
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    tokens = choice["logprobs"]["content"]
    assert bytes(b for token in tokens for b in token["bytes"]).decode(errors="replace") == text
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)

    parts = [{"type": "text", "text": messages[-1]["content"]}]
    in_parts = [*messages[:-1], {"role": "user", "content": parts}]
    found = events(complete(shared_client, CHAT, messages=in_parts, max_tokens=15, seed=6, stream=True))
    assert {e["object"] for e in found} == {"chat.completion.chunk"}
    deltas = [e["choices"][0]["delta"] for e in found]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(d["content"] for d in deltas[1:-1]) == text
    assert [e["choices"][0]["finish_reason"] for e in found] == [None] * (len(found) - 1) + [reason]


def test_without_max_tokens_a_chat_goes_on_to_the_end_of_the_context(shared_client):
    answer = complete(shared_client, CHAT, seed=1, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 128 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("messages", "message", "path"),
    [
        ([], "List should have at least 1 item", "messages"),
        (
            [HI, {"role": "robot", "content": "x"}],
            "Input should be 'system', 'developer'",
            "messages[1].role",
        ),
        ([{"content": "x"}], "Field required", "messages[0].role"),
        ([{"role": "user"}], "a message needs a text", "messages[0].content"),
        ([HI, {"role": "user", "content": None}], "a message needs a text", "messages[1].content"),
        ([{"role": "user", "content": 5}], "valid string", "messages[0].content"),
        ([{"role": "user", "content": {"str": "x"}}], "valid string", "messages[0].content"),
        (
            [{"role": "user", "content": [PART, {"type": "image_url"}]}],
            "'text'",
            "messages[0].content[1].type",
        ),
        ([{"role": "user", "content": [PART, "x"]}], "valid dictionary", "messages[0].content[1]"),
        ([HI, "x"], "valid dictionary", "messages[1]"),
        ([HI, HI | {"tool_calls": [{}]}], "Field required", "messages[1].tool_calls[0].id"),
        ([{"role": "user", "content": "\udfff"}], "half a surrogate pair", "messages"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_conversation_that_is_none_is_refused(shared_client, messages, message, path):
    content = json.dumps({"model": "tiny", "messages": messages})
    check_error(shared_client.post(CHAT, content=content, headers=JSON), 400, message, path)


def test_a_conversation_that_is_too_long_asks_for_nothing_new(shared_client):
    answer = complete(shared_client, CHAT, messages=[{"role": "user", "content": "abc def " * 40}])
    message = "tokens of prompt and 0 new ones: a prompt may have 128"
    check_error(answer, 400, message, "messages", TOO_LONG)


def test_without_a_chat_template_only_completions_work():
    tokenizer = CharTokenizer("".join(map(chr, range(32, 92))))
    model = GPT(GPTConfig(vocab_size=60, block_size=32, n_layer=1, n_head=2, n_embd=16))
    with client(model, tokenizer) as talk:
        check_error(complete(talk, CHAT), 400, "no <|im_start|>", "messages")
        assert complete(talk, prompt="HELLO", max_tokens=3).status_code == 200
        check_error(complete(talk, prompt="hello", max_tokens=3), 400, "not in the vocabulary", "prompt")


def test_each_answer_of_a_stream_is_opened_and_written_under_its_own_number(shared_client):
    found = events(complete(shared_client, CHAT, max_tokens=8, n=3, seed=1, stream=True, ignore_eos=True))
    choices = [choice for event in found for choice in event["choices"]]
    opened = [choice["index"] for choice in choices if "role" in choice["delta"]]
    assert opened == [0, 1, 2]
    messages = complete(shared_client, CHAT, max_tokens=8, n=3, seed=1, ignore_eos=True).json()["choices"]
    for index, whole in enumerate(messages):
        parts = [choice["delta"].get("content", "") for choice in choices if choice["index"] == index]
        assert "".join(parts) == whole["message"]["content"]
