"""Week 6. The same Trainer at scale: several processes (DDP, FSDP2), compiled code, recomputed activations.

Started by torchrun, one process a GPU (or a CPU, for trying it out):

    torchrun --standalone --nproc_per_node=2 weeks/06_gpt2/run.py --preset smoke --parallel fsdp

FSDP is imported where it is used: that takes a second, for which every other program would wait.

Sources: Li et al., "PyTorch Distributed" (DDP, 2020); Zhao et al., "PyTorch FSDP" (2023); Chen et al.,
"Training Deep Nets with Sublinear Memory Cost" (2016).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from shared.devices import pick_device
from shared.registry import unwrapped
from shared.training.execution import OneProcess


class Processes(OneProcess):
    """How a step is carried out, for `Trainer(processes=...)`.

    parallel: "none" is one process. "ddp": each process has the whole model, and gradients are averaged.
    "fsdp": each has a part of every parameter, gradient and moment, and layers are put together only while
    they are used. Each process takes its share of every step (see `execution.Share`), so that the losses are
    those of one process. compile_model: torch.compile. recompute: keep only each block's input and compute
    the rest again in the backward (gradient checkpointing): less memory, up to a third more work.
    pad_vocabulary: see `pad_output_layer`.

    Raises ValueError for another way, and for several processes where torchrun has not started them.
    """

    def __init__(
        self,
        parallel: Literal["none", "ddp", "fsdp"] = "none",
        device: torch.device | str = "cpu",
        compile_model: bool = False,
        recompute: bool = False,
        *,
        pad_vocabulary: bool = False,
    ):
        if parallel not in ("none", "ddp", "fsdp"):
            raise ValueError(f"parallel={parallel!r}: must be none, ddp or fsdp")
        if parallel != "none" and not dist.is_initialized():
            raise ValueError(
                f"parallel={parallel!r} needs several processes: start the script with torchrun --standalone"
                " --nproc_per_node=N"
            )
        self.parallel = parallel
        self.device = torch.device(device)
        self.compile_model = compile_model
        self.recompute = recompute
        self.pad_vocabulary = pad_vocabulary
        if parallel != "none":
            self.rank = dist.get_rank()
            self.world_size = dist.get_world_size()

    def prepare(self, model: nn.Module) -> Callable[..., Tensor]:
        if unwrapped(model) is not model:
            raise ValueError(
                "this model is wrapped by torch.compile or DistributedDataParallel already: give the model"
                " itself, with compile_model=True or parallel='ddp'"
            )
        if self.recompute:
            recompute_blocks(model)
        if self.pad_vocabulary:
            pad_output_layer(model)
        call = model
        if self.parallel == "ddp":
            device_ids = [self.device] if self.device.type == "cuda" else None
            call = DistributedDataParallel(model, device_ids=device_ids)
        elif self.parallel == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for block in blocks_of(model):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return torch.compile(call) if self.compile_model else call

    @contextmanager
    def accumulating(self, call: Callable[..., Tensor]) -> Iterator[None]:
        wrapped = getattr(call, "_orig_mod", call)  # where torch.compile keeps what it was given
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(wrapped, FSDPModule)
            wrapped.set_requires_gradient_sync(False)
            yield
            wrapped.set_requires_gradient_sync(True)
        elif isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                yield
        else:
            yield

    def mean(self, value: float) -> float:
        if self.world_size == 1:
            return value
        total = torch.tensor(float(value), device=self.device, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.world_size

    def barrier(self) -> None:
        if self.parallel != "none":
            dist.barrier()

    def full_tensor(self, tensor: Tensor) -> Tensor:
        if self.parallel != "fsdp":
            return tensor
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def placed(self, tensor: Tensor, like: Tensor) -> Tensor:
        if self.parallel != "fsdp":
            return super().placed(tensor, like)
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return super().placed(tensor, like)
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a GPT. Raises ValueError for a model without."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"a {type(model).__name__} has no blocks: FSDP and recomputed activations are for models of"
            " blocks, such as GPT"
        )
    return blocks


def recompute_blocks(model: nn.Module) -> None:
    """Makes every block of a GPT forget its activations, and compute them again in the backward.

    Gradients are the same.
    """
    for block in blocks_of(model):
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Tensor], *inputs: object) -> Tensor:
    if torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False)
    return forward(*inputs)


def pad_output_layer(model: nn.Module, multiple: int = 64) -> None:
    """Makes the output layer of a GPT compute with a weight of some more rows of zeros, up to a multiple of
    64: GPT-2's 50,257 become 50,304.

    Matrix units work in tiles, and an odd size leaves some of them half empty. The logits of the rows of
    zeros are cut off again, and the parameter stays as it is: logits, gradients and files are those of a
    model that is not padded. Raises ValueError for a model without an output layer called lm_head.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or len(list(head.parameters())) > 1:
        raise ValueError(
            f"a {type(model).__name__} has no lm_head without a bias: padding the vocabulary is for models"
            " such as GPT"
        )
    head.forward = partial(_padded_product, head, multiple)  # type: ignore[method-assign]


def _padded_product(head: nn.Linear, multiple: int, x: Tensor) -> Tensor:
    missing = -head.out_features % multiple
    weight = F.pad(head.weight, (0, 0, 0, missing))  # [vocab_size + missing, n_embd]
    return F.linear(x, weight)[..., : head.out_features]


@contextmanager
def process_group(
    device: str = "auto", say: Callable[[str], None] = print
) -> Iterator[tuple[torch.device, int, int]]:
    """Joins the processes that torchrun started; yields (device, rank, number of processes).

    Without torchrun there is one process, of rank 0. With several processes on CUDA, each takes the GPU of
    its number on the machine; raises ValueError where there are fewer GPUs. say: gets the lines for people,
    on the first process only.
    """
    if "WORLD_SIZE" not in os.environ:
        yield pick_device(device, say), 0, 1
        return
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ["WORLD_SIZE"])

    def say_once(line: str) -> None:
        if rank == 0:
            say(line)

    chosen = pick_device(device, say_once)
    if chosen.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPUs: start at"
                " most one a GPU"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    say_once(f"processes: {size}, over {dist.get_backend()}")
    try:
        yield chosen, rank, size
    finally:
        dist.destroy_process_group()
