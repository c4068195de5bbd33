"""Answers to the exercises of week 6, written by people who did not write its grader."""

import itertools
import math
import re

import numpy as np
import torch
import torch.nn.functional as F

from tests.course.foreign.register import right, wrong


@wrong("It counts one addition for each block instead of two.")
def initial_std(name, shape, n_layer):
    if len(shape) < 2:
        return 0.0
    if name.endswith("attn.o_proj.weight") or name.endswith("mlp.down_proj.weight"):
        return 0.02 / math.sqrt(n_layer)
    return 0.02


@wrong("The residual layers are tested before the biases, so their biases get a deviation too.")
def initial_std(name, shape, n_layer):
    if "o_proj" in name or "down_proj" in name:
        return 0.02 * (2 * n_layer) ** -0.5
    if name.endswith("bias") or len(shape) == 1:
        return 0.0
    return 0.02


@wrong("The scale depends on the number of the block instead of on how many blocks there are.")
def initial_std(name, shape, n_layer):
    if len(shape) == 1:
        return 0.0
    parts = name.split(".")
    if parts[-2] in ("o_proj", "down_proj"):
        layer = int(parts[1])
        return 0.02 / math.sqrt(2 * (layer + 1))
    return 0.02


@wrong("Only biases get 0, so the gains of norms are drawn with 0.02.")
def initial_std(name, shape, n_layer):
    std = 0.02
    if name.endswith(".bias"):
        std = 0.0
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        std *= (2 * n_layer) ** -0.5
    return std


@right
def initial_std(name, shape, n_layer):
    variance = 0.0004
    match len(shape):
        case 0 | 1:
            variance = 0.0
        case _ if re.search(r"(^|\.)(attn\.o_proj|mlp\.down_proj)\.weight$", name):
            variance /= sum(1 for _ in range(n_layer) for _ in ("attn", "mlp"))
    return math.sqrt(variance)


@wrong("Norms are told by their name, so the gain of a norm called ln_1 is decayed.")
def decay_groups(shapes):
    decay, no_decay = [], []
    for name in shapes:
        if "bias" in name or "norm" in name:
            no_decay.append(name)
        else:
            decay.append(name)
    return decay, no_decay


@wrong("Embeddings are kept from decay, though they are matrices.")
def decay_groups(shapes):
    decay = []
    no_decay = []
    for name, shape in shapes.items():
        is_embedding = any(part in name for part in ("emb", "wte", "wpe"))
        if len(shape) >= 2 and not is_embedding:
            decay.append(name)
        else:
            no_decay.append(name)
    return decay, no_decay


@wrong("The names are sorted, so the order of shapes is lost.")
def decay_groups(shapes):
    decay = {name for name, shape in shapes.items() if len(shape) > 1}
    no_decay = set(shapes) - decay
    return sorted(decay), sorted(no_decay)


@wrong("The two lists are returned the wrong way round.")
def decay_groups(shapes):
    groups = {1: [], 2: []}
    for name, shape in shapes.items():
        groups[2 if len(shape) >= 2 else 1].append(name)
    return groups[1], groups[2]


@right
def decay_groups(shapes):
    flags = [len(shape) >= 2 for shape in shapes.values()]
    decayed = list(itertools.compress(shapes, flags))
    kept = list(itertools.compress(shapes, (not flag for flag in flags)))
    return decayed, kept


@wrong("Every micro-batch counts alike, though they have different numbers of examples.")
def accumulated_gradient(weight, batches):
    w = weight.clone().requires_grad_()
    for x, y in batches:
        loss = F.cross_entropy(x @ w.T, y) / len(batches)
        loss.backward()
    return w.grad


@wrong("Each loss is divided by the examples seen so far instead of by all of them.")
def accumulated_gradient(weight, batches):
    w = weight.clone().requires_grad_()
    seen = 0
    for x, y in batches:
        seen += len(y)
        loss = F.cross_entropy(x @ w.T, y, reduction="sum") / seen
        loss.backward()
    return w.grad


@wrong("It works on weight itself, which comes out requiring and holding a gradient.")
def accumulated_gradient(weight, batches):
    total = sum(y.shape[0] for _, y in batches)
    weight.requires_grad_(True)
    weight.grad = None
    for x, y in batches:
        logits = x @ weight.T
        loss = F.cross_entropy(logits, y) * (y.shape[0] / total)
        loss.backward()
    return weight.grad


@wrong("It calls backward once on the summed loss instead of once for each micro-batch.")
def accumulated_gradient(weight, batches):
    w = weight.clone().requires_grad_()
    loss = 0.0
    n = 0
    for x, y in batches:
        loss = loss + F.cross_entropy(F.linear(x, w), y, reduction="sum")
        n += y.numel()
    (loss / n).backward()
    return w.grad


