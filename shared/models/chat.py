"""Week 6. Conversations as a model was trained to read them: SmolLM2's chat template.

    ids = chat_prompt(tokenizer, [{"role": "user", "content": "Why is the sky blue?"}])
    answer = generate(model, ids, 200, temperature=0, stop=[tokenizer.special_tokens[IM_END]])

Source: Allal et al. (SmolLM2, 2025), and the template in its files.
"""

from collections.abc import Mapping, Sequence

from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bpe import BPETokenizer

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
ROLES = ("system", "user", "assistant")
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about the sea.",
)
"""What the course asks a chat model, to see what it answers."""


def _special_tokens(tokenizer: Tokenizer) -> Mapping[str, int]:
    return tokenizer.special_tokens if isinstance(tokenizer, BPETokenizer) else {}


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
    """Whether the tokenizer has the special tokens of SmolLM2's chat template."""
    special = _special_tokens(tokenizer)
    return IM_START in special and IM_END in special


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation in SmolLM2's chat template, up to where the assistant's answer begins.

    messages: {"role": "system" | "user" | "assistant", "content": text}, oldest first; without a system
    message at the beginning SmolLM2's own is put there. A special token's text inside a message stays plain
    text, so that no message can end itself and speak for another role. As in transformers, nothing is put
    before a conversation but what the template says, also where `begins_with` is set. Raises ValueError for
    another role, no messages, and a tokenizer without the template's tokens.
    """
    special = _special_tokens(tokenizer)
    missing = [token for token in (IM_START, IM_END) if token not in special]
    if missing:
        raise ValueError(f"this tokenizer has no {' and '.join(missing)}: the chat template is SmolLM2's")
    if not messages:
        raise ValueError("a conversation needs at least one message")
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
