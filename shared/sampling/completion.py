"""Week 1. What a model writes after a prompt, as text: many prompts at once, or one bit by bit.

    for written in generate_batch(model, ["Once upon a time", "ROMEO:"], 100, stop="\n\n", seed=1):
        print(written.prompt + written.text, written.finish_reason, sum(written.logprobs))

A prompt may be text, or tokens, such as `shared.models.chat.chat_prompt` gives of a conversation.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from shared.registry import LanguageModel
from shared.runtime import one_thread
from shared.sampling.generate import (
    NEW_TOKENS,
    Row,
    Sampling,
    check_new_tokens,
    check_prompt,
    draw_on,
    generate,
)
from shared.sampling.speculation import Speculation, check_speculation
from shared.sampling.text import TextStream, stream_text
from shared.tokenizers.base import Tokenizer, ends_of, tokenizer_of

Prompt = str | Sequence[int]
"""A text, or its tokens."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    """What is new, without what ended it."""
    ids: tuple[int, ...]
    """All new tokens, those that ended the text included."""
    logprobs: tuple[float, ...]
    """Of each of `ids`, in nats: the model's own, at temperature 1 and before penalties and filters."""
    finish_reason: Literal["stop", "length"]
    """stop: a stop text or one of the tokenizer's end tokens; length: max_new_tokens are written."""


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int = NEW_TOKENS,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    use_cache: bool = True,
    speculate: Speculation | None = None,
    batch_size: int = 32,
    tokenizer: Tokenizer | None = None,
) -> list[Completion]:
    """What the model writes after each prompt, in the prompts' order.

    The settings are those of `shared.sampling.generate`, but `stop` is a text or several, which may begin and
    end inside of tokens; a text also ends at the tokenizer's end tokens (`ends_of`). Row i draws with seed +
    i, so that its text is, up to rounding, what `generate` gives with this seed, whatever else is in the
    batch; so too where it outgrows block_size. batch_size: rows of like length that share forward passes and
    a cache. tokenizer: the model's own if not given.

    Raises ValueError for no prompts, an empty one or one that is neither text nor tokens, an empty stop text,
    no tokenizer, and settings out of range, and while drawing for logits that are not finite.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    stops = stop_texts(stop)
    check_new_tokens(max_new_tokens)
    check_speculation(speculate, model)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is out of range: at least 1")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    writings = [
        _Writing(prompt, Row(ids, sampling.of_row(number)), tokenizer, stops)
        for number, (prompt, ids) in enumerate(_read_prompts(model, tokenizer, prompts))
    ]
    # The longest first: what does not fit in memory fails at once.
    by_length = sorted(writings, key=_prompt_length, reverse=True)
    for begin in range(0, len(by_length), batch_size):
        batch = by_length[begin : begin + batch_size]
        by_row = {writing.row: writing for writing in batch}
        with closing(draw_on(model, list(by_row), max_new_tokens, use_cache, speculate)) as steps:
            for step in steps:
                for row, logits in step:
                    by_row[row].take(logits)
    return [writing.completion() for writing in writings]


def generate_stream(
    model: LanguageModel,
    prompt: Prompt,
    max_new_tokens: int = NEW_TOKENS,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    use_cache: bool = True,
    speculate: Speculation | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[str]:
    """Pieces of the text that the model writes after a prompt, as they come: whole characters, and nothing
    of a stop text.

    Together they are the text that `generate_batch` gives for this prompt alone. Raises ValueError as it
    does, where it can before the first piece is asked for.
    """
    tokenizer = tokenizer_of(model, tokenizer)
    stops = stop_texts(stop)
    ((_, ids),) = _read_prompts(model, tokenizer, [prompt])
    drawn = generate(
        model,
        ids,
        max_new_tokens,
        temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=ends_of(tokenizer),
        seed=seed,
        use_cache=use_cache,
        speculate=speculate,
    )
    return _pieces(tokenizer, drawn, stops)


def _pieces(tokenizer: Tokenizer, drawn: Generator[int, None, None], stops: Sequence[str]) -> Iterator[str]:
    with closing(drawn):
        yield from stream_text(tokenizer, drawn, stops)


class _Writing:
    """A row of a batch, and its text so far."""

    def __init__(self, prompt: str, row: Row, tokenizer: Tokenizer, stops: Sequence[str]):
        self.prompt = prompt
        self.row = row
        self.text = ""
        self.logprobs: list[float] = []
        self._ends = ends_of(tokenizer)
        self._stream = TextStream(tokenizer.vocab, stops)

    def take(self, logits: Tensor) -> None:
        """Takes up the row's newest token, which was drawn from logits [vocab_size]."""
        token = self.row.tokens[-1]
        with one_thread():
            self.logprobs.append(logits.float().log_softmax(-1)[token].item())
        if token in self._ends:
            self.row.ended = True
        else:
            self.text += self._stream.push(token)
            self.row.ended = self._stream.stopped

    def completion(self) -> Completion:
        """The whole; what was held back of the text is in it."""
        text = self.text + self._stream.finish()
        stopped = self.row.ended or self._stream.stopped
        return Completion(
            prompt=self.prompt,
            text=text,
            ids=tuple(self.row.written),
            logprobs=tuple(self.logprobs),
            finish_reason="stop" if stopped else "length",
        )


def _prompt_length(writing: _Writing) -> int:
    return len(writing.row.prompt)


def _read_prompts(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[tuple[str, list[int]]]:
    """Each prompt as text and as tokens."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts!r} is one text: put it into a list")
    if not len(prompts):
        raise ValueError("there are no prompts: give at least one")
    read = []
    for number, prompt in enumerate(prompts):
        try:
            if isinstance(prompt, str):
                text, ids = prompt, tokenizer.prompt(prompt)
            else:
                ids = _as_ids(prompt)
                text = tokenizer.decode(ids)
            check_prompt(ids, model)
        except ValueError as error:
            place = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise ValueError(f"{place}{error}") from None
        read.append((text, ids))
    return read


def _as_ids(prompt: object) -> list[int]:
    if not isinstance(prompt, Sequence) or not all(isinstance(i, int) for i in prompt):
        raise ValueError(f"{prompt!r} is neither a text nor a list of token ids")
    return list(prompt)


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """One text or several as a list. Raises ValueError for an empty one, and for what is no text."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"stop={stop!r}: must be a text or several, each of at least one character; for none leave it"
                " out"
            )
    return stops
