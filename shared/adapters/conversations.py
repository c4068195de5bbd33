"""Week 9. Conversations from files, in the forms in which instruction data is handed round.

| form | an entry |
| --- | --- |
| messages | {"messages": [{"role", "content"}, ...]} (OpenAI's and the hub's chats) |
| ShareGPT | {"conversations": [{"from": "human" or "gpt", "value"}, ...]} |
| prompt and answer | {"prompt", "response"} or {"prompt", "completion"}: texts, or lists of messages (TRL) |
| Alpaca | {"instruction", "input", "output"} |

A file is JSONL, an entry a line, or one JSON array of entries.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.models.chat import ROLES

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""
Conversation = list[Message]
"""Messages, oldest first; the last one is the assistant's."""
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls the roles; others it calls as all do."""
NAMED = 3
"""So many entries that were skipped are named, with what is wrong with them."""


# ---- an entry


def conversation(entry: Any) -> Conversation:
    """A conversation from one JSON object, in any of the forms above.

    A "system" beside them comes first, where the messages do not begin with one. A content may be a list of
    parts, {"type": "text", "text": ...}, which are put together. Raises ValueError for anything else, an
    empty text, and a conversation that does not end with the assistant.

    >>> conversation({"instruction": "Add them.", "input": "2 and 3", "output": "5"})[0]
    {'role': 'user', 'content': 'Add them.\\n\\n2 and 3'}
    >>> conversation({"conversations": [{"from": "gpt", "value": "Ahoy."}]})
    [{'role': 'assistant', 'content': 'Ahoy.'}]
    """
    messages: Conversation = []
    for role, content in _roles_and_contents(entry):
        if role not in ROLES:
            raise ValueError(f"a role must be one of {', '.join(ROLES)}, not {role!r}")
        messages.append({"role": role, "content": _text(content, role)})
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("a conversation must end with an answer of the assistant")
    return messages


def _roles_and_contents(entry: Any) -> list[tuple[Any, Any]]:
    """The roles and the contents of the messages, which are not checked yet."""
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys >= {"messages"}:
        messages = _messages(entry["messages"], "messages")
    elif keys >= {"conversations"}:
        messages = _messages(entry["conversations"], "conversations")
    elif keys >= {"prompt", "response"}:
        messages = _side(entry, "prompt", "user") + _side(entry, "response", "assistant")
    elif keys >= {"prompt", "completion"}:
        messages = _side(entry, "prompt", "user") + _side(entry, "completion", "assistant")
    elif keys >= {"instruction", "output"}:
        messages = [("user", _alpaca_question(entry)), ("assistant", entry["output"])]
    else:
        known = (
            '{"messages"}, {"conversations"}, {"prompt", "response"}, {"prompt", "completion"} or'
            ' {"instruction", "input", "output"}'
        )
        given = ", ".join(repr(key) for key in sorted(keys)) or type(entry).__name__
        raise ValueError(f"expected an object with {known}, found {given}")
    if entry.get("system") and not (messages and messages[0][0] == "system"):
        messages.insert(0, ("system", entry["system"]))
    return messages


def _side(entry: Mapping[str, Any], key: str, role: str) -> list[tuple[Any, Any]]:
    """A prompt or an answer: a text by `role`, or a list of messages."""
    value = entry[key]
    return _messages(value, key) if isinstance(value, list) else [(role, value)]


def _messages(messages: Any, key: str) -> list[tuple[Any, Any]]:
    """The roles and the contents of a list of messages, in OpenAI's form or ShareGPT's."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'"{key}" must be a list of {{"role", "content"}} or of {{"from", "value"}}')
    pairs = []
    for message in messages:
        if "from" in message:
            name = message["from"]
            role = SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name
            pairs.append((role, message.get("value")))
        else:
            pairs.append((message.get("role"), message.get("content")))
    return pairs


def _alpaca_question(entry: Mapping[str, Any]) -> str:
    parts = [entry["instruction"], entry.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError('"instruction" and "input" must be texts')
    return "\n\n".join(part.strip() for part in parts if part.strip())


def _text(content: Any, role: str) -> str:
    """A message's text, without the space round it. Raises ValueError for what is none."""
    if isinstance(content, list):
        content = "".join(_part(part, role) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the {role}'s text is no text")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {role}'s text has half a surrogate pair, which is no character") from None
    if not content.strip():
        raise ValueError(f"the {role}'s text is empty")
    return content.strip()


def _part(part: Any, role: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        given = type(part).__name__ if kind is None else f"type {kind!r}"
        raise ValueError(
            f'the parts of the {role}\'s content must be {{"type": "text", "text"}}, not {given}'
        )
    return part["text"]


# ---- a file


def read_conversations(
    path: str | Path, skip_bad_lines: bool = False, say: Callable[[str], None] = print
) -> list[Conversation]:
    """The conversations of a file: JSONL, or a JSON array, each entry in a form that `conversation` knows.

    Empty lines are passed over. skip_bad_lines: what cannot be read is left out, and `say` is called with a
    line that has its number and names the first. Raises ValueError for a file that cannot be read or has no
    conversation; without skip_bad_lines also for the first line, or entry of the array, that is broken, with
    its number.
    """
    try:
        data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}): give a file of JSONL, or of a JSON array"
        ) from None
    conversations: list[Conversation] = []
    problems: list[str] = []
    for where, entry in _entries(data, path):
        try:
            conversations.append(conversation(_parsed(entry) if isinstance(entry, bytes) else entry))
        except ValueError as error:
            if not skip_bad_lines:
                raise ValueError(f"{path}, {where}: {error}: mend it, or set skip_bad_lines") from None
            problems.append(f"{where}: {error}")
    named = "; ".join(problems[:NAMED]) + ("; ..." if len(problems) > NAMED else "")
    if not conversations:
        raise ValueError(f"{path} has no conversation in it" + (f" ({named})" if problems else ""))
    if problems:
        total = len(problems) + len(conversations)
        say(f"{path}: {len(problems)} of {total} conversations cannot be read and are left out ({named})")
    return conversations


def _entries(data: bytes, path: str | Path) -> Iterator[tuple[str, Any]]:
    """Where each entry of a file stands, and what it is: a line that is not parsed yet, or a value."""
    if data.lstrip().startswith(b"["):
        try:
            entries = _parsed(data)
        except ValueError as error:
            raise ValueError(f"{path} begins with [, but is no JSON array: {error}") from None
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))
        return
    for number, line in enumerate(data.split(b"\n"), 1):  # JSON may have U+2028 inside a text
        if line.strip():
            yield f"line {number}", line


def _parsed(data: bytes) -> Any:
    """The value that JSON in UTF-8 stands for. Raises ValueError for anything else."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (its byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def split_off(
    conversations: Sequence[Conversation], share: float = 0.1, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """A training and a held-out part, drawn by chance; each has at least one conversation.

    share: of the held-out part. Raises ValueError for fewer than two conversations.
    """
    if len(conversations) < 2:
        raise ValueError(
            f"{len(conversations)} conversation cannot be split into a training and a held-out part: give at"
            " least 2"
        )
    order = np.random.default_rng(seed).permutation(len(conversations)).tolist()
    count = min(len(conversations) - 1, max(1, math.ceil(share * len(conversations))))
    train = [conversations[i] for i in sorted(order[count:])]
    held_out = [conversations[i] for i in sorted(order[:count])]
    return train, held_out
