"""Answers to the exercises of weeks 8 to 10."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shared.adapters.packing import EncodedTalk, Packed, lay_out, pack
from shared.evaluation import IGNORED
from tests.course.answers.register import answer

# ---- week 8


@answer
def absmax_int8(weight):
    """By PyTorch's own rounding to int8 and back."""
    scales = weight.norm(math.inf, dim=1) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int32)
    back = torch.fake_quantize_per_channel_affine(
        weight, scales, zeros, axis=0, quant_min=-127, quant_max=127
    )
    return (back / scales[:, None]).round().to(torch.int8), scales


@answer
def int4_groups(weight, group_size, clip):
    """Group by group: the nearest of 16 values, written out."""
    codes = []
    scales = []
    minima = []
    for group in weight.flatten().split(group_size):
        low = clip * group.min()
        high = clip * group.max()
        codes.append((group[:, None] - torch.linspace(low, high, 16)).abs().argmin(1))
        scales.append((high - low) / 15)
        minima.append(low)
    rows = len(weight)
    return (
        torch.cat(codes).to(torch.uint8).view_as(weight),
        torch.stack(scales).view(rows, -1),
        torch.stack(minima).view(rows, -1),
    )


@answer
def pack_int4(codes):
    """By way of hexadecimal digits."""
    rows = []
    for row in codes.tolist():
        digits = [f"{high + 8:x}{low + 8:x}" for low, high in zip(row[::2], row[1::2])]
        rows.append(list(bytes.fromhex("".join(digits))))
    return torch.tensor(rows, dtype=torch.uint8)


