"""Week 12. A conversation with a model in the terminal, without a server.

    python -m shared.serving chat                          # SmolLM2
    python -m shared.serving chat --model FOLDER --quantize int8 --system "Answer in one sentence."

Ctrl-C ends the answer that is being written, and the conversation where none is. `/new` begins again.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from shared.checks import Checks
from shared.models.chat import chat_prompt, is_chat
from shared.models.names import OwnModelName
from shared.runtime import clock
from shared.sampling.penalties import Penalties
from shared.sampling.text import stream_text
from shared.serving.engine import Engine
from shared.serving.generation import Generation, Request
from shared.serving.loading import Scheme, load_served
from shared.tokenizers import Tokenizer
from shared.tokenizers.base import ends_of
from shared.training.own_model import name_and_source


@dataclass(frozen=True)
class ChatSettings:
    """A conversation in the terminal."""

    model: OwnModelName = "smollm2"
    adapter: str | None = None
    """A LoRA adapter's folder."""
    quantize: Scheme = "none"
    """Round its weights first."""
    system: str | None = None
    """What the model is told before the conversation; none: what it was trained with."""
    max_tokens: int = 500
    """Of an answer."""
    temperature: float = 0.7
    """0 always takes the likeliest token."""
    top_p: float | None = None
    repetition_penalty: float = 1.1
    """Above 1, what was said becomes less likely: a small model repeats itself."""
    seed: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.at_least(1, "max_tokens")
        checks.finish()
        Penalties(repetition=self.repetition_penalty)


class Conversation:
    """The turns so far, and an engine that keeps what it has read of them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: ChatSettings):
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self.turns: list[dict[str, str]] = []
        """Questions and answers, oldest first."""
        self.dropped = 0
        """How many turns no longer fit, and are not read any more."""
        self.speed = 0.0
        """Tokens a second of the last answer, without the reading of what came before it."""

    def forget(self) -> None:
        """Begins again."""
        self.turns, self.dropped = [], 0

    def answer(self, question: str) -> Iterator[str]:
        """Yields the answer as it is written; afterwards it is a turn, also where it was cut short.

        Raises ValueError for a question that is too long, and which is then no turn.
        """
        self.turns.append({"role": "user", "content": question})
        prompt = self._prompt()
        room = self.engine.max_length - len(prompt)
        request = Request(
            prompt,
            min(self.settings.max_tokens, room),
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            penalties=Penalties(repetition=self.settings.repetition_penalty),
            seed=self.settings.seed,
            stop=ends_of(self.tokenizer),
            adapter=self.engine.adapters[0] if self.settings.adapter else None,
        )
        generation = self.engine.submit(request)
        said = ""
        try:
            for piece in stream_text(self.tokenizer, self._timed(generation)):
                said += piece
                yield piece
        finally:
            generation.cancel()
            self.turns.append({"role": "assistant", "content": said})

    def _timed(self, generation: Generation) -> Iterator[int]:
        """The ids as they come; sets `speed`."""
        started = None
        for token in generation:
            if started is None:
                started = clock()
            elif generation.drawn > 1:
                self.speed = (generation.drawn - 1) / max(clock() - started, 1e-9)
            yield token.id

    def _prompt(self) -> list[int]:
        """The conversation's ids, without its oldest turns where it has become too long."""
        system = self.settings.system
        head = [] if system is None else [{"role": "system", "content": system}]
        least = min(self.settings.max_tokens, self.engine.max_length // 4)
        turns = list(self.turns)
        while True:
            prompt = chat_prompt(self.tokenizer, [*head, *turns])
            if len(prompt) + least <= self.engine.max_length:
                self.dropped += len(self.turns) - len(turns)
                self.turns = turns
                return prompt
            if len(turns) == 1:
                self.turns.pop()
                raise ValueError(
                    f"that is {len(prompt)} tokens with what goes before it, and the model takes"
                    f" {self.engine.max_length}, the answer's included: say it in fewer words"
                )
            del turns[:2]


def chat_in_terminal(settings: ChatSettings) -> None:
    """Asks and answers until the input ends."""
    name, source = name_and_source(settings.model)
    adapters = [f"adapter={settings.adapter}"] if settings.adapter else []
    model, tokenizer = load_served(
        source, scheme=settings.quantize, adapters=adapters, device=settings.device
    )
    if not is_chat(tokenizer):
        raise ValueError(
            f"{name} was never trained to converse, and its tokenizer has no tokens for it: let it go on with"
            " a text (python -m shared.models), or take --model smollm2"
        )
    engine = Engine(model, slots=1)
    try:
        print(f"{name}: ask something. /new begins again, Ctrl-C cuts an answer short, Ctrl-D ends.")
        _ask_again(Conversation(engine, tokenizer, settings))
    finally:
        engine.close()


def _ask_again(conversation: Conversation) -> None:
    while True:
        try:
            question = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "/new":
            conversation.forget()
        elif question:
            _print_answer(conversation, question)


def _print_answer(conversation: Conversation, question: str) -> None:
    before = conversation.dropped
    try:
        for piece in conversation.answer(question):
            print(piece, end="", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        print(" ...", end="")
    print(f"\n[{conversation.speed:.0f} tokens a second]", file=sys.stderr)
    if conversation.dropped > before:
        print("[the oldest turns no longer fit: the model does not see them any more]", file=sys.stderr)
