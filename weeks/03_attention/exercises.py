"""The graded exercises of week 3: averages of the past, one query by hand, the causal mask, attention, a head
and many heads as modules, the sliding window.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.models.attention import CausalSelfAttention, attention_weights, causal_mask
from shared.runtime import seed_everything

PROMOTED = (attention_weights, CausalSelfAttention, nn.MultiheadAttention, "scaled_dot_product_attention")
"""What does the whole of it already."""


def _hide(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, float("-inf"))


# ---- 1. averages of the past


def average_past(x: Tensor) -> Tensor:
    weights = causal_mask(x.size(1)).float()
    return weights / weights.sum(dim=1, keepdim=True) @ x


def _average_cases(generator: Generator) -> list[tuple]:
    shapes = (2, 5, 3), (4, 3, 7), (1, 6, 2), (3, 1, 4), (1, 2, 1)
    return [(torch.randn(shape, generator=generator),) for shape in shapes] + [
        (torch.arange(1.0, 7.0).view(1, 6, 1),)
    ]


AVERAGE_PAST = Exercise(
    task="""Before attention chooses what to look at, let every position count alike. `x` is float32 [batch,
    time, channel]. Return a tensor of the same shape and type whose position t is the mean of x at the
    positions 0 to t, its own included. Attention does the same with weights that it chooses itself. A loop is
    allowed; one matrix product is what the rest of the week builds on. Leave `x` as it is.""",
    reference=average_past,
    cases=_average_cases,
    differentiable=True,
    mistakes=(
        Mistake(
            "sums instead of means",
            lambda x: x.cumsum(dim=1),
            "These are sums: late positions have larger values only because more stands before them. The"
            " weights of each position have to sum to 1.",
        ),
        Mistake(
            "divided by the whole length",
            lambda x: x.cumsum(dim=1) / x.size(1),
            "Each sum was divided by `time`. Position t has seen t + 1 values, not all of them, so early"
            " positions come out too small.",
        ),
        Mistake(
            "the present is left out",
            lambda x: torch.stack([x[:, :t].mean(dim=1) for t in range(x.size(1))], dim=1),
            "Position t averages 0 to t - 1. It may and should see itself; besides, position 0 has nothing"
            " else, and the mean of nothing is nan.",
        ),
        Mistake(
            "the average of the future",
            lambda x: torch.stack([x[:, t:].mean(dim=1) for t in range(x.size(1))], dim=1),
            "Position t averages what comes from t on. That is the triangle on the wrong side, and the future"
            " is just what the model has to guess.",
        ),
        Mistake(
            "the average of everything",
            lambda x: x.mean(dim=1, keepdim=True).expand_as(x).clone(),
            "All positions got the mean over the whole sequence, the future included. The limit at the"
            " present position is what makes it causal.",
        ),
        Mistake(
            "divided by the sums of the columns",
            lambda x: causal_mask(x.size(1)).float() / causal_mask(x.size(1)).sum(dim=0) @ x,
            "The columns of the triangle were made to sum to 1, and the rows should. Row t holds the weights"
            " of position t; .sum(dim=1, keepdim=True) adds along the rows.",
        ),
        Mistake(
            "keepdim is missing",
            lambda x: causal_mask(x.size(1)).float() / causal_mask(x.size(1)).sum(dim=1) @ x,
            "The sums of the rows have shape [time], and a division by [time] goes along a row: entry [t, j]"
            " was divided by the sum of row j. keepdim=True makes it [time, 1], one divisor for each row.",
        ),
        Mistake(
            "a softmax of zeros and ones",
            lambda x: causal_mask(x.size(1)).float().softmax(dim=-1) @ x,
            "The triangle of ones and zeros went through a softmax. exp(0) is 1, so the future keeps weight,"
            " and the past gets only 2.7 times as much. Divide each row by its sum; or let the softmax see"
            " minus infinity where nothing may be seen.",
        ),
    ),
    hints=(
        (
            "Row t of a [time, time] matrix of weights says how much position t takes from each position."
            " Which entries are 0, and what do the others sum to?"
        ),
        "torch.ones(time, time).tril() has a 1 where position t may look. Divide each row by its sum.",
        (
            "(weights / weights.sum(dim=1, keepdim=True)) @ x, with weights = torch.ones(time, time).tril():"
            " the product runs over the batch by itself."
        ),
    ),
)


# ---- 2. one query


def attention_row(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return attention_weights(query[None], keys, None)[0] @ values


def _row_cases(generator: Generator) -> list[tuple]:
    def case(time: int, head_dim: int, value_dim: int, scale: float = 1.0) -> tuple[Tensor, ...]:
        query = scale * torch.randn(head_dim, generator=generator)
        keys = scale * torch.randn(time, head_dim, generator=generator)
        return query, keys, torch.randn(time, value_dim, generator=generator)

    query, keys, values = case(5, 16, 3)
    far_up = keys + 1000 * query / query.square().sum()  # every product grows by 1000, the weights stay
    return [
        (torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]), torch.eye(2)),
        case(4, 3, 2),
        case(6, 8, 3),
        case(3, 5, 5),
        case(1, 4, 2),
        case(5, 1, 1),
        case(4, 9, 6, scale=20.0),  # hundreds apart: the largest is more than 88 above their mean
        (query, far_up, values),
    ]


def _mixed(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return (keys @ query * scale).softmax(dim=0) @ values


def _overflowing_row(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    powers = (keys @ query / math.sqrt(len(query))).exp()
    return powers / powers.sum() @ values


def _mean_first(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = keys @ query / math.sqrt(len(query))
    powers = (scores - scores.mean()).exp()
    return powers / powers.sum() @ values


def _clamped_row(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = keys @ query / math.sqrt(len(query))
    return scores.clamp(-80, 80).softmax(dim=0) @ values


def _shares_without_exp(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = keys @ query / math.sqrt(len(query))
    return scores / scores.sum() @ values


ATTENTION_ROW_STUB = """def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    # your code here
    ...
