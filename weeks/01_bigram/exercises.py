"""The graded exercises of week 1: counting, probabilities, drawing, the loss and its units, targets, and the
bigram as a network with its training step.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared.course.exercise import Exercise, Mistake, NotRight, building
from shared.course.exercise.comparison import same
from shared.data.corpus import TokenDataset
from shared.evaluation import bits_per_byte, cross_entropy
from shared.models.bigram import BigramConfig, BigramModel, bigram_probabilities, count_bigrams


def _tokens(generator: Generator, length: int, vocab_size: int) -> np.ndarray:
    return torch.randint(vocab_size, (length,), generator=generator).numpy().astype(np.uint16)


# ---- 1. counting


def count_pairs(tokens: np.ndarray, vocab_size: int) -> Tensor:
    return count_bigrams(tokens, vocab_size)


def _count_pairs_cases(generator: Generator) -> list[tuple]:
    return [
        (_tokens(generator, 40, 5), 5),
        (_tokens(generator, 9, 7), 7),
        (np.array([0, 0, 0, 0, 1, 2], dtype=np.uint16), 3),
        (_tokens(generator, 2, 3), 4),
        (np.array([2], dtype=np.uint16), 3),  # no pair at all
        (_tokens(generator, 200, 300), 300),  # 300 * 300 does not fit in uint16
    ]


def _counted(first: np.ndarray, second: np.ndarray, vocab_size: int) -> Tensor:
    pairs = first.astype(np.int64) * vocab_size + second
    return torch.from_numpy(np.bincount(pairs, minlength=vocab_size**2)).view(vocab_size, vocab_size)


def _counted_once(tokens: np.ndarray, vocab_size: int) -> Tensor:
    counts = np.zeros((vocab_size, vocab_size), dtype=np.int64)
    counts[tokens[:-1], tokens[1:]] += 1
    return torch.from_numpy(counts)


def _overflowing(tokens: np.ndarray, vocab_size: int) -> Tensor:
    pairs = (tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]).astype(np.uint16)
    return torch.from_numpy(np.bincount(pairs, minlength=vocab_size**2)).view(vocab_size, vocab_size)


COUNT_PAIRS = Exercise(
    task="""A bigram model is a table of how often each token follows each. Count it: `tokens` is an array of
    uint16 token ids, one after the other, `vocab_size` is how many different tokens there are. Return a
    tensor of int64, [vocab_size, vocab_size]: row a, column b says how often b comes directly after a. A text
    of n tokens has n - 1 pairs. Every token's id is below vocab_size, which is at most a few hundred.""",
    reference=count_pairs,
    cases=_count_pairs_cases,
    forbids=(count_bigrams,),
    valid=lambda tokens, vocab_size: len(tokens) > 0 and int(tokens.max()) < vocab_size,
    mistakes=(
        Mistake(
            "the table is transposed",
            lambda tokens, vocab_size: _counted(tokens[1:], tokens[:-1], vocab_size),
            "The first token of a pair chooses the row and the second the column. With the two exchanged the"
            " model learns which token came before, and would write text backwards.",
        ),
        Mistake(
            "a repeated pair counts only once",
            _counted_once,
            "`counts[a, b] += 1` with whole arrays for a and b adds 1 once for each different place, however"
            " often the place is named. So the table only says which pairs occur, and a frequent pair looks"
            " no likelier than a rare one.",
        ),
        Mistake(
            "the text wraps round",
            lambda tokens, vocab_size: _counted(tokens, np.roll(tokens, -1), vocab_size),
            "There is one pair too many: the last token with the first one. Nothing comes after the last"
            " token, so n tokens make n - 1 pairs.",
        ),
        Mistake(
            "every second pair is skipped",
            lambda tokens, vocab_size: _counted(tokens[: len(tokens) // 2 * 2 : 2], tokens[1::2], vocab_size),
            "The pairs overlap: each token is the second of one pair and the first of the next. Cutting the"
            " text into separate pairs throws half of the data away.",
        ),
        Mistake(
            "uint16 overflows",
            _overflowing,
            "The place of a pair in the table, a times vocab_size plus b, was computed in the tokens' own"
            " type, uint16. Above 65,535 that starts again from 0, without a warning, and the count lands in"
            " another pair's place. A small alphabet hides this.",
        ),
        Mistake(
            "counts as floats",
            lambda tokens, vocab_size: count_bigrams(tokens, vocab_size).float(),
            "The numbers are right but the type is float32, which cannot count beyond 16,777,216: adding 1"
            " changes nothing from there on. Counts are whole numbers, so keep them in int64.",
        ),
    ),
    hints=(
        "The pairs are the tokens without the last, beside the tokens without the first.",
        (
            "A loop over those two, adding 1 at [a, b], is right. To be fast, give each pair one number, a *"
            " vocab_size + b, and count the numbers. Turn the ids into int64 before you multiply."
        ),
        (
            "np.bincount(numbers, minlength=vocab_size**2) counts them; torch.from_numpy and"
            " .view(vocab_size, vocab_size) make the table."
        ),
    ),
)


# ---- 2. probabilities


def row_probabilities(counts: Tensor, smoothing: float) -> Tensor:
    return bigram_probabilities(counts, smoothing)


def _row_probabilities_cases(generator: Generator) -> list[tuple]:
    def counts(vocab_size: int, low: int = 0) -> Tensor:
        return torch.randint(low, 9, (vocab_size, vocab_size), generator=generator)

    empty_row = counts(4)
    empty_row[2] = 0
    return [
        (counts(3), 1.0),
        (counts(5), 0.5),
        (counts(6, low=1), 0.0),
        (empty_row, 0.1),
        (torch.tensor([[0, 7], [1, 0]]), 2.0),
        (torch.tensor([[3]]), 1.0),
    ]


def _rows(values: Tensor) -> Tensor:
    return values / values.sum(dim=1, keepdim=True)


ROW_PROBABILITIES = Exercise(
    task="""Turn counts into probabilities. `counts` is int64 [vocab_size, vocab_size]; row a holds how often
    each token came after token a. Add `smoothing` to every count first, so that a pair never seen stays
    possible: a model that gives it probability 0 has an infinite loss the first time it meets it. Return
    float32 [vocab_size, vocab_size], where each row is the distribution of the next token and sums to 1. With
    smoothing 0 no row is empty.""",
    reference=row_probabilities,
    cases=_row_probabilities_cases,
    forbids=(bigram_probabilities,),
    valid=lambda counts, smoothing: (
        len(set(counts.shape)) == 1 and smoothing >= 0 and bool((counts.sum(1) + smoothing > 0).all())
    ),
    mistakes=(
        Mistake(
            "columns instead of rows",
            lambda counts, smoothing: (counts + smoothing) / (counts + smoothing).sum(dim=0, keepdim=True),
            "Each column sums to 1, and each row should. A row belongs to the token we have; the distribution"
            " runs over the tokens that may follow it.",
        ),
        Mistake(
            "only what was never seen is smoothed",
            lambda counts, smoothing: _rows(counts.double().masked_fill(counts == 0, smoothing).float()),
            "The smoothing took the place of the zeros, and belongs to every count: a pair seen once would"
            " otherwise be worth as much as one that was never seen.",
        ),
        Mistake(
            "keepdim forgotten",
            lambda counts, smoothing: (counts + smoothing) / (counts + smoothing).sum(dim=1),
            "Without keepdim the row sums have shape [vocab_size], and broadcasting lines them up with the"
            " columns: entry [a, b] was divided by the sum of row b. No error, wrong probabilities.",
        ),
        Mistake(
            "the whole table sums to 1",
            lambda counts, smoothing: (counts + smoothing) / (counts + smoothing).sum(),
            "This is the probability of meeting the pair (a, b) anywhere in the text. The model needs the"
            " probability of b once a is given, so each row has to sum to 1 by itself.",
        ),
        Mistake(
            "all counts below, without the smoothing",
            lambda counts, smoothing: (counts + smoothing) / counts.sum(),
            "Every row was divided by one number, the sum of all counts before smoothing. The rows do not sum"
            " to 1: each has to be divided by its own sum, that of the smoothed counts.",
        ),
        Mistake(
            "the row's sum before smoothing",
            lambda counts, smoothing: (counts + smoothing) / counts.sum(dim=1, keepdim=True),
            "Each row was divided by the sum of its counts before `smoothing` was added, so it sums to more"
            " than 1, and a row without counts is divided by 0. Take the sum of the smoothed counts.",
        ),
        Mistake(
            "no smoothing",
            lambda counts, smoothing: _rows(counts.float()),
            "The smoothing was not used. A pair never seen gets probability 0 and an infinite loss, and a row"
            " without counts becomes 0/0, nan.",
        ),
        Mistake(
            "smoothing after the division",
            lambda counts, smoothing: _rows(counts.float()) + smoothing,
            "The smoothing was added to probabilities, so the rows sum to more than 1. It belongs to the"
            " counts: as if every pair had been seen that many times more.",
        ),
        Mistake(
            "smoothing counted once in the sum",
            lambda counts, smoothing: (counts + smoothing) / (counts.sum(dim=1, keepdim=True) + smoothing),
            "Every one of the vocab_size counts in a row grew by `smoothing`, but the sum below grew by it"
            " only once. The rows sum to more than 1.",
        ),
    ),
    hints=(
        "Two steps: add, then divide each row by its own sum. Print the sums of the rows of your result.",
        (
            "Compute the smoothed table once and take the sum of that same table along the dimension of the"
            " next token."
        ),
        (
            "smoothed = counts + smoothing; then divide it by smoothed.sum(dim=1, keepdim=True). keepdim"
            " makes the sums a column, [vocab_size, 1]."
        ),
    ),
)


# ---- 3. the loss


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets)


