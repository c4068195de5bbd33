"""shared/serving/tools.py: OpenAI's client reads calls, and they are those of the template and the schema."""

import json
import re

import jsonschema
import openai
import pytest
import torch

from shared.models.chat import IM_END, IM_START
from shared.runtime import ROOT
from shared.serving.api import create_app
from shared.serving.bodies import Message
from shared.serving.grammar import Grammars
from shared.serving.tools import FreeForm, plain_messages
from shared.tokenizers import BPETokenizer
from shared.tokenizers.base import ends_of
from shared.tokenizers.bpe import END_OF_TEXT
from tests.helpers import serving, synthetic_text
from tests.models.templates import TOOL
from tests.serving.helpers import CHAT, ENDS, TOKENIZER, check_error, choices_of, complete
from tests.serving.tool_models import (
    ASKED,
    NOW,
    OTHERS,
    PARAMETERS,
    ROME,
    STYLES,
    TOOLS,
    WEATHER,
    Scripted,
    answer_ids,
    both,
    calling,
    config_for,
    random_client,
    scripted,
    theirs_writes,
)

pytestmark = pytest.mark.slow
LIMITED = {"model": "tiny", "messages": ASKED, "max_tokens": 400}
GREEDY = LIMITED | {"temperature": 0}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module", params=STYLES)
def talk(request):
    with scripted(request.param) as found:
        found.style = request.param
        yield found


@pytest.fixture(scope="module")
def qwen():
    with scripted("qwen3") as found:
        yield found


@pytest.fixture(scope="module")
def llama():
    with scripted("llama3_1") as found:
        yield found


def theirs_of(talk) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=talk, max_retries=0)


def answer_of(talk, **fields):
    """The message, as OpenAI's client reads it, and why it ended."""
    choice = theirs_of(talk).chat.completions.create(**GREEDY | {"tools": TOOLS} | fields).choices[0]
    return choice.message, choice.finish_reason


def streamed(talk, **fields) -> tuple[str, list[dict], str]:
    """What a client puts together of a stream: the text, the calls, and why it ended."""
    content, calls, reason = "", [], ""
    for chunk in theirs_of(talk).chat.completions.create(**GREEDY | {"tools": TOOLS} | fields, stream=True):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
        for part in delta.tool_calls or []:
            if part.index == len(calls):
                calls.append({"id": part.id, "type": part.type, "name": part.function.name, "arguments": ""})
            calls[part.index]["arguments"] += part.function.arguments
    return content, calls, reason


def check_call(call) -> None:
    """A call of one of the tools with arguments of its schema."""
    parameters = {"weather": PARAMETERS, "now": {"type": "object", "maxProperties": 0}}
    parameters["add"] = TOOL["function"]["parameters"]
    assert call.type == "function" and call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), parameters[call.function.name])


# What the model writes with its template.


def test_a_call_is_read_and_can_be_put_back(talk):
    """The answer, among the messages again, has the ids that the model wrote."""
    written = answer_ids(talk.style, calling(ROME))
    talk.write(written)
    message, reason = answer_of(talk)
    (call,) = message.tool_calls
    check_call(call)
    assert json.loads(call.function.arguments) == ROME and call.function.name == "weather"
    assert message.content is None and reason == "tool_calls"
    content, calls, reason = streamed(talk)
    assert (content, reason) == ("", "tool_calls")
    assert [(c["type"], c["name"], c["arguments"]) for c in calls] == [
        ("function", "weather", call.function.arguments)
    ]

    read_back = calling(json.loads(call.function.arguments)) | {"content": ""}
    begun = theirs_writes(talk.style, ASKED, begin_answer=True)
    assert theirs_writes(talk.style, [*ASKED, read_back])[: len(begun + written)] == begun + written


