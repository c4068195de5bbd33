"""Week 0. For weeks 3, 4 and 6: the attention of a phrase, head by head, and the arithmetic of a cell."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared.course.explorers.page import Explorer, in_base64
from shared.course.explorers.pictures import as_image, heat


class TextAndIds(Protocol):
    """What an explorer asks of a tokenizer: text to ids and back."""

    def encode(self, text: str, /) -> list[int]:
        """The ids of a text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of these ids."""


def attention_explorer(
    model: nn.Module,
    text: str,
    tokenizer: TextAndIds,
    *,
    layers: Sequence[int] | None = None,
    title: str = "What the heads look at",
) -> Explorer:
    """The attention of a model on a text: choose a head and a token, and open the arithmetic of one weight.

    model: holds layers of `shared.models.attention.CausalSelfAttention`, or others with its `qkv`. layers:
    which of them, from 0; None takes all. Queries and keys are those that the model computes, in float32,
    after norms and rotations. Raises ValueError for a model without such layers, for layers that it does not
    have, and where the explorer becomes too large.
    """
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty: give the explorer a phrase to look at")
    found = _queries_and_keys(model, ids)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layer with queries and keys (a method `qkv`): the explorer reads"
            " those of the course's CausalSelfAttention"
        )
    wanted = list(range(len(found))) if layers is None else list(layers)
    if not wanted or any(not 0 <= layer < len(found) for layer in wanted):
        raise ValueError(f"layers={wanted}: the model has the layers 0 to {len(found) - 1}")
    tokens = [tokenizer.decode([i]) for i in ids]
    entries = [{"number": layer + 1, **_entry(*found[layer])} for layer in wanted]
    module, q, k = found[wanted[0]]
    stand_in = as_image(
        heat(_first_head(module, q, k), tokens, "is looked at", "looks"),
        f"Layer {wanted[0] + 1}, head 1: how much each token (down) looks at each token before it (across).",
    )
    return Explorer(title, ("attention.js",), {"tokens": tokens, "layers": entries}, stand_in)


@torch.no_grad()
def _queries_and_keys(model: nn.Module, ids: Sequence[int]) -> list[tuple[Any, Tensor, Tensor]]:
    """Of each layer in the order of use: itself, its queries and its keys, float32 [head, time, head_dim]."""
    found: list[tuple[Any, Tensor, Tensor]] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        q, k, _ = module.qkv(args[0], kwargs.get("rotate"))
        found.append((module, q[0].float().cpu(), k[0].float().cpu()))

    attention = [module for module in model.modules() if callable(getattr(module, "qkv", None))]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in attention]
    device = next(model.parameters()).device
    trained = model.training
    model.eval()
    try:
        model(torch.tensor([list(ids)], device=device))
    finally:
        model.train(trained)
        for hook in hooks:
            hook.remove()
    return found


def _entry(module: Any, q: Tensor, k: Tensor) -> dict[str, Any]:
    """A layer as the page reads it."""
    head_dim = q.size(-1)
    return {
        "heads": q.size(0),
        "kv_heads": k.size(0),
        "head_dim": head_dim,
        "scale": module.scale,
        "softcap": module.softcap,
        "window": module.window,
        "q": in_base64(q),
        "k": in_base64(k),
    }


def _first_head(module: Any, q: Tensor, k: Tensor) -> Tensor:
    """The weights [time, time] of a layer's first head, for the picture."""
    scale = q.size(-1) ** -0.5 if module.scale is None else module.scale
    scores = q[0] @ k[0].T * scale
    if module.softcap is not None:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    ahead = torch.ones_like(scores).triu(1)
    if module.window is not None:
        ahead += torch.ones_like(scores).tril(-module.window)
    return scores.masked_fill(ahead > 0, float("-inf")).softmax(dim=-1)
