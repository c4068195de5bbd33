"""Clean solutions of week 12's exercises, each with a word on why; `week.solution(name)` shows them."""

import codecs
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.serving.slots import SlotCache


def store_keys(cache: Tensor, lengths: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row has a position of its own: two index tensors write one place in every row. A token sees what
    was there, and itself.
    """
    cache = cache.clone()
    cache[torch.arange(len(cache)), lengths] = new
    seen = torch.arange(cache.size(1)) <= lengths[:, None]
    return cache, lengths + 1, seen


def row_probabilities_at(logits: Tensor, temperatures: Tensor) -> Tensor:
    """A division by 0 makes nan even where `where` throws it away, so greedy rows are divided by 1 first."""
    is_greedy = temperatures == 0
    safe = torch.where(is_greedy, 1.0, temperatures)
    drawn_from = (logits / safe[:, None]).softmax(-1)
    greedy = F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    return torch.where(is_greedy[:, None], greedy, drawn_from)


def next_slots(
    slots: list[str], waiting: list[str], ended: list[str], cancelled: list[str]
) -> tuple[list[str], list[str]]:
    """First all that are done leave, slots and queue alike; then the free slots are filled in order. Whoever
    goes on keeps his slot, where his keys are.
    """
    gone = {*ended, *cancelled}
    queue = [name for name in waiting if name not in cancelled]
    filled = []
    for name in slots:
        if name in gone or not name:
            name = queue.pop(0) if queue else ""
        filled.append(name)
    return filled, queue


class TinyEngine:
    """All that a text has, but its last token, is in the cache: that one number gives the length of its row,
    and the last token is what it is fed. Nothing else has to be kept for a slot.
    """

    def __init__(self, model: nn.Module, slots: int):
        self.model = model
        self.cache = SlotCache(model.config, slots)
        self.slots: list[int | None] = [None] * slots
        self.waiting: list[int] = []
        self.texts: list[list[int]] = []
        self.requests: list[tuple[list[int], int, int | None]] = []

    def submit(self, prompt: list[int], max_new_tokens: int, stop: int | None = None) -> int:
        self.requests.append((prompt, max_new_tokens, stop))
        self.texts.append([])
        self.waiting.append(len(self.texts) - 1)
        return self.waiting[-1]

    def step(self) -> list[int | None]:
        for slot, number in enumerate(self.slots):
            if number is None and self.waiting:
                self.join(slot, self.waiting.pop(0))
        seated = list(self.slots)
        ids = [[0] for _ in seated]
        lengths: list[int | None] = [None] * len(seated)
        for slot, number in enumerate(seated):
            if number is not None:
                written = [*self.requests[number][0], *self.texts[number]]
                ids[slot] = [written[-1]]
                lengths[slot] = len(written) - 1
        if any(length is not None for length in lengths):
            logits = self.model(torch.tensor(ids), self.cache.rows(0, lengths))
            for slot, number in enumerate(seated):
                if number is not None:
                    self.give(slot, number, int(logits[slot, -1].argmax()))
        return seated

    def join(self, slot: int, number: int) -> None:
        self.slots[slot] = number
        read = self.requests[number][0][:-1]
        if read:
            self.model(torch.tensor([read]), self.cache.rows(slot, [0]))

    def give(self, slot: int, number: int, token: int) -> None:
        _, max_new_tokens, stop = self.requests[number]
        if token != stop:
            self.texts[number].append(token)
        if token == stop or len(self.texts[number]) == max_new_tokens:
            self.slots[slot] = None


def reusable_tokens(prompt: list[int], kept: list[int], chunk: int) -> int:
    """What both begin with, less what does not fill a chunk; and never the whole prompt, since the logits
    behind its last token are what is asked for.
    """
    most = min(len(prompt) - 1, len(kept))
    n = 0
    while n < most and prompt[n] == kept[n]:
        n += 1
    return n // chunk * chunk


def decoded_pieces(chunks: list[bytes]) -> list[str]:
    """An incremental decoder keeps the bytes of a character that is not whole yet, and gives it with the
    chunk that completes it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(chunk) for chunk in chunks]
    return [*pieces, decoder.decode(b"", final=True)]


def shown_pieces(pieces: list[str], stop: str) -> list[str]:
    """What might be the beginning of the stop text waits: as soon as more has come it is either the stop, or
    it is sent.
    """
    sent = []
    held = ""
    stopped = False
    for piece in pieces:
        held = "" if stopped else held + piece
        if stop in held:
            sent.append(held[: held.find(stop)])
            held = ""
            stopped = True
            continue
        waits = max((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        sent.append(held[: len(held) - waits])
        held = held[len(held) - waits :]
    return [*sent, held]


class StopFilter:
    """Walk from the front to the first place where a stop text stands, or may still come to stand: so far
    can be shown, since nothing before it can change. At the end nothing more comes, and only what stands
    there counts.
    """

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        if self.stopped:
            return ""
        self.held += piece
        for place in range(len(self.held) + 1):
            rest = self.held[place:]
            self.stopped = any(rest.startswith(stop) for stop in self.stops)
            if self.stopped or not rest or any(stop.startswith(rest) for stop in self.stops):
                break
        shown = self.held[:place]
        self.held = rest
        return shown

    def end(self) -> str:
        if self.stopped:
            return ""
        places = [self.held.find(stop) for stop in self.stops if stop in self.held]
        self.stopped = bool(places)
        shown = self.held[: min(places)] if places else self.held
        self.held = ""
        return shown


def event_data(chunks: list[bytes]) -> list[str]:
    """The network cuts anywhere, so join first; an empty line ends an event, and what stands behind the last
    one is not complete.
    """
    found = []
    for event in b"".join(chunks).decode().split("\n\n")[:-1]:
        lines = [line[5:].removeprefix(" ") for line in event.split("\n") if line.startswith("data:")]
        if lines:
            found.append("\n".join(lines))
    return found


def event_stream(
    parts: Iterator[tuple[str, str | None]],
    head: dict[str, Any],
    usage: Callable[[], dict[str, int]] | None,
) -> Iterator[bytes]:
    """A generator stands still at each yield until the server has sent what it has: so nothing waits for the
    end. json.dumps leaves no line break in the data. A client that goes raises GeneratorExit here, which is
    no Exception.
    """

    def event(data: str) -> bytes:
        return f"data: {data}\n\n".encode()

    def chunk(choices: list[dict[str, Any]], **fields: Any) -> bytes:
        return event(json.dumps({**head, "object": "chat.completion.chunk", "choices": choices, **fields}))

    def choice(delta: dict[str, str], reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "finish_reason": reason}]

    yield chunk(choice({"role": "assistant", "content": ""}))
    try:
        for text, reason in parts:
            if text:
                yield chunk(choice({"content": text}))
            if reason is not None:
                yield chunk(choice({}, reason))
    except Exception as error:
        yield event(json.dumps({"error": {"message": str(error), "type": "server_error"}}))
        return
    if usage is not None:
        yield chunk([], usage=usage())
    yield event("[DONE]")


def delay_percentile(times: list[list[float]], q: float) -> float:
    """Differences within each text, then all of them in one order: percentiles cannot be averaged."""
    delays = sorted(b - a for text in times for a, b in zip(text, text[1:]))
    return delays[math.ceil(q * len(delays)) - 1]