def test_the_conversation_goes_on_with_the_result(talk):
    """Call and result reach the model as transformers' template writes them."""
    talk.write(answer_ids(talk.style, calling(ROME)))
    message, _ = answer_of(talk)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    want = theirs_writes(talk.style, [*ASKED, calling(ROME), result], begin_answer=True)
    talk.write(talk.tokenizer.encode("Sunny."))
    history = [*ASKED, message.model_dump(), result]
    answer, reason = answer_of(talk, messages=history)
    assert (answer.content, reason, answer.tool_calls) == ("Sunny.", "stop", None)
    usage = complete(talk, CHAT, messages=history, tools=TOOLS, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == len(want)


def test_a_plain_answer_stays_one(talk):
    talk.write(talk.tokenizer.encode("It is < 3 {today}."))
    message, reason = answer_of(talk)
    assert (message.content, message.tool_calls, reason) == ("It is < 3 {today}.", None, "stop")
    assert streamed(talk) == ("It is < 3 {today}.", [], "stop")


def test_several_calls_after_a_text(qwen):
    written = calling(ROME, ROME | {"days": 3}, said="Let me look.")
    qwen.write(answer_ids("qwen3", written))
    message, reason = answer_of(qwen)
    assert [json.loads(c.function.arguments)["days"] for c in message.tool_calls] == [2, 3]
    assert len({c.id for c in message.tool_calls}) == 2 and reason == "tool_calls"
    content, calls, reason = streamed(qwen)
    assert content == message.content and content.endswith("Let me look.") and reason == "tool_calls"
    assert [c["arguments"] for c in calls] == [c.function.arguments for c in message.tool_calls]
    message, reason = answer_of(qwen, parallel_tool_calls=False)
    assert len(message.tool_calls) == 1 and reason == "tool_calls"


def test_a_marker_that_comes_in_pieces_never_shows(qwen):
    """Spelled letter by letter, with what only begins like it before."""
    spelled = 'a <tool <tool_call>\n{"name": "now", "arguments": {}}\n'
    letters = [i for letter in spelled for i in qwen.tokenizer.encode(letter)]
    qwen.write([*letters, qwen.tokenizer.special_tokens["</tool_call>"]])
    message, _ = answer_of(qwen)
    assert message.content == "a <tool " and message.tool_calls[0].function.name == "now"
    content, calls, _ = streamed(qwen)
    assert content == "a <tool " and calls[0]["arguments"] == "{}"


def test_a_call_that_is_cut_off_is_text(talk):
    ids = answer_ids(talk.style, calling(ROME))
    talk.write(ids)
    content, calls, reason = streamed(talk, max_tokens=len(ids) - 2)
    message, whole_reason = answer_of(talk, max_tokens=len(ids) - 2)
    assert content and message.content == content and calls == [] and message.tool_calls is None
    assert reason == whole_reason == "length"


def test_json_that_calls_no_tool_is_text(llama):
    text = '{"name": "Ada", "parameters": {}}'
    llama.write(llama.tokenizer.encode(text))
    assert answer_of(llama)[0].content == text and streamed(llama) == (text, [], "stop")


def test_with_none_the_model_is_not_told_of_tools(qwen):
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    qwen.write(qwen.tokenizer.encode(text))
    message, reason = answer_of(qwen, tool_choice="none")
    assert (message.content, message.tool_calls, reason) == (text, None, "stop")


def test_logprobs_name_every_token_of_a_call_too(qwen):
    ids = answer_ids("qwen3", calling(ROME))
    qwen.write(ids)
    for stream in (False, True):
        answer = complete(
            qwen, CHAT, tools=TOOLS, messages=ASKED, temperature=0, logprobs=True, stream=stream
        )
        choices = choices_of(answer, stream)
        named = [entry["bytes"] for choice in choices for entry in choice["logprobs"]["content"]]
        assert b"".join(map(bytes, named)).decode() == qwen.tokenizer.decode(ids)


# What the grammar makes certain.


@pytest.mark.parametrize("style", ["llama3_2", "qwen3"])
def test_a_required_call_of_a_random_model_is_valid(style):
    with random_client(style) as talk:
        found = set()
        for seed in range(20):
            message, reason = answer_of(
                talk, tools=[WEATHER, NOW], tool_choice="required", seed=seed, temperature=1
            )
            assert message.tool_calls and message.content is None and reason == "tool_calls"
            for call in message.tool_calls:
                check_call(call)
            found |= {call.function.name for call in message.tool_calls}
        assert found == {"weather", "now"}
        content, calls, reason = streamed(talk, tool_choice=NAMED, seed=1, temperature=1)
        assert content == "" and reason == "tool_calls" and [c["name"] for c in calls] == ["weather"]
        jsonschema.validate(json.loads(calls[0]["arguments"]), PARAMETERS)


@pytest.mark.parametrize(("style", "begun"), [("qwen3", "<tool_call>"), ("llama3_2", None)])
def test_once_a_call_has_begun_it_is_valid(style, begun):
    """The model begins a call and goes on at random."""
    with scripted(style) as talk:
        begun, tools = begun or '{"name": "weather", "parameters": ', [WEATHER, NOW]
        for seed in range(20):
            talk.write(talk.tokenizer.encode(begun), ends=False, after=2.0)
            message, _ = answer_of(talk, tools=tools, parallel_tool_calls=False, seed=seed, temperature=1)
            check_call(message.tool_calls[0])
            assert message.content is None and len(message.tool_calls) == 1


def plain_markers() -> BPETokenizer:
    """Qwen2.5's template on a tokenizer for which the markers are texts like others."""
    tokenizer = BPETokenizer.train(synthetic_text(300), 290, special_tokens=[END_OF_TEXT, IM_START, IM_END])
    tokenizer.chat = both("qwen2_5")[0].chat
    return tokenizer


def test_markers_may_be_plain_text():
    tokenizer, tools = plain_markers(), [WEATHER, NOW]
    with random_client(tokenizer) as talk:
        for seed in range(5):
            message, reason = answer_of(talk, tools=tools, tool_choice="required", seed=seed, temperature=1)
            assert message.content is None and reason == "tool_calls"
            for call in message.tool_calls:
                check_call(call)
    with scripted(tokenizer) as talk:
        talk.write(tokenizer.encode("Look: <tool_call>\n{"), ends=False, after=2.0)
        for seed in range(5):
            message, _ = answer_of(talk, tools=tools, parallel_tool_calls=False, seed=seed, temperature=1)
            check_call(message.tool_calls[0])
            assert message.content == "Look: "


def test_a_call_may_begin_in_the_middle_of_a_token():
    """The same may follow as where the marker's end is a token's."""
    vocab = {**TOKENIZER.vocab, TOKENIZER.vocab_size: b'ol_call>\n{"n'}
    form = Grammars(TOKENIZER, vocab, ENDS).lark(r'start: "\n{\"name\": 5}\n</tool_call>"')
    free = FreeForm({b"<tool_call>": form}, vocab, TOKENIZER.encode, anywhere=True, several=False)
    apart, together, other = free.copy(), free.copy(), free.copy()
    logits = torch.zeros(len(vocab))
    for token in TOKENIZER.encode('x<to<tool_call>\n{"n'):
        assert torch.equal(apart.mask(logits), logits) or apart.mask(logits)[token] == 0
        apart.push(token)
    for token in [*TOKENIZER.encode("x<to<to"), TOKENIZER.vocab_size]:
        assert torch.equal(together.mask(logits), logits)
        together.push(token)
    assert torch.equal(together.mask(logits), apart.mask(logits)) and together.mask(logits).isinf().any()
    for token in TOKENIZER.encode('ame": 5}\n</tool_call>'):
        assert not together.complete
        together.push(token)
    assert together.complete
    for token in TOKENIZER.encode("<tool_call"):
        other.push(token)
    vocab[TOKENIZER.vocab_size] = b"> is a marker"
    other.push(TOKENIZER.vocab_size)
    assert torch.equal(other.mask(logits), logits) and not other.complete


# What is refused.


def with_parameters(**schema) -> list[dict]:
    return [{"type": "function", "function": {"name": "f", "parameters": schema}}]


RESULT = {"role": "tool", "tool_call_id": "call_0", "content": "x"}
CALLED = calling({}, name="now", text=json.dumps)


@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type: Input should be 'function'", "tools[0].type"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "should match pattern",
            "tools[0].function.name",
        ),
        ({"tools": with_parameters(type="array")}, "of an object is wanted", "tools[0].function.parameters"),
        (
            {"tools": with_parameters(type="object", properties={"a": {"type": "wrong"}})},
            "cannot be followed: Invalid type: wrong",
            "tools[0].function.parameters",
        ),
        ({"tools": [NOW, NOW]}, "two functions are called 'now'", "tools"),
        ({"tools": [NOW] * 129}, "at most 128 items", "tools"),
        (
            {"tools": [NOW], "tool_choice": NAMED},
            "no tool is called 'weather'; there are: now",
            "tool_choice",
        ),
        ({"tools": [NOW], "tool_choice": "any"}, '"none", "auto", "required" or', "tool_choice"),
        ({"tool_choice": "required"}, "only with tools", "tool_choice"),
        (
            {"tools": [NOW], "response_format": {"type": "json_object"}},
            "not together with tools",
            "response_format",
        ),
        ({"messages": [*ASKED, RESULT]}, "no call before it waits for", "messages[1].tool_call_id"),
        ({"messages": [*ASKED, CALLED]}, "calls without a result: 'call_0'", "messages[1]"),
        ({"messages": [*ASKED, CALLED, *ASKED]}, "calls without a result: 'call_0'", "messages[2]"),
        ({"messages": [*ASKED, CALLED, RESULT, RESULT]}, "waits for", "messages[3].tool_call_id"),
        (
            {"messages": [ASKED[0] | {"tool_calls": CALLED["tool_calls"]}]},
            "only a message of role 'assistant'",
            "messages[0].tool_calls",
        ),
        (
            {"messages": [ASKED[0] | {"tool_call_id": "x"}]},
            "only a message of role 'tool'",
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [*ASKED, CALLED | {"tool_calls": CALLED["tool_calls"] * 2}]},
            "the same id",
            "messages[1].tool_calls",
        ),
        (
            {"messages": [*ASKED, calling([], text=json.dumps), RESULT]},
            "the JSON text of an object is wanted",
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refused(qwen, fields, said, param):
    check_error(complete(qwen, CHAT, **fields), 400, said, param)
    assert qwen.engine.busy == 0


@pytest.mark.parametrize(
    ("style", "said"), [("gemma3", "has no place for tools"), *((s, "cannot read") for s in OTHERS)]
)
def test_a_model_that_cannot_use_tools_says_so(style, said):
    with random_client(style) as talk:
        for fields, param in (
            ({"tools": TOOLS}, "tools"),
            ({"messages": [*ASKED, CALLED, RESULT]}, "messages"),
        ):
            answer = complete(talk, CHAT, **fields)
            check_error(answer, 400, said, param)
            message = answer.json()["error"]["message"]
            assert message.startswith("the model 'tiny' cannot use tools: ") and "leave tools" in message
        assert complete(talk, CHAT, tools=TOOLS, tool_choice="none", max_tokens=1).status_code == 200


def test_results_are_put_into_the_order_of_the_calls():
    """The template does not say which call a result is of."""
    called = calling(ROME, ROME, text=json.dumps)
    results = [RESULT | {"tool_call_id": f"call_{i}", "content": f"result {i}"} for i in (1, 0)]
    talk = [*ASKED, called, *results, *ASKED, called, *results]
    told = plain_messages([Message(**message) for message in talk])
    assert told == 2 * [*ASKED, calling(ROME, ROME), *reversed(results)]


# The example of the documentation.


def test_the_documented_conversation_works(capsys):
    text = (ROOT / "docs/deploying.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    tokenizer, _ = both("qwen3")
    model, end = Scripted(config_for(tokenizer)), ends_of(tokenizer)[:1]
    called = answer_ids("qwen3", calling({"city": "Rome"}))
    model.answers = [called + end, tokenizer.encode("It is sunny.") + end]
    with serving(create_app(model, tokenizer, name="qwen3")) as url:
        exec(code.replace("http://127.0.0.1:8000", url), {"__name__": "example"})
    assert capsys.readouterr().out == "It is sunny.\n"
