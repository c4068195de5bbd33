"""The graded exercises of week 11: windows with overlap, BM25 as a formula and as a search, mean pooling,
rank fusion, nDCG, the way from a question to a cited answer, token F1.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.retrieval import bm25 as promoted
from shared.retrieval import evidence, rag
from shared.retrieval import index as promoted_index
from shared.retrieval.embedders import HiddenStates
from shared.retrieval.ranking import holds_answer, ndcg_at, token_f1
from shared.retrieval.splitting import split

# ---- 1. windows with overlap


def window_spans(tokens: int, size: int, overlap: int) -> list[tuple[int, int]]:
    return _spans(tokens, size, overlap)


def _spans(
    tokens: int, size: int, overlap: int, *, tail: bool = False, full: bool = False, step: int | None = None
) -> list[tuple[int, int]]:
    """tail: go on after the end was reached. full: only whole windows. step: from one start to the next."""
    spans, start = [], 0
    while start < tokens:
        end = min(start + size, tokens)
        if not full or end - start == size:
            spans.append((start, end))
        if end == tokens and not tail:
            break
        start += step or size - overlap
    return spans


def _span_cases(generator: Generator) -> list[tuple[int, int, int]]:
    tokens = random_int(generator, 40, 80)
    return [(10, 4, 1), (11, 4, 1), (3, 8, 2), (0, 4, 2), (tokens, 9, 4), (20, 5, 0)]


WINDOW_SPANS = Exercise(
    task="""A text of `tokens` tokens is cut into windows of at most `size`, and each window begins with the
    last `overlap` tokens of the one before. Return a list of (start, end), end not included. The last window
    ends where the text does, and may be shorter; there is none after it. No tokens give no windows. `overlap`
    is below `size`.""",
    reference=window_spans,
    cases=_span_cases,
    forbids=(split,),
    valid=lambda tokens, size, overlap: tokens >= 0 and 0 <= overlap < size,
    mistakes=(
        Mistake(
            "a window inside the last one",
            lambda tokens, size, overlap: _spans(tokens, size, overlap, tail=True),
            "A window begins after one has reached the end of the text. It holds nothing but overlap: the"
            " same words are found twice.",
        ),
        Mistake(
            "the rest is dropped",
            lambda tokens, size, overlap: _spans(tokens, size, overlap, full=True),
            "A shorter last window is left out, so the end of every text can never be found.",
        ),
        Mistake(
            "steps of a whole window",
            lambda tokens, size, overlap: _spans(tokens, size, overlap, step=size),
            "The windows do not overlap. A sentence that lies across a border is then whole in none of them.",
        ),
        Mistake(
            "steps of the overlap",
            lambda tokens, size, overlap: _spans(tokens, size, overlap, step=max(overlap, 1)),
            "The start moves on by the overlap. It is size - overlap tokens from one start to the next, so"
            " that `overlap` of them are shared.",
        ),
    ),
    hints=(
        "How far apart do two windows begin, when the second repeats the last `overlap` tokens of the first?",
        "Go on from start to start + size - overlap. Stop as soon as a window has reached the end.",
        (
            "start = 0; while start < tokens: append (start, min(start + size, tokens)); break if start +"
            " size >= tokens; start += size - overlap."
        ),
    ),
)


# ---- 2. BM25


def bm25_scores(counts: Tensor, question: Tensor, k1: float, b: float) -> Tensor:
    return _bm25(counts, question, k1, b)


def _idf(counts: Tensor) -> Tensor:
    n, df = len(counts), (counts > 0).sum(0)
    return torch.log(1 + (n - df + 0.5) / (df + 0.5))


def _bm25(
    counts: Tensor,
    question: Tensor,
    k1: float,
    b: float,
    *,
    idf: Callable[[Tensor], Tensor] = _idf,
    saturated: bool = True,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Tensor:
    """idf: of the counts. saturated: tf / (tf + ...), rather than tf. mean: of the lengths."""
    part = counts
    if saturated:
        length = counts.sum(1, keepdim=True)
        part = counts / (counts + k1 * (1 - b + b * length / mean(length)))
    return (idf(counts) * part)[:, question].sum(1)


def _idf_of_occurrences(counts: Tensor) -> Tensor:
    n, occurrences = len(counts), counts.sum(0)
    return torch.log(1 + (n - occurrences + 0.5) / (occurrences + 0.5))


def _idf_without_1(counts: Tensor) -> Tensor:
    n, df = len(counts), (counts > 0).sum(0)
    return torch.log((n - df + 0.5) / (df + 0.5))


def _are_counts(counts: Tensor, question: Tensor, k1: float, b: float) -> bool:
    whole = counts.dim() == 2 and bool((counts >= 0).all() and (counts.sum(1) > 0).all())
    once = question.dim() == 1 and len(question.unique()) == len(question) > 0
    return whole and once and int(question.min()) >= 0 and k1 >= 0 and 0 <= b <= 1


def _bm25_cases(generator: Generator) -> list[tuple[Tensor, Tensor, float, float]]:
    def case(n: int, terms: int, k1: float, b: float) -> tuple[Tensor, Tensor, float, float]:
        counts = torch.randint(0, 4, (n, terms), generator=generator)
        counts *= torch.randint(0, 2, (n, terms), generator=generator)  # half of them 0
        counts[:, 0] = torch.arange(1, n + 1)  # texts of different length, and a term that is in all
        others = 1 + torch.randperm(terms - 1, generator=generator)[:3]
        return counts.float(), torch.tensor([0, *others.tolist()]), k1, b

    return [
        case(4, 6, 1.2, 0.75),
        case(7, 9, 1.5, 0.5),
        case(5, 5, 0.9, 1.0),
        case(12, 8, 2.0, 0.4),
        case(3, 12, 1.2, 0.75),
    ]


BM25_SCORES = Exercise(
    task="""`counts` is float32 [texts, terms]: how often each text has each term. `question` is int64
    [asked], the terms asked for, all different. Return float32 [texts]: the sum over the question's terms of
    $\\mathrm{idf} \\cdot \\frac{\\mathrm{tf}}{\\mathrm{tf} + k_1 (1 - b + b \\cdot \\mathrm{length} /
    \\mathrm{mean\\ length})}$. tf is the term's count in the text, a text's length is the sum of its counts,
    the mean is over all texts, and $\\mathrm{idf} = \\ln(1 + (n - \\mathrm{df} + 0.5) / (\\mathrm{df} +
    0.5))$ with n texts, df of which have the term. No text is empty.""",
    reference=bm25_scores,
    cases=_bm25_cases,
    forbids=(promoted.BM25.search,),
    valid=_are_counts,
    mistakes=(
        Mistake(
            "no idf",
            lambda counts, question, k1, b: _bm25(
                counts, question, k1, b, idf=lambda counts: torch.ones(counts.size(1))
            ),
            "All terms count the same. A word that is in every text then decides as much as the one name that"
            " is in a single text.",
        ),
        Mistake(
            "idf from occurrences",
            lambda counts, question, k1, b: _bm25(counts, question, k1, b, idf=_idf_of_occurrences),
            "df is how many texts have the term, not how often it occurs: a text that says a word ten times"
            " is still one text.",
        ),
        Mistake(
            "idf without 1 +",
            lambda counts, question, k1, b: _bm25(counts, question, k1, b, idf=_idf_without_1),
            "Without the 1 inside, the logarithm is negative for a term that more than half of the texts"
            " have: having it would be held against them.",
        ),
        Mistake(
            "no saturation",
            lambda counts, question, k1, b: _bm25(counts, question, k1, b, saturated=False),
            "The count itself is used. A text that repeats a word then wins; tf / (tf + ...) lets the tenth"
            " occurrence matter less than the first.",
        ),
        Mistake(
            "b is forgotten",
            lambda counts, question, k1, b: _bm25(counts, question, k1, 0.0),
            "Length plays no part. Long texts have more of every word, and win by that alone; b says how much"
            " of that is taken back.",
        ),
        Mistake(
            "the factor k1 + 1",
            lambda counts, question, k1, b: (k1 + 1) * _bm25(counts, question, k1, b),
            "All scores are k1 + 1 times as large. The numerator of many books is tf * (k1 + 1); that changes"
            " no order, and this formula has tf alone.",
        ),
        Mistake(
            "sum of lengths for their mean",
            lambda counts, question, k1, b: _bm25(counts, question, k1, b, mean=torch.sum),
            "Lengths are divided by the length of all texts together, so each looks very short. Divide by the"
            " mean.",
        ),
    ),
    hints=(
        "df comes from counts > 0, summed over the texts; length from counts, summed over the terms.",
        (
            "Keep length as [texts, 1], so that it meets counts [texts, terms]. Work out all terms, and take"
            " the question's columns in the end."
        ),
        (
            "part = counts / (counts + k1 * (1 - b + b * length / length.mean())); return (idf * part)[:,"
            " question].sum(1)."
        ),
    ),
)


# ---- 3. a search by words


Terms = Callable[[str], list[str]]


class BM25:
    def __init__(self, terms: Terms, k1: float = 1.2, b: float = 0.75):
        self.terms = terms
        self.k1 = k1
        self.b = b
        self.counts: dict[int, Counter[str]] = {}

    def add(self, ids: list[int], texts: list[str]) -> None:
        for i, text in zip(ids, texts):
            if i in self.counts:
                raise ValueError(f"id {i} is there already")
            self.counts[i] = Counter(self.terms(text))

    def delete(self, ids: list[int]) -> None:
        for i in ids:
            del self.counts[i]

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        scores: dict[int, float] = {}
        for term in self.asked(question):
            for i, counts in self.counts.items():
                if counts[term]:
                    scores[i] = scores.get(i, 0.0) + self.idf(term) * self.part(counts[term], i)
        return self.ranked(scores)[:k]

    # ---- the parts, each of which a mistake replaces

    def asked(self, question: str) -> list[str]:
        return self.terms(question)

    def df(self, term: str) -> int:
        return sum(term in counts for counts in self.counts.values())

    def idf(self, term: str) -> float:
        return math.log(1 + (len(self.counts) - self.df(term) + 0.5) / (self.df(term) + 0.5))

    def lengths(self) -> dict[int, int]:
        return {i: counts.total() for i, counts in self.counts.items()}

    def mean_length(self) -> float:
        return sum(self.lengths().values()) / len(self.counts)

    def part(self, tf: int, i: int) -> float:
        relative = self.counts[i].total() / self.mean_length()
        return tf / (tf + self.k1 * (1 - self.b + self.b * relative))

    def ranked(self, scores: dict[int, float]) -> list[tuple[int, float]]:
        return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


BM25_STUB = """class BM25:
    def __init__(
        self,
        terms: Callable[[str], list[str]],
        k1: float = 1.2,
        b: float = 0.75,
    ):
        # your code here
        ...

    def add(self, ids: list[int], texts: list[str]) -> None:
        # your code here
        ...

    def delete(self, ids: list[int]) -> None:
        # your code here
        ...

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        # [(id, score), ...], the best first
        # your code here
        ...
