"""The graded exercises of week 1: counting, probabilities, the loss and its units, targets, temperature."""

import math

import numpy as np
import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake
from shared.data.corpus import TokenDataset
from shared.evaluation import bits_per_byte, cross_entropy
from shared.models.bigram import bigram_probabilities, count_bigrams


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
    mistakes=(
        Mistake(
            "columns instead of rows",
            lambda counts, smoothing: (counts + smoothing) / (counts + smoothing).sum(dim=0, keepdim=True),
            "Each column sums to 1, and each row should. A row belongs to the token we have; the distribution"
            " runs over the tokens that may follow it.",
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
    ]


def _picked(values: Tensor, targets: Tensor) -> Tensor:
    """The value of each target: [batch, time]."""
    return values.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _overflowing_loss(logits: Tensor, targets: Tensor) -> Tensor:
    powers = logits.exp()
    return -_picked(powers / powers.sum(-1, keepdim=True), targets).log().mean()


TOKEN_LOSS = Exercise(
    task="""Write the cross-entropy by hand, without F.cross_entropy: it is the number that every later week
    makes smaller. `logits` is float32 [batch, time, vocab_size], `targets` int64 [batch, time] holds the
    token that really came. Return the mean over all batch * time positions of -ln(probability of the target),
    a float32 tensor of shape [], in nats. The probabilities are the softmax of the logits over the
    vocabulary. Logits may be above 100.""",
    reference=token_loss,
    cases=_token_loss_cases,
    tolerance=1e-4,
    mistakes=(
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
        case(50, 65, 3, 8),
        case(30, 200, 5, 4),
        case(20, 10, 1, 6),
        case(20, 90, 4, 1),
        (np.arange(10, dtype=np.uint16), [0, 5], 4),  # the first and the last that fits
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


INPUTS_AND_TARGETS = Exercise(
    task="""A language model gets its labels for free: the target of a position is the token that comes next.
    `tokens` is a uint16 array, `starts` a list of places in it. Cut a window of `block_size` tokens from each
    start, and return (x, y), both int64 [batch, block_size]: x holds the windows, and y[i, t] is the token
    that follows x[i, t] in the text. Every start leaves room for the last target.""",
    reference=inputs_and_targets,
    cases=_inputs_cases,
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


EXERCISES: tuple[Exercise, ...] = (
    COUNT_PAIRS,
    ROW_PROBABILITIES,
    TOKEN_LOSS,
    LOSS_IN_BITS_PER_BYTE,
    INPUTS_AND_TARGETS,
    TEMPERATURE_PROBABILITIES,
)
