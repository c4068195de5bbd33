"""Small explorers of weeks 10 to 12, for what is tested of all explorers and of each."""

from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import torch

from shared.course.explorers import passages_explorer, slots_explorer
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


TEXTS = [
    f"{word} of the {place}"
    for place in ("tram", "ferry", "museum")
    for word in ("price", "age", "crew", "hour")
]
CHUNKS = [
    SimpleNamespace(id=f"{i}", cite=f"page {i}", passage=text, text=text) for i, text in enumerate(TEXTS)
]
ASKED = {
    "What does the tram cost?": [0],
    "When does the museum open?": [11],
    "Who works on the ferry?": [6, 7],
}


def vectors_of(texts) -> np.ndarray:
    """Vectors of length 1, float32 [len(texts), 8], that are the same for the same text."""
    drawn = [np.random.default_rng([ord(sign) for sign in text]).normal(size=8) for text in texts]
    return np.array([vector / np.linalg.norm(vector) for vector in drawn], dtype=np.float32)


def by_vectors(question: str) -> list:
    """All passages by their cosine."""
    cosines = vectors_of(TEXTS) @ vectors_of([question])[0]
    return [(CHUNKS[i], cosines[i]) for i in np.argsort(-cosines)]


def by_letters(question: str) -> list:
    """Half of the passages, by how many of the question's letters they have."""
    shared = [sum(map(text.count, question.lower())) for text in TEXTS]
    return [(CHUNKS[i], shared[i]) for i in np.argsort(-np.array(shared), kind="stable")[:6]]


def passages(**more):
    """Two searches on twelve passages, and a new order of three for the first question."""
    again = {next(iter(ASKED)): [(CHUNKS[i], -float(i)) for i in (0, 3, 5)]}
    searches = {"meaning": by_vectors, "words": by_letters}
    given = {"chunks": CHUNKS, "questions": ASKED, "searches": searches, "reranked": again} | more
    return passages_explorer(given.pop("chunks"), given.pop("questions"), vectors_of, **given)
