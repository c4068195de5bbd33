"""Week 6. How probable a model finds a continuation of a context.

The cuts between context and continuation are those of EleutherAI's lm-evaluation-harness.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from shared.evaluation import MAX_TOKENS, longest_sequence, score_tokens
from shared.tokenizers.base import Tokenizer
from shared.tokenizers.bpe import END_OF_TEXT


class Likelihood(NamedTuple):
    """How probable a model finds a continuation."""

    loglikelihood: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the model's first guess."""


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