@right
def accumulated_gradient(weight, batches):
    def summed(x, y):
        copy = weight.clone().requires_grad_()
        logits = torch.einsum("nf,vf->nv", x, copy)
        own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
        (torch.logsumexp(logits, dim=1) - own).sum().backward()
        return copy.grad, len(y)

    gradients, sizes = zip(*(summed(x, y) for x, y in batches))
    return torch.stack(gradients).sum(dim=0) / sum(sizes)


@wrong("It takes the columns as query, key and value of one head after the other.")
def split_c_attn(weight, bias, n_head):
    n_embd = weight.shape[0]
    head_dim = n_embd // n_head
    w = weight.T.reshape(n_head, 3, head_dim, n_embd)
    b = bias.reshape(n_head, 3, head_dim)
    q_weight, k_weight, v_weight = (w[:, i].reshape(n_embd, n_embd) for i in range(3))
    q_bias, k_bias, v_bias = (b[:, i].reshape(n_embd) for i in range(3))
    return q_weight, k_weight, v_weight, q_bias, k_bias, v_bias


@wrong("The weight is reshaped to [3 n_embd, n_embd] instead of transposed.")
def split_c_attn(weight, bias, n_head):
    n_embd = weight.shape[0]
    linear = weight.reshape(3 * n_embd, n_embd)
    q, k, v = linear.split(n_embd, dim=0)
    return (q, k, v, *bias.split(n_embd))


@wrong("Weights and biases come back in turn instead of all weights first.")
def split_c_attn(weight, bias, n_head):
    result = []
    for w, b in zip(weight.chunk(3, dim=1), bias.chunk(3)):
        result.append(w.T.contiguous())
        result.append(b)
    return tuple(result)


@wrong("A view as [3, n_embd, n_embd] cuts the rows of the weight instead of its columns.")
def split_c_attn(weight, bias, n_head):
    n = weight.size(0)
    q, k, v = weight.view(3, n, n).transpose(1, 2)
    qb, kb, vb = bias.view(3, n)
    return q, k, v, qb, kb, vb


@right
def split_c_attn(weight, bias, n_head):
    n_embd = len(weight)
    columns = list(weight.unbind(dim=1))
    weights = [torch.stack(columns[i * n_embd : (i + 1) * n_embd]) for i in range(3)]
    biases = [part.clone() for part in torch.tensor_split(bias, 3)]
    return tuple(weights + biases)


@wrong("Rows of block_size + 1 tokens do not overlap, so each row's first token is never a target.")
def pack_documents(documents, end_of_text, block_size):
    stream = []
    for doc in documents:
        stream.append(end_of_text)
        stream.extend(doc)
    n = len(stream) // (block_size + 1)
    rows = torch.tensor(stream[: n * (block_size + 1)], dtype=torch.long).view(n, block_size + 1)
    return rows[:, :-1], rows[:, 1:]


@wrong("The targets are rolled around, so a stream that fills its rows ends with a wrong target.")
def pack_documents(documents, end_of_text, block_size):
    stream = np.array([t for doc in documents for t in [end_of_text] + doc], dtype=np.int64)
    rows = len(stream) // block_size
    shifted = np.roll(stream, -1)
    inputs = torch.from_numpy(stream[: rows * block_size].reshape(rows, block_size))
    targets = torch.from_numpy(shifted[: rows * block_size].reshape(rows, block_size))
    return inputs, targets


@wrong("The separator is inserted into the caller's documents.")
def pack_documents(documents, end_of_text, block_size):
    stream = []
    for doc in documents:
        doc.insert(0, end_of_text)
        stream += doc
    data = torch.tensor(stream, dtype=torch.int64)
    rows = (len(data) - 1) // block_size
    inputs = data[: rows * block_size].view(rows, block_size)
    targets = data[1 : rows * block_size + 1].view(rows, block_size)
    return inputs, targets


