"""Week 6. Conversations as a model was trained to read them: by its own chat template, or SmolLM2's.

    ids = chat_prompt(tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])
    answer = generate(model, ids, 200, temperature=0, stop=ends_of(tokenizer))

Source: Allal et al. (SmolLM2, 2025), and the template in its files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.extras import needs
from shared.registry import LanguageModel
from shared.sampling.generate import generate
from shared.tokenizers.base import Tokenizer, ends_of
from shared.tokenizers.merging import MergingTokenizer

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{{{{ '{IM_START}system\\n{SMOLLM_SYSTEM}{IM_END}\\n' }}}}"
    "{% endif %}"
    f"{{{{ '{IM_START}' + message['role'] + '\\n' }}}}"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    f"{{{{ '{IM_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)
"""What `chat_prompt` does, in Jinja; a content may also be a list of parts, as clients of OpenAI send it."""
SMOLLM_TEMPLATES = (
    CHAT_TEMPLATE,
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{{{{ '{IM_START}system\n{SMOLLM_SYSTEM}{IM_END}\n' }}}}{{% endif %}}"
    f"{{{{'{IM_START}' + message['role'] + '\n' + message['content'] + '{IM_END}' + '\n'}}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\n' }}}}{{% endif %}}",
)
"""Ours, and the one in SmolLM2's own files, which says the same."""
MARK = "\ufdd0"
"""A code point that Unicode keeps for no character: inside a special token that somebody wrote, it keeps the
text from being that token.
"""
ROLES = ("system", "user", "assistant")
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about the sea.",
)
"""What the course asks a model, to see what it answers."""
BASE_MODEL = "a base model, which was never trained to converse: it goes on from the text of a question"
"""What is said of a model where `answer_to` asks it without a chat template."""


def is_known_template(template: object) -> bool:
    """Whether a file's chat template is SmolLM2's, which `chat_prompt` writes; nothing in it is run.

    >>> is_known_template("{{ messages[0]['content'] }}")
    False
    """
    if not isinstance(template, str):
        return False
    plain = template.replace(r"\n", "\n").strip()  # in Jinja's texts, a line break may be either
    return any(plain == known.replace(r"\n", "\n") for known in SMOLLM_TEMPLATES)


def is_chat(tokenizer: Tokenizer) -> bool:
    """Whether conversations can be written for its model: by its own template, or with the special tokens of
    SmolLM2's.
    """
    return tokenizer.chat is not None or _writes_chatml(tokenizer)


def _writes_chatml(tokenizer: Tokenizer) -> bool:
    special = tokenizer.special_tokens
    return IM_START in special and IM_END in special


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of a conversation, up to where the assistant's answer begins.

    messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first. tools: descriptions of
    functions, in JSON schema, for a template that can tell a model of them. The template is the model's own;
    else SmolLM2's, which puts a system message of its own first where there is none. A special token's text
    in a message or a value of a tool stays plain text, so that none speaks for another role (but for
    the assistant's own, from which some templates cut what it thought). Nothing is put before a conversation
    but what the template says, also where `begins_with` is set. Raises ValueError for another role, no
    messages, a tokenizer without a template, and what the template refuses.
    """
    if not messages:
        raise ValueError("a conversation needs at least one message")
    if tokenizer.chat is not None:
        text = rendered(tokenizer, messages, tools, begin_answer=True)
        return encode_rendered(tokenizer, text)
    if tools:
        raise ValueError("this model's chat template has no place for tools")
    return _chatml(tokenizer, messages)


def _chatml(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    special = tokenizer.special_tokens
    missing = [token for token in (IM_START, IM_END) if token not in special]
    if missing:
        raise ValueError(f"this tokenizer has no chat template, and no {' and '.join(missing)} for SmolLM2's")
    if messages[0].get("role") != "system":
        messages = [{"role": "system", "content": SMOLLM_SYSTEM}, *messages]
    ids: list[int] = []
    for message in messages:
        role = message.get("role")
        content = message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"a message needs a text as content and a role of {', '.join(ROLES)}, not {role!r} and"
                f" {type(content).__name__}"
            )
        ids += [special[IM_START], *tokenizer.encode(f"{role}\n{content}"), special[IM_END]]
        ids += tokenizer.encode("\n")
    return [*ids, special[IM_START], *tokenizer.encode("assistant\n")]


def answer_to(model: LanguageModel, tokenizer: Tokenizer, question: str, max_new_tokens: int) -> str:
    """What a model answers to a question: the likeliest tokens, as text.

    A base model (see `is_chat`) is given "Question: ..." and "Answer:" to go on from, and its answer ends
    with the line.
    """
    chat = is_chat(tokenizer)
    if chat:
        ids = chat_prompt(tokenizer, [{"role": "user", "content": question}])
    else:
        ids = tokenizer.prompt(f"Question: {question}\nAnswer:")
    answer = generate(model, ids, max_new_tokens, temperature=0, stop=ends_of(tokenizer))
    text = tokenizer.decode(list(answer)).strip()
    return text if chat else text.partition("\n")[0]


# ---- a model's own template


def rendered(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    begin_answer: bool,
) -> str:
    """What the tokenizer's own template makes of a conversation. Special tokens in what people say are marked
    for `encode_rendered`. begin_answer: whether to end where the assistant's answer begins.

    A template is a program of strangers: transformers runs it in Jinja's sandbox. Raises ValueError for what
    the template refuses, and where transformers is not installed.
    """
    assert tokenizer.chat is not None
    try:
        with needs("chat"):
            from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise ValueError(
            f"this model has a chat template of its own, which transformers runs: {error}"
        ) from None
    safe = [
        message if message.get("role") == "assistant" else _marked(tokenizer, message) for message in messages
    ]
    try:
        (text,), _ = render_jinja_template(
            conversations=[safe],
            tools=None if tools is None else [_marked_values(tokenizer, tool) for tool in tools],
            chat_template=tokenizer.chat.template,
            add_generation_prompt=begin_answer,
            **tokenizer.chat.tokens,
        )
    except Exception as error:  # whatever a program of strangers comes to
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from None
    return text


def _marked(tokenizer: Tokenizer, message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a mark inside every special token that its text spells."""
    said = message.get("content")
    return {**message, "content": _marked_values(tokenizer, said)} if isinstance(said, str) else dict(message)


def _marked_values(tokenizer: Tokenizer, value: Any) -> Any:
    """The same in every text of a value of JSON."""
    if isinstance(value, str):
        for token in tokenizer.special_tokens:
            value = value.replace(token, token[0] + MARK + token[1:])
        return value
    if isinstance(value, Mapping):
        return {name: _marked_values(tokenizer, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_marked_values(tokenizer, item) for item in value]
    return value


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of what `rendered` gave: special tokens are those of the template; what people wrote is text."""
    if isinstance(tokenizer, MergingTokenizer):
        return tokenizer.encode(text, allowed_special="all", mark=MARK)
    return tokenizer.encode(text.replace(MARK, ""))
