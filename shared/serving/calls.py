"""Week 12. Calls of functions in the text of a model: how its template writes them, and how they are read.

    style = call_style(tokenizer)          # found by writing a call with the model's own template
    reader = CallReader(style, ["weather"])
    reader.push('Let me look.\\n<tool_call>\\n{"name": "wea')            # ["Let me look."]
    reader.push('ther", "arguments": {"at": "Rome"}}\\n</tool_call>')    # [Call("weather", '{"at": "Rome"}')]

One form is known: an object of JSON with the function's name and its arguments, between two texts or alone.
Hermes and Qwen write it inside `<tool_call>` and `</tool_call>`, Llama 3.1 and 3.2 as the whole answer.

Source: the chat templates in the files of Qwen2.5, Qwen3, Llama 3.1 and Llama 3.2.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from shared.models.chat import rendered
from shared.tokenizers import Tokenizer

PROBE_NAME = "probe_name"
PROBE_ARGUMENTS = {"probe_key": "probe value"}
PROBE_TEXT = "probe text"
"""What a template is asked to write, to see what it puts around it."""


class Call(NamedTuple):
    """A function that the model asks for."""

    name: str
    arguments: str
    """JSON text, as the model wrote it."""


@dataclass(frozen=True)
class CallStyle:
    """What stands around the name and the arguments of a call in a model's answer."""

    before_name: str
    before_arguments: str
    end: str
    marker: str = ""
    """What begins a call, such as `<tool_call>`; nothing: a call is the whole answer."""
    lead: str = ""
    """Before everything that an answer says, such as Qwen3's empty `<think>`; often nothing."""
    gap: str = ""
    """Between what an answer says and its call."""
    join: str | None = None
    """Between two calls; None: an answer has only one."""

    def head(self, name: str) -> str:
        """What follows the marker in a call of this function, up to the arguments."""
        return f"{self.before_name}{name}{self.before_arguments}"

    def written(self, call: Call) -> str:
        """The call as the model writes it."""
        return f"{self.marker}{self.head(call.name)}{call.arguments}{self.end}"


def uses_tools(tokenizer: Tokenizer) -> bool:
    """Whether the model's template tells the model of tools: it does not where it writes the same without
    them.
    """
    if tokenizer.chat is None:
        return False
    asked = [{"role": "user", "content": PROBE_TEXT}]
    return rendered(tokenizer, asked, [_probe_tool()], begin_answer=True) != rendered(
        tokenizer, asked, begin_answer=True
    )


def call_style(tokenizer: Tokenizer) -> CallStyle:
    """How the model's template writes calls.

    Raises ValueError for a template without tools, and for one that writes calls in no form that is known.
    """
    if not uses_tools(tokenizer):
        raise ValueError("its chat template has no place for tools")
    try:
        return _style_of(tokenizer)
    except (ValueError, LookupError, RecursionError):
        raise ValueError(
            "its chat template takes tools, and writes their calls in a form that this server cannot read"
        ) from None


def _style_of(tokenizer: Tokenizer) -> CallStyle:
    lead, found, closing = _answer(tokenizer, PROBE_TEXT).partition(PROBE_TEXT)
    _require(bool(found))
    call = _between(_answer(tokenizer, "", 1), lead, closing)
    start, name, rest = call.partition(PROBE_NAME)
    before_arguments, arguments, end = rest.partition(json.dumps(PROBE_ARGUMENTS))
    _require(bool(name and arguments))
    marker = start[: start.index("{")].rstrip()
    style = CallStyle(start[len(marker) :], before_arguments, end, marker, lead)
    written = json.loads(f"{style.head(PROBE_NAME)}{arguments}{'}'}")
    _require(list(written.values()) == [PROBE_NAME, PROBE_ARGUMENTS] and end.startswith("}"))
    _require(bool(marker) or (end == "}" and not lead))
    # With a text before the call: what the template puts between both belongs to neither.
    said = _between(_answer(tokenizer, PROBE_TEXT, 1), lead, closing)
    gap = _between(said, PROBE_TEXT, call) if said.startswith(PROBE_TEXT) else ""
    try:
        join = _between(_between(_answer(tokenizer, "", 2), lead, closing), call, call)
    except ValueError:  # the template refuses two, or does not write the second
        join = None
    return replace(style, gap=gap, join=join)


