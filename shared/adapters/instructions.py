"""Week 9. Instruction data: conversations from JSONL, written out by a template, packed into rows, the loss
on the answers only.

    template = template_for(model.tokenizer)
    task = Instructions(read_conversations("train.jsonl"), read_conversations("held_out.jsonl"), template, block_size=256)
    Trainer(model, task, config).fit()
    answer(model, template, "How do I keep bread fresh?")

Sources: Ouyang et al., "Training language models to follow instructions" (InstructGPT, 2022) for learning
answers only; Krell et al., "Efficient Sequence Packing without Cross-contamination" (2021).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared.evaluation import cross_entropy, perplexity
from shared.models.attention import causal_mask
from shared.models.chat import IM_END, ROLES, chat_prompt, is_chat
from shared.sampling.generate import generate
from shared.tokenizers import Tokenizer
from shared.training.config import TrainConfig

IGNORED = -100
"""The target of a token that is not learned: PyTorch's cross-entropy leaves it out."""
OPEN_ROWS = 64
"""How many of the last rows are still open while texts are packed: a text goes into the first of them with
room.
"""

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""
Conversation = list[Message]
"""Messages, oldest first; the last one is the assistant's."""


# ---- files


def conversation(entry: Any) -> Conversation:
    """A conversation from one JSON object: {"prompt", "response"}, Alpaca's {"instruction", "input",
    "output"}, or {"messages": [...]}.

    Raises ValueError for anything else, an empty text, and a conversation that does not end with the
    assistant.

    >>> conversation({"instruction": "Add them.", "input": "2 and 3", "output": "5"})[0]
    {'role': 'user', 'content': 'Add them.\\n\\n2 and 3'}
    """
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys >= {"messages"}:
        messages = entry["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise ValueError('"messages" must be a list of {"role": ..., "content": ...}')
        found = [{"role": m.get("role"), "content": m.get("content")} for m in messages]
    elif keys >= {"prompt", "response"}:
        found = [
            {"role": "user", "content": entry["prompt"]},
            {"role": "assistant", "content": entry["response"]},
        ]
    elif keys >= {"instruction", "output"}:
        parts = [entry["instruction"], entry.get("input") or ""]
        if not all(isinstance(p, str) for p in parts):
            raise ValueError('"instruction" and "input" must be texts')
        asked = "\n\n".join(p.strip() for p in parts if p.strip())
        found = [{"role": "user", "content": asked}, {"role": "assistant", "content": entry["output"]}]
    else:
        known = '{"prompt", "response"}, {"instruction", "input", "output"} or {"messages"}'
        raise ValueError(
            f"expected an object with {known}, found"
            f" {', '.join(map(repr, sorted(keys))) or type(entry).__name__}"
        )
    for message in found:
        if message["role"] not in ROLES:
            raise ValueError(f"a role must be one of {', '.join(ROLES)}, not {message['role']!r}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(
                f"the {message['role']}'s text is"
                f" {'empty' if isinstance(message['content'], str) else 'no text'}"
            )
    if not found or found[-1]["role"] != "assistant":
        raise ValueError("a conversation must end with an answer of the assistant")
    return [{"role": m["role"], "content": m["content"].strip()} for m in found]


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a JSONL file: an object a line, each in a form that `conversation` knows; empty
    lines are passed over.

    Raises ValueError with the line's number for one that is broken, and for a file without any.
    """
    found = []
    try:
        lines = (
            Path(path).read_text(encoding="utf-8-sig").split("\n")
        )  # not splitlines: JSON may have U+2028 inside a text
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}): give a JSONL file, an object a line"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): JSONL is") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(conversation(json.loads(line)))
            except ValueError as error:  # JSONDecodeError is one
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} has no conversation in it")
    return found


# ---- templates


class Template(Protocol):
    """How a conversation becomes tokens."""

    tokenizer: Tokenizer
    stop: list[list[int]]
    """What ends an answer."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the assistant's next answer begins."""

    def answer(self, text: str) -> list[int]:
        """An answer with its end."""


class ChatTemplate:
    """SmolLM2's (ChatML), for tokenizers with its special tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, end = tokenizer, tokenizer.special_tokens[IM_END]
        self.stop = [[end]]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return chat_prompt(self.tokenizer, messages)

    def answer(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) + self.stop[0]


class PlayTemplate:
    """For models that know plays: a speaker's name, a line break, what is said, an empty line. Needs no
    special tokens.

    An empty line inside a message would end it, and is left out.
    """

    SPEAKERS = {"system": "SCENE", "user": "QUESTION", "assistant": "ANSWER"}

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # Two tokens, as running text has them before a name: "\n\n" by itself may be one, which a model has
        # hardly seen there.
        self.stop = [tokenizer.encode("\n") * 2]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        said = [
            token
            for m in messages
            for token in self.tokenizer.encode(f"{self.SPEAKERS[m['role']]}:\n") + self.answer(m["content"])
        ]
        return said + self.tokenizer.encode(f"{self.SPEAKERS['assistant']}:\n")

    def answer(self, text: str) -> list[int]:
        return (
            self.tokenizer.encode("\n".join(line for line in text.splitlines() if line.strip()))
            + self.stop[0]
        )


def template_for(tokenizer: Tokenizer) -> Template:
    """The chat template where the tokenizer has its tokens, and the play's where it has not."""
    return ChatTemplate(tokenizer) if is_chat(tokenizer) else PlayTemplate(tokenizer)


class EncodedTalk(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    told: list[bool]
    """Which of them are the assistant's: answers with their ends."""


def encode(template: Template, messages: Conversation) -> EncodedTalk:
    """The whole conversation. Each answer stands after the very tokens that `template.prompt` gives when it
    is to be written.
    """
    ids: list[int] = []
    told: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, own = template.prompt(messages[:i]), template.answer(message["content"])
            assert before[: len(ids)] == ids, "the template writes an answer otherwise once it is past"
            told += [False] * (len(before) - len(told)) + [True] * len(own)
            ids = before + own
    return EncodedTalk(ids, told)


def answer(
    model: nn.Module,
    template: Template,
    question: str | Sequence[Message],
    max_new_tokens: int = 100,
    **sampling: Any,
) -> str:
    """What `model` answers; `sampling` as in `shared.sampling.generate`, the likeliest tokens if nothing is
    said.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    sampling = {"temperature": 0, "stop": template.stop, **sampling}
    return template.tokenizer.decode(
        list(generate(model, template.prompt(messages), max_new_tokens, **sampling))
    ).strip()


# ---- rows


class Packed:
    """Keeps the texts of a row apart. Given to a GPT in the place of a cache: each text begins at position 0
    and sees only itself.

    texts: int64 [batch, time], the number of the text that a token belongs to; texts lie one after the other.

    >>> packed = Packed(torch.tensor([[1, 1, 2, 2]]))
    >>> packed.positions(4).tolist(), packed.mask(4, None).int().tolist()
    ([[0, 1, 0, 1]], [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]])
    """

    length = 0

    def __init__(self, texts: Tensor):
        self.texts = texts

    def positions(self, time: int) -> Tensor:
        """Int64 [batch, time]."""
        places = torch.arange(time, device=self.texts.device).expand_as(self.texts)
        first = torch.ones_like(self.texts, dtype=torch.bool)
        first[:, 1:] = self.texts[:, 1:] != self.texts[:, :-1]
        return places - (places * first).cummax(dim=1).values

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is kept."""
        return k, v

    def mask(self, time: int, window: int | None) -> Tensor:
        """Bool [batch, 1, time, time]."""
        same = self.texts.unsqueeze(2) == self.texts.unsqueeze(1)
        return (same & causal_mask(time, window=window, device=self.texts.device)).unsqueeze(1)

    def advance(self, time: int) -> None:
        """Nothing is kept."""


class Rows(NamedTuple):
    """int64 [rows, time] each: what is read, what is to come next (`IGNORED` where that is not learned), and
    the text each token is of.
    """

    ids: Tensor
    targets: Tensor
    texts: Tensor


def pack(lengths: Sequence[int], order: Sequence[int], block_size: int) -> list[list[int]]:
    """Rows of at most `block_size` tokens, as numbers of texts: each goes into the first row with room for
    it, of those still open.

    >>> pack([30, 60, 40, 10], order=[0, 1, 2, 3], block_size=100)
    [[0, 1, 3], [2]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for i in order:
        open_from = max(0, len(rows) - OPEN_ROWS)
        row = next((r for r in range(open_from, len(rows)) if free[r] >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(block_size)
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows


def lay_out(rows: Sequence[Sequence[EncodedTalk]]) -> Rows:
    """Texts side by side in each row; shorter rows end in padding, which is text 0 and not learned."""
    width = max(sum(len(e.ids) - 1 for e in row) for row in rows)
    ids, targets, texts = (
        np.zeros((len(rows), width), np.int64),
        np.full((len(rows), width), IGNORED),
        np.zeros((len(rows), width), np.int64),
    )
    for r, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row, 1):
            end = at + len(example.ids) - 1  # the last token has nothing to predict
            ids[r, at:end], texts[r, at:end] = example.ids[:-1], number
            targets[r, at:end] = np.where(example.told[1:], example.ids[1:], IGNORED)
            at = end
    return Rows(*map(torch.from_numpy, (ids, targets, texts)))


class Instructions:
    """A task for the Trainer: conversations, of which the assistant's answers are learned.

    Examples that do not fit into `block_size` are left out, and `say` is told how many. pack: several texts
    share a row, and do not see each other; without it each has a row of its own, as a soft prompt needs (it
    stands once in front of a row). Raises ValueError where no example is left.
    """

    def __init__(
        self,
        train: Sequence[Conversation],
        val: Sequence[Conversation],
        template: Template,
        block_size: int,
        name: str = "instructions",
        pack: bool = True,
        say: Callable[[str], None] = print,
    ):
        self.template, self.tokenizer, self.name, self.block_size, self.pack = (
            template,
            template.tokenizer,
            name,
            block_size,
            pack,
        )
        self.train, self.val = self._encode(train, "training", say), self._encode(val, "held-out", say)

    def _encode(
        self, conversations: Sequence[Conversation], which: str, say: Callable[[str], None]
    ) -> list[EncodedTalk]:
        examples = []
        for number, messages in enumerate(conversations, 1):
            try:
                examples.append(encode(self.template, messages))
            except ValueError as error:  # a character that the tokenizer does not know
                raise ValueError(f"{which} example {number}: {error}") from None
        fitting = [e for e in examples if len(e.ids) - 1 <= self.block_size]
        if len(fitting) < len(examples):
            longest = max(len(e.ids) - 1 for e in examples)
            left = (
                f"{len(examples) - len(fitting)} of {len(examples)} {which} examples are longer than the"
                f" context of {self.block_size} tokens"
            )
            say(f"{left} (the longest has {longest}) and are left out")
        if not fitting:
            raise ValueError(
                f"no {which} example fits into a context of {self.block_size} tokens: shorten them, or use a"
                " model with a longer one"
            )
        return fitting

    def rows(self, examples: Sequence[EncodedTalk], order: Sequence[int]) -> list[list[EncodedTalk]]:
        """The examples in this order, by row."""
        lengths = [len(e.ids) - 1 for e in examples]
        found = pack(lengths, order, self.block_size) if self.pack else [[i] for i in order]
        return [[examples[i] for i in row] for row in found]

    def _endless(self, seed: int) -> Iterator[list[EncodedTalk]]:
        epoch = 0
        while True:
            yield from self.rows(
                self.train, np.random.default_rng((seed, epoch)).permutation(len(self.train)).tolist()
            )
            epoch += 1

    def batches(
        self, config: TrainConfig, start_step: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Rows]:
        """Rows in an order that each epoch draws anew from (seed, epoch); a batch may begin in one and end in
        the next.
        """
        if config.batch_size % world_size:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be shared by {world_size} processes: choose a"
                " multiple"
            )
        stream = self._endless(config.seed)
        for _ in range(start_step * config.batch_size):
            next(stream)
        while True:
            batch = [next(stream) for _ in range(config.batch_size)]
            yield lay_out(batch[rank::world_size])

    def loss(self, call: Callable[..., Tensor], ids: Tensor, targets: Tensor, texts: Tensor) -> Tensor:
        """Nats for each token of the answers, the mean over those of the batch."""
        return cross_entropy(call(ids, Packed(texts)) if self.pack else call(ids), targets)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, config: TrainConfig, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """On the held-out answers: `val_loss` in nats per token, its perplexity, and how often the likeliest
        token is right.
        """
        was_training = model.training
        model.eval()
        rows, loss, right, count = self.rows(self.val, range(len(self.val))), 0.0, 0, 0
        for i in range(0, len(rows), config.batch_size):
            ids, targets, texts = (part.to(device) for part in lay_out(rows[i : i + config.batch_size]))
            logits = model(ids, Packed(texts)) if self.pack else model(ids)
            told = targets != IGNORED
            loss += cross_entropy(logits, targets).item() * told.sum().item()
            right += (logits.argmax(-1) == targets)[told].sum().item()
            count += told.sum().item()
        model.train(was_training)
        return {
            "val_loss": loss / count,
            "val_perplexity": perplexity(loss / count),
            "val_accuracy": right / count,
        }


def split_off(
    conversations: Sequence[Conversation], share: float = 0.1, seed: int = 0
) -> tuple[list[Conversation], list[Conversation]]:
    """A training and a held-out part, drawn by chance; of two conversations or more, each part has at least
    one.

    Raises ValueError for fewer.
    """
    if len(conversations) < 2:
        raise ValueError(
            f"{len(conversations)} conversation cannot be split into a training and a held-out part: give at"
            " least 2"
        )
    order = np.random.default_rng(seed).permutation(len(conversations))
    count = min(len(conversations) - 1, max(1, math.ceil(share * len(conversations))))
    return [conversations[i] for i in sorted(order[count:])], [
        conversations[i] for i in sorted(order[:count])
    ]
