"""What shared/serving/api.py refuses, in the form of OpenAI's errors."""

import json

import pytest

from tests.serving.helpers import CHAT, COMPLETIONS, JSON, PROMPT, TOO_LONG, check_error, complete

NO_PROMPT = "a prompt is a text, a list of token ids"
CANNOT = "this server cannot do it: "
NO_STOP = "stop: up to 16 texts of up to 1000 characters each"


@pytest.mark.parametrize(
    ("body", "message", "param", "code"),
    [
        ({"model": "gpt-4"}, "no model is called 'gpt-4'; there are: tiny", "model", "model_not_found"),
        ({"prompt": []}, NO_PROMPT, "prompt", None),
        ({"prompt": [1, "a"]}, NO_PROMPT, "prompt", None),
        ({"prompt": [300]}, "ids go from 0 to 299", "prompt", None),
        ({"prompt": ""}, "at least one token to start from", "prompt", None),
        ({"prompt": "\ud800"}, "half a surrogate pair", "prompt", None),
        ({"prompt": [1] * 129, "max_tokens": 0}, "129 tokens of prompt", "prompt", TOO_LONG),
        ({"prompt": "a" * 500_000}, "longer than 128 tokens", "prompt", TOO_LONG),
        ({"max_tokens": 200}, "200 new ones", "prompt", TOO_LONG),
        ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0", "max_tokens", None),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer", "max_tokens", None),
        ({"temperature": -1}, "temperature=-1.0 is out of range", "temperature", None),
        ({"top_p": 0}, "top_p=0.0 is out of range", "top_p", None),
        ({"top_k": 0}, "top_k=0 is out of range", "top_k", None),
        ({"seed": 2**63}, f"seed: {2**63} is out of range", "seed", None),
        ({"seed": -(2**63) - 1}, f"seed: {-(2**63) - 1} is out of range", "seed", None),
        ({"n": 65}, "more than 64 texts", "n", None),
        ({"n": 0}, "n: Input should be greater than or equal to 1", "n", None),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20", "logprobs", None),
        (
            {"presence_penalty": 3},
            "presence_penalty=3.0 is out of range: from -2 to 2",
            "presence_penalty",
            None,
        ),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0 is out of range", "repetition_penalty", None),
        ({"logit_bias": {"5": 101}}, "logit_bias=101.0 of token 5", "logit_bias", None),
        (
            {"logit_bias": {"300": 1}},
            "logit_bias=300: the ids of this model go from 0 to 299",
            "logit_bias",
            None,
        ),
        (
            {"logit_bias": {"x": 1}},
            "a token's id is wanted before each bias, and 'x' is none",
            "logit_bias",
            None,
        ),
        ({"min_p": 0.5}, f"min_p: {CANNOT}0 or leave it out", "min_p", None),
        ({"suffix": "x"}, f"suffix: {CANNOT}leave it out", "suffix", None),
        ({"best_of": 2}, "best_of: this server writes as many texts as it answers with: 1", "best_of", None),
        ({"stop": [5]}, "stop[0]: Input should be a valid string", "stop[0]", None),
        ({"stream_options": {"include_usage": 1}}, "valid boolean", "stream_options.include_usage", None),
        ({"stop": ["x"] * 17}, NO_STOP, "stop", None),
        ({"stop": "x" * 1001}, NO_STOP, "stop", None),
        (
            {"temprature": 0},
            "temprature: this server does not know it: is temperature meant?",
            "temprature",
            None,
        ),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_a_request_that_cannot_be_done_is_refused_in_openais_form(shared_client, body, message, param, code):
    status = 404 if code == "model_not_found" else 400
    content = json.dumps({"model": "tiny", "prompt": PROMPT} | body)
    for sent in (content, content[:-1] + ', "stream": true}'):
        answer = shared_client.post(COMPLETIONS, content=sent, headers=JSON)
        check_error(answer, status, message, param, code)
    assert shared_client.engine.busy == 0


def test_what_only_belongs_to_another_field_is_refused_without_it(shared_client):
    for stream in ({}, {"stream": False}):
        answer = complete(shared_client, stream_options={"include_usage": True}, **stream)
        check_error(answer, 400, "only with stream=true", "stream_options")
    for logprobs in ({}, {"logprobs": False}):
        answer = complete(shared_client, CHAT, top_logprobs=2, **logprobs)
        check_error(answer, 400, "only with logprobs=true", "top_logprobs")
    assert complete(shared_client, max_tokens=1, stream_options=None).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model": "tiny", "prompt": ', b"\xff\xfe{}", b"[" * 100_000, b"null", b"[]", b'"x"'],
    ids=lambda c: str(c[:20]),
)
def test_a_body_that_is_no_request_is_refused(shared_client, content):
    answer = shared_client.post(COMPLETIONS, content=content, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_have_the_form_too(shared_client):
    check_error(shared_client.get("/v1/nothing"), 404, "Not Found")
    check_error(shared_client.get(COMPLETIONS), 405, "Method Not Allowed")
