"""Week 12. The engine: one thread that steps a model for many requests at once, each as if it were alone.

A step reads one chunk of one waiting prompt, then writes one token of every text that is being written, all
of them rows of one forward pass (continuous batching: Yu et al., "Orca", 2022; chunked prefill: Agrawal et
al., "Sarathi-Serve", 2024). What a prompt has in common with one that was read before is not read again.

    engine = Engine(model)
    for token in engine.submit(Request(ids, max_new_tokens=50, seed=1)):
        print(token.id)
    engine.close()

A request's tokens do not depend on its neighbours. Whatever rounds differently in another shape is kept out
of reach:

* a prompt is read in a batch of its own, in chunks that begin at multiples of `chunk`, and only whole such chunks are reused;
* texts are written in batches of a multiple of `ROWS` rows, idle ones among them, and keys come in blocks (`shared.serving.slots.KEYS`);
* each request draws from a generator of its own.

What is left is what the machine's products do with the same row at another place of the batch. Intel's MKL,
which computes them on most CPUs, gives every row the same bits in the mode that `same_bits_in_every_row`
sets; without it the last bit of attention may differ.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from shared.adapters.attach import adapters_by_row, adapters_of
from shared.models.gpt import GPT
from shared.runtime import check_seed
from shared.sampling.generate import check_sampling, sample, split_at_stop
from shared.serving.slots import SlotCache

ROWS = 4
"""Texts are written in batches of a multiple of so many rows: smaller batches go through other kernels, which
round differently.
"""
REASONS = ("stop", "length", "cancelled", "timeout", "error")
"""Why a text ended."""
log = logging.getLogger(__name__)


def same_bits_in_every_row() -> None:
    """Asks MKL for results that do not depend on where in memory, or by which thread, they are computed. It
    listens only before its first product; a value that the environment has already stays.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


class QueueFull(RuntimeError):
    """So many requests wait already that another one would not be answered in time."""


class Draining(RuntimeError):
    """The engine finishes what it has, and takes nothing new."""


class Token(NamedTuple):
    """One token of a text, with log-probabilities where they were asked for: the model's own, before
    temperature and filters.
    """

    id: int
    logprob: float | None = None
    """None also for a prompt's first token, which nothing comes before."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids at this place and their log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class Request:
    """What to write. Raises ValueError for values out of range; `Engine.submit` for what this model cannot
    do.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """None draws differently each time."""
    stop: Sequence[int | Sequence[int]] = ()
    """Tokens, or sequences of tokens, at which to end; what ended it is not part of the text."""
    adapter: str | None = None
    """Name of a LoRA adapter on the model; None is the base alone."""
    logprobs: int | None = None
    """How many of the likeliest tokens to name at each place; 0 gives only the log-probability of the token
    itself.
    """
    score_prompt: bool = False
    """Log-probabilities of the prompt's tokens too (`Generation.prompt`)."""
    timeout: float | None = None
    """Seconds from submission to the end."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("generation needs at least one token to start from: give a prompt")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is out of range: at least 0")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs} is out of range: at least 0, or none")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} is out of range: seconds above 0, or none")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.seed is not None:
            check_seed(self.seed)


class Generation:
    """A submitted request. Iterating gives its tokens as they come; `listen` gets them, and then None, from
    the engine's thread instead.
    """

    def __init__(
        self, request: Request, listen: Callable[[Token | None], None] | None, wake: Callable[[], None]
    ):
        self.request = request
        self.finish_reason: str | None = None
        """None while it runs; then one of `REASONS`."""
        self.prompt: list[Token] = []
        """The prompt's tokens with log-probabilities, as far as it has been read, with `score_prompt`."""
        self.slot: int | None = None
        """Where it is written, or was; None while it waits."""
        self.read = 0
        """Tokens of the prompt read so far."""
        self.reused = 0
        """Tokens of the prompt that did not have to be read."""
        self.drawn = 0
        """Tokens drawn so far, those of a stop sequence among them."""
        self.ending: list[Token] = []
        """The tokens of the stop sequence that ended it."""
        self.cancelled = False
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.generator = torch.Generator()
        self.generator.seed() if request.seed is None else self.generator.manual_seed(request.seed)
        self.stops = [[s] if isinstance(s, int) else list(s) for s in request.stop]
        self.held: list[Token] = []  # drawn, but perhaps the beginning of a stop sequence
        self._arrived: SimpleQueue[Token | None] = SimpleQueue()
        self._listen, self._wake = listen or self._arrived.put, wake

    def __iter__(self) -> Iterator[Token]:
        """Raises RuntimeError where the engine could not go on; for the rest see `finish_reason`."""
        while (token := self._arrived.get()) is not None:
            yield token
        if self.finish_reason == "error":
            raise RuntimeError("the engine could not finish this text: its log says why")

    def cancel(self) -> None:
        """Ends it before the engine's next step. Nothing happens where it has ended."""
        self.cancelled = True
        self._wake()

    def deliver(self, token: Token | None) -> None:
        """For the engine: hands a token on. A listener that fails is one that has gone."""
        try:
            self._listen(token)
        except Exception:
            self.cancelled = True