"""

ATTENTION_ROW = Exercise(
    task="""One query looks at all keys. `query` is float32 [head_dim], `keys` float32 [time, head_dim],
    `values` float32 [time, value_dim]; all keys may be seen. The score of key $j$ is
    $s_j = q \\cdot k_j / \\sqrt{d}$ with $d$ = head_dim, the weights are $w = \\mathrm{softmax}(s)$, and the
    result is the weighted mean of the values, $\\sum_j w_j v_j$: float32 [value_dim]. Scores may be above
    100, and more than 100 apart.""",
    reference=attention_row,
    stub=ATTENTION_ROW_STUB,
    tolerance=1e-4,  # a score above 100 is known to about 1e-5 in float32
    cases=_row_cases,
    forbids=PROMOTED,
    differentiable=True,
    mistakes=(
        Mistake(
            "no 1/sqrt(d)",
            lambda query, keys, values: _mixed(query, keys, values, 1.0),
            "The scores were not divided by √head_dim. A product of long vectors is large only because they"
            " are long, and the softmax then gives everything to one key.",
        ),
        Mistake(
            "divided by d, not by its root",
            lambda query, keys, values: _mixed(query, keys, values, 1 / len(query)),
            "Divided by head_dim, not by its root: the weights come out too nearly equal.",
        ),
        Mistake(
            "divided by the root of the time",
            lambda query, keys, values: _mixed(query, keys, values, 1 / math.sqrt(len(keys))),
            "The scale was taken from the number of keys. A score is a sum over head_dim products, however"
            " many keys there are.",
        ),
        Mistake(
            "divided by the root of the value's size",
            lambda query, keys, values: _mixed(query, keys, values, 1 / math.sqrt(values.size(1))),
            "The scale was taken from value_dim. A score is a sum over the head_dim numbers of a query and a"
            " key; how long the values are does not matter.",
        ),
        Mistake(
            "divided after the softmax",
            lambda query, keys, values: _mixed(query, keys, values, 1.0) / math.sqrt(len(query)),
            "The weights, or the result, were divided by √head_dim. The scores have to be divided, before the"
            " softmax: that is what keeps it from giving everything to one key. The weights sum to 1 as they"
            " are.",
        ),
        Mistake(
            "no softmax",
            lambda query, keys, values: keys @ query / math.sqrt(len(query)) @ values,
            "The scores themselves were used as weights. They may be negative and sum to anything; the"
            " softmax makes them shares that sum to 1.",
        ),
        Mistake(
            "shares without exp",
            _shares_without_exp,
            "The scores were divided by their sum. With negative scores that gives negative shares, and it"
            " divides by zero where they cancel; exp makes all of them positive first.",
        ),
        Mistake(
            "only the best match",
            lambda query, keys, values: values[(keys @ query).argmax()],
            "Only the value of the highest score was taken. That choice has no gradient: a head could not"
            " learn to look elsewhere. The softmax is the choice made smooth.",
        ),
        Mistake(
            "the keys are mixed",
            lambda query, keys, values: attention_row(query, keys, keys),
            "The weights were applied to the keys, and `values` was not used. The key says how well a"
            " position matches; the value is what it hands over.",
        ),
        Mistake(
            "exp overflows",
            _overflowing_row,
            "The formula is right, but exp of a score above 88 is infinite in float32, and infinity over"
            " infinity is nan. Take the largest score from all of them first, or use .softmax(dim=0), which"
            " does so.",
        ),
        Mistake(
            "the mean is taken off instead of the largest",
            _mean_first,
            "The mean of the scores was taken off before exp. The weights stay the same, but a score may be"
            " more than 88 above the mean, and exp of that is infinite in float32. Take off the largest: then"
            " nothing is above 0.",
        ),
        Mistake(
            "the scores are clamped",
            _clamped_row,
            "Large scores were cut to a limit, so keys whose scores differ get equal weights. Nothing has to"
            " be cut: only differences count in a softmax, so take the largest score from all of them.",
        ),
    ),
    hints=(
        "Three steps, each a line: scores [time], weights [time], the mixed value [value_dim].",
        "keys @ query gives all dot products at once: [time, head_dim] @ [head_dim] -> [time].",
        "scores = keys @ query / math.sqrt(query.size(0)); then scores.softmax(dim=0) @ values.",
    ),
)


# ---- 3. the mask


def causal_weights(scores: Tensor) -> Tensor:
    return _hide(scores, causal_mask(scores.size(-1))).softmax(dim=-1)


def _scores_cases(generator: Generator) -> list[tuple]:
    def normal(batch: int, time: int) -> Tensor:
        return 2 * torch.randn(batch, time, time, generator=generator)

    future_takes_all = normal(1, 3) - 1000
    future_takes_all[:, :, 2] += 2000  # a softmax over everything leaves the past nothing, not even 1e-45
    plain = [normal(2, 4), normal(3, 6), normal(1, 5), normal(2, 1), normal(5, 2), torch.zeros(1, 3, 3)]
    return [(scores,) for scores in (*plain, future_takes_all, normal(2, 3) + 1000, normal(2, 3) - 1000)]


def _visible(scores: Tensor) -> Tensor:
    return causal_mask(scores.size(-1))


def _inverted(scores: Tensor) -> Tensor:
    return _hide(scores, ~_visible(scores)).softmax(dim=-1)


def _penalised(scores: Tensor) -> Tensor:
    return (scores - 100 * (~_visible(scores)).float()).softmax(dim=-1)


def _rescaled(scores: Tensor) -> Tensor:
    weights = scores.softmax(dim=-1) * _visible(scores)
    return weights / weights.sum(dim=-1, keepdim=True)


def _weights_by_exp(scores: Tensor) -> Tensor:
    powers = scores.exp() * _visible(scores)
    return powers / powers.sum(dim=-1, keepdim=True)


CAUSAL_WEIGHTS = Exercise(
    task="""A position may look at itself and at what came before, never ahead: the token after it is the
    answer. `scores` is float32 [batch, time, time]; entry [b, i, j] says how well query i and key j match.
    Return the attention weights, float32 [batch, time, time]: in row i a softmax over the keys 0 to i, and
    exactly 0 for the later ones. Every row sums to 1. Scores may be large, of either sign, and far apart, in
    the future too: 1000, or -1000. Leave `scores` as it is.""",
    reference=causal_weights,
    cases=_scores_cases,
    valid=lambda scores: scores.dim() == 3 and scores.size(1) == scores.size(2),
    differentiable=True,
    forbids=PROMOTED,
    mistakes=(
        Mistake(
            "mask after the softmax",
            lambda scores: scores.softmax(dim=-1).masked_fill(~_visible(scores), 0.0),
            "The softmax ran over all keys, and the future was set to 0 afterwards. The rows no longer sum to"
            " 1, and what is left still depends on the future's scores through the denominator: the answer"
            " leaks.",
        ),
        Mistake(
            "masked with 0",
            lambda scores: scores.masked_fill(~_visible(scores), 0.0).softmax(dim=-1),
            "The hidden scores were set to 0 before the softmax, and exp(0) is 1: the future still gets"
            " weight. Only minus infinity becomes exactly 0.",
        ),
        Mistake(
            "a penalty that is too small",
            _penalised,
            "A number such as 100 was taken from the hidden scores. A future score that is 2000 above the"
            " others stays the largest then, and gets all the weight. Minus infinity is below every score.",
        ),
        Mistake(
            "the mask is inverted",
            _inverted,
            "Minus infinity was written over the present and the past, and the future was left. The last row"
            " has nothing left at all, and its softmax is nan. The places to hide are those where tril is 0.",
        ),
        Mistake(
            "minus infinity times a triangle",
            lambda scores: (scores + float("-inf") * (~_visible(scores)).float()).softmax(dim=-1),
            "The triangle of zeros and ones was multiplied by minus infinity, and 0 times infinity is nan:"
            " the visible scores are lost. masked_fill writes over the hidden ones and leaves the others as"
            " they are.",
        ),
        Mistake(
            "the mask is upside down",
            lambda scores: _hide(scores, _visible(scores).T).softmax(dim=-1),
            "The past is hidden and the future visible. The row is the query and the column the key, so the"
            " later keys stand to the right of the diagonal.",
        ),
        Mistake(
            "the diagonal is hidden",
            lambda scores: _hide(scores, causal_mask(scores.size(-1)).tril(-1)).softmax(dim=-1),
            "A position cannot see itself. For position 0 nothing is left, a softmax over minus infinities"
            " only, which is nan, and one nan spoils the whole model.",
        ),
        Mistake(
            "the softmax runs over the queries",
            lambda scores: _hide(scores, _visible(scores)).softmax(dim=-2),
            "The columns sum to 1, and the rows should. Each query shares its attention among the keys, and"
            " the keys are the last dimension.",
        ),
        Mistake(
            "no mask",
            lambda scores: scores.softmax(dim=-1),
            "Nothing is hidden. The model can read the token that it is asked to predict: the training loss"
            " becomes very low, and the model cannot write.",
        ),
        Mistake(
            "the softmax covers the future and is rescaled",
            _rescaled,
            "The softmax ran over all keys, then the future was set to 0 and the rows were divided by their"
            " sums. On paper that is the same. In float32 it is not: where a future score is far above the"
            " others it takes all of the first softmax, the past is rounded to 0, and 0/0 is nan. Hide the"
            " future before the softmax.",
        ),
        Mistake(
            "a score of 0 is hidden",
            lambda scores: scores.masked_fill(scores.tril() == 0, float("-inf")).softmax(dim=-1),
            "What is 0 after tril was hidden. A visible score may be 0 too: it gets no weight then, or the"
            " whole row becomes nan. Ask the places, not the values: a triangle of ones says what is hidden.",
        ),
        Mistake(
            "hidden by a number that is not small enough",
            lambda scores: scores.masked_fill(~_visible(scores), -100.0).softmax(dim=-1),
            "The hidden scores were set to a number such as -100. Beside scores of -1000 that is a very good"
            " score, and the future gets all the weight. Minus infinity is below every score.",
        ),
        Mistake(
            "hidden by -1000",
            lambda scores: scores.masked_fill(~_visible(scores), -1000.0).softmax(dim=-1),
            "The hidden scores were set to -1000, and the visible ones may be as low themselves: the future"
            " then gets its share. Minus infinity is below every score.",
        ),
        Mistake(
            "exp overflows",
            _weights_by_exp,
            "The formula is right, but exp of a score above 88 is infinite in float32, and of one below -104"
            " it is 0: the rows become nan. .softmax(dim=-1) takes the largest score away first.",
        ),
    ),
    hints=(
        "Hide the future before the softmax, with a number that the softmax turns into exactly 0.",
        "exp(-inf) is 0. Build a boolean [time, time] that is True above the diagonal, and use masked_fill.",
        (
            "hidden = torch.ones(time, time, dtype=torch.bool).triu(1), then scores.masked_fill(hidden,"
            " float('-inf')).softmax(dim=-1)."
        ),
    ),
)


# ---- 4. attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_weights(q, k, causal_mask(q.size(1))) @ v


def _attention_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, head_dim: int, value_dim: int, scale: float = 1) -> tuple[Tensor, ...]:
        sizes = ((head_dim, scale), (head_dim, scale), (value_dim, 1))
        return tuple(size * torch.randn(batch, time, dim, generator=generator) for dim, size in sizes)

    q, k, v = case(1, 3, 4, 3)
    q[..., 0], k[:, 2, 0] = 40.0, 40.0  # the last key matches every query, 800 above all others
    return [
        case(2, 5, 8, 3),
        case(3, 4, 6, 6),
        case(1, 7, 4, 5),
        case(4, 1, 3, 2),
        case(2, 6, 16, 1),
        case(1, 2, 1, 1),
        case(2, 5, 9, 4, scale=8),  # scores more than 100 apart
        (q, k, v),
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dim: int = -1, masked: bool = True) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    return (_hide(scores, _visible(scores)) if masked else scores).softmax(dim) @ v


def _attend_by(weights: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention whose weights are made by a function of the scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weights(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))) @ v

    return attend


CAUSAL_ATTENTION = Exercise(
    task="""Now for every query at once: $\\mathrm{softmax}\\left(q k^\\top / \\sqrt{d}\\right) v$, with the
    future hidden. `q` and `k` are float32 [batch, time, head_dim], `v` is float32 [batch, time, value_dim],
    and $d$ is head_dim. Return float32 [batch, time, value_dim]: position i is a mean of the values at 0 to
    i, weighted by how well its query matches their keys. value_dim may differ from head_dim, and scores may
    be hundreds apart, in the future too.""",
    reference=causal_attention,
    cases=_attention_cases,
    forbids=PROMOTED,
    differentiable=True,
    valid=lambda q, k, v: q.shape == k.shape and q.shape[:2] == v.shape[:2],
    mistakes=(
        Mistake(
            "no 1/sqrt(d)",
            lambda q, k, v: _attend(q, k, v, 1.0),
            "The scores were not divided by √head_dim. A product of two random vectors grows with √head_dim,"
            " so at real sizes the softmax puts nearly everything on one key, and most queries get next to no"
            " gradient.",
        ),
        Mistake(
            "divided by d, not by its root",
            lambda q, k, v: _attend(q, k, v, 1 / q.size(-1)),
            "Divided by head_dim. The standard deviation of a score is √head_dim, so that is what brings it"
            " to 1; divided by head_dim itself, all weights are nearly equal.",
        ),
        Mistake(
            "divided by the root of the time",
            lambda q, k, v: _attend(q, k, v, 1 / math.sqrt(q.size(1))),
            "The scale was taken from the wrong dimension. A score is a sum over head_dim products, so the"
            " length of the text does not matter.",
        ),
        Mistake(
            "scaled after the softmax",
            lambda q, k, v: _attend(q, k, v, 1.0) / math.sqrt(q.size(-1)),
            "The division came after the softmax. It then only makes the output smaller, and the weights do"
            " not sum to 1; the softmax itself stays as sharp as without a scale.",
        ),
        Mistake(
            "a penalty that is too small",
            _attend_by(_penalised),
            "A number such as 100 was taken from the hidden scores. A future score that is hundreds above the"
            " others stays the largest then, and gets all the weight. Minus infinity is below every score.",
        ),
        Mistake(
            "the mask is inverted",
            _attend_by(_inverted),
            "The present and the past are hidden, and the future was left. The last position has nothing left"
            " at all, and its softmax is nan. The places to hide are those where tril is 0.",
        ),
        Mistake(
            "the mask is upside down",
            _attend_by(lambda scores: _hide(scores, _visible(scores).T).softmax(dim=-1)),
            "The past is hidden and the future visible. The row is the query and the column the key, so the"
            " later keys stand to the right of the diagonal.",
        ),
        Mistake(
            "the future is visible",
            lambda q, k, v: _attend(q, k, v, 1 / math.sqrt(q.size(-1)), masked=False),
            "The mask is missing. Each position mixes in the values of later ones, so the model can read the"
            " answer while it learns, and has nothing to read when it writes.",
        ),
        Mistake(
            "the softmax runs over the queries",
            lambda q, k, v: _attend(q, k, v, 1 / math.sqrt(q.size(-1)), dim=-2),
            "The softmax ran over the queries. For each query the weights of the keys must sum to 1, and the"
            " keys are the last dimension of the scores.",
        ),
        Mistake(
            "divided by the root of the values' size",
            lambda q, k, v: _attend(q, k, v, 1 / math.sqrt(v.size(-1))),
            "The scale was taken from `v`. A score is a sum over the channels of queries and keys; how many a"
            " value has does not matter to it.",
        ),
        Mistake(
            "queries and keys exchanged",
            lambda q, k, v: _attend(k, q, v, 1 / math.sqrt(q.size(-1))),
            "The scores are k qᵀ. Row i has to be the scores of query i for all keys, q kᵀ; transposed, each"
            " position looks with its key and is found by its query.",
        ),
        Mistake(
            "mask after the softmax",
            _attend_by(lambda scores: scores.softmax(dim=-1) * _visible(scores)),
            "The softmax ran over all keys, and the future was set to 0 afterwards. The weights of a row no"
            " longer sum to 1, and depend on the future through the denominator.",
        ),
        Mistake(
            "the softmax covers the future and is rescaled",
            _attend_by(_rescaled),
            "The softmax ran over all keys, then the rows were divided by what the past had got. Where a"
            " future score is far above the others the past has got 0, and 0/0 is nan. Hide the future before"
            " the softmax.",
        ),
        Mistake(
            "no softmax",
            _attend_by(lambda scores: scores.masked_fill(~_visible(scores), 0.0)),
            "The scores were used as weights as they are: negative ones too, and with any sum. The softmax"
            " makes them shares.",
        ),
    ),
    hints=(
        (
            "Four steps: scores, mask, softmax, mix the values. You wrote the two in the middle in"
            " causal_weights."
        ),
        (
            "The scores are q @ k.transpose(-2, -1), [batch, time, time], divided by the square root of"
            " q.size(-1)."
        ),
        (
            "Fill the scores above the diagonal with -inf, take the softmax over dim=-1, and multiply:"
            " weights @ v."
        ),
    ),
)


# ---- 5. a head


class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return causal_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))


HEAD_STUB = """class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        # your code here: self.q_proj, self.k_proj, self.v_proj
        ...

    def forward(self, x: Tensor) -> Tensor:
        # [batch, time, n_embd] -> [batch, time, head_dim]
        # your code here
        ...
