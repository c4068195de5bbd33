"""The halves of week 11's questions: what is chosen is chosen on A, what is reported is measured on B."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from library import Library
from shared.retrieval.ranking import Interval, bootstrap, exact_match, holds_answer, token_f1

HALVES = ("A", "B")


def half_of(library: Library, question: dict[str, Any]) -> str:
    """The half that a question is in: by its page, so that no page is in both."""
    sources = sorted({chunk.source for chunk in library.chunks})
    return HALVES[sources.index(question["document"]) % 2]


def questions_in(library: Library, half: str) -> list[dict[str, Any]]:
    """The questions of a half."""
    return [question for question in library.asked if half_of(library, question) == half]


def answer_scores(answers: Sequence[str], asked: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """Exact match, token F1, whether the right answer is contained, and how many words it took."""
    pairs = list(zip(answers, asked, strict=True))
    return {
        "exact": bootstrap([exact_match(a, q["answers"]) for a, q in pairs]),
        "f1": bootstrap([token_f1(a, q["answers"]) for a, q in pairs]),
        "holds": bootstrap([holds_answer(a, q["answers"]) for a, q in pairs]),
        "words": bootstrap([float(len(a.split())) for a in answers]),
    }


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of ours less theirs on the same questions, with its interval over questions."""
    return bootstrap(np.subtract(ours, theirs).tolist())