"""


def _words_in(text: str) -> list[str]:
    """What the grader gives as `terms`."""
    return re.findall(r"\w+", text.lower())


WORDS = ("ferry", "tram", "pier", "dog", "fare", "lamp")


def _bm25_search_cases(generator: Generator) -> list[tuple]:
    def text(most: int) -> str:
        length = random_int(generator, 1, most)
        return " ".join(WORDS[random_int(generator, 0, len(WORDS))] for _ in range(length))

    def case(texts: int, later: int, asked: int, k: int, k1: float, b: float) -> tuple:
        ids = (torch.randperm(3 * texts, generator=generator)[:texts] - 2).tolist()
        question = " ".join(WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:asked])
        return [text(9) for _ in ids], ids, [text(6) for _ in range(later)], question, k, k1, b

    return [
        (["a dog", "a tram", "the dog and the tram"], [1, 2, 3], ["a dog"], "dog", 2, 1.2, 0.75),
        (["ferry", "ferry fare", "ferry ferry tram"], [4, 2, 6], ["pier"], "ferry", 3, 1.2, 0.75),  # in all
        (["ferry", "tram"], [0, 1], ["lamp lamp"], "lamp tram", 5, 1.2, 0.75),  # in none
        (["ferry fare dog", "tram", "ferry"], [1, 2, 3], ["fare"], "ferry tram tram", 3, 1.5, 0.6),
        (["lamp pier", "lamp", "lamp", "dog", "lamp"], [9, 7, 3, 5, 1], ["lamp"], "lamp", 2, 1.2, 0.75),
        (
            ["", "Ferry! FERRY, ferry-boat.", "fare", "a fare"],
            [1, 5, 2, 8],
            [""],
            "FERRY? Fare",
            9,
            1.2,
            0.75,
        ),
        (["", "."], [2, 1], ["dog", "dog tram"], "dog", 3, 1.2, 0.75),  # of length 0
        (["dog dog dog", "dog"], [1, 2], ["tram tram tram tram"], "?!", 2, 1.2, 0.75),
        case(6, 3, 2, 4, 0.8, 0.5),
        case(9, 5, 3, 3, 2.0, 1.0),
        case(7, 2, 3, 20, 0.0, 0.0),
    ]


def _observe_bm25(
    answer: Callable,
    texts: list[str],
    ids: list[int],
    later: list[str],
    question: str,
    k: int,
    k1: float,
    b: float,
) -> Iterator[tuple[str, Any]]:
    building.takes(answer, "terms", "k1", "b")
    bm25 = answer(_words_in, k1, b)
    for name in ("add", "delete"):
        building.method(bm25, name)
    search = building.method(bm25, "search")
    everything = len(texts) + len(later)
    bm25.add(list(ids), list(texts))
    before = search(question, everything)
    yield "what is found", before
    yield "the best k", search(question, k)
    further = list(range(max(ids) + 1, max(ids) + 1 + len(later)))
    bm25.add(further, list(later))
    yield "what is found after more texts were added", search(question, everything)
    bm25.delete(list(further))
    after = search(question, everything)
    if after != before:
        raise NotRight(
            f"texts were added and deleted again, and search({question!r}, {everything}) gives {after} where"
            f" it gave {before} before: something of the deleted texts is still counted. Document"
            " frequencies, the number of texts and the mean length are those of the texts that are there."
        )
    bm25.delete(ids[:1])
    yield "what is found after the first text was deleted", search(question, everything)
    bm25.add(ids[:1], texts[-1:])
    yield "what is found after its id was given to another text", search(question, everything)
    yield "whether a second text of the same id is a ValueError", _refuses(bm25, ids[0])
    yield "what is found where no text was added", answer(_words_in).search(question, k)
    other = answer(_words_in)
    other.add(list(ids), list(texts))
    yield "what is found with the usual k1 and b", other.search(question, everything)


def _refuses(bm25: Any, i: int) -> bool:
    try:
        bm25.add([i], ["dog"])
    except ValueError:
        return True
    return False


def _are_bm25_texts(
    texts: list[str], ids: list[int], later: list[str], question: str, k: int, k1: float, b: float
) -> bool:
    return len(texts) == len(ids) == len(set(ids)) > 0 and k >= 1 and k1 >= 0 and 0 <= b <= 1


class _FactorK1(BM25):
    def part(self, tf: int, i: int) -> float:
        return (self.k1 + 1) * super().part(tf, i)


class _NegativeIdf(BM25):
    def idf(self, term: str) -> float:
        return math.log((len(self.counts) - self.df(term) + 0.5) / (self.df(term) + 0.5))


class _OccurrencesForTexts(BM25):
    def df(self, term: str) -> int:
        return sum(counts[term] for counts in self.counts.values())


class _NotSaturated(BM25):
    def part(self, tf: int, i: int) -> float:
        return tf


class _LengthForgotten(BM25):
    def part(self, tf: int, i: int) -> float:
        return tf / (tf + self.k1)


class _AskedOnce(BM25):
    def asked(self, question: str) -> list[str]:
        return list(dict.fromkeys(self.terms(question)))


class _TiesAsAdded(BM25):
    def ranked(self, scores: dict[int, float]) -> list[tuple[int, float]]:
        added = {i: scores[i] for i in self.counts if i in scores}
        return sorted(added.items(), key=lambda pair: -pair[1])


class _LowestFirst(BM25):
    def ranked(self, scores: dict[int, float]) -> list[tuple[int, float]]:
        return super().ranked(scores)[::-1]


class _HighestIdOfEquals(BM25):
    def ranked(self, scores: dict[int, float]) -> list[tuple[int, float]]:
        return sorted(scores.items(), key=lambda pair: (pair[1], pair[0]), reverse=True)


class _AllAreFound(BM25):
    def ranked(self, scores: dict[int, float]) -> list[tuple[int, float]]:
        return super().ranked(dict.fromkeys(self.counts, 0.0) | scores)


class _EmptyLeftOut(BM25):
    def mean_length(self) -> float:
        lengths = [length for length in self.lengths().values() if length]
        return sum(lengths) / max(1, len(lengths))


class _CutAtSpaces(BM25):
    def __init__(self, terms: Terms, k1: float = 1.2, b: float = 0.75):
        super().__init__(str.split, k1, b)


class _SilentlyReplaced(BM25):
    def add(self, ids: list[int], texts: list[str]) -> None:
        self.counts |= {i: Counter(self.terms(text)) for i, text in zip(ids, texts)}


class _CountedOnce(BM25):
    """Keeps what it counted with the first texts."""

    def __init__(self, terms: Terms, k1: float = 1.2, b: float = 0.75):
        super().__init__(terms, k1, b)
        self.first: dict[int, Counter[str]] = {}

    def add(self, ids: list[int], texts: list[str]) -> None:
        super().add(ids, texts)
        self.first = self.first or dict(self.counts)


class _IdfOfTheFirst(_CountedOnce):
    def idf(self, term: str) -> float:
        df = sum(term in counts for counts in self.first.values())
        return math.log(1 + (len(self.first) - df + 0.5) / (df + 0.5))


class _MeanOfTheFirst(_CountedOnce):
    def mean_length(self) -> float:
        return sum(counts.total() for counts in self.first.values()) / len(self.first) or 1.0


class _StillCounted(BM25):
    """What is deleted stays in the document frequencies."""

    def __init__(self, terms: Terms, k1: float = 1.2, b: float = 0.75):
        super().__init__(terms, k1, b)
        self.texts_with: Counter[str] = Counter()

    def add(self, ids: list[int], texts: list[str]) -> None:
        super().add(ids, texts)
        for i in ids:
            self.texts_with.update(self.counts[i].keys())

    def df(self, term: str) -> int:
        return self.texts_with[term]

    def idf(self, term: str) -> float:
        n = len(self.counts)
        return math.log(1 + (n - self.df(term) + 0.5) / (self.df(term) + 0.5))


class _MeanStays(BM25):
    """The mean length still counts what was deleted."""

    def __init__(self, terms: Terms, k1: float = 1.2, b: float = 0.75):
        super().__init__(terms, k1, b)
        self.all_lengths: list[int] = []

    def add(self, ids: list[int], texts: list[str]) -> None:
        super().add(ids, texts)
        self.all_lengths += [self.counts[i].total() for i in ids]

    def mean_length(self) -> float:
        return sum(self.all_lengths) / len(self.all_lengths) or 1.0


BM25_SEARCH = Exercise(
    task="""A search by words, whose texts come and go. `BM25(terms, k1, b)` begins without texts.
    `terms(text)` is a function that cuts a text, or a question, into its terms, a list of str; a term may
    be in it more than once.

    - `add(ids, texts)` takes texts in, each with its id, an int. An id that is there already is a
      ValueError.
    - `delete(ids)` takes texts out again. Then all is as if they had never been added, and their ids may
      be given anew.
    - `search(question, k)` returns a list of (id, score), the best first: at most k, and only texts that
      have a term of the question. Of equal scores the lower id comes first.

    The score is that of your `bm25_scores`, the sum over the question's terms of $\\mathrm{idf} \\cdot
    \\frac{\\mathrm{tf}}{\\mathrm{tf} + k_1 (1 - b + b \\cdot \\mathrm{length} / \\mathrm{mean\\ length})}$
    with $\\mathrm{idf} = \\ln(1 + (n - \\mathrm{df} + 0.5) / (\\mathrm{df} + 0.5))$. A term that the
    question has twice counts twice. n, df and the mean length are those of all texts that are there at the
    moment of the search, texts without a term among them: their length is 0. Where there are no texts,
    nothing is found.""",
    reference=BM25,
    cases=_bm25_search_cases,
    observe=_observe_bm25,
    stub=BM25_STUB,
    points=3,
    forbids=(promoted.BM25.search,),
    valid=_are_bm25_texts,
    mistakes=(
        Mistake(
            "the factor k1 + 1",
            _FactorK1,
            "All scores are k1 + 1 times as large. Many books have tf * (k1 + 1) in the numerator; it changes"
            " no order, and this formula, which is Lucene's since 2019, has tf alone.",
        ),
        Mistake(
            "idf without 1 +",
            _NegativeIdf,
            "Without the 1 inside the logarithm, a term that more than half of the texts have counts against"
            " them.",
        ),
        Mistake(
            "idf from occurrences",
            _OccurrencesForTexts,
            "df was counted in occurrences. It is how many texts have the term: one that says it ten times is"
            " one text.",
        ),
        Mistake(
            "no saturation",
            _NotSaturated,
            "The count itself is used. The tenth occurrence of a term should matter less than the first: tf /"
            " (tf + ...).",
        ),
        Mistake(
            "the length plays no part",
            _LengthForgotten,
            "The length of the text is not used. A long text has more of every word, and wins by that alone;"
            " b says how much of it is taken back.",
        ),
        Mistake(
            "a term counts once however often it is asked for",
            _AskedOnce,
            "The question's terms became a set. A term that it has twice counts twice, as it does in Lucene.",
        ),
        Mistake(
            "equals in the order in which they were added",
            _TiesAsAdded,
            "Texts of equal score come in the order in which they were added. By id they come in one order"
            " however the index was built: sort by (-score, id).",
        ),
        Mistake(
            "of equals the higher id",
            _HighestIdOfEquals,
            "Of equal scores the higher id comes first: reverse=True turned the ids round as well. Sort by"
            " (-score, id).",
        ),
        Mistake(
            "the lowest score first",
            _LowestFirst,
            "The ranking begins with the worst. sorted goes upwards: negate the score.",
        ),
        Mistake(
            "texts without a term of the question are found",
            _AllAreFound,
            "Texts that share no term with the question are in the list, with a score of 0. They are not"
            " found: a fusion would give them a place.",
        ),
        Mistake(
            "empty texts are left out of the mean",
            _EmptyLeftOut,
            "The mean length was taken over the texts that have a term. It is over all texts that are there.",
        ),
        Mistake(
            "cut at spaces",
            _CutAtSpaces,
            "The texts were cut with split(), and `terms` was not used. `Ferry!` and `ferry` are then two"
            " words.",
        ),
        Mistake(
            "a text of a known id takes its place",
            _SilentlyReplaced,
            "Adding an id that is there already went by in silence, and the first text is gone. Raise a"
            " ValueError: whoever means it deletes first.",
        ),
        Mistake(
            "the idf of the first texts",
            _IdfOfTheFirst,
            "idf was worked out when the first texts were added, and stayed so. Each text that comes or goes"
            " changes n, and df of its terms: work it out in the search.",
        ),
        Mistake(
            "the mean length of the first texts",
            _MeanOfTheFirst,
            "The mean length was worked out when the first texts were added, and stayed so. Each text that"
            " comes or goes changes it.",
        ),
        Mistake(
            "deleted texts are counted in df",
            _StillCounted,
            "The document frequencies are not taken back when a text is deleted. Its terms then look more"
            " common than they are.",
        ),
        Mistake(
            "deleted texts are counted in the mean length",
            _MeanStays,
            "The mean length still has the deleted texts in it. Keep the lengths by id, and take them out as"
            " well.",
        ),
    ),
    hints=(
        "Keep for each id how often its text has each term: a Counter. What the formula needs (n, df, length,"
        " mean length) can be read from these at the moment of the search.",
        "In search: a dict scores, from id to score. For each term of the question work out df and idf, then"
        " go over the texts that have the term and add to their scores.",
        "for term in self.terms(question): having = [i for i, c in self.counts.items() if c[term]]; idf ="
        " math.log(1 + (n - len(having) + 0.5) / (len(having) + 0.5)); for each i in having add idf * tf /"
        " (tf + ...). At last sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k].",
    ),
)


# ---- 4. one vector for a text


def mean_embedding(states: Tensor, mask: Tensor) -> Tensor:
    return _unit(_mean(states, mask))


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    """Over the real tokens."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _unit(x: Tensor, dim: int = 1) -> Tensor:
    return x / x.norm(dim=dim, keepdim=True)


