"""Week 10. Log-probabilities of answers, their entropy and KL divergence, and means under a mask.

Shapes and units are those of the whole package, see `shared.alignment`.
"""

from typing import Literal

import torch
from torch import Tensor


def check_same_shapes(**tensors: Tensor | None) -> None:
    """Raises ValueError, naming the tensors, unless all that are given have one shape."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ, and all must be one: {listed}")


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token but the first, given those before it.

    logits [batch, time, vocab_size], ids [batch, time] -> [batch, time - 1]. The logits at position t are
    about token t + 1; the last ones are about a token that is not there. Half precision is computed in fp32.
    Raises ValueError where logits and ids are not of the same batch and time.
    """
    if logits.shape[:2] != ids.shape:
        raise ValueError(
            f"logits {list(logits.shape)} and ids {list(ids.shape)} differ: pass the ids that the model has"
            " read, not shifted"
        )
    logits = logits[:, :-1]
    if logits.dtype != torch.float64:
        logits = logits.float()
    picked = logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(-1)


def sequence_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each answer given its prompt, [batch]: the sum over the tokens where `mask` is True.

    logits [batch, time, vocab_size], ids and mask [batch, time]. Raises ValueError where an answer has no
    token, or where the mask takes in the first token, which nothing predicts.
    """
    check_same_shapes(ids=ids, mask=mask)
    if mask[:, 0].any() or not mask.any(1).all():
        raise ValueError(
            "each row of the mask needs at least one answer token, and none in the first place: the prompt"
            " stands there"
        )
    return token_logprobs(logits, ids).masked_fill(~mask[:, 1:], 0).sum(1)


def last_token(mask: Tensor) -> Tensor:
    """Where each answer ends: mask bool [batch, time] -> int64 [batch], 0 for a row without an answer."""
    positions = torch.arange(mask.size(1), device=mask.device)
    return (mask * positions).argmax(1)


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `x` over all its dimensions where `mask` is True, a scalar; without a mask the plain mean.

    What is masked may be nan.
    """
    check_same_shapes(x=x, mask=mask)
    if mask is None:
        return x.mean()
    return x.masked_fill(~mask, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """`x` with mean 0 and variance 1 (unbiased) over the elements where `mask` is True; 0 elsewhere.

    shift_mean=False keeps the mean. Raises ValueError for fewer than two values, which have no variance.
    """
    check_same_shapes(x=x, mask=mask)
    values = x if mask is None else x[mask]
    if values.numel() < 2:
        raise ValueError(f"whitening needs at least 2 values, got {values.numel()}: use a larger batch")
    mean = values.mean()
    white = (x - mean) * torch.rsqrt(values.var() + 1e-8)
    if not shift_mean:
        white = white + mean
    return white if mask is None else white.masked_fill(~mask, 0)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next token's distribution, in nats: [..., vocab_size] -> [...]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Estimates KL(policy ‖ reference) from log-probabilities of what the *policy* drew, one value for each.

    Both tensors have one shape, as has the result, in nats. With d = logp - ref_logp:

    - k1 = d, unbiased, of either sign;
    - k2 = d² / 2, biased, never negative;
    - k3 = exp(-d) - 1 + d, unbiased and never negative (Schulman, "Approximating KL Divergence", 2020).

    That holds for values: for samples of the policy, k2's gradient is the KL's, and k3's is not. Raises
    ValueError for another kind, and where the shapes differ.
    """
    check_same_shapes(logp=logp, ref_logp=ref_logp)
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"kind={kind!r}: must be k1, k2 or k3")


def answer_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """Estimates KL(policy ‖ reference) of whole answers that the *policy* drew: [batch], nats.

    logits and ref_logits are [batch, time, vocab_size], mask [batch, time]. The estimate is the sum, over the
    answer's tokens, of the exact KL of the next token's distribution. Like the sum of k1 it is unbiased, and
    its variance is far lower: the context is sampled, but not the token that follows it. Use it for reports;
    its gradient leaves out that another policy would draw other answers.
    """
    check_same_shapes(logits=logits, ref_logits=ref_logits)
    logp = logits[:, :-1].log_softmax(-1)
    ref_logp = ref_logits[:, :-1].log_softmax(-1)
    token_kl = (logp.exp() * (logp - ref_logp)).sum(-1)
    return token_kl.masked_fill(~mask[:, 1:], 0).sum(1)
