"""What the tests of tools share: models with public chat templates, one of which writes what a test wants."""

import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers.base import ends_of
from tests.helpers import shake
from tests.models.templates import TOOL, tokenizers_with
from tests.serving.helpers import client

STYLES = ("llama3_1", "llama3_2", "qwen2_5", "qwen3")
"""The templates whose calls are read."""
OTHERS = ("glm4moe", "gptoss", "lfm2")
"""The templates that take tools, whose calls are not."""
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "How it will be.", "parameters": PARAMETERS},
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW, TOOL]
ROME = {"city": "Róme <3", "days": 2}
ASKED = [{"role": "user", "content": "And in Rome?"}]


@cache
def both(name: str):
    """Our tokenizer with a public template, and that of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        return tokenizers_with(name, Path(folder))


def config_for(tokenizer) -> GPTConfig:
    return GPTConfig.preset(
        "mini", vocab_size=tokenizer.vocab_size, block_size=4096, n_layer=1, n_head=2, n_kv_head=1, n_embd=16
    )


class Scripted(GPT):
    """Writes the ids of `answers`, one after another and the last one again and again, whatever it reads."""

    answers: list[list[int]]
    after = 0.0
    """How different the logits are beyond an answer's end; 0: all alike."""
    written = 0
    """How many tokens of the answer it has read again."""

    def forward(self, idx, cache=None):
        reads_prompt = idx.size(0) == 1  # the engine writes in batches of several rows
        if reads_prompt and self.written and len(self.answers) > 1:
            del self.answers[0]
        self.written = 0 if reads_prompt else self.written + 1
        logits = self.after * torch.randn(*idx.shape, self.config.vocab_size)
        if self.written < len(self.answers[0]):
            logits[..., self.answers[0][self.written]] = 1e4
        return logits


@contextmanager
def scripted(name):
    """Talks to a server with a public template, or a tokenizer; `write` says what its next answer is."""
    tokenizer = both(name)[0] if isinstance(name, str) else name
    model = Scripted(config_for(tokenizer))
    with client(model, tokenizer) as talk:

        def write(ids, *, ends=True, after=0.0):
            model.answers, model.after = [[*ids, *ends_of(tokenizer)[: int(ends)]]], after

        talk.write, talk.tokenizer = write, tokenizer
        yield talk


@contextmanager
def random_client(name):
    """Talks to a server with a public template, or a tokenizer, and a small random model."""
    tokenizer = both(name)[0] if isinstance(name, str) else name
    with client(shake(GPT(config_for(tokenizer))), tokenizer) as talk:
        yield talk


def calling(*arguments: dict, said: str = "", name: str = "weather", text=lambda value: value) -> dict:
    """An assistant's message with calls. text: what becomes of the arguments."""
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": text(value)}}
        for i, value in enumerate(arguments)
    ]
    return {"role": "assistant", "content": said, "tool_calls": calls}


def theirs_writes(name: str, messages: list[dict], tools=TOOLS, begin_answer: bool = False) -> list[int]:
    """The ids that transformers' template makes of a conversation."""
    _, tokenizer = both(name)
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=begin_answer, return_dict=False
    )


def answer_ids(name: str, answer: dict) -> list[int]:
    """What a model writes, in transformers' template, to give this answer, without its end."""
    begun = theirs_writes(name, ASKED, begin_answer=True)
    ids = theirs_writes(name, [*ASKED, answer])
    assert ids[: len(begun)] == begun
    end = next(i for i in ids[len(begun) :] if i in ends_of(both(name)[0]))
    return ids[len(begun) : ids.index(end, len(begun))]
