"""Answers to the exercises of week 4, written by people who did not write its grader."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.course.foreign.register import right, wrong


@wrong("The variance as mean of squares minus squared mean cancels out when the mean is large.")
def layer_norm(x, weight, bias, eps):
    mean = x.mean(dim=-1, keepdim=True)
    var = (x**2).mean(dim=-1, keepdim=True) - mean**2
    return weight * (x - mean) / torch.sqrt(var + eps) + bias


@wrong("eps is added to the standard deviation instead of to the variance under the root.")
def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    std = x.std(-1, keepdim=True, unbiased=False)
    return weight * (x - mean) / (std + eps) + bias


@wrong("The bias is added before the multiplication by the weight.")
def layer_norm(x, weight, bias, eps):
    mu = torch.mean(x, dim=-1, keepdim=True)
    centered = x - mu
    var = torch.mean(centered * centered, dim=-1, keepdim=True)
    return (centered * torch.rsqrt(var + eps) + bias) * weight


@wrong("Taking away the mean changes the caller's x in place.")
def layer_norm(x, weight, bias, eps):
    x -= x.mean(dim=-1, keepdim=True)
    var = x.pow(2).mean(dim=-1, keepdim=True)
    out = x / (var + eps).sqrt()
    return out * weight + bias


@right
def layer_norm(x, weight, bias, eps):
    n = x.shape[-1]
    wide = x.to(torch.float64)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    centred = torch.einsum("btc,cd->btd", wide, centring)
    variance = torch.einsum("btc,btc->bt", centred, centred) / n
    normed = centred / (variance + eps).sqrt().unsqueeze(-1)
    return torch.addcmul(bias.to(torch.float64), normed, weight.to(torch.float64)).to(x.dtype)


@wrong("a is a view of the output, so b is turned with the new a instead of the old one.")
def rotate(x, start, theta):
    time, head_dim = x.shape[2], x.shape[3]
    half = head_dim // 2
    freqs = theta ** (-2 * torch.arange(half).float() / head_dim)
    positions = torch.arange(start, start + time).float()
    angles = torch.outer(positions, freqs)
    cos, sin = angles.cos(), angles.sin()
    out = x.clone()
    a, b = out[..., :half], out[..., half:]
    out[..., :half] = a * cos - b * sin
    out[..., half:] = a * sin + b * cos
    return out


@wrong("The positions run along the axis of the heads instead of that of time.")
def rotate(x, start, theta):
    d = x.shape[-1]
    inv_freq = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)
    t = torch.arange(start, start + x.shape[1]).float()
    freqs = (t[:, None] * inv_freq[None, :])[None, :, None, :]
    cos, sin = torch.cos(freqs), torch.sin(freqs)
    x1, x2 = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


@wrong("The exponent is -i/head_dim instead of -2i/head_dim.")
def rotate(x, start, theta):
    B, H, T, D = x.shape
    i = torch.arange(D // 2)
    freq = theta ** (-i / D)
    pos = torch.arange(T) + start
    angle = pos.unsqueeze(1) * freq.unsqueeze(0)
    angle = torch.cat([angle, angle], dim=-1)
    rotated = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], dim=-1)
    return x * angle.cos() + rotated * angle.sin()


@wrong("The base is fixed at 10000, and theta is ignored.")
def rotate(x, start, theta):
    def angles_for(length, dim, base=10000.0):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        inv_freq = base**-exponents
        return torch.einsum("t,f->tf", torch.arange(start, start + length).float(), inv_freq)

    a, b = x.chunk(2, dim=-1)
    angles = angles_for(x.size(2), x.size(3))
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


@right
def rotate(x, start, theta):
    half = x.shape[-1] // 2
    points = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = []
    for p, point in enumerate(points.unbind(dim=2), start=start):
        angles = torch.tensor([p * theta ** (-i / half) for i in range(half)], dtype=torch.float64)
        turned.append(point * torch.exp(1j * angles))
    turned = torch.stack(turned, dim=2)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


@wrong("SiLU is applied to the up branch instead of the gate branch.")
def gated_mlp(x, gate_weight, up_weight, down_weight):
    gate = F.linear(x, gate_weight)
    up = F.linear(x, up_weight)
    return F.linear(gate * F.silu(up), down_weight)


@wrong("SiLU is applied to the product of the two branches.")
def gated_mlp(x, gate_weight, up_weight, down_weight):
    hidden = (x @ gate_weight.T) * (x @ up_weight.T)
    hidden = hidden * torch.sigmoid(hidden)
    return hidden @ down_weight.T


@wrong("The sigmoid as exp(z) / (1 + exp(z)) gives NaN once exp(z) overflows.")
def gated_mlp(x, gate_weight, up_weight, down_weight):
    def silu(z):
        e = torch.exp(z)
        return z * e / (1 + e)

    return (silu(x @ gate_weight.T) * (x @ up_weight.T)) @ down_weight.T


@wrong("The weights are reshaped instead of transposed.")
def gated_mlp(x, gate_weight, up_weight, down_weight):
    n_embd = x.shape[-1]
    hidden = gate_weight.shape[0]
    gate = x @ gate_weight.reshape(n_embd, hidden)
    up = x @ up_weight.reshape(n_embd, hidden)
    return (F.silu(gate) * up) @ down_weight.reshape(hidden, n_embd)


@right
def gated_mlp(x, gate_weight, up_weight, down_weight):
    both = torch.einsum("btc,hc->bth", x, torch.cat([gate_weight, up_weight]))
    z, up = both.tensor_split(2, dim=-1)
    swish = z * (1 + torch.tanh(z / 2)) / 2
    return torch.einsum("bth,ch->btc", swish * up, down_weight)


@wrong("The MLP's output is added to the normed x instead of to x itself.")
def mlp_sublayer(x, up_weight, down_weight):
    h = F.layer_norm(x, (x.shape[-1],))
    return h + F.gelu(h @ up_weight.T) @ down_weight.T


@wrong("The addition changes the caller's x in place.")
def mlp_sublayer(x, up_weight, down_weight):
    h = F.layer_norm(x, x.shape[-1:])
    h = F.linear(h, up_weight)
    h = F.gelu(h)
    h = F.linear(h, down_weight)
    x += h
    return x


@wrong("It uses the tanh approximation of GELU instead of F.gelu as it stands.")
def mlp_sublayer(x, up_weight, down_weight):
    n_embd = x.size(-1)
    normed = F.layer_norm(x, (n_embd,))
    hidden = F.gelu(F.linear(normed, up_weight), approximate="tanh")
    return x + F.linear(hidden, down_weight)


@wrong("The norm runs over time and channels together instead of over the channels of each position.")
def mlp_sublayer(x, up_weight, down_weight):
    normed = F.layer_norm(x, x.shape[1:])
    return x + F.gelu(normed @ up_weight.t()) @ down_weight.t()


@right
def mlp_sublayer(x, up_weight, down_weight):
    n_embd = x.shape[-1]

    def of_position(residual):
        normed = F.layer_norm(residual, (n_embd,))
        return torch.addmv(residual, down_weight, F.gelu(torch.mv(up_weight, normed)))

    return torch.stack([torch.stack([of_position(position) for position in text]) for text in x])


@wrong("is_causal lines the mask up with the first key, so the new token sees only the oldest one.")
def decode_step(q, k, v, past_k, past_v):
    keys = torch.cat([past_k, k], dim=2)
    values = torch.cat([past_v, v], dim=2)
    out = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    return out, keys, values


@wrong("The softmax runs over the one query instead of the keys, so every weight is 1.")
def decode_step(q, k, v, past_k, past_v):
    keys = torch.cat((past_k, k), dim=-2)
    values = torch.cat((past_v, v), dim=-2)
    scores = q @ keys.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = scores.softmax(dim=2)
    return weights @ values, keys, values


@wrong("The new key and value are put before the past instead of after it.")
def decode_step(q, k, v, past_k, past_v):
    keys = torch.cat([k, past_k], dim=2)
    values = torch.cat([v, past_v], dim=2)
    scale = q.size(-1) ** -0.5
    att = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, keys) * scale, dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", att, values), keys, values


@wrong("The new token attends to the past only, not to itself.")
def decode_step(q, k, v, past_k, past_v):
    head_dim = q.shape[-1]
    if past_k.shape[2] == 0:
        return v, k, v
    weights = F.softmax(q @ past_k.transpose(2, 3) / head_dim**0.5, dim=-1)
    out = weights @ past_v
    return out, torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)


@right
def decode_step(q, k, v, past_k, past_v):
    batch, n_head, past, head_dim = past_k.shape
    keys = q.new_empty(batch, n_head, past + 1, head_dim)
    values = torch.empty_like(keys)
    keys[:, :, :past], keys[:, :, past:] = past_k, k
    values[:, :, :past], values[:, :, past:] = past_v, v
    match = (keys * q).sum(dim=-1, keepdim=True).div(math.sqrt(head_dim))
    out = (torch.softmax(match, dim=2) * values).sum(dim=2, keepdim=True)
    return out, keys, values


@wrong("The position embedding is left out.")
def count_parameters(vocab_size, block_size, n_layer, n_embd):
    attn = 4 * (n_embd * n_embd + n_embd)
    mlp = n_embd * 4 * n_embd + 4 * n_embd + 4 * n_embd * n_embd + n_embd
    norms = 2 * 2 * n_embd
    return vocab_size * n_embd + n_layer * (attn + mlp + norms) + 2 * n_embd


@wrong("The MLP's second layer is given a bias of 4 n_embd instead of n_embd.")
def count_parameters(vocab_size, block_size, n_layer, n_embd):
    hidden = 4 * n_embd
    total = (vocab_size + block_size) * n_embd
    for _ in range(n_layer):
        total += 2 * (2 * n_embd)
        total += 4 * (n_embd**2 + n_embd)
        total += 2 * (n_embd * hidden + hidden)
    return total + 2 * n_embd


@wrong("The 12 of 12 n_embd² is taken for the number of layers, which fits only a model of 12 layers.")
def count_parameters(vocab_size, block_size, n_layer, n_embd):
    embeddings = vocab_size * n_embd + block_size * n_embd
    blocks = n_layer * (n_layer * n_embd * n_embd + 13 * n_embd)
    final_norm = 2 * n_embd
    return embeddings + blocks + final_norm


@wrong("math.pow makes the result a float instead of an int.")
def count_parameters(vocab_size, block_size, n_layer, n_embd):
    per_block = 12 * math.pow(n_embd, 2) + 13 * n_embd
    return (vocab_size + block_size + 2) * n_embd + n_layer * per_block


@right
def count_parameters(vocab_size, block_size, n_layer, n_embd):
    def block():
        layers = [nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)]
        layers += [nn.Linear(n_embd, n_embd) for _ in range(4)]
        layers += [nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)]
        return nn.ModuleList(layers)

    with torch.device("meta"):
        model = nn.ModuleList([nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)])
        model.extend(block() for _ in range(n_layer))
        model.append(nn.LayerNorm(n_embd))
    return sum(parameter.numel() for parameter in model.parameters())
