"""Week 11. A question that needs the one before it, made to stand by itself before it is searched.

"And for how long?" names nothing: its embedding is near whatever lasts. The rule here is one of three that
week 11 measures: it looks at a question's first words and its pronouns, and puts before it what was asked, or
the title of the page that answered.

Source of the task: Elgohary, Peskov & Boyd-Graber, "Can You Unpack That? Learning to Rewrite
Questions-in-Context" (2019).
"""

import re
from collections.abc import Callable, Sequence

from shared.retrieval.bm25 import terms
from shared.retrieval.filters import Where
from shared.retrieval.index import Index

ELLIPSIS = re.compile(r"(and|but|or|what about|how about)\b", re.IGNORECASE)
"""How a question begins that leaves out what the one before it said."""
POINTING = re.compile(r"\b(it|its|they|them|their|he|him|his|she|her|there|that|this|these|those|one)\b")
FEW_TERMS = 2
"""A question with at most so many words of content may name no subject."""
MOST_EARLIER = 4
"""So many of the questions before are looked at."""


def needs_context(question: str) -> bool:
    """Whether a question reads as one that follows another.

    >>> needs_context("And for how long?"), needs_context("How warm is it there?")
    (True, True)
    >>> needs_context("How long is the main pool of the Sea Baths?")
    False
    """
    if ELLIPSIS.match(question.strip()) or POINTING.search(question.lower()):
        return True
    return len(set(terms(question))) <= FEW_TERMS


def with_context(question: str, before: str, topic: str) -> str:
    """The question with what it leaves out: an ellipsis after the whole question before it, any other after
    the topic.

    >>> with_context("And a dog?", "What does an adult pay?", "Ferry Fares")
    'What does an adult pay? And a dog?'
    >>> with_context("How warm is it?", "What does a visit cost?", "Sea Baths")
    'Sea Baths: How warm is it?'
    """
    if ELLIPSIS.match(question.strip()):
        return f"{before} {question}"
    return f"{topic}: {question}"


def title_of_best(index: Index, where: Where | None = None) -> Callable[[str], str]:
    """Finds the topic of a question: the title of the page that it is nearest to. where: as in a search."""

    def topic(question: str) -> str:
        hits = index.search(question, 1, where=where)
        return hits[0].chunk.title if hits else ""

    return topic


def self_contained(question: str, earlier: Sequence[str], topic: Callable[[str], str]) -> str:
    """The question as it can be searched. earlier: what was asked before in this conversation, oldest first.

    topic: finds what a question is about. A question that stands by itself is returned as it is.
    """
    before = ""
    for asked in [*earlier[-MOST_EARLIER:], question]:
        if before and needs_context(asked):
            asked = with_context(asked, before, topic(before))
        before = asked
    return before
