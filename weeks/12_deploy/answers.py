"""Clean solutions of week 12's exercises, each with a word on why; `week.solution(name)` shows them."""

import codecs
import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


def delay_percentile(times: list[list[float]], q: float) -> float:
    """Differences within each text, then all of them in one order: percentiles cannot be averaged."""
    delays = sorted(b - a for text in times for a, b in zip(text, text[1:]))
    return delays[math.ceil(q * len(delays)) - 1]
