"""Week 11. Finding by words: BM25.

Source: Robertson & Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), in the form
that Lucene has.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable

# ---- by words

STOP_WORDS = frozenset(
    "a an and are as at be been by can could do does did for from had has have how i if in into is it its may"
    " me must my no not of on or our s she he should so t than that the their them then there these they this"
    " to up was we were what when where which who whom whose why will with would you your".split()
)


def terms(text: str) -> list[str]:
    """What BM25 counts: words in lower case without the stop words, a plural as its singular (Harman's
    S-stemmer, 1991).

    >>> terms("Where are the ferries' timetables?")
    ['ferry', 'timetable']
    """
    return [_singular(word) for word in re.findall(r"\w+", text.casefold()) if word not in STOP_WORDS]


def _singular(word: str) -> str:
    if word.endswith("ies") and not word.endswith(("eies", "aies")) and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("us", "ss", "aes", "ees", "oes")) and len(word) > 3:
        return word[:-1]
    return word


class BM25:
    """Texts by id, ranked by their words: Σ idf(term) · tf / (tf + k1 (1 - b + b · length / mean length))
    over the question's terms, with idf = ln(1 + (n - df + 0.5) / (df + 0.5)). k1: how soon more of a term
    stops mattering; b: how much long texts are held back.
    """

    def __init__(self, k1: float = 1.2, b: float = 0.75):
        if k1 < 0 or not 0 <= b <= 1:
            raise ValueError(f"BM25: k1={k1} must not be negative, and b={b} must be from 0 to 1")
        self.k1, self.b = k1, b
        self._counts: dict[int, Counter[str]] = {}
        self._lengths: dict[int, int] = {}
        self._postings: dict[str, dict[int, int]] = {}  # how often each text has the term

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, ids: Iterable[int], texts: Iterable[str]) -> None:
        """Raises ValueError for an id that is there already."""
        for i, text in zip(ids, texts, strict=True):
            if i in self._counts:
                raise ValueError(f"id {i} is there already: delete it first")
            counts = self._counts[i] = Counter(terms(text))
            self._lengths[i] = counts.total()
            for term, n in counts.items():
                self._postings.setdefault(term, {})[i] = n

    def delete(self, ids: Iterable[int]) -> None:
        for i in ids:
            del self._lengths[i]
            for term in self._counts.pop(i):
                del self._postings[term][i]
                if not self._postings[term]:
                    del self._postings[term]

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """At most k ids with scores, best first; texts that share no term with the question are not among
        them. Equals by id.
        """
        scores: dict[int, float] = {}
        mean = sum(self._lengths.values()) / max(1, len(self))
        for term, times in Counter(terms(question)).items():
            postings = self._postings.get(term, {})
            idf = math.log(1 + (len(self) - len(postings) + 0.5) / (len(postings) + 0.5))
            for i, tf in postings.items():
                scores[i] = scores.get(i, 0.0) + times * idf * tf / (
                    tf + self.k1 * (1 - self.b + self.b * self._lengths[i] / mean)
                )
        return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
