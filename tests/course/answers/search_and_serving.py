"""Answers to the exercises of weeks 11 and 12."""

import math
from itertools import pairwise, takewhile

import numpy as np
import torch
import torch.nn.functional as F

from tests.course.answers.register import answer

# ---- week 11


@answer
def window_spans(tokens, size, overlap):
    """Counted first: after the first window each one brings size - overlap new tokens."""
    if not tokens:
        return []
    step = size - overlap
    windows = 1 + max(0, math.ceil((tokens - size) / step))
    return [(i * step, min(i * step + size, tokens)) for i in range(windows)]


@answer
def bm25_scores(counts, question, k1, b):
    """Text by text and term by term."""
    mean = counts.sum() / len(counts)
    scores = []
    for text in counts:
        score = 0.0
        for term in question.tolist():
            df = sum(other[term] > 0 for other in counts).item()
            idf = math.log1p((len(counts) - df + 0.5) / (df + 0.5))
            score += idf * text[term] / (text[term] + k1 * (1 - b + b * text.sum() / mean))
        scores.append(float(score))
    return torch.tensor(scores)


@answer
def mean_embedding(states, mask):
    return F.normalize(torch.stack([s[m].mean(0) for s, m in zip(states, mask)]), dim=1)


@answer
def fused_scores(places, k):
    scores = [sum(1 / (k + place) for place in column if place) for column in places.T.tolist()]
    return torch.tensor(scores, dtype=torch.float32)


@answer
def ndcg(gains, all_gains, k):
    def discounted(values):
        padded = np.pad(np.array(values, float), (0, k))
        return padded[:k] @ (1 / np.log2(np.arange(2, k + 2)))

    return float(discounted(gains) / discounted(sorted(all_gains, reverse=True)))


@answer
def word_f1(answer, right):
    common = sum(min(answer.count(word), right.count(word)) for word in set(answer))
    if not common:
        return 0.0
    precision = common / len(answer)
    recall = common / len(right)
    return 2 * precision * recall / (precision + recall)


# ---- week 12


@answer
def store_keys(cache, lengths, new):
    """Row by row."""
    rows = []
    masks = []
    for row, n, key in zip(cache, lengths.tolist(), new):
        rows.append(torch.cat([row[:n], key[None], row[n + 1 :]]))
        masks.append([place <= n for place in range(cache.size(1))])
    return torch.stack(rows), lengths + 1, torch.tensor(masks)


@answer
def row_probabilities_at(logits, temperatures):
    rows = [
        (row / t).softmax(0) if t else F.one_hot(row.argmax(), len(row)).float()
        for row, t in zip(logits, temperatures.tolist())
    ]
    return torch.stack(rows)


@answer
def next_slots(slots, waiting, ended, cancelled):
    gone = {*ended, *cancelled}
    queue = [text for text in waiting if text not in cancelled]
    free = [i for i, text in enumerate(slots) if not text or text in gone]
    given = dict(zip(free, queue + [""] * len(free)))
    return [given.get(i, text) for i, text in enumerate(slots)], queue[len(free) :]


@answer
def reusable_tokens(prompt, kept, chunk):
    """Chunk by chunk."""
    ends = range(chunk, min(len(prompt), len(kept) + 1), chunk)
    same = takewhile(lambda end: prompt[:end] == kept[:end], ends)
    return chunk * len(list(same))


@answer
def decoded_pieces(chunks):
    """By hand: the bytes of a character that is not whole wait."""
    held = b""
    pieces = []
    for chunk in chunks:
        held += chunk
        text = held.decode(errors="ignore")
        pieces.append(text)
        held = held[len(text.encode()) :]
    return [*pieces, "\N{REPLACEMENT CHARACTER}" if held else ""]


@answer
def shown_pieces(pieces, stop):
    """How much of the whole text may be known after each piece."""
    texts = ["".join(pieces[: i + 1]) for i in range(len(pieces))]
    whole = "".join(pieces)

    def known(text):
        at = text.find(stop)
        if at >= 0:
            return at
        return next(i for i in range(len(text) + 1) if stop.startswith(text[i:]))

    ends = [known(text) for text in texts]
    ends.append(ends[-1] if stop in whole else len(whole))
    return [whole[start:end] for start, end in pairwise([0, *ends])]


@answer
def event_data(chunks):
    """Line by line, as the specification has it."""
    events = []
    data = []
    *lines, _ = b"".join(chunks).decode().split("\n")
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            events.append("\n".join(data))
            data = []
    return events


@answer
def delay_percentile(times, q):
    delays = np.concatenate([np.diff(text) for text in times])
    return float(np.quantile(delays, q, method="inverted_cdf"))
