"""Week 0. For week 2: the window of an MLP, its vectors joined, and what other characters would change."""

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.course.explorers.attention import TextAndIds
from shared.course.explorers.page import Explorer, in_base64
from shared.course.explorers.pictures import as_image, labelled_points
from shared.course.explorers.reading import logits_of, phrase_ids

STEPS = 32767
"""Weights are rounded to so many steps from 0 to the largest of their row: an int16 each."""


def window_explorer(
    model: nn.Module,
    text: str,
    tokenizer: TextAndIds,
    *,
    characters: str | None = None,
    title: str = "The window, and what its characters are to the model",
) -> Explorer:
    """A window MLP at work: move its window along a text, put other characters into it.

    model: has the parts of `shared.models.mlp.WindowMLP` under the same names, and computes what it does.
    characters: which of the vocabulary stand on the map (PCA); None: all. Raises ValueError for another kind
    of model, for fewer than three characters or unknown ones, for an empty text, and where the explorer
    becomes too large.
    """
    ids = phrase_ids(text, tokenizer)
    parts = _parts(model)
    _check_by_hand(model, parts, ids)
    size = parts["head"].size(0)
    vocabulary = [tokenizer.decode([i]) for i in range(size)]
    mapped = _mapped(characters, vocabulary)
    spaces = [_directions(vectors[mapped]) for vectors in _spaces(parts)]
    names = [vocabulary[i] for i in mapped]
    window = parts["places"].size(0)
    words = (
        f"{len(names)} characters as the hidden layer sees them in the last of {window} places, on the two"
        " directions in which they differ most."
    )
    data = {
        "text": ids,
        "vocabulary": vocabulary,
        "mapped": mapped,
        "maps": in_base64(torch.stack(spaces)),
        "matrices": {name: _in_steps(matrix) for name, matrix in parts.items()},
    }
    return Explorer(title, ("window.js",), data, as_image(labelled_points(spaces[-1], names), words))


def _parts(model: Any) -> dict[str, Tensor]:
    """The model's numbers, as matrices in float32: two tables of embeddings, two layers, their biases."""
    names = ("token_embedding", "position_embedding", "hidden", "lm_head")
    weights: list[Any] = [getattr(getattr(model, name, None), "weight", None) for name in names]
    if not _fit(weights):
        raise ValueError(
            f"{type(model).__name__} is no window MLP that the explorer can read: it needs token_embedding"
            " (one row more than characters, for padding), position_embedding, hidden and lm_head, whose"
            " shapes fit"
        )
    matrices: dict[str, Tensor] = dict(zip(("tokens", "places", "hidden", "head"), weights))
    for name, layer in (("hidden_bias", model.hidden), ("head_bias", model.lm_head)):
        bias = layer.weight.new_zeros(layer.weight.size(0)) if layer.bias is None else layer.bias
        matrices[name] = bias[None]
    return {name: matrix.detach().float().cpu() for name, matrix in matrices.items()}


def _fit(weights: Sequence[Any]) -> bool:
    """Whether there are two tables of embeddings and two layers that read each other's numbers."""
    if any(weight is None for weight in weights):
        return False
    tokens, places, hidden, head = weights
    reads = hidden.size(1) == places.numel() and head.size(1) == hidden.size(0)
    return reads and tokens.size(1) == places.size(1) and tokens.size(0) == head.size(0) + 1


def _check_by_hand(model: nn.Module, parts: dict[str, Tensor], ids: Sequence[int]) -> None:
    """Raises ValueError for a model that makes something else of its numbers than the page will."""
    window = parts["places"].size(0)
    padding = parts["tokens"].size(0) - 1
    padded = torch.tensor([padding] * (window - 1) + list(ids))
    windows = padded.unfold(0, window, 1)  # [time, window]
    joined = (parts["tokens"][windows] + parts["places"]).flatten(1)
    activations = torch.tanh(joined @ parts["hidden"].T + parts["hidden_bias"])
    by_hand = activations @ parts["head"].T + parts["head_bias"]
    logits = logits_of(model, ids)
    if logits.shape != by_hand.shape or not torch.allclose(logits, by_hand, atol=1e-3, rtol=1e-3):
        raise ValueError(
            f"{type(model).__name__} gives other logits than tanh over the joined embeddings and one output"
            " layer would: the explorer shows that network and no other"
        )


def _mapped(characters: str | None, vocabulary: Sequence[str]) -> list[int]:
    """The ids of the characters on the map."""
    wanted = list(vocabulary) if characters is None else list(dict.fromkeys(characters))
    unknown = [character for character in wanted if character not in vocabulary]
    if unknown or len(wanted) < 3:
        raise ValueError(
            f"characters={characters!r}: the map needs at least three characters of the vocabulary"
            + (f", and has no {unknown[0]!r}" if unknown else "")
        )
    return [vocabulary.index(character) for character in wanted]


def _spaces(parts: dict[str, Tensor]) -> list[Tensor]:
    """The tokens' vectors [token, channel]: those of the table, then as the hidden layer sees each place."""
    window, n_embd = parts["places"].shape
    seen = [parts["tokens"] @ weight.T for weight in parts["hidden"].split(n_embd, dim=1)]
    assert len(seen) == window
    return [parts["tokens"], *seen]


def _directions(vectors: Tensor) -> Tensor:
    """Vectors [count, channel] on their first two principal components: [count, 2], each from -1 to 1."""
    centred = (vectors - vectors.mean(dim=0)).double()
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:2]
    if directions.size(0) < 2:  # embeddings of a single number
        directions = torch.cat([directions, torch.zeros_like(directions)])
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)  # the sign is free: the same each time
    points = centred @ directions.T
    least, most = points.amin(dim=0), points.amax(dim=0)
    return (2 * (points - least) / (most - least).clamp_min(1e-12) - 1).float()


def _in_steps(matrix: Tensor) -> dict[str, Any]:
    """A matrix as the page reads it: of each row the size of a step, and int16 numbers of steps."""
    steps = matrix.abs().amax(dim=1).clamp_min(1e-30) / STEPS
    numbers = (matrix / steps[:, None]).round().numpy().astype("<i2")
    packed = base64.b64encode(numbers.tobytes()).decode("ascii")
    return {"rows": len(steps), "steps": in_base64(steps), "numbers": packed}
