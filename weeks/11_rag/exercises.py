"""The graded exercises of week 11: windows with overlap, BM25, mean pooling, rank fusion, nDCG, token F1."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake, random_int

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
    return torch.log(1 + (n - occurrences.clamp(max=n) + 0.5) / (occurrences + 0.5))


def _idf_without_1(counts: Tensor) -> Tensor:
    n, df = len(counts), (counts > 0).sum(0)
    return torch.log((n - df + 0.5) / (df + 0.5))


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
    idf * tf / (tf + k1 * (1 - b + b * length / mean length)). tf is the term's count in the text, a text's
    length is the sum of its counts, the mean is over all texts, and idf = ln(1 + (n - df + 0.5) / (df + 0.5))
    with n texts, df of which have the term. No text is empty.""",
    reference=bm25_scores,
    cases=_bm25_cases,
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


# ---- 3. one vector for a text


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


# ---- 4. two rankings in one


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
    where it did not find it. Return float32 [texts], the scores of reciprocal rank fusion: the sum of 1 / (k
    + place) over the retrievers that found the text.""",
    reference=fused_scores,
    cases=_fusion_cases,
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


# ---- 5. how good a ranking is


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
    place p, counted from 1, a gain counts 1 / log2(p + 1).""",
    reference=ndcg,
    cases=_ndcg_cases,
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


# ---- 6. how good an answer is


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
    recall common / len(right), and F1 their harmonic mean, 2PR / (P + R). Where nothing is in common, or a
    list is empty, it is 0.""",
    reference=word_f1,
    cases=_f1_cases,
    mistakes=(
        Mistake(
            "sets of words",
            _f1_of_sets,
            "Sets forget how often a word comes, so an answer that says everything three times loses nothing."
            " Use Counter.",
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


EXERCISES: tuple[Exercise, ...] = (WINDOW_SPANS, BM25_SCORES, MEAN_EMBEDDING, FUSED_SCORES, NDCG, WORD_F1)
