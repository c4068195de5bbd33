"""Week 1. From logits to text: temperature, top-k, top-p, stop sequences, a seed, one token at a time.

Source of top-p (nucleus) sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019).
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from shared.devices import device_of
from shared.registry import LanguageModel
from shared.runtime import check_seed

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
    probabilities = filter_logits(logits.float().cpu() / temperature, top_k, top_p).softmax(-1)
    rows = probabilities.reshape(-1, logits.size(-1))
    drawn = torch.multinomial(rows, 1, generator=generator)
    return drawn.view(logits.shape[:-1]).to(logits.device)


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


def generate(
    model: LanguageModel,
    ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int | Sequence[int]] = (),
    seed: int | None = None,
    use_cache: bool = True,
) -> Generator[int, None, None]:
    """Yields new token ids as they are drawn, up to `max_new_tokens`.

    stop: tokens, or sequences of tokens, at which to end; what ended it is not yielded. For texts see
    `shared.sampling.text.stream_text`, as a text can be spelled by many tokens. seed: None draws
    differently each time. A model with a method `new_cache` is fed only what is new (`use_cache=False` reads
    everything again; the ids are the same). Where the text outgrows the model's block_size, the model goes on
    with its last half. Raises ValueError for no prompt, for ids outside the vocabulary, for settings out of
    range, and while drawing for logits that are not finite.
    """
    if not len(ids):
        raise ValueError("generation needs at least one token to start from: give a prompt")
    check_ids(ids, model)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is out of range: at least 0")
    check_sampling(temperature, top_k, top_p)
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(check_seed(seed))
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    stops = [[s] if isinstance(s, int) else list(s) for s in stop]
    return _until_stop(_draw_on(model, list(ids), draw, use_cache), max_new_tokens, stops)


def _draw_on(
    model: LanguageModel, tokens: list[int], draw: Callable[[Tensor], Tensor], use_cache: bool
) -> Generator[int, None, None]:
    """Goes on from `tokens` without an end. Leaves the model in the mode, training or not, that it was in."""
    was_training = model.training
    context = _Context(model, use_cache)
    try:
        while True:
            logits = context.next_logits(tokens)
            if not logits.max().isfinite():
                raise ValueError(
                    f"the model's logits after {len(tokens)} tokens are not finite: its weights are damaged,"
                    " or too large for its number format. Take another checkpoint, or load it in fp32"
                )
            token = int(draw(logits))
            tokens.append(token)
            yield token
    finally:
        model.train(was_training)


class _Context:
    """What a model reads of a growing text: all of it, or its end where it has outgrown block_size."""

    def __init__(self, model: LanguageModel, use_cache: bool):
        self.model = model
        self.device = device_of(model)
        self.limit = getattr(model.config, "block_size", None)
        self.new_cache = getattr(model, "new_cache", None) if use_cache else None
        self.start = 0  # the first token that is read
        self.cache: Any = None
        self.cached = 0  # the tokens before this one are in the cache

    def next_logits(self, tokens: list[int]) -> Tensor:
        """Logits [vocab_size] for what follows `tokens`, which begin as those of the call before."""
        if self.limit is not None and len(tokens) - self.start > self.limit:
            self.start = len(tokens) - max(1, self.limit // 2)
            self.cache = None
        if self.new_cache is None:
            return self._read(tokens[self.start :])
        if self.cache is None:
            self.cache = self.new_cache()
            self.cached = self.start
        new = tokens[self.cached :]
        self.cached = len(tokens)
        return self._read(new, self.cache)

    @torch.inference_mode()
    def _read(self, tokens: list[int], *cache: Any) -> Tensor:
        if self.model.training:  # eval() walks all modules, which takes longer than a small model's step
            self.model.eval()
        idx = torch.tensor([tokens], device=self.device)
        logits = self.model(idx, *cache)
        return logits[0, -1]


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


def _until_stop(
    drawn: Generator[int, None, None], max_new_tokens: int, stops: list[list[int]]
) -> Generator[int, None, None]:
    held: list[int] = []  # drawn, but perhaps the beginning of a stop sequence
    with closing(drawn):
        for token in islice(drawn, max_new_tokens):
            held.append(token)
            ready, stopped = split_at_stop(held, stops)
            if stopped:
                del held[ready:]
                break
            yield from held[:ready]
            del held[:ready]
    yield from held
