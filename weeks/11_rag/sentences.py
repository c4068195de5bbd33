"""Examples for week 11's study of week 6's model, which learns to answer from one sentence."""

import re
from collections.abc import Iterator
from random import Random
from typing import Any

from library import Library
from shared.adapters.conversations import Conversation
from shared.retrieval.documents import Chunk
from shared.retrieval.ranking import holds_answer, normalise

NAMED = re.compile(r"\d[\d:.,]*\d|\d+|(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
"""A number, or a name that does not begin a sentence."""
COPIES = 8
"""So often an example with a number is given, each time with another one."""


def has_digit(text: str) -> bool:
    """Whether there is a digit in it."""
    return re.search(r"\d", text) is not None


def sentence_of(library: Library, question: dict[str, Any]) -> str:
    """The sentence that the answer stands in, under its headings; where none holds it word for word, the
    first of the right passage.
    """
    texts = library.right(question).window_texts()
    return next((text for text in texts if holds_answer(text, question["answers"])), texts[0])


def talk_on(sentence: str, question: str, answer: str) -> Conversation:
    """A sentence and a question, and the answer."""
    return [
        {"role": "user", "content": f"{sentence}\n{question}".strip()},
        {"role": "assistant", "content": answer},
    ]


def talks_on(sentence: str, question: str, answer: str, chance: Random) -> Iterator[Conversation]:
    """The question as it is and with other numbers, in the sentence and in the answer alike: what is in the
    sentence is to be learned, not what is true.
    """
    yield talk_on(sentence, question, answer)
    if not has_digit(answer):
        return
    numbers = dict.fromkeys(re.findall(r"\d+", sentence))  # a set would be in another order in each process
    for _ in range(1, COPIES):
        others = {digits: str(chance.randint(1, 99)) for digits in numbers}
        changed = [with_numbers(text, others) for text in (sentence, question, answer)]
        yield talk_on(*changed)


def with_numbers(text: str, others: dict[str, str]) -> str:
    """The text with other numbers in the place of these.

    >>> with_numbers("60 tallies, 7 at most", {"60": "12"})
    '12 tallies, 7 at most'
    """
    return re.sub(r"\d+", lambda match: others.get(match[0], match[0]), text)


def named(sentence: str, question: str) -> Iterator[str]:
    """The sentence's numbers and names that the question does not have: a baseline takes the first."""
    asked = normalise(question)
    names = NAMED.findall(sentence.partition(". ")[2])
    return (name for name in names if normalise(name) not in asked)


def gaps(chunk: Chunk, chance: Random) -> Iterator[Conversation]:
    """Questions that need nobody to write them: a number or a name of a sentence is asked for by the words
    round it.
    """
    for text, (start, end) in zip(chunk.window_texts(), chunk.windows):
        sentence = chunk.text[start:end]
        for match in NAMED.finditer(sentence):
            before, after = sentence[: match.start()].split()[-4:], sentence[match.end() :].split()[:4]
            question = " ".join([*before, "what", *after]).rstrip(".;:,") + "?"
            yield from talks_on(text, question, match[0], chance)