def _pool_cases(generator: Generator) -> list[tuple[Tensor, Tensor]]:
    def case(batch: int, time: int, channel: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(1, time, (batch, 1), generator=generator)
        lengths[0] = time
        return torch.randn(batch, time, channel, generator=generator) + 0.3, torch.arange(time) < lengths

    return [case(2, 4, 3), case(3, 5, 8), case(4, 7, 2), case(2, 9, 5), case(5, 3, 4)]


MEAN_EMBEDDING = Exercise(
    task="""`states` is float32 [batch, time, channel]: a model's hidden states for a batch of texts, padded
    to one length. `mask` is bool [batch, time], True for real tokens; every text has at least one. Return
    float32 [batch, channel]: for each text the mean over its real tokens, scaled to length 1, so that a
    product of two of them is their cosine.""",
    reference=mean_embedding,
    cases=_pool_cases,
    differentiable=True,
    forbids=(HiddenStates.embed,),
    valid=lambda states, mask: (
        states.dim() == 3 and states.shape[:2] == mask.shape and bool(mask.any(1).all())
    ),
    mistakes=(
        Mistake(
            "padding is averaged too",
            lambda states, mask: _unit(states.mean(1)),
            "The padding's states are in the mean. The same text then has another vector in another batch."
            " Multiply by the mask first.",
        ),
        Mistake(
            "not of length 1",
            _mean,
            "The mean is right, but its length is not 1: with inner products, texts with long vectors would"
            " be near to everything.",
        ),
        Mistake(
            "scaled before the mean",
            lambda states, mask: _mean(_unit(states, dim=2), mask),
            "Each token's state was scaled to length 1. It is the mean that has to be: a mean of unit vectors"
            " is shorter than 1.",
        ),
        Mistake(
            "only the first token",
            lambda states, mask: _unit(states[:, 0]),
            "This is the state of the first token, which BERT's [CLS] was made for. The mean over all real"
            " tokens is asked for; a causal model's first token has seen nothing of the text.",
        ),
        Mistake(
            "only the last token",
            lambda states, mask: _unit(states[torch.arange(len(mask)), mask.sum(1) - 1]),
            "This is the state of the last real token. It is one way to do it, but the mean over all of them"
            " is asked for.",
        ),
        Mistake(
            "scaled over the batch",
            lambda states, mask: _unit(_mean(states, mask), dim=0),
            "The norm goes over the texts of the batch. It belongs over the channels of each text.",
        ),
    ),
    hints=(
        (
            "mask[..., None] has a dimension for the channels. What is left of a padded position after"
            " multiplying by it?"
        ),
        "Sum over time and divide by the number of real tokens, then divide each row by its norm.",
        (
            "mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True); return mean /"
            " mean.norm(dim=1, keepdim=True)."
        ),
    ),
)


# ---- 5. two rankings in one


def fused_scores(places: Tensor, k: float) -> Tensor:
    return torch.where(places > 0, 1 / (k + places), 0.0).sum(0)


def _fusion_cases(generator: Generator) -> list[tuple[Tensor, float]]:
    def case(retrievers: int, texts: int, found: int, k: float) -> tuple[Tensor, float]:
        places = torch.stack([torch.randperm(texts, generator=generator) + 1 for _ in range(retrievers)])
        return torch.where(places <= found, places, 0), k

    return [
        case(2, 5, 3, 60.0),
        case(3, 8, 5, 60.0),
        case(2, 6, 6, 1.0),
        case(4, 7, 2, 10.0),
        case(2, 9, 4, 5.0),
    ]


FUSED_SCORES = Exercise(
    task="""`places` is int64 [retrievers, texts]: where each retriever ranks each text, 1 for its best, and 0
    where it did not find it. Return float32 [texts], the scores of reciprocal rank fusion: the sum of
    $1 / (k + \\mathrm{place})$ over the retrievers that found the text.""",
    reference=fused_scores,
    cases=_fusion_cases,
    forbids=(promoted_index.reciprocal_rank_fusion,),
    valid=lambda places, k: places.dim() == 2 and bool((places >= 0).all()) and k > 0,
    mistakes=(
        Mistake(
            "not found counts as the best place",
            lambda places, k: (1 / (k + places)).sum(0),
            "A text that was not found has the place 0, and gets 1 / k: more than the first. Let it get"
            " nothing.",
        ),
        Mistake(
            "places from 0",
            lambda places, k: torch.where(places > 0, 1 / (k + places - 1), 0.0).sum(0),
            "The best place is 1 here already, so it gives 1 / (k + 1). Nothing is to be taken off.",
        ),
        Mistake(
            "a mean",
            lambda places, k: fused_scores(places, k) / (places > 0).sum(0).clamp(min=1),
            "The sum was divided by how many found the text. That two retrievers agree is what should count.",
        ),
        Mistake(
            "only the best place",
            lambda places, k: torch.where(places > 0, 1 / (k + places), 0.0).amax(0),
            "Only the best of the places counts. Add them up: a text that both have second may well beat one"
            " that a single retriever has first.",
        ),
        Mistake(
            "the sum of the places",
            lambda places, k: 1 / (k + places.sum(0)),
            "The places were added before the reciprocal. A text far down one list is then lost, however high"
            " it stands in the other.",
        ),
    ),
    hints=(
        "Work out 1 / (k + place) for all, and then think of those with the place 0.",
        (
            "torch.where(places > 0, ..., 0.0) leaves out what was not found; then sum over the retrievers,"
            " dim 0."
        ),
        "return torch.where(places > 0, 1 / (k + places), 0.0).sum(0).",
    ),
)


# ---- 6. any number of rankings in one


def reciprocal_rank_fusion(
    rankings: list[list], k: float = 60, weights: list[float] | None = None
) -> list[tuple]:
    return _fused(rankings, weights, lambda place, weight: weight / (k + place))


def _fused(
    rankings: list[list],
    weights: list[float] | None,
    part: Callable[[int, float], float],
    together: Callable[[list[float]], float] = sum,
) -> list[tuple]:
    """part: what a place gives, in a ranking of some weight. together: of an item's parts."""
    parts: dict[Any, list[float]] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings)):
        for place, item in enumerate(ranking, 1):
            parts.setdefault(item, []).append(part(place, weight))
    return _best_first({item: together(values) for item, values in parts.items()})


