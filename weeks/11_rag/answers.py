"""Clean solutions of week 11's exercises, each with a word on why; `week.solution(name)` shows them."""

import math
from collections import Counter

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


def ndcg(gains: list[float], all_gains: list[float], k: int) -> float:
    """The same discounted sum twice: of what was found, and of the best order that there could be."""

    def discounted(values: list[float]) -> float:
        return sum(gain / math.log2(place + 1) for place, gain in enumerate(values[:k], 1))

    return discounted(gains) / discounted(sorted(all_gains, reverse=True))


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
