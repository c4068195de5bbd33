"""Week 2. What there is to learn, as the Trainer is handed it: each next token of a corpus."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from shared.data.corpus import Corpus, batches
from shared.evaluation import cross_entropy, evaluate
from shared.tokenizers.base import Tokenizer
from shared.training.config import TrainConfig


class Task(Protocol):
    """What there is to learn, and how it is measured.

    `NextToken` is the usual one; week 9's `adapters/instructions.py` has one that learns answers only.
    """

    name: str
    """Of the data: a run is resumed on data of the same name only."""
    tokenizer: Tokenizer

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what is learned and of what is held out, by name: a run is resumed on the same only."""
        ...

    def batches(
        self, config: TrainConfig, start_step: int, rank: int, world_size: int, *, every: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """Every `every`-th batch from the `start_step`-th on; of each, the rows of this process."""
        ...

    def loss(self, call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """The mean loss of a batch, in nats per token. call: the model, or what a step calls in its place."""
        ...

    def learned_tokens(self, *batch: Tensor) -> int:
        """How many tokens `loss` is the mean of."""
        ...

    def evaluate(self, model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, float]:
        """Metrics on what is held out. `val_loss` is among them, and decides which checkpoint is the best."""
        ...


class NextToken:
    """Learns each next token of a corpus, and is measured on its validation split."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.name = corpus.name
        self.tokenizer = corpus.tokenizer

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the corpus's two splits."""
        return self.corpus.fingerprints

    def batches(
        self, config: TrainConfig, start_step: int, rank: int, world_size: int, *, every: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """(ids, targets), both int64 [rows, block_size]: see `shared.data.corpus.batches`."""
        return batches(
            self.corpus.train,
            config.block_size,
            config.batch_size,
            config.seed,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
            every=every,
        )

    def loss(self, call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """The mean cross-entropy of a batch, in nats per token."""
        ids, targets = batch
        return cross_entropy(call(ids), targets)

    def learned_tokens(self, *batch: Tensor) -> int:
        """All of them."""
        _, targets = batch
        return targets.numel()

    def evaluate(self, model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, float]:
        """`shared.evaluation.evaluate` on the validation split, each metric with `val_` before its name."""
        evaluation = evaluate(
            model,
            self.corpus.val,
            config.block_size,
            self.corpus.token_bytes,
            max_windows=config.eval_windows,
        )
        return evaluation.as_metrics()
