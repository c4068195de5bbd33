"""Week 7. The output layer and its cross-entropy in one, in chunks: the logits are never whole in memory.

For each token the logits are as many numbers as the vocabulary has tokens, and a plain loss holds them
three times: the logits, their log-softmax, and their gradient. Here a chunk of tokens goes through the output
layer at a time. From its logits come its losses and at once its part of both gradients, and then they are
dropped. That needs no more products of matrices than the plain way: nothing is computed twice.

    Trainer(model, ChunkedNextToken(corpus), config)

What it saves and what it costs is measured by `weeks/07_amp/run.py --study loss`. The course's own runs,
whose vocabularies are small, leave it off. PyTorch has its own, `torch.nn.functional.linear_cross_entropy`
with `options=`; the tests compare with it.

Sources: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024); Hsu et al., "Liger
Kernel" (2024).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from shared.data.corpus import Corpus
from shared.registry import unwrapped
from shared.training.tasks import NextToken

CHUNK_SIZE = 256
"""Tokens whose logits are in memory at a time."""


class LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` for the autograd: both gradients are computed in the forward, chunk by chunk."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them by position
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int
    ) -> Tensor:
        count = (targets != ignore_index).sum()
        loss = torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            counts = (targets[rows] != ignore_index)[:, None]
            picked = torch.where(counts, targets[rows, None], 0)  # [chunk, 1]
            logits = (hidden[rows] @ weight.T).float()  # [chunk, vocab_size]
            log_sums = logits.logsumexp(dim=-1, keepdim=True)
            losses = log_sums - logits.gather(1, picked)
            loss += losses.masked_fill(~counts, 0).sum()
            grad = logits.sub_(log_sums).exp_()  # the softmax, in the logits' own memory
            grad.scatter_add_(1, picked, torch.full_like(losses, -1.0))
            grad.masked_fill_(~counts, 0).div_(count.clamp(min=1))
            grad = grad.to(weight.dtype)
            hidden_grad[rows] = grad @ weight
            weight_grad += grad.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return loss / count

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return upstream * hidden_grad, upstream * weight_grad, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Mean negative log-likelihood in nats, in fp32: F.cross_entropy(hidden @ weight.T, targets), and the
    same gradients, without the logits of more than `chunk_size` tokens in memory.

    hidden: [..., channel]. weight: [vocab_size, channel], of the output layer. targets: int64 [...]. Those
    that are `ignore_index` do not count; without any other the loss is nan, as PyTorch's, and the gradients
    are 0. Under autocast the products are computed in 16 bits, the rest in fp32. Raises ValueError for shapes
    that do not fit and for a chunk_size below 1; a target outside the vocabulary is PyTorch's error.
    """
    fits = hidden.dim() >= 1 and weight.dim() == 2 and hidden.size(-1) == weight.size(1)
    if not fits or hidden.shape[:-1] != targets.shape or targets.dtype != torch.int64:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)} of"
            f" {targets.dtype} do not fit: give hidden [..., channel], weight [vocab_size, channel] and int64"
            " targets [...]"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    rows = hidden.reshape(-1, hidden.size(-1))
    return LinearCrossEntropy.apply(rows, weight, targets.reshape(-1), ignore_index, chunk_size)


class ChunkedNextToken(NextToken):
    """`NextToken` whose loss is computed in chunks: for a vocabulary so large that the logits of a batch are
    what fills the memory.

    The model needs an output layer `lm_head` without a bias, and its whole weight: not with FSDP. Evaluation
    is as before.
    """

    def __init__(self, corpus: Corpus, chunk_size: int = CHUNK_SIZE):
        super().__init__(corpus)
        self.chunk_size = chunk_size

    def loss(self, call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """The mean cross-entropy of a batch, in nats per token.

        Raises ValueError where the output layer is another than a plain nn.Linear without a bias.
        """
        ids, targets = batch
        head = getattr(unwrapped(cast(nn.Module, call)), "lm_head", None)
        if not isinstance(head, nn.Linear) or len(list(head.parameters())) > 1:
            raise ValueError(
                f"the loss in chunks needs an output layer `lm_head`, an nn.Linear without bias, and this is"
                f" {type(head).__name__}: train with NextToken"
            )
        with left_out(head):
            hidden = call(ids)  # [batch, time, n_embd]
        return linear_cross_entropy(hidden, head.weight, targets, chunk_size=self.chunk_size)


@contextmanager
def left_out(layer: nn.Module) -> Iterator[None]:
    """Inside, the layer hands on what it is given."""
    own = vars(layer).get("forward")  # week 6's padding of the vocabulary puts one there

    def forward(x: Tensor) -> Tensor:
        return x

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
