"""Week 6. How probable a model finds a text: log-likelihoods of continuations, perplexity of a long text.

The cuts between context and continuation are those of EleutherAI's lm-evaluation-harness.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from shared.devices import device_of
from shared.evaluation import Evaluation, bits_per_byte, perplexity
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bpe import END_OF_TEXT

MAX_TOKENS = 1024
"""Tokens in one forward pass. Its logits take 4 · vocab_size bytes for each: 200 MB for a vocabulary of
49,152.
"""
CHUNK = 256  # positions whose log-softmax is held at a time


class Likelihood(NamedTuple):
    """How probable a model finds a continuation."""

    loglikelihood: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the model's first guess."""


@torch.no_grad()
def score_tokens(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int] | Tensor, int]],
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """For each row (ids, n): the log-probabilities of its last n ids, and whether each id is the likeliest.

    An id's probability is the one given all ids before it. Returns float32 [n] and bool [n] for each row, on
    the CPU, in the rows' order. Rows of like length share a
    forward pass of at most `max_tokens` tokens (a longer row has one to itself); padding on the right changes
    nothing, since a causal model does not look there. The model comes back in the mode (train or eval) it was
    in.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: must be at least 1; {MAX_TOKENS} is a good start")
    # The longest first: what does not fit in memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    hidden = None if progress else True  # None: shown on a terminal only
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), desc="scoring", unit="text", disable=hidden, leave=False) as bar:
            while order:
                size = max(1, max_tokens // (len(rows[order[0]][0]) - 1))
                batch = order[:size]
                order = order[size:]
                scores |= zip(batch, _score_batch(model, [rows[i] for i in batch]))
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return [scores[i] for i in range(len(rows))]


def _score_batch(
    model: nn.Module, rows: Sequence[tuple[Sequence[int] | Tensor, int]]
) -> list[tuple[Tensor, Tensor]]:
    device = device_of(model)
    ids = [torch.as_tensor(row, dtype=torch.int64, device=device) for row, _ in rows]
    logits = model(pad_sequence([x[:-1] for x in ids], batch_first=True))  # [batch, time, vocab_size]
    scores = []
    for x, (_, n), row_logits in zip(ids, rows, logits):
        logprobs = []
        greedy = []
        predictions = row_logits[len(x) - 1 - n : len(x) - 1]
        for part, target in zip(predictions.split(CHUNK), x[-n:].split(CHUNK)):
            logprobs.append(-F.cross_entropy(part.float(), target, reduction="none"))
            greedy.append(part.argmax(-1) == target)
        scores.append((torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()))
    return scores


def start_token(tokenizer: Tokenizer) -> int:
    """The id of what stands before a text that has no context: the token that every text begins with, or
    <|endoftext|>.

    Raises ValueError where the tokenizer has none.
    """
    specials = tokenizer.special_tokens
    if tokenizer.begins_with is not None:
        return specials[tokenizer.begins_with]
    if END_OF_TEXT not in specials:
        raise ValueError(
            f"an empty context needs a token to begin with, and this tokenizer has no {END_OF_TEXT}: give a"
            " context"
        )
    return specials[END_OF_TEXT]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both parts, as the harness cuts them.

    White space at the end of the context belongs to the continuation, and the two are encoded as one text, so
    that no token differs from those that the model would have read. An empty context becomes `start_token`.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return [start_token(tokenizer)], tokenizer.encode(continuation)
    before = tokenizer.prompt(stripped)
    return before, tokenizer.prompt(stripped + continuation)[len(before) :]


def loglikelihoods(
    model: nn.Module,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[Likelihood]:
    """How probable each continuation is after its context, for (context, continuation) pairs of text.

    A context that is too long for the model's block_size loses its beginning. Raises ValueError for a
    continuation that does not fit by itself, or that has no token of its own.
    """
    return score_pairs(model, [encode_pair(tokenizer, *pair) for pair in pairs], max_tokens, progress)


def score_pairs(
    model: nn.Module, pairs: Sequence[tuple[list[int], list[int]]], max_tokens: int, progress: bool
) -> list[Likelihood]:
    """`loglikelihoods` of pairs of ids."""
    limit = longest_sequence(model)
    rows = []
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError(
                "a context and a continuation need at least one token each; the last letters of a context may"
                " swallow a short text"
            )
        if len(continuation) > limit:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens does not fit in the model's"
                f" block_size={limit}: use a longer one"
            )
        rows.append(((context + continuation)[-limit - 1 :], len(continuation)))
    scores = score_tokens(model, rows, max_tokens, progress)
    return [Likelihood(logprobs.double().sum().item(), bool(greedy.all())) for logprobs, greedy in scores]


def longest_sequence(model: nn.Module) -> int:
    """The longest sequence a model takes; one that does not say (a bigram) takes any."""
    return getattr(model.config, "block_size", sys.maxsize)


def sliding_window(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    stride: int,
    block_size: int | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> Evaluation:
    """Measures `model` on all of `text`, through windows that advance by `stride` tokens.

    block_size: a window's length in tokens, None the longest that the model takes. Each token but the first
    is scored once, in the first window that reaches it, so with all the tokens before it or with more than
    block_size - stride of them. A small stride gives the model more context and takes longer; stride =
    block_size is `evaluate` on windows side by side. The method is Hugging Face's ("Perplexity of
    fixed-length models"). Raises ValueError for a stride or size out of range, and for a text of fewer than
    two tokens.
    """
    limit = longest_sequence(model)
    block_size = limit if block_size is None else block_size
    if not 1 <= block_size <= limit:
        raise ValueError(f"block_size={block_size}: must be from 1 to the model's {limit}")
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"stride={stride}: must be from 1 (all the context there is, slow) to block_size={block_size}"
            " (windows side by side)"
        )
    ids = torch.tensor(tokenizer.prompt(text), dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(
            f"the text has {len(ids)} tokens: at least 2 are needed, one to predict the other from"
        )
    rows = []
    done = 0  # ids up to this number are given or scored
    for begin in range(0, len(ids), stride):
        end = min(begin + block_size, len(ids) - 1)
        rows.append((ids[begin : end + 1], end - done))
        done = end
        if done == len(ids) - 1:
            break
    scores = score_tokens(model, rows, max_tokens, progress)
    logprobs, right = (torch.cat(parts) for parts in zip(*scores))
    loss = -logprobs.double().mean().item()
    text_bytes = sum(len(tokenizer.vocab[i]) for i in ids[1:].tolist())
    return Evaluation(
        loss=loss,
        perplexity=perplexity(loss),
        bits_per_byte=bits_per_byte(loss, len(logprobs), text_bytes),
        accuracy=right.double().mean().item(),
        tokens=len(logprobs),
    )
