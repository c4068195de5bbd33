"""Week 11. Finding by words: BM25.

Sources: Robertson & Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), in the form
that Lucene has; Nie, Gao, Zhang & Zhou, "On the Use of Words and N-grams for Chinese Information Retrieval"
(2000).
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable
from operator import add

import regex

# ---- by words

STOP_WORDS = frozenset(
    "a an and are as at be been by can could do does did for from had has have how i if in into is it its may"
    " me must my no not of on or our s she he should so t than that the their them then there these they this"
    " to up was we were what when where which who whom whose why will with would you your".split()
)
# Scripts that put no space between words, without their digits. Korean puts some, but ties its particles to
# the words. ー makes a kana longer, and counts as no script's own.
UNSPACED = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー]&&\p{L}]"
SYLLABLE = regex.compile(rf"{UNSPACED}\p{{M}}*", regex.V1)
RUN = regex.compile(rf"(?:{SYLLABLE.pattern})+", regex.V1)
# A letter with ++ or # is a name: C++, C#, F#, and C++ in C++17.
WORD = regex.compile(r"\b\p{L}(?:\+\+|#)(?![^\W\d])|\w+")
HAN = regex.compile(r"\p{Han}")
INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")


def terms(text: str) -> list[str]:
    """What BM25 counts: words in lower case without the stop words, a plural as its singular (Harman's
    S-stemmer, 1991).

    >>> terms("Where are the ferries' timetables?")
    ['ferry', 'timetable']
    >>> terms("C++"), terms("渡轮码头"), terms("เรือ")
    (['c++'], ['渡轮', '轮码', '码头', '渡', '轮', '码', '头'], ['เรื', 'รือ'])

    However a text writes its characters (composed or decomposed, wide or narrow, with soft hyphens), the
    terms are the same: those of Unicode's NFKC and case folding. Where a script has no spaces, neighbouring
    characters are the terms, two by two, and each Chinese character. Not covered: stop words and endings of
    languages other than English, words without their accents (cafe for café), other ways to write a word
    (simplified and traditional characters, kana and kanji), digits of other scripts; and a question of one
    letter of a script such as Thai.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if not text.isascii():
        text = RUN.sub(r" \g<0> ", INVISIBLE.sub("", text))
    words = (word for word in WORD.findall(text) if word not in STOP_WORDS)
    return [term for word in words for term in _terms_of(word)]


def _terms_of(word: str) -> list[str]:
    """The word, in the singular; of a run without spaces each two syllables that are neighbours, and each
    that may be a word: a Chinese character, one that stands alone.
    """
    if word.isascii() or not RUN.match(word):
        return [_singular(word)]
    syllables = SYLLABLE.findall(word)
    if len(syllables) == 1:
        return syllables
    return [*map(add, syllables, syllables[1:]), *filter(HAN.match, syllables)]


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

    def knows(self, term: str) -> bool:
        """Whether a text has this term."""
        return term in self._postings

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

    def search(self, question: str, k: int, among: Container[int] | None = None) -> list[tuple[int, float]]:
        """At most k ids with scores, best first; texts that share no term with the question are not among
        them. Equals by id.

        among: only these ids, with the scores that they have among all; None: all.
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
        found = scores if among is None else {i: score for i, score in scores.items() if i in among}
        return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