"""


def _sized_cases(generator: Generator, sizes: Sequence[tuple[int, int, int, int]]) -> list[tuple]:
    """What a module is made with, n_embd and one more size, and an input [batch, time, n_embd] for it.

    sizes: (batch, time, n_embd, the other size). The last ones come again with numbers that are 12 times as
    large, so that scores are more than 100 apart.
    """
    cases: list[tuple] = [
        (n_embd, size, torch.randn(batch, time, n_embd, generator=generator))
        for batch, time, n_embd, size in sizes
    ]
    n_embd, size, x = cases[-1]
    return [*cases, (n_embd, size, 12 * torch.randn(x.shape, generator=generator))]


def _head_cases(generator: Generator) -> list[tuple]:
    sizes = (1, 3, 3, 2), (2, 5, 12, 4), (3, 4, 6, 3), (4, 1, 4, 2), (2, 3, 5, 5), (1, 6, 5, 1), (2, 6, 8, 4)
    return _sized_cases(generator, sizes)


def _weights_that_matter(module: nn.Module) -> None:
    """Weights by which no two channels are alike; the queries and keys are large enough for clear choices."""
    seed_everything(1)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            size = 1.8 if name.startswith(("q_proj", "k_proj")) else 1.0
            weight.copy_(size * torch.randn_like(weight) / math.sqrt(weight.size(1)))


def _observe_attention(module: nn.Module, x: Tensor) -> Iterator[tuple[str, Any]]:
    """What a causal module does: the output, gradients, causality, texts of a batch apart."""
    output = building.method(module, "forward")(x)
    yield "the output", output
    yield from building.gradients_of(module, building.weighted(output))
    source = x.clone().requires_grad_()
    yield "the gradient of x", torch.autograd.grad(building.weighted(module(source)), source)[0]
    half = (x.size(1) + 1) // 2
    with torch.no_grad():
        beginning, again = module(x[:, :half]), module(x)
        yield "the output for the first half of the text", beginning
        yield "the output for a longer text", module(torch.cat([x, x.flip(1)], dim=1))
        yield "the output for the last text alone", module(x[-1:])
    if not torch.equal(output, again):
        raise NotRight("two calls with the same x give two results: there should be nothing random in it.")
    if not torch.allclose(output[:, :half], beginning, atol=1e-4):
        raise NotRight("what stands in the second half changes the output of the first: the future leaks.")


def _observe_head(answer: Callable, n_embd: int, head_dim: int, x: Tensor) -> Iterator[tuple[str, Any]]:
    reference = Head(n_embd, head_dim)
    _weights_that_matter(reference)
    yield from _observe_attention(building.built(answer, reference, n_embd, head_dim), x)


class _WrongHead(Head):
    """A head with one of its parts wrong: `attend` makes the output of q, k, v and x."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), x)


