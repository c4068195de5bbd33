"""Week 12. Tools in chat completions: what a request asks for, and the answer with its calls.

What a model calls is certain to be one of the request's tools with arguments of its schema, whether `strict`
is asked for or not: a grammar rules out all other tokens (`shared.serving.grammar`). With `tool_choice`
"required", or a named function, it holds from the first token on. With "auto" the model writes freely, and
the grammar begins where a call has begun: after the marker of a call, or, for models whose call is the whole
answer (Llama), after the name of a tool at its very beginning. What begins otherwise is text. So is a call
that `max_tokens` cuts off: its `finish_reason` is "length", and nobody calls a function by mistake.

The model is shown names, descriptions and parameters. With `tool_choice` "none" it is shown none of them.

Source: OpenAI's API reference (chat completions, function calling).
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from shared.serving.bodies import ChatBody, FunctionTool, Message
from shared.serving.calls import Call, CallReader, CallStyle, call_style
from shared.serving.gate import ApiError
from shared.serving.grammar import Form, GrammarForm, Grammars
from shared.serving.protocol import ChatFormat
from shared.serving.text import Piece
from shared.tokenizers import Tokenizer

NOTHING_TO_PASS = {"type": "object", "properties": {}, "additionalProperties": False}
"""The parameters of a function that names none."""


@dataclass(frozen=True)
class ToolRequest:
    """The tools of one request."""

    style: CallStyle
    described: Sequence[dict[str, Any]]
    """The tools as the template is told of them."""
    names: Sequence[str]
    """Of the functions that may be called."""
    form: Form

    @property
    def length(self) -> int:
        """Characters that the template writes of the tools, at least."""
        return len(json.dumps(self.described, ensure_ascii=False))


class ToolUse:
    """How one model uses tools. vocab: the bytes of each id. grammars: made when they are first needed."""

    def __init__(self, tokenizer: Tokenizer, vocab: Mapping[int, bytes], grammars: Callable[[], Grammars]):
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._grammars = grammars

    def read(self, body: ChatBody) -> ToolRequest | None:
        """What a request asks for; None where no tool may be called.

        Raises ApiError for tools and messages that do not go together, and for a model that cannot do it.
        """
        functions = _wanted_functions(body)
        in_messages = any(message.tool_calls or message.role == "tool" for message in body.messages)
        if not functions and not in_messages:
            return None
        try:
            style = self._style
        except ValueError as error:
            advice = "leave tools and their calls out, or ask a model that was trained with them"
            raise ApiError(
                400,
                f"the model {body.model!r} cannot use tools: {error}; {advice}",
                "tools" if functions else "messages",
            ) from None
        if not functions:
            return None
        if body.response_format is not None and body.response_format.wanted is not None:
            raise ApiError(400, "not together with tools: an answer follows one grammar", "response_format")
        names = [function.name for function in functions]
        form = self._form(body, style, functions)
        return ToolRequest(style, [_described(function) for function in functions], names, form)

    @cached_property
    def _style(self) -> CallStyle:
        return call_style(self._tokenizer)

    def _form(self, body: ChatBody, style: CallStyle, functions: Sequence[FunctionTool]) -> Form:
        grammars = self._grammars()
        for number, function in enumerate(functions):
            try:
                grammars.json(_parameters(function))
            except ValueError as error:
                raise ApiError(400, str(error), f"tools[{number}].function.parameters") from None
        several = style.join is not None and body.parallel_tool_calls is not False
        if body.tool_choice in (None, "auto"):
            return self._free_form(style, functions, several)
        if isinstance(body.tool_choice, dict):
            wanted = body.tool_choice["function"]["name"]
            functions = [function for function in functions if function.name == wanted]
            several = False
        grammar = _call_grammar(grammars, style, functions)
        call = f"{grammars.literal(style.marker)} rest"
        more = f" ({grammars.literal(style.join or '')} {call})*" if several else ""
        return grammars.lark(f"start: {grammars.literal(style.lead)} {call}{more}\n{grammar}")

    def _free_form(self, style: CallStyle, functions: Sequence[FunctionTool], several: bool) -> "FreeForm":
        grammars = self._grammars()
        if style.marker:
            begun = {style.marker: grammars.lark(f"start: rest\n{_call_grammar(grammars, style, functions)}")}
        else:
            begun = {
                style.head(function.name): grammars.lark(
                    f"start: {grammars.json_rule(_parameters(function))} {grammars.literal(style.end)}"
                )
                for function in functions
            }
        starts = {text.encode(): form for text, form in begun.items()}
        return FreeForm(
            starts, self._vocab, self._tokenizer.encode_more, anywhere=bool(style.marker), several=several
        )


def _call_grammar(grammars: Grammars, style: CallStyle, functions: Sequence[FunctionTool]) -> str:
    """Rules in Lark: `rest` is what follows the marker in a call of one of the functions."""
    lines = ["rest: " + " | ".join(f"call_{number}" for number in range(len(functions)))]
    for number, function in enumerate(functions):
        head, end = grammars.literal(style.head(function.name)), grammars.literal(style.end)
        lines.append(f"call_{number}: {head} arguments_{number} {end}")
        lines.append(f"arguments_{number}: {grammars.json_rule(_parameters(function))}")
    return "\n".join(lines)


def _parameters(function: FunctionTool) -> dict[str, Any]:
    return function.parameters or NOTHING_TO_PASS


def _described(function: FunctionTool) -> dict[str, Any]:
    fields = {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
    }
    return {
        "type": "function",
        "function": {name: value for name, value in fields.items() if value is not None},
    }


class FreeForm(Form):
    """Any text, in which a call, once it has begun, has to be one.

    starts: what a call begins with, and what has to follow each. anywhere: whether it may begin after other
    text. several: whether text, and other calls, may follow a call; else the text ends there.
    """

    def __init__(
        self,
        starts: Mapping[bytes, GrammarForm],
        vocab: Mapping[int, bytes],
        encode: Callable[[str], list[int]],
        *,
        anywhere: bool,
        several: bool,
    ):
        self._starts = starts
        self._longest = max(map(len, starts))
        self._vocab = vocab
        self._encode = encode
        self._anywhere = anywhere
        self._several = several
        self._recent = b""
        """The end of the text so far, or its beginning where a call begins nowhere else."""
        self._call: GrammarForm | None = None
        self._ended = False

    def copy(self) -> "FreeForm":
        """A text of its own, at its beginning."""
        return FreeForm(
            self._starts, self._vocab, self._encode, anywhere=self._anywhere, several=self._several
        )

    @property
    def complete(self) -> bool:
        """Whether nothing may follow: after a call that is the only one."""
        return self._ended

    def mask(self, logits: Tensor) -> Tensor:
        """Inside a call, -inf for all that may not come next; else the logits as they are."""
        return logits if self._call is None else self._call.mask(logits)

    def push(self, token: int) -> None:
        """Goes on by a token. Raises ValueError for one that may not come."""
        if self._call is None:
            self._recent += self._vocab[token]
            self._look_for_a_call()
        else:
            self._call.push(token)
        if self._call is not None and self._call.complete:
            self._call = None
            self._ended = not self._several

    def _look_for_a_call(self) -> None:
        for start, form in self._starts.items():
            place = self._recent.find(start)
            if place == 0 or (place > 0 and self._anywhere):
                rest = self._recent[place + len(start) :]
                self._recent = b""
                self._call = self._begun(form, rest)
                return
        kept = slice(1 - self._longest, None) if self._anywhere else slice(self._longest)
        self._recent = self._recent[kept]

    def _begun(self, form: GrammarForm, rest: bytes) -> GrammarForm | None:
        """The form after the rest of the token in which a call began; None where that rest is of no call."""
        call = form.copy()
        try:
            for token in self._encode(rest.decode()):
                call.push(token)
        except ValueError:
            return None
        return call


class ToolFormat(ChatFormat):
    """The objects of /v1/chat/completions with calls in them."""

    def __init__(self, vocab: Mapping[int, bytes], logprobs: bool, request: ToolRequest):
        super().__init__(vocab, logprobs)
        self._request = request
        self._readers: dict[int, CallReader] = {}
        self._calls: dict[int, int] = {}
        """How many calls each text of a stream has had."""

    def choice(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any]:
        """A complete text."""
        reader = self._new_reader()
        content, calls = _sorted_out([*reader.push(piece.text), *reader.finish()])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [_call_object(call) for call in calls]
        details = self._details(piece, _reason(reason, bool(calls)))
        return {"index": index, "message": message, **details}

    def delta(self, index: int, piece: Piece, reason: str | None) -> dict[str, Any] | None:
        """A part of a text. A call comes in one piece, when it is complete."""
        reader = self._readers.setdefault(index, self._new_reader())
        parts = reader.push(piece.text)
        if reason:
            parts += reader.finish()
        content, calls = _sorted_out(parts)
        before = self._calls.get(index, 0)
        self._calls[index] = before + len(calls)
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = [
                {"index": number, **_call_object(call)} for number, call in enumerate(calls, before)
            ]
        if not (delta or reason or (self.logprobs and piece.tokens)):
            return None
        details = self._details(piece, _reason(reason, bool(self._calls[index])))
        return {"index": index, "delta": delta, **details}

    def _new_reader(self) -> CallReader:
        return CallReader(self._request.style, self._request.names)


def _sorted_out(parts: Sequence[str | Call]) -> tuple[str, list[Call]]:
    content = "".join(part for part in parts if isinstance(part, str))
    return content, [part for part in parts if isinstance(part, Call)]


def _call_object(call: Call) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call._asdict()}


def _reason(reason: str | None, calls: bool) -> str | None:
    return "tool_calls" if calls and reason == "stop" else reason


# ---- what has to go together in a request


def _wanted_functions(body: ChatBody) -> list[FunctionTool]:
    """The functions that may be called. Raises ApiError for tools and a choice that do not go together."""
    functions = [tool.function for tool in body.tools or []]
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(400, f"two functions are called {twice!r}", "tools")
    choice = body.tool_choice
    if not functions and choice not in (None, "none", "auto"):
        raise ApiError(400, "only with tools, and the request has none", "tool_choice")
    if isinstance(choice, dict) and choice["function"]["name"] not in names:
        wanted = choice["function"]["name"]
        raise ApiError(400, f"no tool is called {wanted!r}; there are: {', '.join(names)}", "tool_choice")
    return [] if choice == "none" else functions


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as `shared.models.chat.chat_prompt` takes them.

    The results of calls are put into the order of the calls: most templates do not name what a result is of.
    Raises ApiError for a result without its call, and for a call without its result.
    """
    plain: list[dict[str, Any]] = []
    waiting: dict[str, int] = {}
    results: list[tuple[int, dict[str, Any]]] = []
    for number, message in enumerate(messages):
        path = f"messages[{number}]"
        if message.role == "tool":
            place = waiting.pop(message.tool_call_id or "", None)
            if place is None:
                raise ApiError(
                    400,
                    f"no call before it waits for the id {message.tool_call_id!r}: a tool's message follows"
                    " the assistant's with its call, and has that call's id",
                    f"{path}.tool_call_id",
                )
            results.append((place, message.plain()))
            continue
        _require_no_call(waiting, path)
        plain += [result for _, result in sorted(results, key=_place)]
        results = []
        waiting = _calls_of(message, path)
        plain.append(message.plain())
    _require_no_call(waiting, f"messages[{len(messages) - 1}]")
    return plain + [result for _, result in sorted(results, key=_place)]


def _place(result: tuple[int, dict[str, Any]]) -> int:
    return result[0]


def _require_no_call(waiting: Mapping[str, int], path: str) -> None:
    if waiting:
        ids = ", ".join(map(repr, waiting))
        raise ApiError(400, f"calls without a result: {ids}; each needs a message of role 'tool'", path)


def _calls_of(message: Message, path: str) -> dict[str, int]:
    """The places of a message's calls by their ids."""
    if message.tool_call_id is not None:
        raise ApiError(400, "only a message of role 'tool' has it", f"{path}.tool_call_id")
    calls = message.tool_calls or []
    if calls and message.role != "assistant":
        raise ApiError(400, "only a message of role 'assistant' has them", f"{path}.tool_calls")
    places = {call.id: place for place, call in enumerate(calls)}
    if len(places) < len(calls):
        raise ApiError(400, "two calls have the same id", f"{path}.tool_calls")
    return places
