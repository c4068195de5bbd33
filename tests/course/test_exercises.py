"""The exercises of weeks 1 to 12, and shared/course/exercise.py, which grades them."""

import codecs
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain, count, pairwise, takewhile
from unittest.mock import patch

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from shared.course import exercise as grader
from shared.course.exercise import Exercise, Mistake, Week, difference, grade, read_progress
from shared.models.attention import CausalSelfAttention
from shared.models.gpt import GPT, MLP, Block, GPTConfig
from shared.runtime import ROOT
from shared.training.optim import build_optimizers

WEEKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
SEEDS = (0, 1, 2, 3)
EXERCISES = {e.name: e for n in WEEKS for e in Week(n).exercises.values()}
ALL = pytest.mark.parametrize("name", EXERCISES)


# ---- what is in them


@pytest.mark.parametrize("number", WEEKS)
def test_a_week_has_enough(number):
    exercises = Week(number).exercises
    assert len(exercises) >= 5
    for e in exercises.values():
        assert len(e.mistakes) >= 3 and len(e.hints) == 3, e.name
        assert len({m.name for m in e.mistakes}) == len(e.mistakes), e.name
        assert len(set(e.hints)) == 3, e.name
        assert 5 <= len(e.cases(torch.Generator().manual_seed(0))) <= 10, e.name
        for text in (e.task, *e.hints, *(m.why for m in e.mistakes)):
            assert text.strip() == text and text[-1] in ".?", (e.name, text)


def test_no_name_occurs_twice():
    assert sum(len(Week(n).exercises) for n in WEEKS) == len(EXERCISES) == 81


@ALL
def test_stubs_run_and_are_not_attempted(name):
    namespace = {"np": np, "torch": torch}
    exec(EXERCISES[name].stub, namespace)  # the names that solutions.py imports are enough for the signature
    assert grade(EXERCISES[name], namespace[name]).status == "not attempted"
    assert all(
        p.annotation is not inspect.Parameter.empty
        for p in inspect.signature(EXERCISES[name].reference).parameters.values()
    )


@ALL
def test_cases_are_the_same_for_a_seed(name):
    first, again, other = (EXERCISES[name].cases(torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert grader.same(list(map(tuple, first)), list(map(tuple, again)), 0)
    assert not grader.same(list(map(tuple, first)), list(map(tuple, other)), 0)


# ---- the right answers and the wrong ones


@ALL
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_solves_it(name, seed):
    assert grade(EXERCISES[name], EXERCISES[name].reference, seed).status == "solved"


@pytest.mark.parametrize(
    "name, mistake",
    [(e.name, m) for e in EXERCISES.values() for m in e.mistakes],
    ids=lambda p: getattr(p, "name", p),
)
def test_a_mistake_is_recognised(name, mistake):
    for seed in SEEDS:
        verdict = grade(EXERCISES[name], mistake.function, seed)
        assert (verdict.status, verdict.mistake) == ("wrong", mistake.name), seed
        assert mistake.name in verdict.message and mistake.why in verdict.message


# An answer to each by another way than the reference's: PyTorch's own function, this course's module, or a
# plain loop.


def _count_pairs(tokens, vocab_size):
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist()):
        counts[a, b] += 1
    return counts


def _row_probabilities(counts, smoothing):
    smoothed = counts + smoothing
    return smoothed / smoothed.sum(dim=1, keepdim=True)


def _token_loss(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()


def _token_loss_stable(logits, targets):
    powers = (logits - logits.max(-1, keepdim=True).values).exp()
    p = powers / powers.sum(-1, keepdim=True)
    return -torch.stack(
        [p[b, t, targets[b, t]].log() for b in range(p.size(0)) for t in range(p.size(1))]
    ).mean()


def _inputs_and_targets(tokens, starts, block_size):
    cut = lambda a: torch.from_numpy(tokens[a : a + block_size].astype(np.int64))
    return torch.stack([cut(s) for s in starts]), torch.stack([cut(s + 1) for s in starts])


def _temperature_probabilities(logits, temperature):
    powers = logits.softmax(-1) ** (1 / temperature)
    return powers / powers.sum(-1, keepdim=True)


def _context_windows(idx, window, padding):
    padded = torch.cat([torch.full((idx.size(0), window - 1), padding), idx], dim=1)
    return torch.stack([padded[:, t : t + window] for t in range(idx.size(1))], dim=1)


def _logit_gradient(logits, targets):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits)[0]


def _learning_rate(step, steps, warmup_steps, peak, final_fraction):
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def _clip_gradients(gradients, max_norm):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    return [p.grad for p in parameters]


def _adamw_step(weight, gradient, first, second, step, lr, beta1, beta2, eps, weight_decay):
    p = nn.Parameter(weight.clone())
    p.grad = gradient.clone()
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    optimizer.state[p] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": first.clone(),
        "exp_avg_sq": second.clone(),
    }
    optimizer.step()
    return p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]


def _multi_head_attention(x, q_weight, k_weight, v_weight, o_weight, n_head):
    layer = CausalSelfAttention(x.size(-1), n_head)
    layer.load_state_dict(
        {f"{n}_proj.weight": w for n, w in zip("qkvo", (q_weight, k_weight, v_weight, o_weight))}
    )
    return layer(x).detach()


