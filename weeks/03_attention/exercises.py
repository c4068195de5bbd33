"""The graded exercises of week 3: averages of the past, the causal mask, attention, heads, the sliding
window, all of it together.
"""

import math

import torch
from torch import Generator, Tensor

from shared.course.exercise import Exercise, Mistake
from shared.models.attention import attention_weights, causal_mask


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
    allowed; a matrix product with a lower triangular matrix is what the rest of the week builds on.""",
    reference=average_past,
    cases=_average_cases,
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


# ---- 2. the mask


def causal_weights(scores: Tensor) -> Tensor:
    return _hide(scores, causal_mask(scores.size(-1))).softmax(dim=-1)


def _scores_cases(generator: Generator) -> list[tuple]:
    shapes = (2, 4, 4), (3, 6, 6), (1, 5, 5), (2, 1, 1), (5, 2, 2)
    return [(2 * torch.randn(shape, generator=generator),) for shape in shapes] + [(torch.zeros(1, 3, 3),)]


def _visible(scores: Tensor) -> Tensor:
    return causal_mask(scores.size(-1))


CAUSAL_WEIGHTS = Exercise(
    task="""A position may look at itself and at what came before, never ahead: the token after it is the
    answer. `scores` is float32 [batch, time, time]; entry [b, i, j] says how well query i and key j match.
    Return the attention weights, float32 [batch, time, time]: in row i a softmax over the keys 0 to i, and
    exactly 0 for the later ones. Every row sums to 1. Leave `scores` as it is.""",
    reference=causal_weights,
    cases=_scores_cases,
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


# ---- 3. attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_weights(q, k, causal_mask(q.size(1))) @ v


def _attention_cases(generator: Generator) -> list[tuple]:
    def case(batch: int, time: int, head_dim: int, value_dim: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(batch, time, size, generator=generator) for size in (head_dim, head_dim, value_dim)
        )

    return [
        case(2, 5, 8, 3),
        case(3, 4, 6, 6),
        case(1, 7, 4, 5),
        case(4, 1, 3, 2),
        case(2, 6, 16, 1),
        case(1, 2, 1, 1),
    ]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dim: int = -1, masked: bool = True) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    return (_hide(scores, _visible(scores)) if masked else scores).softmax(dim) @ v


CAUSAL_ATTENTION = Exercise(
    task="""This is the formula that the whole field rests on: softmax(q kᵀ / √head_dim) v, with the future
    hidden. `q` and `k` are float32 [batch, time, head_dim], `v` is float32 [batch, time, value_dim]. Return
    float32 [batch, time, value_dim]: position i is a mean of the values at 0 to i, weighted by how well its
    query matches their keys. Write it out, without F.scaled_dot_product_attention.""",
    reference=causal_attention,
    cases=_attention_cases,
    mistakes=(
        Mistake(
            "no 1/sqrt(d)",
            lambda q, k, v: _attend(q, k, v, 1.0),
            "The scores were not divided by √head_dim. A product of two random vectors grows with √head_dim,"
            " so at real sizes the softmax puts everything on one key, and hardly any gradient comes"
            " through.",
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


# ---- 4. heads


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
        (torch.arange(24.0).view(1, 4, 6), 2),
    ]


SPLIT_HEADS = Exercise(
    task="""Several heads look for several things at once, each in its own share of the channels. `x` is
    float32 [batch, time, n_embd], and n_embd is n_head * head_dim. Return float32 [batch, n_head, time,
    head_dim]: head 0 has the first head_dim channels of every position, head 1 the next ones, and so on. With
    the heads beside the batch, one matrix product serves them all.""",
    reference=split_heads,
    cases=_heads_cases,
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
            "Head 0 got channels 0, n_head, 2 n_head and so on. Each head should have a block of neighbours,"
            " as in every published model; with another order no weights from elsewhere will fit.",
        ),
        Mistake(
            "heads before the batch",
            lambda x, n_head: torch.stack(x.chunk(n_head, dim=-1)),
            "The contents are right, but the heads stand in front of the batch. The shape should be [batch,"
            " n_head, time, head_dim]: whatever comes next takes dimension 0 for the batch.",
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


# ---- 5. the sliding window


def sliding_window_mask(time: int, window: int) -> Tensor:
    return causal_mask(time, window=window)


def _window_cases(generator: Generator) -> list[tuple]:
    time, window = (
        int(torch.randint(8, 12, (1,), generator=generator)),
        int(torch.randint(3, 6, (1,), generator=generator)),
    )
    return [(time, window), (5, 2), (7, 3), (6, 1), (4, 9), (1, 1), (3, 3)]


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


# ---- 6. all of it together


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

    return [case(2, 5, 3, 4), case(3, 4, 2, 3), case(1, 6, 4, 2), case(4, 1, 2, 2), case(2, 3, 1, 5)]


def _wrong_heads(
    transposed: bool = True,
    scale_by: str = "head_dim",
    merged: bool = True,
    heads: bool = True,
    project: bool = True,
    masked: bool = True,
):
    """Multi-head attention with one of its parts wrong."""

    def attend(
        x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, o_weight: Tensor, n_head: int
    ) -> Tensor:
        n_head = n_head if heads else 1
        q, k, v = (
            split_heads(x @ (w.T if transposed else w), n_head) for w in (q_weight, k_weight, v_weight)
        )
        size = q.size(-1) if scale_by == "head_dim" else x.size(-1)
        out = _attend(q, k, v, 1 / math.sqrt(size), masked=masked)
        out = out.transpose(1, 2).flatten(-2) if merged else out.reshape(x.shape)
        return out @ (o_weight.T if transposed else o_weight) if project else out

    return attend


MULTI_HEAD_ATTENTION = Exercise(
    task="""Put the layer together. `x` is float32 [batch, time, n_embd]; the four weights are float32
    [n_embd, n_embd] in nn.Linear's layout, [outputs, inputs], without biases. Make queries, keys and values,
    split each into `n_head` heads of neighbouring channels, attend causally in every head with scale
    1/√head_dim, put the heads side by side again in their order, and apply `o_weight`. Return float32 [batch,
    time, n_embd].""",
    reference=multi_head_attention,
    cases=_multi_head_cases,
    mistakes=(
        Mistake(
            "weights not transposed",
            _wrong_heads(transposed=False),
            "nn.Linear keeps its weight as [outputs, inputs] and computes x @ weight.T. The matrices here are"
            " square, so x @ weight runs without an error and gives something else.",
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


EXERCISES: tuple[Exercise, ...] = (
    AVERAGE_PAST,
    CAUSAL_WEIGHTS,
    CAUSAL_ATTENTION,
    SPLIT_HEADS,
    SLIDING_WINDOW_MASK,
    MULTI_HEAD_ATTENTION,
)