@wrong("One row too few is made unless the stream's length is a multiple of block_size.")
def pack_documents(documents, end_of_text, block_size):
    stream = []
    for doc in documents:
        stream += [end_of_text, *doc]
    rows = max(0, len(stream) // block_size - 1)
    n = rows * block_size
    x = torch.tensor(stream[:n], dtype=torch.long).reshape(rows, block_size)
    y = torch.tensor(stream[1 : n + 1], dtype=torch.long).reshape(rows, block_size)
    return x, y


@right
def pack_documents(documents, end_of_text, block_size):
    stream = list(itertools.chain.from_iterable(itertools.chain([end_of_text], doc) for doc in documents))
    if len(stream) <= block_size:
        return torch.empty(0, block_size, dtype=torch.int64), torch.empty(0, block_size, dtype=torch.int64)
    rows = torch.tensor(stream, dtype=torch.int64).unfold(0, block_size + 1, block_size)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@wrong("It divides by the bytes of the text instead of its characters.")
def score_choices(logits, ids, n_context, choices):
    scores = []
    for lg, tokens, text in zip(logits, ids, choices):
        logp = torch.log_softmax(lg[n_context - 1 : -1], dim=-1)
        total = logp.gather(1, tokens[n_context:].unsqueeze(1)).sum().item()
        scores.append(total / len(text.encode("utf-8")))
    return scores, scores.index(max(scores))


@wrong("The first token of the choice is left out.")
def score_choices(logits, ids, n_context, choices):
    scores = []
    for i in range(len(choices)):
        log_probs = F.log_softmax(logits[i], dim=-1)
        total = 0.0
        for t in range(n_context, len(ids[i]) - 1):
            total += log_probs[t, ids[i][t + 1]].item()
        scores.append(total / len(choices[i]))
    best = max(range(len(scores)), key=lambda i: scores[i])
    return scores, best


@wrong("The best choice is taken from the sums before they are divided by the length.")
def score_choices(logits, ids, n_context, choices):
    sums = []
    for i in range(len(choices)):
        logp = F.log_softmax(logits[i][:-1], dim=-1)
        picked = logp[torch.arange(len(ids[i]) - 1), ids[i][1:]]
        sums.append(picked[n_context - 1 :].sum().item())
    scores = [s / len(c) for s, c in zip(sums, choices)]
    return scores, int(np.argmax(sums))


@wrong("The log-probabilities are averaged over the tokens before they are divided by the characters.")
def score_choices(logits, ids, n_context, choices):
    scores = []
    for lg, tokens, text in zip(logits, ids, choices):
        loss = F.cross_entropy(lg[n_context - 1 : -1], tokens[n_context:])
        scores.append(-loss.item() / len(text))
    return scores, int(torch.tensor(scores).argmax())


@right
def score_choices(logits, ids, n_context, choices):
    def log_probability(i):
        tokens = ids[i].tolist()
        steps = zip(logits[i][n_context - 1 :], tokens[n_context:])
        return math.fsum(float(row[token] - torch.logsumexp(row, dim=0)) for row, token in steps)

    scores = [log_probability(i) / len(text) for i, text in enumerate(choices)]
    best = max(enumerate(scores), key=lambda item: item[1])[0]
    return scores, best


@wrong("The attention's operations are doubled along with the weights.")
def mfu(n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops):
    weights = n_layer * 12 * n_embd**2 + vocab_size * n_embd
    attention = n_layer * 4 * n_embd * block_size
    forward = 2 * (weights + attention)
    return 3 * forward * tokens_per_second / peak_flops


@wrong("The position embedding is counted among the weights of matrix products.")
def mfu(n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops):
    N = vocab_size * n_embd + block_size * n_embd + n_layer * 12 * n_embd * n_embd
    flops_per_token = 6 * N + 12 * n_layer * n_embd * block_size
    return flops_per_token * tokens_per_second / peak_flops


@wrong("The backward pass is counted for the weights only, not for the attention.")
def mfu(n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops):
    linear = n_layer * (4 * n_embd**2 + 8 * n_embd**2) + vocab_size * n_embd
    forward = 2 * linear + n_layer * 4 * n_embd * block_size
    backward = 2 * (2 * linear)
    return tokens_per_second * (forward + backward) / peak_flops


@wrong("The attention's operations are counted for one layer instead of for each.")
def mfu(n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops):
    block = 4 * n_embd * n_embd + 2 * n_embd * 4 * n_embd
    matmul = 2 * (n_layer * block + n_embd * vocab_size)
    attention = 4 * n_embd * block_size
    achieved = 3 * (matmul + attention) * tokens_per_second
    return achieved / peak_flops


@right
def mfu(n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops):
    layer = [(n_embd, n_embd)] * 4 + [(n_embd, 4 * n_embd), (4 * n_embd, n_embd)]
    per_token = 0
    for _ in range(n_layer):
        per_token += sum(2 * outputs * inputs for inputs, outputs in layer)
        per_token += 2 * n_embd * block_size + 2 * block_size * n_embd
    per_token += 2 * n_embd * vocab_size
    passes = 1 + 2
    return float(tokens_per_second / peak_flops * per_token * passes)
