"""Week 0. For week 6: two models or more read the same phrase, and what each expects where."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from shared.course.explorers.attention import TextAndIds
from shared.course.explorers.page import Explorer
from shared.course.explorers.reading import logits_of, phrase_ids

LIKELIEST = 8
"""Next tokens of a position that are shown."""


def predictions_explorer(
    models: Mapping[str, tuple[nn.Module, TextAndIds]],
    text: str,
    *,
    title: str = "The same phrase, read by several models",
) -> Explorer:
    """A phrase in each model's own tokens: what every token costs it, and what it expected in its place.

    models: by the name that is shown, a model and its tokenizer. Costs are compared over the part of the
    text that all of them predict: from the first place on where each begins a token. Raises ValueError
    without models, for an empty text, one that a tokenizer cuts within characters, one without a part that
    all predict, and where the explorer becomes too large.
    """
    if not models:
        raise ValueError("no models: give the explorer at least one, by its name")
    readings = {name: _reading(*pair, text=text, name=name) for name, pair in models.items()}
    begins = [set(reading["begins"][1:]) for reading in readings.values()]
    shared_begins = set.intersection(*begins)
    if not shared_begins:
        raise ValueError(
            f"{text!r} has no place where all models begin a token after their first: a longer text"
        )
    start = min(shared_begins)
    for reading in readings.values():
        costs = [p["bits"] for p, begin in zip(reading["places"], reading["begins"][1:]) if begin >= start]
        reading["bits_per_byte"] = sum(costs) / len(text[start:].encode())
    data = {
        "text": text,
        "start": start,
        "models": [{"name": name, **reading} for name, reading in readings.items()],
    }
    return Explorer(title, ("predictions.js",), data, _stand_in(readings))


def _reading(model: nn.Module, tokenizer: TextAndIds, *, text: str, name: str) -> dict[str, Any]:
    """A model's tokens of the text, where each begins (in characters), and what was expected of all but the
    first.
    """
    ids = phrase_ids(text, tokenizer)
    tokens = [tokenizer.decode([i]) for i in ids]
    if "".join(tokens) != text:
        raise ValueError(
            f"{name}: its tokens cut {text!r} within characters, or do not give it back: take a text whose"
            " characters are whole tokens"
        )
    begins = list(accumulate(map(len, tokens[:-1]), initial=0))
    logits = logits_of(model, ids).double()
    places = [_place(row, following, tokenizer) for row, following in zip(logits.log_softmax(-1), ids[1:])]
    return {"tokens": tokens, "begins": begins, "vocab_size": logits.size(1), "places": places}


def _place(logarithms: Tensor, following: int, tokenizer: TextAndIds) -> dict[str, Any]:
    """What was expected at a place: the likeliest tokens, and what comes, with its rank and its bits."""
    best = logarithms.topk(min(LIKELIEST, len(logarithms)))
    expected = [
        [tokenizer.decode([token]), float(f"{value:.4g}"), token == following]
        for token, value in zip(best.indices.tolist(), best.values.exp().tolist())
    ]
    own = logarithms[following]
    return {
        "expected": expected,
        "p": float(f"{own.exp().item():.4g}"),
        "rank": int((logarithms > own).sum()) + 1,
        "bits": round(-own.item() / math.log(2), 4),
    }


def _stand_in(readings: Mapping[str, dict[str, Any]]) -> str:
    """A table: each model, and its bits per byte and the tokens that cost it most."""
    rows = ["<tr><th>model</th><th>bits per byte</th><th>tokens that cost most</th></tr>"]
    for name, reading in readings.items():
        costs: Sequence[tuple[float, str]] = [
            (place["bits"], token) for place, token in zip(reading["places"], reading["tokens"][1:])
        ]
        dearest = ", ".join(f"{token!r} {bits:.1f} bits" for bits, token in sorted(costs, reverse=True)[:5])
        number = f"{reading['bits_per_byte']:.2f}"
        rows.append(f"<tr><td>{escape(name)}</td><td>{number}</td><td>{escape(dearest)}</td></tr>")
    return f"<table><tbody>{''.join(rows)}</tbody></table>"
