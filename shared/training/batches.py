"""Week 2. A task made of batches that somebody else makes: a list, a generator, a torch DataLoader.

loader = DataLoader(rows, batch_size=16, shuffle=True)  # rows: ids, int64 [time], one at an index
Trainer(model, BatchesTask(loader, held_out, tokenizer=tokenizer), TrainConfig(steps=500)).fit()
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from shared.evaluation import IGNORED, cross_entropy, perplexity
from shared.tokenizers.base import Tokenizer
from shared.training.config import TrainConfig
from shared.training.tasks import Task


class BatchesTask(Task):
    """Learns next tokens of batches as they come, and is measured on others.

    A batch is ids, int64 [rows, time], of which each is learned from those before it; or (ids, targets), both
    int64 [rows, time], already shifted, and `IGNORED` (-100) where nothing is learned. Their sizes may
    differ; the settings' batch_size and block_size have no effect, which is said.

    train: goes round as long as there are steps, if it can be begun again (a list, a DataLoader); an iterator
    ends, and then the training does, with an error unless that was the last step. val: what is measured, all
    of it or with `eval_windows` the first so many rows, in whole batches; it must be able to begin again.
    tokenizer: what checkpoints keep beside the model. name: a run is resumed on data of this name only.

    A resumed run begins `train` from its beginning and passes over what it has learned already, which takes
    the time of reading it. It goes on exactly there if the same batches come: torch's random numbers, with
    which a DataLoader shuffles, are drawn from the settings' seed and apart from the training's. What draws
    from a generator of its own has to be made anew with the same seed, and an iterator given from its
    beginning. Several processes read every batch and take a share of its rows.

    Raises ValueError for what gives no batches, an iterator as `val`, and a DataLoader that has one process's
    share only; while training, for a batch of another form.
    """

    def __init__(
        self,
        train: Iterable[Any],
        val: Iterable[Any],
        *,
        tokenizer: Tokenizer | None = None,
        name: str = "batches",
        say: Callable[[str], None] = print,
    ):
        for which, batches in (("train", train), ("val", val)):
            if not isinstance(batches, Iterable) or isinstance(batches, (str, Tensor)):
                raise ValueError(
                    f"{which} is a {type(batches).__name__}: give a list, a DataLoader or an iterator of"
                    " batches"
                )
            if isinstance(getattr(batches, "sampler", None), DistributedSampler):
                raise ValueError(
                    f"{which} has a DistributedSampler: give a DataLoader without one, of whole batches. Each"
                    " process takes its share of their rows"
                )
        if isinstance(val, Iterator):
            raise ValueError("val is an iterator, which can be read only once: make it a list, list(val)")
        self.train = train
        self.val = val
        self.tokenizer = tokenizer
        self.name = name
        self.say = say

    def batches(
        self, config: TrainConfig, start_step: int, rank: int, world_size: int, *, every: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """(ids, targets), both int64 [rows, time], from the beginning again where `train` can be."""
        stream = islice(drawn_apart(self._rounds(), config.seed), start_step, None, every)
        for number, batch in enumerate(stream):
            ids, targets = next_tokens(batch)
            if number == 0 and ids.shape != (config.batch_size, config.block_size):
                self.say(
                    f"{self.name}: the first batch has {ids.size(0)} x {ids.size(1)} tokens; the settings'"
                    f" batch_size={config.batch_size} and block_size={config.block_size} have no effect"
                )
            if ids.size(0) % world_size:
                raise ValueError(
                    f"a batch of {ids.size(0)} rows cannot be shared by {world_size} processes: let each have"
                    " a multiple (and a DataLoader drop_last=True)"
                )
            yield ids[rank::world_size], targets[rank::world_size]

    def _rounds(self) -> Iterator[Any]:
        """The batches, round after round."""
        while True:
            count = 0
            for batch in self.train:
                count += 1
                yield batch
            if isinstance(self.train, Iterator):
                return
            if count == 0:
                raise ValueError(
                    f"{self.name}: train gave no batch (has a DataLoader fewer rows than batch_size?)"
                )

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, config: TrainConfig, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """`val_loss` in nats per token, `val_perplexity`, and `val_accuracy`: how often the most likely token
        is right.
        """
        was_training = model.training
        model.eval()
        loss = 0.0
        correct = count = rows = 0
        for batch in drawn_apart(self.val, config.seed):
            ids, targets = (part.to(device) for part in next_tokens(batch))
            logits = model(ids)
            learned = targets != IGNORED
            tokens = int(learned.sum())
            loss += cross_entropy(logits, targets).item() * tokens
            correct += int((logits.argmax(-1) == targets)[learned].sum())
            count += tokens
            rows += ids.size(0)
            if config.eval_windows is not None and rows >= config.eval_windows:
                break
        model.train(was_training)
        if count == 0:
            raise ValueError(f"{self.name}: val gave no batch to measure on")
        mean = loss / count
        return {"val_loss": mean, "val_perplexity": perplexity(mean), "val_accuracy": correct / count}


def next_tokens(batch: Any) -> tuple[Tensor, Tensor]:
    """(ids, targets) of a batch: of ids alone, the targets are the next ones.

    Raises ValueError for another form, and where nothing is to be learned.

    >>> next_tokens(torch.tensor([[5, 6, 7]]))
    (tensor([[5, 6]]), tensor([[6, 7]]))
    """
    parts = batch if isinstance(batch, (list, tuple)) else [batch]
    if not all(_are_ids(part) for part in parts):
        raise ValueError(
            f"a batch has {', '.join(map(_in_words, parts))}: it must be ids, int64 [rows, time], or (ids,"
            " targets). A DataLoader's collate_fn can make it so"
        )
    if len(parts) == 1:  # so a DataLoader of a TensorDataset gives them
        ids, targets = parts[0][:, :-1], parts[0][:, 1:]
    elif len(parts) == 2 and parts[0].shape == parts[1].shape:
        ids, targets = parts
    else:
        shapes = " and ".join(str(list(part.shape)) for part in parts)
        raise ValueError(f"a batch has parts of {shapes}: give ids, or (ids, targets) of one shape")
    if not (targets != IGNORED).any():
        raise ValueError(
            f"a batch of {list(parts[0].shape)} has nothing to learn: no target, or all are -100"
        )
    return ids, targets


def _are_ids(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() == 2 and part.dtype == torch.int64


def _in_words(part: Any) -> str:
    if isinstance(part, Tensor):
        return f"{list(part.shape)} of {part.dtype}"
    names = f" of {', '.join(map(str, part))}" if isinstance(part, dict) else ""
    return f"a {type(part).__name__}{names}"


def drawn_apart(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """Goes through the batches with torch's random numbers from a seed of their own; what is drawn elsewhere
    is what it would be without this.
    """
    random = torch.Generator().manual_seed(seed).get_state()
    iterator = _begun_later(batches)
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(random)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            random = torch.get_rng_state()
            torch.set_rng_state(outside)
        yield batch


def _begun_later(batches: Iterable[Any]) -> Iterator[Any]:
    """The same, begun when the first is asked for: a DataLoader draws when it begins."""
    yield from batches
