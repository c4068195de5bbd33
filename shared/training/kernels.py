"""Week 7. A GPU kernel of our own, in Triton: cross-entropy without the softmax ever being written down.

A lesson only: no training of the course calls it, since its speed on a GPU has not been measured
(`benchmarks/gpu.sh` does that). For training there is `linear_loss.py`, which runs everywhere, and in which
the logits are never whole either.

PyTorch's cross-entropy writes the log-softmax of all logits, as large as they are and in fp32, and reads it
again. Here a program per row walks over the row in blocks, and keeps two numbers: the largest logit so far,
m, and the sum s of exp(x - m). A block with a larger logit changes m, and s is brought over by exp(old m -
new m). At the end log Σ exp(x) = m + log s, and the loss is that less the target's logit. The backward
computes softmax - 1[target] from the same two numbers, block by block.

Optional: `pip install triton` (Linux; torch for CUDA brings it). Under TRITON_INTERPRET=1, set before Python
starts, it runs on a CPU, slowly, for tests and for looking inside.

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018); Tillet et al., "Triton"
(2019); Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024).
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # everywhere but on Linux
    triton = None

LARGEST_BLOCK = 4096
"""Logits that one program holds at a time."""

if triton is not None:

    @triton.jit
    def _forward(  # noqa: PLR0917 - Triton passes a kernel's arguments by position
        logits: tl.tensor,
        targets: tl.tensor,
        losses: tl.tensor,
        log_sums: tl.tensor,
        row_stride: tl.tensor,
        vocab_size: tl.tensor,
        ignore_index: tl.tensor,
        BLOCK: tl.constexpr,
    ) -> None:
        row = tl.program_id(0)
        logits += row.to(tl.int64) * row_stride  # past 2³¹ elements in a large batch
        m = -float("inf")
        s = 0.0
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
            new = tl.maximum(m, tl.max(x, axis=0))
            seen = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf is nan
            s = s * tl.exp(m - seen) + tl.sum(tl.exp(x - seen), axis=0)
            m = new
        log_sum = m + tl.log(s)
        target = tl.load(targets + row)
        in_vocabulary = (target >= 0) & (target < vocab_size)
        x = tl.load(logits + target, mask=in_vocabulary, other=float("nan")).to(tl.float32)
        tl.store(losses + row, tl.where(target == ignore_index, 0.0, log_sum - x))
        tl.store(log_sums + row, log_sum)

    @triton.jit
    def _backward(  # noqa: PLR0917 - Triton passes a kernel's arguments by position
        logits: tl.tensor,
        targets: tl.tensor,
        log_sums: tl.tensor,
        scale: tl.tensor,
        grads: tl.tensor,
        row_stride: tl.tensor,
        vocab_size: tl.tensor,
        ignore_index: tl.tensor,
        BLOCK: tl.constexpr,
    ) -> None:
        row = tl.program_id(0)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        target = tl.load(targets + row)
        logits += row.to(tl.int64) * row_stride
        grads += row.to(tl.int64) * vocab_size
        x = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - tl.load(log_sums + row)) - tl.where(columns == target, 1.0, 0.0)
        grad = tl.where(target == ignore_index, 0.0, grad * tl.load(scale))
        tl.store(grads + columns, grad.to(grads.dtype.element_ty), mask=inside)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        rows, vocab_size = logits.shape
        losses, log_sums = torch.empty(2, rows, device=logits.device, dtype=torch.float32)
        block = min(LARGEST_BLOCK, triton.next_power_of_2(vocab_size))
        _forward[(rows,)](
            logits, targets, losses, log_sums, logits.stride(0), vocab_size, ignore_index, BLOCK=block
        )
        count = (targets != ignore_index).sum()
        ctx.save_for_backward(logits, targets, log_sums, count)
        ctx.block = block
        ctx.ignore_index = ignore_index
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, log_sums, count = ctx.saved_tensors
        rows, vocab_size = logits.shape
        grads = torch.empty(rows, vocab_size, device=logits.device, dtype=logits.dtype)
        grid = (rows, triton.cdiv(vocab_size, ctx.block))
        _backward[grid](
            logits,
            targets,
            log_sums,
            grad.float() / count,
            grads,
            logits.stride(0),
            vocab_size,
            ctx.ignore_index,
            BLOCK=ctx.block,
        )
        return grads, None, None


def fused_cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean negative log-likelihood in nats, in fp32: `torch.nn.functional.cross_entropy(logits, targets)`,
    and the same gradients. A lesson: no training uses it.

    logits [..., vocab_size] in fp32, bf16 or fp16, targets int64 [...]. Rows whose target is `ignore_index`
    do not count; without any other the mean is nan, as PyTorch's. Besides the logits and their gradient it
    takes two numbers for each row. A target outside the vocabulary makes the loss nan: to raise an error for
    it, Python would have to wait for the GPU. Raises ValueError without Triton, on a CPU without Triton's
    interpreter, and for shapes that do not fit.
    """
    if triton is None:
        raise ValueError(
            "fused_cross_entropy needs Triton (Linux): pip install triton, or use"
            " torch.nn.functional.cross_entropy"
        )
    interpreted = not isinstance(_forward, triton.JITFunction)
    if not logits.is_cuda and not interpreted:
        raise ValueError(
            f"fused_cross_entropy runs on a CUDA GPU, not on {logits.device}: use"
            " torch.nn.functional.cross_entropy there, or set TRITON_INTERPRET=1 before Python starts to run"
            " it in Triton's interpreter"
        )
    if logits.shape[:-1] != targets.shape or logits.dim() == 0 or targets.dtype != torch.int64:
        raise ValueError(
            f"logits {list(logits.shape)} and targets {list(targets.shape)} of {targets.dtype} do not fit: "
            "give logits [..., vocab_size] and int64 targets [...]"
        )
    rows = logits.reshape(-1, logits.size(-1))
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return _FusedCrossEntropy.apply(rows, targets.reshape(-1), ignore_index)
