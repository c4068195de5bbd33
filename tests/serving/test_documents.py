"""Answers from documents through the API: quoted word for word, with their sources; OpenAI's client reads
them.
"""

import openai
import pytest

from shared.retrieval.documents import Chunk
from shared.retrieval.embedders import HiddenStates
from shared.retrieval.index import Index
from shared.retrieval.rag import REFUSAL
from shared.serving.api import create_app
from tests.helpers import serving
from tests.serving.helpers import CHAT, TOKENIZER, check_error, client, complete, events, gpt

CHUNKS = [
    Chunk(
        "boats.md",
        "Boats",
        (),
        "Both boats are green. A trip is 9 tallies.",
        windows=((0, 21), (22, 42)),
        metadata={"team": ["harbour", "day"], "year": 2019},
    ),
    Chunk(
        "bells.md",
        "Bells",
        ("Old",),
        "The bell rings at noon.",
        windows=((0, 23),),
        metadata={"team": "church"},
    ),
]


def index(least_score: float = -1.0) -> Index:
    embedder = HiddenStates(gpt(), TOKENIZER, "tiny")
    embedder.least_score = least_score
    made = Index(embedder)
    made.add(CHUNKS)
    return made


@pytest.fixture(scope="module")
def talk():
    with client(chunk=8, collections={"town": index(), "silent": index(least_score=2.0)}) as found:
        yield found


def ask(talk, *questions: str, **body):
    messages = [{"role": "user", "content": question} for question in questions]
    return complete(talk, CHAT, messages=messages, collection="town", **body)


def check_sources(content: dict, said: str) -> None:
    """The answer stands word for word in the sentence that the source marks, and that in its document."""
    (source,) = content["sources"]
    chunk = next(chunk for chunk in CHUNKS if chunk.source == source["document"])
    assert source.keys() == {"document", "title", "metadata", "text", "score", "sentences"}
    assert source["text"] == chunk.text and source["title"] == chunk.place
    assert source["metadata"] == chunk.metadata
    (sentence,) = source["sentences"]
    assert sentence["text"] == chunk.text[sentence["start"] : sentence["end"]]
    assert said and said in sentence["text"] and -1 <= sentence["score"] <= 1


def test_an_answer_is_quoted_and_names_its_source(talk):
    content = ask(talk, "how much is a trip").json()
    check_sources(content, content["choices"][0]["message"]["content"])
    assert content["choices"][0]["finish_reason"] == "stop" and content["usage"]["completion_tokens"] > 0


