"""Week 12. OpenAI's protocol: the bodies that `/v1/completions` and `/v1/chat/completions` take.

A field that is null, empty, or says what is so anyway is as if it were absent. What would change the answer
and is not supported is refused. Fields that are not known are not read: the answer's headers name them.

Source: OpenAI's API reference (completions, chat completions).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from shared.extras import needs
from shared.sampling.penalties import Penalties
from shared.serving.generation import check_long_seed

with needs("serve"):
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationInfo,
        field_validator,
    )

MAX_STOPS = 16
"""How many stop texts a request may name."""
MAX_STOP_LENGTH = 1000
"""Characters of a stop text."""
MOST_TOOLS = 128
"""How many tools a request may name, as in OpenAI's API."""
TOKEN_ID = re.compile(r"[0-9]{1,9}")
MOST_SLIPS = 10
"""How many unknown fields are compared with the known ones."""


def says_nothing(value: Any) -> bool:
    """Whether a field of this value is as if it were absent: null, false, or empty."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


class Only:
    """Checks a field that this server cannot honour: it may say nothing, or what changes nothing.

    harmless: the values that change nothing. Raises ValueError for all others.
    """

    def __init__(self, *harmless: Any):
        self.harmless = harmless

    def __call__(self, value: Any) -> Any:
        if says_nothing(value) or value in self.harmless:
            return value
        allowed = "".join(f"{value!r} or " for value in self.harmless)
        raise ValueError(f"this server cannot do it: {allowed}leave it out")


Unsupported = Annotated[Any, AfterValidator(Only())]


def _is_list_of(kind: type, value: Any) -> bool:
    """Whether it is a list, not empty, of values of exactly this type (a bool is no int)."""
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _check_prompt(value: Any) -> Any:
    several = _is_list_of(list, value) and all(_is_list_of(int, item) for item in value)
    if not (isinstance(value, str) or _is_list_of(str, value) or _is_list_of(int, value) or several):
        raise ValueError("a prompt is a text, a list of token ids, or a list of such, not empty")
    return value


def _check_stop(value: Any) -> Any:
    stops = value if isinstance(value, list) else [value]
    too_long = any(isinstance(stop, str) and len(stop) > MAX_STOP_LENGTH for stop in stops)
    if too_long or len(stops) > MAX_STOPS:
        raise ValueError(f"up to {MAX_STOPS} texts of up to {MAX_STOP_LENGTH} characters each")
    return value


def _check_biases(value: dict[str, float] | None) -> dict[str, float] | None:
    wrong = next((key for key in value or {} if not TOKEN_ID.fullmatch(key)), None)
    if wrong is not None:
        raise ValueError(f"a token's id is wanted before each bias, and {wrong[:40]!r} is none")
    return value


class JsonObject(BaseModel):
    """A JSON object whose known fields have their types already. All others are kept apart."""

    model_config = ConfigDict(extra="allow", strict=True)

    def ignored(self) -> Iterator[str]:
        """Paths of the fields that say something and are not read, such as "messages[0].id"."""
        yield from self._unknown()
        for name in type(self).model_fields:
            for place, item in _objects(name, getattr(self, name)):
                yield from (f"{place}.{path}" for path in item.ignored())

    def slip(self) -> tuple[str, str] | None:
        """An unknown field that is nearly called like a known one, and that one; None where there is none."""
        for name in islice(self._unknown(), MOST_SLIPS):  # comparing takes time
            similar = get_close_matches(name[:40], type(self).model_fields, 1, cutoff=0.85)
            if similar:
                return name, similar[0]
        return None

    def _unknown(self) -> Iterator[str]:
        return (name for name, value in (self.model_extra or {}).items() if not says_nothing(value))


def _objects(name: str, value: Any) -> Iterator[tuple[str, JsonObject]]:
    """The objects that are the value of a field, or items of it, each with its path."""
    if isinstance(value, JsonObject):
        yield name, value
    elif isinstance(value, list) and value and isinstance(value[0], JsonObject):
        yield from ((f"{name}[{number}]", item) for number, item in enumerate(value))


class StreamOptions(JsonObject):
    """include_usage: a last chunk without choices says how many tokens there were.

    include_obfuscation: not done. It would add random characters beside the text.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(JsonObject):
    """The fields that both kinds of request have."""

    source: ClassVar[str]
    """The field that the model reads."""
    length_field: ClassVar[Any]
    """The field that says how many new tokens are asked for."""
    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """Not OpenAI's: draw only from the k likeliest tokens."""
    ignore_eos: bool | None = None
    """Not OpenAI's: write on to max_tokens, whatever the model says (for measurements)."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Answers to each prompt; with a seed, answer i is drawn with seed + i."""
    seed: Annotated[int, AfterValidator(check_long_seed)] | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_check_stop)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_check_biases)] = None
    repetition_penalty: float | None = None
    """Not OpenAI's, as in other servers."""
    # Not OpenAI's; other servers draw by them.
    min_p: Annotated[Any, AfterValidator(Only(0))] = None
    min_tokens: Annotated[Any, AfterValidator(Only(0))] = None
    stop_token_ids: Unsupported = None

    @field_validator("stream_options")
    @classmethod
    def _only_of_streams(cls, value: StreamOptions | None, other: ValidationInfo) -> StreamOptions | None:
        if value is not None and value.include_usage and not other.data.get("stream"):
            raise ValueError("only with stream=true")
        return value

    @property
    def stops(self) -> list[str]:
        """The texts at which to end; empty ones are left out."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def penalties(self) -> Penalties:
        """What is asked for; ValueError for what is out of range."""
        return Penalties(
            repetition=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence=self.presence_penalty or 0.0,
            frequency=self.frequency_penalty or 0.0,
            bias={int(token): value for token, value in (self.logit_bias or {}).items()},
        )

    @property
    def answers(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(Body):
    """POST /v1/completions."""

    source: ClassVar = "prompt"

    prompt: Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(_check_prompt)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    length_field: ClassVar = "max_tokens"
    echo: bool | None = None
    suffix: Unsupported = None
    best_of: int | None = None

    @field_validator("best_of")
    @classmethod
    def _none_to_choose_from(cls, value: int | None, other: ValidationInfo) -> int | None:
        answers = other.data.get("n") or 1
        if value is not None and value != answers:
            raise ValueError(
                f"this server writes as many texts as it answers with: {answers}, or leave it out"
            )
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, always as a list: texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class TextPart(JsonObject):
    """A part of a message."""

    type: Literal["text"]
    text: str


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
"""OpenAI's rule for the names of functions."""


