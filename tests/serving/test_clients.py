"""Other people's clients of shared/serving/api.py: OpenAI's own, and lm-eval."""

import lm_eval
import openai
import pytest
import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI

from shared.models.chat import chat_prompt
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from shared.serving.api import create_app
from shared.zero_shot import LMEvalAdapter
from tests.helpers import serving, shake, synthetic_text
from tests.serving.helpers import PROMPT, TOKENIZER, expected, gpt
from tests.zero_shot.helpers import TOKENIZER as PLAIN
from tests.zero_shot.helpers import by_lm_eval, piqa_rows, same_tokenizer, write_lines


@pytest.fixture(scope="module")
def url():
    with serving(create_app(gpt(), TOKENIZER, name="tiny", chunk=8, api_key="secret")) as found:
        yield found


@pytest.fixture
def theirs(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as found:
        yield found


def test_openais_client_lists_models_and_completes(theirs):
    assert [m.id for m in theirs.models.list()] == ["tiny"] and theirs.models.retrieve("tiny").id == "tiny"
    options = dict(model="tiny", prompt=PROMPT, max_tokens=12, seed=3)
    answer = theirs.completions.create(**options, logprobs=2, echo=True)
    assert answer.choices[0].text == PROMPT + expected(PROMPT, 12, seed=3)
    assert answer.usage.completion_tokens == 12
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.total_tokens
    parts = theirs.completions.create(**options, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected(PROMPT, 12, seed=3)


def test_openais_client_chats(theirs):
    messages = [{"role": "system", "content": "def"}, {"role": "user", "content": "abc"}]
    text = expected(chat_prompt(TOKENIZER, messages), 12, seed=3)
    options = dict(model="tiny", messages=messages, max_completion_tokens=12, seed=3)
    answer = theirs.chat.completions.create(**options, logprobs=True, top_logprobs=1, n=2)
    assert len(answer.choices) == 2
    first = answer.choices[0]
    assert first.message.content == text and first.finish_reason == "length"
    assert len(first.logprobs.content) == 12
    *parts, last = theirs.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
    assert last.usage.completion_tokens == 12


def test_openais_client_raises_its_own_errors(theirs, url):
    with pytest.raises(openai.NotFoundError) as error:
        theirs.completions.create(model="x", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="context|tokens of prompt"):
        theirs.completions.create(model="tiny", prompt="a", max_tokens=1000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def responses(results: dict) -> list[list[tuple]]:
    """lm-eval's answers to each question: (log-probability, whether it is the greedy one)."""
    return [sample["filtered_resps"] for sample in results["samples"]["local"]]


@pytest.mark.slow
def test_lm_eval_over_http_scores_as_it_does_in_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    model = shake(GPT(GPTConfig(vocab_size=PLAIN.vocab_size, block_size=128, n_layer=2, n_head=2, n_embd=32)))
    same_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [row | {"label": i % 2} for i, row in enumerate(piqa_rows()[:30])]
    path = write_lines(tmp_path / "piqa.jsonl", rows)
    instance = lm_eval.api.instance.Instance
    words = instance("loglikelihood_rolling", {}, (synthetic_text(150),), 0)
    question = instance("generate_until", {}, (PROMPT, {"until": [","], "max_gen_toks": 20}), 0)
    local = LMEvalAdapter(model, PLAIN)
    here = by_lm_eval(local, "piqa", path)
    with serving(create_app(model, PLAIN, name="tiny")) as url:
        remote = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="tiny",
            tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface",
            max_length=128,
            batch_size=4,
        )
        there = by_lm_eval(remote, "piqa", path)
        rolling = remote.loglikelihood_rolling([words], disable_tqdm=True)
        written = remote.generate_until([question], disable_tqdm=True)
    ours, theirs = responses(here), responses(there)
    assert len(ours) == len(theirs) == 30
    scores = [torch.tensor([[float(r[0]) for r in row] for row in found]) for found in (theirs, ours)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-4)
    assert [[r[1] for r in row] for row in theirs] == [[r[1] for r in row] for row in ours]
    assert here["results"]["local"]["acc,none"] == there["results"]["local"]["acc,none"]
    assert rolling == pytest.approx(local.loglikelihood_rolling([words], disable_tqdm=True), rel=0.02)
    ends = list(PLAIN.special_tokens.values())
    text = PLAIN.decode(list(generate(model, PLAIN.encode(PROMPT), 20, temperature=0, stop=ends)))
    assert written == [text.split(",")[0]]
