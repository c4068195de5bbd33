"""`/v1/embeddings`: the vectors are the embedder's, and OpenAI's client reads them."""

import json

import numpy as np
import openai
import pytest

from shared.retrieval.embedders import HiddenStates
from shared.serving.__main__ import Settings
from tests.serving.helpers import JSON, TOKENIZER, check_error, client, gpt

PATH = "/v1/embeddings"
TEXTS = ["abc def", "hij", "abc, abc. " * 3]


@pytest.fixture(scope="module")
def talk():
    with client(embedders={"vectors": HiddenStates(gpt(), TOKENIZER, "vectors")}) as made:
        yield made


@pytest.fixture
def theirs(talk):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=talk, max_retries=0)


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"dimensions": 32}])
def test_openais_client_gets_the_embedders_vectors(theirs, form):
    """Where it names no format, it asks for base64 and turns that back."""
    answer = theirs.embeddings.create(model="vectors", input=TEXTS, **form)
    got = np.array([row.embedding for row in answer.data], np.float32)
    np.testing.assert_allclose(got, HiddenStates(gpt(), TOKENIZER, "x").embed(TEXTS), atol=1e-6)
    assert [row.index for row in answer.data] == [0, 1, 2] and answer.model == "vectors"
    tokens = sum(len(TOKENIZER.encode(text)) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


def test_one_text_and_many(theirs):
    one = theirs.embeddings.create(model="vectors", input=TEXTS[1]).data
    many = theirs.embeddings.create(model="vectors", input=[TEXTS[1]] * 70).data
    assert len(one) == 1 and len(many) == 70
    np.testing.assert_allclose(one[0].embedding, many[69].embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "status", "said", "param"),
    [
        ({"model": "tiny"}, 404, "no model for embeddings is called 'tiny'; there are: vectors", "model"),
        ({"input": []}, 400, "none of them empty", "input"),
        ({"input": ["abc", ""]}, 400, "none of them empty", "input"),
        ({"input": [1, 2]}, 400, "send the texts", "input"),
        ({"input": ["a"] * 2049}, 400, "2049 texts are more than 2048", "input"),
        ({"input": ["abc", "x " * 300]}, 400, "text 1 has ", "input"),
        ({"input": "a\ud800"}, 400, "half a surrogate pair", "input"),
        ({"encoding_formt": "float"}, 400, "is encoding_format meant?", "encoding_formt"),
        ({"dimensions": 8}, 400, "vectors makes 32 numbers", "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format", "encoding_format"),
    ],
    ids=str,
)
def test_refused(talk, fields, status, said, param):
    content = json.dumps({"model": "vectors", "input": "abc"} | fields)
    answer = talk.post(PATH, content=content, headers=JSON)
    code = answer.json()["error"]["code"]
    check_error(answer, status, said, param, code)


def test_fields_that_are_not_read_are_named(talk):
    answer = talk.post(PATH, json={"model": "vectors", "input": "abc", "purpose": "x"})
    assert answer.headers["X-Ignored-Fields"] == "purpose"


def test_a_server_without_embedders_says_so(shared_client):
    answer = shared_client.post(PATH, json={"model": "tiny", "input": "abc"})
    check_error(answer, 404, "this server has none (see --embeddings)", "model", "model_not_found")


def test_models_say_how_much_they_read(talk):
    models = {row["id"]: row["max_model_len"] for row in talk.get("/v1/models").json()["data"]}
    assert models == {"tiny": 128, "vectors": 128}
    assert talk.get("/v1/models/vectors").json()["max_model_len"] == 128


def test_own_hidden_states_do_not_go_with_adapters():
    with pytest.raises(ValueError, match="embeddings=own: not beside adapters"):
        Settings(embeddings="own", adapters=("a=folder",))
