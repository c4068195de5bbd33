"""Week 6: the learner's `ddp_step` in two real processes, beside one process on the whole batch.

torchrun --standalone --nproc_per_node=2 weeks/06_gpt2/two_processes.py
"""

import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.course.exercise import Week
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import table
from shared.training.distributed import process_group

STEPS = 4
ROWS = 4
"""Of all processes together, in a micro-batch."""
CONFIG = GPTConfig(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False)


@dataclass
class ProcessGroup:
    """The processes that torchrun started, as an exercise's step takes them."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces the tensor by the sum over all processes."""
        dist.all_reduce(tensor)


class OneAlone:
    """A group of one: there is nobody to exchange anything with."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over one process is what it gave."""


def small_gpt() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same small GPT in every process, and its optimizer."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def micro_batches(step: int, rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    """A step's two micro-batches: of each, the rows of one process."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.vocab_size, (2, ROWS, CONFIG.block_size + 1), generator=generator)
    own = tokens.chunk(world_size, dim=1)[rank]
    return [(rows[:, :-1], rows[:, 1:]) for rows in own]


def learners_step(rank: int) -> Callable[..., float]:
    """Her `ddp_step`, once it is solved, else the course's; the first process says which."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with redirect_stdout(nowhere) if rank else nullcontext():
            return Week(6).mine("ddp_step")


def main() -> None:
    """Prints both losses of each step, and how far the weights are apart at the end."""
    with process_group("cpu", say=_say_nothing) as (_, rank, world_size):
        group = ProcessGroup(rank, world_size) if world_size > 1 else OneAlone()
        step = learners_step(rank)
        model, optimizer = small_gpt()
        together = [step(model, optimizer, micro_batches(n, rank, world_size), group) for n in range(STEPS)]
        if rank > 0:
            return
        whole, optimizer = small_gpt()
        alone = [step(whole, optimizer, micro_batches(n, 0, 1), OneAlone()) for n in range(STEPS)]
        losses = enumerate(zip(together, alone), 1)
        print(
            table(
                {"step": n, f"{world_size} processes": f"{a:.4f}", "one": f"{b:.4f}"} for n, (a, b) in losses
            )
        )
        pairs = zip(model.parameters(), whole.parameters())
        apart = max((a - b).abs().max().item() for a, b in pairs)
        print(f"largest difference of a weight after {STEPS} steps: {apart:.0e}")


def _say_nothing(line: str) -> None:
    """For lines that only a real run needs."""


if __name__ == "__main__":
    main()
