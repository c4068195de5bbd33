"""Answers to the exercises of weeks 1 to 4."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from shared.models.gpt import GPT, MLP, Block, GPTConfig
from tests.course.answers.register import answer

# ---- week 1


@answer
def count_pairs(tokens, vocab_size):
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist()):
        counts[a, b] += 1
    return counts


@answer
def row_probabilities(counts, smoothing):
    smoothed = counts + smoothing
    return smoothed / smoothed.sum(dim=1, keepdim=True)


@answer
def token_loss(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()


@answer
def loss_in_bits_per_byte(loss, tokens, text_bytes):
    return math.log2(math.e) * (loss * tokens) / text_bytes


@answer
def inputs_and_targets(tokens, starts, block_size):
    def windows(offset):
        cuts = [tokens[start + offset : start + offset + block_size] for start in starts]
        return torch.from_numpy(np.stack(cuts).astype(np.int64))

    return windows(0), windows(1)


@answer
def temperature_probabilities(logits, temperature):
    powers = ((logits - logits.max(-1, keepdim=True).values) / temperature).exp()
    return powers / powers.sum(-1, keepdim=True)


# ---- week 2


@answer
def context_windows(idx, window, padding):
    padded = torch.cat([torch.full((idx.size(0), window - 1), padding), idx], dim=1)
    return torch.stack([padded[:, t : t + window] for t in range(idx.size(1))], dim=1)


@answer
def scaled_weights(noise, gain):
    return noise * math.sqrt(gain**2 / noise.shape[1])


@answer
class WindowMLP(nn.Module):
    def __init__(self, vocab_size, window, n_embd, n_hidden):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size + 1, n_embd)
        self.position_embedding = nn.Embedding(window, n_embd)
        self.hidden = nn.Linear(window * n_embd, n_hidden)
        self.lm_head = nn.Linear(n_hidden, vocab_size)
        self.position_embedding.weight.data.mul_(0.1)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="tanh")
        self.lm_head.weight.data.normal_(0, 0.01)
        for layer in (self.hidden, self.lm_head):
            layer.bias.data.zero_()

    def activations(self, idx):
        window = self.position_embedding.num_embeddings
        padding = idx.new_full((len(idx), window - 1), self.lm_head.out_features)
        padded = torch.cat([padding, idx], dim=1)
        parts = []
        for place in range(window):
            tokens = padded[:, place : place + idx.size(1)]
            parts.append(self.token_embedding(tokens) + self.position_embedding.weight[place])
        return self.hidden(torch.cat(parts, dim=-1)).tanh()

    def forward(self, idx):
        return self.lm_head(self.activations(idx))


@answer
def logit_gradient(logits, targets):
    p = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
    return p.scatter_add(-1, targets[..., None], -torch.ones_like(logits)) / targets.numel()


@answer
def learning_rate(step, steps, warmup_steps, peak, final_fraction):
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


@answer
def adamw_step(weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay):
    first = first.lerp(gradient, 1 - beta1)
    second = second.lerp(gradient.square(), 1 - beta2)
    unit = math.sqrt(1 - beta2**step)
    moved = lr / (1 - beta1**step) * first * unit / (second.sqrt() + eps * unit)
    return weight * (1 - lr * weight_decay) - moved, first, second


@answer
def clip_gradients(gradients, max_norm):
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    if norm <= max_norm:
        return gradients
    return [g / norm * max_norm for g in gradients]


@answer
def train(
    model, batches, steps, *, optimizer, peak, warmup_steps, final_fraction, max_norm, evaluate, eval_every
):
    losses, evaluations = [], []
    for step in range(steps):
        model.train()
        x, y = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup_steps, peak, final_fraction)
        model.zero_grad()
        loss = -model(x).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
        if step == steps - 1 or step % eval_every == eval_every - 1:
            with torch.inference_mode():
                evaluations.append([step + 1, evaluate(model.eval())])
    model.train()
    return losses, evaluations


# ---- week 3


@answer
def average_past(x):
    return torch.stack([x[:, : t + 1].mean(dim=1) for t in range(x.size(1))], dim=1)


@answer
def causal_weights(scores):
    return scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf")).softmax(-1)


@answer
def attention_row(query, keys, values):
    scores = torch.stack([(query * key).sum() for key in keys]) / len(query) ** 0.5
    return torch.einsum("t,tv->v", torch.exp(scores - scores.logsumexp(0)), values)


@answer
def causal_attention(q, k, v):
    rows = []
    for i in range(q.size(1)):
        scores = torch.einsum("bd,bjd->bj", q[:, i], k[:, : i + 1]) * q.size(-1) ** -0.5
        rows.append(torch.einsum("bj,bjv->bv", F.softmax(scores, dim=1), v[:, : i + 1]))
    return torch.stack(rows, dim=1)


@answer
class Head(nn.Module):
    def __init__(self, n_embd, head_dim):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(n_embd, head_dim, bias=False))

    def forward(self, x):
        scores = torch.einsum("bid,bjd->bij", self.q_proj(x), self.k_proj(x) / self.k_proj.out_features**0.5)
        future = torch.full(scores.shape[1:], -torch.inf).triu(1)
        return F.softmax(scores + future, dim=2) @ self.v_proj(x)


@answer
def split_heads(x, n_head):
    return torch.stack(x.chunk(n_head, dim=-1), dim=1)


@answer
def sliding_window_mask(time, window):
    return torch.tensor([[i - window < j <= i for j in range(time)] for i in range(time)])


@answer
def multi_head_attention(x, q_weight, k_weight, v_weight, o_weight, n_head):
    result = torch.zeros_like(x)
    for q_part, k_part, v_part, o_part in zip(
        q_weight.chunk(n_head), k_weight.chunk(n_head), v_weight.chunk(n_head), o_weight.chunk(n_head, dim=1)
    ):
        result = result + causal_attention(x @ q_part.T, x @ k_part.T, x @ v_part.T) @ o_part.T
    return result


@answer
class MultiHeadAttention(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(n_embd, n_embd, bias=False))

    def forward(self, x):
        weights = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.o_proj.weight]
        return multi_head_attention(x, *weights, self.n_head)


# ---- week 4


@answer
def layer_norm(x, weight, bias, eps):
    return (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + eps) * weight + bias


@answer
def rotate(x, start, theta):
    """As a product of complex numbers."""
    a, b = x.double().chunk(2, dim=-1)
    positions = torch.arange(start, start + x.size(2)).double()
    speeds = theta ** (-torch.arange(0, x.size(3), 2).double() / x.size(3))
    angle = positions[:, None] * speeds
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).float()


@answer
def gated_mlp(x, gate_weight, up_weight, down_weight):
    mlp = MLP(GPTConfig(n_head=1, n_embd=x.size(-1), mlp="swiglu", mlp_hidden=up_weight.size(0), bias=False))
    weights = {"gate": gate_weight, "up": up_weight, "down": down_weight}
    return functional_call(mlp, {f"{name}_proj.weight": weight for name, weight in weights.items()}, (x,))


@answer
def mlp_sublayer(x, up_weight, down_weight):
    config = GPTConfig(n_head=1, n_embd=x.size(-1), mlp="gelu", mlp_hidden=up_weight.size(0), bias=False)
    block = Block(config)
    nn.init.zeros_(block.attn.o_proj.weight)  # the attention half adds nothing
    weights = {"mlp.up_proj.weight": up_weight, "mlp.down_proj.weight": down_weight}
    return functional_call(block, weights, (x, None, None, 0))


@answer
def decode_step(q, k, v, past_k, past_v):
    keys = torch.cat([past_k, k], dim=2)
    values = torch.cat([past_v, v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values), keys, values


@answer
def count_parameters(vocab_size, block_size, n_layer, n_embd):
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size, block_size, n_layer, 1, n_embd)).num_parameters()
