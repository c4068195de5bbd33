"""What week 11 compares, and what its runs are called: in the logs, in tables and in plots."""

from shared.models.names import model_label
from shared.retrieval.ranking import exact_match, holds_answer, token_f1

RETRIEVERS = {"bm25": "BM25", "dense": "MiniLM", "hybrid": "BM25 + MiniLM", "own": "week 6's model"}
CONDITIONS = {
    "without": "without passages",
    "retrieved": "with what was found",
    "right": "with the right passage",
}
MEASURES = {"exact": exact_match, "f1": token_f1, "holds": holds_answer}
"""Of answers: each is given an answer and the right ones."""
WINDOWS = {
    "whole chunk": None,
    "128 tokens": (128, 16),
    "64 tokens": (64, 16),
    "32 tokens": (32, 8),
    "two sentences": 2,
    "sentence": 1,
}
"""What is embedded by itself: pieces of so many tokens with an overlap, or so many sentences."""
EFFORTS = {"flat": (None,), "pq": (None,), "ivf": (1, 4, 16, 64, 256), "hnsw": (16, 64, 256)}
"""How hard each store searches; None: there is nothing to choose."""
QUOTED = {
    "generated": "the model writes, from the first passage",
    "sentence": "the nearest sentence (MiniLM)",
    "reranked": "the best sentence after re-ranking",
    "span": "a span of the nearest sentence",
    "reranked-span": "a span of the best sentence after re-ranking",
}
"""Answers that quote, and the generated ones beside them."""
SIGNS = {
    "score": "the nearest passage's score",
    "names": "a name that no document has",
    "either": "either of them",
}
"""What tells a question about the world from one about the documents."""
REWRITES = {
    "as-is": "as it is",
    "both": "after the question before it",
    "title": "after the title of the page before",
    "rule": "by the rule",
    "model": "as a model writes it",
}
"""What is searched for a follow-up question."""


def quoted_label(key: str, model: str) -> str:
    """One of `QUOTED` for people.

    >>> quoted_label("generated", "gemma3-270m")
    'Gemma 3 270M writes, from the first passage'
    """
    return QUOTED[key].replace("the model", model_label(model))


DEPTHS = (1, 2, 3, 5, 8)
"""How many passages, or sentences, `--study depths` looks at."""
