"""shared/serving/grammar.py: what a model writes under a schema is what the library jsonschema accepts."""

import json

import jsonschema
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.serving.engine import Engine
from shared.serving.generation import Request
from shared.serving.grammar import Grammars
from shared.tokenizers import CharTokenizer
from tests.serving.helpers import CHAT, ENDS, TOKENIZER, check_error, choices_of, complete, expected, gpt

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"enum": ["yes", "no"]},
    {"anyOf": [{"type": "null"}, {"const": 5}]},
]
TALK = [{"role": "system", "content": "x"}, {"role": "user", "content": "abc"}]
PADDED = {**dict.fromkeys(range(310), b""), **TOKENIZER.vocab}
"""A model's vocabulary with ten rows more than its tokenizer knows."""
GRAMMARS = Grammars(TOKENIZER, PADDED, ENDS)


def written(form, generator, most=400) -> list[int]:
    """What a model without any preference writes: logits are random, and all ends are as likely."""
    ids = []
    while not form.complete and len(ids) < most:
        logits = form.mask(2 * torch.randn(len(PADDED), generator=generator))
        ids.append(int(logits.argmax()))
        form.push(ids[-1])
    return ids


@given(st.sampled_from(SCHEMAS), st.integers(0, 2**31))
@settings(max_examples=40)
def test_what_is_written_is_valid(schema, seed):
    form = GRAMMARS.json(schema).copy()
    ids = [i for i in written(form, torch.Generator().manual_seed(seed)) if i not in ENDS]
    assert form.complete
    jsonschema.validate(json.loads(b"".join(PADDED[i] for i in ids)), schema)


def test_a_token_is_allowed_just_where_some_json_goes_on_with_it():
    """After `{"age": 1` an object of one small whole number goes on with a digit or ends."""
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 19}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = GRAMMARS.json(schema).copy()
    for token in TOKENIZER.encode('{"age": 1'):
        assert form.allowed()[token]
        form.push(token)
    found = {PADDED[i] for i in form.allowed().nonzero().flatten().tolist()}
    assert {part for part in found if len(part) == 1} == {b"}", *(b"%d" % digit for digit in range(10))}
    with pytest.raises(ValueError, match="may not come here"):
        form.push(TOKENIZER.encode("x")[0])


def test_copies_are_independent():
    form = GRAMMARS.json({"enum": ["yes", "no"]})
    one, other = form.copy(), form.copy()
    for token in TOKENIZER.encode('"yes"'):
        one.push(token)
    assert one.complete and not other.complete and not form.complete


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "wrong"}, "wrong"),
        ({"$ref": "http://example.org/x"}, "example.org"),
        ({"minLength": -1}, "minLength"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(schema, said):
    with pytest.raises(ValueError, match=f"cannot be followed: .*{said}"):
        GRAMMARS.json(schema)


def test_a_vocabulary_without_braces_cannot_write_objects():
    letters = CharTokenizer.train("abcdef")
    with pytest.raises(ValueError, match="cannot be followed"):
        Grammars(letters, letters.vocab).json({"type": "object"})


# Through the API.


def asked(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_keep_to_the_schema(shared_client, stream):
    fields = {"n": 2, "seed": 3, "temperature": 1, "stream": stream, "messages": TALK}
    answer = complete(shared_client, CHAT, response_format=asked(PERSON), **fields)
    texts, reasons = {0: "", 1: ""}, {}
    for choice in choices_of(answer, stream):
        piece = choice["delta" if stream else "message"]
        texts[choice["index"]] += piece.get("content") or ""
        reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
    assert texts[0] != texts[1]
    for index, text in texts.items():
        assert reasons[index] == "stop"
        jsonschema.validate(json.loads(text), PERSON)


def test_any_object_and_a_text_that_is_cut(shared_client):
    theirs = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=shared_client)

    def choice(**fields):
        return theirs.chat.completions.create(model="tiny", messages=TALK, **fields).choices[0]

    cut = choice(response_format=asked(PERSON), max_tokens=3)
    assert cut.finish_reason == "length" and '{"name": "'.startswith(cut.message.content)
    for seed in range(5):
        any_object = choice(response_format={"type": "json_object"}, seed=seed)
        if any_object.finish_reason == "stop":
            assert isinstance(json.loads(any_object.message.content), dict)
            break
    else:
        raise AssertionError("no text came to its end")


def test_other_texts_beside_it_are_not_changed(shared_client):
    """A form belongs to its text: the next one in the same slot is free again."""
    plain = complete(shared_client, CHAT, max_tokens=12, temperature=0).json()["choices"]
    complete(shared_client, CHAT, max_tokens=12, temperature=0, response_format=asked(PERSON))
    assert complete(shared_client, CHAT, max_tokens=12, temperature=0).json()["choices"] == plain


@pytest.mark.parametrize(
    ("wanted", "said", "param"),
    [
        ({"type": "xml"}, "response_format.type", "response_format.type"),
        ({"type": "json_schema"}, "a schema is wanted", "response_format.json_schema"),
        ({"type": "text", "json_schema": {"schema": {}}}, "and only there", "response_format.json_schema"),
        (asked({"type": "wrong"}), "cannot be followed: Invalid type: wrong", "response_format"),
    ],
)
def test_refused(shared_client, wanted, said, param):
    check_error(complete(shared_client, CHAT, response_format=wanted), 400, said, param)
    assert shared_client.engine.busy == 0


def test_a_form_that_cannot_go_on_ends_its_own_text_alone():
    """As when the automaton has reached one of its limits."""

    class Stuck:
        complete = False

        def copy(self):
            return self

        def mask(self, logits):
            raise ValueError("too complex")

    engine = Engine(gpt(), slots=2, start=False)
    prompt = TOKENIZER.encode("abc")
    free = engine.submit(Request(prompt, 5, temperature=0))
    stuck = engine.submit(Request(prompt, 5, temperature=0, form=Stuck()))
    while engine.step():
        pass
    assert stuck.finish_reason == "error" and free.finish_reason == "length"
    assert TOKENIZER.decode([token.id for token in free]) == expected(prompt, 5, temperature=0)
