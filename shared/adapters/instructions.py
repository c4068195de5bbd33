"""Week 9. Instruction tuning: conversations written out by a template, the loss on answers only.

    template = template_for(model.tokenizer)
    train, held_out = split_off(read_conversations("talks.jsonl"))
    task = Instructions(train, held_out, template, block_size=256)
    Trainer(model, task, config).fit()
    answer(model, template, "How do I keep bread fresh?")

Source: Ouyang et al., "Training language models to follow instructions with human feedback" (InstructGPT,
2022).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapters.conversations import Conversation, Message
from shared.adapters.packing import EncodedTalk, Packed, Rows, cut_off, lay_out, pack
from shared.evaluation import IGNORED, cross_entropy, perplexity
from shared.models.chat import IM_END, chat_prompt, encode_rendered, is_chat, rendered
from shared.registry import LanguageModel
from shared.sampling.generate import generate
from shared.tokenizers.base import Tokenizer, ends_of
from shared.tokenizers.merging import MergingTokenizer
from shared.training.config import TrainConfig
from shared.training.tasks import Task

LOGITS_AT_ONCE = 2**25
"""An evaluation makes no more logits than that at a time, unless one row has more: 134 MB, and as much again
for their softmax. With a vocabulary of 4,096 these are 32 rows of 256 tokens; with one of 49,152, two.
"""

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
    """The model's own, or SmolLM2's: see `chat_prompt`. Raises ValueError where no token ends an answer."""

    def __init__(self, tokenizer: MergingTokenizer):
        self.tokenizer: Tokenizer = tokenizer
        self._end = _end_of_answers(tokenizer)
        self.stop = [self._end]
        if tokenizer.chat is not None:
            self.stop += [[end] for end in ends_of(tokenizer)]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """See `chat_prompt`."""
        return chat_prompt(self.tokenizer, messages)

    def answer(self, text: str) -> list[int]:
        """The text, and what ends a message."""
        return self.tokenizer.encode_more(text) + self._end


def _end_of_answers(tokenizer: MergingTokenizer) -> list[int]:
    """What stands behind an answer, up to the first token that ends a text."""
    if tokenizer.chat is None:
        return [tokenizer.special_tokens[IM_END]]
    said = "A short answer."
    talk = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": said}]
    _, _, behind = rendered(tokenizer, talk, begin_answer=False).rpartition(said)
    ids = encode_rendered(tokenizer, behind)
    ends = ends_of(tokenizer)
    at = next((place for place, i in enumerate(ids) if i in ends), None)
    if at is not None:
        return ids[: at + 1]
    if not ends:
        raise ValueError(
            "the model's files name no token at which an answer ends: it would never learn to stop"
        )
    return ends[:1]  # such as GLM's, whose template leaves it to the next speaker


class PlayTemplate:
    """For models that know plays: a speaker's name, a line break, what is said, an empty line.

    Needs no special tokens. An empty line inside a message would end it, and is left out.
    """

    SPEAKERS = {"system": "SCENE", "user": "QUESTION", "assistant": "ANSWER"}

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # Two tokens, as running text has them before a name: "\n\n" by itself may be one, which a model has
        # hardly seen there.
        self.stop = [tokenizer.encode_more("\n") * 2]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What everyone has said, and the name of the assistant."""
        ids = self.tokenizer.prompt("")
        for message in messages:
            ids += self._speaker(message["role"]) + self.answer(message["content"])
        return ids + self._speaker("assistant")

    def _speaker(self, role: str) -> list[int]:
        return self.tokenizer.encode_more(f"{self.SPEAKERS[role]}:\n")

    def answer(self, text: str) -> list[int]:
        """The text without its empty lines, and one after it."""
        lines = [line for line in text.splitlines() if line.strip()]
        return self.tokenizer.encode_more("\n".join(lines)) + self.stop[0]


def template_for(tokenizer: Tokenizer) -> Template:
    """The chat template where the tokenizer has its tokens, and the play's where it has not."""
    if isinstance(tokenizer, MergingTokenizer) and is_chat(tokenizer):
        return ChatTemplate(tokenizer)
    return PlayTemplate(tokenizer)


def encode(template: Template, messages: Conversation) -> EncodedTalk:
    """The whole conversation in tokens, and the mask of those that are learned.

    Each answer stands after exactly the tokens that `template.prompt` gives when it is to be written.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = template.prompt(messages[:i])
            reply = template.answer(message["content"])
            if prompt[: len(ids)] != ids:
                raise ValueError(
                    "the chat template writes an answer of the past otherwise than a new one (some cut out"
                    " what was thought): give conversations with one answer each"
                )
            mask += [False] * (len(prompt) - len(mask))
            mask += [True] * len(reply)
            ids = prompt + reply
    return EncodedTalk(ids, mask)


def answer(
    model: LanguageModel,
    template: Template,
    question: str | Sequence[Message],
    max_new_tokens: int = 100,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> str:
    """What `model` answers to a question, or to a conversation that ends with one: the likeliest tokens, so
    that answers before and after training compare, unless a temperature is given.

    The settings, and the errors, are those of `shared.sampling.generate`.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    ids = generate(
        model,
        template.prompt(messages),
        max_new_tokens,
        temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=template.stop,
        seed=seed,
    )
    return template.tokenizer.decode(list(ids)).strip()


# ---- the task