def _rotate(x, start, theta):
    """As a product of complex numbers."""
    a, b = x.double().chunk(2, dim=-1)
    angle = torch.arange(start, start + x.size(2)).double()[:, None] * theta ** (
        -torch.arange(0, x.size(3), 2).double() / x.size(3)
    )
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).float()


def _gated_mlp(x, gate_weight, up_weight, down_weight):
    mlp = MLP(GPTConfig(n_head=1, n_embd=x.size(-1), mlp="swiglu", mlp_hidden=up_weight.size(0), bias=False))
    mlp.load_state_dict(
        {"gate_proj.weight": gate_weight, "up_proj.weight": up_weight, "down_proj.weight": down_weight}
    )
    return mlp(x).detach()


def _mlp_sublayer(x, up_weight, down_weight):
    block = Block(
        GPTConfig(n_head=1, n_embd=x.size(-1), mlp="gelu", mlp_hidden=up_weight.size(0), bias=False)
    )
    nn.init.zeros_(block.attn.o_proj.weight)  # the attention half adds nothing
    block.mlp.load_state_dict({"up_proj.weight": up_weight, "down_proj.weight": down_weight})
    return block(x, None, None, 0).detach()


def _decode_step(q, k, v, past_k, past_v):
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values), keys, values


def _count_parameters(vocab_size, block_size, n_layer, n_embd):
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size, block_size, n_layer, 1, n_embd)).num_parameters()


def _window_mask(time, window):
    return torch.tensor([[i - window < j <= i for j in range(time)] for i in range(time)])


def _pair_counts(words):
    """By writing the pairs down as often as they occur."""
    return dict(
        Counter(chain.from_iterable(list(zip(word, word[1:])) * times for word, times in words.items()))
    )


def _merge_pair(tokens, pair):
    """With a stack."""
    out, fresh = [], False
    for token in tokens:
        fresh = bool(out) and not fresh and (out[-1], token) == pair
        out = [*out[:-1], out[-1] + token] if fresh else [*out, token]
    return out


def _learn_merges(words, n):
    pieces, merges = {tuple(bytes([b]) for b in word.encode()): times for word, times in words.items()}, []
    for _ in range(n):
        counts = _pair_counts(pieces)
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        pieces = {tuple(_merge_pair(word, merges[-1])): times for word, times in pieces.items()}
    return merges


def _encode_piece(piece, merges):
    """tiktoken, with ranks in the order of the merges."""
    tokens = dict.fromkeys([*(bytes([i]) for i in range(256)), *(a + b for a, b in merges)])
    theirs = tiktoken.Encoding(
        "piece", pat_str=r"(?s).+", mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={}
    )
    return [theirs.decode_single_token_bytes(i) for i in theirs.encode_ordinary(piece)]


def _decode_ids(ids, vocab):
    """Byte by byte, as a stream is decoded."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return "".join(decoder.decode(vocab[i]) for i in ids) + decoder.decode(b"", final=True)


def _initial_std(name, shape, n_layer):
    """Measured in our GPT, whose random numbers are replaced by as many +std as -std."""

    @torch.no_grad()
    def draw(tensor, mean=0.0, std=1.0):
        return tensor.copy_(std * torch.tensor([1.0, -1.0]).repeat(tensor.numel() // 2).view_as(tensor))

    with patch.object(nn.init, "normal_", draw):
        model = GPT(GPTConfig(vocab_size=4, block_size=4, n_layer=n_layer, n_head=1, n_embd=4))
    return model.get_parameter(name).std(correction=0).item()


def _decay_groups(shapes):
    """As the Trainer's optimizer has them."""
    model = nn.ParameterList(torch.zeros(shape) for shape in shapes.values())
    (optimizer,) = build_optimizers(model, "adamw", lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = [(name, decay[id(p)]) for name, p in zip(shapes, model)]
    return [n for n, d in names if d == 0.1], [n for n, d in names if d == 0]


def _accumulated_gradient(weight, batches):
    """Without backward: probabilities less the truth, times the inputs, over all examples at once."""
    x, y = (torch.cat(parts) for parts in zip(*batches))
    return ((x @ weight.T).softmax(-1) - F.one_hot(y, len(weight))).T @ x / len(y)


def _split_c_attn(weight, bias, n_head):
    """What Hugging Face's layer itself makes of the unit vectors, and of 0."""
    layer = Conv1D(weight.size(1), weight.size(0))
    layer.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        zero = layer(torch.zeros(1, len(weight)))
        columns = layer(torch.eye(len(weight))) - zero
    n = len(weight)
    return *(columns[:, i * n : (i + 1) * n].T for i in range(3)), *(
        zero[0, i * n : (i + 1) * n] for i in range(3)
    )


def _pack_documents(documents, end_of_text, block_size):
    """Row by row, each fed from the stream."""
    stream = chain.from_iterable([end_of_text, *document] for document in documents)
    rows, row = [], [next(stream)]
    for token in stream:
        row.append(token)
        if len(row) == block_size + 1:
            rows.append(row)
            row = [token]
    return torch.tensor([r[:-1] for r in rows]), torch.tensor([r[1:] for r in rows])


def _score_choices(logits, ids, n_context, choices):
    losses = [
        F.cross_entropy(x[n_context - 1 : -1], row[n_context:], reduction="sum").item()
        for x, row in zip(logits, ids)
    ]
    scores = [-loss / len(text) for loss, text in zip(losses, choices)]
    return scores, max(range(len(scores)), key=scores.__getitem__)


def _mfu(n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size, block_size, n_layer, 1, n_embd))
    return model.flops_per_token(block_size) * tokens_per_second / peak_flops


