"""Week 2. What there is to learn, as the Trainer is handed it: each next token of a corpus, or anything else
that gives batches, a loss and an evaluation.

    class Copying(Task):
        name = "copying"
        tokenizer = None

        def batches(self, config, start_step, rank, world_size, *, every=1):
            for step in itertools.count(start_step, every):
                draw = torch.Generator().manual_seed(config.seed + step)
                ids = torch.randint(9, (config.batch_size, config.block_size), generator=draw)
                yield ids[rank::world_size], ids[rank::world_size]
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared.data.corpus import Corpus, batches
from shared.evaluation import IGNORED, cross_entropy, evaluate
from shared.tokenizers.base import Tokenizer
from shared.training.config import TrainConfig


@runtime_checkable
class Task(Protocol):
    """What there is to learn, and how it is measured.

    `NextToken` is the usual one; `batches.py` has one for batches that somebody else makes, week 9's
    `adapters/instructions.py` one that learns answers only. A class of one's own may be derived from this
    one: then it has `loss`, `learned_tokens` and `fingerprints` for batches of (ids, targets), and needs the
    rest. The Trainer checks it when it is made (`check_task`).
    """

    name: str
    """Of the data: a run is resumed on data of the same name only."""
    tokenizer: Tokenizer | None
    """What checkpoints keep beside the model; None: nothing."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of what is learned and of what is held out, by name: a run is resumed on the same only. Here
        none.
        """
        return {}

    @abstractmethod
    def batches(
        self, config: TrainConfig, start_step: int, rank: int, world_size: int, *, every: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """Every `every`-th batch from the `start_step`-th on; of each, the rows of this process. A batch
        begins with the ids, int64 [rows, time]; grad_accum_steps of them make a step.

        What comes depends on these arguments alone: then a resumed run learns what it would have learned.
        """
        ...

    def loss(self, call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """The mean loss of a batch, in nats per token. call: the model, or what a step calls in its place.
        Here the cross-entropy of (ids, targets).
        """
        ids, targets = batch
        return cross_entropy(call(ids), targets)

    def learned_tokens(self, *batch: Tensor) -> int:
        """How many tokens `loss` is the mean of. Here the targets that are not `IGNORED`."""
        _, targets = batch
        return int((targets != IGNORED).sum())

    @abstractmethod
    def evaluate(self, model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, float]:
        """Metrics on what is held out. `val_loss` is among them, and decides which checkpoint is the best."""
        ...


NEEDED = {
    "name": "a str, the data's name",
    "tokenizer": "a Tokenizer, or None for none",
    "fingerprints": "a dict of hashes of the data, by name; {} for none",
    "batches": "a method (config, start_step, rank, world_size, *, every=1) that yields tuples of tensors",
    "loss": "a method (call, *batch) that gives the batch's mean loss, in nats per token",
    "learned_tokens": "a method (*batch) that says how many tokens the loss is the mean of",
    "evaluate": "a method (model, config, device) that gives a dict of metrics with val_loss",
}
"""What a task must have, in words."""


def check_task(task: object, config: TrainConfig) -> None:
    """Raises ValueError for what is no `Task`, with all that it lacks and what that must be."""
    given = f"a {type(task).__name__} is no task for the Trainer"
    if isinstance(task, (str, Path)):
        raise ValueError(f"{given}: give shared.data.corpus.load_corpus({str(task)!r})")
    lacking = [name for name in NEEDED if not (name in dir(task) or hasattr(task, name))]  # computes nothing
    if isinstance(task, Iterable) and len(lacking) == len(NEEDED):
        raise ValueError(f"{given}: give BatchesTask(batches to learn, batches to measure on)")
    problems = [f"it lacks {name}, {NEEDED[name]}" for name in lacking]
    for name in ("batches", "loss", "learned_tokens", "evaluate"):
        if name not in lacking and not callable(getattr(task, name)):
            problems.append(f"{name} is no method: it must be {NEEDED[name]}")
    if not problems:
        problems = _wrong_values(task, config)
    if problems:
        raise ValueError(
            f"{given}: {'; '.join(problems)}. A class derived from shared.training.Task has loss,"
            " learned_tokens and fingerprints from it"
        )


def take(batches: Iterator[tuple[Tensor, ...]], count: int, where: str) -> list[tuple[Tensor, ...]]:
    """The next so many batches. where: the step, of how many. Raises ValueError where there are fewer."""
    read = list(islice(batches, count))
    if len(read) < count:
        raise ValueError(
            f"the task's batches ended in {where}: give some that begin again (a list, a DataLoader), more of"
            " them, or fewer steps"
        )
    return read


def _wrong_values(task: Any, config: TrainConfig) -> list[str]:
    """What a task has, but not as it must be."""
    problems = []
    if not isinstance(task.name, str):
        problems.append(f"name={task.name!r}: must be {NEEDED['name']}")
    if not isinstance(task.tokenizer, (Tokenizer, type(None))):
        problems.append(f"its tokenizer is a {type(task.tokenizer).__name__}: must be {NEEDED['tokenizer']}")
    try:
        signature(task.batches).bind(config, 0, 0, 1, every=1)
    except TypeError as error:
        problems.append(f"batches cannot be called as the Trainer does ({error}): {NEEDED['batches']}")
    return problems


class NextToken(Task):
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