def _best_first(scores: dict) -> list[tuple]:
    return sorted(scores.items(), key=lambda pair: -pair[1])


def _ranking_cases(generator: Generator) -> list[tuple]:
    def ranking(items: int, found: int) -> list[int]:
        return torch.randperm(items, generator=generator)[:found].tolist()

    first, second = ranking(7, 5), ranking(7, 7)
    return [
        ([["ferry", "tram", "pets"], ["tram", "museum", "ferry"]], 60.0, None),
        ([["a", "b", "c"]], 60.0, None),
        ([["b", "a"], ["a", "b"]], 60.0, None),  # equals
        ([["b", "c"], ["d", "a"]], 60.0, None),
        ([[], ["a", "b"], []], 60.0, None),
        ([], 60.0, None),
        ([["a", "b", "c"], ["c"]], 60.0, [1.0, 0.25]),
        ([first, second], 60.0, None),
        ([first, second], 1.0, None),
        ([ranking(6, 4), ranking(6, 6), ranking(6, 2)], 10.0, [1.0, 0.0, 2.3]),
        ([ranking(9, 9), ranking(9, 3), ranking(9, 5)], 0.0, [0.5, 1.9, 0.37]),
    ]


def _are_rankings(rankings: list[list], k: float, weights: list[float] | None) -> bool:
    """Whether each has an item once, there is a weight for each, and no sum of three is in doubt."""
    once = all(len(set(ranking)) == len(ranking) for ranking in rankings)
    weighted = weights is None or len(weights) == len(rankings)
    return once and weighted and k >= 0 and (len(rankings) < 3 or weights is not None or [] in rankings)


def _ordered_by_name(rankings: list[list], k: float, weights: list[float] | None) -> list[tuple]:
    return sorted(reciprocal_rank_fusion(rankings, k, weights), key=lambda pair: (-pair[1], pair[0]))


def _in_all_only(rankings: list[list], k: float, weights: list[float] | None) -> list[tuple]:
    return [
        pair for pair in reciprocal_rank_fusion(rankings, k, weights) if all(pair[0] in r for r in rankings)
    ]


def _missing_comes_last(rankings: list[list], k: float, weights: list[float] | None) -> list[tuple]:
    items = list(dict.fromkeys(item for ranking in rankings for item in ranking))
    longer = [[*ranking, *(item for item in items if item not in ranking)] for ranking in rankings]
    scores = dict(reciprocal_rank_fusion(longer, k, weights))
    return _best_first({item: scores[item] for item in items})


def _mean_of_the_found(rankings: list[list], k: float, weights: list[float] | None) -> list[tuple]:
    return _fused(rankings, weights, lambda p, w: w / (k + p), together=lambda x: sum(x) / len(x))


