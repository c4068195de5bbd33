"""Answers to the exercises of week 3, written by people who did not write its grader."""

import math

import torch
import torch.nn.functional as F

from tests.course.foreign.register import right, wrong


@wrong("The means are written into x itself, which changes it and averages means already taken.")
def average_past(x):
    for t in range(x.shape[1]):
        x[:, t] = x[:, : t + 1].mean(dim=1)
    return x


@wrong("Each step halves what came before: a decaying average instead of an equal one.")
def average_past(x):
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 0]
    for t in range(1, x.shape[1]):
        out[:, t] = (out[:, t - 1] + x[:, t]) / 2
    return out


@wrong("The future gets 0 instead of minus infinity before the softmax, so it still has weight.")
def average_past(x):
    T = x.shape[1]
    wei = torch.tril(torch.ones(T, T))
    wei = F.softmax(wei, dim=-1)
    return wei @ x


@wrong("The row sums lack keepdim=True, so the columns of the matrix are divided instead of its rows.")
def average_past(x):
    B, T, C = x.shape
    tril = torch.tril(torch.ones(T, T, dtype=x.dtype))
    weights = tril / tril.sum(dim=1)
    return torch.matmul(weights, x)


@right
def average_past(x):
    mean = torch.zeros_like(x[:, 0])
    means = []
    for count, now in enumerate(x.unbind(dim=1), start=1):
        mean = mean + (now - mean) / count
        means.append(mean)
    return torch.stack(means, dim=1)


@wrong("The softmax covers the future and is rescaled after, which fails where the future takes it all.")
def causal_weights(scores):
    weights = torch.softmax(scores, dim=-1)
    weights = torch.tril(weights)
    return weights / weights.sum(dim=-1, keepdim=True)


@wrong("The future scores are multiplied by 0 instead of set to minus infinity.")
def causal_weights(scores):
    time = scores.shape[-1]
    mask = torch.tril(torch.ones(time, time))
    return F.softmax(scores * mask, dim=-1)


@wrong("masked_fill_ overwrites the caller's scores.")
def causal_weights(scores):
    T = scores.size(-1)
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
    scores.masked_fill_(future, float("-inf"))
    return scores.softmax(dim=-1)


@wrong("The softmax runs over the queries, so the columns sum to 1 instead of the rows.")
def causal_weights(scores):
    T = scores.shape[1]
    tril = torch.tril(torch.ones(T, T))
    wei = scores.masked_fill(tril == 0, float("-inf"))
    return F.softmax(wei, dim=1)


@right
def causal_weights(scores):
    time = scores.shape[-1]
    rows = []
    for i in range(time):
        seen = scores[:, i, : i + 1]
        top = seen.amax(dim=-1, keepdim=True)
        parts = torch.exp(seen - top)
        rows.append(F.pad(parts / parts.sum(-1, keepdim=True), (0, time - 1 - i)))
    return torch.stack(rows, dim=1)


