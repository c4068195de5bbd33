"""Week 12. The engine: one thread that steps a model for many requests at once, each as if it were alone.

A step reads one chunk of one waiting prompt, then writes one token of every text that is being written, all
of them rows of one forward pass (continuous batching: Yu et al., "Orca", 2022; chunked prefill: Agrawal et
al., "Sarathi-Serve", 2024). What a prompt has in common with one that was read before is not read again. A
text that is alone gets several tokens in a step where it repeats what stands in it or in its prompt
(`shared.sampling.speculation`).

    engine = Engine(model)
    for token in engine.submit(Request(ids, max_new_tokens=50, seed=1)):
        print(token.id)
    engine.close()

A request's tokens do not depend on its neighbours: what reads with the model (decoder.c on a CPU, else
`shared.serving.reading`) takes the sums of each row in the same order whatever else is in the batch, a prompt
is read in chunks that begin at multiples of `chunk`, only complete chunks are reused, and each request draws
from a generator of its own.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shared.adapters.attach import adapters_of
from shared.checks import Checks
from shared.models.gpt import GPT
from shared.runtime import one_thread
from shared.sampling.generate import check_ids, sample, split_at_stop
from shared.sampling.speculation import Lookup
from shared.serving.generation import REASONS, Generation, Request, Token
from shared.serving.reading import ROWS, slot_reader

log = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """So many requests wait already that another one would not be answered in time."""


class Draining(RuntimeError):
    """The engine finishes what it has, and takes nothing new."""


class _Slot:
    """The keys and values of one text: they stay after its end, for the next text that begins alike."""

    def __init__(self, index: int):
        self.index = index
        self.generation: Generation | None = None
        self.tokens: list[int] = []
        """The tokens whose keys and values are in the cache."""
        self.reusable = 0
        """How many of them were read in complete chunks: what another prompt may take over."""
        self.adapter: str | None = None
        self.writing = False
        """The prompt has been read, and `next_token` is known."""
        self.next_token = 0
        """While writing: the last token drawn, which the model has not read."""
        self.last_used = -1
        """The engine's step in which its last text began; -1: none has."""

    def begin(self, generation: Generation, step: int) -> None:
        """Takes a text whose first `generation.reused` tokens are in the cache."""
        generation.slot = self.index
        self.generation = generation
        self.adapter = generation.request.adapter
        self.tokens = list(generation.request.prompt[: generation.reused])
        self.reusable = generation.reused
        self.last_used = step

    def release(self) -> None:
        """Forgets the text, and keeps the part that another prompt may take over."""
        self.generation = None
        self.writing = False
        del self.tokens[self.reusable :]


