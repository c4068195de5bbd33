"""Week 0. What a model computes of a text, for the explorers that show it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.course.explorers.attention import TextAndIds


def phrase_ids(text: str, tokenizer: TextAndIds) -> list[int]:
    """The ids of a phrase. Raises ValueError for one without any."""
    ids = list(tokenizer.encode(text))
    if not ids:
        raise ValueError("the text is empty: give the explorer a phrase to look at")
    return ids


@torch.no_grad()
def logits_of(
    model: nn.Module, ids: Sequence[int], watched: Sequence[tuple[nn.Module, Callable[[Tensor], Any]]] = ()
) -> Tensor:
    """Logits [time, vocab_size] of a text, in float32 on the CPU, in eval mode; the model's mode stays.

    watched: modules, each with a function that is called with what the module reads, [time, channel].
    """
    hooks = []
    for module, look in watched:

        def seen(_: nn.Module, args: tuple[Any, ...], look: Callable[[Tensor], Any] = look) -> None:
            look(args[0][0].detach())

        hooks.append(module.register_forward_pre_hook(seen))
    trained = model.training
    model.eval()
    try:
        logits = model(torch.tensor([list(ids)], device=next(model.parameters()).device))
    finally:
        model.train(trained)
        for hook in hooks:
            hook.remove()
    return logits[0].float().cpu()
