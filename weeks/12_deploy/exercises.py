"""The graded exercises of week 12: positions in a shared cache, temperature 0, slots, prefixes, streamed
text, stop texts, events, delays.
"""

import codecs
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake, random_int

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
        lengths = torch.randperm(time - 2, generator=generator)[:rows] + 1
        cache = torch.randn(rows, time, channel, generator=generator)
        return cache, lengths, torch.randn(rows, channel, generator=generator)

    return [case(2, 5, 3), case(3, 6, 2), case(4, 9, 4), case(2, 8, 1), case(5, 12, 3)]


STORE_KEYS = Exercise(
    task="""Several texts share one cache, one row each. `cache` is float32 [rows, time, channel], of which
    row i holds `lengths[i]` keys (int64 [rows]); what lies behind them is old and means nothing. `new` is
    float32 [rows, channel], the key of each row's newest token. Return three things: the cache with the new
    keys stored, a new tensor; the new lengths; and bool [rows, time], which keys each row's newest token may
    see.""",
    reference=store_keys,
    cases=_cache_cases,
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
    def case(temperatures: list[float], vocab: int) -> tuple[Tensor, Tensor]:
        logits = torch.randn(len(temperatures), vocab, generator=generator) * 2
        logits[:, 1] = logits[:, 3] = logits.amax(-1) + 0.5  # two that are equally likely
        return logits, torch.tensor(temperatures)

    return [
        case([0.0, 1.0, 0.5], 5),
        case([0.7, 0.0], 8),
        case([2.0, 0.3, 0.0, 0.0], 6),
        case([0.0], 7),
        case([0.9, 1.5], 4),
    ]


ROW_PROBABILITIES_AT = Exercise(
    task="""Each request has a temperature of its own. `logits` is float32 [rows, vocab], `temperatures`
    float32 [rows]. Return float32 [rows, vocab]: the probabilities to draw from, softmax(logits /
    temperature) in each row. Temperature 0 is greedy: all the probability on the largest logit, the first one
    where two are equal.""",
    reference=row_probabilities_at,
    cases=_temperature_cases,
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
    ]


NEXT_SLOTS = Exercise(
    task="""Between two steps of the engine. `slots` has the name of the request that is written in each slot,
    "" for a free one. `waiting` has those that wait, first come first. `ended` have written their last token
    in the step before; the clients of `cancelled` have gone: they may be in a slot or in the queue. Return
    the new slots and the new queue: all of those have left, and every free slot is given to the next in line,
    the first slots first. A text that goes on keeps its slot: its keys lie there.""",
    reference=next_slots,
    cases=_slot_cases,
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


# ---- 4. what need not be read again


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
    return [case(10, 5, 3, 4), same, (mixed, other, 4), case(9, 4, 0, 3), case(3, 6, 6, 4), case(17, 0, 9, 8)]


REUSABLE_TOKENS = Exercise(
    task="""A slot still holds the keys of the tokens `kept`, a list of ids, from a request that has ended. A
    new prompt comes, also a list of ids. Return how many of the prompt's tokens need not be read: as many as
    both begin with, rounded down to a multiple of `chunk` (prompts are read in whole chunks, and another cut
    would round differently). The last token of the prompt must always be read: the logits behind it are what
    is asked for.""",
    reference=reusable_tokens,
    cases=_prefix_cases,
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


# ---- 5. bytes that come in pieces


def decoded_pieces(chunks: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [*(decoder.decode(chunk) for chunk in chunks), decoder.decode(b"", final=True)]


def _whole_text_each_time(chunks: list[bytes]) -> list[str]:
    so_far = [b"".join(chunks[: i + 1]) for i in range(len(chunks))]
    return [*(data.decode(errors="replace") for data in so_far), ""]


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
    ]


DECODED_PIECES = Exercise(
    task="""A byte-level tokenizer's tokens are bytes, and a character outside ASCII has up to four of them: a
    token may end in the middle of one. `chunks` are the bytes of the tokens, in order. Return a list of
    texts: for each chunk what can be shown now, which may be "", and one more for the end. A character is
    shown with the chunk that completes it. What is still incomplete at the end becomes one
    "\N{REPLACEMENT CHARACTER}". All bytes before it are valid UTF-8.""",
    reference=decoded_pieces,
    cases=_byte_cases,
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


# ---- 6. a text at which to stop


def shown_pieces(pieces: list[str], stop: str) -> list[str]:
    return _shown(pieces, stop)


def _may_begin(held: str, stop: str) -> int:
    """Characters of the longest end of `held` that is a beginning of `stop`."""
    return max((n for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)


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
    ]


SHOWN_PIECES = Exercise(
    task="""A client asks that its text ends before the text `stop`. `pieces` are the parts of the text as
    they are written. Return a list, one item longer: for each piece what is sent to the client when it comes,
    and what is sent at the end. Nothing of `stop` may ever be sent, nor anything behind it (send "" for those
    pieces). Hold back no more than needed: of what has come, the longest end that is a beginning of `stop`.
    What was held back and was not the stop is sent as soon as that is known.""",
    reference=shown_pieces,
    cases=_stop_cases,
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


# ---- 7. server-sent events


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
    ]


EVENT_DATA = Exercise(
    task="""You are the client of a stream of server-sent events. `chunks` are the bytes as the network
    delivers them, cut anywhere, UTF-8. An event is one or more lines and ends with an empty line. Lines that
    begin with "data:" are its data, without that and without one blank behind it; several are joined with a
    line break. Lines that begin with a colon are comments, which keep the connection alive: an event of
    comments alone is none. Lines end in "\\n" here. Return the data of all complete events, a list of str;
    what no empty line has ended is left out.""",
    reference=event_data,
    cases=_event_cases,
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
            "Two data lines without an empty line between them are one event: join them with a line break.",
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


# ---- 8. how long people wait


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

    return [case(3, 0.5), case(2, 0.95), case(4, 0.9), case(3, 0.25), case(1, 0.75)]


DELAY_PERCENTILE = Exercise(
    task="""`times` has a list for each text: the moments at which its tokens came, in seconds after it was
    asked for. Return the percentile of the delays between two tokens of a text, over all texts together: the
    smallest delay that at least a share `q` of all delays do not exceed (the nearest rank: with n delays,
    number ceil(q * n) in order). The time to the first token is another measure, and does not count here.""",
    reference=delay_percentile,
    cases=_delay_cases,
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
    REUSABLE_TOKENS,
    DECODED_PIECES,
    SHOWN_PIECES,
    EVENT_DATA,
    DELAY_PERCENTILE,
)
