"""Week 0. For week 11: a map of passages with a question on it, and what several searches find for it."""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from shared.course.explorers.page import Explorer
from shared.course.explorers.pictures import as_image
from shared.course.report import figure
from shared.course.style import style

SHOWN = 5
"""Hits of a search that are listed with their scores."""
DEEPEST = 200
"""Places of a ranking that are kept at most."""
CUT = 220
"""Characters of a passage that are shown."""


class CitedPassage(Protocol):
    """What the explorer asks of a passage: `shared.retrieval.documents.Chunk` has it."""

    @property
    def id(self) -> str:
        """No other passage has it."""

    @property
    def cite(self) -> str:
        """Where to look it up, in a few words."""

    @property
    def passage(self) -> str:
        """Its text with its headings."""

    @property
    def text(self) -> str:
        """Its text alone."""


Found = Iterable[tuple[Any, float]]
"""Passages with their scores, the best first."""


def passages_explorer(
    chunks: Sequence[CitedPassage],
    questions: Mapping[str, Sequence[int]],
    embed: Callable[[Sequence[str]], np.ndarray],
    searches: Mapping[str, Callable[[str], Found]],
    *,
    reranked: Mapping[str, Found] | None = None,
    title: str = "The map of passages, and what is found on it",
) -> Explorer:
    """Choose a question, see where it falls among the passages and what each search finds; fuse two searches.

    questions: each with the numbers (from 0, in `chunks`) of the passages that answer it. embed: texts to
    vectors, float32 [len(texts), dim]; the map is the plane through passages of which most of their variance
    is left (PCA). searches: two of them by the names that are shown, the first by meaning, whose scores are
    cosines, the second by words. reranked: for some of the questions a better order of the first few. Raises
    ValueError for fewer than three passages, no question, a question without a right passage, other than two
    searches, and where the explorer becomes too large (fewer questions, or fewer hits of each search).
    """
    if len(chunks) < 3 or not questions or len(searches) != 2:
        raise ValueError(
            f"{len(chunks)} passages, {len(questions)} questions and {len(searches)} searches: the map needs"
            " at least three passages and one question, and two searches: by meaning, and by words"
        )
    for question, right in questions.items():
        if not right or not all(0 <= number < len(chunks) for number in right):
            raise ValueError(
                f"{question!r}: the right passages are {list(right)}, and have to be at least one number from"
                f" 0 to {len(chunks) - 1}"
            )
    reranked = reranked or {}
    unknown = [question for question in reranked if question not in questions]
    if unknown:
        raise ValueError(f"{unknown[0]!r} was re-ranked, and is not among the questions: give it there too")
    numbers = {chunk.id: number for number, chunk in enumerate(chunks)}
    places, asked, share = plane(embed([chunk.passage for chunk in chunks]), embed(list(questions)))
    entries = []
    for (question, right), at in zip(questions.items(), asked.tolist(), strict=True):
        found = [_found(search(question), numbers) for search in searches.values()]
        entry = {"text": question, "right": list(right), "at": at, "found": [_entry(*one) for one in found]}
        entry["near"] = _in_bytes(np.clip(np.array(found[0][1]) * 255, 0, 255).round(), "u1")
        if question in reranked:
            ids, scores = _found(reranked[question], numbers)
            entry["reranked"] = {"ids": ids, "scores": _rounded(scores)}
        entries.append(entry)
    data = {
        "passages": [{"cite": chunk.cite, "text": _cut(chunk.text)} for chunk in chunks],
        "places": places.tolist(),
        "share": share,
        "names": list(searches),
        "questions": entries,
    }
    words = (
        f"{len(chunks)} passages (dots) and {len(questions)} questions (crosses) on the plane that keeps"
        f" {share:.0%} of the passages' variance."
    )
    return Explorer(title, ("passages.js",), data, as_image(_picture(places, asked), words))


def plane(passages: np.ndarray, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Vectors [n, dim] and [m, dim] on the plane of the first's largest variance, and its share of that.

    The plane goes through the mean of `passages`. Of each axis the largest part is positive. Coordinates have
    four decimals.
    """
    mean = passages.mean(axis=0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(passages - mean, full_matrices=False)
    axes = axes[:2] * np.sign(axes[[0, 1], np.abs(axes[:2]).argmax(axis=1)])[:, None]
    share = float((sizes[:2] ** 2).sum() / (sizes**2).sum())
    return ((passages - mean) @ axes.T).round(4), ((questions - mean) @ axes.T).round(4), round(share, 4)


def _found(hits: Found, numbers: Mapping[str, int]) -> tuple[list[int], list[float]]:
    """Numbers and scores of passages, each at its best place alone."""
    best: dict[int, float] = {}
    for chunk, score in hits:
        best.setdefault(numbers[chunk.id], float(score))
    return list(best)[:DEEPEST], list(best.values())[:DEEPEST]


def _entry(ids: list[int], scores: list[float]) -> dict[str, Any]:
    return {"ids": _in_bytes(ids, "<u2"), "scores": _rounded(scores[:SHOWN])}


def _rounded(scores: Sequence[float]) -> list[float]:
    return [round(score, 4) for score in scores]


def _in_bytes(numbers: Any, kind: str) -> str:
    """Whole numbers in base64."""
    return base64.b64encode(np.asarray(numbers).astype(kind).tobytes()).decode("ascii")


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CUT else f"{text[:CUT].rsplit(' ', 1)[0]} …"


def _picture(places: np.ndarray, asked: np.ndarray) -> Any:
    """The map."""
    with style():
        fig, ax = figure(7, 6)
        ax.scatter(*places.T, s=12, color="#8c959f", label="passages")
        ax.scatter(*asked.T, s=22, marker="x", color="#d98a00", label="questions")
        ax.set(xlabel="first component", ylabel="second component")
        ax.legend()
        return fig
