"""Week 12 with the learner's code (`--mine`): her percentile measures, and her engine writes the texts that
other programs are held to.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared.course.workspace import Workspace
from shared.models.gpt import GPT
from shared.serving.load import percentile


def percentile_of(work: Workspace) -> Callable[[Sequence[float], float], float]:
    """The course's percentile of delays; with --mine her `delay_percentile`, once it is solved."""
    hers = work.mine("delay_percentile", None)
    if hers is None:
        return percentile

    def of_delays(delays: Sequence[float], q: float) -> float:
        return hers([[0.0, delay] for delay in delays], q)  # each delay as a text of two tokens

    return of_delays


def texts_by(
    engine_class: Callable[..., Any], model: GPT, prompts: Sequence[list[int]], new_tokens: int
) -> list[list[int]]:
    """The likeliest tokens after each prompt, by a learner's `TinyEngine`, all prompts at once."""
    with torch.inference_mode():
        engine = engine_class(model.eval(), len(prompts))
        for prompt in prompts:
            engine.submit(prompt, new_tokens, None)
        for _ in range(new_tokens):
            engine.step()
    return [list(text) for text in engine.texts]
