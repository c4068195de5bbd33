"""/v1/completions of shared/serving/api.py: its texts are those of `shared.sampling.generate`."""

from dataclasses import replace

import openai
import pytest
import torch
from starlette.testclient import TestClient

from shared.adapters import LoRAConfig, add_lora
from shared.adapters.attach import use_adapters
from shared.evaluation import score_tokens
from shared.models.chat import IM_END
from shared.models.gpt import GPT
from shared.sampling import generate
from shared.serving.api import create_app
from shared.tokenizers.bpe import END_OF_TEXT
from tests.helpers import shake
from tests.serving.helpers import (
    CONFIG,
    ENDS,
    PROMPT,
    TOKENIZER,
    choices_of,
    client,
    complete,
    events,
    expected,
    gpt,
)


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
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    count = len(TOKENIZER.encode(PROMPT))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == count
    assert usage["completion_tokens"] == 20
    assert usage["total_tokens"] == count + 20


def test_several_prompts_of_text_or_ids_and_several_answers_to_each(shared_client):
    ids = TOKENIZER.encode(PROMPT)

    def texts(**body) -> list[str]:
        answer = complete(shared_client, max_tokens=9, seed=1, **body).json()
        return [choice["text"] for choice in answer["choices"]]

    assert texts(prompt=ids) == [expected(PROMPT, 9, seed=1)]
    assert texts(prompt=[PROMPT, "x"]) == [expected(PROMPT, 9, seed=1), expected("x", 9, seed=1)]
    assert texts(prompt=[ids, [5, 6]], n=2) == [
        expected(prompt, 9, seed=seed) for prompt in (ids, [5, 6]) for seed in (1, 2)
    ]
    usage = complete(shared_client, prompt=[ids, [5, 6]], max_tokens=9, n=2, seed=1).json()["usage"]
    assert usage["prompt_tokens"] == len(ids) + 2 and usage["completion_tokens"] == 36


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_stop_text_ends_it_wherever_tokens_begin_and_end(shared_client, length):
    text = expected(PROMPT, 30, seed=8)
    stop = text[10 : 10 + length]
    for stream in (False, True):
        answer = complete(shared_client, max_tokens=30, seed=8, stop=["never", stop], stream=stream)
        choices = choices_of(answer, stream)
        assert "".join(c["text"] for c in choices) == text[: text.find(stop)]
        assert choices[-1]["finish_reason"] == "stop"
    assert shared_client.engine.wait_idle(10)


@pytest.mark.parametrize("end", [0, 1])
def test_an_end_token_ends_it_and_is_no_text(end):
    model = gpt()
    with torch.no_grad():
        largest = model.lm_head.weight.norm(dim=1).max()
        model.lm_head.weight[ENDS[end]] = 3 * largest * torch.nn.functional.normalize(torch.ones(32), dim=0)
    for seed in range(40):
        ids = list(generate(model, [5], 30, seed=seed))
        if ENDS[end] in ids and 2 < ids.index(ENDS[end]) < 29:
            break
    at = ids.index(ENDS[end])
    with client(model) as talk:
        answer = complete(talk, prompt=[5], max_tokens=30, seed=seed, logprobs=1).json()
        (choice,) = answer["choices"]
        assert choice["text"] == TOKENIZER.decode(ids[:at]) and choice["finish_reason"] == "stop"
        assert choice["logprobs"]["tokens"][-1] == (END_OF_TEXT, IM_END)[end]
        assert answer["usage"]["completion_tokens"] == at + 1


def test_echo_and_log_probabilities_are_the_models(shared_client):
    ids = TOKENIZER.encode("naïve " + PROMPT)
    for stream in (False, True):
        answer = complete(
            shared_client, prompt=ids, max_tokens=6, temperature=0, echo=True, logprobs=2, stream=stream
        )
        choices = choices_of(answer, stream)
        new = list(generate(gpt(), ids, 6, temperature=0))
        assert "".join(c["text"] for c in choices) == TOKENIZER.decode(ids + new)
        found = {key: [v for c in choices for v in c["logprobs"][key]] for key in choices[0]["logprobs"]}
        ((logprobs, greedy),) = score_tokens(gpt(), [(ids + new, len(ids) + 5)])
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:]), logprobs, atol=1e-4, rtol=1e-4)
        pairs = list(zip(found["token_logprobs"], found["top_logprobs"]))[1:]
        assert [logprob == max(top.values()) for logprob, top in pairs] == greedy.tolist()
        assert all(2 <= len(top) <= 3 for _, top in pairs)
        text = TOKENIZER.decode(ids + new)
        for token, at in zip(found["tokens"], found["text_offset"]):
            assert token.startswith("bytes:") or text[at : at + len(token)] == token


def test_echo_alone_and_no_new_tokens(shared_client):
    (choice,) = complete(shared_client, max_tokens=0, echo=True).json()["choices"]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    found = events(complete(shared_client, max_tokens=4, seed=1, echo=True, stream=True))
    assert "".join(e["choices"][0]["text"] for e in found) == PROMPT + expected(PROMPT, 4, seed=1)


def test_a_stream_says_the_same_piece_by_piece(shared_client):
    options = {"include_usage": True}
    found = events(complete(shared_client, max_tokens=25, seed=2, stream=True, n=2, stream_options=options))
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 50
    assert all(e["usage"] is None for e in found[:-1])
    for index in (0, 1):
        mine = [c for e in found for c in e["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == expected(PROMPT, 25, seed=2 + index)
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"] and len(mine) > 10


def test_a_models_name_may_have_a_slash_as_the_hubs_have():
    app = create_app(gpt(), TOKENIZER, name="ada/tiny")
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
        assert talk.get("/v1/models/pirate").json()["object"] == "model"
        assert talk.get("/v1/models/x").status_code == 404
        found = {
            name: complete(talk, model=name, max_tokens=12, seed=1).json()["choices"][0]["text"]
            for name in ("tiny", "pirate")
        }
    assert found["tiny"] == expected(PROMPT, 12, seed=1) != found["pirate"]
    assert found["pirate"] == expected(PROMPT, 12, model=use_adapters(model, "pirate"), seed=1)


def test_what_a_texts_own_siblings_read_was_not_there_before():
    with client(chunk=8, slots=1) as talk:
        usages = [complete(talk, prompt=[7] * 20, max_tokens=2, n=3).json()["usage"] for _ in range(2)]
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        assert cached == [0, 16]  # the second request finds what the first one read: complete chunks


@pytest.mark.parametrize("stream", [False, True])
def test_ids_that_only_the_model_has_are_no_text(stream):
    model = shake(GPT(replace(CONFIG, vocab_size=512)))
    options = {"echo": True, "logprobs": 3, "max_tokens": 40, "seed": 1, "ignore_eos": True}
    with client(model) as talk:
        answer = complete(talk, prompt=[400, 1], stream=stream, **options)
        assert answer.status_code == 200
        parts = choices_of(answer, stream)
        drawn = list(generate(model, [400, 1], 40, seed=1))
        assert max(drawn) >= 300  # or nothing was tested
        known = [1, *(i for i in drawn if i < 300)]
        assert "".join(part["text"] for part in parts) == TOKENIZER.decode(known)
        assert sum(len(part["logprobs"]["tokens"]) for part in parts) == 42