class _Slot:
    """Where a text's keys and values lie. After its end they stay, for the next one that begins alike."""

    def __init__(self, index: int):
        self.index = index
        self.generation: Generation | None = None
        self.tokens: list[int] = []
        """Whose keys and values are in the cache."""
        self.whole = 0
        """So many of them were read in whole chunks: what another prompt may take over."""
        self.adapter: str | None = None
        self.next: int | None = None
        """The last token drawn, which the model has not read; None while it reads the prompt."""
        self.used = 0


class Engine:
    """Writes texts with `model`, up to `slots` at a time, for up to `queue` more that wait.

    max_length: tokens of a prompt and its text together; the model's block_size if not given. Memory: 2 ·
    n_layer · slots · n_kv_head · max_length · head_dim numbers. chunk: tokens of a prompt that are read at a
    time, for which running texts wait. start: whether a thread calls `step`, or the caller does. The model
    belongs to the engine from here on. Raises ValueError for settings out of range and a model that is no
    GPT.
    """

    def __init__(
        self,
        model: GPT,
        slots: int = 8,
        max_length: int | None = None,
        chunk: int = 32,
        queue: int = 64,
        start: bool = True,
    ):
        if not isinstance(model, GPT):
            raise ValueError(f"the engine runs a GPT, not a {type(model).__name__}")
        problems = [
            f"{n}={v}: must be at least {low}"
            for n, v, low in (("slots", slots, 1), ("chunk", chunk, 1), ("queue", queue, 0))
            if v < low
        ]
        if problems:
            raise ValueError("Engine: " + "; ".join(problems))
        self.model, self.chunk, self.queue = model.eval(), chunk, queue
        self.adapters = tuple(adapters_of(model))
        """Names that a request may give."""
        weight = model.norm.weight
        self._cache = SlotCache(
            model.config, ROWS * math.ceil(slots / ROWS), max_length, weight.device, weight.dtype
        )
        self.max_length = self._cache.max_length
        self._slots = [_Slot(i) for i in range(slots)]
        self._waiting: deque[Generation] = deque()
        self._reading: deque[_Slot] = deque()
        self._rows: tuple[str | None, ...] = ()  # whose adapters the model is set to
        self._rows_set = ExitStack()
        self._draining = self._closing = False
        self._changed = threading.Condition()
        self.prompt_tokens = self.reused_tokens = self.generated_tokens = self.steps = 0
        self.ended = dict.fromkeys(REASONS, 0)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True) if start else None
        if self._thread:
            self._thread.start()

    # ---- from any thread

    def submit(self, request: Request, listen: Callable[[Token | None], None] | None = None) -> Generation:
        """Takes a request on. Raises ValueError for one that this model cannot do, QueueFull, and Draining."""
        self.check(request)
        generation = Generation(request, listen, self._wake)
        with self._changed:
            if self._draining:
                raise Draining("this server is shutting down: ask another one, or again later")
            if len(self._waiting) + self.busy >= len(self._slots) + self.queue:
                raise QueueFull(
                    f"{self.busy} texts are being written and {len(self._waiting)} wait: ask again later"
                )
            self._waiting.append(generation)
            self._changed.notify_all()
        return generation

    def check(self, request: Request) -> None:
        """Raises ValueError where this model cannot do what is asked."""
        vocab_size, total = self.model.config.vocab_size, len(request.prompt) + request.max_new_tokens
        if total > self.max_length:
            raise ValueError(
                f"{len(request.prompt)} tokens of prompt and {request.max_new_tokens} new ones are {total}, "
                f"and this model takes {self.max_length}: shorten the prompt, or ask for fewer"
            )
        if not all(0 <= i < vocab_size for i in request.prompt):
            raise ValueError(
                f"the prompt has an id outside the vocabulary: ids go from 0 to {vocab_size - 1}"
            )
        if (request.logprobs or 0) > vocab_size:
            raise ValueError(f"logprobs={request.logprobs}: there are only {vocab_size} tokens")
        if request.adapter is not None and request.adapter not in self.adapters:
            raise ValueError(
                f"no adapter is called {request.adapter!r}; there are: {', '.join(self.adapters) or 'none'}"
            )

    @property
    def busy(self) -> int:
        """Texts that have a slot."""
        return sum(slot.generation is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        """From here on nothing new is taken; what is there goes on."""
        self._draining = True

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Until nothing runs or waits, or `timeout` seconds are over: whether it is idle."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.busy and not self._waiting, timeout)

    def close(self) -> None:
        """Cancels what is there, and ends the thread."""
        with self._changed:
            self._draining = self._closing = True
            for generation in [*self._waiting, *(slot.generation for slot in self._slots if slot.generation)]:
                generation.cancelled = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        self.step()
        self._rows_set.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ---- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self.busy)
                if self._closing:
                    return
            try:
                self.step()
            except Exception:
                log.exception("a step failed: what was being written is given up")
                self._give_up()

    def step(self) -> bool:
        """One turn; whether there was anything to do."""
        with self._changed:
            self._sweep()
            self._admit()
        worked = bool(self._reading)
        with torch.inference_mode():
            if self._reading:
                slot = self._reading.popleft()
                self._read_chunk(slot)
                if slot.generation and slot.next is None:
                    self._reading.append(
                        slot
                    )  # behind the others: a short prompt need not wait for all of a long one
            writing = [slot for slot in self._slots if slot.next is not None]
            if writing:
                self._write(writing)
        self.steps += worked or bool(writing)
        return worked or bool(writing)

    def _sweep(self) -> None:
        """Ends what was cancelled or has run out of time."""
        now = time.monotonic()
        for generation in [*self._waiting, *(slot.generation for slot in self._slots if slot.generation)]:
            late = generation.deadline is not None and now > generation.deadline
            if generation.cancelled or late:
                self._finish(generation, "cancelled" if generation.cancelled else "timeout")

    def _finish(self, generation: Generation, reason: str) -> None:
        with self._changed:
            for slot in self._slots:
                if slot.generation is generation:
                    slot.generation = slot.next = None
                    del slot.tokens[slot.whole :]
                    if slot in self._reading:
                        self._reading.remove(slot)
            if generation in self._waiting:
                self._waiting.remove(generation)
            self._changed.notify_all()
        self.ended[reason] += 1
        generation.finish_reason = reason
        generation.deliver(None)

    def _give_up(self) -> None:
        for slot in self._slots:
            if slot.generation:
                slot.whole = 0
                self._finish(slot.generation, "error")

    def _admit(self) -> None:
        """Gives waiting requests the slots that are free."""
        while self._waiting and self.busy < len(self._slots):
            generation = self._waiting.popleft()
            try:
                slot, generation.reused = self._place(generation.request)
            except Exception:  # it has no slot yet, by which it would be found
                self._finish(generation, "error")
                raise
            slot.generation, slot.adapter, generation.slot = (
                generation,
                generation.request.adapter,
                slot.index,
            )
            slot.tokens, slot.whole = list(generation.request.prompt[: generation.reused]), generation.reused
            slot.used = self.steps
            self.reused_tokens += generation.reused
            self._reading.append(slot)

    def _place(self, request: Request) -> tuple[_Slot, int]:
        """A free slot, and how many of the prompt's tokens are in it: those of the slot that begins most
        alike.
        """
        free = [slot for slot in self._slots if slot.generation is None]
        source = max(self._slots, key=lambda slot: (self._common(slot, request), slot.generation is None))
        common = self._common(source, request)
        if common and source in free and common == source.whole:
            return source, common
        # The one used longest ago. Of the first rows, if there is one: a batch need not have more rows than
        # the last slot in use.
        target = min(free, key=lambda slot: (slot.index // ROWS, slot.used))
        if common and target is not source:
            self._cache.copy(source.index, target.index, common)
        return target, common

    def _common(self, slot: _Slot, request: Request) -> int:
        if slot.adapter != request.adapter or request.score_prompt:  # a prompt is scored by reading it
            return 0
        common = 0
        most = min(
            slot.whole, len(request.prompt) - 1
        )  # the last token must be read: what comes after it is asked for
        while common + self.chunk <= most:
            part = slice(common, common + self.chunk)
            if slot.tokens[part] != list(request.prompt[part]):
                break
            common += self.chunk
        return common

    def _forward(
        self, ids: list[list[int]], first: int, lengths: list[int | None], adapters: tuple[str | None, ...]
    ) -> Tensor:
        """Logits [rows, time, vocab_size], fp32, on the CPU."""
        if (
            self.adapters and adapters != self._rows
        ):  # setting them walks through all modules, so it is done where they change
            self._rows_set.close()
            self._rows_set.enter_context(adapters_by_row(self.model, adapters))
            self._rows = adapters
        return (
            self.model(torch.tensor(ids, device=self._cache.k.device), self._cache.rows(first, lengths))
            .float()
            .cpu()
        )

    def _read_chunk(self, slot: _Slot) -> None:
        generation, start = slot.generation, len(slot.tokens)
        request = generation.request
        chunk = list(request.prompt[start : start + self.chunk])
        logits = self._forward([chunk], slot.index, [start], (request.adapter,))[0]  # [time, vocab_size]
        self.prompt_tokens += len(chunk)
        generation.read += len(chunk)
        slot.tokens += chunk
        if len(chunk) == self.chunk:
            slot.whole = len(slot.tokens)
        if request.score_prompt:
            following = request.prompt[start + 1 : start + 1 + len(chunk)]
            if not start:
                generation.prompt.append(Token(chunk[0]))
            generation.prompt += [_scored(row, i, request.logprobs or 0) for row, i in zip(logits, following)]
        if len(slot.tokens) == len(request.prompt):
            self._draw(slot, logits[-1])

    def _write(self, slots: list[_Slot]) -> None:
        rows = ROWS * math.ceil((slots[-1].index + 1) / ROWS)
        ids, lengths, adapters = [[0]] * rows, [None] * rows, [None] * rows
        for slot in slots:
            ids[slot.index], lengths[slot.index], adapters[slot.index] = (
                [slot.next],
                len(slot.tokens),
                slot.adapter,
            )
        logits = self._forward(ids, 0, lengths, tuple(adapters))
        for slot in slots:
            slot.tokens.append(slot.next)
            self._draw(slot, logits[slot.index, 0])

    def _draw(self, slot: _Slot, logits: Tensor) -> None:
        generation = slot.generation
        request = generation.request
        if (
            not logits.max().isfinite()
        ):  # greedy drawing would not notice, and values that are not finite would outlive this text
            log.error("a text's logits are not finite: it is given up")
            self._cache.clear(slot.index)
            slot.whole = 0
            return self._finish(generation, "error")
        if request.max_new_tokens == 0:
            return self._finish(generation, "length")
        slot.next = int(
            sample(logits, request.temperature, request.top_k, request.top_p, generation.generator)
        )
        generation.drawn += 1
        self.generated_tokens += 1
        held = generation.held
        held.append(
            Token(slot.next) if request.logprobs is None else _scored(logits, slot.next, request.logprobs)
        )
        ready, stopped = split_at_stop([token.id for token in held], generation.stops)
        ended = generation.drawn == request.max_new_tokens
        for token in held[: len(held) if ended and not stopped else ready]:
            generation.deliver(token)
        del held[:ready]
        if stopped:
            generation.ending = held
        if stopped or ended:
            self._finish(generation, "stop" if stopped else "length")


def _scored(logits: Tensor, i: int, top: int) -> Token:
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top)
    return Token(i, logprobs[i].item(), tuple(zip(best.indices.tolist(), best.values.tolist())))
