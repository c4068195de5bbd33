"""What of week 9 runs on the learner's code: a model that computes with her layer, a training with her labels
and her packing.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.adapters.attach import adapted_layers
from shared.adapters.conversations import Conversation
from shared.adapters.instructions import Instructions, Template
from shared.adapters.lora import LoRALinear
from shared.adapters.packing import Packed
from shared.evaluation import IGNORED, cross_entropy
from shared.training import TrainConfig

Labelled = Callable[[list[tuple[list[int], bool]], list[int], int], tuple[Tensor, Tensor]]
"""The exercise `answer_labels`."""
PackedTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Ids, labels, positions, and the mask: what the exercise `pack_examples` returns."""


# ---- her layer


def compute_with(model: nn.Module, hers: Callable[..., Any]) -> nn.Module:
    """The model with adapters, each of whose layers computes with the learner's LoRALinear; the same model.

    The parameters stay the model's own: it is trained, saved and loaded as before. Merged, or with other
    adapters in use, a layer computes by the course's code. The adapter is plain LoRA: the exercise has no
    DoRA and no rsLoRA.
    """
    for layer in adapted_layers(model).values():
        _hand_over(layer, hers)
    return model


def _hand_over(layer: LoRALinear, hers: Callable[..., Any]) -> None:
    (name,) = layer.in_use
    adapter = layer.adapter(name)
    config = adapter.config
    own = hers(layer.base, config.r, config.lora_alpha, config.lora_dropout)
    own.lora_A, own.lora_B = adapter.lora_A, adapter.lora_B

    def forward(x: Tensor) -> Tensor:
        if layer.merged is not None or layer.rows is not None or layer.in_use != {name: 1.0}:
            return LoRALinear.forward(layer, x)
        own.train(layer.training)
        return own(x)

    layer.forward = forward  # type: ignore[method-assign]


# ---- her labels and her packing


def talk_parts(template: Template, talk: Conversation) -> list[tuple[list[int], bool]]:
    """A conversation in tokens, part by part, and whether each is an answer; without the answers' ends.

    Each answer stands after exactly the tokens that `template.prompt` gives when it is to be written.
    """
    end = template.stop[0]
    parts: list[tuple[list[int], bool]] = []
    said = 0
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            prompt = template.prompt(talk[:i])
            reply = template.answer(message["content"])
            parts += [(prompt[said:], False), (reply[: -len(end)], True)]
            said = len(prompt) + len(reply)
    return parts


class Masked(Packed):
    """For a GPT, in the place of a cache: the places of the tokens, int64 [rows, time], and who sees whom,
    bool [rows, time, time].
    """

    def __init__(self, places: Tensor, seen: Tensor):
        super().__init__(places)
        self.places = places
        self.seen = seen

    def positions(self, time: int) -> Tensor:
        """As they were given."""
        return self.places

    def mask(self, time: int, window: int | None) -> Tensor:
        """As it was given, for all heads: bool [rows, 1, time, time]."""
        return self.seen.unsqueeze(1)


class OwnInstructions:
    """A task for the Trainer: the course's, in the same order, with the learner's labels and rows.

    What is held out is measured as the course does it, so that losses can be compared.
    """

    def __init__(
        self,
        course: Instructions,
        talks: Sequence[Conversation],
        labels: Labelled,
        pack: Callable[[list[tuple[Tensor, Tensor]], int], PackedTensors],
    ):
        """course: the same conversations as the course's task."""
        template = course.template
        self.name = f"{course.name}, her own labels and rows"
        self.tokenizer = course.tokenizer
        self.fingerprints = course.fingerprints
        self.block_size = course.block_size
        self.pack = pack
        self.evaluate = course.evaluate
        self.examples = [
            labels(talk_parts(template, talk), template.stop[0], course.block_size) for talk in talks
        ]

    def _rows(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """The rows of an epoch, in an order drawn from (seed, epoch), as the course draws it."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.examples)).tolist()
        yield from zip(*self.pack([self.examples[i] for i in order], self.block_size))

    def batches(
        self, config: TrainConfig, start_step: int, rank: int = 0, world_size: int = 1, *, every: int = 1
    ) -> Iterator[tuple[Tensor, ...]]:
        """Every `every`-th batch from the `start_step`-th on; of each, the rows of this process."""
        rows = chain.from_iterable(self._rows(config.seed, epoch) for epoch in count())
        for _ in range(start_step * config.batch_size):
            next(rows)
        while True:
            batch = [next(rows) for _ in range(config.batch_size)]
            yield tuple(torch.stack(part) for part in zip(*batch[rank::world_size]))
            for _ in range((every - 1) * config.batch_size):
                next(rows)

    def loss(self, call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """Nats for each label that counts, the mean over those of the batch."""
        ids, labels, places, seen = batch
        return cross_entropy(call(ids, Masked(places, seen)), labels)

    def learned_tokens(self, *batch: Tensor) -> int:
        """Labels that count."""
        return int((batch[1] != IGNORED).sum())