def _answer(tokenizer: Tokenizer, said: str, calls: int = 0) -> str:
    """What the template makes of an answer, with what ends it."""
    asked = [{"role": "user", "content": PROBE_TEXT}]
    answer: dict[str, Any] = {"role": "assistant", "content": said}
    if calls:
        function = {"name": PROBE_NAME, "arguments": PROBE_ARGUMENTS}
        answer["tool_calls"] = [
            {"id": f"call_{number}", "type": "function", "function": function} for number in range(calls)
        ]
    tools = [_probe_tool()]
    begun = rendered(tokenizer, asked, tools, begin_answer=True)
    return _between(rendered(tokenizer, [*asked, answer], tools, begin_answer=False), begun, "")


def _probe_tool() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"probe_key": {"type": "string"}}}
    function = {"name": PROBE_NAME, "description": PROBE_TEXT, "parameters": parameters}
    return {"type": "function", "function": function}


def _between(text: str, begin: str, end: str) -> str:
    """What is left of a text without its beginning and its end. Raises ValueError where it has others."""
    _require(text.startswith(begin) and text.endswith(end) and len(begin) + len(end) <= len(text))
    return text[len(begin) : len(text) - len(end)]


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("no known form")


class CallReader:
    """Tells the calls in a text from what else it says, while it comes in pieces.

    names: of the functions that may be called. What only looks like the beginning of a call, or is cut off in
    the middle of one, comes back as text: nothing that a model wrote is lost but the texts around a call.

    >>> style = CallStyle('{"f": "', '", "a": ', "}</c>", marker="<c>")
    >>> reader = CallReader(style, ["add"])
    >>> [reader.push(piece) for piece in ("1 <", " 2 <c", '>{"f": "add", "a": {}}</', "c> ok")]
    [['1 '], ['< 2 '], [], [Call(name='add', arguments='{}'), 'ok']]
    """

    def __init__(self, style: CallStyle, names: Sequence[str]):
        self._style = style
        self._heads = {name: style.head(name) for name in names}
        around = [style.lead, style.gap, style.join or "", ""]
        self._marks = sorted({text + style.marker for text in around}, key=len) if style.marker else []
        self._held = ""
        self._mark = ""
        """What was read of the beginning of a call; it is text again where no call follows."""
        self._in_call = not style.marker
        self._after_call = False
        self._decoder = json.JSONDecoder()

    def push(self, text: str) -> list[str | Call]:
        """Takes the next piece; returns texts and calls that are certain now."""
        self._held += text
        found: list[str | Call] = []
        while (part := self._next()) is not None:
            if isinstance(part, str):
                part = self._shown(part)
            if part:
                found.append(part)
        return found

    def finish(self) -> list[str | Call]:
        """What was held back, at the end of the text."""
        rest = self._shown(self._mark + self._held)
        self._held = self._mark = ""
        return [rest] if rest else []

    def _next(self) -> str | Call | None:
        """The next part; an empty text where only the state has changed, None where more has to come."""
        return self._next_in_call() if self._in_call else self._next_text()

    def _next_text(self) -> str | None:
        places = [(self._held.find(mark), -len(mark)) for mark in self._marks]
        begun = [(place, length) for place, length in places if place >= 0]
        if begun:
            place, length = min(begun)
            text, self._mark = self._held[:place], self._held[place : place - length]
            self._held = self._held[place - length :]
            self._in_call = True
            return text
        sure = len(self._held) - max((_begun(self._held, mark) for mark in self._marks), default=0)
        text, self._held = self._held[:sure], self._held[sure:]
        return text or None

    def _next_in_call(self) -> str | Call | None:
        heads = {
            name: head
            for name, head in self._heads.items()
            if head.startswith(self._held) or self._held.startswith(head)
        }
        for name, head in heads.items():
            call = self._call(name, head)
            if call is not None:
                self._in_call = False
                self._after_call = True
                self._mark = ""
                return call
        if heads:
            return None
        self._in_call = False
        text, self._mark = self._mark, ""
        return text

    def _call(self, name: str, head: str) -> Call | None:
        """The call that is complete, which is taken off the text."""
        if not self._held.startswith(head):
            return None
        try:
            _, end = self._decoder.raw_decode(self._held, len(head))
        except (ValueError, RecursionError):
            return None
        if not self._held.startswith(self._style.end, end):
            return None
        call = Call(name, self._held[len(head) : end])
        self._held = self._held[end + len(self._style.end) :]
        return call

    def _shown(self, text: str) -> str:
        """The text without the white space that follows a call."""
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text


def _begun(text: str, mark: str) -> int:
    """How many characters of `mark` the text ends in."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)