def test_a_stream_has_the_sources_in_the_chunk_that_ends_the_text(talk):
    whole = ask(talk, "when does the bell ring").json()
    found = events(ask(talk, "when does the bell ring", stream=True))
    text = "".join(choice["delta"].get("content", "") for event in found for choice in event["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert [("sources" in event) for event in found] == [False] * (len(found) - 1) + [True]
    assert found[-1]["sources"] == whole["sources"] and found[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("question", "collection"),
    [("who is the mayor of Paris?", "town"), ("how much is a trip", "silent")],
    ids=["a name that no document has", "a score below the threshold"],
)
def test_what_the_documents_do_not_answer_is_refused(talk, question, collection):
    body = dict(messages=[{"role": "user", "content": question}], collection=collection)
    content = complete(talk, CHAT, **body).json()
    assert content["choices"][0]["message"]["content"] == REFUSAL and content["sources"] == []
    found = events(complete(talk, CHAT, **body, stream=True))
    assert "".join(c["delta"].get("content", "") for e in found for c in e["choices"]) == REFUSAL
    assert found[-1]["sources"] == []


def test_a_follow_up_is_searched_with_what_was_asked_before(talk, monkeypatch):
    searched = []
    made = talk.app.state.server.collections.index("town")
    search = made.nearest_windows

    def watched(question, k, *, where=None):
        searched.append(question)
        return search(question, k, where=where)

    monkeypatch.setattr(made, "nearest_windows", watched)
    assert ask(talk, "what does a trip cost on the boats?", "And at noon?").status_code == 200
    assert searched == ["what does a trip cost on the boats? And at noon?"]


@pytest.mark.parametrize(
    ("where", "document"),
    [
        ({"team": "harbour"}, "boats.md"),
        ({"team": ["church", "day"], "year": {"!=": 2019}}, "bells.md"),
        ({"year": {">=": 2019, "<": 2020}}, "boats.md"),
        ({"source": "bells.md"}, "bells.md"),
    ],
    ids=str,
)
@pytest.mark.parametrize("earlier", [(), ("when does the bell ring",)])
def test_an_answer_comes_from_documents_that_fit(talk, where, document, earlier):
    content = ask(talk, *earlier, "and a trip", where=where).json()
    assert [source["document"] for source in content["sources"]] == [document]
    check_sources(content, content["choices"][0]["message"]["content"])


@pytest.mark.parametrize("body", [{"where": {"year": 1}}, {"least_score": 1.5}], ids=str)
def test_where_nothing_is_near_enough_nothing_is_answered(talk, body):
    content = ask(talk, "how much is a trip", **body).json()
    assert content["choices"][0]["message"]["content"] == REFUSAL and content["sources"] == []


def test_a_least_score_stands_in_place_of_the_embedders(talk):
    messages = [{"role": "user", "content": "how much is a trip"}]
    content = complete(talk, CHAT, messages=messages, collection="silent", least_score=-1).json()
    check_sources(content, content["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        ({"where": {"teem": "x"}}, "no document has the field 'teem'; there are: source, team", "where"),
        ({"where": {"year": {"$gt": 1}}}, "'$gt' compares nothing; there are: <, <=, >, >=, !=", "where"),
        ({"where": {"year": None}}, "year: None is no text, number, true or false", "where"),
        ({"where": "team"}, "dictionary", "where"),
        ({"where": {"year": 1}, "collection": None}, "none is named: give collection", "where"),
        ({"least_score": 0.5, "collection": None}, "none is named: give collection", "least_score"),
        ({"least_score": "high"}, "number", "least_score"),
    ],
    ids=str,
)
def test_what_cannot_be_wanted_of_a_collection_is_refused(talk, body, words, param):
    messages = [{"role": "user", "content": "a trip"}]
    response = complete(talk, CHAT, **({"messages": messages, "collection": "town"} | body))
    check_error(response, 400, words, param)


def test_an_unknown_collection_is_refused_with_the_names_that_there_are(talk):
    response = complete(talk, CHAT, collection="attic")
    there = "no collection is called 'attic'; there are: town, silent"
    check_error(response, 404, there, "collection", "collection_not_found")


@pytest.mark.parametrize(
    ("body", "words"),
    [({"n": 2}, "leave out n"), ({"response_format": {"type": "json_object"}}, "leave out response_format")],
)
def test_what_a_quote_cannot_be_is_refused(talk, body, words):
    check_error(ask(talk, "a trip", **body), 400, words, "collection")


def test_without_a_collection_nothing_changes(talk):
    assert "sources" not in complete(talk, CHAT, max_tokens=4).json()


def test_openais_client_sends_the_collection_and_reads_the_sources():
    with (
        serving(create_app(gpt(), TOKENIZER, name="tiny", chunk=8, collections={"town": index()})) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as theirs,
    ):
        body = dict(model="tiny", messages=[{"role": "user", "content": "how much is a trip"}])
        answer = theirs.chat.completions.create(**body, extra_body={"collection": "town"})
        check_sources(answer.model_extra, answer.choices[0].message.content)
        *_, last = theirs.chat.completions.create(**body, stream=True, extra_body={"collection": "town"})
        assert last.model_extra["sources"] == answer.model_extra["sources"]
        with pytest.raises(openai.NotFoundError) as error:
            theirs.chat.completions.create(**body, extra_body={"collection": "x"})
        assert error.value.code == "collection_not_found" and error.value.param == "collection"
