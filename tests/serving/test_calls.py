"""shared/serving/calls.py: the form of a call is what transformers' template writes, however it arrives."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.models.chat import IM_END, IM_START
from shared.serving.calls import Call, CallReader, CallStyle, call_style, uses_tools
from shared.tokenizers import BPETokenizer
from shared.tokenizers.base import Chat
from tests.models.templates import TEMPLATES
from tests.serving.tool_models import OTHERS, ROME, STYLES, answer_ids, both, calling

HERMES = CallStyle(
    '\n{"name": "',
    '", "arguments": ',
    "}\n</tool_call>",
    marker="<tool_call>",
    lead="<think>\n\n</think>\n\n",
    gap="\n",
    join="\n",
)
LLAMA = CallStyle('{"name": "', '", "parameters": ', "}")
WANTED = {"llama3_1": LLAMA, "llama3_2": LLAMA, "qwen2_5": replace(HERMES, lead=""), "qwen3": HERMES}


def read(style: CallStyle, *pieces: str, names=("weather", "now")) -> list[str | Call]:
    """What a reader makes of a text, with texts that follow one another joined."""
    reader = CallReader(style, names)
    found: list[str | Call] = []
    for part in [*(part for piece in pieces for part in reader.push(piece)), *reader.finish()]:
        if found and isinstance(part, str) and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_public_template_has_a_known_form_or_is_refused(name):
    ours, _ = both(name)
    assert uses_tools(ours) == (name in STYLES + OTHERS)
    if name in STYLES:
        assert call_style(ours) == WANTED[name]
    else:
        said = "in a form that this server cannot read" if name in OTHERS else "no place for tools"
        with pytest.raises(ValueError, match=said):
            call_style(ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("said", ["", "Let me look."])
def test_what_the_template_writes_is_read(name, said):
    ours, _ = both(name)
    style = call_style(ours)
    calls = [ROME, ROME | {"days": 3}] if style.join is not None else [ROME]
    text = ours.decode(answer_ids(name, calling(*calls, said=said)))
    found = read(style, text)
    assert [(c.name, json.loads(c.arguments)) for c in found if isinstance(c, Call)] == [
        ("weather", value) for value in calls
    ]
    spoken = "" if name in ("llama3_1", "llama3_2") else said  # their template writes a call alone
    assert "".join(part for part in found if isinstance(part, str)).removeprefix(style.lead) == spoken


def test_a_model_without_a_template_has_no_place_for_tools():
    with pytest.raises(ValueError, match="no place for tools"):
        call_style(BPETokenizer([], special_tokens=[IM_START, IM_END]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "template", ["{{ tools }}", "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}"]
)
def test_a_template_that_writes_no_calls_is_refused(template):
    with pytest.raises(ValueError, match="cannot read"):
        call_style(BPETokenizer([], special_tokens=["<s>"], chat=Chat(template, {})))


GOOD = HERMES.written(Call("now", "{}"))
PARTS = st.sampled_from(
    [
        GOOD,
        HERMES.written(Call("weather", '{"city": "</tool_call>}", "days": 1}')),
        HERMES.written(Call("nothing", "{}")),
        HERMES.lead,
        "<tool_call>",
        "</tool_call>",
        '\n{"name": "now", "arguments": ',
        "<tool",
        "\n",
        " ",
        "x",
        "{}",
        LLAMA.written(Call("now", "{}")),
    ]
)
TEXTS = st.lists(PARTS, max_size=8).map("".join)


@given(st.sampled_from([HERMES, LLAMA]), TEXTS, st.lists(st.integers(0, 200), max_size=30))
def test_pieces_are_read_as_the_whole(style, text, cuts):
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in zip(places, places[1:])]
    assert read(style, *pieces) == read(style, text)


@given(TEXTS)
def test_nothing_is_lost_but_what_stands_around_a_call(text):
    """Calls are those that a plain search finds, and the rest of the text is all there."""
    found = read(HERMES, text)
    written = "".join(part if isinstance(part, str) else HERMES.written(part) for part in found)
    plain = [text.replace(HERMES.lead, "") for text in (text, written)]
    assert "".join(plain[0].split()) == "".join(plain[1].split())
    assert not any(GOOD in part for part in found if isinstance(part, str))


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (HERMES, HERMES.written(Call("nobody", "{}"))),
        (HERMES, GOOD[:-1]),
        (HERMES, "1 < 2 <tool_call> 3"),
        (LLAMA, '{"name": "Ada", "parameters": {}}'),
        (LLAMA, '{"name": "now", "parameters": {'),
        (LLAMA, ' {"name": "now", "parameters": {}}'),
        (LLAMA, "[]"),
    ],
)
def test_what_only_looks_like_a_call_is_text(style, text):
    assert read(style, text) == [text] == read(style, *text)
