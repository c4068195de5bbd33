"""The graded exercises of week 12: positions in a shared cache, temperature 0, slots, an engine, prefixes,
streamed text, stop texts, events, delays.
"""

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from shared.sampling.generate import sample
from shared.sampling.text import TextStream, stream_text
from shared.serving.answer import chunks
from shared.serving.engine import Engine
from shared.serving.load import percentile
from shared.serving.slots import SlotCache

Whole = TypeVar("Whole", str, bytes)


def _parts(whole: Whole, largest: int, generator: Generator) -> list[Whole]:
    """A text or bytes, cut by chance into parts of at most `largest`."""
    parts = []
    while whole:
        n = random_int(generator, 1, largest + 1)
        parts.append(whole[:n])
        whole = whole[n:]
    return parts


# ---- 1. rows of different lengths in one cache


def store_keys(cache: Tensor, lengths: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _stored(cache, lengths, new, places=lengths, seen=lengths + 1)


def _stored(
    cache: Tensor, lengths: Tensor, new: Tensor, *, places: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """places: where the new keys go. seen: how many keys each row may look at."""
    cache = cache.clone()
    cache[torch.arange(len(cache)), places] = new
    return cache, lengths + 1, torch.arange(cache.size(1)) < seen[:, None]


def _one_place(cache: Tensor, lengths: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    longest = lengths.max().expand_as(lengths)
    return _stored(cache, lengths, new, places=longest, seen=lengths + 1)


def _longest_mask(cache: Tensor, lengths: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    longest = lengths.max().expand_as(lengths)
    return _stored(cache, lengths, new, places=lengths, seen=longest + 1)


def _not_advanced(cache: Tensor, lengths: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stored, _, mask = store_keys(cache, lengths, new)
    return stored, lengths, mask


def _cache_cases(generator: Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
    def case(rows: int, time: int, channel: int) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.randperm(time, generator=generator)[:rows]
        cache = torch.randn(rows, time, channel, generator=generator)
        return cache, lengths, torch.randn(rows, channel, generator=generator)

    empty_and_full = (torch.zeros(2, 3, 1), torch.tensor([0, 2]), torch.ones(2, 1))
    sizes = [(2, 5, 3), (3, 6, 2), (4, 9, 4), (2, 8, 1), (5, 12, 3), (1, 4, 2)]
    return [*(case(*size) for size in sizes), empty_and_full]


STORE_KEYS = Exercise(
    task="""Several texts share one cache, one row each. `cache` is float32 [rows, time, channel], of which
    row i holds `lengths[i]` keys (int64 [rows]); what lies behind them is old and means nothing. `new` is
    float32 [rows, channel], the key of each row's newest token. Return three things: the cache with the new
    keys stored, a new tensor; the new lengths; and bool [rows, time], which keys each row's newest token may
    see.""",
    reference=store_keys,
    cases=_cache_cases,
    forbids=(SlotCache,),
    mistakes=(
        Mistake(
            "one position for all rows",
            _one_place,
            "Every key was stored at the place that the longest row has come to. Each row has a length of its"
            " own; the shorter ones now have a gap with old keys in it.",
        ),
        Mistake(
            "position not advanced",
            _not_advanced,
            "The lengths are still the old ones. The next token is stored over this one, and stands at the"
            " same position: the text forgets as it is written.",
        ),
        Mistake(
            "the last key overwritten",
            lambda cache, lengths, new: _stored(cache, lengths, new, places=lengths - 1, seen=lengths + 1),
            "The new key is at lengths - 1, where the row's last one was. With n keys, they are at 0 to n -"
            " 1, and n is free.",
        ),
        Mistake(
            "the new token does not see itself",
            lambda cache, lengths, new: _stored(cache, lengths, new, places=lengths, seen=lengths),
            "The mask ends before the new key. A token sees itself too; at the first step it would see"
            " nothing at all.",
        ),
        Mistake(
            "the mask of the longest row",
            _longest_mask,
            "All rows may look as far as the longest one. The shorter rows then see what an earlier text has"
            " left in their slot.",
        ),
    ),
    hints=(
        "Row i has keys at the places 0 to lengths[i] - 1. Which is the next free one?",
        "cache[torch.arange(rows), lengths] = new writes one place in each row. Work on cache.clone().",
        (
            "cache = cache.clone(); cache[torch.arange(len(cache)), lengths] = new; return cache, lengths +"
            " 1, torch.arange(cache.size(1)) <= lengths[:, None]."
        ),
    ),
)


# ---- 2. a temperature for each row


def row_probabilities_at(logits: Tensor, temperatures: Tensor) -> Tensor:
    greedy = torch.zeros_like(logits)
    greedy[torch.arange(len(logits)), logits.argmax(-1)] = 1
    warm = (logits / torch.where(temperatures > 0, temperatures, 1)[:, None]).softmax(-1)
    return torch.where(temperatures[:, None] > 0, warm, greedy)


def _multiplied(logits: Tensor, temperatures: Tensor) -> Tensor:
    warm = (logits * temperatures[:, None]).softmax(-1)
    return torch.where(temperatures[:, None] > 0, warm, row_probabilities_at(logits, temperatures))


def _all_greedy(logits: Tensor, temperatures: Tensor) -> Tensor:
    if (temperatures == 0).any():
        temperatures = torch.zeros_like(temperatures)
    return row_probabilities_at(logits, temperatures)


def _temperature_cases(generator: Generator) -> list[tuple[Tensor, Tensor]]:
    def case(temperatures: list[float], vocab: int, spread: float = 2) -> tuple[Tensor, Tensor]:
        logits = torch.randn(len(temperatures), vocab, generator=generator) * spread
        logits[:, 1] = logits[:, 3] = logits.amax(-1) + 0.5  # two that are equally likely
        return logits, torch.tensor(temperatures)

    return [
        case([0.0, 1.0, 0.5], 5),
        case([0.7, 0.0], 8),
        case([2.0, 0.3, 0.0, 0.0], 6),
        case([0.0], 7),
        case([0.9, 1.5], 4),
        case([1.0, 0.5, 0.0], 6, spread=200),
    ]


ROW_PROBABILITIES_AT = Exercise(
    task="""Each request has a temperature of its own. `logits` is float32 [rows, vocab], `temperatures`
    float32 [rows]. Return float32 [rows, vocab]: the probabilities to draw from, softmax(logits /
    temperature) in each row. Temperature 0 is greedy: all the probability on the largest logit, the first one
    where two are equal.""",
    reference=row_probabilities_at,
    cases=_temperature_cases,
    forbids=(sample,),
    mistakes=(
        Mistake(
            "division by zero",
            lambda logits, temperatures: (logits / temperatures[:, None]).softmax(-1),
            "At temperature 0 the logits become infinite, and infinity minus infinity is nan. Greedy is a"
            " case of its own.",
        ),
        Mistake(
            "a very small temperature for 0",
            lambda logits, temperatures: (logits / temperatures.clamp(min=1e-4)[:, None]).softmax(-1),
            "This is nearly greedy. But where two logits are equal, each gets half, and the text differs from"
            " run to run.",
        ),
        Mistake(
            "one temperature for all rows",
            lambda logits, temperatures: row_probabilities_at(
                logits, temperatures[:1].expand_as(temperatures)
            ),
            "All rows got the first row's temperature. The rows of a batch are requests of different people.",
        ),
        Mistake(
            "multiplied by the temperature",
            _multiplied,
            "The logits were multiplied. A high temperature must make the choice more even, so divide.",
        ),
        Mistake(
            "all greedy where one is",
            _all_greedy,
            "As soon as one request is greedy, all are. Choose row by row, with torch.where.",
        ),
    ),
    hints=(
        "Work out both for all rows, and choose row by row in the end.",
        "torch.where(temperatures > 0, temperatures, 1) can be divided by. argmax gives the first of equals.",
        (
            "greedy = one_hot(logits.argmax(-1), vocab).float(); return torch.where(temperatures[:, None] >"
            " 0, (logits / safe[:, None]).softmax(-1), greedy)."
        ),
    ),
)


# ---- 3. who gets a free slot


def next_slots(
    slots: list[str], waiting: list[str], ended: list[str], cancelled: list[str]
) -> tuple[list[str], list[str]]:
    return _filled(_left(slots, [*ended, *cancelled]), _without(waiting, cancelled))


def _left(slots: list[str], gone: list[str]) -> list[str]:
    """The slots, those of who has gone free."""
    return ["" if name in gone else name for name in slots]


def _without(names: list[str], gone: list[str]) -> list[str]:
    return [name for name in names if name not in gone]


def _filled(slots: list[str], waiting: list[str], last: bool = False) -> tuple[list[str], list[str]]:
    """last: the last in line comes first."""
    filled, waiting = list(slots), list(waiting)
    for i, name in enumerate(slots):
        if not name and waiting:
            filled[i] = waiting.pop(-1 if last else 0)
    return filled, waiting


def _static(
    slots: list[str], waiting: list[str], ended: list[str], cancelled: list[str]
) -> tuple[list[str], list[str]]:
    left, queue = _left(slots, [*ended, *cancelled]), _without(waiting, cancelled)
    if any(left):
        return left, queue
    return _filled(left, queue)


def _last_first(
    slots: list[str], waiting: list[str], ended: list[str], cancelled: list[str]
) -> tuple[list[str], list[str]]:
    return _filled(_left(slots, [*ended, *cancelled]), _without(waiting, cancelled), last=True)


def _moved_up(
    slots: list[str], waiting: list[str], ended: list[str], cancelled: list[str]
) -> tuple[list[str], list[str]]:
    left = _left(slots, [*ended, *cancelled])
    going_on = [name for name in left if name]
    free = [""] * (len(left) - len(going_on))
    return _filled(going_on + free, _without(waiting, cancelled))


def _can_be_in_line(slots: list[str], waiting: list[str], ended: list[str], cancelled: list[str]) -> bool:
    """Whether every request has a name of its own and one place, and only those that are there have left."""
    running = [name for name in slots if name]
    names = [*running, *waiting]
    return (
        len(slots) >= 1
        and all(names)
        and len(set(names)) == len(names)
        and set(ended) <= set(running)
        and set(cancelled) <= set(names)
    )


def _slot_cases(generator: Generator) -> list[tuple[list[str], list[str], list[str], list[str]]]:
    def case(
        n: int, empty: int, waiting: int, ended: int, cancelled: int
    ) -> tuple[list[str], list[str], list[str], list[str]]:
        names = [f"r{i}" for i in torch.randperm(99, generator=generator)[: n + waiting].tolist()]
        slots, queue = names[:n], names[n:]
        for i in torch.randperm(n, generator=generator)[:empty].tolist():
            slots[i] = ""
        running = [s for s in slots if s]
        order = torch.randperm(len(running), generator=generator).tolist()
        gone = [running[i] for i in order[: ended + 1]]
        return slots, queue, gone[:ended], [*gone[ended:], *queue[1 : 1 + cancelled]]

    return [
        case(4, 0, 4, 1, 1),
        case(3, 1, 3, 0, 1),
        case(5, 1, 2, 1, 1),
        case(4, 1, 5, 1, 2),
        case(6, 2, 3, 2, 1),
        (["a", "b", ""], ["c", "d"], ["a", "b"], []),
        (["a", "b"], [], ["a"], []),
        (["a", "b"], ["c", "d"], ["a"], ["a", "d"]),
    ]


NEXT_SLOTS = Exercise(
    task="""Between two steps of the engine. `slots` has the name of the request that is written in each slot,
    "" for a free one. `waiting` has those that wait, first come first. `ended` have written their last token
    in the step before; the clients of `cancelled` have gone: they may be in a slot or in the queue. Return
    the new slots and the new queue: all of those have left, and every free slot is given to the next in line,
    the first slots first. A text that goes on keeps its slot: its keys lie there.""",
    reference=next_slots,
    cases=_slot_cases,
    valid=_can_be_in_line,
    forbids=(Engine,),
    mistakes=(
        Mistake(
            "slot leaked after a cancel",
            lambda slots, waiting, ended, cancelled: next_slots(
                slots, _without(waiting, cancelled), ended, []
            ),
            "A request whose client has gone keeps its slot, and nobody will ever end it. After as many such"
            " clients as there are slots, the server stands still.",
        ),
        Mistake(
            "static batching",
            _static,
            "New requests wait until all slots are empty. The short texts' slots then stand idle until the"
            " longest is done: that is what continuous batching ends.",
        ),
        Mistake(
            "a cancelled request is let in",
            lambda slots, waiting, ended, cancelled: _filled(_left(slots, [*ended, *cancelled]), waiting),
            "One that was cancelled while it waited gets a slot all the same, and writes for nobody. Look for"
            " it in the queue too.",
        ),
        Mistake(
            "last come, first served",
            _last_first,
            "The slots go to those who came last. On a busy server the first in line may wait for ever.",
        ),
        Mistake(
            "texts change their slots",
            _moved_up,
            "The texts that go on have moved up to the front. Their keys and values are still where they"
            " were: each now reads another text's.",
        ),
    ),
    hints=(
        "First let everybody leave who must, from the slots and from the queue. Then fill.",
        (
            'gone = {*ended, *cancelled}; put "" where one of them was. Go through the slots in order, and'
            " take waiting.pop(0) for each free one."
        ),
        (
            'left = ["" if s in gone else s for s in slots]; queue = [w for w in waiting if w not in'
            ' cancelled]; return [s or (queue.pop(0) if queue else "") for s in left], queue.'
        ),
    ),
)


# ---- 4. an engine


class TinyEngine:
    def __init__(self, model: GPT, slots: int):
        self.model = model
        self.cache = SlotCache(model.config, slots)
        self.slots: list[int | None] = [None] * slots
        self.waiting: list[int] = []
        self.requests: list[tuple[list[int], int, int | None]] = []
        self.texts: list[list[int]] = []
        self.lengths = [0] * slots
        """How many tokens of each slot's text the cache has."""

    def submit(self, prompt: list[int], max_new_tokens: int, stop: int | None = None) -> int:
        number = len(self.requests)
        self.requests.append((prompt, max_new_tokens, stop))
        self.texts.append([])
        self.waiting.append(number)
        return number

    def step(self) -> list[int | None]:
        self.admit()
        seated = list(self.slots)
        if seated.count(None) < len(seated):
            for slot, token in self.write(seated).items():
                self.give(slot, token)
        return seated

    def admit(self) -> None:
        """Gives the free slots to those that wait."""
        for slot, number in enumerate(self.slots):
            if number is None and self.waiting:
                self.enter(slot, self.waiting.pop(0))

    def enter(self, slot: int, number: int) -> None:
        """Lets a request into a slot, and reads its prompt but for the last token."""
        self.slots[slot] = number
        self.lengths[slot] = 0
        self.read(slot, self.requests[number][0][:-1])

    def read(self, slot: int, ids: list[int]) -> None:
        """Reads ids into a slot's part of the cache."""
        if ids:
            self.model(torch.tensor([ids]), self.cache.rows(slot, [self.lengths[slot]]))
        self.lengths[slot] += len(ids)

    def last_token(self, number: int) -> int:
        """What a text is fed next."""
        return [*self.requests[number][0], *self.texts[number]][-1]

    def write(self, seated: list[int | None]) -> dict[int, int]:
        """The next token of the text in each slot, by one pass."""
        ids = [[0 if number is None else self.last_token(number)] for number in seated]
        logits = self.model(torch.tensor(ids), self.cache.rows(0, self.lengths_of(seated)))
        drawn = {}
        for slot, number in enumerate(seated):
            if number is not None:
                self.lengths[slot] += 1
                drawn[slot] = int(logits[slot, -1].argmax())
        return drawn

    def lengths_of(self, seated: list[int | None]) -> list[int | None]:
        """How long each row is in the cache; None for an idle one."""
        return [None if number is None else self.lengths[slot] for slot, number in enumerate(seated)]

    def give(self, slot: int, token: int) -> None:
        """Gives a text its token, and its slot away where that was the last."""
        number = self.slots[slot]
        _, max_new_tokens, stop = self.requests[number]
        if token != stop:
            self.texts[number].append(token)
        if token == stop or len(self.texts[number]) == max_new_tokens:
            self.slots[slot] = None


TINY_ENGINE_STUB = """class TinyEngine:
    def __init__(self, model, slots: int):
        self.model = model
        self.cache = SlotCache(model.config, slots)
        self.slots = [None] * slots  # the number of the request in each slot
        self.waiting = []  # the numbers of those in line
        self.texts = []  # the tokens that each request has been given, by its number
        # your code here

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int,
        stop: int | None = None,
    ) -> int:
        # the number of the request: 0, 1, 2, ...
        # your code here
        ...

    def step(self) -> list[int | None]:
        # who had which slot in this step
        # your code here
        ...
"""
VOCAB, CONTEXT = 11, 24
"""Of the model whose texts an engine is tried with."""


def _tiny_gpt(seed: int) -> GPT:
    """A GPT with weights so large that its likeliest token depends on all that it has read."""
    model = GPT(GPTConfig(VOCAB, CONTEXT, n_layer=1, n_head=2, n_embd=8, tie_weights=False))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _greedy(model: GPT, prompt: list[int], new_tokens: int) -> tuple[list[int], bool]:
    """The text of a prompt alone, and whether each token was the likeliest by far: no rounding changes it."""
    ids, clear = list(prompt), True
    for _ in range(new_tokens):
        best = model(torch.tensor([ids]))[0, -1].topk(2)
        clear = clear and bool(best.values[0] - best.values[1] > 1e-2)
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], clear


EngineRequest = tuple[list[int], int, int | None]


def _engine_cases(generator: Generator) -> list[tuple]:
    def request(model: GPT, length: int, new_tokens: int, stops_at: int | None) -> EngineRequest:
        """stops_at: the place of the token at which it ends; None: it has no stop. Where the token comes
        before that place already, it ends there.
        """
        while True:
            prompt = torch.randint(VOCAB, (length,), generator=generator).tolist()
            text, clear = _greedy(model, prompt, new_tokens)
            if clear:
                return prompt, new_tokens, None if stops_at is None else text[stops_at]

    def case(slots: int, *arrivals: list[tuple[int, int, int | None]]) -> tuple[int, int, list]:
        """arrivals: for each of the first steps, the (length of prompt, new tokens, stop) of who comes."""
        while True:
            seed = random_int(generator, 0, 10**6)
            model = _tiny_gpt(seed)
            if len(set(_greedy(model, [1], 6)[0])) > 2:  # not one token again and again
                break
        return seed, slots, [[request(model, *wish) for wish in wishes] for wishes in arrivals]

    def some(count: int) -> list[tuple[int, int, int | None]]:
        return [
            (random_int(generator, 1, 9), random_int(generator, 1, 8), None if i % 2 else 3 * i % 2)
            for i in range(count)
        ]

    return [
        case(1, [(3, 4, None)]),
        case(1, [(1, 3, None), (4, 5, None)]),
        case(2, [(2, 6, None), (5, 6, None)]),
        case(2, [(6, 9, None), (2, 3, None), (3, 5, None)]),
        case(3, [(4, 1, None), (3, 5, 0), (2, 7, 2), (5, 4, None), (2, 3, None)]),
        case(2, [(3, 8, None)], [], [(7, 4, None)], *[[], []], [(1, 6, None), (2, 2, None)]),
        case(2, [], [(4, 3, 2)], [(2, 5, None)], *[[] for _ in range(9)], [(9, 15, None)]),
        case(3, some(5), [], some(2), some(1)),
        case(4, some(3), some(4)),
    ]


def _engine_can(seed: int, slots: int, arrivals: list[list[EngineRequest]]) -> bool:
    """Whether it is what the task allows."""
    return slots >= 1 and all(
        len(prompt) >= 1
        and new_tokens >= 1
        and len(prompt) + new_tokens <= CONTEXT
        and all(0 <= token < VOCAB for token in prompt)
        for requests in arrivals
        for prompt, new_tokens, _ in requests
    )


@dataclass
class _WatchedStep:
    """What one step of an engine did."""

    seated: list[int | None]
    slots: list[int | None]
    waiting: list[int]
    passes: list[tuple[int, int]]
    """The rows and the tokens of each row of the forward passes."""


def _watched_step(engine: Any, passes: list[tuple[int, int]]) -> _WatchedStep:
    passes.clear()
    seated = building.method(engine, "step")()
    if not isinstance(seated, list | tuple):
        raise NotRight(
            f"step returns {type(seated).__name__}, and a list with one entry for each slot is wanted: the"
            " number of the request that had it in this step, or None."
        )
    for name in ("slots", "waiting", "texts"):
        if not hasattr(engine, name):
            raise NotRight(f"the engine has no attribute `{name}`, which the stub makes in __init__.")
    return _WatchedStep(list(seated), list(engine.slots), list(engine.waiting), list(passes))


def _observe_engine(
    answer: Callable, seed: int, slots: int, arrivals: list[list[EngineRequest]]
) -> Iterator[tuple[str, Any]]:
    model = _tiny_gpt(seed)
    passes: list[tuple[int, int]] = []
    model.token_embedding.register_forward_pre_hook(lambda _, inputs: passes.append(tuple(inputs[0].shape)))
    engine = answer(model, slots)
    numbers, steps = [], []
    most = len(arrivals) + sum(new_tokens for requests in arrivals for _, new_tokens, _ in requests) + 2
    while len(steps) < most:
        for prompt, new_tokens, stop in arrivals[len(steps)] if len(steps) < len(arrivals) else []:
            given = list(prompt)
            numbers.append(building.method(engine, "submit")(given, new_tokens, stop))
            if given != prompt:
                raise NotRight("submit changes the list that it is given; the prompt belongs to the client.")
        steps.append(_watched_step(engine, passes))
        if len(steps) >= len(arrivals) and not steps[-1].waiting and not _seats(steps[-1].slots):
            break
    yield "what submit returns", numbers
    yield "the texts", [list(text) for text in engine.texts]
    yield "who had which slot, step by step", [step.seated for step in steps]
    yield "the slots after each step", [step.slots for step in steps]
    yield "the line after each step", [step.waiting for step in steps]
    steps.append(_watched_step(engine, passes))
    yield "who had which slot in a step with nothing to do", steps[-1].seated
    _runs_as_told(steps, slots, [len(prompt) for requests in arrivals for prompt, _, _ in requests])


def _seats(slots: list[int | None]) -> set[int]:
    """The numbers of those that have a slot."""
    return {number for number in slots if number is not None}


def _runs_as_told(steps: list[_WatchedStep], slots: int, lengths: list[int]) -> None:
    """Raises NotRight where a step runs other forward passes than the task tells. lengths: of the prompts."""
    before: set[int] = set()
    for step in steps:
        seated = _seats(step.seated)
        joined = seated - before
        before = seated
        if not seated and step.passes:
            raise NotRight(
                "a step in which nobody has a slot runs a forward pass. There is no text that could be given"
                " a token: look first whether a slot is taken."
            )
        if max((rows for rows, _ in step.passes), default=0) > slots:
            raise NotRight(f"a pass has more rows than there are slots, {slots}.")
        if seated:
            _one_pass_for_all(step.passes, len(joined), [lengths[i] - 1 for i in joined if lengths[i] > 1])


def _one_pass_for_all(passes: list[tuple[int, int]], joined: int, to_read: list[int]) -> None:
    """Raises NotRight where the passes of a step are not those that read the prompts, and one for all texts.

    joined: how many requests did. to_read: the tokens of each prompt but its last, where there are any.
    """
    if len(passes) > joined + 1:
        raise NotRight(
            f"a step in which {joined} joined ran {len(passes)} forward passes. One for"
            " each new prompt, and one for all texts together: that is what the weights are fetched for."
        )
    if not passes:
        raise NotRight("a step in which somebody has a slot runs no forward pass.")
    *read, (_, newest) = passes
    if newest > 1 and not joined:
        raise NotRight(
            "a step in which nobody joined feeds more than one token of a text. What has been read is in"
            " the cache: only the newest token is new."
        )
    if len(read) > len(to_read):
        raise NotRight(
            "a prompt of one token has a pass of its own. There is nothing to read before its last token,"
            " which the pass of all feeds."
        )
    if len(read) < len(to_read) or newest > 1:
        raise NotRight(
            "a text that has just joined is not in the pass of all texts, which feeds each its last token:"
            " a new one the last of its prompt."
        )
    if sorted(tokens for _, tokens in read) != sorted(to_read):
        raise NotRight(
            "a prompt is read with another number of tokens than all but its last. That one is fed in the"
            " pass of all: fed before as well, it is computed twice."
        )


class _LongestPosition(TinyEngine):
    def lengths_of(self, seated: list[int | None]) -> list[int | None]:
        longest = max(self.lengths[slot] for slot, number in enumerate(seated) if number is not None)
        return [None if number is None else longest for number in seated]


class _KeepsSlot(TinyEngine):
    def give(self, slot: int, token: int) -> None:
        number = self.slots[slot]
        super().give(slot, token)
        self.slots[slot] = number

    def write(self, seated: list[int | None]) -> dict[int, int]:
        going_on = [None if n is None or self.has_ended(n) else n for n in seated]
        return super().write(going_on) if _seats(going_on) else {}

    def has_ended(self, number: int) -> bool:
        """Whether a text is as long as it may be; a stop is forgotten, and it is written on."""
        return len(self.texts[number]) == self.requests[number][1]


class _ReadsAgain(TinyEngine):
    def write(self, seated: list[int | None]) -> dict[int, int]:
        drawn = {}
        for slot, number in enumerate(seated):
            if number is not None:
                ids = [*self.requests[number][0], *self.texts[number]]
                logits = self.model(torch.tensor([ids]), self.cache.rows(slot, [0]))
                drawn[slot] = int(logits[0, -1].argmax())
        return drawn


class _PassForEach(TinyEngine):
    def write(self, seated: list[int | None]) -> dict[int, int]:
        drawn = {}
        for slot in range(len(seated)):
            alone = [number if i == slot else None for i, number in enumerate(seated)]
            if _seats(alone):
                drawn |= super().write(alone)
        return drawn


class _WaitsForAll(TinyEngine):
    def admit(self) -> None:
        if not _seats(self.slots):
            super().admit()


class _GivesTheStop(TinyEngine):
    def give(self, slot: int, token: int) -> None:
        number = self.slots[slot]
        super().give(slot, token)
        if token == self.requests[number][2]:
            self.texts[number].append(token)


class _SeesFormerText(TinyEngine):
    def enter(self, slot: int, number: int) -> None:
        self.slots[slot] = number
        self.read(slot, self.requests[number][0][:-1])


class _LastTokenTwice(TinyEngine):
    def enter(self, slot: int, number: int) -> None:
        self.slots[slot] = number
        self.lengths[slot] = 0
        self.read(slot, self.requests[number][0])


class _NotAdvanced(TinyEngine):
    def write(self, seated: list[int | None]) -> dict[int, int]:
        drawn = super().write(seated)
        for slot in drawn:
            self.lengths[slot] -= 1
        return drawn


class _LastComeFirst(TinyEngine):
    def admit(self) -> None:
        for slot, number in enumerate(self.slots):
            if number is None and self.waiting:
                self.enter(slot, self.waiting.pop())


class _OneTooFew(TinyEngine):
    def submit(self, prompt: list[int], max_new_tokens: int, stop: int | None = None) -> int:
        return super().submit(prompt, max(1, max_new_tokens - 1), stop)


class _OneAtATime(TinyEngine):
    def admit(self) -> None:
        free = [slot for slot, number in enumerate(self.slots) if number is None]
        if free and self.waiting:
            self.enter(free[0], self.waiting.pop(0))


class _WhoIsLeft(TinyEngine):
    def step(self) -> list[int | None]:
        super().step()
        return list(self.slots)


TINY_ENGINE = Exercise(
    task="""Build the engine: many texts in one cache, which come and go between two steps. `model` is a GPT
    with frozen weights, `slots` is how many texts can be written at a time. A text must be what the model
    writes for its prompt alone with temperature 0, whoever else is there.

    `submit(prompt, max_new_tokens, stop)` lets a request wait in line, and returns its number: 0 for the
    first, then 1, 2 and so on. `prompt` is a list of ids, at least one; `stop` is an id or None. Requests may
    come at any time, while others are written too.

    `step()` does this:

    - As long as a slot is free and somebody waits, the first free slot goes to the first in line. All of the
      prompt but its last token is read into that slot: one pass for each prompt, and none where it has only
      one token. What was read once is never read again.
    - *One* forward pass feeds each text that has a slot its last token, and every such text, also one that
      has just joined, is given the likeliest token that follows.
    - A text ends when it has been given `max_new_tokens` tokens, or where the token is its `stop`, which is
      not given to it. Its slot is free again after the step.

    Return who had which slot in this pass: a list of `slots` entries, the number of a request or None. A step
    with nothing to do runs no pass. Keep `slots`, `waiting` and `texts` as the stub says.

    `SlotCache` is the cache of section 2. `model(ids, cache.rows(first, lengths))` is a forward pass for the
    slots from number `first` on: `ids` int64 [rows, time], `lengths` a list with the number of tokens that
    each of these slots has in the cache before (None for a row that is only there to fill the batch, whose
    slot is left as it is). It stores the new keys, and returns logits [rows, time, vocab].""",
    reference=TinyEngine,
    stub=TINY_ENGINE_STUB,
    cases=_engine_cases,
    observe=_observe_engine,
    valid=_engine_can,
    forbids=(generate, Engine),
    points=3,
    mistakes=(
        Mistake(
            "the longest row's position for all",
            _LongestPosition,
            "All rows were given the length of the longest. The shorter texts stand at a wrong position, and"
            " see what lies behind their end. Each row has its own length.",
        ),
        Mistake(
            "the former text is still seen",
            _SeesFormerText,
            "A new text goes on at the length of the one that had the slot before, and sees its keys. With a"
            " new request the slot's length is 0 again; nothing needs to be wiped.",
        ),
        Mistake(
            "the last token is read twice",
            _LastTokenTwice,
            "The whole prompt was read into the cache, and then its last token was fed once more. It now"
            " stands there twice. Read prompt[:-1], and feed the last one in the pass of all.",
        ),
        Mistake(
            "the length does not grow",
            _NotAdvanced,
            "Each new token is stored over the one before: the length stays that of the prompt. A token that"
            " was fed is in the cache, and counts.",
        ),
        Mistake(
            "static batching",
            _WaitsForAll,
            "New requests wait until every text has ended. The slots of the short ones stand idle until then:"
            " look for free slots in every step.",
        ),
        Mistake(
            "an ended text keeps its slot",
            _KeepsSlot,
            "The slot is never given back. Once as many texts have ended as there are slots, nobody gets in.",
        ),
        Mistake(
            "the token that ends a text is given out",
            _GivesTheStop,
            "The stop token is in the text. It says that the text is over; it is not a part of it.",
        ),
        Mistake(
            "one token too few",
            _OneTooFew,
            "The texts are a token shorter than asked for. Compare the length after the token was given.",
        ),
        Mistake(
            "last come, first served",
            _LastComeFirst,
            "The free slots go to those who came last. On a busy server the first in line may wait for ever.",
        ),
        Mistake(
            "one newcomer a step",
            _OneAtATime,
            "Only one request joins in a step, though more slots are free and more wait. Fill them all.",
        ),
        Mistake(
            "who is left, not who had a slot",
            _WhoIsLeft,
            "The list was made after the slots of the ended texts were freed. A text that ends in a step had"
            " its slot in that step's pass: copy the slots before you free any, and return the copy.",
        ),
        Mistake(
            "a pass for each text",
            _PassForEach,
            "The texts are right, but each has a forward pass of its own, which fetches all weights again."
            " Put the last tokens of all texts into one tensor [slots, 1].",
        ),
        Mistake(
            "everything is read again",
            _ReadsAgain,
            "The texts are right, but in each step every text is read from its beginning. The keys are in the"
            " cache: feed the newest token only.",
        ),
    ),
    hints=(
        (
            "How many tokens of a text are in the cache when its next one is drawn? All that it has, prompt"
            " and new ones, but the last: that one is fed now."
        ),
        (
            "First go through the slots, and let somebody in wherever one is None. Then make ids [slots, 1]"
            " and a list of lengths, with 0 and None for idle rows, run the model once, and go through the"
            " slots again with logits[slot, -1].argmax()."
        ),
        (
            "With written = [*prompt, *text]: on joining model(torch.tensor([prompt[:-1]]), cache.rows(slot,"
            " [0])) where that is not empty; in the pass ids[slot] = [written[-1]], lengths[slot] ="
            " len(written) - 1. Keep a copy of self.slots before you free any, and return it."
        ),
    ),
)


# ---- 5. what need not be read again


def reusable_tokens(prompt: list[int], kept: list[int], chunk: int) -> int:
    return _common(prompt, kept[: len(prompt) - 1]) // chunk * chunk


def _common(prompt: list[int], kept: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(prompt, kept)) if a != b), min(len(prompt), len(kept)))


def _prefix_cases(generator: Generator) -> list[tuple[list[int], list[int], int]]:
    def case(common: int, more: int, kept: int, chunk: int) -> tuple[list[int], list[int], int]:
        def draw(n: int) -> list[int]:
            return torch.randint(0, 50, (n,), generator=generator).tolist()

        begin = draw(common)
        prompt = [*begin, 50, *draw(more)] if more else list(begin)
        others = [*begin, 51, *draw(kept)] if kept else list(begin)
        return prompt, others, chunk

    same = case(12, 0, 0, 4)
    mixed = torch.randint(0, 50, (16,), generator=generator).tolist()
    other = [*mixed[:5], 60, *mixed[6:]]
    drawn = [case(10, 5, 3, 4), case(9, 4, 0, 3), case(3, 6, 6, 4), case(17, 0, 9, 8), case(7, 2, 4, 1)]
    return [*drawn, same, (mixed, other, 4), ([7], [7], 1), ([1, 2, 3], [], 2), ([1, 2, 3], [1, 2, 3, 4], 1)]


REUSABLE_TOKENS = Exercise(
    task="""A slot still holds the keys of the tokens `kept`, a list of ids, from a request that has ended. A
    new prompt comes, also a list of ids. Return how many of the prompt's tokens need not be read: as many as
    both begin with, rounded down to a multiple of `chunk` (prompts are read in whole chunks, and another cut
    would round differently). The last token of the prompt must always be read: the logits behind it are what
    is asked for.""",
    reference=reusable_tokens,
    cases=_prefix_cases,
    valid=lambda prompt, kept, chunk: len(prompt) >= 1 and chunk >= 1,
    forbids=(Engine,),
    mistakes=(
        Mistake(
            "nothing left to read",
            lambda prompt, kept, chunk: _common(prompt, kept) // chunk * chunk,
            "Where the whole prompt is in the cache, nothing is read, so there are no logits for the first"
            " new token. Leave at least the last one.",
        ),
        Mistake(
            "not in whole chunks",
            lambda prompt, kept, chunk: _common(prompt, kept[: len(prompt) - 1]),
            "The count is not a multiple of chunk. The rest would be read in other chunks than without reuse,"
            " and the last bits of the result would differ.",
        ),
        Mistake(
            "equal tokens anywhere",
            lambda prompt, kept, chunk: sum(a == b for a, b in zip(prompt[:-1], kept)) // chunk * chunk,
            "Tokens behind the first difference were counted too. Their keys come from another past: every"
            " layer but the first has mixed it in.",
        ),
        Mistake(
            "rounded up",
            lambda prompt, kept, chunk: -(-_common(prompt, kept[: len(prompt) - 1]) // chunk) * chunk,
            "The count was rounded up: the last chunk holds keys of tokens that this prompt does not have.",
        ),
    ),
    hints=(
        (
            "Count from the front until two tokens differ. What is the most that may come out for a prompt of"
            " n tokens?"
        ),
        "Compare prompt[:-1] with kept; n // chunk * chunk rounds down.",
        (
            "n = 0; while n < min(len(prompt) - 1, len(kept)) and prompt[n] == kept[n]: n += 1; then return n"
            " // chunk * chunk."
        ),
    ),
)


# ---- 6. bytes that come in pieces


def decoded_pieces(chunks: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [*(decoder.decode(chunk) for chunk in chunks), decoder.decode(b"", final=True)]


def _whole_text_each_time(chunks: list[bytes]) -> list[str]:
    so_far = [b"".join(chunks[: i + 1]) for i in range(len(chunks))]
    return [*(data.decode(errors="replace") for data in so_far), ""]


def _all_or_nothing(chunks: list[bytes]) -> list[str]:
    held, shown = b"", []
    for chunk in chunks:
        held += chunk
        is_whole = not _bytes_left(held)
        shown.append(held.decode() if is_whole else "")
        held = b"" if is_whole else held
    return [*shown, held.decode(errors="replace")]


def _bytes_left(data: bytes) -> int:
    """How many bytes at the end are no whole character yet. Raises UnicodeDecodeError where the others are
    not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoder.decode(data)
    return len(decoder.getstate()[0])


_CHARACTERS = "ab é߀漢字🙂👍🏽."


def _byte_cases(generator: Generator) -> list[tuple[list[bytes]]]:
    def case(text: str, largest: int, cut: int = 0) -> tuple[list[bytes]]:
        """cut: bytes that are missing at the end."""
        data = text.encode()
        return (_parts(data[: len(data) - cut], largest, generator),)

    def draw(n: int) -> str:
        return "".join(_CHARACTERS[random_int(generator, 0, len(_CHARACTERS))] for _ in range(n))

    return [
        (["€".encode()[:1], "€".encode()[1:], b" 5"],),
        case("漢字 🙂 " + draw(6), 1),
        case("🙂é" + draw(8), 3),
        case(draw(4) + "🙂", 2, cut=1),
        case("né 漢 " + draw(9), 4),
        case(draw(5) + "🙂", 3, cut=2),
        ([b"", "漢".encode()[:2], b""],),
        ([b"\xc3", b"\xa9\xc3", b"\xa9"],),  # a token that ends one character and begins another
        ([],),
    ]


DECODED_PIECES = Exercise(
    task="""A byte-level tokenizer's tokens are bytes, and a character outside ASCII has up to four of them: a
    token may end in the middle of one. `chunks` are the bytes of the tokens, in order. Return a list of
    texts: for each chunk what can be shown now, which may be "", and one more for the end. A character is
    shown with the chunk that completes it. What is still incomplete at the end becomes one
    "\N{REPLACEMENT CHARACTER}". All bytes before it are valid UTF-8.""",
    reference=decoded_pieces,
    cases=_byte_cases,
    valid=lambda chunks: _bytes_left(b"".join(chunks)) < 4,
    forbids=(TextStream, stream_text),
    mistakes=(
        Mistake(
            "UTF-8 split across chunks",
            lambda chunks: [*(chunk.decode(errors="replace") for chunk in chunks), ""],
            "Each chunk was decoded by itself. A character whose bytes lie in two chunks becomes two or more"
            " replacement characters.",
        ),
        Mistake(
            "incomplete bytes are dropped",
            lambda chunks: [*(chunk.decode(errors="ignore") for chunk in chunks), ""],
            "errors='ignore' throws the first bytes of a split character away, and then its last ones. Keep"
            " them until the rest comes.",
        ),
        Mistake(
            "all that is held or nothing",
            _all_or_nothing,
            "As long as the last bytes are no whole character, nothing is shown, not even the characters"
            " before them, which are whole. Hold back only the bytes that are still incomplete.",
        ),
        Mistake(
            "everything at the end",
            lambda chunks: [*("" for _ in chunks), b"".join(chunks).decode(errors="replace")],
            "The text is right, but it comes all at once. Then there is no need to stream.",
        ),
        Mistake(
            "the end is swallowed",
            lambda chunks: [*decoded_pieces(chunks)[:-1], ""],
            "What was held back at the end has vanished. Half a character becomes U+FFFD, so that one sees"
            " that something is missing.",
        ),
        Mistake(
            "the whole text each time",
            _whole_text_each_time,
            "Each item is all of the text so far, and not what is new. Whoever adds them up reads everything"
            " many times.",
        ),
    ),
    hints=(
        "Keep the bytes that are not a whole character yet, and put them before the next chunk.",
        (
            "codecs.getincrementaldecoder('utf-8')('replace') gives a decoder that keeps them itself;"
            " decode(chunk) returns what is complete."
        ),
        (
            "decoder = codecs.getincrementaldecoder('utf-8')('replace'); return [decoder.decode(c) for c in"
            " chunks] + [decoder.decode(b'', final=True)]."
        ),
    ),
)


# ---- 7. a text at which to stop


def shown_pieces(pieces: list[str], stop: str) -> list[str]:
    return _shown(pieces, stop)


def _may_begin(held: str, stop: str) -> int:
    """Characters of the longest end of `held` that is a beginning of `stop`."""
    return max((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)


def _shortest_beginning(held: str, stop: str) -> int:
    return min((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)


def _shown(
    pieces: list[str],
    stop: str,
    *,
    hold: Callable[[str, str], int] = _may_begin,
    keep: int = 0,
    rest: bool = True,
) -> list[str]:
    """hold: how many characters of the text so far to hold back. keep: how many of the stop's to show. rest:
    show what is held at the end.
    """
    held = ""
    shown: list[str] = []
    for piece in pieces:
        held += piece
        if stop in held:
            after = [""] * (len(pieces) - len(shown))
            return [*shown, held[: held.find(stop) + keep], *after]
        n = hold(held, stop)
        shown.append(held[: len(held) - n])
        held = held[len(held) - n :]
    return [*shown, held if rest else ""]


def _each_piece(pieces: list[str], stop: str) -> list[str]:
    shown: list[str] = []
    for piece in pieces:
        if stop in piece:
            return [*shown, piece[: piece.find(stop)], *[""] * (len(pieces) - len(shown))]
        shown.append(piece)
    return [*shown, ""]


def _late(pieces: list[str], stop: str) -> list[str]:
    """Shows first and looks then."""
    so_far = ""
    for i, piece in enumerate(pieces):
        before = len(so_far)
        so_far += piece
        if stop in so_far:
            until_stop = so_far[before : max(before, so_far.find(stop))]
            return [*pieces[:i], until_stop, *[""] * (len(pieces) - i)]
    return [*pieces, ""]


def _stop_cases(generator: Generator) -> list[tuple[list[str], str]]:
    vocabulary = ("tram", "ferry", "nine", "of", "User")

    def case(text: str, stop: str, largest: int) -> tuple[list[str], str]:
        return _parts(text, largest, generator), stop

    def words(n: int) -> str:
        return " ".join(vocabulary[random_int(generator, 0, len(vocabulary))] for _ in range(n))

    return [
        (["Yes", ".", "\n\n", "User", ": And", " then"], "\n\nUser:"),
        (["well \n", "\nUs", "ually", "\n"], "\n\nUser:"),
        case(words(4) + "ENDing", "END", 2),
        case(words(3) + " EN " + words(3) + " E", "END", 2),
        (["a##b", "### c", "#"], "###"),
        case(words(3) + "###" + words(2), "###", 4),
        (["a", "", "a", "ab", "x"], "aab"),
        (["###", " all of it"], "###"),
        ([], "END"),
    ]


SHOWN_PIECES = Exercise(
    task="""A client asks that its text ends before the text `stop`. `pieces` are the parts of the text as
    they are written. Return a list, one item longer: for each piece what is sent to the client when it comes,
    and what is sent at the end. Nothing of `stop` may ever be sent, nor anything behind it (send "" for those
    pieces). Hold back no more than needed: of what has come, the longest end that is a beginning of `stop`.
    What was held back and was not the stop is sent as soon as that is known.""",
    reference=shown_pieces,
    cases=_stop_cases,
    valid=lambda pieces, stop: bool(stop),
    forbids=(TextStream, stream_text),
    mistakes=(
        Mistake(
            "looks at each piece alone",
            _each_piece,
            "A stop text that lies across two pieces is not found. Tokens are not cut where stop texts"
            " begin.",
        ),
        Mistake(
            "shown before it is known",
            _late,
            "The stop text is found, but its first part has been sent already, and cannot be taken back. Hold"
            " back what may be its beginning.",
        ),
        Mistake(
            "the shortest beginning is held back",
            lambda pieces, stop: _shown(pieces, stop, hold=_shortest_beginning),
            'More than one end of the text may be a beginning of the stop text: of "##" both "#" and'
            ' "##" are one of "###". The shortest was held back, and the rest of the longest was sent.',
        ),
        Mistake(
            "held back more than needed",
            lambda pieces, stop: _shown(pieces, stop, hold=lambda held, stop: min(len(held), len(stop) - 1)),
            "The last len(stop) - 1 characters are always held back, also where they are no beginning of the"
            " stop text. The client sees everything late.",
        ),
        Mistake(
            "the stop text is shown",
            lambda pieces, stop: _shown(pieces, stop, keep=len(stop)),
            "The stop text itself was sent. The text ends before it.",
        ),
        Mistake(
            "the rest is never sent",
            lambda pieces, stop: _shown(pieces, stop, rest=False),
            "What was held back when the text ended is lost: an answer that ends like the beginning of a stop"
            " text has its last characters cut off.",
        ),
    ),
    hints=(
        "Keep a string of what has come and was not sent. What does it have to look like so that it may go?",
        (
            "max((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0) is how many"
            " characters must wait."
        ),
        (
            "For each piece: held += piece; if stop in held, send held[:held.find(stop)] and nothing more;"
            " else send all but the last n, and keep those. At the end send held."
        ),
    ),
)


# ---- 8. several texts at which to stop


class StopFilter:
    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        if self.stopped:
            return ""
        self.held += piece
        place = 0
        while not self.waits_at(place):
            place += 1
        self.stopped = self.begins_at(place)
        return self.let_go(place)

    def end(self) -> str:
        if self.stopped:
            return ""
        found = [place for place in range(len(self.held)) if self.begins_at(place)]
        self.stopped = bool(found)
        return self.let_go(found[0] if found else len(self.held))

    def begins_at(self, place: int) -> bool:
        """Whether a stop text stands at a place of what is held."""
        return any(self.held.startswith(stop, place) for stop in self.stops)

    def waits_at(self, place: int) -> bool:
        """Whether what is held from a place on must not be shown, or not yet."""
        rest = self.held[place:]
        return not rest or self.begins_at(place) or any(stop.startswith(rest) for stop in self.stops)

    def let_go(self, place: int) -> str:
        """What is held up to a place, which is held no longer."""
        shown, self.held = self.held[:place], self.held[place:]
        return shown


STOP_FILTER_STUB = """class StopFilter:
    def __init__(self, stops: list[str]):
        self.stops = stops
        self.stopped = False  # whether it is known where the text stops
        # your code here

    def feed(self, piece: str) -> str:
        # what can be shown now
        # your code here
        ...

    def end(self) -> str:
        # what is left to show
        # your code here
        ...
"""


def _filter_cases(generator: Generator) -> list[tuple[list[str], list[str]]]:
    def case(stops: list[str], letters: str, length: int, largest: int) -> tuple[list[str], list[str]]:
        """A text in which beginnings of the stops are frequent."""
        parts = [*letters, *(stop[: random_int(generator, 1, len(stop))] for stop in stops for _ in "12")]
        text = "".join(parts[random_int(generator, 0, len(parts))] for _ in range(length))
        ends = "" if random_int(generator, 0, 2) else stops[random_int(generator, 0, len(stops))]
        return stops, _parts(text + ends + letters, largest, generator)

    return [
        (["END"], ["one ", "EN", "D two"]),
        (["END", "STOP"], ["go", " STOP, END", " on"]),
        ([], ["a", "", "b"]),
        (["abcd", "bc"], ["xa", "b", "c", "e"]),
        (["abcd", "bc"], ["xa", "b", "c", "d"]),
        (["abcd", "bc"], ["xa", "b", "c"]),
        (["aab"], ["a", "a", "a", "b", "a"]),
        (["###", "##!"], ["a#", "#", "b##", "##"]),
        case(["END", "EOT"], "xyz ", 12, 3),
        case(["aba", "ab"], "abc", 8, 1),
        case(["ababc", "bab"], "abz", 12, 2),
        case(["stop", "top", "o p"], "stop ", 14, 4),
    ]


def _observe_filter(answer: Callable, stops: list[str], pieces: list[str]) -> Iterator[tuple[str, Any]]:
    given = list(stops)
    stream = answer(given)
    feed, end = building.method(stream, "feed"), building.method(stream, "end")
    shown, stopped = [], []
    for piece in pieces:
        shown.append(feed(piece))
        stopped.append(_has_stopped(stream))
    shown.append(end())
    stopped.append(_has_stopped(stream))
    if not all(isinstance(text, str) for text in shown):
        raise NotRight('feed and end return a str each time, "" where nothing can be shown.')
    yield "all that was shown", "".join(shown)
    yield "what each feed and the end return", shown
    yield "stopped after each of them", stopped
    if given != stops:
        raise NotRight(
            "the list of stop texts is changed. It belongs to the request, which may be sent again."
        )
    again = answer(stops)
    yield "another text with the same stop texts", [*map(again.feed, pieces), again.end()]


def _has_stopped(stream: Any) -> bool:
    if not isinstance(getattr(stream, "stopped", None), bool):
        raise NotRight("`stopped` is wanted as an attribute that is True or False, as in the stub.")
    return stream.stopped


class _EachPieceAlone(StopFilter):
    def feed(self, piece: str) -> str:
        if self.stopped:
            return ""
        self.held = piece
        return super().end()

    def end(self) -> str:
        return ""


class _FirstInTheList(StopFilter):
    def _place(self) -> int:
        places = [self.held.find(stop) for stop in self.stops]
        return next(place for place in places if place >= 0)

    def feed(self, piece: str) -> str:
        if self.stopped:
            return ""
        self.held += piece
        if any(stop in self.held for stop in self.stops):
            self.stopped = True
            return self.let_go(self._place())
        self.held, piece = "", self.held
        return super().feed(piece)


class _ShorterWins(StopFilter):
    def feed(self, piece: str) -> str:
        shown = ""
        for character in piece:
            shown += super().feed(character)
            if not self.stopped and any(stop in self.held for stop in self.stops):
                self.stopped = True
                shown += self.let_go(min(p for p in map(self.held.find, self.stops) if p >= 0))
        return shown


class _EndDoesNotLook(StopFilter):
    def end(self) -> str:
        return "" if self.stopped else self.let_go(len(self.held))


class _LosesTheRest(StopFilter):
    def end(self) -> str:
        return ""


class _HoldsTooMuch(StopFilter):
    def feed(self, piece: str) -> str:
        if self.stopped:
            return ""
        self.held += piece
        places = [place for place in range(len(self.held)) if self.begins_at(place)]
        longest = max(map(len, self.stops), default=1)
        if places:
            self.stopped = True
            return self.let_go(places[0])
        return self.let_go(max(0, len(self.held) - longest + 1))


class _ShowsFirst(StopFilter):
    def __init__(self, stops: list[str]):
        super().__init__(stops)
        self.before = ""

    def feed(self, piece: str) -> str:
        if self.stopped:
            return ""
        so_far = self.before + piece
        places = [place for place in map(so_far.find, self.stops) if place >= 0]
        self.stopped = bool(places)
        shown = so_far[len(self.before) : min(places)] if places else piece
        self.before = so_far
        return shown

    def end(self) -> str:
        return ""


class _ShowsTheStop(StopFilter):
    def feed(self, piece: str) -> str:
        before = self.stopped
        shown = super().feed(piece)
        if self.stopped and not before:
            shown += self.let_go(max(len(s) for s in self.stops if self.held.startswith(s)))
        return shown


class _GoesOn(StopFilter):
    def feed(self, piece: str) -> str:
        return piece if self.stopped else super().feed(piece)


class _CountsFromZero(StopFilter):
    """Compares one character after another with each stop text, and begins again where one differs."""

    def __init__(self, stops: list[str]):
        super().__init__(stops)
        self.matched = [0] * len(stops)

    def feed(self, piece: str) -> str:
        if self.stopped:
            return ""
        shown = ""
        for character in piece:
            self.held += character
            for i, stop in enumerate(self.stops):
                if stop[self.matched[i]] == character:
                    self.matched[i] += 1
                else:
                    self.matched[i] = int(stop[0] == character)
                if self.matched[i] == len(stop):
                    self.stopped = True
                    return shown + self.let_go(len(self.held) - len(stop))
            shown += self.let_go(len(self.held) - max(self.matched, default=0))
        return shown

    def end(self) -> str:
        return "" if self.stopped else self.let_go(len(self.held))


STOP_FILTER = Exercise(
    task="""Now with several stop texts, and as a machine that a server can feed while the text is written.
    `stops` is a list of texts, none of them empty; the list may be. A text ends at the first place where one
    of them begins, whichever it is. Nothing from there on is ever shown, and all before it is.

    `feed(piece)` takes the next part of the text and returns what can be shown now, which may be "".
    `end()` is called when nothing more will come, and returns what is left to show. Show each character as
    early as possible: hold it back only as long as it may still turn out to be part of a stop text, or to
    stand behind one.

    `stopped` is False, and becomes True in the call that makes it certain where the text stops: the server
    frees the slot then. After that both methods return "".

    One stop text may contain another. With "abcd" and "bc", what has to be shown of "xabc"? It depends on
    what comes: "x" when it is a "d", and "xa" when it is another character, or nothing.""",
    reference=StopFilter,
    stub=STOP_FILTER_STUB,
    cases=_filter_cases,
    observe=_observe_filter,
    forbids=(TextStream, stream_text),
    valid=lambda stops, pieces: all(stops),
    points=3,
    mistakes=(
        Mistake(
            "looks at each piece alone",
            _EachPieceAlone,
            "A stop text that lies across two pieces is not found. Tokens are not cut where stop texts"
            " begin.",
        ),
        Mistake(
            "shown before it is known",
            _ShowsFirst,
            "The stop text is found, but its first part has been shown already, and cannot be taken back.",
        ),
        Mistake(
            "the first in the list wins",
            _FirstInTheList,
            "Where two stop texts are in what has come, the one that stands first in the list decided. It is"
            " the place in the text that counts: the smallest one.",
        ),
        Mistake(
            "the shorter stop text wins",
            _ShorterWins,
            "As soon as one stop text was complete, the text was cut there. But it lies inside what may be a"
            " longer one, which begins before it. Wait until that is known.",
        ),
        Mistake(
            "end does not look",
            _EndDoesNotLook,
            "What was held as the beginning of a long stop text is shown whole at the end. A shorter one may"
            " be inside it, and nothing waits for the long one any more.",
        ),
        Mistake(
            "the rest is never shown",
            _LosesTheRest,
            "What was held back when the text ended is lost. It was no stop text, so it belongs to the text.",
        ),
        Mistake(
            "held back more than needed",
            _HoldsTooMuch,
            "As many characters as the longest stop text has, less one, are always held back, also where they"
            " are no beginning of one. The reader sees everything late.",
        ),
        Mistake(
            "the stop text is shown",
            _ShowsTheStop,
            "The stop text itself was shown. The text ends before it.",
        ),
        Mistake(
            "goes on behind the stop",
            _GoesOn,
            "What comes after the stop text was shown again. The model does not know that it was stopped: a"
            " few more tokens may be on their way.",
        ),
        Mistake(
            "counting begins at zero again",
            _CountsFromZero,
            "The characters are counted off against a stop text, and where one differs, all that matched is"
            " forgotten. But in aaab the stop text aab begins at the second a.",
        ),
    ),
    hints=(
        (
            "Keep what has come and was not shown. Walk through it from the front: what are the two reasons"
            " to go no further than a place?"
        ),
        (
            "With rest = held[place:]: rest begins with a stop text, and then the text stops here; or a stop"
            " text begins with rest, and then nobody knows yet. The first place where either is true is how"
            " far you may show."
        ),
        (
            "for place in range(len(held) + 1): if any(rest.startswith(s) for s in stops): stopped = True,"
            " show held[:place]; if not rest or any(s.startswith(rest) for s in stops): show held[:place] and"
            " keep rest. In end, only the first of these reasons is left."
        ),
    ),
)


# ---- 9. server-sent events


def event_data(chunks: list[bytes]) -> list[str]:
    return _events(b"".join(chunks).decode())


def _events(stream: str, *, comments: bool = False, rest: bool = False) -> list[str]:
    """comments: count as data too. rest: so does what no empty line has ended."""
    events = stream.split("\n\n")
    if not rest:
        events.pop()
    found = []
    for event in events:
        lines = [line for line in event.split("\n") if line.startswith("data:") or (comments and line)]
        if lines:
            found.append("\n".join(line.removeprefix("data:").removeprefix(" ") for line in lines))
    return found


def _chunks_as_events(chunks: list[bytes]) -> list[str]:
    texts = [chunk.decode(errors="replace") for chunk in chunks]
    return [text.strip().removeprefix("data:").strip() for text in texts if text.startswith("data:")]


def _decoded_apart(chunks: list[bytes]) -> list[str]:
    return _events("".join(chunk.decode(errors="replace") for chunk in chunks))


def _decoded_apart_strictly(chunks: list[bytes]) -> list[str]:
    return _events("".join(chunk.decode() for chunk in chunks))


def _lines_as_events(chunks: list[bytes]) -> list[str]:
    found = []
    for line in b"".join(chunks).decode().split("\n")[:-1]:
        found += _events(line, rest=True)
    return found


def _event_cases(generator: Generator) -> list[tuple[list[bytes]]]:
    vocabulary = ("tram", "ferry", "nine €", "{}", "[DONE]")

    def case(stream: str, largest: int) -> tuple[list[bytes]]:
        return (_parts(stream.encode(), largest, generator),)

    def words() -> str:
        return vocabulary[random_int(generator, 0, len(vocabulary))]

    def event(*lines: str) -> str:
        return "".join(f"data: {line}\n" for line in lines) + "\n"

    keep_alive = ": still here\n\n"
    return [
        case(event("one") + event(words()), 4),
        case(event(words()) + keep_alive + event("a", "b"), 6),
        case(event("  two blanks") + event(words()) + "data: cut", 5),
        case(keep_alive + event(words(), words()) + event(words()) + "data: cut\n", 9),
        case(event(words()) + event("[DONE]"), 64),
        case("event: ping\nid: 3\ndata:near\n\n" + event("data: " + words()) + "data:\n\n", 7),
        ([b"data: 5 \xe2\x82", b"\xac\n\n"],),
        ([],),
    ]


DECODED_APART = (
    "A character may lie in two chunks, and then neither of them has all of its bytes. Join the bytes, then"
    " decode."
)


def _is_a_stream(chunks: list[bytes]) -> bool:
    """Whether every line is a field or a comment, but for the last, which may be cut."""
    lines = b"".join(chunks).decode().split("\n")[:-1]
    return all(not line or line.startswith((":", "data:", "event:", "id:")) for line in lines)


EVENT_DATA = Exercise(
    task="""You are the client of a stream of server-sent events. `chunks` are the bytes as the network
    delivers them, cut anywhere, UTF-8. An event is one or more lines and ends with an empty line. Lines that
    begin with "data:" are its data, without that and without one blank behind it; several are joined with a
    line break. Lines that begin with a colon are comments, which keep the connection alive. Other lines say
    nothing here. An event without a data line is none. Lines end in "\\n" here. Return the data of all
    complete events, a list of str; what no empty line has ended is left out.""",
    reference=event_data,
    cases=_event_cases,
    valid=_is_a_stream,
    mistakes=(
        Mistake(
            "each chunk is an event",
            _chunks_as_events,
            "A chunk is what the network happened to deliver: half an event, or three. Join them, and cut at"
            " empty lines.",
        ),
        Mistake(
            "each line is an event",
            _lines_as_events,
            "Each data line became an event at once. An event ends with an empty line: until it comes, data"
            " lines are collected, and then joined with a line break. What no empty line ends is none.",
        ),
        Mistake(
            "each chunk is decoded by itself",
            _decoded_apart,
            DECODED_APART,
        ),
        Mistake(
            "each chunk is decoded by itself, and must be whole",
            _decoded_apart_strictly,
            DECODED_APART,
        ),
        Mistake(
            "comments are data",
            lambda chunks: _events(b"".join(chunks).decode(), comments=True),
            "A line that begins with a colon is a comment. Servers send them so that nobody on the way closes"
            " a quiet connection.",
        ),
        Mistake(
            "unfinished events count",
            lambda chunks: _events(b"".join(chunks).decode(), rest=True),
            "What no empty line has ended is not an event yet: the connection broke in the middle of it, and"
            " half a JSON object cannot be read.",
        ),
        Mistake(
            "all blanks are cut",
            lambda chunks: [e.strip() for e in _events(b"".join(chunks).decode())],
            "Only one blank behind the colon belongs to the format. All others are data: a streamed word"
            " often begins with one.",
        ),
    ),
    hints=(
        "Put the bytes together before you decode or cut anything.",
        'The part behind the last "\\n\\n" is not complete. In each of the others, look at the lines.',
        (
            'for event in b"".join(chunks).decode().split("\\n\\n")[:-1]: data = [l[5:].removeprefix(" ") for'
            ' l in event.split("\\n") if l.startswith("data:")]; if data: append "\\n".join(data).'
        ),
    ),
)


# ---- 10. a stream of events


Part = tuple[str, str | None]
"""Text that is new, and why the text ended: None as long as it goes on."""


REASONS = ("stop", "length")
"""Why a text may have ended."""
Usage = Callable[[], dict[str, int]]
"""Counts the tokens until now."""


def event_stream(parts: Iterator[Part], head: dict[str, Any], usage: Usage | None) -> Iterator[bytes]:
    yield from _Events(parts, head, usage)


class _Events:
    """The events of a stream, in steps that a mistake takes otherwise."""

    end_of_event = "\n\n"

    def __init__(self, parts: Iterator[Part], head: dict[str, Any], usage: Usage | None):
        self.parts = parts
        self.head = head
        self.usage = usage

    def __iter__(self) -> Iterator[bytes]:
        yield from self.opening()
        try:
            for text, reason in self.parts:
                yield from self.part(text, reason)
        except Exception as error:
            yield from self.failure(error)
            return
        yield from self.ending()

    def event(self, data: str) -> bytes:
        return f"data: {data}{self.end_of_event}".encode()

    def json(self, value: Any) -> str:
        return json.dumps(value)

    def chunk(self, choices: list[dict[str, Any]], **fields: Any) -> bytes:
        kind = "chat.completion.chunk"
        return self.event(self.json({**self.head, "object": kind, "choices": choices, **fields}))

    def delta(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        return self.chunk([{"index": 0, "delta": delta, "finish_reason": reason}])

    def opening(self) -> Iterator[bytes]:
        yield self.delta({"role": "assistant", "content": ""})

    def part(self, text: str, reason: str | None) -> Iterator[bytes]:
        if text:
            yield self.delta({"content": text})
        if reason:
            yield self.delta({}, reason)

    def failure(self, error: BaseException) -> Iterator[bytes]:
        yield self.event(json.dumps({"error": {"message": str(error), "type": "server_error"}}))

    def ending(self) -> Iterator[bytes]:
        if self.usage is not None:
            yield self.chunk([], usage=self.usage())
        yield self.event("[DONE]")


def _streamed_by(kind: type[_Events]) -> Callable[..., Iterator[bytes]]:
    """The function that a learner would write, with events of another kind."""

    def streamed(parts: Iterator[Part], head: dict[str, Any], usage: Usage | None) -> Iterator[bytes]:
        yield from kind(parts, head, usage)

    return streamed


class _AllAtOnce(_Events):
    def __iter__(self) -> Iterator[bytes]:
        yield from list(super().__iter__())


class _LateRole(_Events):
    begun = False

    def opening(self) -> Iterator[bytes]:
        yield from ()

    def part(self, text: str, reason: str | None) -> Iterator[bytes]:
        if not self.begun:
            self.begun = True
            yield from super().opening()
        yield from super().part(text, reason)


class _NoRole(_Events):
    def opening(self) -> Iterator[bytes]:
        yield from ()


class _OneLineBreak(_Events):
    end_of_event = "\n"


class _ByHand(_Events):
    def json(self, value: Any) -> str:
        """JSON as one might write it, with nothing escaped in the text."""
        content = value["choices"][0]["delta"].get("content") if value["choices"] else None
        if content is None:
            return json.dumps(value)
        value["choices"][0]["delta"]["content"] = "@"
        return json.dumps(value).replace('"@"', f'"{content}"')


class _EmptyParts(_Events):
    def part(self, text: str, reason: str | None) -> Iterator[bytes]:
        yield self.delta({"content": text})
        if reason:
            yield self.delta({}, reason)


class _ReasonWithText(_Events):
    def part(self, text: str, reason: str | None) -> Iterator[bytes]:
        if text or reason:
            yield self.delta({"content": text} if text else {}, reason)


class _ReasonWithAnyPart(_Events):
    """Also a part without text is an event."""

    def part(self, text: str, reason: str | None) -> Iterator[bytes]:
        yield self.delta({"content": text} if text else {}, reason)


class _PartsCollected(_Events):
    """An error of `parts` then comes before all of the text."""

    def __iter__(self) -> Iterator[bytes]:
        self.parts = self.collected(self.parts)
        yield from super().__iter__()

    def collected(self, parts: Iterator[Part]) -> Iterator[Part]:
        yield from list(parts)


class _NotDone(_Events):
    def ending(self) -> Iterator[bytes]:
        yield from list(super().ending())[:-1]


class _EarlyUsage(_Events):
    def opening(self) -> Iterator[bytes]:
        if self.usage is not None:
            counts = self.usage()
            self.usage = counts.copy
        yield from super().opening()


class _ErrorComesOut(_Events):
    def failure(self, error: BaseException) -> Iterator[bytes]:
        yield from ()
        raise error


class _DoneAfterError(_Events):
    def failure(self, error: BaseException) -> Iterator[bytes]:
        yield from super().failure(error)
        yield self.event("[DONE]")


class _CatchesTheEnd(_Events):
    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from super().__iter__()
        except BaseException as error:
            yield from self.failure(error)


def _stream_cases(generator: Generator) -> list[tuple]:
    vocabulary = (
        "tram",
        " ferry",
        "\n",
        '"quoted"',
        " naïve",
        "🙂",
        "",
        "back\\slash",
        "data: x\n\n",
        "\r",
        "\t",
    )

    def case(
        texts: list[str], reason: str = "stop", *, with_usage: bool = False, fails: str | None = None
    ) -> tuple[list[str], str, dict[str, Any], bool, str | None]:
        number = random_int(generator, 0, 10**6)
        head = {"id": f"chatcmpl-{number}", "created": 1_700_000_000 + number, "model": "tiny"}
        return texts, reason, head, with_usage, fails

    def words(n: int) -> list[str]:
        return [vocabulary[random_int(generator, 0, len(vocabulary))] for _ in range(n)]

    return [
        case(["Hello"]),
        case(["Yes", " and no"], "length"),
        case(["one\ntwo", '"three"', "naïve 🙂"]),
        case(["a", "", "b"], "length", with_usage=True),
        case([""]),
        case(words(6), with_usage=True),
        case(["half", " a te"], fails="the model's logits are not finite"),
        case([], with_usage=True, fails="no slot"),
        case(words(9), "length"),
        case(words(4), fails='it says "no"\nand ends'),
    ]


@dataclass
class _PartSource:
    """Parts of a text, and a note of what happened in which order."""

    texts: list[str]
    reason: str
    fails: str | None
    noted: list[str] = field(default_factory=list)
    given: int = 0

    def __iter__(self) -> Iterator[Part]:
        for number, text in enumerate(self.texts, 1):
            self.noted.append(f"part {number} is there")
            self.given = number
            is_last = number == len(self.texts) and self.fails is None
            yield text, self.reason if is_last else None
        if self.fails is not None:
            raise RuntimeError(self.fails)

    def usage(self) -> dict[str, int]:
        """The counts of what was written until now."""
        return {"prompt_tokens": 3, "completion_tokens": self.given, "total_tokens": 3 + self.given}


def _said_by(event: Any, head: dict[str, Any]) -> Any:
    """What an event says, without what all have in common: (delta, finish_reason), the JSON of one without a
    choice, or "[DONE]". Raises NotRight where it is not one event, or has not the form that all have.
    """
    data = _data_of(event)
    if not isinstance(data, dict) or "error" in data:
        return data
    for key, right in {**head, "object": "chat.completion.chunk"}.items():
        if key not in data:
            raise NotRight(f"an event has no field {key!r}, which all have but one with an error and [DONE].")
        value = data.pop(key)
        if value != right:
            raise NotRight(f"the field {key!r} of an event is {value!r}, and should be {right!r}.")
    if data.keys() != {"choices"}:
        return data
    try:
        (choice,) = data["choices"]
        index, delta, reason = choice["index"], choice["delta"], choice["finish_reason"]
    except (TypeError, ValueError, KeyError):
        raise NotRight(
            f"the choices of an event are {data['choices']!r}. A list of one dict is wanted, with index,"
            " delta and finish_reason, which is None as long as the text goes on."
        ) from None
    if index != 0:
        raise NotRight(f"the index of a choice is {index!r}, and should be 0.")
    return delta, reason


def _data_of(event: Any) -> Any:
    """What an event says: its JSON, or "[DONE]". Raises NotRight where it is not one event."""
    if not isinstance(event, bytes):
        raise NotRight(
            f"what is yielded is {type(event).__name__}, and bytes are wanted: .encode() makes them."
        )
    try:
        text = event.decode()
    except UnicodeDecodeError:
        raise NotRight("the bytes of an event are no UTF-8.") from None
    if not text.endswith("\n\n") or "\n\n" in text[:-2]:
        raise NotRight(
            f"{text!r} is wanted as one event that ends with an empty line: a line with `data: ` and its"
            ' JSON, then "\\n\\n". A line break inside of the data would end the line, so JSON writes it as'
            " a backslash and an n."
        )
    (data, *more) = re.split(r"\r\n|\r|\n", text[:-2])
    if more or not data.startswith("data:"):
        raise NotRight(f"{text!r} is no event of one line that begins with `data: `.")
    data = data.removeprefix("data:").removeprefix(" ")
    if data == "[DONE]":
        return data
    try:
        return _without_nulls(json.loads(data))
    except ValueError as error:
        raise NotRight(f"{data!r} is no JSON: {error}. json.dumps escapes what has to be escaped.") from None


def _without_nulls(chunk: Any) -> Any:
    """A chunk without fields that say nothing, which a server may add: usage and logprobs that are null."""
    if not isinstance(chunk, dict):
        return chunk
    chunk = {key: value for key, value in chunk.items() if not (key == "usage" and value is None)}
    for choice in chunk.get("choices") or ():
        if isinstance(choice, dict) and choice.get("logprobs", ...) is None:
            del choice["logprobs"]
    return chunk


def _observe_stream(
    answer: Callable, texts: list[str], reason: str, head: dict[str, Any], with_usage: bool, fails: str | None
) -> Iterator[tuple[str, Any]]:
    def begun() -> tuple[_PartSource, Iterator[bytes]]:
        source = _PartSource(texts, reason, fails)
        stream = answer(iter(source), head, source.usage if with_usage else None)
        if not isinstance(stream, Iterator):
            raise NotRight(
                f"it returns {type(stream).__name__}. It has to yield event after event: a server sends each"
                " one on before the next is there."
            )
        return source, stream

    source, stream = begun()
    events = []
    try:
        for event in stream:
            events.append(_said_by(event, head))
            source.noted.append(f"event {len(events)} is sent")
    except RuntimeError as error:
        if str(error) != fails:
            raise
        raise NotRight(
            f"the error of `parts` ({error}) comes out of the generator. The status of the answer was sent"
            " long ago: all that the client can still be told is an event with the error."
        ) from None
    yield "the events: (delta, finish_reason) without the head", events
    yield "what happens when", source.noted
    for after in range(1, min(3, len(events))):
        source, stream = begun()
        for _ in range(after):
            next(stream)
        _closes(stream)


def _closes(stream: Any) -> None:
    """Raises NotRight where a stream goes on after its client has gone."""
    try:
        stream.close()
    except RuntimeError:
        raise NotRight(
            "the client has gone and the server closes the generator (GeneratorExit is raised at the yield),"
            " but it yields another event. Catch Exception, of which GeneratorExit is none."
        ) from None


EVENT_STREAM = Exercise(
    task="""Now you are the server. Write a generator that turns a text, while it is written, into the bytes
    of server-sent events, as OpenAI's chat API sends them. `parts` yields (text, reason): text that is new,
    perhaps "", and why the text ended, which is None for all but the last, then "stop" or "length".

    Each event is one bytes object: `data: `, then JSON on one line, then an empty line, in UTF-8. The JSON
    has all fields of `head`, `"object": "chat.completion.chunk"` and `choices`, a list of one: `{"index": 0,
    "delta": ..., "finish_reason": null}`. In this order:

    - one with the delta `{"role": "assistant", "content": ""}`, before anything is asked of `parts`;
    - for each text that is not "", as soon as it is there, one with the delta `{"content": text}`;
    - one with the delta `{}` and the reason as its `finish_reason`;
    - where `usage` is not None, one with `choices` empty and a field `"usage"`: what `usage()` returns when
      it is called now, and not before;
    - `data: [DONE]`, which is no JSON, and an empty line.

    An Exception in `parts` cannot change the status of the answer any more. Send an event with `{"error":
    {"message": str(error), "type": "server_error"}}` alone, and end there, without the others. Where the
    client goes, the server closes your generator: then nothing more is sent.""",
    reference=event_stream,
    stub="""def event_stream(parts, head, usage):
    # your code here
    ...
""",
    cases=_stream_cases,
    observe=_observe_stream,
    forbids=(chunks,),
    valid=lambda texts, reason, head, with_usage, fails: (
        bool(texts or fails) and fails != "" and reason in REASONS
    ),
    points=3,
    mistakes=(
        Mistake(
            "everything at the end",
            _streamed_by(_AllAtOnce),
            "All events are made before the first is sent. The reader waits for the whole text: yield each"
            " event when its part is there.",
        ),
        Mistake(
            "the role waits for the first part",
            _streamed_by(_LateRole),
            "The first event comes with the first part of the text. The client learns only then that it is"
            " being answered, which may take seconds where the prompt is long.",
        ),
        Mistake(
            "nobody says who speaks",
            _streamed_by(_NoRole),
            "The event with the role is missing. Clients build the message from the deltas, and its role is"
            " one of them.",
        ),
        Mistake(
            "one line break",
            _streamed_by(_OneLineBreak),
            "The events end with one line break. It takes an empty line: without it the client waits for more"
            " lines of the same event.",
        ),
        Mistake(
            "JSON by hand",
            _streamed_by(_ByHand),
            "The text was put between quotes as it is. With a quote or a line break in it this is no JSON any"
            " more. json.dumps escapes them.",
        ),
        Mistake(
            "empty parts are sent",
            _streamed_by(_EmptyParts),
            'A part that is "" became an event: half a character, or the beginning of what may be a stop'
            " text. There is nothing to show yet.",
        ),
        Mistake(
            "the reason comes with the last text",
            _streamed_by(_ReasonWithText),
            "The last text and the reason are in one event. Here the reason has an event of its own, with an"
            " empty delta.",
        ),
        Mistake(
            "the reason comes with the last part",
            _streamed_by(_ReasonWithAnyPart),
            "Each part became one event, with its reason. Here the reason has an event of its own, with an"
            ' empty delta, and a part that is "" has none.',
        ),
        Mistake(
            "all parts are collected first",
            _streamed_by(_PartsCollected),
            "All of `parts` is read before the first text is sent: list(parts) waits for the end, and where"
            " that is an error, the texts before it are lost. Go through parts itself, and yield an event for"
            " each.",
        ),
        Mistake(
            "no [DONE]",
            _streamed_by(_NotDone),
            "The stream ends without [DONE]. The client cannot tell it from a connection that broke.",
        ),
        Mistake(
            "usage is counted too early",
            _streamed_by(_EarlyUsage),
            "usage() was called before the text was written, and counts none of it.",
        ),
        Mistake(
            "the error leaves the generator",
            _streamed_by(_ErrorComesOut),
            "The error comes out of the generator, and the server breaks the connection off. The client sees"
            " a text that ends in the middle, and no reason.",
        ),
        Mistake(
            "[DONE] after an error",
            _streamed_by(_DoneAfterError),
            "After the error the stream says [DONE], as if all had gone well. The error is the last event.",
        ),
        Mistake(
            "the end is caught too",
            _streamed_by(_CatchesTheEnd),
            "A client that goes is an exception too, GeneratorExit, raised at the yield. It was caught, and"
            " answered with an event. Catch Exception, not everything.",
        ),
    ),
    hints=(
        (
            'A small function that makes an event of a dict, f"data: {json.dumps(value)}\\n\\n".encode(), and'
            " one that makes a chunk of a delta and a reason. The rest is a loop between two yields."
        ),
        (
            "try: for text, reason in parts: ... except Exception as error: yield the error, and return. What"
            " comes behind the loop, usage and [DONE], stands after the try."
        ),
        (
            'yield chunk({"role": "assistant", "content": ""}); in the loop: if text: yield chunk({"content":'
            " text}); if reason: yield chunk({}, reason). Then, if usage is not None: yield event({**head,"
            ' "object": "chat.completion.chunk", "choices": [], "usage": usage()}); then b"data:'
            ' [DONE]\\n\\n".'
        ),
    ),
)


# ---- 11. how long people wait


def delay_percentile(times: list[list[float]], q: float) -> float:
    return _rank(_between(times), q)


def _between(times: list[list[float]]) -> list[float]:
    return [b - a for text in times for a, b in zip(text, text[1:])]


def _rank(values: list[float], q: float) -> float:
    return sorted(values)[math.ceil(q * len(values)) - 1]


def _not_sorted(times: list[list[float]], q: float) -> float:
    delays = _between(times)
    return delays[math.ceil(q * len(delays)) - 1]


def _from_the_wrong_end(times: list[list[float]], q: float) -> float:
    delays = sorted(_between(times), reverse=True)
    return delays[math.ceil(q * len(delays)) - 1]


def _between_two_ranks(times: list[list[float]], q: float) -> float:
    return float(np.percentile(_between(times), 100 * q))


def _across_texts(times: list[list[float]], q: float) -> float:
    if len(times) == 1:
        return _rank(_between(times), q)
    moments = sorted(moment for text in times for moment in text)
    return _rank(_between([moments]), q)


def _delay_cases(generator: Generator) -> list[tuple[list[list[float]], float]]:
    def case(texts: int, q: float) -> tuple[list[list[float]], float]:
        times = []
        for i in range(texts):
            tokens = random_int(generator, 6, 14)
            delays = torch.rand(tokens, generator=generator) ** 3 * (1 + 3 * i)
            times.append((0.5 + 2 * i + delays.cumsum(0)).tolist())
        return times, q

    drawn = [case(3, 0.5), case(2, 0.95), case(4, 0.9), case(3, 0.25), case(1, 0.75), case(2, 1.0)]
    return [*drawn, ([[0.5, 1.0, 3.0], [4.0], [0.25, 0.5]], 0.5)]


DELAY_PERCENTILE = Exercise(
    task="""`times` has a list for each text: the moments at which its tokens came, in seconds after it was
    asked for. Return the percentile of the delays between two tokens of a text, over all texts together: the
    smallest delay that at least a share `q` of all delays do not exceed (the nearest rank: with n delays,
    number ceil(q * n) in order). The time to the first token is another measure, and does not count here.""",
    reference=delay_percentile,
    cases=_delay_cases,
    forbids=(percentile,),
    mistakes=(
        Mistake(
            "time to the first token counts",
            lambda times, q: _rank(_between([[0.0, *text] for text in times]), q),
            "The wait for the first token is among the delays. It is of another size, reading the prompt is"
            " in it, and it is reported by itself.",
        ),
        Mistake(
            "mean of the texts' percentiles",
            lambda times, q: sum(_rank(_between([text]), q) for text in times) / len(times),
            "A percentile was taken of each text, and their mean returned. Percentiles cannot be averaged:"
            " put all delays together first.",
        ),
        Mistake(
            "mean for percentile",
            lambda times, q: sum(_between(times)) / len(_between(times)),
            "This is the mean. A few long pauses and many short ones have the same mean as an even stream,"
            " and feel different.",
        ),
        Mistake(
            "not sorted",
            _not_sorted,
            "The delays are in the order in which they came. The rank counts in order of size.",
        ),
        Mistake(
            "from the wrong end",
            _from_the_wrong_end,
            "The largest come first here, so that the 95th percentile is among the shortest delays. Sort"
            " upwards.",
        ),
        Mistake(
            "between two ranks",
            _between_two_ranks,
            "The result lies between two delays: np.percentile and torch.quantile draw a line between the two"
            " nearest ranks. The nearest rank is a delay that somebody had:"
            " np.percentile(..., method='inverted_cdf').",
        ),
        Mistake(
            "delays across texts",
            _across_texts,
            "The moments of all texts were mixed before the differences were taken. These are the pauses of"
            " the server; a reader sees only one text.",
        ),
    ),
    hints=(
        "For each text, the differences of neighbours: zip(text, text[1:]).",
        "Put the delays of all texts into one list and sort it. Number k in order is at index k - 1.",
        (
            "delays = sorted(b - a for text in times for a, b in zip(text, text[1:])); return"
            " delays[math.ceil(q * len(delays)) - 1]."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    STORE_KEYS,
    ROW_PROBABILITIES_AT,
    NEXT_SLOTS,
    TINY_ENGINE,
    REUSABLE_TOKENS,
    DECODED_PIECES,
    SHOWN_PIECES,
    STOP_FILTER,
    EVENT_DATA,
    EVENT_STREAM,
    DELAY_PERCENTILE,
)