def _autocast_dtypes(program, inputs, dtype):
    """What PyTorch itself answers on a GPU: tensors that have a device and a dtype but no numbers need none."""
    operations = {
        "linear": F.linear,
        "matmul": torch.matmul,
        "add": torch.add,
        "mul": torch.mul,
        "gelu": F.gelu,
        "sum": torch.sum,
        "softmax": lambda x: x.softmax(-1),
        "layer_norm": lambda x: F.layer_norm(x, (4,)),
        "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64, device="cuda")),
        "embedding": lambda x: F.embedding(torch.zeros(4, dtype=torch.int64, device="cuda"), x),
    }
    dtypes = dict(inputs)
    missing, able = "torch.cuda.amp.common.amp_definitely_not_available", "torch.cuda.is_bf16_supported"
    with (
        patch(missing, lambda: False),
        patch(able, lambda: True),
        FakeTensorMode(),
        torch.autocast("cuda", dtype),
    ):
        for result, operation, names in program:
            dtypes[result] = operations[operation](
                *(torch.zeros(4, 4, dtype=dtypes[n], device="cuda") for n in names)
            ).dtype
    return [dtypes[result] for result, _, _ in program]


def _bf16_product(a, b):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(a, b.T)


def _scaler_step(gradients, dtype, scale, good_steps, max_norm, growth_interval):
    """As torch.amp.GradScaler does it."""
    parameters, received = [nn.Parameter(torch.zeros_like(g)) for g in gradients], []
    for p, g in zip(parameters, gradients):
        p.grad = g.clone()
    optimizer = torch.optim.SGD(parameters)
    optimizer.register_step_pre_hook(lambda *_: received.extend(p.grad for p in parameters))
    scaler = torch.amp.GradScaler(
        "cpu", scale, growth_interval=growth_interval, enabled=dtype == torch.float16
    )
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": good_steps})
    scaler.scale(torch.zeros(()))  # from here on it has its scale in a tensor
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, max_norm)
    scaler.step(optimizer)
    scaler.update()
    state = scaler.state_dict()
    return received, state.get("scale", scale), state.get("_growth_tracker", good_steps)