RECIPROCAL_RANK_FUSION = Exercise(
    task="""The same for rankings as a search returns them. `rankings` has any number of lists of ids, each
    list with the best first and no id twice; an id that a search did not find is missing in its list.
    `weights` has a number for each ranking, or is None: then each counts 1. In a ranking of weight w the id
    at place p, counted from 1, gets $w / (k + p)$. Return a list of (id, score) with the sum of what each id
    gets, best first; ids of equal score in the order in which they are first met, going through the first
    ranking, then the second, and so on.""",
    reference=reciprocal_rank_fusion,
    cases=_ranking_cases,
    valid=_are_rankings,
    stub="""def reciprocal_rank_fusion(
    rankings: list[list],
    k: float = 60,
    weights: list[float] | None = None,
) -> list[tuple]:
    # your code here
    ...
""",
    forbids=(promoted_index.reciprocal_rank_fusion,),
    mistakes=(
        Mistake(
            "places from 0",
            lambda rankings, k, weights: _fused(
                rankings, weights, lambda p, w: w / (k + p - 1) if k + p > 1 else w
            ),
            "The best place was counted as 0, as enumerate does by itself: enumerate(ranking, 1) counts from"
            " 1.",
        ),
        Mistake(
            "k is not used",
            lambda rankings, k, weights: _fused(rankings, weights, lambda p, w: w / p),
            "Each place gives 1 / p. Then the first place of one ranking outweighs two second places; a large"
            " k makes agreement count more than a single first place.",
        ),
        Mistake(
            "the weights are not used",
            lambda rankings, k, weights: reciprocal_rank_fusion(rankings, k, None),
            "All rankings count the same. `weights` says how much each is to be believed.",
        ),
        Mistake(
            "the weight divides",
            lambda rankings, k, weights: _fused(rankings, weights, lambda p, w: 1 / (k + w * p)),
            "The weight was put beside the place, under the fraction. A ranking of twice the weight then"
            " counts less and not more.",
        ),
        Mistake(
            "only the best place",
            lambda rankings, k, weights: _fused(rankings, weights, lambda p, w: w / (k + p), together=max),
            "Only the best of an id's places counts. Add them up: what two searches find is likelier right.",
        ),
        Mistake(
            "only the last ranking",
            lambda rankings, k, weights: _fused(
                rankings, weights, lambda p, w: w / (k + p), together=lambda values: values[-1]
            ),
            "scores[id] was set anew by each ranking. Add to it: scores[id] = scores.get(id, 0) + ...",
        ),
        Mistake(
            "a mean",
            _mean_of_the_found,
            "The sum was divided by how many rankings have the id. An id that one search has first and no"
            " other finds is then ahead of one that all have second.",
        ),
        Mistake(
            "only what all rankings have",
            _in_all_only,
            "Ids that are missing in one of the rankings are lost. They keep what the others give them: this"
            " is how a search by meaning finds what has none of the question's words.",
        ),
        Mistake(
            "missing counts as the place after the last",
            _missing_comes_last,
            "An id that is missing in a ranking was put behind its end. It gets nothing from that ranking.",
        ),
        Mistake(
            "the lowest score first",
            lambda rankings, k, weights: reciprocal_rank_fusion(rankings, k, weights)[::-1],
            "The list begins with the lowest score. sorted goes upwards: negate the score, or reverse=True.",
        ),
        Mistake(
            "equals by name",
            _ordered_by_name,
            "Ids of equal score were sorted by name. They stay as they are first met; sorted keeps the order"
            " of equals, and a dict that of its keys.",
        ),
        Mistake(
            "equals from behind",
            lambda rankings, k, weights: _best_first(
                dict(
                    reversed(list(_first_met(reciprocal_rank_fusion(rankings, k, weights), rankings).items()))
                )
            ),
            "Ids of equal score come in the reverse order: the list was sorted upwards and then turned round."
            " sorted(..., reverse=True), or a negated score, keeps the order of equals.",
        ),
        Mistake(
            "ids without their scores",
            lambda rankings, k, weights: [item for item, _ in reciprocal_rank_fusion(rankings, k, weights)],
            "The order is right, but the scores are missing: a list of (id, score).",
        ),
    ),
    hints=(
        "A dict from id to score. What does each ranking add to it?",
        "for ranking, weight in zip(rankings, weights), and in it for place, item in enumerate(ranking, 1). A"
        " dict keeps its keys in the order in which they came.",
        "scores[item] = scores.get(item, 0.0) + weight / (k + place). At last return sorted(scores.items(),"
        " key=lambda pair: -pair[1]).",
    ),
)


def _first_met(pairs: list[tuple], rankings: list[list]) -> dict:
    """The scores in the order in which their ids are first met."""
    scores = dict(pairs)
    return {item: scores[item] for item in dict.fromkeys(item for ranking in rankings for item in ranking)}


# ---- 7. how good a ranking is


def ndcg(gains: list[float], all_gains: list[float], k: int) -> float:
    return _discounted(gains[:k]) / _discounted(sorted(all_gains, reverse=True)[:k])


def _discounted(gains: list[float]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))


def _ndcg_of_found(gains: list[float], all_gains: list[float], k: int) -> float:
    best = _discounted(sorted(gains, reverse=True)[:k])
    return _discounted(gains[:k]) / max(best, 1e-9)


def _ndcg_of_powers(gains: list[float], all_gains: list[float], k: int) -> float:
    return ndcg([2**gain - 1 for gain in gains], [2**gain - 1 for gain in all_gains], k)


def _ndcg_with_log_of_place(gains: list[float], all_gains: list[float], k: int) -> float:
    def discounted(gains: list[float]) -> float:
        return sum(gain / max(1.0, math.log2(place)) for place, gain in enumerate(gains[:k], 1))

    return discounted(gains) / discounted(sorted(all_gains, reverse=True))


def _ndcg_with_1_outside(gains: list[float], all_gains: list[float], k: int) -> float:
    def discounted(gains: list[float]) -> float:
        return sum(gain / (math.log2(place) + 1) for place, gain in enumerate(gains[:k], 1))

    return discounted(gains) / discounted(sorted(all_gains, reverse=True))


def _are_gains(gains: list[float], all_gains: list[float], k: int) -> bool:
    """Whether what was found is among all that there is, and something can be found."""
    left = Counter(gain for gain in gains if gain) - Counter(all_gains)
    return k >= 1 and not left and max(all_gains, default=0.0) > 0 and min(gains + all_gains) >= 0


def _ndcg_cases(generator: Generator) -> list[tuple[list[float], list[float], int]]:
    def case(found: int, missed: int, k: int) -> tuple[list[float], list[float], int]:
        found_gains = [float(random_int(generator, 0, 4)) for _ in range(found - 1)] + [1.0]
        missed_gains = [float(random_int(generator, 1, 4)) for _ in range(missed)]
        return found_gains, found_gains + missed_gains, k

    return [
        ([0.0, 1.0, 3.0, 0.0, 2.0], [1.0, 3.0, 2.0, 2.0], 3),
        case(6, 2, 4),
        case(12, 3, 10),
        case(3, 4, 10),
        case(5, 1, 2),
    ]


NDCG = Exercise(
    task="""`gains` has the gain of each text that was found, best place first: 0 for one that does not help.
    `all_gains` has the gains of all texts that there are to be found, in any order, at least one above 0.
    Return nDCG@k: the discounted gain of the first k found, over that of the first k in the best order. At
    place p, counted from 1, a gain g counts $g / \\log_2(p + 1)$.""",
    reference=ndcg,
    cases=_ndcg_cases,
    forbids=(ndcg_at,),
    valid=_are_gains,
    mistakes=(
        Mistake(
            "best order of what was found",
            _ndcg_of_found,
            "The best order is made of what was found. A ranking that misses half of the texts then looks"
            " perfect. Use all_gains.",
        ),
        Mistake(
            "2 to the power of the gain",
            _ndcg_of_powers,
            "The gains went in as 2^gain - 1, which weighs the best texts more; some benchmarks do so. Here a"
            " gain counts as it is.",
        ),
        Mistake(
            "log2 of the place",
            _ndcg_with_log_of_place,
            "Gains are divided by log2(p), and by 1 at place 1, so the first two places count the same."
            " Divide by log2(p + 1).",
        ),
        Mistake(
            "1 is added outside the logarithm",
            _ndcg_with_1_outside,
            "Gains are divided by log2(p) + 1. The 1 is added to the place, inside: log2(p + 1).",
        ),
        Mistake(
            "all_gains is not sorted",
            lambda gains, all_gains, k: _discounted(gains[:k]) / _discounted(all_gains[:k]),
            "The best order has the greatest gains first. As they come, the ratio can be above 1.",
        ),
        Mistake(
            "not divided by the best",
            lambda gains, all_gains, k: _discounted(gains[:k]),
            "This is DCG. Divide by what the best order would have, so that 1 is perfect for every question.",
        ),
        Mistake(
            "k only for what was found",
            lambda gains, all_gains, k: _discounted(gains[:k]) / _discounted(sorted(all_gains, reverse=True)),
            "The best order is also cut after k: no ranking can have more than k texts in k places.",
        ),
    ),
    hints=(
        "Write the discounted sum as a function of a list, and call it twice.",
        "The best order is sorted(all_gains, reverse=True), and of it the first k count.",
        (
            "dcg = lambda g: sum(x / math.log2(p + 1) for p, x in enumerate(g[:k], 1)); return dcg(gains) /"
            " dcg(sorted(all_gains, reverse=True))."
        ),
    ),
)


