"""Small explorers of weeks 10 to 12, for what is tested of all explorers and of each."""

from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import torch

from shared.course.explorers import frontier_explorer, passages_explorer, slots_explorer
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


GUESSES = CharTokenizer("\n0123+>")
ENDS = GUESSES.encode("\n")[0]


def guessers() -> dict[str, GPT]:
    """Three models of seven characters, with random weights."""
    config = GPTConfig.preset("mini", vocab_size=GUESSES.vocab_size, block_size=8, n_layer=1, n_embd=16)
    made = {}
    for seed, name in enumerate(("base", "trained", "other")):
        torch.manual_seed(seed)
        made[name] = shake(GPT(config)).eval().requires_grad_(False)
    return made


def digits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A reward: 1 where an answer begins with a digit."""
    first = [GUESSES.decode([int(row[inside][0])]) for row, inside in zip(ids, mask)]
    return torch.tensor([float(character.isdigit()) for character in first])


def brief(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Another one: fewer tokens are better, and some ids count."""
    return (ids * mask).sum(1) / 10 - mask.sum(1).float()


def frontier(**more):
    """Three policies, three prompts and two rewards."""
    given = {
        "policies": guessers(),
        "prompts": ["1+2>", "0>", "3+3>"],
        "least": 0.01,
        "longest": 3,
        "end": ENDS,
    }
    given |= {"rewards": {"digits": digits, "brief": brief}} | more
    return frontier_explorer(
        given.pop("policies"), given.pop("prompts"), given.pop("rewards"), GUESSES, **given
    )