class _HeadWithoutScale(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return _attend(q, k, v, 1.0)


class _HeadOfWholeWidth(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return _attend(q, k, v, 1 / math.sqrt(x.size(-1)))


class _HeadWithoutMask(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return _attend(q, k, v, 1 / math.sqrt(q.size(-1)), masked=False)


class _HeadOfQueries(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return _attend(q, k, v, 1 / math.sqrt(q.size(-1)), dim=-2)


class _HeadRescaled(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return _attend_by(_rescaled)(q, k, v)


class _HeadMasksLate(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return _attend_by(lambda scores: scores.softmax(dim=-1) * _visible(scores))(q, k, v)


class _HeadMixesKeys(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return causal_attention(q, k, k) + 0 * v


class _HeadExchanged(_WrongHead):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return causal_attention(k, q, v)


HEAD = Exercise(
    task="""Build a head: attention whose queries, keys and values are learned. `Head(n_embd, head_dim)` is an
    nn.Module with three layers, `self.q_proj`, `self.k_proj` and `self.v_proj`, each an nn.Linear from n_embd
    to head_dim without a bias. `forward(x)` takes float32 [batch, time, n_embd], of any length, and returns
    float32 [batch, time, head_dim]: causal attention of the projections of x, scaled by $1/\\sqrt{d}$ with
    $d$ = head_dim. Your `causal_attention` may do the work.""",
    reference=Head,
    cases=_head_cases,
    observe=_observe_head,
    valid=lambda n_embd, head_dim, x: x.size(-1) == n_embd and x.dim() == 3,
    stub=HEAD_STUB,
    points=3,
    forbids=PROMOTED,
    mistakes=(
        Mistake(
            "no 1/sqrt(d)",
            _HeadWithoutScale,
            "The scores are not divided by √head_dim, so at real sizes the softmax puts nearly everything on"
            " one key, and most queries get next to no gradient.",
        ),
        Mistake(
            "scaled by the whole width",
            _HeadOfWholeWidth,
            "The scores are divided by √n_embd. A score is a sum over head_dim products.",
        ),
        Mistake(
            "the future is visible",
            _HeadWithoutMask,
            "There is no causal mask: each position mixes in the values of later ones.",
        ),
        Mistake(
            "mask after the softmax",
            _HeadMasksLate,
            "The future was set to 0 after the softmax. The weights of a row no longer sum to 1, and still"
            " depend on the future.",
        ),
        Mistake(
            "the softmax covers the future and is rescaled",
            _HeadRescaled,
            "The softmax ran over all keys and the past was rescaled afterwards, which is 0/0 where the"
            " future takes all. Hide the future before the softmax.",
        ),
        Mistake(
            "the softmax runs over the queries",
            _HeadOfQueries,
            "The softmax ran over the queries. The weights of the keys have to sum to 1 for each query.",
        ),
        Mistake(
            "the keys are mixed",
            _HeadMixesKeys,
            "The weights were applied to the keys. What a position hands over is its value, v_proj(x).",
        ),
        Mistake(
            "queries and keys exchanged",
            _HeadExchanged,
            "q_proj makes the keys here, and k_proj the queries. Alone it would learn as well, but weights"
            " from elsewhere do not fit: row i of the scores belongs to query i.",
        ),
    ),
    hints=(
        "Three nn.Linear layers in `__init__`; in forward three products, and then your causal_attention.",
        "self.q_proj = nn.Linear(n_embd, head_dim, bias=False), and two more like it. Do not make a mask in"
        " `__init__`: the length is known only in forward.",
        "return causal_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)).",
    ),
)


# ---- 6. splitting the channels


def split_heads(x: Tensor, n_head: int) -> Tensor:
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def _heads_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, n_head: int, head_dim: int) -> tuple[Tensor, int]:
        return torch.randn(batch, time, n_head * head_dim, generator=generator), n_head

    return [
        case(2, 5, 3, 4),
        case(3, 2, 4, 2),
        case(1, 6, 2, 3),
        case(4, 1, 2, 5),
        case(2, 3, 1, 4),
        case(2, 4, 4, 1),
        case(2, 3, 3, 3),
        (torch.arange(24.0).view(1, 4, 6), 2),
    ]


def _split_after_joining(x: Tensor, n_head: int) -> Tensor:
    joined = torch.cat(x.chunk(n_head, dim=-1), dim=0)
    return joined.view(x.size(0), n_head, x.size(1), -1)


SPLIT_HEADS = Exercise(
    task="""Several heads look for several things at once, each in its own share of the channels. `x` is
    float32 [batch, time, n_embd], and n_embd is n_head * head_dim. Return float32 [batch, n_head, time,
    head_dim]: the first head has the first head_dim channels of every position, the second the next ones, and
    so on. With the heads beside the batch, one matrix product serves them all.""",
    reference=split_heads,
    cases=_heads_cases,
    differentiable=True,
    valid=lambda x, n_head: n_head > 0 and x.size(-1) % n_head == 0,
    mistakes=(
        Mistake(
            "view without transpose",
            lambda x, n_head: x.reshape(x.size(0), n_head, x.size(1), -1),
            "The shape is right and the contents are not: a view reads the numbers in memory order, so a head"
            " got pieces of different positions. Cut the channels first, then exchange two dimensions.",
        ),
        Mistake(
            "the transpose is missing",
            lambda x, n_head: x.unflatten(-1, (n_head, -1)),
            "The shape is [batch, time, n_head, head_dim]. A product of queries and keys works on the last"
            " two dimensions, so here the heads of one position would attend to each other. Time has to stand"
            " there.",
        ),
        Mistake(
            "channels dealt out in turn",
            lambda x, n_head: x.unflatten(-1, (-1, n_head)).movedim(-1, 1),
            "The first head got channels 0, n_head, 2 n_head and so on. Each head should have a block of"
            " neighbours, as in every published model; with another order no weights from elsewhere fit.",
        ),
        Mistake(
            "heads before the batch",
            lambda x, n_head: torch.stack(x.chunk(n_head, dim=-1)),
            "The contents are right, but the heads stand in front of the batch. The shape should be [batch,"
            " n_head, time, head_dim]: whatever comes next takes dimension 0 for the batch.",
        ),
        Mistake(
            "texts and heads mixed",
            _split_after_joining,
            "The heads were joined along the batch, and a view then named the axes anew. With more than one"
            " text in the batch, a text gets heads of its neighbours: a view does not exchange dimensions.",
        ),
    ),
    hints=(
        "Two steps: the last dimension is cut in two, then two dimensions change places.",
        (
            "x.view(batch, time, n_head, head_dim) cuts the channels. Which two dimensions are now in the"
            " wrong order?"
        ),
        "x.view(batch, time, n_head, -1).transpose(1, 2).",
    ),
)


# ---- 7. all of it together


def multi_head_attention(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, o_weight: Tensor, n_head: int
) -> Tensor:
    q, k, v = (split_heads(x @ weight.T, n_head) for weight in (q_weight, k_weight, v_weight))
    out = attention_weights(q, k, causal_mask(x.size(1))) @ v  # [batch, n_head, time, head_dim]
    return out.transpose(1, 2).flatten(-2) @ o_weight.T


def _multi_head_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, n_head: int, head_dim: int) -> tuple:
        n_embd = n_head * head_dim
        weights = [torch.randn(n_embd, n_embd, generator=generator) / math.sqrt(n_embd) for _ in range(4)]
        return torch.randn(batch, time, n_embd, generator=generator), *weights, n_head

    small = (1, 2, 2, 1), (1, 2, 2, 2), (1, 3, 2, 2)  # a mistake is shown on the smallest that tells it
    sizes = *small, (2, 5, 3, 4), (3, 4, 2, 3), (1, 6, 4, 2), (4, 1, 2, 2), (2, 3, 1, 5), (2, 4, 4, 1)
    x, *weights, n_head = case(2, 5, 2, 4)
    return [*(case(*size) for size in sizes), (12 * x, *weights, n_head)]  # scores more than 100 apart


def _is_layer(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, o_weight: Tensor, n_head: int
) -> bool:
    square = [x.size(-1)] * 2
    weights = q_weight, k_weight, v_weight, o_weight
    return all(list(w.shape) == square for w in weights) and n_head > 0 and x.size(-1) % n_head == 0


def _dealt_out(x: Tensor, n_head: int) -> Tensor:
    """Heads of every n_head-th channel: [batch, n_head, time, head_dim]."""
    return x.unflatten(-1, (-1, n_head)).movedim(-1, 1)


def _dealt_heads(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, o_weight: Tensor, n_head: int
) -> Tensor:
    q, k, v = (_dealt_out(x @ weight.T, n_head) for weight in (q_weight, k_weight, v_weight))
    out = _attend(q, k, v, 1 / math.sqrt(q.size(-1)))
    return out.movedim(1, -1).flatten(-2) @ o_weight.T


def _wrong_heads(
    *,
    transposed: str = "qkvo",
    scale_by: str = "head_dim",
    merged: bool = True,
    heads: bool = True,
    project: bool = True,
    masked: bool = True,
    interleaved: bool = False,
) -> Callable[..., Tensor]:
    """Multi-head attention with one of its parts wrong. transposed: the weights that are, as they should."""

    def attend(
        x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, o_weight: Tensor, n_head: int
    ) -> Tensor:
        n_head = n_head if heads else 1
        weights = {"q": q_weight, "k": k_weight, "v": v_weight, "o": o_weight}
        used = {name: weight.T if name in transposed else weight for name, weight in weights.items()}
        q, k, v = (split_heads(x @ used[name], n_head) for name in "qkv")
        size = q.size(-1) if scale_by == "head_dim" else x.size(-1)
        out = _attend(q, k, v, 1 / math.sqrt(size), masked=masked)
        if interleaved:
            out = out.movedim(1, -1).flatten(-2)
        else:
            out = out.transpose(1, 2).flatten(-2) if merged else out.reshape(x.shape)
        return out @ used["o"] if project else out

    return attend


UNTRANSPOSED = {
    "weights not transposed": "",
    "o_weight not transposed": "qkv",
    "the weights of queries, keys and values not transposed": "o",
    "q_weight not transposed": "kvo",
    "k_weight not transposed": "qvo",
    "v_weight not transposed": "qko",
}
"""Mistakes, with the weights that are transposed in each."""


MULTI_HEAD_STUB = """def multi_head_attention(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    o_weight: torch.Tensor,
    n_head: int,
) -> torch.Tensor:
    # your code here
    ...
"""

MULTI_HEAD_ATTENTION = Exercise(
    task="""Put the layer together. `x` is float32 [batch, time, n_embd]; the four weights are float32
    [n_embd, n_embd] in nn.Linear's layout, [outputs, inputs], without biases. Make queries, keys and values,
    split each into `n_head` heads of neighbouring channels, attend causally in every head with scale
    $1/\\sqrt{d}$, $d$ = head_dim, put the heads side by side again in their order, and apply `o_weight`.
    Return float32 [batch, time, n_embd].""",
    reference=multi_head_attention,
    stub=MULTI_HEAD_STUB,
    cases=_multi_head_cases,
    forbids=PROMOTED,
    differentiable=True,
    valid=_is_layer,
    mistakes=(
        *(
            Mistake(
                name,
                _wrong_heads(transposed=right),
                "nn.Linear keeps its weight as [outputs, inputs] and computes x @ weight.T. The matrices here"
                " are square, so x @ weight runs without an error and gives something else.",
            )
            for name, right in UNTRANSPOSED.items()
        ),
        Mistake(
            "scaled by the whole width",
            _wrong_heads(scale_by="n_embd"),
            "The scores were divided by √n_embd. Each head's score is a sum over head_dim products only, so"
            " that is the size to take.",
        ),
        Mistake(
            "heads merged without a transpose",
            _wrong_heads(merged=False),
            "The heads were put together by a reshape alone. The result has heads before time, so this mixes"
            " positions, and even lets a position see later ones. Bring time back in front of the heads"
            " first.",
        ),
        Mistake(
            "one big head",
            _wrong_heads(heads=False),
            "`n_head` was not used: all channels attend together with one set of weights. A single head can"
            " look at one place only; several are the point.",
        ),
        Mistake(
            "no output projection",
            _wrong_heads(project=False),
            "`o_weight` was not applied. Without it the heads only lie side by side; this matrix is where"
            " what they found is combined.",
        ),
        Mistake(
            "the future is visible",
            _wrong_heads(masked=False),
            "There is no causal mask. The heads do not change that rule: each hides the later keys.",
        ),
        Mistake(
            "channels dealt out in turn",
            _dealt_heads,
            "Each head got every n_head-th channel, and the merge put them back the same way. The result has"
            " the right shape, but a head is a block of neighbouring channels: published weights do not fit.",
        ),
    ),
    hints=(
        (
            "You have all the pieces: three products with weights, split_heads, causal_attention for each"
            " head, and split_heads in reverse."
        ),
        (
            "x @ weight.T for q, k, v; view and transpose(1, 2) to [batch, n_head, time, head_dim]; scores"
            " with q.size(-1) under the root; then undo the split."
        ),
        (
            "out.transpose(1, 2).reshape(batch, time, n_embd) @ o_weight.T, where out = softmax(masked scores"
            " / √head_dim) @ v is [batch, n_head, time, head_dim]."
        ),
    ),
)


# ---- 8. the layer as a module


class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.n_head) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attention_weights(q, k, causal_mask(x.size(1), device=x.device)) @ v
        return self.o_proj(out.transpose(1, 2).flatten(-2))


MULTI_HEAD_MODULE_STUB = """class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        # your code here: self.q_proj, self.k_proj, self.v_proj, self.o_proj
        ...

    def forward(self, x: Tensor) -> Tensor:
        # [batch, time, n_embd] -> [batch, time, n_embd]
        # your code here
        ...
"""


def _layer_cases(generator: Generator) -> list[tuple]:
    sizes = (1, 3, 4, 2), (2, 5, 12, 3), (3, 4, 6, 2), (4, 1, 4, 2), (2, 3, 5, 1), (1, 6, 5, 5), (2, 6, 8, 2)
    return _sized_cases(generator, sizes)


def _observe_layer(answer: Callable, n_embd: int, n_head: int, x: Tensor) -> Iterator[tuple[str, Any]]:
    reference = MultiHeadAttention(n_embd, n_head)
    _weights_that_matter(reference)
    yield from _observe_attention(building.built(answer, reference, n_embd, n_head), x)


def _wrong_layer(**wrong: Any) -> type[MultiHeadAttention]:
    """The layer with one of its parts wrong, as `_wrong_heads` has it."""

    class Wrong(MultiHeadAttention):
        def forward(self, x: Tensor) -> Tensor:
            weights = [proj.weight for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)]
            return _wrong_heads(**wrong)(x, *weights, self.n_head)

    return Wrong


class _DealtLayer(MultiHeadAttention):
    def forward(self, x: Tensor) -> Tensor:
        weights = [proj.weight for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)]
        return _dealt_heads(x, *weights, self.n_head)


class _LayerWithResidual(MultiHeadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class _ProjectsFirst(MultiHeadAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.n_head) for proj in (self.q_proj, self.k_proj, self.v_proj))
        v = split_heads(self.o_proj(v.transpose(1, 2).flatten(-2)), self.n_head)
        return (attention_weights(q, k, causal_mask(x.size(1))) @ v).transpose(1, 2).flatten(-2)


MULTI_HEAD_MODULE = Exercise(
    task="""Make it a module, the layer that every model from here to week 12 is built of.
    `MultiHeadAttention(n_embd, n_head)` is an nn.Module with four layers, `self.q_proj`, `self.k_proj`,
    `self.v_proj` and `self.o_proj`, each an nn.Linear from n_embd to n_embd without a bias. `forward(x)`
    takes float32 [batch, time, n_embd], of any length, and returns float32 [batch, time, n_embd]: the
    projections of x split into n_head heads, causal attention in each, the heads side by side again, and
    o_proj of that. These are the names and shapes of the course's own layer, so its weights fit into
    yours.""",
    reference=MultiHeadAttention,
    cases=_layer_cases,
    observe=_observe_layer,
    valid=lambda n_embd, n_head, x: n_embd % n_head == 0 and x.size(-1) == n_embd and x.dim() == 3,
    stub=MULTI_HEAD_MODULE_STUB,
    points=3,
    forbids=PROMOTED,
    mistakes=(
        Mistake(
            "weights not transposed",
            _wrong_layer(transposed=""),
            "An nn.Linear keeps its weight as [outputs, inputs] and computes x @ weight.T. The matrices here"
            " are square, so x @ weight runs without an error; self.q_proj(x) does it right.",
        ),
        Mistake(
            "o_proj not transposed",
            _wrong_layer(transposed="qkv"),
            "The weight of o_proj was used without .T. It is square, so nothing stops, and the result is"
            " another; call the layer, self.o_proj(...).",
        ),
        Mistake(
            "scaled by the whole width",
            _wrong_layer(scale_by="n_embd"),
            "The scores were divided by √n_embd. Each head's score is a sum over head_dim = n_embd / n_head"
            " products.",
        ),
        Mistake(
            "heads merged without a transpose",
            _wrong_layer(merged=False),
            "The heads were put together by a reshape alone. Heads stand before time there, so this mixes"
            " positions, and lets a position see later ones. transpose(1, 2) comes first.",
        ),
        Mistake(
            "one big head",
            _wrong_layer(heads=False),
            "`n_head` is not used: all channels attend together, with one set of weights for each position.",
        ),
        Mistake(
            "no output projection",
            _wrong_layer(project=False),
            "o_proj is not applied. The heads only lie side by side, and no channel of the result knows what"
            " another head has found.",
        ),
        Mistake(
            "the future is visible",
            _wrong_layer(masked=False),
            "There is no causal mask: each head has to hide the later keys.",
        ),
        Mistake(
            "channels dealt out in turn",
            _DealtLayer,
            "Each head got every n_head-th channel. A head is a block of neighbouring channels; otherwise the"
            " course's weights, and every published model's, mean something else in your layer.",
        ),
        Mistake(
            "the input is added",
            _LayerWithResidual,
            "x was added to the result. That is the residual connection, and it belongs to the model that"
            " uses the layer: it would be added twice.",
        ),
        Mistake(
            "o_proj before the mixing",
            _ProjectsFirst,
            "o_proj was applied to the values before they were mixed. It has to come last: it combines what"
            " different heads found at different places.",
        ),
    ),
    hints=(
        "Your `multi_head_attention` has the computation; here the four weights live in nn.Linear layers.",
        "q, k and v are split_heads(self.q_proj(x), self.n_head) and so on. For four dimensions the mask and"
        " the softmax are the same: only the last two count.",
        "self.o_proj(out.transpose(1, 2).flatten(-2)), with out = weights @ v, [batch, n_head, time,"
        " head_dim].",
    ),
)


# ---- 9. the sliding window


def sliding_window_mask(time: int, window: int) -> Tensor:
    return causal_mask(time, window=window)


def _window_cases(generator: Generator) -> list[tuple]:
    drawn = random_int(generator, 8, 12), random_int(generator, 3, 6)
    return [(4, 2), (4, 3), (3, 1), (3, 3), (1, 1), (2, 7), (5, 4), (7, 3), drawn]  # the first is shown


def _wrapped_window(time: int, window: int) -> Tensor:
    mask = torch.zeros(time, time, dtype=torch.bool)
    for i in range(time):
        mask[i, i - window + 1 : i + 1] = True
    return mask


def _distance(time: int) -> Tensor:
    """How far key j lies behind query i: int64 [time, time], negative for the future."""
    return torch.arange(time)[:, None] - torch.arange(time)


SLIDING_WINDOW_MASK = Exercise(
    task="""Attention over a long text is costly, and most of what matters is near. Return a bool tensor
    [time, time] that is True where query i (row) may look at key j (column): at its own position and before,
    and only at the last `window` positions, its own counted. With window 1 a position sees only itself; with
    a window of `time` or more the mask is the ordinary causal one.""",
    reference=sliding_window_mask,
    cases=_window_cases,
    forbids=(causal_mask,),
    valid=lambda time, window: time > 0 and window > 0,
    mistakes=(
        Mistake(
            "one position too many",
            lambda time, window: causal_mask(time, window=window + 1),
            "Each position sees `window` earlier ones besides itself. The present one is counted; a model"
            " trained with one window and run with another reads keys that it has never learned to use.",
        ),
        Mistake(
            "the window looks both ways",
            lambda time, window: _distance(time).abs() < window,
            "The distance is limited on both sides, so a position sees later ones too. A window must be"
            " causal as well: no key after the query.",
        ),
        Mistake(
            "True means hidden",
            lambda time, window: ~causal_mask(time, window=window),
            "The mask is inverted. Here, as in F.scaled_dot_product_attention, True means that the query may"
            " look.",
        ),
        Mistake(
            "blocks instead of a sliding window",
            lambda time, window: (
                causal_mask(time) & (torch.arange(time)[:, None] // window == torch.arange(time) // window)
            ),
            "The text was cut into blocks, and a position sees only its own block. The first position of a"
            " block then sees nothing but itself; the window should move along with the query.",
        ),
        Mistake(
            "rows and columns exchanged",
            lambda time, window: causal_mask(time, window=window).T.contiguous(),
            "The mask is transposed: a position sees itself and the next ones, which is the future. The row"
            " is the query, the column the key.",
        ),
        Mistake(
            "no window",
            lambda time, window: causal_mask(time),
            "This is the ordinary causal mask: `window` was not used, and late positions see the whole past.",
        ),
        Mistake(
            "the slice begins before the text",
            _wrapped_window,
            "Near the start i - window + 1 is negative, and a slice counts negative numbers from the end: the"
            " first rows stay empty, or get places at the end. max(0, ...) keeps it inside.",
        ),
    ),
    hints=(
        "Two conditions on the distance i - j between query and key, and both must hold.",
        (
            "The key is not later than the query: i - j is at least 0. The key is near enough: i - j is below"
            " window. torch.arange(time)[:, None] is i as a column."
        ),
        (
            "distance = torch.arange(time)[:, None] - torch.arange(time); return (distance >= 0) & (distance"
            " < window)."
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    AVERAGE_PAST,
    ATTENTION_ROW,
    CAUSAL_WEIGHTS,
    CAUSAL_ATTENTION,
    HEAD,
    SPLIT_HEADS,
    MULTI_HEAD_ATTENTION,
    MULTI_HEAD_MODULE,
    SLIDING_WINDOW_MASK,
)