def _state_bytes(parameters, precision, moments):
    """A layer of 64 weights after a step, its bytes counted."""
    layer = nn.Linear(8, 8, bias=False).to(
        torch.bfloat16 if precision in ("bfloat16", "master") else torch.float32
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        layer(torch.ones(1, 8, dtype=layer.weight.dtype)).sum().backward()
    trained = nn.Parameter(layer.weight.detach().float()) if precision == "master" else layer.weight
    weights = [layer.weight] if trained is layer.weight else [layer.weight, trained]
    gradient = layer.weight.grad
    trained.grad = gradient.to(trained.dtype)
    optimizer = (
        torch.optim.SGD([trained]),
        torch.optim.SGD([trained], momentum=0.9),
        torch.optim.AdamW([trained]),
    )[moments]
    optimizer.step()
    kept = [t for t in optimizer.state[trained].values() if t is not None and t.shape == trained.shape]
    return tuple(parameters * sum(t.nbytes for t in part) // 64 for part in (weights, [gradient], kept))


def _largest_batch(fits, limit):
    tried = []

    def between(low, high):
        tried.append((low + high) // 2)
        rest = (tried[-1], high) if fits(tried[-1]) else (low, tried[-1])
        return rest[0] if rest[1] - rest[0] == 1 else between(*rest)

    for low, high in pairwise([0, *takewhile(lambda n: n < limit, (2**i for i in count())), limit]):
        tried.append(high)
        if not fits(high):
            return (low if high - low == 1 else between(low, high)), tried
    return limit, tried


def _absmax_int8(weight):
    """By PyTorch's own rounding to int8 and back."""
    scales = weight.norm(math.inf, dim=1) / 127
    back = torch.fake_quantize_per_channel_affine(
        weight, scales, torch.zeros(len(weight), dtype=torch.int32), 0, -127, 127
    )
    return (back / scales[:, None]).round().to(torch.int8), scales


def _int4_groups(weight, group_size, clip):
    """Group by group: the nearest of 16 values, written out."""
    codes, scales, minima = [], [], []
    for group in weight.flatten().split(group_size):
        low, high = clip * group.min(), clip * group.max()
        codes.append((group[:, None] - torch.linspace(low, high, 16)).abs().argmin(1))
        scales.append((high - low) / 15)
        minima.append(low)
    rows = len(weight)
    return (
        torch.cat(codes).to(torch.uint8).view_as(weight),
        torch.stack(scales).view(rows, -1),
        torch.stack(minima).view(rows, -1),
    )


def _pack_int4(codes):
    """By way of hexadecimal digits."""
    rows = [
        bytes.fromhex("".join(f"{high + 8:x}{low + 8:x}" for low, high in zip(row[::2], row[1::2])))
        for row in codes.tolist()
    ]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)


def _nf4_codes(weight, block_size, levels):
    absmax = torch.stack([block.abs().max() for block in weight.split(block_size)])
    nearest = [
        min(range(16), key=lambda i: abs(levels[i] * absmax[n // block_size] - w))
        for n, w in enumerate(weight)
    ]
    return torch.tensor(nearest, dtype=torch.uint8), absmax


def _int8_linear(x, x_scales, codes, scales, bias):
    """In floating point, twice as fine."""
    return F.linear(x.double() * x_scales[:, None], codes * scales[:, None].double(), bias.double()).float()


def _gptq_step(weight, column, hessian, scales):
    """Without the inverse: the change of the later columns for which the loss, the change times the Hessian
    times the change, is least.
    """
    codes = torch.minimum(
        torch.maximum((weight[:, column] / scales).round(), torch.tensor(-8)), torch.tensor(7)
    )
    change = codes * scales - weight[:, column]
    later = slice(column + 1, None)
    new = weight.clone()
    new[:, column] += change
    new[:, later] -= change[:, None] * torch.linalg.solve(hessian[later, later], hessian[later, column])
    return new


def _decode_limit(block_weights, vocab_size, n_embd, bits, group_size, scale_bits, bandwidth):
    weights = block_weights + vocab_size * n_embd
    return bandwidth * 8e9 / (weights * bits + weights / group_size * scale_bits)


def _lora_output(x, weight, a, b, alpha):
    """With the adapter merged into the weight."""
    return F.linear(x, weight + alpha * (b @ a) / a.shape[0])


def _lora_step(x, grad, weight, a, b, scale, lr):
    """By autograd."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    F.linear(x, weight + scale * b @ a).backward(grad)
    return weight, (a - lr * a.grad).detach(), (b - lr * b.grad).detach()


def _merge_once(weight, a, b, scale, merged):
    return weight + (0 if merged else 1) * scale * torch.einsum("or,ri->oi", b, a), True


def _dora_weight(weight, a, b, scale, magnitude):
    return magnitude[:, None] * F.normalize(torch.addmm(weight, b, a, alpha=scale), dim=1)


def _answer_targets(prompt, answer, length):
    """Token by token."""
    text = prompt.tolist() + answer.tolist()
    pairs = [(text[t], text[t + 1] if t + 1 >= len(prompt) else -100) for t in range(len(text) - 1)]
    pairs += [(0, -100)] * (length - len(pairs))
    inputs, targets = zip(*pairs)
    return torch.tensor(inputs), torch.tensor(targets)


def _join_adapters(a1, b1, a2, b2, factors):
    return torch.tensor(factors).repeat_interleave(len(a1))[:, None] * torch.vstack([a1, a2]), torch.hstack(
        [b1, b2]
    )


def _answer_logprobs(logits, ids, mask):
    distribution = torch.distributions.Categorical(logits=logits[:, :-1])
    return torch.stack([row[told].sum() for row, told in zip(distribution.log_prob(ids[:, 1:]), mask[:, 1:])])


def _preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """As softmax over two rewards."""
    rewards = beta * torch.stack([policy_chosen - ref_chosen, policy_rejected - ref_rejected], dim=1)
    return F.cross_entropy(rewards, torch.zeros(len(rewards), dtype=torch.long), reduction="none")


def _penalised_rewards(scores, logp, ref_logp, mask, beta):
    rewards = torch.zeros(mask.shape)
    for row, told in enumerate(mask):
        places = told.nonzero().flatten()
        rewards[row, places] = beta * (ref_logp - logp)[row, places]
        rewards[row, places[-1]] += scores[row]
    return rewards


def _advantages_and_returns(rewards, values, gamma, lam):
    """The O(T²) sum, as a product with a matrix of powers."""
    time = rewards.size(1)
    delta = rewards + gamma * torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1) - values
    steps = torch.arange(time) - torch.arange(time)[:, None]
    advantages = (delta.double() @ torch.where(steps >= 0, (gamma * lam) ** steps.double(), 0).T).float()
    return advantages, advantages + values


def _whitened_advantages(advantages, mask):
    inside = np.ma.array(advantages.numpy(), mask=~mask.numpy())
    return torch.from_numpy(((inside - inside.mean()) / inside.std(ddof=1)).filled(0)).float()


def _clipped_policy_loss(logp, old_logp, advantages, clip):
    """By cases: a good token gains up to 1 + clip, a bad one loses down to 1 - clip."""
    ratio = torch.exp(logp) / torch.exp(old_logp)
    return -(
        torch.where(advantages > 0, ratio.clamp(max=1 + clip), ratio.clamp(min=1 - clip)) * advantages
    ).mean()


def _group_relative_advantages(scores, group_size):
    return torch.cat([(group - group.mean()) / (group.std() + 1e-4) for group in scores.split(group_size)])


def _first_gradient(logits, ids, advantages, ref_logp, beta):
    """By hand: each log-probability's weight, times onehot - softmax."""
    p = logits.softmax(-1)
    logp = p.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()
    weight = (-advantages + beta * (1 - (ref_logp - logp).exp())) / ids.numel()
    return weight.unsqueeze(-1) * (F.one_hot(ids, logits.size(-1)) - p)


def _window_spans(tokens, size, overlap):
    """Counted first: after the first window each one brings size - overlap new tokens."""
    windows = 1 + max(0, math.ceil((tokens - size) / (size - overlap))) if tokens else 0
    return [(i * (size - overlap), min(i * (size - overlap) + size, tokens)) for i in range(windows)]


def _bm25_scores(counts, question, k1, b):
    """Text by text and term by term."""
    n, mean, scores = len(counts), counts.sum() / len(counts), []
    for text in counts:
        score = 0.0
        for term in question.tolist():
            df = sum(other[term] > 0 for other in counts).item()
            score += (
                math.log1p((n - df + 0.5) / (df + 0.5))
                * text[term]
                / (text[term] + k1 * (1 - b + b * text.sum() / mean))
            )
        scores.append(float(score))
    return torch.tensor(scores)


def _fused_scores(places, k):
    return torch.tensor(
        [sum(1 / (k + p) for p in column if p) for column in places.T.tolist()], dtype=torch.float32
    )


def _ndcg(gains, all_gains, k):
    discount = 1 / np.log2(np.arange(2, k + 2))
    cut = lambda values: np.pad(np.array(values, float), (0, k))[:k]
    return float(cut(gains) @ discount / (cut(sorted(all_gains)[::-1]) @ discount))


def _word_f1(answer, right):
    common = sum(min(answer.count(word), right.count(word)) for word in set(answer))
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(right)
    return 2 * precision * recall / (precision + recall)


def _store_keys(cache, lengths, new):
    """Row by row."""
    rows = [
        torch.cat([row[:n], key[None], row[n + 1 :]]) for row, n, key in zip(cache, lengths.tolist(), new)
    ]
    return (
        torch.stack(rows),
        lengths + 1,
        torch.tensor([[place <= n for place in range(cache.size(1))] for n in lengths.tolist()]),
    )


def _row_probabilities_at(logits, temperatures):
    rows = [
        (row / t).softmax(0) if t else F.one_hot(row.argmax(), len(row)).float()
        for row, t in zip(logits, temperatures.tolist())
    ]
    return torch.stack(rows)


def _next_slots(slots, waiting, ended, cancelled):
    gone, queue = set(ended) | set(cancelled), [w for w in waiting if w not in cancelled]
    free = [i for i, s in enumerate(slots) if not s or s in gone]
    given = dict(zip(free, queue + [""] * len(free)))
    return [given.get(i, s) for i, s in enumerate(slots)], queue[len(free) :]


def _reusable_tokens(prompt, kept, chunk):
    """Chunk by chunk."""
    return chunk * sum(
        1
        for _ in takewhile(
            lambda end: prompt[:end] == kept[:end], range(chunk, min(len(prompt), len(kept) + 1), chunk)
        )
    )


def _decoded_pieces(chunks):
    """By hand: the bytes of a character that is not whole wait."""
    held, pieces = b"", []
    for chunk in chunks:
        held += chunk
        text = held.decode(errors="ignore")
        pieces.append(text)
        held = held[len(text.encode()) :]
    return [*pieces, "\N{REPLACEMENT CHARACTER}" if held else ""]


def _shown_pieces(pieces, stop):
    """How much of the whole text may be known after each piece."""
    texts, ends = ["".join(pieces[: i + 1]) for i in range(len(pieces))], []
    for text in texts:
        at = text.find(stop)
        ends.append(at if at >= 0 else next(i for i in range(len(text) + 1) if stop.startswith(text[i:])))
    ends.append(ends[-1] if stop in texts[-1] else len(texts[-1]))
    return [texts[-1][a:b] for a, b in pairwise([0, *ends])]


def _event_data(chunks):
    """Line by line, as the specification has it."""
    found, data = [], []
    *lines, _ = b"".join(chunks).decode().split("\n")
    for line in lines:
        if not line:
            found += ["\n".join(data)] if data else []
            data = []
        elif line.startswith("data:"):
            data.append(line[6:] if line[5:6] == " " else line[5:])
    return found


def _delay_percentile(times, q):
    return float(np.quantile(np.concatenate([np.diff(text) for text in times]), q, method="inverted_cdf"))


OTHER_ANSWERS = {
    "count_pairs": _count_pairs,
    "row_probabilities": _row_probabilities,
    "token_loss": _token_loss,
    "loss_in_bits_per_byte": (
        lambda loss, tokens, text_bytes: math.log2(math.e) * (loss * tokens) / text_bytes
    ),
    "inputs_and_targets": _inputs_and_targets,
    "temperature_probabilities": _temperature_probabilities,
    "context_windows": _context_windows,
    "scaled_weights": lambda noise, gain: noise * math.sqrt(gain**2 / noise.shape[1]),
    "logit_gradient": _logit_gradient,
    "learning_rate": _learning_rate,
    "clip_gradients": _clip_gradients,
    "adamw_step": _adamw_step,
    "average_past": lambda x: torch.stack([x[:, : t + 1].mean(dim=1) for t in range(x.size(1))], dim=1),
    "causal_weights": (
        lambda scores: scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf")).softmax(
            -1
        )
    ),
    "causal_attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "split_heads": lambda x, n_head: torch.stack(x.chunk(n_head, dim=-1), dim=1),
    "sliding_window_mask": _window_mask,
    "multi_head_attention": _multi_head_attention,
    "layer_norm": (
        lambda x, weight, bias, eps: (
            (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + eps) * weight + bias
        )
    ),
    "rotate": _rotate,
    "gated_mlp": _gated_mlp,
    "mlp_sublayer": _mlp_sublayer,
    "decode_step": _decode_step,
    "count_parameters": _count_parameters,
    "pair_counts": _pair_counts,
    "merge_pair": _merge_pair,
    "learn_merges": _learn_merges,
    "cut": lambda text: re.findall(
        r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text
    ),
    "encode_piece": _encode_piece,
    "decode_ids": _decode_ids,
    "initial_std": _initial_std,
    "decay_groups": _decay_groups,
    "accumulated_gradient": _accumulated_gradient,
    "split_c_attn": _split_c_attn,
    "pack_documents": _pack_documents,
    "score_choices": _score_choices,
    "mfu": _mfu,
    "round_to_bf16": lambda x: x.bfloat16().float(),
    "autocast_dtypes": _autocast_dtypes,
    "bf16_product": _bf16_product,
    "scaler_step": _scaler_step,
    "state_bytes": _state_bytes,
    "largest_batch": _largest_batch,
    "absmax_int8": _absmax_int8,
    "int4_groups": _int4_groups,
    "pack_int4": _pack_int4,
    "nf4_codes": _nf4_codes,
    "int8_linear": _int8_linear,
    "gptq_step": _gptq_step,
    "decode_limit": _decode_limit,
    "first_values": lambda noise_a, noise_b: (noise_a * noise_a.size(1) ** -0.5, 0 * noise_b),
    "lora_output": _lora_output,
    "lora_step": _lora_step,
    "merge_once": _merge_once,
    "alpha_for_rank": (
        lambda alpha, r, new_r, use_rslora: (
            alpha / r ** (0.5 + 0.5 * (not use_rslora)) * new_r ** (0.5 + 0.5 * (not use_rslora))
        )
    ),
    "dora_weight": _dora_weight,
    "answer_targets": _answer_targets,
    "join_adapters": _join_adapters,
    "answer_logprobs": _answer_logprobs,
    "preference_loss": _preference_loss,
    "kl_k3": lambda logp, ref_logp: torch.expm1(ref_logp - logp) + logp - ref_logp,
    "penalised_rewards": _penalised_rewards,
    "advantages_and_returns": _advantages_and_returns,
    "whitened_advantages": _whitened_advantages,
    "clipped_policy_loss": _clipped_policy_loss,
    "group_relative_advantages": _group_relative_advantages,
    "first_gradient": _first_gradient,
    "window_spans": _window_spans,
    "bm25_scores": _bm25_scores,
    "mean_embedding": lambda states, mask: F.normalize(
        torch.stack([s[m].mean(0) for s, m in zip(states, mask)]), dim=1
    ),
    "fused_scores": _fused_scores,
    "ndcg": _ndcg,
    "word_f1": _word_f1,
    "store_keys": _store_keys,
    "row_probabilities_at": _row_probabilities_at,
    "next_slots": _next_slots,
    "reusable_tokens": _reusable_tokens,
    "decoded_pieces": _decoded_pieces,
    "shown_pieces": _shown_pieces,
    "event_data": _event_data,
    "delay_percentile": _delay_percentile,
}


@ALL
def test_another_right_answer_solves_it(name):
    for seed in SEEDS[:2]:
        verdict = grade(EXERCISES[name], OTHER_ANSWERS[name], seed)
        assert verdict.status == "solved", verdict.message


def test_a_loss_that_cannot_overflow_is_right():
    assert grade(EXERCISES["token_loss"], _token_loss_stable).status == "solved"


# ---- what the grader says


def average_past(x): ...


def _not_written(x):
    """The mean of the past."""
    raise NotImplementedError


def _only_pass(x):
    pass


def _documented(x):
    """The mean of the past."""
    ...


@pytest.mark.parametrize("function", [average_past, _not_written, _only_pass, _documented, lambda x: ...])
def test_an_untouched_stub_is_not_attempted(function):
    verdict = grade(EXERCISES["average_past"], function)
    assert verdict.status == "not attempted" and "average_past" in verdict.message and verdict.mistake is None


def _crashes(x):
    y = x.mean(dim=1)
    return y.view(7, 7, 7)  # the learner's own line


def _crashes_inside_torch(x):
    return F.layer_norm(x, (99,))


def _misses_an_argument():
    return 0


@pytest.mark.parametrize(
    "function, words",
    [
        (_crashes, ["crashed on case 1", "of shape [2, 5, 3]", "return y.view(7, 7, 7)", "RuntimeError"]),
        (_crashes_inside_torch, ["return F.layer_norm(x, (99,))", "RuntimeError", "99"]),
        (_misses_an_argument, ["TypeError", "positional argument"]),
        (lambda x: print(end=""), ["None", "`return`"]),
        (lambda x: x.tolist(), ["expected a tensor", "float32"]),
        (lambda x: OTHER_ANSWERS["average_past"](x).double(), ["dtype", "torch.float64", "torch.float32"]),
        (
            lambda x: OTHER_ANSWERS["average_past"](x).transpose(1, 2),
            ["expected shape [2, 5, 3], got [2, 3, 5]", "transpose"],
        ),
        (
            lambda x: OTHER_ANSWERS["average_past"](x).flatten(),
            ["expected shape [2, 5, 3], got [30]", "reshape"],
        ),
        (lambda x: x.mean(dim=1), ["got [2, 3]", "keepdim"]),
        (lambda x: x / 0, ["nan or inf"]),
        (lambda x: x * 0, ["values differ", "expected"]),
    ],
)
def test_what_is_wrong_is_said(function, words):
    verdict = grade(EXERCISES["average_past"], function)
    assert verdict.status == "wrong" and verdict.mistake is None
    for word in words:
        assert word in verdict.message, verdict.message


def test_what_differs_is_counted_by_the_exercises_own_tolerance():
    inf = math.inf
    x, y = torch.tensor([inf, 1.0, 2.0, 1e-9]), torch.tensor([inf, 1.0, 2.5, 2e-9])
    assert (
        difference(y, x, 1e-5)
        == "shape and dtype are right, but 1 of 4 values differ, most at [2]: 2.5, expected 2."
    )
    assert "2 of 4 values differ, most at [2]" in difference(y, x, 0)
    assert "1 of 4 values differ, most at [0]: inf, expected -inf" in difference(
        x, torch.tensor([-inf, 1.0, 2.0, 1e-9])
    )


def test_the_line_of_a_crash_is_the_learners():
    line = inspect.getsourcelines(_crashes)[1] + 2
    assert f"line {line}: " in grade(EXERCISES["average_past"], _crashes).message


@pytest.mark.parametrize(
    "name, function, words",
    [
        (
            "loss_in_bits_per_byte",
            lambda loss, tokens, text_bytes: torch.tensor(loss),
            ["expected float", "got Tensor"],
        ),
        ("loss_in_bits_per_byte", lambda loss, tokens, text_bytes: 7.5, ["expected", "got 7.5"]),
        ("clip_gradients", lambda gradients, max_norm: tuple(gradients), ["expected list", "got tuple"]),
        ("clip_gradients", lambda gradients, max_norm: gradients[:1], ["expected 3 items, got 1"]),
        ("decode_step", lambda q, k, v, past_k, past_v: (q, past_k, past_v), ["item 0", "values differ"]),
        (
            "sliding_window_mask",
            lambda time, window: _window_mask(time, window).float(),
            ["torch.float32", "torch.bool"],
        ),
        ("count_parameters", lambda *sizes: 0, ["expected 124439808, got 0"]),
        ("count_pairs", lambda tokens, vocab_size: tokens, ["expected a tensor", "array"]),
    ],
)
def test_what_is_wrong_with_other_types_is_said(name, function, words):
    verdict = grade(EXERCISES[name], function)
    assert verdict.status == "wrong" and verdict.mistake is None
    for word in words:
        assert word in verdict.message, verdict.message


def test_an_input_changed_in_place_is_named():
    def causal_weights(scores):
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return scores.masked_fill_(hidden, float("-inf")).softmax(-1)

    def clip_gradients(gradients, max_norm):
        right = EXERCISES["clip_gradients"].reference(gradients, max_norm)
        gradients[0] *= 2
        return right

    for function, argument in ((causal_weights, "scores"), (clip_gradients, "gradients")):
        message = grade(EXERCISES[function.__name__], function).message
        assert f"`{argument}`" in message and "in place" in message and "copy" in message


def test_a_mistake_that_crashes_on_a_case_is_no_match():
    def half(x: int) -> int:
        return x // 2

    crashing = Mistake("divided by zero", lambda x: 1 // 0, "Never divide by zero.")
    exercise = Exercise("Halve it.", half, lambda generator: [(4,), (7,)], (crashing,), ("a", "b", "c"))
    verdict = grade(exercise, lambda x: x)
    assert verdict.status == "wrong" and verdict.mistake is None
    assert "case 1" in verdict.message and "expected 2, got 4" in verdict.message


# ---- a week


@pytest.fixture
def week(tmp_path):
    return Week(3, tmp_path / "progress.json")


def test_task_shows_what_to_write(week, capsys):
    week.task("average_past")
    shown = " ".join(capsys.readouterr().out.split())
    assert "[batch, time, channel]" in shown and "def average_past(x: torch.Tensor) -> torch.Tensor:" in shown


def test_hints_come_in_order_and_the_last_repeats(week, capsys):
    for _ in range(5):
        week.hint("average_past")
    hints = EXERCISES["average_past"].hints
    shown = [
        f"Hint {n} of 3: {hint}"
        for n, hint in ((1, hints[0]), (2, hints[1]), (3, hints[2]), (3, hints[2]), (3, hints[2]))
    ]
    assert capsys.readouterr().out.splitlines() == shown


def test_hints_of_one_exercise_do_not_use_up_anothers(week, capsys):
    week.hint("average_past")
    week.hint("split_heads")
    assert capsys.readouterr().out.count("Hint 1 of 3") == 2


def test_solved_is_remembered(week, tmp_path, capsys):
    def split_heads(x, n_head):
        return x.view(x.size(0), x.size(1), n_head, -1).transpose(1, 2)

    def average_past(x):
        return x.cumsum(1)

    assert week.solved() == []
    week.check(average_past)
    assert "sums instead of means" in capsys.readouterr().out and week.solved() == []
    week.check(split_heads)
    week.check(split_heads)
    assert "solved" in capsys.readouterr().out
    assert Week(3, tmp_path / "progress.json").solved() == ["split_heads"]
    assert Week(2, tmp_path / "progress.json").solved() == []
    assert read_progress(tmp_path / "progress.json") == {"3": ["split_heads"]}


def test_progress_of_several_weeks_is_kept_together(week, tmp_path):
    week.check(EXERCISES["causal_weights"].reference)
    week.check(EXERCISES["average_past"].reference)
    Week(2, tmp_path / "progress.json").check(EXERCISES["adamw_step"].reference)
    assert week.solved() == ["average_past", "causal_weights"]  # in the order of the week
    assert set(json.loads((tmp_path / "progress.json").read_text())) == {"2", "3"}


@pytest.mark.parametrize(
    "ask", [lambda w: w.task("attend"), lambda w: w.hint("attend"), lambda w: w.check(lambda x: x)]
)
def test_an_unknown_exercise_is_an_error_that_names_those_there_are(week, ask):
    with pytest.raises(ValueError, match="week 3 has no exercise.*average_past.*multi_head_attention"):
        ask(week)


def test_an_unknown_week_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="week 99 has no exercises.*1, 2, 3, 4, 5, 6"):
        Week(99)


# ---- the command line


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The exercises in a folder of their own, and the grader working there."""
    for source in (ROOT / "weeks").glob("*/exercises.py"):
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True)
        shutil.copy(source, target)
    monkeypatch.setattr(grader, "ROOT", tmp_path)
    monkeypatch.setattr(Week.__init__, "__defaults__", (tmp_path / "progress.json",))
    return tmp_path


@pytest.mark.parametrize("number", WEEKS)
def test_the_command_writes_stubs_that_are_not_attempted(copy, capsys, number):
    grader.main(["week", str(number)])
    shown = capsys.readouterr().out
    count = len(Week(number).exercises)
    assert f"wrote weeks/{Week(number).folder.name}/solutions.py with {count} stubs" in shown
    assert shown.count("not attempted") == count
    assert f"week {number}: 0 of {count} solved" in shown


def test_the_command_grades_what_is_there(copy, capsys):
    path = copy / "weeks" / "03_attention" / "solutions.py"
    path.write_text(
        "def split_heads(x, n_head):\n    return x.view(x.size(0), x.size(1), n_head, -1).transpose(1, 2)\n"
    )
    grader.main(["week", "3"])
    shown = capsys.readouterr().out
    assert (
        "split_heads: solved" in shown
        and "average_past: not in solutions.py" in shown
        and "week 3: 1 of 6 solved" in shown
    )


def test_a_file_that_does_not_run_is_named(copy):
    (copy / "weeks" / "03_attention" / "solutions.py").write_text("def split_heads(x, n_head:\n")
    with pytest.raises(ValueError, match="weeks/03_attention/solutions.py does not run: SyntaxError"):
        grader.main(["week", "3"])


@pytest.mark.parametrize("argv", [[], ["week"], ["week", "one"], ["lesson", "1"]])
def test_wrong_arguments_say_what_is_right(argv):
    with pytest.raises(ValueError, match="python -m shared.course.exercise week N"):
        grader.main(argv)


def test_the_command_line_itself(copy):
    """`python -m shared.course.exercise` in a copy of the package: one exercise solved, one mistaken, the
    rest stubs.
    """
    shutil.copytree(ROOT / "shared", copy / "shared", ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "weeks" / "01_bigram" / "solutions.py"
    grader.main(["week", "1"])
    text = path.read_text()
    body = {
        "row_probabilities": "    return (counts + smoothing) / (counts + smoothing).sum(dim=1)\n",
        "temperature_probabilities": "    return F.softmax(logits / temperature, dim=-1)\n",
    }
    for name, line in body.items():
        start = text.index("    ...  # your code here\n", text.index(f"def {name}("))
        text = text[:start] + line + text[start + len("    ...  # your code here\n") :]
    path.write_text(text)
    command = [sys.executable, "-m", "shared.course.exercise", "week", "1"]
    graded = subprocess.run(
        command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    assert graded.returncode == 0, graded.stderr
    assert "keepdim forgotten" in graded.stdout and "temperature_probabilities: solved" in graded.stdout
    assert graded.stdout.count("not attempted") == 4 and "week 1: 1 of 6 solved" in graded.stdout
    assert json.loads((copy / "weeks" / ".progress.json").read_text()) == {"1": ["temperature_probabilities"]}
    assert path.read_text() == text
