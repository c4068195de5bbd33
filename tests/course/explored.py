"""Small explorers of weeks 10 to 12, for what is tested of all explorers and of each."""

from functools import partial
from itertools import count

import torch

from shared.course.explorers import slots_explorer
from shared.models.gpt import GPT, GPTConfig
from shared.serving.engine import Engine
from shared.serving.generation import Request
from shared.tokenizers import CharTokenizer
from tests.helpers import shake

SPEECH = "the hen then the tea\nO that the ten then eat.\n" * 3
LETTERS = CharTokenizer.train(SPEECH)
PROMPTS = [3, 20, 9, 5, 14, 8]
LENGTHS = [4, 12, 1, 7, 9, 3]
ARRIVALS = [0, 0, 2, 3, 3, 24]
SLOTS = (2, 3)


def writer() -> GPT:
    """A small model with random weights."""
    torch.manual_seed(2)
    config = GPTConfig.preset("mini", vocab_size=LETTERS.vocab_size, block_size=48, n_layer=1, n_embd=32)
    return shake(GPT(config)).eval().requires_grad_(False)


def requests(**more) -> list[Request]:
    """Six requests for the likeliest tokens, of the lengths above."""
    ids = LETTERS.encode(SPEECH)
    lengths = zip(PROMPTS, LENGTHS)
    return [
        Request(ids[i : i + n], **{"max_new_tokens": new, "temperature": 0.0, **more})
        for i, (n, new) in enumerate(lengths)
    ]


def engines():
    """Makes engines that are stepped by hand."""
    return partial(Engine, writer(), chunk=8, speculate=False, start=False)


def slots():
    """By a clock whose number `n` is n² microseconds."""
    ticks = count()
    return slots_explorer(
        engines(), requests(), ARRIVALS, LETTERS, slots=SLOTS, runs=2, seconds=lambda: next(ticks) ** 2 / 1e6
    )
