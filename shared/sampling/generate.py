"""Week 1. From logits to text: temperature, top-k, top-p, stop sequences, a seed, one token at a time.

Source of top-p (nucleus) sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019).
"""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.registry import LanguageModel
from shared.runtime import SEED_LIMIT, check_seed, one_thread
from shared.sampling.penalties import Penalties
from shared.sampling.reading import TextReader
from shared.sampling.speculation import Speculation, check_speculation

NEW_TOKENS = 200
"""How many tokens are written where nothing else is asked for."""
GREEDY_BELOW = 1e-6
"""A temperature below this takes the largest logit: dividing by less would overflow."""


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Sets to -inf the logits of tokens that may not be drawn. logits: [..., vocab_size].

    top_k keeps the k largest. top_p keeps the smallest set of largest ones whose probabilities reach p, at
    least one.
    """
    if top_k is not None and top_k < logits.size(-1):
        smallest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the probability of all that rank higher
        dropped_by_rank = before >= top_p
        dropped_by_rank[..., 0] = False  # one stays, also where top_p is so small that it is 0 in fp32
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, dropped_by_rank)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one id per row: [..., vocab_size] -> int64 [...].

    Temperature 0 takes the largest logit, the first of equal ones. Draws are made on the CPU in fp32, so that
    a seed means the same on every device. Raises ValueError for settings out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    rows = distribution(logits, temperature, top_k, top_p).reshape(-1, logits.size(-1))
    drawn = torch.multinomial(rows, 1, generator=generator)
    return drawn.view(logits.shape[:-1]).to(logits.device)


def distribution(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities that `sample` draws with: [..., vocab_size], fp32, on the CPU."""
    if temperature < GREEDY_BELOW:
        return torch.nn.functional.one_hot(logits.argmax(-1).cpu(), logits.size(-1)).float()
    return filter_logits(logits.float().cpu() / temperature, top_k, top_p).softmax(-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a setting out of range, naming it."""
    if not 0 <= temperature <= 100:
        raise ValueError(
            f"temperature={temperature} is out of range: from 0 (greedy) to 100; 0.8 is a good start"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is out of range: at least 1, or none for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is out of range: above 0 and at most 1")


def check_ids(ids: Sequence[int], model: LanguageModel) -> None:
    """Raises ValueError for an id outside the model's vocabulary, naming it and its place."""
    vocab_size = getattr(model.config, "vocab_size", math.inf)
    for place, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise ValueError(
                f"the id {i} at position {place} is outside the vocabulary, whose ids go from 0 to"
                f" {vocab_size - 1}: encode the text with the model's own tokenizer"
            )


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises ValueError for a setting out of range, naming it."""

    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    """See `Penalties.repetition`."""
    seed: int | None = None
    """None draws differently each time."""

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        Penalties(repetition=self.repetition_penalty)
        if self.seed is not None:
            check_seed(self.seed)

    def of_row(self, number: int) -> "Sampling":
        """The same with the seed of a batch's row: that of the batch and the row's number together."""
        if self.seed is None:
            return self
        return replace(self, seed=(self.seed + number) % SEED_LIMIT)


class Row:
    """A text that is being written: its tokens so far, and how the next one is drawn."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling):
        self.prompt = list(prompt)
        self.tokens = list(prompt)
        self.ended = False
        """Set by whoever reads the tokens: no more are drawn."""
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._penalties = Penalties(repetition=sampling.repetition_penalty)
        self._sampling = sampling

    @property
    def written(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.prompt) :]

    def draw(self, logits: Tensor) -> None:
        """Adds a token, drawn from logits [vocab_size]. Raises ValueError for logits that are not finite."""
        how = self._sampling
        with one_thread():
            changed = self._changed(logits, self.written)
            self.tokens.append(int(sample(changed, how.temperature, how.top_k, how.top_p, self.generator)))

    def distribution(self, logits: Tensor, proposed: Sequence[int] = ()) -> Tensor:
        """The probabilities [vocab_size] that a token is drawn with, from the logits of what follows the text
        with some proposed tokens behind it. Raises ValueError as `draw` does.
        """
        how = self._sampling
        with one_thread():
            changed = self._changed(logits, [*self.written, *proposed])
            return distribution(changed, how.temperature, how.top_k, how.top_p)

    def _changed(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        """The logits after penalties."""
        if not logits.max().isfinite():
            raise ValueError(
                f"the model's logits after {len(self.tokens)} tokens are not finite: its weights are damaged,"
                " or too large for its number format. Take another checkpoint, or load it in fp32"
            )
        if self._penalties.change_nothing:
            return logits
        return self._penalties.apply(logits, self.prompt, written)


def generate(
    model: LanguageModel,
    ids: Sequence[int],
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[int | Sequence[int]] = (),
    seed: int | None = None,
    use_cache: bool = True,
    speculate: Speculation | None = None,
) -> Generator[int, None, None]:
    """Yields new token ids as they are drawn, up to `max_new_tokens`.

    repetition_penalty: above 1, what stands in the prompt or the text already is less likely to come (see
    `Penalties.repetition`). stop: tokens, or sequences of tokens, at which to end; what ended it is not
    yielded. For texts see `shared.sampling.text.stream_text`, as a text can be spelled by many tokens. seed:
    None draws differently each time. A model with a method `new_cache` is fed only what is new
    (`use_cache=False` reads everything again; the ids are the same). Where the text outgrows the model's
    block_size, the model goes on with its last half. speculate: writes the same in fewer forward passes, see
    `shared.sampling.speculation`. Raises ValueError for no prompt, for ids outside the vocabulary, for
    settings out of range, and while drawing for logits that are not finite.
    """
    check_prompt(ids, model)
    check_new_tokens(max_new_tokens)
    check_speculation(speculate, model)
    row = Row(ids, Sampling(temperature, top_k, top_p, repetition_penalty, seed))
    stops = [[s] if isinstance(s, int) else list(s) for s in stop]
    return _until_stop(_drawn(model, row, max_new_tokens, use_cache, speculate), stops)


def check_prompt(ids: Sequence[int], model: LanguageModel) -> None:
    """Raises ValueError for no ids, and for one outside the model's vocabulary."""
    if not len(ids):
        raise ValueError("generation needs at least one token to start from: give a prompt")
    check_ids(ids, model)


def check_new_tokens(max_new_tokens: int) -> None:
    """Raises ValueError for fewer than none."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is out of range: at least 0")


def draw_on(
    model: LanguageModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    use_cache: bool,
    speculate: Speculation | None = None,
) -> Generator[list[tuple[Row, Tensor]], None, None]:
    """Draws a token of each row that has not ended, up to `max_new_tokens` times.

    Yields, each time, the rows that have a new token, with the logits [vocab_size] that it was drawn from;
    with `speculate` one row at a time. Leaves the model in the mode, training or not, that it was in.
    """
    was_training = model.training
    try:
        if speculate is None:
            yield from _drawn_in_step(model, rows, max_new_tokens, use_cache)
        else:
            yield from speculate.draw_on(model, rows, max_new_tokens, use_cache)
    finally:
        model.train(was_training)


def _drawn_in_step(
    model: LanguageModel, rows: Sequence[Row], max_new_tokens: int, use_cache: bool
) -> Generator[list[tuple[Row, Tensor]], None, None]:
    reader = TextReader(model, max_new_tokens, use_cache)
    for _ in range(max_new_tokens):
        logits = reader.next_logits([row.tokens for row in rows]).unbind()
        step = list(zip(rows, logits))
        for row, of_row in step:
            row.draw(of_row)
        yield step
        going_on = [number for number, row in enumerate(rows) if not row.ended]
        if not going_on:
            break
        if len(going_on) < len(rows):
            reader.keep(going_on)
            rows = [rows[number] for number in going_on]


def _drawn(
    model: LanguageModel, row: Row, max_new_tokens: int, use_cache: bool, speculate: Speculation | None
) -> Generator[int, None, None]:
    with closing(draw_on(model, [row], max_new_tokens, use_cache, speculate)) as steps:
        for _ in steps:
            yield row.tokens[-1]


def split_at_stop(held: Sequence[int], stops: Sequence[list[int]]) -> tuple[int, bool]:
    """How many of the ids that were drawn but not shown yet may be shown, and whether generation ends here.

    held: those ids. Generation ends where they end in a stop sequence. A stop sequence is not shown, and what
    may be the beginning of one has to wait. Of stop sequences that end at the same place the longest counts.

    >>> split_at_stop([7, 8, 1], stops=[[1, 2]]), split_at_stop([1, 2], stops=[[1, 2]])
    ((2, False), (0, True))
    """
    held = list(held)
    complete = [len(stop) for stop in stops if held[-len(stop) :] == stop]
    if complete:
        return len(held) - max(complete), True
    begun = [n for stop in stops for n in range(1, len(stop)) if held[-n:] == stop[:n]]
    return len(held) - max(begun, default=0), False


def _until_stop(drawn: Generator[int, None, None], stops: list[list[int]]) -> Generator[int, None, None]:
    held: list[int] = []  # drawn, but perhaps the beginning of a stop sequence
    with closing(drawn):
        for token in drawn:
            held.append(token)
            ready, stopped = split_at_stop(held, stops)
            if stopped:
                del held[ready:]
                break
            yield from held[:ready]
            del held[:ready]
    yield from held