@answer
def nf4_codes(weight, block_size, levels):
    absmax = torch.stack([block.abs().max() for block in weight.split(block_size)])
    nearest = []
    for n, value in enumerate(weight):
        decoded = levels * absmax[n // block_size]
        nearest.append(int((decoded - value).abs().argmin()))
    return torch.tensor(nearest, dtype=torch.uint8), absmax


@answer
def int8_linear(x, x_scales, codes, scales, bias):
    """By numpy's whole numbers."""
    sums = x.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    return torch.from_numpy(sums) * x_scales[:, None] * scales + bias


@answer
def gptq_step(weight, column, hessian, scales):
    """Without the inverse: the change of the later columns that makes change · Hessian · change least."""
    codes = (weight[:, column] / scales).round().clip(-8, 7)
    change = codes * scales - weight[:, column]
    later = slice(column + 1, None)
    new = weight.clone()
    new[:, column] += change
    new[:, later] -= change[:, None] * torch.linalg.solve(hessian[later, later], hessian[later, column])
    return new


@answer
def decode_limit(block_weights, vocab_size, n_embd, bits, group_size, scale_bits, bandwidth):
    weights = block_weights + vocab_size * n_embd
    return bandwidth * 8e9 / (weights * bits + weights / group_size * scale_bits)


@answer
def grouped_dot_source():
    """Group after group over all rows, in whole numbers of 64 bits."""
    return """
#include <stdint.h>
void grouped_matvec(const int8_t *w, const float *w_scale, const int8_t *x,
                    const float *x_scale, float *y, int rows, int columns) {
    for (long row = 0; row < rows; row++)
        y[row] = 0;
    for (long at = 0; at < (long)rows * columns; at += 32) {
        long row = at / columns, group = at % columns / 32;
        int64_t products = 0;
        for (int i = 31; i >= 0; i--)
            products += (int64_t)w[at + i] * x[32 * group + i];
        y[row] += (float)((double)w_scale[at / 32] * x_scale[group] * products);
    }
}
"""


@answer
def share(pieces, work, threads):
    """By the standard library's pool, which the task forbids."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(pieces)))


# ---- week 9


@answer
def first_values(noise_a, noise_b):
    return (noise_a * noise_a.size(1) ** (-0.5), 0 * noise_b)


@answer
def lora_output(x, weight, a, b, alpha):
    """With the adapter merged into the weight."""
    return F.linear(x, weight + alpha * (b @ a) / a.shape[0])


@answer
def lora_step(x, grad, weight, a, b, scale, lr):
    """By autograd."""
    a = a.clone().requires_grad_()
    b = b.clone().requires_grad_()
    F.linear(x, weight + scale * b @ a).backward(grad)
    return weight, (a - lr * a.grad).detach(), (b - lr * b.grad).detach()


@answer
def merge_once(weight, a, b, scale, merged):
    if merged:
        return weight, True
    return weight + scale * torch.einsum("or,ri->oi", b, a), True


@answer
def alpha_for_rank(alpha, r, new_r, use_rslora):
    power = 0.5 if use_rslora else 1
    return alpha / r**power * new_r**power


@answer
def dora_weight(weight, a, b, scale, magnitude):
    return magnitude[:, None] * F.normalize(torch.addmm(weight, b, a, alpha=scale), dim=1)


@answer
def answer_targets(prompt, answer, length):
    """Token by token."""
    text = prompt.tolist() + answer.tolist()
    pairs = [(text[t], text[t + 1] if t + 1 >= len(prompt) else -100) for t in range(len(text) - 1)]
    pairs += [(0, -100)] * (length - len(pairs))
    inputs, targets = zip(*pairs)
    return torch.tensor(inputs), torch.tensor(targets)


@answer
def join_adapters(a1, b1, a2, b2, factors):
    row_factors = torch.tensor(factors).repeat_interleave(len(a1))
    return row_factors[:, None] * torch.vstack([a1, a2]), torch.hstack([b1, b2])


@answer
def answer_labels(parts, end, block_size):
    """By the course's rows, one text in each."""
    ids, mask = [], []
    for part, is_answer in parts:
        ids += [*part, *end] if is_answer else part
        mask += [is_answer] * (len(ids) - len(mask))
    rows = lay_out([[EncodedTalk(ids, mask)]])
    return rows.ids[0, :block_size], rows.targets[0, :block_size]


@answer
def pack_examples(examples, block_size):
    """By the course's packing, which knows texts by their number."""
    examples = [(ids.tolist(), labels.tolist()) for ids, labels in examples if len(ids) <= block_size]
    talks = [
        EncodedTalk([*ids, max(labels[-1], 0)], [False, *(label != IGNORED for label in labels)])
        for ids, labels in examples
    ]
    order = pack([len(ids) for ids, _ in examples], range(len(examples)), block_size)
    if not order:
        empty = torch.zeros(0, block_size, dtype=torch.int64)
        return empty, empty, empty, torch.zeros(0, block_size, block_size, dtype=torch.bool)
    rows = lay_out([[talks[i] for i in row] for row in order])
    room = (0, block_size - rows.ids.size(1))
    packed = Packed(F.pad(rows.texts, room))
    targets = F.pad(rows.targets, room, value=IGNORED)
    mask = packed.mask(block_size, None).squeeze(1)
    return F.pad(rows.ids, room), targets, packed.positions(block_size), mask


@answer
class LoRALinear(nn.Module):
    """By F.linear; A drawn by torch.rand; merged, the weight's data are others."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        for parameter in base.parameters():
            parameter.requires_grad = False
        spread = torch.rand(r, base.in_features) * 2 - 1
        self.lora_A = nn.Parameter(spread / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        self.factor = alpha / r
        self.p = dropout
        self.kept = []

    def forward(self, x):
        out = F.linear(x, self.base.weight, self.base.bias)
        if not self.kept:
            thin = F.linear(F.dropout(x.float(), self.p, self.training), self.lora_A)
            out = out + F.linear(thin * self.factor, self.lora_B).type_as(out)
        return out

    def merge(self):
        if not self.kept:
            self.kept.append(self.base.weight.data)
            change = (self.lora_B.data @ self.lora_A.data) * self.factor
            self.base.weight.data = (self.kept[0].float() + change).type_as(self.kept[0])

    def unmerge(self):
        while self.kept:
            self.base.weight.data = self.kept.pop()


# ---- week 10


@answer
def answer_logprobs(logits, ids, mask):
    distribution = torch.distributions.Categorical(logits=logits[:, :-1])
    logp = distribution.log_prob(ids[:, 1:])
    return torch.stack([row[row_mask].sum() for row, row_mask in zip(logp, mask[:, 1:])])


@answer
def preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """As softmax over two rewards."""
    rewards = beta * torch.stack([policy_chosen - ref_chosen, policy_rejected - ref_rejected], dim=1)
    return F.cross_entropy(rewards, torch.zeros(len(rewards), dtype=torch.long), reduction="none")


@answer
def kl_k3(logp, ref_logp):
    return torch.expm1(ref_logp - logp) + logp - ref_logp


@answer
def penalised_rewards(scores, logp, ref_logp, mask, beta):
    rewards = torch.zeros(mask.shape)
    for row, row_mask in enumerate(mask):
        places = row_mask.nonzero().flatten()
        rewards[row, places] = beta * (ref_logp - logp)[row, places]
        rewards[row, places[-1]] += scores[row]
    return rewards


@answer
def advantages_and_returns(rewards, values, gamma, lam):
    """The O(T²) sum, as a product with a matrix of powers."""
    time = rewards.size(1)
    next_values = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)
    delta = rewards + gamma * next_values - values
    steps = torch.arange(time) - torch.arange(time)[:, None]
    powers = torch.where(steps >= 0, (gamma * lam) ** steps.double(), 0)
    advantages = (delta.double() @ powers.T).float()
    return advantages, advantages + values


@answer
def whitened_advantages(advantages, mask):
    inside = np.ma.array(advantages.numpy(), mask=~mask.numpy())
    return torch.from_numpy(((inside - inside.mean()) / inside.std(ddof=1)).filled(0)).float()


@answer
def clipped_policy_loss(logp, old_logp, advantages, clip):
    """By cases: a good token gains up to 1 + clip, a bad one loses down to 1 - clip."""
    ratio = torch.exp(logp) / torch.exp(old_logp)
    clipped = torch.where(advantages > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip))
    return -(clipped * advantages).mean()


@answer
def group_relative_advantages(scores, group_size):
    return torch.cat([(group - group.mean()) / (group.std() + 1e-4) for group in scores.split(group_size)])


@answer
def first_gradient(logits, ids, advantages, ref_logp, beta):
    """By hand: each log-probability's weight, times onehot - softmax."""
    p = logits.softmax(-1)
    logp = p.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()
    weight = (-advantages + beta * (1 - (ref_logp - logp).exp())) / ids.numel()
    return weight.unsqueeze(-1) * (F.one_hot(ids, logits.size(-1)) - p)