class Engine:
    """Writes texts with `model`, up to `slots` at a time, for up to `queue` more that wait.

    max_length: tokens of a prompt and its text together; the model's block_size if not given. Memory: 2 ·
    n_layer · slots · n_kv_head · max_length · head_dim numbers. chunk: tokens of a prompt that are read at a
    time, for which running texts wait. speculate: whether a text that is alone may be written several tokens
    at a time; it stays the same, so this is done only where the reader is batch-invariant, as decoder.c is.
    start: whether a thread calls `step`, or the caller does. The model belongs to the engine from here on.
    Raises ValueError for settings out of range and a model that is no GPT.
    """

    def __init__(
        self,
        model: GPT,
        slots: int = 8,
        *,
        max_length: int | None = None,
        chunk: int = 32,
        queue: int = 64,
        speculate: bool = True,
        start: bool = True,
    ):
        if not isinstance(model, GPT):
            raise ValueError(f"the engine runs a GPT, not a {type(model).__name__}")
        self.chunk = chunk
        self.queue = queue
        checks = Checks(self)
        checks.require(slots >= 1, f"slots={slots}: must be at least 1")
        checks.at_least(1, "chunk")
        checks.at_least(0, "queue")
        checks.finish()
        self.model = model.eval()
        self.adapters = tuple(adapters_of(model))
        """Names that a request may give."""
        self.max_length = max_length or model.config.block_size
        self._reader = slot_reader(model, slots, max_length)
        self._lookup = Lookup() if speculate and self._reader.batch_invariant else None
        self._slots = [_Slot(index) for index in range(slots)]
        self._waiting: deque[Generation] = deque()
        self._reading: deque[tuple[_Slot, Generation]] = deque()
        self._draining = False
        self._closing = False
        self._changed = threading.Condition()
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.generated_tokens = 0
        self.proposed_tokens = 0
        self.accepted_tokens = 0
        """Of the proposed ones: those that were drawn too."""
        self.steps = 0
        self.ended = dict.fromkeys(REASONS, 0)
        """How many texts ended for each reason."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True) if start else None
        if self._thread:
            self._thread.start()

    # What any thread may call.

    def submit(self, request: Request, listen: Callable[[Token | None], None] | None = None) -> Generation:
        """Takes a request on.

        Raises ValueError for one that this model cannot do, QueueFull, and Draining.
        """
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
        vocab_size = self.model.config.vocab_size
        total = len(request.prompt) + request.max_new_tokens
        if total > self.max_length:
            raise ValueError(
                f"{len(request.prompt)} tokens of prompt and {request.max_new_tokens} new ones are {total}, "
                f"and this model takes {self.max_length}: shorten the prompt, or ask for fewer"
            )
        check_ids(request.prompt, self.model)
        for token in request.penalties.bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias={token}: the ids of this model go from 0 to {vocab_size - 1}")
        if request.logprobs is not None and request.logprobs > vocab_size:
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
        """Whether new requests are refused."""
        return self._draining

    def drain(self) -> None:
        """From here on nothing new is taken; texts that run or wait are finished."""
        self._draining = True

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Waits until nothing runs or waits, or `timeout` seconds are over. Returns whether it is idle."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.busy and not self._waiting, timeout)

    def close(self) -> None:
        """Cancels what runs or waits, and ends the thread."""
        with self._changed:
            self._draining = True
            self._closing = True
            for generation in self._unfinished():
                generation.cancelled = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        self.step()
        self._reader.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # What only the engine's thread calls, or the caller where there is none.

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
        """Reads one chunk of a prompt and writes one token of each text, or several of one that is alone.
        Returns whether there was anything to do.
        """
        with self._changed:
            self._end_cancelled_and_late()
            self._admit()
        reads = bool(self._reading)
        with torch.inference_mode():
            if reads:
                slot, generation = self._reading.popleft()
                self._read_chunk(slot, generation)
                if slot.generation is generation and not slot.writing:
                    # Behind the others: a short prompt does not wait for all of a long one.
                    self._reading.append((slot, generation))
            writing = [(slot, generation) for slot, generation in self._running() if slot.writing]
            if writing:
                self._write(writing)
        worked = reads or bool(writing)
        if worked:
            self.steps += 1
        return worked

    def _running(self) -> list[tuple[_Slot, Generation]]:
        """The slots in use, each with its text, by number."""
        return [(slot, slot.generation) for slot in self._slots if slot.generation is not None]

    def _unfinished(self) -> list[Generation]:
        return [*self._waiting, *(generation for _, generation in self._running())]

    def _end_cancelled_and_late(self) -> None:
        now = time.monotonic()
        for generation in self._unfinished():
            if generation.cancelled:
                self._finish(generation, "cancelled")
            elif generation.is_late(now):
                self._finish(generation, "timeout")

    def _finish(self, generation: Generation, reason: str) -> None:
        with self._changed:
            for slot, running in self._running():
                if running is generation:
                    slot.release()
                    if (slot, generation) in self._reading:
                        self._reading.remove((slot, generation))
            if generation in self._waiting:
                self._waiting.remove(generation)
            self._changed.notify_all()
        self.ended[reason] += 1
        generation.finish_reason = reason
        generation.deliver(None)

    def _give_up(self) -> None:
        """After a failed step: the cache may be half written, perhaps with values that are not finite."""
        for slot, generation in self._running():
            self._spoilt(slot)
            self._finish(generation, "error")

    def _spoilt(self, slot: _Slot) -> None:
        """What the slot holds may not be finite: nothing of it is used again."""
        slot.reusable = 0
        self._reader.clear(slot.index)

    def _admit(self) -> None:
        """Gives waiting requests the slots that are free."""
        while self._waiting and self.busy < len(self._slots):
            generation = self._waiting.popleft()
            try:
                slot, generation.reused = self._prepare_slot(generation.request)
            except Exception:
                self._finish(generation, "error")  # `_give_up` would not find it: it has no slot yet
                raise
            slot.begin(generation, self.steps)
            self._reader.lengths[slot.index] = generation.reused
            if self.adapters:
                self._reader.use_adapter(slot.index, slot.adapter)
            self.reused_tokens += generation.reused
            self._reading.append((slot, generation))

    def _prepare_slot(self, request: Request) -> tuple[_Slot, int]:
        """A free slot, and how many of the prompt's tokens it holds.

        They come from the slot, free or not, whose tokens agree longest with the prompt.
        """
        free = [slot for slot in self._slots if slot.generation is None]
        source = max(
            self._slots, key=lambda slot: (self._common_prefix(slot, request), slot.generation is None)
        )
        common = self._common_prefix(source, request)
        if common and source in free and common == source.reusable:
            return source, common
        # The least recently used one. Of the first rows, if one of these is free: a batch has no more rows
        # than the last slot in use.
        target = min(free, key=lambda slot: (slot.index // ROWS, slot.last_used))
        if common and target is not source:
            self._reader.copy(source.index, target.index, common)
        return target, common

    def _common_prefix(self, slot: _Slot, request: Request) -> int:
        """How many tokens the prompt can take over from a slot: complete chunks only."""
        if slot.adapter != request.adapter:
            return 0
        longest = min(slot.reusable, len(request.prompt) - 1)  # the last token's logits are always needed
        if request.score_prompt:  # a prompt is scored by reading it
            longest = min(longest, request.scored_from - 1)
        common = 0
        while common + self.chunk <= longest:
            part = slice(common, common + self.chunk)
            if slot.tokens[part] != list(request.prompt[part]):
                break
            common += self.chunk
        return common

    def _read_chunk(self, slot: _Slot, generation: Generation) -> None:
        request = generation.request
        start = len(slot.tokens)
        chunk = list(request.prompt[start : start + self.chunk])
        logits = self._reader.read([(slot.index, chunk)], every=request.score_prompt)
        self.prompt_tokens += len(chunk)
        generation.read += len(chunk)
        slot.tokens += chunk
        if len(chunk) == self.chunk:
            slot.reusable = len(slot.tokens)
        if request.score_prompt:
            if start == 0:
                generation.prompt.append(Token(chunk[0]))
            following = request.prompt[start + 1 : start + 1 + len(chunk)]
            generation.prompt += [_scored(row, i, request.logprobs or 0) for row, i in zip(logits, following)]
        if len(slot.tokens) == len(request.prompt):
            with one_thread():
                self._draw(slot, generation, logits[-1])

    def _write(self, writing: list[tuple[_Slot, Generation]]) -> None:
        if self.busy == 1:
            ((slot, generation),) = writing
            proposed = self._proposed(slot, generation)
            if proposed:
                self._write_along(slot, generation, proposed)
                return
        logits = self._reader.read([(slot.index, [slot.next_token]) for slot, _ in writing])
        with one_thread():
            for (slot, generation), row in zip(writing, logits):
                slot.tokens.append(slot.next_token)
                self._draw(slot, generation, row)

    def _proposed(self, slot: _Slot, generation: Generation) -> list[int]:
        """Tokens that may follow a text, as they did before in it; none where there are none."""
        if self._lookup is None:
            return []
        if generation.proposer is None:
            generation.proposer = self._lookup.proposer()
        left = generation.request.max_new_tokens - generation.drawn - 1  # the last one comes without
        most = min(generation.proposer.width, left)
        return generation.proposer.following([*slot.tokens, slot.next_token], most) if most > 0 else []

    def _write_along(self, slot: _Slot, generation: Generation, proposed: list[int]) -> None:
        """Reads the last token and the proposed ones, and draws what follows each, as one after another would
        be drawn: up to the first that is not the proposed one.
        """
        new = [slot.next_token, *proposed]
        logits = self._reader.read([(slot.index, new)], every=True)
        accepted = -1  # the first of `new` was drawn before
        with one_thread():
            for token, row in zip(new, logits):
                ended = slot.generation is not generation or generation.cancelled
                if ended or token != slot.next_token:
                    break
                accepted += 1
                slot.tokens.append(token)
                self._draw(slot, generation, row)
        self._reader.lengths[slot.index] = len(slot.tokens)  # what was read beyond is forgotten
        self.proposed_tokens += len(proposed)
        self.accepted_tokens += accepted
        assert generation.proposer is not None
        generation.proposer.heed(accepted == len(proposed))

    def _draw(self, slot: _Slot, generation: Generation, logits: Tensor) -> None:
        """Draws a token from logits [vocab_size], and delivers what cannot be part of a stop sequence."""
        request = generation.request
        if not logits.max().isfinite():  # or greedy drawing would go on, and the cache stay spoilt
            log.error("a text's logits are not finite: it is given up")
            self._spoilt(slot)
            self._finish(generation, "error")
            return
        if request.max_new_tokens == 0:
            self._finish(generation, "length")
            return
        try:
            slot.next_token = self._drawn(generation, logits, slot.tokens[len(request.prompt) :])
        except ValueError as error:  # only this text: a schema may ask for more than its automaton may do
            log.error("a text's form cannot be followed any further: %s", error)
            self._finish(generation, "error")
            return
        slot.writing = True
        generation.drawn += 1
        self.generated_tokens += 1
        if request.logprobs is None:
            token = Token(slot.next_token)
        else:
            token = _scored(logits, slot.next_token, request.logprobs)
        self._deliver(generation, token)

    def _drawn(self, generation: Generation, logits: Tensor, written: Sequence[int]) -> int:
        """The id of the next token, from logits [vocab_size] and what is written so far. Raises ValueError
        where the text's form allows none.
        """
        request, form = generation.request, generation.form
        if not request.penalties.change_nothing:
            logits = request.penalties.apply(logits, request.prompt, written)
        if form is not None:
            logits = form.mask(logits)
        drawn = int(sample(logits, request.temperature, request.top_k, request.top_p, generation.generator))
        if form is not None:
            form.push(drawn)
        return drawn

    def _deliver(self, generation: Generation, token: Token) -> None:
        held = generation.held
        held.append(token)
        ready, stopped = split_at_stop([token.id for token in held], generation.stops)
        formed = generation.form is not None and generation.form.complete
        complete = formed or generation.drawn == generation.request.max_new_tokens
        if complete and not stopped:
            ready = len(held)
        for token in held[:ready]:
            generation.deliver(token)
        del held[:ready]
        if stopped:
            generation.ending = held
            self._finish(generation, "stop")
        elif complete:
            self._finish(generation, "stop" if formed else "length")


def _scored(logits: Tensor, i: int, top: int) -> Token:
    """Token `i` with its log-probability and the `top` likeliest, from logits [vocab_size]."""
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top)
    return Token(i, logprobs[i].item(), tuple(zip(best.indices.tolist(), best.values.tolist())))
