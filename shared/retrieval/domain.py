"""Week 11. Whether the documents can answer a question at all: by the nearest passage's score, and by names
that no document has.

Both are signals of the search alone, before a model has written anything. What the documents are about but do
not say passes through: the nearest passage is near then, and silent on the one thing.
"""

from shared.retrieval.index import Hit, Index


def default_threshold(index: Index, by: str = "dense") -> float:
    """The score below which a question is taken to be about nothing in the documents: the embedder's own,
    where the search is by meaning; else 0.
    """
    return index.embedder.least_score if by == "dense" else 0.0


def is_outside(index: Index, question: str, nearest: Hit | None, least_score: float) -> bool:
    """Whether the question is about nothing in the documents. nearest: the best passage for it; None where
    there is none.
    """
    if nearest is None or nearest.score < least_score:
        return True
    return bool(index.unknown_names(question))