@wrong("The scores are scaled by the dimension of the values instead of that of the heads.")
def causal_attention(q, k, v):
    B, T, C = v.shape
    scores = q @ k.transpose(-2, -1) / math.sqrt(C)
    tril = torch.tril(torch.ones(T, T))
    scores = scores.masked_fill(tril == 0, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


@wrong("k is reshaped instead of transposed, so its numbers land in the wrong places.")
def causal_attention(q, k, v):
    batch, time, head_dim = q.shape
    wei = q @ k.reshape(batch, head_dim, time) * head_dim**-0.5
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    wei = F.softmax(wei.masked_fill(future, -torch.inf), dim=-1)
    return wei @ v


@wrong("The scale is applied to the weights after the softmax, so they no longer sum to 1.")
def causal_attention(q, k, v):
    T = q.shape[1]
    scores = torch.bmm(q, k.mT)
    mask = torch.full((T, T), float("-inf")).triu(diagonal=1)
    weights = torch.softmax(scores + mask, dim=-1) / math.sqrt(q.shape[-1])
    return torch.bmm(weights, v)


@wrong("The output is allocated in the shape of q, which fails when value_dim differs from head_dim.")
def causal_attention(q, k, v):
    out = torch.zeros_like(q)
    scale = 1.0 / math.sqrt(q.shape[-1])
    for i in range(q.shape[1]):
        scores = (k[:, : i + 1] * q[:, i : i + 1]).sum(-1) * scale
        weights = torch.softmax(scores, dim=-1)
        out[:, i] = (weights.unsqueeze(-1) * v[:, : i + 1]).sum(dim=1)
    return out


@right
def causal_attention(q, k, v):
    batch, time, head_dim = q.shape
    top = torch.full((batch, time, 1), float("-inf"))
    total = torch.zeros(batch, time, 1)
    out = torch.zeros(batch, time, v.shape[-1])
    for j in range(time):
        score = torch.einsum("btd,bd->bt", q[:, j:], k[:, j]).unsqueeze(-1) / head_dim**0.5
        new_top = torch.maximum(top[:, j:], score)
        shrink = torch.exp(top[:, j:] - new_top)
        part = torch.exp(score - new_top)
        total[:, j:] = total[:, j:] * shrink + part
        out[:, j:] = out[:, j:] * shrink + part * v[:, j : j + 1]
        top[:, j:] = new_top
    return out / total


@wrong("Head h gets every n_head-th channel instead of a run of neighbouring ones.")
def split_heads(x, n_head):
    return torch.stack([x[:, :, h::n_head] for h in range(n_head)], dim=1)


@wrong("n_head is used as the size of a head, which fits only when n_head equals head_dim.")
def split_heads(x, n_head):
    pieces = torch.split(x, n_head, dim=-1)
    return torch.stack(pieces, dim=1)


@wrong("The heads are joined before the batch and the axes then renamed, so texts and heads mix.")
def split_heads(x, n_head):
    B, T, C = x.shape
    heads = torch.cat(x.chunk(n_head, dim=-1), dim=0)
    return heads.view(B, n_head, T, C // n_head)


@wrong("Channels are moved before time and then reshaped as if time still came first.")
def split_heads(x, n_head):
    batch, time, n_embd = x.shape
    head_dim = n_embd // n_head
    return x.transpose(1, 2).reshape(batch, n_head, time, head_dim)


@right
def split_heads(x, n_head):
    head_dim = x.shape[-1] // n_head
    return x.unfold(-1, head_dim, head_dim).movedim(2, 1)


@wrong("Near the start the slice begins at a negative index and wraps around, so rows stay empty.")
def sliding_window_mask(time, window):
    mask = torch.zeros(time, time, dtype=torch.bool)
    for i in range(time):
        mask[i, i - window + 1 : i + 1] = True
    return mask


@wrong("The text is cut into fixed blocks, and a query sees its own block instead of the last positions.")
def sliding_window_mask(time, window):
    i = torch.arange(time).view(-1, 1)
    j = torch.arange(time).view(1, -1)
    return (j <= i) & (i // window == j // window)


@wrong("The mask is a float tensor of zeros and ones instead of bool.")
def sliding_window_mask(time, window):
    ones = torch.ones(time, time)
    return torch.tril(ones) * torch.triu(ones, diagonal=1 - window)


@wrong("The window reaches one position too far back.")
def sliding_window_mask(time, window):
    full = torch.ones((time, time), dtype=torch.bool)
    return full.tril() & full.triu(diagonal=-window)


@right
def sliding_window_mask(time, window):
    table = []
    for i in range(time):
        allowed = set(range(max(0, i + 1 - window), i + 1))
        table.append([j in allowed for j in range(time)])
    return torch.tensor(table, dtype=torch.bool).reshape(time, time)


@wrong("Split and merge both give a head every n_head-th channel instead of neighbouring ones.")
def multi_head_attention(x, q_weight, k_weight, v_weight, o_weight, n_head):
    B, T, C = x.shape
    d = C // n_head

    def heads(w):
        return F.linear(x, w).view(B, T, d, n_head).permute(0, 3, 1, 2)

    q, k, v = heads(q_weight), heads(k_weight), heads(v_weight)
    att = q @ k.transpose(-2, -1) / math.sqrt(d)
    att = att.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
    y = (att @ v).permute(0, 2, 3, 1).reshape(B, T, C)
    return F.linear(y, o_weight)


@wrong("o_weight is applied without being transposed.")
def multi_head_attention(x, q_weight, k_weight, v_weight, o_weight, n_head):
    batch, time, n_embd = x.shape
    shape = (batch, time, n_head, n_embd // n_head)
    q = (x @ q_weight.T).view(shape).transpose(1, 2)
    k = (x @ k_weight.T).view(shape).transpose(1, 2)
    v = (x @ v_weight.T).view(shape).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = out.transpose(1, 2).contiguous().view(batch, time, n_embd)
    return out @ o_weight


@wrong("The heads are put together without moving them back behind the time axis.")
def multi_head_attention(x, q_weight, k_weight, v_weight, o_weight, n_head):
    B, T, C = x.shape
    hd = C // n_head
    q = F.linear(x, q_weight).view(B, T, n_head, hd).transpose(1, 2)
    k = F.linear(x, k_weight).view(B, T, n_head, hd).transpose(1, 2)
    v = F.linear(x, v_weight).view(B, T, n_head, hd).transpose(1, 2)
    scores = (q @ k.transpose(2, 3)) * hd**-0.5
    causal = torch.tril(torch.ones(T, T)).bool()
    scores = scores.masked_fill(~causal, float("-inf"))
    out = torch.softmax(scores, dim=-1) @ v
    return F.linear(out.reshape(B, T, C), o_weight)


@wrong("The scores are scaled by the root of n_embd instead of head_dim.")
def multi_head_attention(x, q_weight, k_weight, v_weight, o_weight, n_head):
    T, C = x.shape[1], x.shape[2]
    scale = C**-0.5
    tril = torch.tril(torch.ones(T, T))
    outs = []
    for q, k, v in zip(
        (x @ q_weight.T).chunk(n_head, dim=-1),
        (x @ k_weight.T).chunk(n_head, dim=-1),
        (x @ v_weight.T).chunk(n_head, dim=-1),
    ):
        wei = (q @ k.transpose(1, 2)) * scale
        wei = wei.masked_fill(tril == 0, float("-inf"))
        outs.append(F.softmax(wei, dim=-1) @ v)
    return torch.cat(outs, dim=-1) @ o_weight.T


@right
def multi_head_attention(x, q_weight, k_weight, v_weight, o_weight, n_head):
    time, n_embd = x.shape[1:]
    head_dim = n_embd // n_head
    result = torch.zeros_like(x)
    for h in range(n_head):
        own = slice(h * head_dim, (h + 1) * head_dim)
        match = q_weight[own].T @ k_weight[own] / head_dim**0.5
        scores = torch.einsum("bic,cd,bjd->bij", x, match, x)
        scores = torch.where(torch.ones(time, time).tril() > 0, scores, -math.inf)
        values = x @ (o_weight[:, own] @ v_weight[own]).T
        result = result + torch.softmax(scores, dim=-1) @ values
    return result
