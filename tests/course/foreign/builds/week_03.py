"""Answers to the build exercises of week 3, written by people who did not write its grader."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.course.foreign.register import right, wrong


@wrong("scales by the square root of value_dim instead of head_dim")
def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    d = values.size(-1)
    scores = keys @ query / math.sqrt(d)
    weights = F.softmax(scores, dim=-1)
    return weights @ values


@wrong("divides by the square root of d after the softmax instead of before it")
def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    d_k = query.shape[-1]
    weights = torch.softmax(query @ keys.T, dim=-1) / math.sqrt(d_k)
    return weights @ values


@wrong("subtracts the mean of the scores instead of the largest, so exp overflows on scores far apart")
def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    scores = (keys * query).sum(dim=1) / len(query) ** 0.5
    exp = torch.exp(scores - scores.mean())
    weights = exp / exp.sum()
    return (weights[:, None] * values).sum(dim=0)


@wrong("clamps large scores to avoid overflow, so keys with different large scores get equal weights")
def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    scores = torch.mv(keys, query) / math.sqrt(query.numel())
    exp = scores.clamp(min=-80, max=80).exp()
    return (exp / exp.sum()) @ values


@wrong("calls scaled_dot_product_attention, which is not allowed")
def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    out = F.scaled_dot_product_attention(query[None, None], keys[None], values[None])
    return out[0, 0]


@wrong("turns each score into a Python float, so no gradient reaches the query and the keys")
def attention_row(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    largest = -math.inf
    total = 0.0
    mean = torch.zeros_like(values[0])
    scaled = query / math.sqrt(query.shape[0])
    for key, value in zip(keys, values, strict=True):
        score = float(scaled.dot(key))
        new_largest = max(largest, score)
        shrink = math.exp(largest - new_largest)
        weight = math.exp(score - new_largest)
        total = total * shrink + weight
        mean = mean * shrink + weight * value
        largest = new_largest
    return mean / total


@wrong("scales by the square root of n_embd instead of head_dim")
class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        k = self.k_proj(x)
        q = self.q_proj(x)
        wei = q @ k.transpose(-2, -1) * C**-0.5
        tril = torch.tril(torch.ones(T, T, device=x.device))
        wei = wei.masked_fill(tril == 0, float("-inf"))
        wei = F.softmax(wei, dim=-1)
        v = self.v_proj(x)
        return wei @ v


@wrong("zeroes the future weights after the softmax, so the remaining weights do not sum to 1")
class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores, dim=-1)
        weights = torch.tril(weights)
        return weights @ v


@wrong("the projections have biases")
class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(n_embd, head_dim)
        self.k_proj = nn.Linear(n_embd, head_dim)
        self.v_proj = nn.Linear(n_embd, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        time = x.shape[1]
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        future = torch.triu(torch.ones(time, time, dtype=torch.bool, device=x.device), diagonal=1)
        scores = scores.masked_fill(future, float("-inf"))
        return scores.softmax(dim=-1) @ v


@wrong("the softmax runs over the queries instead of the keys")
class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, head_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.q_proj(x)
        keys = self.k_proj(x)
        values = self.v_proj(x)
        attn_scores = queries @ keys.transpose(1, 2)
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], device=x.device), diagonal=1).bool()
        attn_scores.masked_fill_(mask, -torch.inf)
        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=1)
        return attn_weights @ values


@wrong("sets the scores of future positions to 0 before the softmax instead of minus infinity")
class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        self.q_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.k_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.v_proj = nn.Linear(n_embd, head_dim, bias=False)
        self.scale = head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).mT * self.scale
        scores = scores * torch.tril(torch.ones_like(scores[0]))
        return F.softmax(scores, dim=-1) @ self.v_proj(x)


@right
class Head(nn.Module):
    def __init__(self, n_embd: int, head_dim: int):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(n_embd, head_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x) / math.sqrt(self.q_proj.out_features)
        k, v = self.k_proj(x), self.v_proj(x)
        rows = []
        for t in range(x.shape[1]):
            scores = torch.einsum("bd,bjd->bj", q[:, t], k[:, : t + 1])
            rows.append(torch.einsum("bj,bjd->bd", scores.softmax(dim=-1), v[:, : t + 1]))
        return torch.stack(rows, dim=1)


@wrong("splits into heads with view(batch, n_head, time, head_dim), which mixes positions and heads")
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.q_proj(x).view(B, self.n_head, T, C // self.n_head)
        k = self.k_proj(x).view(B, self.n_head, T, C // self.n_head)
        v = self.v_proj(x).view(B, self.n_head, T, C // self.n_head)
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        mask = torch.tril(torch.ones(T, T, device=x.device))
        att = att.masked_fill(mask == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.o_proj(y)


@wrong("scales by the square root of n_embd instead of the dimension of a head")
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_embd = n_embd
        self.n_head = n_head
        self.head_dim = n_embd // n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        scores = q @ k.mT / math.sqrt(self.n_embd)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


@wrong("a head takes every n_head-th feature instead of a block of neighbours, so other weights do not fit")
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def split(self, x):
        B, T, C = x.shape
        return x.view(B, T, C // self.n_head, self.n_head).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        mask = torch.tril(torch.ones(T, T, dtype=torch.bool, device=x.device))
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        out = (weights @ v).permute(0, 2, 3, 1).reshape(B, T, C)
        return self.o_proj(out)


@wrong("the mask is shifted by one, so each position also sees the next token")
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, n_embd = x.shape
        q, k, v = (
            proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        allowed = torch.tril(torch.ones(time, time, device=x.device), diagonal=1).bool()
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


@wrong("o_proj is made but never applied")
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        assert n_embd % n_head == 0
        self.n_head = n_head
        self.q_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.k_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.v_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.o_proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1], device=x.device)) == 0
        for q, k, v in zip(
            self.q_proj(x).chunk(self.n_head, dim=-1),
            self.k_proj(x).chunk(self.n_head, dim=-1),
            self.v_proj(x).chunk(self.n_head, dim=-1),
            strict=True,
        ):
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            heads.append(scores.masked_fill(mask, float("-inf")).softmax(dim=-1) @ v)
        return torch.cat(heads, dim=-1)


@right
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(n_embd, n_embd, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        d = x.shape[2] // self.n_head
        place = torch.arange(time, device=x.device)
        future = torch.zeros(time, time, device=x.device)
        future[place[:, None] < place] = -torch.inf
        out = torch.zeros_like(x)
        for head in range(self.n_head):
            mine = slice(head * d, (head + 1) * d)
            q = x @ self.q_proj.weight[mine].T
            k = x @ self.k_proj.weight[mine].T
            v = x @ self.v_proj.weight[mine].T
            weights = torch.softmax(torch.baddbmm(future, q, k.mT, alpha=d**-0.5), dim=-1)
            out = out + weights @ v @ self.o_proj.weight[:, mine].T
        return out
