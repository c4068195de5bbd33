"""Week 0. For weeks 4 and 6: what each layer would say, if the model ended there (the logit lens).

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.course.explorers.attention import TextAndIds
from shared.course.explorers.page import Explorer
from shared.course.explorers.pictures import as_image, words_in_cells
from shared.course.explorers.reading import logits_of, phrase_ids

BEST = 5
"""Likeliest tokens of each place that are kept."""


def lens_explorer(
    model: nn.Module, text: str, tokenizer: TextAndIds, *, title: str = "What each layer would say"
) -> Explorer:
    """The residual stream of a text, read at each place on its way by the model's own last norm and head.

    model: a GPT with `blocks` (each with `mlp`, and `mlp_norm` where a norm stands before it), `norm` and
    `lm_head`. The places: the embedding, then behind each block's attention and behind its MLP. Raises
    ValueError for a model without these parts, for an empty text, and where the explorer becomes too large.
    """
    ids = phrase_ids(text, tokenizer)
    streams = _streams(model, ids)  # [place, time, channel]
    logits = _read_off(model, streams).cpu()  # [place, time, vocab_size]
    probabilities = logits.double().softmax(dim=-1)
    vocabulary: dict[int, int] = {}  # the tokens that are shown, in the order in which they were met
    columns = [_column(probabilities[:, t], ids[t + 1 : t + 2], vocabulary) for t in range(len(ids))]
    names = ["embedding"]
    for number in range(1, len(streams) // 2 + 1):
        names += [f"attention {number}", f"MLP {number}"]
    tokens = [tokenizer.decode([i]) for i in ids]
    shown = [tokenizer.decode([i]) for i in vocabulary]
    best = [[tokenizer.decode([i]) for i in row] for row in logits.argmax(dim=-1).tolist()]
    picture = words_in_cells(best, probabilities.amax(dim=-1), tokens, names)
    words = (
        "What the model would say next, read behind each part (down) at each position (across); the darker,"
        " the surer."
    )
    data = {
        "tokens": tokens,
        "places": names,
        "vocabulary": shown,
        "columns": columns,
        "lengths": _rounded(streams.norm(dim=-1)),
        "best": BEST,
        "added": _rounded(streams.diff(dim=0).norm(dim=-1)),
    }
    return Explorer(title, ("lens.js",), data, as_image(picture, words))


def _column(probabilities: Tensor, following: Sequence[int], vocabulary: dict[int, int]) -> dict[str, Any]:
    """A position as the page reads it: the tokens that are likeliest at any place, and what really comes,
    each with its probability at every place.

    probabilities: [place, vocab_size]. following: the id of what comes, or none at the text's end.
    """
    kept = probabilities.topk(min(BEST, probabilities.size(-1)), dim=-1).indices
    candidates = list(dict.fromkeys([*following, *kept.flip(0).flatten().tolist()]))
    places = [vocabulary.setdefault(token, len(vocabulary)) for token in candidates]
    following_place = places[0] if following else None
    return {"next": following_place, "tokens": places, "p": _rounded(probabilities[:, candidates], digits=5)}


def _rounded(values: Tensor, digits: int = 4) -> list[list[float]]:
    """Rows of numbers with so many digits that count."""
    return [[float(f"{value:.{digits}g}") for value in row] for row in values.tolist()]


def _streams(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """The stream at each place, [place, time, channel], in float32."""
    blocks, norm, head = (getattr(model, name, None) for name in ("blocks", "norm", "lm_head"))
    halves = [_before_mlp(block) for block in blocks or ()]
    if not halves or norm is None or head is None or None in halves:
        raise ValueError(
            f"{type(model).__name__} has no residual stream that the explorer can read: it needs a GPT with"
            " blocks (each with an mlp), norm and lm_head"
        )
    seen: list[Tensor] = []
    places = [place for block, half in zip(blocks or (), halves) for place in (block, half)]
    logits_of(model, ids, [(place, seen.append) for place in (*places, norm)])
    return torch.stack(seen).float()


def _before_mlp(block: Any) -> nn.Module | None:
    """What reads the stream between a block's attention and its MLP: the norm before the MLP, or the MLP."""
    norm = getattr(block, "mlp_norm", None)
    return getattr(block, "mlp", None) if norm is None else norm


@torch.no_grad()
def _read_off(model: Any, streams: Tensor) -> Tensor:
    """The logits of streams, as the model makes them of its last."""
    logits = model.lm_head(model.norm(streams.to(model.lm_head.weight.dtype))).float()
    softcap = getattr(getattr(model, "config", None), "logit_softcap", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
