"""Week 5. Cuts texts into the pieces inside of which tokens are merged, as a pattern says.

The rules of GPT-2 and its kin are run by Python's own `re`, which takes half the time of `regex` or less, but
knows no classes like "letter": they are written out.

>>> from shared.tokenizers import GPT2_PATTERN
>>> [pieces] = Cutter(GPT2_PATTERN)("to be, or not")
>>> pieces
['to', ' be', ',', ' or', ' not']
"""

import re
from collections.abc import Iterator
from functools import cache

import regex

from shared.tokenizers.patterns import COVERING

CHUNK = 1 << 14
"""Characters that are cut at a time: a list of pieces takes about fifteen times the memory of its text."""
SAFE_CUT = regex.compile(r"(?<=[\p{L}\p{N}])(?=[\s.,、。，])")
"""Where a text may be cut in two: no piece of a pattern in `COVERING` goes on there."""
BEYOND = 0x10000
"""The first code point that `re` is slow to find in a class of characters."""


class Cutter:
    """Cuts texts into pieces as a pattern says, in the syntax of `regex`.

    What lies between two matches of the pattern is a piece as well. Raises ValueError for a pattern that is
    no regular expression.
    """

    def __init__(self, pattern: str):
        try:
            self._pattern = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
        self._is_covering = pattern in COVERING

    def __call__(self, text: str) -> Iterator[list[str]]:
        """The pieces of a text, in lists."""
        if not self._is_covering:
            yield self._with_gaps(text)
            return
        start = 0
        while start < len(text):
            cut = SAFE_CUT.search(text, start + CHUNK)
            chunk = text[start : cut.start() if cut else len(text)]
            yield self._quickest(chunk).findall(chunk)
            start += len(chunk)

    def _with_gaps(self, text: str) -> list[str]:
        """Nothing is known of the pattern: its matches may leave gaps, and end anywhere."""
        pieces = []
        end = 0
        for match in self._pattern.finditer(text):
            pieces += [text[end : match.start()], match[0]]
            end = match.end()
        return [piece for piece in [*pieces, text[end:]] if piece]

    def _quickest(self, text: str) -> re.Pattern[str] | regex.Pattern[str]:
        """The pattern for what reads a text quickest."""
        # UTF-16 has two bytes for a character below BEYOND, and four for another one.
        below = len(text.encode("utf-16-le")) == 2 * len(text)
        return in_plain_re(self._pattern.pattern) if below else self._pattern


@cache
def in_plain_re(pattern: str) -> re.Pattern[str]:
    """A pattern of `COVERING` for Python's own `re`: it has the same matches in texts of characters below
    BEYOND.
    """
    letters, numbers, spaces = map(_in_class, (r"\p{L}", r"\p{N}", r"\s"))

    def written_out(match: re.Match[str]) -> str:
        if match[0] == r"\S":
            return f"[^{spaces}]"
        characters = match[0].replace(r"\p{L}", letters).replace(r"\p{N}", numbers).replace(r"\s", spaces)
        return characters if match[0].startswith("[") else f"[{characters}]"

    # " ?a+|b" becomes " a++|a++|b": the branches that cannot match are known by their first character, and
    # `re` keeps no places to come back to.
    pattern = re.sub(r"(^|\|) \?((?:\[.*?\]|[^|()\[\]])+)", r"\1 \2|\2", pattern)
    pattern = re.sub(r"(\]|\\p\{.\})\+(?=\||$)", r"\1++", pattern)
    return re.compile(re.sub(r"\[.*?\]|\\p\{.\}|\\[sS]", written_out, pattern))


@cache
def _in_class(kind: str) -> str:
    """The characters of a kind below BEYOND, as ranges inside of square brackets: 0-9... for numbers."""
    runs = regex.findall(f"{kind}+", "".join(map(chr, range(BEYOND))))
    return "".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else run for run in runs)
