"""shared/adapters/conversations.py: the forms of a conversation, files of them, and splitting them."""

import json
import math

import pytest

from shared.adapters.conversations import conversation, read_conversations, split_off


def talk(question, reply, system=None):
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": reply})
    return messages


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"prompt": " Who? ", "response": "I.\n"}, talk("Who?", "I.")),
        ({"prompt": "Who?", "response": "I.", "source": "more keys do no harm"}, talk("Who?", "I.")),
        ({"instruction": "Add.", "input": "2, 3", "output": "5"}, talk("Add.\n\n2, 3", "5")),
        ({"instruction": "Who?", "input": "", "output": "I."}, talk("Who?", "I.")),
        ({"instruction": "Who?", "output": "I."}, talk("Who?", "I.")),
        ({"messages": talk("Who?", "I.", system="Be brief.")}, talk("Who?", "I.", system="Be brief.")),
        ({"prompt": "Who?", "completion": "I."}, talk("Who?", "I.")),
        ({"prompt": talk("Who?", "I.")[:1], "completion": talk("Who?", "I.")[1:]}, talk("Who?", "I.")),
        ({"prompt": talk("Who?", "I.")[:1], "completion": "I."}, talk("Who?", "I.")),
        (
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
            talk("Who?", "I."),
        ),
        ({"conversations": talk("Who?", "I.")}, talk("Who?", "I.")),
        (
            {"messages": [{"role": "user", "content": parts("Wh", "o?")}, talk("", "I.")[1]]},
            talk("Who?", "I."),
        ),
        ({"prompt": "Who?", "response": "I.", "system": "Be brief."}, talk("Who?", "I.", "Be brief.")),
        ({"messages": talk("Who?", "I.", "Be brief."), "system": "No."}, talk("Who?", "I.", "Be brief.")),
        ({"instruction": "Who?", "output": "I.", "system": ""}, talk("Who?", "I.")),
    ],
)
def test_the_forms_of_a_conversation(entry, expected):
    assert conversation(entry) == expected


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "Who?", "response": ', "Expecting value"),
        ('{"question": "Who?"}', "expected an object with .* found 'question'"),
        ("[1]", "found list"),
        ('{"prompt": "Who?", "response": "  "}', "the assistant's text is empty"),
        ('{"prompt": 3, "response": "I."}', "the user's text is no text"),
        ('{"instruction": "Who?", "input": 3, "output": "I."}', "must be texts"),
        ('{"messages": "Who?"}', "must be a list"),
        ('{"messages": []}', "must end with an answer"),
        ('{"messages": ["Who?"]}', "must be a list"),
        ('{"conversations": [{"from": "human", "value": "Who?"}]}', "must end with an answer"),
        ('{"conversations": [{"from": "tool", "value": "Who?"}]}', "not 'tool'"),
        ('{"conversations": [{"from": ["gpt"], "value": "Who?"}]}', r"not \['gpt'\]"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "not type 'image_url'"),
        ('{"messages": [{"role": "user", "content": ["Who?"]}]}', "not str"),
        ('{"messages": [{"role": "user", "content": []}]}', "the user's text is empty"),
        ('{"prompt": "Who?", "response": "\\ud83d"}', "half a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"messages": [{"role": "user", "content": "Who?"}]}', "must end with an answer"),
        (
            '{"messages": [{"role": "human", "content": "Who?"}]}',
            "role must be one of system, user, assistant, not 'human'",
        ),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, words):
    path = tmp_path / "talks.jsonl"
    path.write_text('{"prompt": "Who?", "response": "I."}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"talks.jsonl, line 3: .*{words}"):
        read_conversations(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no conversation"):
        read_conversations(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "response": "a"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_conversations(tmp_path / "latin.jsonl")


def in_every_form(question, reply):
    """An entry for the same conversation in each form."""
    messages = talk(question, reply)
    names = {"user": "human", "assistant": "gpt"}
    return [
        {"messages": messages},
        {"messages": [{"role": m["role"], "content": parts(m["content"])} for m in messages]},
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]},
        {"prompt": question, "response": reply},
        {"prompt": question, "completion": reply},
        {"prompt": messages[:1], "completion": messages[1:]},
        {"instruction": question, "input": "", "output": reply},
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_as_its_lines_are(tmp_path, indent):
    entries = in_every_form("Où?\nThere [1]?", '"Là\u2028bas"')
    lines, array = tmp_path / "talks.jsonl", tmp_path / "talks.json"
    lines.write_text("".join(json.dumps(entry) + "\r\n" for entry in entries), encoding="utf-8-sig")
    array.write_text("\n" + json.dumps(entries, indent=indent, ensure_ascii=False), encoding="utf-8")
    expected = [talk("Où?\nThere [1]?", '"Là\u2028bas"')] * len(entries)
    assert read_conversations(lines) == read_conversations(array) == expected


def test_a_bad_entry_of_an_array_is_named_and_a_cut_array_refused(tmp_path):
    path = tmp_path / "talks.json"
    good = {"prompt": "Who?", "response": "I."}
    path.write_text(json.dumps([good, {"prompt": "Who?"}, good]))
    with pytest.raises(ValueError, match="talks.json, entry 2: expected an object with"):
        read_conversations(path)
    said = []
    assert read_conversations(path, skip_bad_lines=True, say=said.append) == [talk("Who?", "I.")] * 2
    assert "1 of 3" in said[0] and "entry 2" in said[0]
    path.write_text(json.dumps([good, good])[:-5])
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"talks.json begins with \[, but is no JSON array"):
            read_conversations(path, skip_bad_lines=skip)


def test_bad_lines_are_skipped_and_counted(tmp_path):
    """Whatever is between them, the good lines come out as they do alone."""
    bad = [b'{"prompt": "Name a knot.", "response": ', b"\xff\xfe", b"[]", b"null", b'{"a": 1}']
    good = [
        b'{"prompt": "Name a boat.", "response": "A dinghy."}',
        b'{"prompt": "A sail.", "response": "A jib."}',
    ]
    path = tmp_path / "talks.jsonl"
    path.write_bytes(b"\n".join(good))
    alone = read_conversations(path, skip_bad_lines=True, say=pytest.fail)
    path.write_bytes(b"\n".join([good[0], *bad, b"", good[1]]))
    said = []
    assert read_conversations(path, skip_bad_lines=True, say=said.append) == alone
    (line,) = said
    assert "5 of 7 conversations" in line and "line 2: no JSON" in line and "line 3: not UTF-8" in line
    path.write_bytes(b"\n".join(bad))
    with pytest.raises(ValueError, match="no conversation in it .*line 1: no JSON"):
        read_conversations(path, skip_bad_lines=True)


def test_json_escapes_and_unicode_survive(tmp_path):
    path = tmp_path / "talks.jsonl"
    line = json.dumps({"prompt": "Où?", "response": "Là\u2028bas"}, ensure_ascii=False)
    path.write_text(line + "\n", encoding="utf-8")
    assert read_conversations(path) == [talk("Où?", "Là\u2028bas")]


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_splitting_off_keeps_every_conversation_once(count):
    talks = [talk(f"{i}?", f"{i}.") for i in range(count)]
    train, val = split_off(talks)
    assert sorted(str(t) for t in train + val) == sorted(map(str, talks))
    assert len(val) == math.ceil(count / 10)
    assert (train, val) == split_off(talks)
    if count > 2:
        assert (train, val) != split_off(talks, seed=1)
    with pytest.raises(ValueError, match="cannot be split"):
        split_off(talks[:1])
