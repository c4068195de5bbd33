"""Clean solutions of week 3's exercises, each with a word on why; `week.solution(name)` shows them."""

import math

import torch
from torch import Tensor, nn


def average_past(x: Tensor) -> Tensor:
    """A mean is a weighted sum, and all weighted sums at once are a matrix product: row t of the matrix holds
    the weights of position t, and it multiplies every text of the batch.
    """
    triangle = torch.ones(x.size(1), x.size(1)).tril()
    weights = triangle / triangle.sum(dim=1, keepdim=True)
    return weights @ x


def attention_row(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The dot products say how well each key matches, the softmax makes shares of them, and the shares mix
    the values. The value itself has no say in how much it counts.
    """
    scores = keys @ query / math.sqrt(query.size(0))  # [time]
    return scores.softmax(dim=0) @ values


def causal_weights(scores: Tensor) -> Tensor:
    """exp(-inf) is exactly 0, so a hidden key takes no share, and the softmax never sees its score."""
    time = scores.size(-1)
    hidden = torch.ones(time, time, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One matrix product for all scores, one for all mixtures. The transposition touches the last two
    dimensions only, so it works with any number of dimensions in front: a batch, or a batch of heads.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    return causal_weights(scores) @ v


class Head(nn.Module):
    """Three matrices make queries, keys and values of the same x. They are all that a head learns; what it
    looks at follows from the text.
    """

    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return causal_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """A view cuts the channels into heads without moving a number; only then may two dimensions change
    places.
    """
    batch, time, n_embd = x.shape
    return x.view(batch, time, n_head, n_embd // n_head).transpose(1, 2)


def multi_head_attention(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, v_weight: Tensor, o_weight: Tensor, n_head: int
) -> Tensor:
    """With the heads beside the batch, the attention of one head serves for all of them at once."""
    q, k, v = (split_heads(x @ weight.T, n_head) for weight in (q_weight, k_weight, v_weight))
    out = causal_attention(q, k, v)  # [batch, n_head, time, head_dim]
    return out.transpose(1, 2).flatten(2) @ o_weight.T


class MultiHeadAttention(nn.Module):
    """One nn.Linear makes the queries of all heads: its rows are the heads' matrices, one below the other.
    o_proj comes last, because it combines what different heads have found.
    """

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = split_heads(self.q_proj(x), self.n_head)
        k = split_heads(self.k_proj(x), self.n_head)
        v = split_heads(self.v_proj(x), self.n_head)
        out = causal_attention(q, k, v)  # [batch, n_head, time, head_dim]
        return self.o_proj(out.transpose(1, 2).flatten(2))


def sliding_window_mask(time: int, window: int) -> Tensor:
    """The distance i - j says everything: 0 is the position itself, negative is the future, and the last
    `window` positions have the distances 0 to window - 1.
    """
    distance = torch.arange(time)[:, None] - torch.arange(time)
    return (distance >= 0) & (distance < window)