# ---- 8. from a question to an answer with its source


class Found(NamedTuple):
    """A passage as the search gives it."""

    id: int
    title: str
    text: str
    sentences: list[str]
    cosine: float
    score: float


class _Desk:
    """An index and a reader for the grader: it finds and writes what a case says, and remembers what it was
    asked.
    """

    def __init__(self, passages: list[tuple[str, list[str], float]], found: list[int], reply: str):
        self.found = [self._found(place, i, *passages[i]) for place, i in enumerate(found, 1)]
        self.reply = reply
        self.searched: list[str] = []
        self.prompts: list[str] = []
        self._places: dict[str, int] = {}

    @staticmethod
    def _found(place: int, i: int, title: str, sentences: list[str], cosine: float) -> Found:
        return Found(i, title, " ".join(sentences), list(sentences), cosine, 1 / (60 + place))

    def search(self, question: str) -> list[Found]:
        self.searched.append(question)
        return list(self.found)

    def embed(self, texts: list[str]) -> np.ndarray:
        """Counts of words, scaled to length 1: texts that share words are near."""
        vectors = np.zeros((len(texts), 512), np.float32)
        for row, text in zip(vectors, texts):
            for word in _words_in(text):
                row[self._places.setdefault(word, len(self._places))] += 1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)

    def holds(self, sentence: str, answer: str) -> bool:
        return bool(holds_answer(sentence, [answer]))

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return self.reply


def ask(
    question: str, index: Any, read: Callable[[str], str], threshold: float, k: int
) -> tuple[str, str, str] | None:
    return _Asking().ask(question, index, read, threshold, k)


def _once(found: list[Found], by: str) -> list[Found]:
    """The first of the passages that have the same of what `by` names."""
    first: dict[Any, Found] = {}
    for passage in found:
        first.setdefault(getattr(passage, by), passage)
    return list(first.values())


class _Asking:
    """The right answer in parts, each of which a mistake replaces."""

    reads_first = False

    def ask(
        self, question: str, index: Any, read: Callable[[str], str], threshold: float, k: int
    ) -> tuple[str, str, str] | None:
        if self.is_empty(question):
            return None
        found = index.search(question)
        used = self.used(found, k)
        outside = not self.is_inside(used, threshold)
        if outside and not self.reads_first:
            return None
        answer = self.answer(read(self.prompt(question, used)))
        if outside or not answer:
            return None
        title, sentence = self.support(question, answer, index, self.cited(used, found))
        return answer, title, sentence

    def is_empty(self, question: str) -> bool:
        return not any(character.isalnum() for character in question)

    def used(self, found: list[Found], k: int) -> list[Found]:
        return _once(found, "id")[:k]

    def is_inside(self, used: list[Found], threshold: float) -> bool:
        return any(passage.cosine >= threshold for passage in used)

    def prompt(self, question: str, used: list[Found]) -> str:
        passages = "".join(f"{passage.title}\n{passage.text}\n\n" for passage in used)
        return f"{passages}Question: {question}\nAnswer:"

    def answer(self, written: str) -> str:
        return written.strip()

    def cited(self, used: list[Found], found: list[Found]) -> list[Found]:
        return used

    def holds(self, index: Any, sentence: str, answer: str) -> bool:
        return index.holds(sentence, answer)

    def near_to(self, question: str, answer: str) -> str:
        return f"{question} {answer}"

    def support(self, question: str, answer: str, index: Any, cited: list[Found]) -> tuple[str, str]:
        pairs = [(passage, sentence) for passage in cited for sentence in passage.sentences]
        holding = [pair for pair in pairs if self.holds(index, pair[1], answer)]
        if not pairs:
            return "", ""
        return self.nearest(holding or pairs, index, self.near_to(question, answer))

    def nearest(self, pairs: list[tuple[Found, str]], index: Any, text: str) -> tuple[str, str]:
        cosines = index.embed([sentence for _, sentence in pairs]) @ index.embed([text])[0]
        passage, sentence = pairs[int(cosines.argmax())]
        return passage.title, sentence


ASK_STUB = """def ask(
    question: str,
    index: object,
    read: Callable[[str], str],
    threshold: float,
    k: int,
) -> tuple[str, str, str] | None:
    # index.search(question) -> list of passages, each with
    #   .id .title .text .sentences .cosine .score
    # index.embed(texts) -> float32 [len(texts), dim], a NumPy array
    # index.holds(sentence, answer) -> bool
    # read(prompt) -> str
    # your code here
    ...
"""
FARES = (
    "Ferry > Fares",
    ["An adult pays 14 tallies.", "A dog pays 4 tallies.", "Children travel free."],
    0.7,
)
BOATS = (
    "Ferry > Boats",
    ["The Pipit is quick.", "It takes 55 minutes.", "The old boat takes two hours."],
    0.5,
)
PETS = ("Pets", ["The dog tax is 4 tallies.", "Dogs stay on the lead."], 0.4)
TRAM = ("Tram", ["The last tram leaves at 23:10."], 0.3)
PIERS = ("Ferry > Fares", ["The pier is 4 tallies further."], 0.45)  # another section of the same title


def _ask_cases(generator: Generator) -> list[tuple]:
    def random_case(passages: int, k: int) -> tuple:
        def sentence() -> str:
            words = [WORDS[random_int(generator, 0, len(WORDS))] for _ in range(random_int(generator, 2, 6))]
            return f"The {' '.join(words)} is {random_int(generator, 10, 99)}."

        drawn = [
            (
                f"Page {i}",
                [sentence() for _ in range(random_int(generator, 1, 4))],
                random_int(generator, 1, 9) / 10,
            )
            for i in range(passages)
        ]
        found = [random_int(generator, 0, passages) for _ in range(2 * passages)]
        reply = drawn[found[0]][1][0].split()[1]
        return f"Where is the {reply} of page {passages}?", drawn, found, f" {reply}\n", 0.1, k

    return [
        ("What does an adult's dog pay?", [FARES, TRAM], [0, 1], " 4 tallies", 0.42, 1),
        ("How long does the quick boat take?", [FARES, BOATS], [0, 1], "55 minutes", 0.42, 2),  # the second's
        ("Who is the mayor of Paris?", [TRAM, PETS], [0, 1], "Anne", 0.42, 2),  # refused
        ("What does a dog pay?", [TRAM, FARES, PETS], [0, 2, 1], "4 tallies", 0.35, 2),
        (
            "Which boat is quick?",
            [FARES, PETS, BOATS],
            [2, 1, 0],
            "The old one takes two.",
            0.5,
            2,
        ),  # in other words
        (" ?! ", [FARES], [0], "4 tallies", -1.0, 1),
        ("When does the tram leave?", [TRAM, BOATS, PETS], [0, 1, 0, 1, 2], "\n 23:10 ", 0.5, 3),
        ("What does a dog pay?", [FARES], [0], " \n", 0.42, 1),  # nothing is written
        ("How far to which pier", [FARES, PIERS], [0, 1], "4", 0.42, 5),
        (" \n", [TRAM], [0], "23:10", -1.0, 1),
        random_case(4, 3),
        ("And in winter?", [FARES], [], "4 tallies", -1.0, 1),  # nothing is found
    ]


