"""Week 11. How good a ranking and an answer are: recall, reciprocal rank, nDCG with bootstrap intervals;
exact match and token F1.

>>> recall_at([3, 7, 1], {7}, 1), recall_at([3, 7, 1], {7}, 2), reciprocal_rank([3, 7, 1], {7})
(0.0, 1.0, 0.5)
>>> token_f1("It is 60 tallies.", ["60 tallies"]), exact_match("The 60 tallies!", ["60 tallies"])
(0.6666666666666666, 1.0)
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# ---- rankings: ids, best first, and the ids that are relevant


def recall_at(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """The share of the relevant ones among the first k. Raises ValueError where nothing is relevant."""
    _check(ranking, relevant)
    return len(set(ranking[:k]) & set(relevant)) / len(set(relevant))


def reciprocal_rank(ranking: Sequence[Hashable], relevant: Collection[Hashable]) -> float:
    """1 / the place of the first relevant one; 0 where there is none. Its mean over questions is the MRR."""
    _check(ranking, relevant)
    return next((1 / place for place, found in enumerate(ranking, 1) if found in relevant), 0.0)


def ndcg_at(
    ranking: Sequence[Hashable], relevant: Collection[Hashable] | Mapping[Hashable, float], k: int = 10
) -> float:
    """Discounted cumulative gain of the first k over that of the best order (Järvelin & Kekäläinen, 2002).

    A gain at place p counts 1 / log2(p + 1). relevant: the relevant ones, or the gain of each.
    """
    _check(ranking, relevant)
    gains = relevant if isinstance(relevant, Mapping) else dict.fromkeys(relevant, 1.0)
    ranked = _discounted(gains.get(item, 0.0) for item in ranking[:k])
    return ranked / _discounted(sorted(gains.values(), reverse=True)[:k])


def _discounted(gains: Iterable[float]) -> float:
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, 1))


def _check(ranking: Sequence[Hashable], relevant: Collection[Hashable]) -> None:
    if not relevant:
        raise ValueError("no id is relevant: leave out questions that have no answer")
    if len(set(ranking)) < len(ranking):
        raise ValueError("an id comes twice in the ranking: keep only its best place")


class Interval(NamedTuple):
    """A mean, and what it may have been with other questions of the same kind."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], level: float = 0.95, rounds: int = 2000, seed: int = 0) -> Interval:
    """The mean of `values` with its percentile interval over resamples with replacement (Efron, 1979). Raises
    ValueError for none.
    """
    if not len(values):
        raise ValueError("there are no values to take the mean of")
    array, generator = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = array[generator.integers(len(array), size=(rounds, len(array)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(array.mean().item(), low.item(), high.item())


RANKING_METRICS = ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10")


def rank_scores(
    rankings: Sequence[Sequence[Hashable]], relevant: Sequence[Collection[Hashable]]
) -> dict[str, Interval]:
    """`RANKING_METRICS` over all questions, each with its bootstrap interval. MRR is over whole rankings."""
    if len(rankings) != len(relevant):
        raise ValueError(
            f"{len(rankings)} rankings and {len(relevant)} sets of relevant ids do not go together"
        )
    pairs = list(zip(rankings, relevant))
    values = {f"recall@{k}": [recall_at(*pair, k) for pair in pairs] for k in (1, 5, 10)}
    values |= {
        "mrr": [reciprocal_rank(*pair) for pair in pairs],
        "ndcg@10": [ndcg_at(*pair, 10) for pair in pairs],
    }
    return {name: bootstrap(values[name]) for name in RANKING_METRICS}


# ---- answers: a text, and the answers that are right


def normalise(text: str) -> str:
    """As SQuAD's evaluation does (Rajpurkar et al., 2016): lower case, without punctuation, articles and
    extra spaces; composed and decomposed characters (NFC) are one. Words are what stands between spaces, so
    a script without them is compared only as a whole.

    >>> normalise("The  Grey-Ottilie, an old boat.")
    'greyottilie old boat'
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, both normalised."""
    return float(any(normalise(answer) == normalise(r) for r in right))


def token_f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the answer's words, against the right answer that it is
    nearest to.
    """
    return max((_f1(normalise(answer).split(), normalise(r).split()) for r in right), default=0.0)


def _f1(answer: list[str], right: list[str]) -> float:
    common = sum((Counter(answer) & Counter(right)).values())
    return 2 * common / (len(answer) + len(right)) if common else 0.0


def holds_answer(answer: str, right: Sequence[str]) -> float:
    """1 where a right answer stands in the answer as whole words, both normalised: "It is 60 tallies" holds
    "60", "160 tallies" does not.
    """
    return float(any(f" {normalise(r)} " in f" {normalise(answer)} " for r in right if normalise(r)))
