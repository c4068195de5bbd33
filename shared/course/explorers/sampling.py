"""Week 0. For weeks 4 and 6: from a distribution to a token, with temperature, top-k and top-p."""

import torch
from torch import nn

from shared.course.explorers.attention import TextAndIds
from shared.course.explorers.page import Explorer, in_base64
from shared.course.explorers.pictures import as_image, shares_by_rank
from shared.course.explorers.reading import logits_of, phrase_ids


def sampling_explorer(
    model: nn.Module, text: str, tokenizer: TextAndIds, *, title: str = "From a distribution to a token"
) -> Explorer:
    """What a model says after each token of a text, and how a token is drawn from it: temperature, then
    top-k, then top-p, as `shared.sampling` has them.

    Raises ValueError for an empty text, and where the explorer becomes too large: it holds the logits of the
    whole vocabulary at each position, 4 bytes each.
    """
    ids = phrase_ids(text, tokenizer)
    logits = logits_of(model, ids)  # [time, vocab_size]
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{type(model).__name__} gives logits that are not finite: nothing can be drawn from them"
        )
    tokens = [tokenizer.decode([i]) for i in ids]
    vocabulary = [tokenizer.decode([i]) for i in range(logits.size(1))]
    start = int(logits.softmax(dim=-1).amax(dim=-1).argmin())  # where the model is least sure
    shares, order = logits[start].softmax(dim=-1).sort(descending=True, stable=True)
    likeliest = 24
    picture = shares_by_rank(shares[:likeliest], [vocabulary[i] for i in order[:likeliest].tolist()])
    words = (
        f"The {len(shares[:likeliest])} tokens that are likeliest after the phrase's first {start + 1}, at"
        " temperature 1."
    )
    data = {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "logits": in_base64(logits),
        "start": start,
        "seed": 1,
    }
    return Explorer(title, ("sampling.js",), data, as_image(picture, words))