def _observe_ask(
    answer: Callable,
    question: str,
    passages: list[tuple[str, list[str], float]],
    found: list[int],
    reply: str,
    threshold: float,
    k: int,
) -> Iterator[tuple[str, Any]]:
    building.takes(answer, "question", "index", "read", "threshold", "k")
    desk = _Desk(passages, found, reply)
    given = answer(question, desk, desk.read, threshold, k)
    yield "the prompts that the reader was given", list(desk.prompts)
    yield "what was searched for", list(desk.searched)
    if given is not None and (not isinstance(given, tuple | list) or len(given) != 3):
        raise NotRight(
            f"it returns {type(given).__name__} {given!r:.80}, and a tuple (answer, title, sentence) is"
            " wanted, or None where there is no answer."
        )
    yield "whether there is an answer", given is not None
    if given is None:
        return
    text, title, sentence = given
    yield "the answer", text
    there = [passage for passage in desk.found if sentence in passage.sentences]
    if there and title not in [passage.title for passage in there]:
        raise NotRight(
            f"the sentence {sentence!r} is cited from {title!r}, and stands in {there[0].title!r}: whoever"
            " looks there does not find it. The source is the passage that the sentence is from."
        )
    yield "the sentence", sentence
    yield "the title", title


def _can_be_asked(
    question: str,
    passages: list[tuple[str, list[str], float]],
    found: list[int],
    reply: str,
    threshold: float,
    k: int,
) -> bool:
    whole = all(title and sentences and all(sentences) for title, sentences, _ in passages)
    return whole and k >= 1 and all(0 <= i < len(passages) for i in found)


def _asking(kind: type[_Asking]) -> Callable:
    """The function that asks in this way."""

    def mistaken(question, index, read, threshold, k):
        return kind().ask(question, index, read, threshold, k)

    return mistaken


class _ScoreOfTheFusion(_Asking):
    def is_inside(self, used: list[Found], threshold: float) -> bool:
        return any(passage.score >= threshold for passage in used)


class _OnlyTheFirstIsNear(_Asking):
    def is_inside(self, used: list[Found], threshold: float) -> bool:
        return bool(used) and used[0].cosine >= threshold


class _AllMustBeNear(_Asking):
    def is_inside(self, used: list[Found], threshold: float) -> bool:
        return all(passage.cosine >= threshold for passage in used)


class _AboveTheThreshold(_Asking):
    def is_inside(self, used: list[Found], threshold: float) -> bool:
        return any(passage.cosine > threshold for passage in used)


class _NeverRefuses(_Asking):
    def is_inside(self, used: list[Found], threshold: float) -> bool:
        return True


class _ReadsBeforeRefusing(_Asking):
    reads_first = True


class _EmptyIsAsked(_Asking):
    def is_empty(self, question: str) -> bool:
        return False


class _OnlyBlanksAreEmpty(_Asking):
    def is_empty(self, question: str) -> bool:
        return not question.strip()


class _TwiceInThePrompt(_Asking):
    def used(self, found: list[Found], k: int) -> list[Found]:
        return found[:k]


class _CutBeforeOnce(_Asking):
    def used(self, found: list[Found], k: int) -> list[Found]:
        return super().used(found[:k], k)


class _OnceByTitle(_Asking):
    def used(self, found: list[Found], k: int) -> list[Found]:
        return _once(found, "title")[:k]


class _AllThatIsFound(_Asking):
    def used(self, found: list[Found], k: int) -> list[Found]:
        return super().used(found, len(found))


class _BestLast(_Asking):
    def prompt(self, question: str, used: list[Found]) -> str:
        return super().prompt(question, used[::-1])


class _QuestionFirst(_Asking):
    def prompt(self, question: str, used: list[Found]) -> str:
        passages = "".join(f"{passage.title}\n{passage.text}\n\n" for passage in used)
        return f"Question: {question}\n{passages}Answer:"


class _QuestionAfterTheSlot(_Asking):
    def prompt(self, question: str, used: list[Found]) -> str:
        passages = "".join(f"{passage.title}\n{passage.text}\n\n" for passage in used)
        return f"{passages}Answer:\nQuestion: {question}"


class _WithoutTitles(_Asking):
    def prompt(self, question: str, used: list[Found]) -> str:
        passages = "".join(f"{passage.text}\n\n" for passage in used)
        return f"{passages}Question: {question}\nAnswer:"


class _NoSpaceTaken(_Asking):
    def answer(self, written: str) -> str:
        return written


class _EmptyIsGiven(_Asking):
    def ask(self, question, index, read, threshold, k):
        given = super().ask(
            question, index, lambda prompt: read(prompt).strip() or "\N{WORD JOINER}", threshold, k
        )
        return given if given is None else (given[0].replace("\N{WORD JOINER}", ""), *given[1:])


class _CitesTheFirst(_Asking):
    def support(self, question: str, answer: str, index: Any, cited: list[Found]) -> tuple[str, str]:
        return cited[0].title if cited else "", super().support(question, answer, index, cited)[1]


class _OnlyInTheFirst(_Asking):
    def cited(self, used: list[Found], found: list[Found]) -> list[Found]:
        return used[:1]


class _FromAllThatIsFound(_Asking):
    def cited(self, used: list[Found], found: list[Found]) -> list[Found]:
        return found


class _WholePassage(_Asking):
    def support(self, question: str, answer: str, index: Any, cited: list[Found]) -> tuple[str, str]:
        title, sentence = super().support(question, answer, index, cited)
        text = next((p.text for p in cited if p.title == title and sentence in p.sentences), "")
        return title, text


class _LettersForWords(_Asking):
    def holds(self, index: Any, sentence: str, answer: str) -> bool:
        return answer.lower() in sentence.lower()


class _NearestWhateverItHolds(_Asking):
    def holds(self, index: Any, sentence: str, answer: str) -> bool:
        return False


class _FirstThatHolds(_Asking):
    def nearest(self, pairs: list[tuple[Found, str]], index: Any, text: str) -> tuple[str, str]:
        return pairs[0][0].title, pairs[0][1]


class _NearToTheQuestion(_Asking):
    def near_to(self, question: str, answer: str) -> str:
        return question


class _NearToTheAnswer(_Asking):
    def near_to(self, question: str, answer: str) -> str:
        return answer


