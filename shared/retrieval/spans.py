"""Week 11. The spans of a text that an answer may quote: some words in a row, without the marks around them.

>>> text = "A dog pays 3 tallies."
>>> [text[a:b] for a, ends in spans(text, 2).items() for b in ends]
['A', 'A dog', 'dog', 'dog pays', 'pays', 'pays 3', '3', '3 tallies', 'tallies']
"""

import re

WORD = re.compile(r"[^\s|]+")
"""A bar divides the cells of a table and is no word."""
OPENING = "\"'“‘([{*"
CLOSING = ".,;:!?\"'”’)]}*"


def spans(text: str, most_words: int) -> dict[int, list[int]]:
    """For each place where a span may begin, the places where it may end, in characters.

    A span has at most `most_words` words and crosses neither the end of a sentence nor a table's cell.
    """
    words = [match.span() for match in WORD.finditer(text)]
    found: dict[int, list[int]] = {}
    for number, (start, _) in enumerate(words):
        while start < len(text) and text[start] in OPENING:
            start += 1
        ends: list[int] = []
        for begin, end in words[number : number + most_words]:
            if ends and "|" in text[ends[-1] : begin]:
                break
            bare = end - len(text[begin:end]) + len(text[begin:end].rstrip(CLOSING))
            if bare > start and bare not in ends:
                ends.append(bare)
            if text[end - 1] in ".!?;":
                break
        if ends:
            found[start] = ends
    return found
