"""shared/serving/gate.py: limits, the API key, and metrics."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared.serving.gate import Limits
from shared.tokenizers import BPETokenizer
from tests.helpers import synthetic_text
from tests.serving.helpers import CHAT, COMPLETIONS, JSON, TOO_LONG, check_error, client, complete


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not():
    with client(limits=Limits(body=1000)) as talk:
        body = json.dumps({"model": "tiny", "prompt": "a" * 1000}).encode()
        answer = talk.post(COMPLETIONS, content=body)
        check_error(answer, 413, "larger than 1000 bytes", code="body_too_large")
        parts = (body[i : i + 100] for i in range(0, len(body), 100))
        answer = talk.post(COMPLETIONS, content=parts, headers=JSON)
        assert "content-length" not in answer.request.headers
        check_error(answer, 413, "larger than 1000 bytes")


def test_limits_of_prompt_and_tokens():
    with client(limits=Limits(prompt=10, tokens=5)) as talk:
        answer = complete(talk, prompt=[1] * 11, max_tokens=1)
        check_error(answer, 400, "a prompt may have 10", "prompt", TOO_LONG)
        answer = complete(talk, prompt=[1], max_tokens=6)
        check_error(answer, 400, "more than this server gives: 5", "max_tokens")
        answer = complete(talk, CHAT, max_completion_tokens=6)
        check_error(answer, 400, "max_completion_tokens=6 is more", "max_completion_tokens")
        assert complete(talk, prompt=[1] * 10, max_tokens=5).status_code == 200
    with pytest.raises(ValueError, match="body=0: must be above 0; seconds=-1"):
        Limits(body=0, seconds=-1)


def test_prompts_that_are_too_many_are_not_tokenized_first(monkeypatch):
    tokenizer = BPETokenizer.train(synthetic_text(400), 300)
    encode = tokenizer.encode
    encoded: list[str] = []

    def watched(text, *rest):
        encoded.append(text)
        return encode(text, *rest)

    monkeypatch.setattr(tokenizer, "encode", watched)
    with client(tokenizer=tokenizer, limits=Limits(texts=3)) as talk:
        check_error(complete(talk, prompt=["a"] * 4), 400, "4 prompts times n=1 are more than 3 texts", "n")
        check_error(complete(talk, prompt=["a"], n=4), 400, "1 prompts times n=4 are more than 3 texts", "n")
        answer = talk.post(COMPLETIONS, json={"model": "another", "prompt": "a"})
        check_error(answer, 404, "no model", "model", "model_not_found")
        assert encoded == []
        assert complete(talk, prompt=["a", "b", "c"], max_tokens=1).status_code == 200
        assert encoded == ["a", "b", "c"]


def test_a_key_is_asked_for_where_texts_are_written_and_only_there():
    wrong = ("Bearer wrong", "Bearer", "Bearer secre", "Bearer secrets", "secret", "Basic secret")
    right = ("Bearer secret", "bearer secret", "BEARER  secret")  # RFC 9110, 11.1: case does not count
    with client(api_key="secret") as talk:
        for headers in ({}, *({"Authorization": sent} for sent in wrong)):
            refused = talk.get("/v1/models", headers=headers)
            check_error(refused, 401, "API key", code="invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
        for sent in right:
            assert talk.get("/v1/models", headers={"Authorization": sent}).status_code == 200
        for path in ("/health", "/ready", "/metrics"):
            assert talk.get(path).status_code == 200


def test_metrics_count_what_happened():
    with client(chunk=4) as talk:
        for _ in range(3):
            complete(talk, prompt=[1] * 9, max_tokens=7, ignore_eos=True)
        complete(talk, model="other")
        talk.get("/nowhere")
        families = text_string_to_metric_families(talk.get("/metrics").text)
        found = {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}
    assert found["llm_requests_total", COMPLETIONS, "200"] == 3
    assert found["llm_requests_total", COMPLETIONS, "404"] == 1
    assert found["llm_requests_total", "other", "404"] == 1
    assert found[("llm_generated_tokens",)] == 21 and found["llm_texts_ended", "length"] == 3
    assert found[("llm_prompt_tokens",)] + found[("llm_reused_tokens",)] == 27
    assert found[("llm_reused_tokens",)] == 16
    assert found[("llm_time_to_first_token_seconds_count",)] == 3
    assert found[("llm_time_between_tokens_seconds_count",)] == 18
    assert found[("llm_slots_busy",)] == found[("llm_queue_length",)] == 0
