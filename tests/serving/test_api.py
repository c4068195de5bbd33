"""shared/serving/api.py: OpenAI's own client and lm-eval talk to it, texts are those of
`shared.sampling.generate`, and it survives its clients.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import httpx
import lm_eval
import openai
import pytest
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from shared import checkpoint
from shared.adapters import LoRAConfig, add_lora, save_adapter
from shared.adapters.attach import use_adapters
from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import IM_END, IM_START, chat_prompt
from shared.runtime import ROOT
from shared.sampling import generate
from shared.serving.api import create_app
from shared.serving.engine import Token
from shared.serving.gate import Limits
from shared.serving.protocol import TextBuilder
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.zero_shot import LMEvalAdapter, score_tokens
from tests.helpers import serving, shake, synthetic_text
from tests.test_zero_shot import TOKENIZER as PLAIN
from tests.test_zero_shot import by_lm_eval, piqa_rows, same_tokenizer, write_lines

TOKENIZER = BPETokenizer.train(synthetic_text(400), 300, special_tokens=[END_OF_TEXT, IM_START, IM_END])
CONFIG = GPTConfig(
    vocab_size=300,
    block_size=128,
    n_layer=2,
    n_head=2,
    n_embd=32,
    n_kv_head=1,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    mlp_hidden=64,
    bias=False,
    tie_weights=False,
)
ENDS = [TOKENIZER.special_tokens[token] for token in (END_OF_TEXT, IM_END)]
PROMPT = "abc def, hij"
EVER = {"ignore_eos": True}


def gpt() -> GPT:
    return shake(GPT(CONFIG))


reference = cache(gpt)


def expected(prompt: str | list[int], n: int, stop=(), model: GPT | None = None, **options) -> str:
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return TOKENIZER.decode(list(generate(model or reference(), ids, n, stop=ENDS, **options)))


@contextmanager
def client(model: GPT | None = None, tokenizer=TOKENIZER, **options):
    app = create_app(model or gpt(), tokenizer, "tiny", **options)
    with TestClient(app, raise_server_exceptions=False) as talk:
        talk.engine = app.state.engine
        yield talk


@pytest.fixture(scope="module")
def shared_client():
    with client(chunk=8) as talk:
        yield talk


def complete(talk: TestClient, path: str = "/v1/completions", **body):
    if path == "/v1/completions":
        body = {"prompt": PROMPT} | body
    else:
        body = {"messages": [{"role": "user", "content": "hi"}]} | body
    return talk.post(path, json={"model": "tiny"} | body)


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    found = [json.loads(line[6:]) for line in lines[:-1]]
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in found}) == 1
    return found


# ---- texts


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"seed": 3}, {"seed": 4, "temperature": 0.7, "top_p": 0.8}, {"seed": 5, "top_k": 3}],
    ids=str,
)
def test_a_completion_is_what_the_sampler_writes(shared_client, options):
    answer = complete(shared_client, max_tokens=20, **options).json()
    (choice,) = answer["choices"]
    assert choice["text"] == expected(PROMPT, 20, **options)
    assert choice["index"] == 0 and choice["logprobs"] is None and choice["finish_reason"] == "length"
    assert (
        answer["object"] == "text_completion"
        and answer["model"] == "tiny"
        and answer["id"].startswith("cmpl-")
    )
    count = len(TOKENIZER.encode(PROMPT))
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        count,
        20,
        count + 20,
    )


def test_several_prompts_of_text_or_ids_and_several_answers_to_each(shared_client):
    ids = TOKENIZER.encode(PROMPT)
    texts = lambda **body: [
        c["text"] for c in complete(shared_client, max_tokens=9, **body).json()["choices"]
    ]
    assert texts(prompt=ids, seed=1) == [expected(PROMPT, 9, seed=1)]
    assert texts(prompt=[PROMPT, "x"], seed=1) == [expected(PROMPT, 9, seed=1), expected("x", 9, seed=1)]
    assert texts(prompt=[ids, [5, 6]], seed=1, n=2) == [
        expected(p, 9, seed=s) for p in (ids, [5, 6]) for s in (1, 2)
    ]
    usage = complete(shared_client, prompt=[ids, [5, 6]], max_tokens=9, n=2, seed=1).json()["usage"]
    assert usage["prompt_tokens"] == len(ids) + 2 and usage["completion_tokens"] == 36


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_stop_text_ends_it_wherever_tokens_begin_and_end(shared_client, length):
    whole = expected(PROMPT, 30, seed=8)
    stop = whole[10 : 10 + length]
    for stream in (False, True):
        answer = complete(shared_client, max_tokens=30, seed=8, stop=["never", stop], stream=stream)
        choices = [e["choices"][0] for e in events(answer)] if stream else answer.json()["choices"]
        assert "".join(c["text"] for c in choices) == whole[: whole.find(stop)]
        assert choices[-1]["finish_reason"] == "stop"
    assert shared_client.engine.wait_idle(10)


def test_random_texts_stop_where_a_plain_search_says():
    draw, stopped = random.Random(0), 0
    vocab = {i: token for i, token in enumerate([b"a", b"b", b"ab", b"\xe2\x82", b"\xac", b"ba", b"\xff"])}
    for _ in range(500):
        ids = draw.choices(range(7), k=12)
        stops = ["".join(draw.choices("ab€", k=draw.randint(1, 3))) for _ in range(draw.randint(0, 2))]
        builder, shown = TextBuilder(vocab, stops), []
        for i in ids:
            shown.append(builder.push(Token(i)))
            if builder.stopped:
                break
        else:
            shown.append(builder.finish())
        text = b"".join(vocab[i] for i in ids).decode(errors="replace")
        # where the first stop text is complete, counted in tokens: the earliest beginning among those
        ends = []
        for n in range(1, 13):
            so_far = b"".join(vocab[i] for i in ids[:n])
            while so_far and so_far.decode(errors="ignore").encode() != so_far and so_far[-1:] in b"\xe2\x82":
                so_far = so_far[:-1]
            so_far = so_far.decode(errors="replace")
            ends = [so_far.find(s) for s in stops if s in so_far]
            if ends:
                break
        stopped += bool(ends)
        assert "".join(p.text for p in shown) == (text[: min(ends)] if ends else text), (ids, stops)
        if not ends:
            assert [t.id for p in shown for t, _ in p.tokens] == ids
    assert 100 < stopped < 450


def test_an_end_token_ends_it_and_is_no_text():
    model = gpt()
    with torch.no_grad():
        model.lm_head.weight[ENDS[0]] = (
            3 * model.lm_head.weight.norm(dim=1).max() * torch.nn.functional.normalize(torch.ones(32), dim=0)
        )
    for seed in range(40):
        ids = list(generate(model, [5], 30, seed=seed))
        if 2 < (ids.index(ENDS[0]) if ENDS[0] in ids else 0) < 29:
            break
    at = ids.index(ENDS[0])
    with client(model) as talk:
        answer = complete(talk, prompt=[5], max_tokens=30, seed=seed, logprobs=1).json()
        assert (
            answer["choices"][0]["text"] == TOKENIZER.decode(ids[:at])
            and answer["choices"][0]["finish_reason"] == "stop"
        )
        assert answer["choices"][0]["logprobs"]["tokens"][-1] == END_OF_TEXT
        assert answer["usage"]["completion_tokens"] == at + 1


def test_echo_and_log_probabilities_are_the_models(shared_client):
    ids = TOKENIZER.encode("naïve " + PROMPT)
    for stream in (False, True):
        answer = complete(
            shared_client, prompt=ids, max_tokens=6, temperature=0, echo=True, logprobs=2, stream=stream
        )
        choices = [e["choices"][0] for e in events(answer)] if stream else answer.json()["choices"]
        new = list(generate(gpt(), ids, 6, temperature=0))
        assert "".join(c["text"] for c in choices) == TOKENIZER.decode(ids + new)
        found = {key: [v for c in choices for v in c["logprobs"][key]] for key in choices[0]["logprobs"]}
        ((logprobs, greedy),) = score_tokens(gpt(), [(ids + new, len(ids) + 5)])
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:]), logprobs, atol=1e-4, rtol=1e-4)
        assert [
            p == max(top.values()) for p, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:])
        ] == greedy.tolist()
        assert all(2 <= len(top) <= 3 for top in found["top_logprobs"][1:])
        text = TOKENIZER.decode(ids + new)
        for token, at in zip(found["tokens"], found["text_offset"]):
            assert token.startswith("bytes:") or text[at : at + len(token)] == token


def test_echo_alone_and_no_new_tokens(shared_client):
    (choice,) = complete(shared_client, max_tokens=0, echo=True).json()["choices"]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert "".join(
        e["choices"][0]["text"]
        for e in events(complete(shared_client, max_tokens=4, seed=1, echo=True, stream=True))
    ) == PROMPT + expected(PROMPT, 4, seed=1)


def test_a_stream_says_the_same_piece_by_piece(shared_client):
    found = events(
        complete(
            shared_client, max_tokens=25, seed=2, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 50
    assert all(e["usage"] is None for e in found[:-1])
    for index in (0, 1):
        mine = [c for e in found for c in e["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == expected(PROMPT, 25, seed=2 + index)
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"] and len(mine) > 10


@pytest.mark.parametrize(
    "messages",
    [[("user", "abc")], [("system", "def"), ("user", "hij"), ("assistant", "ok"), ("user", "abc")]],
    ids=len,
)
def test_a_chat_answer_is_what_the_sampler_writes_behind_the_template(shared_client, messages):
    messages = [{"role": role, "content": content} for role, content in messages]
    ids = list(generate(gpt(), chat_prompt(TOKENIZER, messages), 15, seed=6, stop=ENDS))
    text, reason = TOKENIZER.decode(ids), "length" if len(ids) == 15 else "stop"
    path = "/v1/chat/completions"
    answer = complete(
        shared_client,
        path,
        messages=messages,
        max_completion_tokens=15,
        seed=6,
        logprobs=True,
        top_logprobs=2,
    ).json()
    (choice,) = answer["choices"]
    assert (
        choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        and answer["object"] == "chat.completion"
    )
    tokens = choice["logprobs"]["content"]
    assert bytes(b for t in tokens for b in t["bytes"]).decode(errors="replace") == text and all(
        len(t["top_logprobs"]) == 2 for t in tokens
    )
    parts = [{"type": "text", "text": m["content"]} for m in messages[-1:]]
    found = events(
        complete(
            shared_client,
            path,
            messages=[*messages[:-1], {"role": "user", "content": parts}],
            max_tokens=15,
            seed=6,
            stream=True,
        )
    )
    deltas = [e["choices"][0]["delta"] for e in found]
    assert (
        deltas[0] == {"role": "assistant", "content": ""}
        and deltas[-1] == {}
        and {e["object"] for e in found} == {"chat.completion.chunk"}
    )
    assert "".join(d["content"] for d in deltas[1:-1]) == text
    assert [e["choices"][0]["finish_reason"] for e in found] == [None] * (len(found) - 1) + [reason]


def test_without_max_tokens_a_chat_goes_on_to_the_end_of_the_context(shared_client):
    answer = complete(shared_client, "/v1/chat/completions", seed=1, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 128 and answer["choices"][0]["finish_reason"] == "length"


def test_a_models_name_may_have_a_slash_as_the_hubs_have():
    app = create_app(gpt(), TOKENIZER, "ada/tiny")
    with TestClient(app) as talk:
        theirs = openai.OpenAI(
            base_url="http://testserver/v1", api_key="any", http_client=talk, max_retries=0
        )
        assert theirs.models.retrieve("ada/tiny").id == theirs.models.list().data[0].id == "ada/tiny"
        with pytest.raises(openai.NotFoundError, match="no model is called 'ada'; there are: ada/tiny"):
            theirs.models.retrieve("ada")


def test_an_adapter_is_a_model_of_its_own():
    model = add_lora(gpt(), LoRAConfig(r=4, target_modules=("all-linear",)), "pirate")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    with client(model) as talk:
        assert [m["id"] for m in talk.get("/v1/models").json()["data"]] == ["tiny", "pirate"]
        assert (
            talk.get("/v1/models/pirate").json()["object"] == "model"
            and talk.get("/v1/models/x").status_code == 404
        )
        found = {
            name: complete(talk, model=name, max_tokens=12, seed=1).json()["choices"][0]["text"]
            for name in ("tiny", "pirate")
        }
    assert found["tiny"] == expected(PROMPT, 12, seed=1) != found["pirate"]
    assert found["pirate"] == expected(PROMPT, 12, model=use_adapters(model, "pirate"), seed=1)


def test_what_a_texts_own_siblings_read_was_not_there_before():
    with client(chunk=8, slots=1) as talk:
        cached = [
            complete(talk, prompt=[7] * 20, max_tokens=2, n=3).json()["usage"]["prompt_tokens_details"][
                "cached_tokens"
            ]
            for _ in range(2)
        ]
        assert cached == [0, 16]  # the second request finds what the first one read: whole chunks


@pytest.mark.parametrize("stream", [False, True])
def test_ids_that_only_the_model_has_are_no_text(stream):
    model = shake(GPT(replace(CONFIG, vocab_size=512)))
    with client(model) as talk:
        answer = complete(
            talk, prompt=[400, 1], echo=True, logprobs=3, max_tokens=40, seed=1, stream=stream, **EVER
        )
        assert answer.status_code == 200
        parts = [c for e in events(answer) for c in e["choices"]] if stream else answer.json()["choices"]
        drawn = list(generate(model, [400, 1], 40, seed=1))
        assert max(drawn) >= 300  # or nothing was tested
        assert "".join(part["text"] for part in parts) == TOKENIZER.decode(
            [1, *(i for i in drawn if i < 300)]
        )
        assert sum(len(part["logprobs"]["tokens"]) for part in parts) == 42


# ---- what is refused, and how


def check_error(
    response, status: int, message: str, param: str | None = None, code: str | None = None
) -> None:
    error = response.json()["error"]
    assert response.status_code == status and error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"] and (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize(
    ("body", "status", "message", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "no model is called 'gpt-4'; there are: tiny", "model", "model_not_found"),
        ({"prompt": []}, 400, "a prompt is a text, a list of token ids", "prompt", None),
        ({"prompt": [1, "a"]}, 400, "a prompt is a text, a list of token ids", "prompt", None),
        ({"prompt": [300]}, 400, "ids go from 0 to 299", None, None),
        ({"prompt": ""}, 400, "at least one token to start from", None, None),
        ({"prompt": "\ud800"}, 400, "half a surrogate pair", "prompt", None),
        (
            {"prompt": [1] * 129, "max_tokens": 0},
            400,
            "129 tokens of prompt",
            "prompt",
            "context_length_exceeded",
        ),
        ({"prompt": "a" * 500_000}, 400, "longer than 128 tokens", "prompt", "context_length_exceeded"),
        ({"max_tokens": 200}, 400, "200 new ones", "prompt", "context_length_exceeded"),
        (
            {"max_tokens": -1},
            400,
            "max_tokens: Input should be greater than or equal to 0",
            "max_tokens",
            None,
        ),
        ({"max_tokens": "5"}, 400, "max_tokens: Input should be a valid integer", "max_tokens", None),
        ({"temperature": -1}, 400, "temperature=-1.0 is out of range", None, None),
        ({"top_p": 0}, 400, "top_p=0.0 is out of range", None, None),
        ({"seed": -5}, 400, "seed -5 is out of range", None, None),
        ({"n": 65}, 400, "more than 64 texts", "n", None),
        ({"n": 0}, 400, "n: Input should be greater than or equal to 1", "n", None),
        ({"logprobs": 21}, 400, "logprobs: Input should be less than or equal to 20", "logprobs", None),
        (
            {"presence_penalty": 1},
            400,
            "presence_penalty: Input should be less than or equal to 0",
            "presence_penalty",
            None,
        ),
        ({"stop": ["x"] * 17}, 400, "stop: up to 16 texts of up to 1000 characters each", "stop", None),
        ({"stop": "x" * 1001}, 400, "stop: up to 16 texts of up to 1000 characters each", "stop", None),
        ({"magic": 1}, 400, "magic: this server does not know it", "magic", None),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_a_request_that_cannot_be_done_is_refused_in_openais_form(
    shared_client, body, status, message, param, code
):
    content = json.dumps({"model": "tiny", "prompt": PROMPT} | body)
    for stream in ("", ', "stream": true}'):
        sent = content[:-1] + stream if stream else content
        check_error(
            shared_client.post("/v1/completions", content=sent, headers={"content-type": "application/json"}),
            status,
            message,
            param,
            code,
        )
    assert shared_client.engine.busy == 0


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: List should have at least 1 item"),
        ([{"role": "robot", "content": "x"}], "messages: Input should be 'system', 'user' or 'assistant'"),
        ([{"role": "user"}], "messages: Field required"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages:"),
        ([{"role": "user", "content": "\udfff"}], "half a surrogate pair"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_conversation_that_is_none_is_refused(shared_client, messages, message):
    content = json.dumps({"model": "tiny", "messages": messages})
    answer = shared_client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    check_error(answer, 400, message, "messages")


def test_what_only_belongs_to_another_field_is_refused_without_it(shared_client):
    options = {"include_usage": True}
    for stream in ({}, {"stream": False}):
        check_error(
            complete(shared_client, stream_options=options, **stream),
            400,
            "only with stream=true",
            "stream_options",
        )
    for logprobs in ({}, {"logprobs": False}):
        answer = complete(shared_client, "/v1/chat/completions", top_logprobs=2, **logprobs)
        check_error(answer, 400, "only with logprobs=true", "top_logprobs")
    assert complete(shared_client, max_tokens=1, stream_options=None).status_code == 200


def test_a_conversation_that_is_too_long_asks_for_nothing_new(shared_client):
    answer = complete(
        shared_client, "/v1/chat/completions", messages=[{"role": "user", "content": "abc def " * 40}]
    )
    check_error(
        answer,
        400,
        "tokens of prompt and 0 new ones: a prompt may have 128",
        "prompt",
        "context_length_exceeded",
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model": "tiny", "prompt": ', b"\xff\xfe{}", b"[" * 100_000, b"null", b"[]", b'"x"'],
    ids=lambda c: str(c[:20]),
)
def test_a_body_that_is_no_request_is_refused(shared_client, content):
    answer = shared_client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_have_the_form_too(shared_client):
    check_error(shared_client.get("/v1/nothing"), 404, "Not Found")
    check_error(shared_client.get("/v1/completions"), 405, "Method Not Allowed")


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not():
    with client(limits=Limits(body=1000)) as talk:
        body = json.dumps({"model": "tiny", "prompt": "a" * 1000}).encode()
        check_error(
            talk.post("/v1/completions", content=body), 413, "larger than 1000 bytes", code="body_too_large"
        )
        parts = (body[i : i + 100] for i in range(0, len(body), 100))
        answer = talk.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
        assert "content-length" not in answer.request.headers
        check_error(answer, 413, "larger than 1000 bytes")


def test_limits_of_prompt_and_tokens():
    with client(limits=Limits(prompt=10, tokens=5)) as talk:
        check_error(
            complete(talk, prompt=[1] * 11, max_tokens=1),
            400,
            "a prompt may have 10",
            "prompt",
            "context_length_exceeded",
        )
        check_error(
            complete(talk, prompt=[1], max_tokens=6), 400, "more than this server gives: 5", "max_tokens"
        )
        assert complete(talk, prompt=[1] * 10, max_tokens=5).status_code == 200
    with pytest.raises(ValueError, match="body=0: must be above 0; seconds=-1"):
        Limits(body=0, seconds=-1)


def test_prompts_that_are_too_many_are_not_tokenized_first():
    tokenizer = BPETokenizer.train(synthetic_text(400), 300)
    seen: list[str] = []
    encode, tokenizer.encode = tokenizer.encode, lambda text, *rest: seen.append(text) or encode(text, *rest)
    with client(tokenizer=tokenizer, limits=Limits(texts=3)) as talk:
        check_error(complete(talk, prompt=["a"] * 4), 400, "4 prompts times n=1 are more than 3 texts", "n")
        check_error(complete(talk, prompt=["a"], n=4), 400, "1 prompts times n=4 are more than 3 texts", "n")
        check_error(
            talk.post("/v1/completions", json={"model": "another", "prompt": "a"}),
            404,
            "no model",
            "model",
            "model_not_found",
        )
        assert seen == []
        assert complete(talk, prompt=["a", "b", "c"], max_tokens=1).status_code == 200 and seen == [
            "a",
            "b",
            "c",
        ]


def test_a_key_is_asked_for_where_texts_are_written_and_only_there():
    with client(api_key="secret") as talk:
        for sent in (
            None,
            "Bearer wrong",
            "Bearer",
            "Bearer secre",
            "Bearer secrets",
            "secret",
            "Basic secret",
        ):
            refused = talk.get("/v1/models", headers={"Authorization": sent} if sent else {})
            check_error(refused, 401, "API key", code="invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        for sent in (
            "Bearer secret",
            "bearer secret",
            "BEARER  secret",
        ):  # RFC 9110, 11.1: the scheme's case does not count
            assert talk.get("/v1/models", headers={"Authorization": sent}).status_code == 200
        assert (
            talk.get("/health").status_code
            == talk.get("/ready").status_code
            == talk.get("/metrics").status_code
            == 200
        )


def test_without_a_chat_template_only_completions_work():
    tokenizer = CharTokenizer("".join(map(chr, range(32, 92))))
    with client(
        GPT(GPTConfig(vocab_size=60, block_size=32, n_layer=1, n_head=2, n_embd=16)), tokenizer
    ) as talk:
        check_error(complete(talk, "/v1/chat/completions"), 400, "no <|im_start|>", "messages")
        assert complete(talk, prompt="HELLO", max_tokens=3).status_code == 200
        check_error(complete(talk, prompt="hello", max_tokens=3), 400, "not in the vocabulary", "prompt")


class Held:
    """A model whose forward pass waits until it may."""

    def __init__(self):
        self.model, self.entered, self.may = gpt(), threading.Event(), threading.Event()
        self.model.register_forward_pre_hook(self._wait)

    def _wait(self, module, args) -> None:
        self.entered.set()
        assert self.may.wait(60)


def test_a_full_queue_and_a_server_that_shuts_down_say_so_while_health_answers():
    held = Held()
    with client(held.model, slots=1, queue=1) as talk:
        answers: list = []
        threads = [
            threading.Thread(target=lambda: answers.append(complete(talk, max_tokens=5, seed=1)))
            for _ in range(2)
        ]
        for number, thread in enumerate(threads):
            thread.start()
            if not number:
                assert held.entered.wait(60)
        while talk.engine.busy + talk.engine.waiting < 2:
            pass
        full = complete(talk)
        check_error(full, 429, "1 texts are being written and 1 wait", code="queue_full")
        assert full.headers["retry-after"] == "1"
        check_error(complete(talk, stream=True), 429, "ask again later", code="queue_full")
        check_error(complete(talk, n=3), 429, "ask again later", code="queue_full")
        assert talk.get("/ready").status_code == 200
        talk.engine.drain()
        check_error(complete(talk), 503, "shutting down", code="shutting_down")
        assert talk.get("/ready").status_code == 503 and talk.get("/health").status_code == 200
        held.may.set()
        for thread in threads:
            thread.join()
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
            return check_error(answer, 504, "not finished within 1e-09 s", code="timeout")
        assert json.loads(answer.text.removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_failing_model_is_an_error_of_the_server_and_it_goes_on():
    model = gpt()
    with client(model) as talk:
        hook = model.register_forward_pre_hook(lambda module, args: 1 / 0)
        check_error(complete(talk), 500, "could not be finished")
        hook.remove()
        assert complete(talk, max_tokens=5, seed=1).json()["choices"][0]["text"] == expected(
            PROMPT, 5, seed=1
        )


def test_metrics_count_what_happened():
    with client(chunk=4) as talk:
        for _ in range(3):
            complete(talk, prompt=[1] * 9, max_tokens=7, ignore_eos=True)
        complete(talk, model="other")
        talk.get("/nowhere")
        families = text_string_to_metric_families(talk.get("/metrics").text)
        found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert (
        found["llm_requests_total", "/v1/completions", "200"] == 3
        and found["llm_requests_total", "/v1/completions", "404"] == 1
    )
    assert found["llm_requests_total", "other", "404"] == 1
    assert found[("llm_generated_tokens",)] == 21 and found["llm_texts_ended", "length"] == 3
    assert (
        found[("llm_prompt_tokens",)] + found[("llm_reused_tokens",)] == 27
        and found[("llm_reused_tokens",)] == 16
    )
    assert (
        found[("llm_time_to_first_token_seconds_count",)] == 3
        and found[("llm_time_between_tokens_seconds_count",)] == 18
    )
    assert found[("llm_slots_busy",)] == found[("llm_queue_length",)] == 0


# ---- clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_the_text_of_a_client_that_leaves_is_given_up_within_a_step(stream, after):
    """The server's side of a connection, played by hand: the client is gone when `after` tokens have been
    drawn.
    """
    model, sent = gpt(), []
    app = create_app(model, TOKENIZER, "tiny", slots=1)
    engine = app.state.engine
    body = json.dumps(
        {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "stream": stream, "ignore_eos": True}
    ).encode()
    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("x", 1),
        "client": ("y", 2),
    }
    steps, left_at = [], []

    async def play() -> None:
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        paused = threading.Event()

        def hold(module, args):
            steps.append(engine.generated_tokens)
            if engine.generated_tokens >= after and not left_at:
                left_at.append(len(steps))
                loop.call_soon_threadsafe(gone.set)
                assert paused.wait(
                    60
                )  # until the server has noticed: whatever is drawn later would be too much

        model.register_forward_pre_hook(hold)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)
        paused.set()
        assert await asyncio.to_thread(engine.wait_idle, 10)

    asyncio.run(play())
    engine.close()
    assert left_at and len(steps) <= left_at[0] + 1
    assert engine.ended["cancelled"] == 1 and engine.generated_tokens <= after + 2


def test_it_survives_500_requests_of_which_many_leave_or_are_wrong():
    app = create_app(gpt(), TOKENIZER, "tiny", slots=8, queue=16, chunk=8, limits=Limits(body=5000))
    engine, draw = app.state.engine, random.Random(0)
    kinds = draw.choices(
        ["whole", "stream", "leave", "malformed", "too long", "too large", "too many"],
        [24, 24, 30, 7, 7, 4, 4],
        k=500,
    )
    wanted, right = (
        {"malformed": 400, "too long": 400, "too large": 413, "too many": 429},
        (
            "whole",
            "stream",
            "leave",
        ),
    )
    seen, health = Counter(), []

    async def one(http: httpx.AsyncClient, number: int, kind: str, gate: asyncio.Semaphore) -> None:
        prompt = [number % 300, 7, number % 11] * (1 + number % 9)
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": 4 + number % 30,
            "seed": number,
            "stream": kind in ("stream", "leave"),
        }
        if kind == "too long":
            body["prompt"] = [1] * 200
        if (
            kind == "too many"
        ):  # more than slots and queue together, and whoever comes at the same moment finds them full too
            body["n"] = 25
        content = {"malformed": b'{"model": "tiny", "prompt"', "too large": b" " * 6000}.get(
            kind, json.dumps(body).encode()
        )
        async with gate:
            while (
                status := await ask(http, content, kind, expected(prompt, body["max_tokens"], seed=number))
            ) == 429 and kind in right:
                seen[kind, 429] += 1  # a client does what it is told: it asks again
        assert status == wanted.get(kind, 200)
        seen[kind, status] += 1

    async def ask(http: httpx.AsyncClient, content: bytes, kind: str, right_text: str) -> int:
        async with http.stream(
            "POST", "/v1/completions", content=content, headers={"content-type": "application/json"}
        ) as answer:
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

    async def everything(url: str) -> None:
        async with httpx.AsyncClient(
            base_url=url, timeout=60, limits=httpx.Limits(max_connections=40)
        ) as http:
            gate = asyncio.Semaphore(14)
            work = asyncio.gather(*(one(http, i, kind, gate) for i, kind in enumerate(kinds)))
            while not work.done():
                health.append((await http.get("/health")).status_code)
                await asyncio.wait([work], timeout=0.2)
            await work

    with serving(app) as url:
        asyncio.run(everything(url))
        assert engine.wait_idle(30) and engine.busy == engine.waiting == 0
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="none").completions.create(
            model="tiny", prompt=PROMPT, max_tokens=5, seed=1
        ).choices[0].text == expected(PROMPT, 5, seed=1)
    assert {kind: seen[kind, wanted.get(kind, 200)] for kind in set(kinds)} == Counter(kinds) and set(
        health
    ) == {200}
    assert engine.ended["error"] == engine.ended["timeout"] == 0


# ---- other people's clients


@pytest.fixture(scope="module")
def url():
    with serving(create_app(gpt(), TOKENIZER, "tiny", chunk=8, api_key="secret")) as found:
        yield found


@pytest.fixture
def theirs(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as found:
        yield found


def test_openais_client_lists_models_and_completes(theirs):
    assert [m.id for m in theirs.models.list()] == ["tiny"] and theirs.models.retrieve("tiny").id == "tiny"
    answer = theirs.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, seed=3, logprobs=2, echo=True
    )
    assert (
        answer.choices[0].text == PROMPT + expected(PROMPT, 12, seed=3)
        and answer.usage.completion_tokens == 12
    )
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens
    parts = theirs.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=3, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected(PROMPT, 12, seed=3)


def test_openais_client_chats(theirs):
    messages = [{"role": "system", "content": "def"}, {"role": "user", "content": "abc"}]
    text = expected(chat_prompt(TOKENIZER, messages), 12, seed=3)
    options = dict(model="tiny", messages=messages, max_completion_tokens=12, seed=3)
    answer = theirs.chat.completions.create(**options, logprobs=True, top_logprobs=1, n=2)
    assert (
        answer.choices[0].message.content == text
        and len(answer.choices) == 2
        and answer.choices[0].finish_reason == "length"
    )
    assert len(answer.choices[0].logprobs.content) == 12
    *parts, last = theirs.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    assert (
        "".join(part.choices[0].delta.content or "" for part in parts) == text
        and last.usage.completion_tokens == 12
    )


def test_openais_client_raises_its_own_errors(theirs, url):
    with pytest.raises(openai.NotFoundError) as error:
        theirs.completions.create(model="x", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="context|tokens of prompt"):
        theirs.completions.create(model="tiny", prompt="a", max_tokens=1000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def test_lm_eval_over_http_scores_as_it_does_in_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model = shake(GPT(GPTConfig(vocab_size=PLAIN.vocab_size, block_size=128, n_layer=2, n_head=2, n_embd=32)))
    same_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [row | {"label": i % 2} for i, row in enumerate(piqa_rows()[:30])]
    path = write_lines(tmp_path / "piqa.jsonl", rows)
    here = by_lm_eval(LMEvalAdapter(model, PLAIN), "piqa", path)
    with serving(create_app(model, PLAIN, "tiny")) as url:
        remote = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="tiny",
            tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface",
            max_length=128,
            batch_size=4,
        )
        there = by_lm_eval(remote, "piqa", path)
        words = lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (synthetic_text(150),), 0)
        rolling = remote.loglikelihood_rolling([words], disable_tqdm=True)
        asked = lm_eval.api.instance.Instance(
            "generate_until", {}, (PROMPT, {"until": [","], "max_gen_toks": 20}), 0
        )
        written = remote.generate_until([asked], disable_tqdm=True)
    scores = [
        [float(r[0]) for r in sample["filtered_resps"]]
        for found in (here, there)
        for sample in found["samples"]["local"]
    ]
    torch.testing.assert_close(torch.tensor(scores[:30]), torch.tensor(scores[30:]), atol=1e-3, rtol=1e-4)
    greedy = [
        [r[1] for r in sample["filtered_resps"]]
        for found in (here, there)
        for sample in found["samples"]["local"]
    ]
    assert greedy[:30] == greedy[30:]
    assert here["results"]["local"]["acc,none"] == there["results"]["local"]["acc,none"]
    assert rolling == pytest.approx(
        LMEvalAdapter(model, PLAIN).loglikelihood_rolling([words], disable_tqdm=True), rel=0.02
    )
    text = PLAIN.decode(
        list(
            generate(model, PLAIN.encode(PROMPT), 20, temperature=0, stop=list(PLAIN.special_tokens.values()))
        )
    )
    assert written == [text.split(",")[0]]


# ---- the command line, and signals


@pytest.fixture
def folder(tmp_path):
    model = add_lora(gpt(), LoRAConfig(r=2), "pirate")
    save_adapter(tmp_path / "pirate", model, "pirate")
    return checkpoint.save(tmp_path / "tiny", gpt(), TOKENIZER).parent


@contextmanager
def process(*args: str):
    """`python -m shared.serving` on a free port: the process, and its address."""
    command = [sys.executable, "-m", "shared.serving", "--device", "cpu", "--port", "0", *args]
    environment = {k: v for k, v in os.environ.items() if k != "LLM_WEEKS_TRACE"} | {
        "LLM_WEEKS_API_KEY": "secret"
    }
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as server:
        try:
            said = []
            for line in server.stderr:
                said.append(line)
                if "running on" in line:
                    break
            yield (
                server,
                next(word for word in "".join(said).split() if word.startswith("http://127.0.0.1:")),
                said,
            )
        finally:
            server.kill()


def test_sigterm_under_load_finishes_what_is_there_and_refuses_what_comes(folder):
    with process(
        "--model",
        str(folder / "tiny"),
        "--quantize",
        "int8",
        "--adapters",
        f"pirate={folder / 'pirate'}",
        "--slots",
        "2",
    ) as (
        server,
        url,
        _,
    ):
        theirs = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert [m.id for m in theirs.models.list()] == ["tiny", "pirate"]
        streams = [
            theirs.completions.create(model=m, prompt="a", max_tokens=100, stream=True, n=4, extra_body=EVER)
            for m in ("tiny", "pirate")
        ]
        firsts = [next(stream) for stream in streams]
        server.send_signal(signal.SIGTERM)
        assert "SIGTERM: finishing" in server.stderr.readline()
        with pytest.raises(
            (openai.InternalServerError, openai.APIConnectionError)
        ):  # 503, or the door is shut
            theirs.completions.create(model="tiny", prompt="a")
        for first, stream in zip(firsts, streams):
            chunks = [first, *stream]
            ended = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
            assert sorted(ended) == [0, 1, 2, 3]
        assert server.wait(60) == 0


def test_after_its_grace_a_server_ends_what_is_there(folder):
    with process("--model", str(folder / "tiny"), "--grace", "0", "--slots", "1") as (server, url, _):
        theirs = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        stream = theirs.completions.create(
            model="tiny", prompt="a", max_tokens=120, stream=True, n=60, extra_body=EVER
        )
        next(stream)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.wait(60) == 0


def test_a_second_signal_ends_it_at_once_but_not_by_a_crash(folder):
    with process("--model", str(folder / "tiny"), "--slots", "1") as (server, url, _):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 120, "stream": True, "n": 60} | EVER
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers={"Authorization": "Bearer secret"}, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert "SIGTERM: finishing" in server.stderr.readline()
            server.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):  # cut off in the middle
                list(lines)
        assert server.wait(60) == 0


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
def test_an_error_on_the_command_line_is_one_line(args, message):
    command = [sys.executable, "-m", "shared.serving", "--device", "cpu", *args]
    environment = {k: v for k, v in os.environ.items() if k != "LLM_WEEKS_TRACE"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and message in done.stderr
    )
