"""Answers to the exercises of week 1, written by people who did not write its grader."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.course.foreign.register import right, wrong


@wrong("The pair number is computed in uint16, so it overflows once vocab_size is above 256.")
def count_pairs(tokens, vocab_size):
    flat = tokens[:-1] * vocab_size + tokens[1:]
    counts = np.bincount(flat, minlength=vocab_size * vocab_size)
    return torch.from_numpy(counts[: vocab_size * vocab_size]).long().view(vocab_size, vocab_size)


@wrong("An indexed += adds a repeated pair only once.")
def count_pairs(tokens, vocab_size):
    ids = torch.tensor(tokens.astype(np.int64))
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    counts[ids[:-1], ids[1:]] += 1
    return counts


@wrong("np.roll wraps around, so the last token is also paired with the first.")
def count_pairs(tokens, vocab_size):
    following = np.roll(tokens, -1)
    counts = torch.zeros((vocab_size, vocab_size), dtype=torch.int64)
    for a, b in zip(tokens.tolist(), following.tolist()):
        counts[a, b] += 1
    return counts


@wrong("The counts come back as float32, not int64.")
def count_pairs(tokens, vocab_size):
    ids = torch.from_numpy(tokens.astype(np.int64))
    one_hot = F.one_hot(ids, vocab_size).float()
    return one_hot[:-1].T @ one_hot[1:]


@right
def count_pairs(tokens, vocab_size):
    table = [[0] * vocab_size for _ in range(vocab_size)]
    previous = None
    for token in map(int, tokens):
        if previous is not None:
            table[previous][token] += 1
        previous = token
    return torch.tensor(table, dtype=torch.int64)


@wrong("The sum lacks keepdim=True, so column j is divided by the total of row j.")
def row_probabilities(counts, smoothing):
    P = (counts + smoothing).float()
    P = P / P.sum(1)
    return P


@wrong("The denominator adds the smoothing once instead of once for each token of the vocabulary.")
def row_probabilities(counts, smoothing):
    totals = counts.sum(dim=1, keepdim=True)
    return ((counts + smoothing) / (totals + smoothing)).to(torch.float32)


@wrong("The result is float64 instead of float32.")
def row_probabilities(counts, smoothing):
    smoothed = counts.double() + smoothing
    return smoothed / smoothed.sum(dim=-1, keepdim=True)


@wrong("The smoothing replaces only the zero counts instead of being added to all of them.")
def row_probabilities(counts, smoothing):
    probs = counts.float()
    probs[probs == 0] = smoothing
    for a in range(probs.shape[0]):
        probs[a] = probs[a] / probs[a].sum()
    return probs


@right
def row_probabilities(counts, smoothing):
    rows = []
    for row in counts.tolist():
        total = sum(row) + smoothing * len(row)
        rows.append([(c + smoothing) / total for c in row])
    return torch.tensor(rows, dtype=torch.float32)


@wrong("A small constant inside the logarithm caps the loss of an improbable target at about 20.7.")
def token_loss(logits, targets):
    probs = torch.softmax(logits, dim=-1)
    picked = torch.gather(probs, 2, targets.unsqueeze(-1)).squeeze(-1)
    return -torch.log(picked + 1e-9).mean()


@wrong("The maximum of the whole tensor is subtracted, so rows far below it underflow to log(0).")
def token_loss(logits, targets):
    shifted = logits - logits.max()
    log_probs = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    return -log_probs.gather(-1, targets[..., None]).mean()


@wrong("The indexing takes every target for every position instead of each position's own.")
def token_loss(logits, targets):
    vocab_size = logits.shape[-1]
    log_probs = F.log_softmax(logits.view(-1, vocab_size), dim=-1)
    return -log_probs[:, targets.view(-1)].mean()


@wrong("The softmax runs over the time axis instead of the vocabulary.")
def token_loss(logits, targets):
    B, T, V = logits.shape
    logits = logits - logits.max(dim=1, keepdim=True).values
    logp = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
    rows = torch.arange(B)[:, None]
    cols = torch.arange(T)[None, :]
    return -logp[rows, cols, targets].mean()


@right
def token_loss(logits, targets):
    def surprise(row, target):
        top = row.max()
        return top + torch.log(torch.exp(row - top).sum()) - row[target]

    batch, time, _ = logits.shape
    losses = [surprise(logits[b, t], targets[b, t]) for b in range(batch) for t in range(time)]
    return torch.stack(losses).sum() / (batch * time)


@wrong("The number of bytes per token is rounded down by an integer division.")
def loss_in_bits_per_byte(loss, tokens, text_bytes):
    bytes_per_token = max(1, text_bytes // tokens)
    return loss / math.log(2) / bytes_per_token


@wrong("It takes log2 of the loss instead of dividing the loss by ln(2).")
def loss_in_bits_per_byte(loss, tokens, text_bytes):
    bits_per_token = math.log2(loss)
    return bits_per_token * tokens / text_bytes


@wrong("The ratio is upside down: it multiplies by bytes per token instead of tokens per byte.")
def loss_in_bits_per_byte(loss, tokens, text_bytes):
    bits = loss / np.log(2)
    return float(bits * (text_bytes / tokens))


@wrong("It returns a float32 tensor instead of a float.")
def loss_in_bits_per_byte(loss, tokens, text_bytes):
    total_nats = torch.tensor(loss) * tokens
    total_bits = total_nats / torch.log(torch.tensor(2.0))
    return total_bits / text_bytes


@right
def loss_in_bits_per_byte(loss, tokens, text_bytes):
    tokens_per_byte = tokens / text_bytes
    return float(np.float64(loss) * np.log2(np.e) * tokens_per_byte)


@wrong("Ids above 32767 become negative, as they pass through int16.")
def inputs_and_targets(tokens, starts, block_size):
    data = torch.from_numpy(tokens.astype(np.int16)).long()
    x = torch.stack([data[i : i + block_size] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in starts])
    return x, y


@wrong("The targets are the window rolled by one, so the last target is the window's first token.")
def inputs_and_targets(tokens, starts, block_size):
    windows = np.stack([tokens[s : s + block_size] for s in starts]).astype(np.int64)
    x = torch.from_numpy(windows)
    y = torch.roll(x, shifts=-1, dims=1)
    return x, y


@wrong("Both tensors are int32 instead of int64.")
def inputs_and_targets(tokens, starts, block_size):
    data = torch.from_numpy(tokens.astype(np.int32))
    positions = torch.tensor(starts)[:, None] + torch.arange(block_size)[None, :]
    return data[positions], data[positions + 1]


@wrong("Inputs and targets are returned the wrong way round.")
def inputs_and_targets(tokens, starts, block_size):
    chunks = []
    for s in starts:
        chunks.append([int(t) for t in tokens[s : s + block_size + 1]])
    chunks = torch.tensor(chunks, dtype=torch.long)
    return chunks[:, 1:], chunks[:, :-1]


@right
def inputs_and_targets(tokens, starts, block_size):
    windows = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)
    picked = torch.from_numpy(windows[np.asarray(starts, dtype=np.int64)].astype(np.int64))
    return picked[:, :block_size].clone(), picked[:, 1:].clone()


@wrong("The logits are multiplied by the temperature instead of divided by it.")
def temperature_probabilities(logits, temperature):
    scaled = logits * temperature
    return torch.softmax(scaled, dim=-1)


@wrong("The division changes the caller's logits in place.")
def temperature_probabilities(logits, temperature):
    logits /= temperature
    return F.softmax(logits, dim=1)


@wrong("Powers of the probabilities underflow at a low temperature, and 0 / 0 gives NaN.")
def temperature_probabilities(logits, temperature):
    probs = F.softmax(logits, dim=-1)
    probs = probs ** (1.0 / temperature)
    return probs / probs.sum(dim=-1, keepdim=True)


@wrong("A guard against division by zero raises every temperature below 0.1 to 0.1.")
def temperature_probabilities(logits, temperature):
    temperature = max(temperature, 0.1)
    z = logits / temperature
    z = z - z.max(dim=-1, keepdim=True)[0]
    e = z.exp()
    return e / e.sum(dim=-1, keepdim=True)


@right
def temperature_probabilities(logits, temperature):
    return torch.distributions.Categorical(logits=logits / temperature).probs