ASK = Exercise(
    task="""From a question to an answer whose source can be looked up.
    `ask(question, index, read, threshold, k)` is given its tools. `index.search(question)` returns a list of
    passages, the best first, perhaps none. A passage has an `id`, a `title`, a `text`, its `sentences` (a
    list of str), its `cosine` with the question and the `score` that it was ranked by. `index.embed(texts)`
    gives vectors of length 1, a NumPy array of float32 [len(texts), dim]. `index.holds(sentence, answer)`
    says whether an answer's words stand in a sentence. `read(prompt)` is the model: it returns what it writes
    after the prompt.

    - A question without a letter or digit has no answer: return None, and search for nothing.
    - Take the first k different passages of the search: one that was found twice (the same id) counts once,
      at its better place.
    - Where none of these has a cosine of `threshold` or more, return None, and let nothing be read.
    - The prompt has for each passage, best first, its title, a line break, its text and two line breaks;
      then `Question: `, the question, a line break and `Answer:`. It is read once.
    - The answer is what was written, without the white space around it. Where nothing is left of it, return
      None.
    - Its sentence is one that holds the answer, from a passage of the prompt; where none does, any sentence
      of these passages may be it. Of those that may be it take the one whose vector has the largest product
      with that of the question, a space and the answer, as one text; of equals the first.

    Return (answer, title of the passage that the sentence is from, sentence).""",
    reference=ask,
    cases=_ask_cases,
    observe=_observe_ask,
    stub=ASK_STUB,
    points=3,
    forbids=(rag.compose, rag.RAG.ask, evidence.supporting),
    valid=_can_be_asked,
    mistakes=(
        Mistake(
            "the threshold on the fusion's score",
            _asking(_ScoreOfTheFusion),
            "The threshold was held against `score`. A fusion's score says at which places a passage stood,"
            " and the first place is the first however bad it is: it cannot tell an answerable question from"
            " another. The cosine can.",
        ),
        Mistake(
            "only the first passage's cosine",
            _asking(_OnlyTheFirstIsNear),
            "Only the first passage was held against the threshold. The first of a fused ranking need not be"
            " the nearest: one of the k that is near enough will do.",
        ),
        Mistake(
            "all passages must be near",
            _asking(_AllMustBeNear),
            "A question is refused as soon as one of its passages is too far away. One that is near enough"
            " will do: any, not all.",
        ),
        Mistake(
            "more than the threshold",
            _asking(_AboveTheThreshold),
            "A cosine that is exactly the threshold was refused. The task says: of `threshold` or more.",
        ),
        Mistake(
            "an answer from nothing",
            _asking(_NeverRefuses),
            "The reader is asked although no passage is near enough. It writes something, nearly always, and"
            " with a passage cited under it that looks like a fact.",
        ),
        Mistake(
            "refused after reading",
            _asking(_ReadsBeforeRefusing),
            "The question is refused, but only after the reader has answered it. The search alone decides:"
            " look at the cosines first, and spare the model.",
        ),
        Mistake(
            "a question without words is asked",
            _asking(_EmptyIsAsked),
            "A question without a letter or digit was searched for. There is nothing in it to be near to:"
            " return None before anything is searched.",
        ),
        Mistake(
            "only blanks count as no question",
            _asking(_OnlyBlanksAreEmpty),
            "Punctuation alone was searched for. It has no word in it either: look for a letter or digit,"
            " with str.isalnum.",
        ),
        Mistake(
            "a passage twice in the prompt",
            _asking(_TwiceInThePrompt),
            "A passage that was found twice is in the prompt twice. It takes the room of another one.",
        ),
        Mistake(
            "cut to k before repeats are left out",
            _asking(_CutBeforeOnce),
            "The ranking was cut to k, and then its repeats were left out: fewer than k passages remain."
            " Leave them out first.",
        ),
        Mistake(
            "one passage for each title",
            _asking(_OnceByTitle),
            "Passages of one title were taken for one. A page may have several: it is the id that says which"
            " are the same.",
        ),
        Mistake(
            "k is not used",
            _asking(_AllThatIsFound),
            "All that was found is in the prompt. Take the first k: a small model reads one passage better"
            " than many.",
        ),
        Mistake(
            "the best passage last",
            _asking(_BestLast),
            "The passages are in reverse in the prompt. The best one comes first.",
        ),
        Mistake(
            "the question before the passages",
            _asking(_QuestionFirst),
            "The question stands before the passages. It comes after them, right before `Answer:`.",
        ),
        Mistake(
            "the question after the place of the answer",
            _asking(_QuestionAfterTheSlot),
            "The prompt ends with the question, and `Answer:` stands before it. The model goes on from where"
            " the prompt ends: there it would write another question, or whatever follows one.",
        ),
        Mistake(
            "passages without their titles",
            _asking(_WithoutTitles),
            "The titles are not in the prompt. A passage may name its subject only there.",
        ),
        Mistake(
            "white space around the answer",
            _asking(_NoSpaceTaken),
            "The answer was returned as it was written. A model's first token begins with a space: strip it.",
        ),
        Mistake(
            "an empty answer with a source",
            _asking(_EmptyIsGiven),
            "The reader wrote nothing, and that was returned with a source. Nothing is no answer: return"
            " None.",
        ),
        Mistake(
            "the first passage is cited whatever supports the answer",
            _asking(_CitesTheFirst),
            "The title is that of the first passage, and the sentence is from another one. Whoever looks"
            " there does not find it.",
        ),
        Mistake(
            "only the first passage's sentences",
            _asking(_OnlyInTheFirst),
            "The sentence was looked for in the first passage only. The reader was given k of them, and may"
            " have its answer from any.",
        ),
        Mistake(
            "a source that was not read",
            _asking(_FromAllThatIsFound),
            "The sentence may come from a passage that was found but not put before the reader. Its answer"
            " cannot be from there.",
        ),
        Mistake(
            "the whole passage as the quotation",
            _asking(_WholePassage),
            "The whole text of the passage was returned as the sentence. A reader should see at once what the"
            " answer rests on.",
        ),
        Mistake(
            "letters for words",
            _asking(_LettersForWords),
            "The answer was looked for letter by letter, with `in`. So 4 is in 14: index.holds compares whole"
            " words.",
        ),
        Mistake(
            "the nearest sentence, whatever it holds",
            _asking(_NearestWhateverItHolds),
            "The nearest sentence was taken although another one holds the answer. First those that hold it,"
            " then the nearest of them.",
        ),
        Mistake(
            "the first sentence that may be it",
            _asking(_FirstThatHolds),
            "The first of the sentences was taken, not the nearest. A number may stand in several, and only"
            " one is about the question.",
        ),
        Mistake(
            "nearest to the question alone",
            _asking(_NearToTheQuestion),
            "The sentences were compared with the question. Compare them with question and answer in one"
            " text: where no sentence holds the answer, its words still say which one it is from.",
        ),
        Mistake(
            "nearest to the answer alone",
            _asking(_NearToTheAnswer),
            "The sentences were compared with the answer. Where several hold it, all are near to it, and only"
            " the question says which one is meant.",
        ),
    ),
    hints=(
        "Go through the task line by line; each is one or two lines of code. Return early: no words, nothing"
        " near enough, nothing written.",
        "used = [], and for each passage of index.search(question): append it while there are fewer than k"
        " and its id is not among them. Keep (passage, sentence) pairs, so that a sentence knows its"
        " passage.",
        "pairs = [(p, s) for p in used for s in p.sentences]; pairs = [(p, s) for p, s in pairs if"
        " index.holds(s, answer)] or pairs; near = index.embed([s for _, s in pairs]) @"
        " index.embed([question + ' ' + answer])[0]; p, s = pairs[int(near.argmax())].",
    ),
)


# ---- 9. how good an answer is


def word_f1(answer: list[str], right: list[str]) -> float:
    return _f1(_common(answer, right), answer, right)


def _common(answer: list[str], right: list[str]) -> int:
    return (Counter(answer) & Counter(right)).total()


def _f1(common: float, answer: list[str], right: list[str]) -> float:
    return 2 * common / (len(answer) + len(right)) if common else 0.0


def _f1_of_sets(answer: list[str], right: list[str]) -> float:
    answer, right = list(set(answer)), list(set(right))
    return _f1(_common(answer, right), answer, right)


def _recall(answer: list[str], right: list[str]) -> float:
    common = _common(answer, right)
    return common / len(right) if common else 0.0


def _precision(answer: list[str], right: list[str]) -> float:
    return _recall(right, answer)


def _f1_cases(generator: Generator) -> list[tuple[list[str], list[str]]]:
    words = ("tram", "ferry", "nine", "tallies", "harbour")

    def draw(n: int) -> list[str]:
        return [words[random_int(generator, 0, len(words))] for _ in range(n)]

    return [
        (["nine", "nine", "tallies"], ["nine", "tallies"]),
        (draw(6), draw(3)),
        (draw(4), draw(9)),
        (["tram"], ["ferry"]),
        ([], draw(2)),
        (["it", "is", "nine", "tallies"], ["nine", "tallies", "tallies"]),
    ]


WORD_F1 = Exercise(
    task="""`answer` and `right` are lists of words, normalised already. Return the token F1 of SQuAD: with
    `common` words in both, a word that comes twice in both counted twice, precision is common / len(answer),
    recall common / len(right), and F1 their harmonic mean, $2PR / (P + R)$. Where nothing is in common, or a
    list is empty, it is 0.""",
    reference=word_f1,
    cases=_f1_cases,
    forbids=(token_f1,),
    mistakes=(
        Mistake(
            "sets of words",
            _f1_of_sets,
            "Sets forget how often a word comes, so an answer that says everything three times loses nothing."
            " Use Counter.",
        ),
        Mistake(
            "what is common as a set",
            lambda answer, right: _f1(len(set(answer) & set(right)), answer, right),
            "The common words were counted as a set, each once. A word that comes twice in both counts twice:"
            " Counter(answer) & Counter(right) keeps how often.",
        ),
        Mistake(
            "words of the answer that are in the right one",
            lambda answer, right: _f1(sum(word in right for word in answer), answer, right),
            "Every repetition in the answer counts as common, so F1 can go above 1. A word counts as often as"
            " it is in both.",
        ),
        Mistake(
            "recall only",
            _recall,
            "This is recall: a long answer that happens to hold the right words gets 1. Precision is the"
            " other half.",
        ),
        Mistake(
            "precision only",
            _precision,
            "This is precision: a single right word gets 1, even if most of the answer is missing.",
        ),
        Mistake(
            "arithmetic mean",
            lambda answer, right: (_precision(answer, right) + _recall(answer, right)) / 2,
            "This is the plain mean of precision and recall. The harmonic mean stays low while one of the two"
            " is low.",
        ),
    ),
    hints=(
        "collections.Counter knows how often each word comes. What does & do with two of them?",
        "common = sum((Counter(answer) & Counter(right)).values()). Mind the case that it is 0.",
        "return 2 * common / (len(answer) + len(right)) if common else 0.0: the harmonic mean, simplified.",
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    WINDOW_SPANS,
    BM25_SCORES,
    BM25_SEARCH,
    MEAN_EMBEDDING,
    FUSED_SCORES,
    RECIPROCAL_RANK_FUSION,
    NDCG,
    ASK,
    WORD_F1,
)
