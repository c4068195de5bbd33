"""What the tests of this folder share: small models, settings that take a moment, and spoiled gradients."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from shared.data.corpus import Corpus
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import CharTokenizer
from shared.training import TrainConfig

QUICK = TrainConfig(
    steps=6,
    batch_size=4,
    block_size=8,
    lr=1e-2,
    log_every=1,
    eval_every=3,
    eval_windows=10,
    checkpoint_every=2,
)
TINY = GPTConfig(vocab_size=20, block_size=16, n_layer=1, n_head=2, n_embd=16)
TRAIN = TrainConfig(steps=3, batch_size=2, block_size=16)
"""For `TINY`."""


def small_gpt(corpus: Corpus, **changes) -> GPT:
    """A GPT for the corpus, the same one every time."""
    torch.manual_seed(0)
    shape = dict(vocab_size=corpus.tokenizer.vocab_size, block_size=8, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**shape, **changes}))


def random_corpus(vocab_size: int) -> Corpus:
    """5000 random tokens to train on, and to validate on."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=5000).astype(np.uint16)
    tokenizer = CharTokenizer.train("".join(chr(0x10000 + i) for i in range(vocab_size)))
    return Corpus("random", tokenizer, tokens, tokens)


def timeless(row: dict) -> dict:
    """A row or summary without what depends on the clock."""
    return {
        name: value
        for name, value in row.items()
        if name not in ("seconds", "wall_seconds", "tokens_per_second")
    }


def weights(model: nn.Module) -> list[torch.Tensor]:
    """A copy of every parameter."""
    return [p.detach().clone() for p in model.parameters()]


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are the same bit for bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def out_of_memory(*args, **named) -> None:
    """Does what a step does that does not fit."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def at_training_step(model: nn.Module, step: int, act: Callable[[], object]) -> None:
    """Calls act() before the step's first forward pass; steps are counted from 1, and have one batch each."""
    passes = []

    def hook(module, args):
        if module.training:
            passes.append(1)
            if len(passes) == step:
                act()

    model.register_forward_pre_hook(hook)
