"""Clean solutions of week 11's exercises, each with a word on why; `week.solution(name)` shows them."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor


def window_spans(tokens: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Each window begins size - overlap after the last one. The loop ends with the window that reaches the
    end: another would hold overlap alone.
    """
    spans = []
    start = 0
    while start < tokens:
        spans.append((start, min(start + size, tokens)))
        if start + size >= tokens:
            break
        start += size - overlap
    return spans


def bm25_scores(counts: Tensor, question: Tensor, k1: float, b: float) -> Tensor:
    """idf makes a rare term count more, tf / (tf + ...) lets the tenth occurrence count less than the first,
    and b takes back what length alone brings.
    """
    n = len(counts)
    df = (counts > 0).sum(0)
    idf = torch.log(1 + (n - df + 0.5) / (df + 0.5))
    length = counts.sum(1, keepdim=True)  # [texts, 1]
    part = counts / (counts + k1 * (1 - b + b * length / length.mean()))
    return (idf * part)[:, question].sum(1)


class BM25:
    """Of each text its terms are kept, counted. Everything else (n, df, the mean length) is read from these
    in the search, so it is right whatever came and went. (A larger index would also keep, for each term, the
    texts that have it: the postings.)
    """

    def __init__(self, terms: Callable[[str], list[str]], k1: float = 1.2, b: float = 0.75):
        self.terms = terms
        self.k1 = k1
        self.b = b
        self.counts: dict[int, Counter] = {}

    def add(self, ids: list[int], texts: list[str]) -> None:
        for i, text in zip(ids, texts):
            if i in self.counts:
                raise ValueError(f"id {i} is there already: delete it first")
            self.counts[i] = Counter(self.terms(text))

    def delete(self, ids: list[int]) -> None:
        for i in ids:
            del self.counts[i]

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        lengths = {i: counts.total() for i, counts in self.counts.items()}
        n = len(lengths)
        total = sum(lengths.values())
        scores: dict[int, float] = {}
        for term in self.terms(question):
            having = [i for i, counts in self.counts.items() if term in counts]
            idf = math.log(1 + (n - len(having) + 0.5) / (len(having) + 0.5))
            for i in having:
                tf = self.counts[i][term]
                length = self.b * lengths[i] * n / total
                part = tf / (tf + self.k1 * (1 - self.b + length))
                scores[i] = scores.get(i, 0.0) + idf * part
        return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:k]


def mean_embedding(states: Tensor, mask: Tensor) -> Tensor:
    """Padding is multiplied by 0 and not counted, so a text has one vector in every batch; with length 1, a
    product of two is their cosine.
    """
    total = (states * mask[..., None]).sum(1)
    mean = total / mask.sum(1, keepdim=True)
    return mean / mean.norm(dim=1, keepdim=True)


def fused_scores(places: Tensor, k: float) -> Tensor:
    """Only places count, since the scores of two retrievers have no common scale; a text that both found adds
    up two parts.
    """
    return torch.where(places > 0, 1 / (k + places), 0.0).sum(0)


def reciprocal_rank_fusion(
    rankings: list[list],
    k: float = 60,
    weights: list[float] | None = None,
) -> list[tuple]:
    """The dict keeps its ids in the order in which they were first met, and sorted keeps the order of
    equals: so ties need no line of their own.
    """
    if weights is None:
        weights = [1.0] * len(rankings)
    scores: dict = {}
    for ranking, weight in zip(rankings, weights):
        for place, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + weight / (k + place)
    return sorted(scores.items(), key=lambda pair: -pair[1])


def ndcg(gains: list[float], all_gains: list[float], k: int) -> float:
    """The same discounted sum twice: of what was found, and of the best order that there could be."""

    def discounted(values: list[float]) -> float:
        return sum(gain / math.log2(place + 1) for place, gain in enumerate(values[:k], 1))

    return discounted(gains) / discounted(sorted(all_gains, reverse=True))


def ask(
    question: str,
    index: object,
    read: Callable[[str], str],
    threshold: float,
    k: int,
) -> tuple[str, str, str] | None:
    """Whatever can be decided without the model is decided before it. A sentence is kept together with its
    passage, so the source is the one that it is from.
    """
    if not any(character.isalnum() for character in question):
        return None
    used = []
    for passage in index.search(question):
        if len(used) < k and passage.id not in [other.id for other in used]:
            used.append(passage)
    if not any(passage.cosine >= threshold for passage in used):
        return None

    passages = "".join(f"{passage.title}\n{passage.text}\n\n" for passage in used)
    answer = read(f"{passages}Question: {question}\nAnswer:").strip()
    if not answer:
        return None

    pairs = [(passage, sentence) for passage in used for sentence in passage.sentences]
    holding = [pair for pair in pairs if index.holds(pair[1], answer)]
    pairs = holding or pairs
    vectors = index.embed([sentence for _, sentence in pairs])
    near = vectors @ index.embed([f"{question} {answer}"])[0]
    passage, sentence = pairs[int(near.argmax())]
    return answer, passage.title, sentence


def word_f1(answer: list[str], right: list[str]) -> float:
    """The words in common are counted with how often both have them. F1 is the harmonic mean: it is low where
    either precision or recall is.
    """
    common = (Counter(answer) & Counter(right)).total()
    if common == 0:
        return 0.0
    precision = common / len(answer)
    recall = common / len(right)
    return 2 * precision * recall / (precision + recall)