class FunctionTool(JsonObject):
    """A function that a model may ask for."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; none: the function takes nothing."""
    strict: bool | None = None
    """The schema is always kept to."""

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type") != "object":
            raise ValueError('a JSON schema of an object is wanted: {"type": "object", ...}')
        return value


class Tool(JsonObject):
    """A function is the only kind of tool."""

    type: Literal["function"]
    function: FunctionTool


class CalledFunction(JsonObject):
    """What an assistant asked for."""

    name: FunctionName
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _json_of_an_object(cls, value: str) -> str:
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError('the JSON text of an object is wanted, such as {"city": "Rome"}')
        return value


class ToolCall(JsonObject):
    """A call in an assistant's message."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """The call with its arguments as an object, which templates write as JSON themselves."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def _check_tool_choice(value: Any) -> Any:
    names_one = (
        isinstance(value, dict)
        and value.get("type") == "function"
        and isinstance(value.get("function"), dict)
        and isinstance(value["function"].get("name"), str)
    )
    if value not in (None, "none", "auto", "required") and not names_one:
        raise ValueError(
            '"none", "auto", "required" or {"type": "function", "function": {"name": ...}} is wanted'
        )
    return value


class Message(JsonObject):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    """Of an assistant: what it asked for."""
    tool_call_id: str | None = None
    """Of a tool: which call it answers."""
    content: str | list[TextPart] | None = Field(default=None, validate_default=True)
    name: str | None = None
    """Who speaks. The chat template has no place for it: the model is not told."""
    refusal: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None

    @field_validator("content")
    @classmethod
    def _only_answers_may_be_empty(
        cls, value: str | list[TextPart] | None, other: ValidationInfo
    ) -> str | list[TextPart] | None:
        if value is None and other.data.get("role") != "assistant":
            raise ValueError("a message needs a text")
        return value

    def plain(self) -> dict[str, Any]:
        """Role, text and calls, as `shared.models.chat.chat_prompt` takes them."""
        role = "system" if self.role == "developer" else self.role  # its newer name
        said = self.content
        text = said if isinstance(said, str) else "".join(part.text for part in said or [])
        found: dict[str, Any] = {"role": role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found


class JsonSchema(JsonObject):
    """What an answer's JSON has to be."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """The schema is always kept to."""


class ResponseFormat(JsonObject):
    """Whether an answer is any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _only_with_its_type(cls, value: JsonSchema | None, other: ValidationInfo) -> JsonSchema | None:
        if (value is None) == (other.data.get("type") == "json_schema"):
            raise ValueError('a schema is wanted with "type": "json_schema", and only there')
        return value

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema to keep to; None for any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class ChatBody(Body):
    """POST /v1/chat/completions."""

    source: ClassVar = "messages"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[Any, AfterValidator(_check_tool_choice)] = None
    parallel_tool_calls: bool | None = None
    """Whether an answer may hold several calls; it may unless this is false."""
    functions: Unsupported = None
    function_call: Annotated[Any, AfterValidator(Only("none", "auto"))] = None
    modalities: Annotated[Any, AfterValidator(Only(["text"]))] = None
    audio: Unsupported = None
    web_search_options: Unsupported = None
    reasoning_effort: Annotated[Any, AfterValidator(Only("none"))] = None
    verbosity: Annotated[Any, AfterValidator(Only("medium"))] = None

    @property
    def length_field(self) -> str:
        """The field that says how many new tokens are asked for."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, other: ValidationInfo) -> int | None:
        if value and not other.data.get("logprobs"):
            raise ValueError("only with logprobs=true")
        return value


TRIED_TYPES = ("str", "int", "list[str]", "list[int]", "list[list[int]]", "list[TextPart]")
"""What pydantic puts into the place of an error in a field that may be of several types."""


def path_in(body: Any, location: Sequence[int | str]) -> str:
    """A place in a body as it would be written, such as "messages[0].content"; "" for the whole body.

    location: pydantic's, which also names the types that it tried.

    >>> path_in({"messages": [{"content": 1}]}, ["messages", 0, "content", "str"])
    'messages[0].content'
    >>> path_in({"messages": [{}]}, ["messages", 0, "content"])
    'messages[0].content'
    """
    path = ""
    for part in location:
        if isinstance(body, list) and isinstance(part, int) and part < len(body):
            path += f"[{part}]"
            body = body[part]
        elif isinstance(body, Mapping) and part not in TRIED_TYPES:
            path += f".{part}"
            body = body.get(part)
    return path.removeprefix(".")
