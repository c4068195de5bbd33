"""Week 11. A text in pieces of at most so many tokens, cut between words."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate

from shared.tokenizers import Tokenizer

Span = tuple[int, int]
"""Begin and end, in characters."""
UNBROKEN = 4
"""Times the size: so many characters without a space are data, or a script without spaces."""


def split(text: str, tokenizer: Tokenizer, size: int, overlap: int) -> list[Span]:
    """Begin and end, in characters, of pieces of `text`, cut between words.

    They cover all of it but white space between them. A piece is the longest that has at most `size` tokens
    by itself. The next one begins as far inside it as it can with at most `overlap` tokens in common and with
    room for a new word. A word of more than `size` tokens is cut between characters. One of at least
    4 `size` characters is cut by its bytes in UTF-8 instead, and makes pieces of its own: a token has a byte
    or more, so that nothing need be encoded. Raises ValueError for sizes that allow no progress, and for a
    character of more than `size` tokens.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(
            f"chunks of {size} tokens with {overlap} of overlap: the size must be at least 1, and the overlap"
            " from 0 up to below it"
        )

    def count(start: int, end: int) -> int:
        return len(tokenizer.encode(text[start:end]))

    pieces: list[Span] = []
    words: list[Span] = []
    for match in re.finditer(r"\S+", text):
        start, end = match.span()
        if end - start < UNBROKEN * size:
            words += _parts_of_word(text, (start, end), count, size)
            continue
        pieces += _joined(words, count, size, overlap)
        words = []
        pieces += [(start + a, start + b) for a, b in _by_bytes(match[0], tokenizer, size, overlap)]
    return pieces + _joined(words, count, size, overlap)


def _joined(words: list[Span], count: Callable[[int, int], int], size: int, overlap: int) -> list[Span]:
    """Words that follow each other, as pieces."""
    pieces: list[Span] = []
    first = 0  # the number of the piece's first word
    while first < len(words):

        def fits(last: int, start: int = words[first][0]) -> bool:
            return count(start, words[last][1]) <= size

        last = _longest(first, len(words) - 1, fits)
        pieces.append((words[first][0], words[last][1]))
        if last == len(words) - 1:
            break

        def in_common(number: int, last: int = last) -> bool:
            return count(words[last + 1 - number][0], words[last][1]) <= overlap

        shared = _longest(0, last - first, in_common)
        # What is shared must leave room for a new word.
        while shared and count(words[last + 1 - shared][0], words[last + 1][1]) > size:
            shared -= 1
        first = last + 1 - shared
    return pieces


def _parts_of_word(text: str, word: Span, count: Callable[[int, int], int], size: int) -> Iterator[Span]:
    """The word; or, if it has more than `size` tokens, its parts."""
    start, end = word
    while start < end:

        def fits(stop: int, start: int = start) -> bool:
            return count(start, stop) <= size

        stop = end if fits(end) else _longest(start + 1, end, fits)
        if stop == start + 1 and not fits(stop):
            raise _too_large(text[start], size)
        yield start, stop
        start = stop


def _by_bytes(word: str, tokenizer: Tokenizer, size: int, overlap: int) -> Iterator[Span]:
    """Parts of at most `size` bytes, with at most `overlap` of them in common, in characters of `word`.

    A character that has more bytes is a part, if it has few enough tokens.
    """
    ends = [0, *accumulate(len(character.encode("utf-8", "surrogatepass")) for character in word)]
    start = 0
    while True:
        stop = bisect_right(ends, ends[start] + size) - 1
        if stop == start:
            stop += 1
            if len(tokenizer.encode(word[start])) > size:
                raise _too_large(word[start], size)
        yield start, stop
        if stop == len(word):
            return
        in_common = bisect_left(ends, ends[stop] - overlap)
        with_room = bisect_left(ends, ends[stop + 1] - size)  # for a new character
        start = min(stop, max(start + 1, in_common, with_room))


def _too_large(character: str, size: int) -> ValueError:
    return ValueError(f"the character {character!r} alone has more than {size} tokens: choose larger chunks")


def _longest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The greatest n from `low` to `high` that `fits`, which `low` is taken to.

    The search takes steps that double and then halve.
    """
    step = 1
    while low + step <= high and fits(low + step):
        low += step
        step *= 2
    while step > 1:
        step //= 2
        if low + step <= high and fits(low + step):
            low += step
    return low