def _token_loss_cases(generator: Generator) -> list[tuple]:
    def case(
        batch: int, time: int, vocab_size: int, scale: float = 2.0, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        logits = torch.randn(batch, time, vocab_size, generator=generator) * scale + offset
        return logits, torch.randint(vocab_size, (batch, time), generator=generator)

    return [
        case(2, 3, 5),
        case(4, 2, 3),
        case(1, 5, 4),
        case(3, 1, 6),
        case(1, 1, 2),
        case(2, 4, 3, scale=0.0),  # all equal: ln 3
        case(2, 3, 4, offset=100.0),  # exp(100) does not fit in float32
        case(3, 2, 3, scale=200.0),  # a probability that float32 rounds to 0 has a logarithm, all the same
    ]


def _picked(values: Tensor, targets: Tensor) -> Tensor:
    """The value of each target: [batch, time]."""
    return values.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _overflowing_loss(logits: Tensor, targets: Tensor) -> Tensor:
    powers = logits.exp()
    return -_picked(powers / powers.sum(-1, keepdim=True), targets).log().mean()


def _rows_unflattened(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(-1)[torch.arange(targets.numel()), targets.flatten()].mean()


def _targets_unflattened(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.log_softmax(-1).flatten(0, 1)[torch.arange(targets.numel()), targets].mean()


SIDE_BY_SIDE = (
    "Two lists of places, rows[torch.arange(n), places], are read side by side, one pair for each number"
    " that is picked. Here n is batch * time, so the rows have to be [batch * time, vocab_size],"
    " logits.flatten(0, 1), and the places [batch * time], targets.flatten()."
)

TOKEN_LOSS = Exercise(
    task="""Write the cross-entropy by hand, without F.cross_entropy: it is the number that every later week
    makes smaller. `logits` is float32 [batch, time, vocab_size], `targets` int64 [batch, time] holds the
    token that really came. Return the mean over all batch * time positions of -ln(probability of the target),
    a float32 tensor of shape [], in nats. The probabilities are the softmax of the logits over the
    vocabulary. Logits may be above 100, and 200 apart.""",
    reference=token_loss,
    cases=_token_loss_cases,
    forbids=(F.cross_entropy, F.nll_loss, cross_entropy),
    differentiable=True,
    tolerance=1e-4,
    mistakes=(
        Mistake("the rows are not flattened before they are indexed", _rows_unflattened, SIDE_BY_SIDE),
        Mistake("the targets are not flattened before they are an index", _targets_unflattened, SIDE_BY_SIDE),
        Mistake(
            "gather's index lacks a dimension",
            lambda logits, targets: -logits.log_softmax(-1).gather(-1, targets).mean(),
            "gather wants an index with as many dimensions as what it picks from: [batch, time, 1] for"
            " [batch, time, vocab_size], which is targets.unsqueeze(-1).",
        ),
        Mistake(
            "the logarithm is missing",
            lambda logits, targets: -_picked(logits.softmax(-1), targets).mean(),
            "The mean probability was negated without taking its logarithm first. Only the logarithm makes"
            " the losses of single tokens add up to the loss of the text, and makes a confident wrong guess"
            " expensive.",
        ),
        Mistake(
            "the softmax is missing",
            lambda logits, targets: -_picked(logits, targets).mean(),
            "The target's logit was used as if it were a log-probability. Without the softmax the model could"
            " lower this by raising all logits at once, and learn nothing.",
        ),
        Mistake(
            "a sum instead of a mean",
            lambda logits, targets: -_picked(logits.log_softmax(-1), targets).sum(),
            "The losses of all positions were added up. The loss then grows with the batch, and so do the"
            " gradients: a learning rate that fits one batch size fails at another.",
        ),
        Mistake(
            "mean over the batch only",
            lambda logits, targets: -_picked(logits.log_softmax(-1), targets).sum() / logits.size(0),
            "The sum was divided by the number of sequences, not by the number of tokens. This is the loss of"
            " a whole sequence; ours is per token.",
        ),
        Mistake(
            "every target at every position",
            lambda logits, targets: -logits.log_softmax(-1)[..., targets.flatten()].mean(),
            "The indexing took all targets at each position, so most of what is averaged is the probability"
            " of another position's token. Each position has one target: gather picks it, or an index of"
            " positions beside the index of targets.",
        ),
        Mistake(
            "logarithm to base 2",
            lambda logits, targets: -_picked(logits.log_softmax(-1), targets).mean() / math.log(2),
            "The unit is bits: base 2 was used. The loss is in nats, with the natural logarithm, and"
            " perplexity is e to its power.",
        ),
        Mistake(
            "the softmax runs over time",
            lambda logits, targets: -_picked(logits.log_softmax(1), targets).mean(),
            "The softmax has to run over the vocabulary, the last dimension. Here it ran over the positions:"
            " each token's probabilities sum to 1 along the text, which is no distribution of the next"
            " token.",
        ),
        Mistake(
            "the logarithm of a probability",
            lambda logits, targets: -_picked(logits.softmax(-1), targets).log().mean(),
            "softmax first and the logarithm afterwards: a probability below 1e-45 is 0 in float32, and its"
            " logarithm is -inf. log_softmax takes both steps at once and loses nothing.",
        ),
        Mistake(
            "a small number added before the logarithm",
            lambda logits, targets: -(_picked(logits.softmax(-1), targets) + 1e-9).log().mean(),
            "1e-9 keeps the logarithm finite, but it is the wrong number: a token whose probability is 1e-80"
            " costs 184 nats, and here 20.7. log_softmax needs no such cure.",
        ),
        Mistake(
            "exp overflows",
            _overflowing_loss,
            "The formula is right, but exp of a logit above 88 is infinite in float32, and infinity over"
            " infinity is nan. A softmax does not change when the same number is taken from all logits of a"
            " row, so take away the largest first.",
        ),
    ),
    hints=(
        (
            "Three steps: log-probabilities from logits, the one of each target, their mean with the sign"
            " turned."
        ),
        (
            "logits.log_softmax(-1) does the first step and cannot overflow. For the second, look up"
            " torch.gather: it wants the targets with as many dimensions as the logits."
        ),
        (
            "log_probabilities.gather(-1, targets.unsqueeze(-1)) has shape [batch, time, 1]; the loss is"
            " minus its mean."
        ),
    ),
)


# ---- 4. the unit


def loss_in_bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    return bits_per_byte(loss, tokens, text_bytes)


def _bits_cases(generator: Generator) -> list[tuple]:
    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def loss() -> float:
        return 0.5 + 3 * torch.rand(1, generator=generator).item()

    return [
        (loss(), number(100, 200), number(300, 900)),
        (loss(), number(1000, 2000), number(2100, 5000)),
        (loss(), 100, 100),  # a character model on plain English
        (loss(), 1, 4),
        (math.log(2), 100, 200),
        (0.0, 10, 30),
    ]


def _log2(loss: float) -> float:
    return math.log2(loss) if loss > 0 else -math.inf  # without the crash at 0: the other cases show more


LOSS_IN_BITS_PER_BYTE = Exercise(
    task="""A loss in nats per token cannot be compared between models with different tokenizers: a long token
    is harder to guess than a letter. Bits per byte can. `loss` is the mean loss in nats per token, `tokens`
    is how many tokens were predicted, `text_bytes` how many bytes of text they stand for. Return, as a float,
    how many bits the model needs for each byte of the text. One bit is ln(2) nats.""",
    reference=loss_in_bits_per_byte,
    cases=_bits_cases,
    mistakes=(
        Mistake(
            "still in nats",
            lambda loss, tokens, text_bytes: loss * tokens / text_bytes,
            "This is nats per byte. A bit is the smaller unit, ln 2 = 0.693 nats, so the same loss is a"
            " larger number of bits.",
        ),
        Mistake(
            "the logarithm of the loss",
            lambda loss, tokens, text_bytes: _log2(loss) * tokens / text_bytes,
            "A logarithm was taken of the loss. The loss is a mean of logarithms already, and another unit is"
            " only another factor: one bit is ln(2) nats, so divide by math.log(2).",
        ),
        Mistake(
            "multiplied by ln 2",
            lambda loss, tokens, text_bytes: loss * tokens / text_bytes * math.log(2),
            "The conversion goes the wrong way. A fair coin is one bit and 0.693 nats: from nats to bits the"
            " number must grow.",
        ),
        Mistake(
            "tokens and bytes exchanged",
            lambda loss, tokens, text_bytes: loss * text_bytes / tokens / math.log(2),
            "The fraction is upside down. The loss of the whole text is loss * tokens, and that is shared"
            " among its bytes; a token is usually several bytes, so the loss per byte is the smaller one.",
        ),
        Mistake(
            "whole bytes per token",
            lambda loss, tokens, text_bytes: loss / math.log(2) / max(1, text_bytes // tokens),
            "// rounds the bytes per token down to a whole number, so a tokenizer with 4.9 bytes per token is"
            " charged as if it had 4. Use / for a share.",
        ),
        Mistake(
            "bits per token",
            lambda loss, tokens, text_bytes: loss / math.log(2),
            "This is bits per token: the unit is changed, but the length of the tokens is not taken into"
            " account. A tokenizer with longer tokens would look worse, though its model may be better.",
        ),
    ),
    hints=(
        "First the loss of the whole text, then its share for one byte, then the unit.",
        "The whole text costs loss * tokens nats. How many bytes share that?",
        "Divide loss * tokens by text_bytes, then by math.log(2) to come from nats to bits.",
    ),
)


# ---- 5. inputs and targets


def inputs_and_targets(tokens: np.ndarray, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    x, y = TokenDataset(tokens, block_size).__getitems__(starts)
    return x, y


def _inputs_cases(generator: Generator) -> list[tuple]:
    def case(length: int, vocab_size: int, batch: int, block_size: int) -> tuple[np.ndarray, list[int], int]:
        starts = torch.randint(length - block_size, (batch,), generator=generator).tolist()
        return _tokens(generator, length, vocab_size), starts, block_size

    return [
        (np.arange(10, dtype=np.uint16), [0, 5], 4),  # the first and the last that fits
        (np.arange(12, dtype=np.uint16), [3, 1], 4),  # room for two windows, one after the other
        case(50, 65, 3, 8),
        case(30, 200, 5, 4),
        case(20, 10, 1, 6),
        case(20, 90, 4, 1),
        case(30, 60_000, 3, 5),  # ids that int16 has no room for
        (np.arange(7, dtype=np.uint16), [2], 3),
    ]


def _cut(
    tokens: np.ndarray, starts: list[int], block_size: int, x_from: int = 0, y_from: int = 1
) -> tuple[Tensor, Tensor]:
    """Windows that begin `x_from` and `y_from` places after each start."""
    rows = np.array(starts)[:, None] + np.arange(block_size)
    ids = torch.from_numpy(tokens.astype(np.int64))
    return ids[torch.from_numpy(rows + x_from)], ids[torch.from_numpy(rows + y_from)]


def _rolled(tokens: np.ndarray, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    x, _ = _cut(tokens, starts, block_size)
    return x, x.roll(-1, dims=1)


def _without_first_and_last(tokens: np.ndarray, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    x, _ = _cut(tokens, starts, block_size)
    return x[:, :-1], x[:, 1:]


def _next_window(tokens: np.ndarray, starts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    x, _ = _cut(tokens, starts, block_size)
    windows = [tokens[start + block_size : start + 2 * block_size] for start in starts]
    return x, torch.from_numpy(np.array(windows).astype(np.int64))  # at the end of the text they are short


INPUTS_AND_TARGETS = Exercise(
    task="""A language model gets its labels for free: the target of a position is the token that comes next.
    `tokens` is a uint16 array, `starts` a list of places in it. Cut a window of `block_size` tokens from each
    start, and return (x, y), both int64 [batch, block_size]: x holds the windows, and y[i, t] is the token
    that follows x[i, t] in the text. Every start leaves room for the last target.""",
    reference=inputs_and_targets,
    cases=_inputs_cases,
    forbids=(TokenDataset,),
    valid=lambda tokens, starts, block_size: block_size > 0 and max(starts) + block_size < len(tokens),
    mistakes=(
        Mistake(
            "targets not shifted",
            lambda tokens, starts, block_size: _cut(tokens, starts, block_size, y_from=0),
            "x and y are the same windows. A model trained on this learns to repeat the token it sees; its"
            " loss falls to nearly zero and it writes one letter for ever.",
        ),
        Mistake(
            "targets shifted the wrong way",
            lambda tokens, starts, block_size: _cut(tokens, starts, block_size, y_from=-1),
            "y holds the token before each input, not the one after it. The model would learn to write"
            " backwards, and at start 0 the target even comes from the end of the text.",
        ),
        Mistake(
            "the targets are the next window",
            _next_window,
            "y begins where x ends: it holds the block_size tokens after the window. The target of a position"
            " is the very next token, so y is x's window moved on by one place.",
        ),
        Mistake(
            "the last target is the window's first token",
            _rolled,
            "The window was rolled, so the last position's target is its own first token instead of the next"
            " token of the text. One target in block_size is noise, and the loss cannot fall below that.",
        ),
        Mistake(
            "one position too few",
            _without_first_and_last,
            "x and y were both cut from block_size tokens, so there are only block_size - 1 positions. Inputs"
            " and targets together need block_size + 1 tokens of the text.",
        ),
    ),
    hints=(
        "For tokens 5 6 7 8 9 from start 0 and block_size 4, x is 5 6 7 8 and y is 6 7 8 9.",
        (
            "For each start, x is the slice [start : start + block_size] and y is the same slice one place"
            " further. Turn it into int64 with astype before it becomes a tensor."
        ),
        (
            "Build two lists of torch.from_numpy(tokens[a:b].astype(np.int64)), one with a = start and one"
            " with a = start + 1, and torch.stack each."
        ),
    ),
)


# ---- 6. temperature


def temperature_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).softmax(-1)


def _temperature_cases(generator: Generator) -> list[tuple]:
    def logits(batch: int, vocab_size: int) -> Tensor:
        return 2 * torch.randn(batch, vocab_size, generator=generator)

    return [
        (logits(3, 5), 0.5),
        (logits(2, 7), 2.0),
        (logits(4, 3), 1.0),
        (logits(1, 6), 0.8),
        (logits(5, 2), 10.0),
        (torch.tensor([[1.0, 2.0, 3.0]]), 0.25),
        (0.05 * logits(2, 60), 0.02),  # powers of probabilities vanish
        (torch.tensor([[100.0, 0.0], [3.0, 4.0]]), 0.5),  # exp of 200 is no float32
    ]


TEMPERATURE_PROBABILITIES = Exercise(
    task="""Temperature makes a model bolder or more careful when it draws the next token. `logits` is float32
    [batch, vocab_size], `temperature` a number above 0. Return the probabilities to draw from, float32
    [batch, vocab_size], each row summing to 1: the softmax of the logits divided by the temperature. Below 1
    the likely tokens gain, above 1 all tokens come closer together.""",
    reference=temperature_probabilities,
    cases=_temperature_cases,
    mistakes=(
        Mistake(
            "multiplied instead of divided",
            lambda logits, temperature: (logits * temperature).softmax(-1),
            "The logits were multiplied by the temperature, so it works the wrong way round: a high"
            " temperature makes the model repeat its favourite, a low one makes it babble.",
        ),
        Mistake(
            "applied after the softmax",
            lambda logits, temperature: logits.softmax(-1) / temperature,
            "The probabilities were divided, not the logits. All of them shrink by the same factor, so none"
            " gains on another, and the rows no longer sum to 1.",
        ),
        Mistake(
            "softmax twice",
            lambda logits, temperature: (logits.softmax(-1) / temperature).softmax(-1),
            "The softmax was taken of numbers that had already been through it. Probabilities lie between 0"
            " and 1, so the second softmax makes them all nearly equal.",
        ),
        Mistake(
            "the softmax runs over the batch",
            lambda logits, temperature: (logits / temperature).softmax(0),
            "The softmax ran over dimension 0: each token's probabilities sum to 1 over the batch. It has to"
            " run over the vocabulary, the last dimension.",
        ),
        Mistake(
            "exp overflows",
            lambda logits, temperature: _rows((logits / temperature).exp()),
            "The formula is right on paper, but exp of a number above 88 is infinite in float32, and infinity"
            " over infinity is nan. softmax subtracts the row's largest first, which changes nothing else.",
        ),
        Mistake(
            "powers that vanish",
            lambda logits, temperature: _rows(logits.softmax(-1) ** (1 / temperature)),
            "The formula is right on paper, but at a low temperature the power of every probability is 0 in"
            " float32, and 0/0 is nan. Divide the logits and let softmax do the rest: it subtracts the"
            " largest first.",
        ),
        Mistake(
            "not normalised",
            lambda logits, temperature: logits.softmax(-1) ** (1 / temperature),
            "Raising the probabilities to the power of 1/temperature gives the right proportions, but the"
            " rows no longer sum to 1. They have to be divided by their sums.",
        ),
    ),
    hints=(
        (
            "The temperature acts on the logits, before they become probabilities. Which way should a small"
            " temperature change their differences?"
        ),
        (
            "A small temperature should make the differences between logits larger. Which dimension do the"
            " tokens lie along?"
        ),
        "Divide the logits by the temperature and take the softmax over dim=-1.",
    ),
)


# ---- 7. drawing


def draw_token(probabilities: Tensor, u: float) -> int:
    return int(torch.searchsorted(probabilities.double().cumsum(0), u, right=True))


def _draw_cases(generator: Generator) -> list[tuple]:
    def case(size: int, sharpness: float = 1.0) -> tuple[Tensor, float]:
        logits = sharpness * torch.randn(size, generator=generator)
        return logits.softmax(0), 0.98 * torch.rand(1, generator=generator).item()

    return [
        (torch.tensor([0.5, 0.25, 0.25]), 0.6),
        (torch.tensor([0.25, 0.5, 0.25]), 0.0),
        (torch.tensor([0.0, 0.5, 0.5]), 0.0),  # what has probability 0 is never drawn
        (torch.tensor([0.5, 0.0, 0.5]), 0.5),
        case(4),
        case(6, 2.0),
        case(10),
    ]


def _upto(probabilities: Tensor, u: float) -> int:
    return int((probabilities.double().cumsum(0) < u).sum())


def _by_falling_probability(probabilities: Tensor, u: float) -> int:
    falling, ids = probabilities.sort(descending=True, stable=True)
    return int(ids[draw_token(falling, u)])


DRAW_TOKEN = Exercise(
    task="""To write, a model draws the next token: each as often as its probability says. Lay the
    probabilities side by side on a line from 0 to 1; token 0 owns the first piece, token 1 the next. A random
    number `u`, $0 \\le u < 1$, falls into one piece, and whose piece it is, that token is drawn.
    `probabilities` is float32 [vocab_size] and sums to 1. Return the token's id, an int: the first one for
    which the sum of the probabilities up to and including its own is greater than u.""",
    reference=draw_token,
    cases=_draw_cases,
    forbids=(torch.searchsorted.__name__, torch.multinomial.__name__),
    valid=lambda probabilities, u: bool(abs(probabilities.sum() - 1) < 1e-4) and 0 <= u < 0.999,
    mistakes=(
        Mistake(
            "always the likeliest",
            lambda probabilities, u: int(probabilities.argmax()),
            "This is argmax: the same token every time. A model that never takes the second likeliest goes in"
            " circles; drawing takes each token as often as its probability says.",
        ),
        Mistake(
            "one token too far",
            lambda probabilities, u: min(draw_token(probabilities, u) + 1, len(probabilities) - 1),
            "The token after the right one was returned. The piece that u falls into ends where the running"
            " sum first exceeds u, and belongs to the token just added.",
        ),
        Mistake(
            "the edge belongs to the wrong token",
            _upto,
            "At u equal to a running sum, and at u = 0, the piece to the left was taken: >= where > is meant."
            " A token with probability 0 can then be drawn, and an impossible pair appears in the text.",
        ),
        Mistake(
            "u is compared with one probability at a time",
            lambda probabilities, u: int((probabilities > u).int().argmax()),
            "u was compared with each probability by itself, not with their running sum. With many tokens"
            " none is that likely, and the first token comes out nearly always.",
        ),
        Mistake(
            "u is compared with single probabilities",
            lambda probabilities, u: next(
                (token for token, p in enumerate(probabilities.tolist()) if u < p), len(probabilities) - 1
            ),
            "u was compared with each probability by itself, not with their running sum. With many tokens"
            " none is that likely, and the last token comes out nearly always.",
        ),
        Mistake(
            "the pieces are sorted by size",
            _by_falling_probability,
            "The pieces were laid down in order of falling probability. Each token is drawn as often as it"
            " should be, but the task lays them in order of their ids: the same u must give the same token.",
        ),
        Mistake(
            "u as a place in the list",
            lambda probabilities, u: int(u * len(probabilities)),
            "u was stretched over the ids, so every token is equally likely and the probabilities are not"
            " used: the monkey at the typewriter.",
        ),
    ),
    hints=(
        "Walk along the probabilities, add them up as you go, and stop as soon as the sum exceeds u.",
        "A running sum needs a variable that starts at 0. The id is the place in the list where you stop.",
        "for i, p in enumerate(probabilities.tolist()): total += p; if total > u: return i.",
    ),
)


# ---- 8. writing


def write(probabilities: Tensor, start: int, length: int, generator: Generator) -> list[int]:
    tokens = [start]
    for _ in range(length):
        row = probabilities[tokens[-1]]
        tokens.append(int(torch.multinomial(row, 1, generator=generator)))
    return tokens


def _write_cases(generator: Generator) -> list[tuple]:
    def table(size: int) -> Tensor:
        return torch.randn(size, size, generator=generator).softmax(1)

    circle = torch.eye(4).roll(1, 1)
    return [
        (circle, 0, 6),
        (circle, 3, 1),
        (torch.eye(3)[torch.tensor([2, 0, 1])], 1, 7),
        (table(3), 0, 1500),
        (table(5), 4, 2500),
    ]


def _observe_write(
    answer: Callable, probabilities: Tensor, start: int, length: int
) -> Iterator[tuple[str, Any]]:
    tokens = answer(probabilities, start, length, Generator().manual_seed(3))
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        kind = type(tokens[0] if isinstance(tokens, list) and tokens else tokens).__name__
        raise NotRight(
            f"a list of ints is wanted, and there is {kind} in it: int(...) or .item() makes an int."
        )
    if probabilities.max() == 1:  # each token has one successor: there is nothing to draw
        yield "what it writes", tokens
        return
    yield "how many tokens", len(tokens)
    yield "the first", tokens[0]
    again, once_more, other = (
        answer(probabilities, start, 50, Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    if again != once_more:
        raise NotRight(
            "it draws, but not with `generator`: the same state of it gave two texts. Hand it on:"
            " torch.multinomial(row, 1, generator=generator), or torch.rand(1, generator=generator)."
        )
    if again == other:
        raise NotRight(
            "another state of `generator` gives the same text. Either nothing is drawn (argmax takes the"
            " likeliest each time), or a generator of its own is made inside."
        )
    pairs = count_bigrams(np.array(tokens), len(probabilities))
    for token, row in enumerate(pairs):
        if row.sum():
            building.follows(row, probabilities[token], f"what follows token {token}")


def _write_from_the_start(probabilities: Tensor, start: int, length: int, generator: Generator) -> list[int]:
    row = probabilities[start]
    return [start, *torch.multinomial(row, length, replacement=True, generator=generator).tolist()]


def _write_likeliest(probabilities: Tensor, start: int, length: int, generator: Generator) -> list[int]:
    tokens = [start]
    for _ in range(length):
        tokens.append(int(probabilities[tokens[-1]].argmax()))
    return tokens


def _write_tensors(probabilities: Tensor, start: int, length: int, generator: Generator) -> list:
    tokens: list = [start]
    for _ in range(length):
        tokens.append(torch.multinomial(probabilities[tokens[-1]], 1, generator=generator))
    return tokens


def _write_backwards(probabilities: Tensor, start: int, length: int, generator: Generator) -> list[int]:
    return write(probabilities.T.clamp_min(0), start, length, generator)


WRITE = Exercise(
    task="""Let the table write. `probabilities` is float32 [vocab_size, vocab_size]: row a is the
    distribution of the token after a. Begin with the token `start`, draw the next one from its row, then one
    from the row of what you drew, and so on, `length` times. Return a list of `length` + 1 ints, `start`
    first. Draw with `generator`, a torch.Generator, so that the same seed writes the same text:
    torch.multinomial(row, 1, generator=generator) does it, or torch.rand(1, generator=generator) with your
    `draw_token`.""",
    reference=write,
    cases=_write_cases,
    observe=_observe_write,
    points=3,
    valid=lambda probabilities, start, length: (
        probabilities.dim() == 2
        and len(set(probabilities.shape)) == 1
        and bool(torch.allclose(probabilities.sum(1), torch.ones(len(probabilities)), atol=1e-4))
    ),
    mistakes=(
        Mistake(
            "every token is drawn from the first row",
            _write_from_the_start,
            "All tokens were drawn from the row of `start`. Each draw must use the row of the token drawn"
            " just before it; that is what makes it a bigram model.",
        ),
        Mistake(
            "always the likeliest",
            _write_likeliest,
            "The largest probability was taken each time instead of a draw. Such a text falls into a circle"
            " after a few characters.",
        ),
        Mistake(
            "a tensor in the list",
            _write_tensors,
            "torch.multinomial gives a tensor of shape [1], and that went into the list. As an index it picks"
            " a table of one row where a row is wanted, one dimension more with each draw. .item() or"
            " int(...) makes a number of it.",
        ),
        Mistake(
            "the start is missing",
            lambda probabilities, start, length, generator: write(probabilities, start, length, generator)[
                1:
            ],
            "`start` belongs to the text, as its first token: length + 1 tokens in all.",
        ),
        Mistake(
            "columns instead of rows",
            _write_backwards,
            "The column of the present token was used. It says what comes before it: this writes backwards.",
        ),
        Mistake(
            "a softmax of probabilities",
            lambda probabilities, start, length, generator: write(
                probabilities.softmax(1), start, length, generator
            ),
            "The rows are probabilities already. A softmax of them makes all tokens nearly equally likely:"
            " even one with probability 0 is drawn.",
        ),
    ),
    hints=(
        "Keep a list that begins as [start]; its last item names the row to draw from.",
        "In a loop over range(length): take the row of tokens[-1], draw one token, append it as an int.",
        "tokens.append(torch.multinomial(probabilities[tokens[-1]], 1, generator=generator).item())",
    ),
)


# ---- 9. the bigram as a network


class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        return self.table(idx)

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        for _ in range(length):
            p = self(idx)[:, -1].softmax(-1)
            idx = torch.cat([idx, torch.multinomial(p, 1, generator=generator)], dim=1)
        return idx


BIGRAM_STUB = """class Bigram(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        # your code here: self.table, an nn.Embedding, with small weights
        ...

    def forward(self, idx: Tensor) -> Tensor:
        # int64 [batch, time] -> logits [batch, time, vocab_size]
        # your code here
        ...

    def generate(
        self,
        idx: Tensor,
        length: int,
        generator: Generator | None = None,
    ) -> Tensor:
        # int64 [batch, time] -> int64 [batch, time + length]
        # your code here
        ...
"""


def _bigram_cases(generator: Generator) -> list[tuple]:
    def case(vocab_size: int, batch: int, time: int) -> tuple[int, Tensor]:
        return vocab_size, torch.randint(vocab_size, (batch, time), generator=generator)

    return [case(3, 1, 1), case(3, 1, 4), case(5, 2, 3), case(7, 4, 6), case(65, 2, 8)]


def _observe_bigram(answer: Callable, vocab_size: int, idx: Tensor) -> Iterator[tuple[str, Any]]:
    reference = Bigram(vocab_size)
    with torch.no_grad():
        table = torch.linspace(-2, 2, vocab_size**2).view(vocab_size, vocab_size)
        reference.table.weight.copy_(table.sin() * 3)
    fresh = answer(65)  # 4,225 numbers tell a standard deviation
    module = building.built(answer, reference, vocab_size)
    logits = building.method(module, "forward")(idx)
    yield "the logits", logits
    yield from building.gradients_of(module, building.weighted(logits))
    yield "the shape that generate gives", list(building.method(module, "generate")(idx, 2).shape)
    written = _written_on_a_circle(module, idx)
    yield "generate(idx, 4) where a + 1 follows a", written
    _draws_from_its_table(module)
    if same(logits, reference(idx), 1e-5) and same(written, _written_on_a_circle(reference, idx), 0):
        _begins_small(fresh.table.weight)


def _written_on_a_circle(module: Any, idx: Tensor) -> Tensor:
    """What follows idx where nothing is left to chance: after the last token comes the first."""
    with torch.no_grad():
        kept = module.table.weight.clone()
        module.table.weight.copy_(100 * torch.eye(len(kept)).roll(1, 1))
        written = module.generate(idx, 4, Generator().manual_seed(0))
        module.table.weight.copy_(kept)
    return written


def _draws_from_its_table(module: Any) -> None:
    """Raises NotRight where generate does not draw, by the generator, what the table's first row says."""
    many = torch.zeros(3000, 1, dtype=torch.int64)
    drawn = module.generate(many, 1, Generator().manual_seed(0))[:, -1]
    again = module.generate(many, 1, Generator().manual_seed(0))[:, -1]
    if not torch.equal(drawn, again):
        raise NotRight(
            "generate writes another text each time for the same generator: hand it to torch.multinomial."
        )
    first_row = module.table.weight.detach()[0].softmax(0)
    building.follows(drawn.bincount(minlength=len(first_row)), first_row, "what generate draws after token 0")


def _begins_small(table: Tensor) -> None:
    """Raises NotRight where a new table's numbers are not those of N(0, 0.02²)."""
    if table.std() < 0.01:
        raise NotRight(
            "forward and generate are right, but a new table is nearly zero. N(0, 0.02²) names the variance:"
            " the standard deviation is 0.02, nn.init.normal_(self.table.weight, std=0.02)."
        )
    if table.std() > 0.2:
        raise NotRight(
            "forward and generate are right, but a new table begins with numbers as large as 1 (nn.Embedding"
            " draws them from N(0, 1)). Its first guesses are then wrong with confidence, and the first loss"
            " is above ln V. Make them small: nn.init.normal_(self.table.weight, std=0.02)."
        )


class _LinearBigram(Bigram):
    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx).softmax(-1)


class _LastOnly(Bigram):
    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx)[:, -1]

    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        for _ in range(length):
            p = self(idx).softmax(-1)
            idx = torch.cat([idx, torch.multinomial(p, 1, generator=generator)], dim=1)
        return idx


class _Transposed(Bigram):
    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.table.weight.T)


class _Greedy(Bigram):
    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        for _ in range(length):
            idx = torch.cat([idx, self(idx)[:, -1:].argmax(-1)], dim=1)
        return idx


class _WritesWith(Bigram):
    """Draws from what `following` makes of the last position's logits, [batch, vocab_size]."""

    def following(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        for _ in range(length):
            p = self.following(self(idx)[:, -1])
            idx = torch.cat([idx, torch.multinomial(p, 1, generator=generator)], dim=1)
        return idx


class _SoftmaxOverBatch(_WritesWith):
    def following(self, logits: Tensor) -> Tensor:
        return logits.softmax(0)


class _SoftmaxTwice(_WritesWith):
    def following(self, logits: Tensor) -> Tensor:
        return logits.softmax(1).softmax(1)


class _AllFromOneRow(_WritesWith):
    def following(self, logits: Tensor) -> Tensor:
        return logits[:1].softmax(1).expand(len(logits), -1)


class _OneDrawForAll(Bigram):
    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        for _ in range(length):
            p = self(idx)[0, -1].softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)
            idx = torch.cat([idx, drawn.expand(len(idx), 1)], dim=1)
        return idx


class _FromPositionZero(Bigram):
    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        for _ in range(length):
            p = self(idx)[:, 0].softmax(-1)
            idx = torch.cat([idx, torch.multinomial(p, 1, generator=generator)], dim=1)
        return idx


class _AllFromTheGiven(Bigram):
    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        p = self(idx)[:, -1].softmax(-1)
        return torch.cat([idx, torch.multinomial(p, length, replacement=True, generator=generator)], dim=1)


class _NewTokensOnly(Bigram):
    def generate(self, idx: Tensor, length: int, generator: Generator | None = None) -> Tensor:
        return super().generate(idx, length, generator)[:, idx.size(1) :]


BIGRAM = Exercise(
    task="""Build the same table as a network, so that gradient descent can find it. `Bigram(vocab_size)` is
    an nn.Module with one layer, `self.table`: an nn.Embedding of vocab_size rows of vocab_size numbers, row a
    being the logits of what follows token a. Begin with small numbers, N(0, 0.02²): then all tokens are
    nearly alike and the first loss is $\\ln V$. `forward(idx)` takes int64 [batch, time] and returns the
    logits, float32 [batch, time, vocab_size], at every position. `generate(idx, length, generator)` goes on
    with each row of idx: it draws `length` tokens, one after the other, from the softmax of the last
    position's logits, and returns int64 [batch, time + length], the given tokens first.""",
    reference=Bigram,
    cases=_bigram_cases,
    observe=_observe_bigram,
    stub=BIGRAM_STUB,
    points=3,
    forbids=(BigramModel,),
    mistakes=(
        Mistake(
            "probabilities instead of logits",
            _LinearBigram,
            "forward returns the softmax. The loss takes a softmax itself, so it would be taken twice: all"
            " probabilities come close together and the loss cannot fall far.",
        ),
        Mistake(
            "only the last position",
            _LastOnly,
            "forward returns the logits of the last position. Training needs them at every position: each one"
            " is an example, and only writing looks at the last alone.",
        ),
        Mistake(
            "columns instead of rows",
            _Transposed,
            "The logits come from the columns of the table. Row a belongs to the token a that is present; its"
            " columns are the tokens that may follow.",
        ),
        Mistake(
            "generate always takes the likeliest",
            _Greedy,
            "generate takes the argmax. It has to draw from the softmax: torch.multinomial(p, 1,"
            " generator=generator).",
        ),
        Mistake(
            "generate's softmax runs over the batch",
            _SoftmaxOverBatch,
            "In generate the softmax runs over the rows of the batch, dimension 0. Each row needs a"
            " distribution over the vocabulary of its own, the last dimension: .softmax(-1).",
        ),
        Mistake(
            "generate takes two softmaxes",
            _SoftmaxTwice,
            "In generate a softmax was taken of probabilities. That makes all tokens nearly equally likely.",
        ),
        Mistake(
            "generate draws all rows from the first",
            _AllFromOneRow,
            "generate draws every row's token from the distribution of the batch's first row. Each row goes"
            " on from its own last token.",
        ),
        Mistake(
            "generate draws once for the whole batch",
            _OneDrawForAll,
            "generate draws one token, from the first row's distribution, and gives it to all rows of the"
            " batch. Each row goes on by itself: torch.multinomial draws for all rows of a [batch,"
            " vocab_size] at once.",
        ),
        Mistake(
            "generate looks at position 0",
            _FromPositionZero,
            "In generate the logits were taken at position 0 instead of the last, -1. So every draw comes"
            " from the row of the text's first token, and what was drawn since plays no part.",
        ),
        Mistake(
            "generate draws everything from the last given token",
            _AllFromTheGiven,
            "generate draws all tokens from the row of the last given one. Each draw must come from the row"
            " of the token drawn just before it, so there is a loop, with the model in it.",
        ),
        Mistake(
            "generate leaves out the given tokens",
            _NewTokensOnly,
            "generate returns the new tokens alone. It goes on with what was given: [batch, time + length],"
            " the given tokens first.",
        ),
    ),
    hints=(
        "An nn.Embedding called with idx already gives [batch, time, vocab_size]: forward is one line.",
        "generate is your `write`, for a batch: logits = self(idx)[:, -1], softmax, multinomial, torch.cat.",
        "idx = torch.cat([idx, torch.multinomial(self(idx)[:, -1].softmax(-1), 1, generator=generator)], 1)",
    ),
)


# ---- 10. a training step


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    loss = cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _step_cases(generator: Generator) -> list[tuple]:
    def case(name: str, lr: float, vocab_size: int, steps: int) -> tuple[str, float, list[tuple]]:
        text = torch.randint(vocab_size, (steps, 4, 6), generator=generator)
        return name, lr, [(rows[:, :-1].clone(), rows[:, 1:].clone()) for rows in text]

    return [
        case("SGD", 1.0, 3, 1),
        case("SGD", 1.0, 3, 2),
        case("SGD", 0.5, 5, 4),
        case("AdamW", 0.1, 4, 3),
        case("AdamW", 0.05, 6, 5),
        ("SGD", 1.0, [(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64))]),
    ]  # the last: one pair, thought unlikely, so that the gradient is longer than 1


def _observe_step(
    answer: Callable, optimizer_name: str, lr: float, batches: list[tuple]
) -> Iterator[tuple[str, Any]]:
    vocab_size = 1 + max(int(part.max()) for batch in batches for part in batch)
    model = BigramModel(BigramConfig(vocab_size))
    with torch.no_grad():
        table = torch.linspace(-1, 1, vocab_size**2).view(vocab_size, vocab_size)
        model.table.weight.copy_(4 * table.cos())
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=lr)
    for step, (x, y) in enumerate(batches, 1):
        loss = answer(model, optimizer, x, y)
        if isinstance(loss, Tensor):
            raise NotRight(
                "the loss comes back as a tensor. It holds its whole graph in memory for as long as you keep"
                " it, and a list of losses fills up: .item() makes it a plain number."
            )
        yield f"the loss of step {step}", loss
        yield f"the table after step {step}", model.table.weight.detach().clone()


def _without_zero_grad(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> float:
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def _zeroed_too_late(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> float:
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss.item()


def _stepping(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: Callable[[Tensor], float] = lambda y: 1.0,
    clip: float = math.inf,
) -> Callable[..., float]:
    """A training step with another loss, a scaled gradient, or a clipped one."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        (loss * scale(y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss.item()

    return step


def _loss_afterwards(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> float:
    training_step(model, optimizer, x, y)
    return cross_entropy(model(x), y).item()


TRAINING_STEP = Exercise(
    task="""One step of gradient descent, the heart of every training loop from here to the largest models.
    `model(x)` gives logits [batch, time, vocab_size] for `x`, int64 [batch, time]; `y` holds the targets, of
    the same shape; `optimizer` has the model's parameters. Compute the loss (the mean cross-entropy over all
    positions; F.cross_entropy is welcome, or your `token_loss`), clear the old gradients, compute the new
    ones, and let the optimizer take one step. Return the loss before the step, as a Python float.""",
    reference=training_step,
    cases=_step_cases,
    observe=_observe_step,
    points=3,
    mistakes=(
        Mistake(
            "the gradients are not cleared",
            _without_zero_grad,
            "backward adds to the gradients that are there. Without zero_grad each step repeats all earlier"
            " ones, as if the learning rate grew with every step.",
        ),
        Mistake(
            "the weights do not move",
            _zeroed_too_late,
            "The loss is right, but the model is as before. loss.backward() and optimizer.step() belong here,"
            " in this order, and zero_grad before them: between the two it clears what was just computed.",
        ),
        Mistake(
            "logits and targets are not flattened",
            _stepping(F.cross_entropy),
            "F.cross_entropy takes the dimension after the first for the classes, and in [batch, time,"
            " vocab_size] that is time. Give it a row of logits for each position, .flatten(0, 1), and the"
            " targets in one line, y.flatten().",
        ),
        Mistake(
            "the targets are not flattened",
            _stepping(lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y)),
            "The logits are [batch * time, vocab_size], and the targets still [batch, time]. F.cross_entropy"
            " wants one target for each row of logits: y.flatten().",
        ),
        Mistake(
            "only the last position",
            _stepping(lambda logits, y: cross_entropy(logits[:, -1:], y[:, -1:])),
            "The loss was taken at the last position alone. All positions are examples: for a block of 64"
            " characters this throws 63 of them away.",
        ),
        Mistake(
            "softmax before the loss",
            _stepping(lambda logits, y: cross_entropy(logits.softmax(-1), y)),
            "F.cross_entropy takes logits and does the softmax itself. Given probabilities, it takes a second"
            " softmax of them.",
        ),
        Mistake(
            "the loss after the step",
            _loss_afterwards,
            "This is the loss on the same batch after the step, on what was just learned, and it costs a"
            " second forward pass. The one before the step is the honest one: the model had not seen it.",
        ),
        Mistake(
            "view mixes positions and vocabulary",
            _stepping(lambda logits, y: F.cross_entropy(logits.view(len(y), -1, y.size(1)), y)),
            "view or reshape to [batch, vocab_size, time] keeps the numbers in their order in memory and cuts"
            " them at other places, so a position's logits come from several positions. F.cross_entropy takes"
            " .flatten(0, 1) with y.flatten(), or .transpose(1, 2), which does move the axis.",
        ),
        Mistake(
            "backward runs on a sum",
            _stepping(cross_entropy, scale=Tensor.numel),
            "The returned loss is the mean, but the gradient is that of the sum over all positions: it grows"
            " with the batch, and a learning rate that fits one batch size fails at another.",
        ),
        Mistake(
            "a sum instead of a mean",
            _stepping(lambda logits, y: cross_entropy(logits, y) * y.numel()),
            "The loss is the sum over all positions. It then grows with the batch, and so do the gradients: a"
            " learning rate that fits one batch size fails at another.",
        ),
        Mistake(
            "the gradient is clipped",
            _stepping(cross_entropy, clip=1.0),
            "The gradient was cut to length 1 before the step. Later loops do this; here the step is the"
            " gradient's own.",
        ),
    ),
    hints=(
        "Four statements in this order: the loss, zero_grad, backward, step.",
        "F.cross_entropy wants [positions, vocab_size] and [positions]: flatten(0, 1) and flatten().",
        "loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()); optimizer.zero_grad();"
        " loss.backward(); optimizer.step(); return loss.item().",
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    COUNT_PAIRS,
    ROW_PROBABILITIES,
    DRAW_TOKEN,
    WRITE,
    TEMPERATURE_PROBABILITIES,
    TOKEN_LOSS,
    LOSS_IN_BITS_PER_BYTE,
    INPUTS_AND_TARGETS,
    BIGRAM,
    TRAINING_STEP,
)