class Instructions(Task):
    """A task for the Trainer: conversations, of which the assistant's answers are learned.

    Examples that do not fit into `block_size` are left out, or with `truncate` cut at their end, as far as
    something to learn is left; `say` is called with a line that has their number. pack: several texts share a
    row, and do not see each other; without it each has a row of its own, as a soft prompt needs (it stands
    once in front of a row). Raises ValueError where no example is left.
    """

    def __init__(
        self,
        train: Sequence[Conversation],
        val: Sequence[Conversation],
        template: Template,
        block_size: int,
        name: str = "instructions",
        *,
        pack: bool = True,
        truncate: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.template = template
        self.tokenizer = template.tokenizer
        self.name = name
        self.block_size = block_size
        self.pack = pack
        self.truncate = truncate
        self.train = self._encode(train, "training", say)
        self.val = self._encode(val, "held-out", say)

    def _encode(
        self, conversations: Sequence[Conversation], which: str, say: Callable[[str], None]
    ) -> list[EncodedTalk]:
        """The conversations that fit into a row, in tokens."""
        examples = []
        for number, messages in enumerate(conversations, 1):
            try:
                examples.append(encode(self.template, messages))
            except ValueError as error:  # a character that the tokenizer does not know
                raise ValueError(f"{which} example {number}: {error}") from None
        fitting = [example for example in examples if len(example.ids) - 1 <= self.block_size]
        too_long = len(examples) - len(fitting)
        if too_long:
            longest = max(len(example.ids) - 1 for example in examples)
            fate = "are left out"
            if self.truncate:
                cut = [cut_off(example, self.block_size) for example in examples]
                fitting = [example for example in cut if any(example.mask[1:])]
                fate = f"are cut off there; {len(cut) - len(fitting)} had no answer left and are left out"
            say(
                f"{too_long} of {len(examples)} {which} examples are longer than the context of"
                f" {self.block_size} tokens (the longest has {longest}) and {fate}"
            )
        if not fitting:
            raise ValueError(
                f"no {which} example fits into a context of {self.block_size} tokens: shorten them, or use a"
                " model with a longer one"
            )
        return fitting

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the tokens that are learned and held out, and of how they are laid out in rows."""
        return {"training data": self._fingerprint(self.train), "held-out data": self._fingerprint(self.val)}

    def _fingerprint(self, examples: Sequence[EncodedTalk]) -> str:
        content = [self.pack, [[example.ids, example.mask] for example in examples]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def rows(self, examples: Sequence[EncodedTalk], order: Sequence[int]) -> list[list[EncodedTalk]]:
        """The examples in this order, by row."""
        if not self.pack:
            return [[examples[i]] for i in order]
        lengths = [len(example.ids) - 1 for example in examples]
        return [[examples[i] for i in row] for row in pack(lengths, order, self.block_size)]

    def _endless_rows(self, seed: int) -> Iterator[list[EncodedTalk]]:
        """Rows of the training examples, epoch after epoch, each in an order drawn from (seed, epoch)."""
        epoch = 0
        while True:
            order = np.random.default_rng((seed, epoch)).permutation(len(self.train))
            yield from self.rows(self.train, order.tolist())
            epoch += 1

    def batches(
        self, config: TrainConfig, start_step: int, rank: int = 0, world_size: int = 1, *, every: int = 1
    ) -> Iterator[Rows]:
        """Every `every`-th batch from the `start_step`-th on; of each, the rows of this process.

        Each epoch draws its order anew from (seed, epoch); a batch may begin in one epoch and end in the
        next. Raises ValueError where world_size does not divide the batch size.
        """
        if config.batch_size % world_size:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be shared by {world_size} processes: choose a"
                " multiple"
            )
        stream = self._endless_rows(config.seed)
        for _ in range(start_step * config.batch_size):
            next(stream)
        while True:
            batch = [next(stream) for _ in range(config.batch_size)]
            yield lay_out(batch[rank::world_size])
            for _ in range((every - 1) * config.batch_size):
                next(stream)

    def loss(self, call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """Nats for each token of the answers, the mean over those of the batch, which is a `Rows`."""
        ids, targets, texts = batch
        return cross_entropy(self._logits(call, ids, texts), targets)

    def learned_tokens(self, *batch: Tensor) -> int:
        """Those of the answers."""
        _, targets, _ = batch
        return int((targets != IGNORED).sum())

    def _logits(self, call: Callable[..., Tensor], ids: Tensor, texts: Tensor) -> Tensor:
        return call(ids, Packed(texts)) if self.pack else call(ids)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, config: TrainConfig, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """Metrics on the held-out answers, `batch_size` rows at a time, or fewer (see `LOGITS_AT_ONCE`).

        `val_loss` in nats per token, `val_perplexity`, and `val_accuracy`: how often the most likely token is
        right.
        """
        was_training = model.training
        model.eval()
        rows = self.rows(self.val, range(len(self.val)))
        loss = 0.0
        correct = 0.0
        count = 0.0
        at_once = LOGITS_AT_ONCE // (self.block_size * self.tokenizer.vocab_size)
        at_once = min(config.batch_size, max(1, at_once))
        for i in range(0, len(rows), at_once):
            ids, targets, texts = (part.to(device) for part in lay_out(rows[i : i + at_once]))
            logits = self._logits(model, ids, texts)
            mask = targets != IGNORED
            answer_tokens = mask.sum().item()
            loss += cross_entropy(logits, targets).item() * answer_tokens
            correct += (logits.argmax(-1) == targets)[mask].sum().item()
            count += answer_tokens
        model.train(was_training)
        return {
            "val_loss": loss / count,
            "val_perplexity": perplexity(loss / count),
            "val_accuracy": correct / count,
        }
