"""Answers to the exercises of weeks 5 to 7."""

import codecs
import re
from collections import Counter
from itertools import chain, count, pairwise, takewhile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import regex
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from shared.tokenizers.bpe import GPT2_PATTERN
from tests.course.answers.register import answer

# ---- week 5


@answer
def pair_counts(words):
    """By writing the pairs down as often as they occur."""
    written = [list(pairwise(word)) * times for word, times in words.items()]
    return dict(Counter(chain.from_iterable(written)))


@answer
def merge_pair(tokens, pair):
    """With a stack."""
    stack = []
    just_merged = False
    for token in tokens:
        if stack and not just_merged and (stack[-1], token) == pair:
            stack[-1] += token
            just_merged = True
        else:
            stack.append(token)
            just_merged = False
    return stack


@answer
def learn_merges(words, n):
    pieces = {tuple(bytes([b]) for b in word.encode()): times for word, times in words.items()}
    merges = []
    for _ in range(n):
        counts = pair_counts(pieces)
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        pieces = {tuple(merge_pair(word, best)): times for word, times in pieces.items()}
    return merges


@answer
def cut(text):
    return re.findall("'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\\sA-Za-z0-9]+|\\s+(?!\\S)|\\s+", text)


@answer
def encode_piece(piece, merges):
    """tiktoken, with ranks in the order of the merges."""
    tokens = dict.fromkeys([*(bytes([i]) for i in range(256)), *(a + b for a, b in merges)])
    ranks = {token: i for i, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("piece", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
    return [theirs.decode_single_token_bytes(i) for i in theirs.encode_ordinary(piece)]


@answer
def decode_ids(ids, vocab):
    """Byte by byte, as a stream is decoded."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return "".join(decoder.decode(vocab[i]) for i in ids) + decoder.decode(b"", final=True)


@answer
def train_bpe(text, vocab_size):
    """Without counting the pieces: all of them are kept, in the order of the text."""
    pieces = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(GPT2_PATTERN, text)]
    merges = []
    while len(merges) < vocab_size - 256:
        counts = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not counts:
            break
        most = max(counts.values())
        merges.append(max(pair for pair, count in counts.items() if count == most))
        pieces = [merge_pair(piece, merges[-1]) for piece in pieces]
    return merges


@answer
class BPE:
    """tiktoken, with ranks in the order of the merges."""

    def __init__(self, merges, special_tokens=()):
        tokens = [bytes([i]) for i in range(256)] + [left + right for left, right in merges]
        specials = {special: len(tokens) + i for i, special in enumerate(special_tokens)}
        self.vocab = dict(enumerate([*tokens, *(special.encode() for special in special_tokens)]))
        ranks = {token: i for i, token in enumerate(tokens)}
        self.theirs = tiktoken.Encoding(
            "ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )

    def encode(self, text, allowed_special=()):
        return self.theirs.encode(text, allowed_special=set(allowed_special), disallowed_special=())

    def decode(self, ids):
        return self.theirs.decode(ids, errors="replace")


# ---- week 6


@answer
def initial_std(name, shape, n_layer):
    """By the variance, of which all that write to the stream share one matrix's."""
    module, kind = name.rsplit(".", 1)
    if kind == "bias" or module.endswith("norm"):
        return 0.0
    writers = [f"blocks.{i}.{part}" for i in range(n_layer) for part in ("attn.o_proj", "mlp.down_proj")]
    variance = 0.02**2 / (len(writers) if module in writers else 1)
    return variance**0.5


@answer
def decay_groups(shapes):
    """A tensor of each shape says how many dimensions it has."""
    dimensions = {name: torch.zeros(shape).dim() for name, shape in shapes.items()}
    return [n for n, d in dimensions.items() if d > 1], [n for n, d in dimensions.items() if d < 2]


@answer
def accumulated_gradient(weight, batches):
    """A linear layer, whose losses are summed and whose gradient is divided at the end."""
    layer = nn.Linear(weight.size(1), weight.size(0), bias=False)
    layer.load_state_dict({"weight": weight})
    for x, y in batches:
        F.cross_entropy(layer(x), y, reduction="sum").backward()
    return layer.weight.grad / sum(y.numel() for _, y in batches)


@answer
def split_c_attn(weight, bias, n_head):
    """What Hugging Face's layer itself makes of the unit vectors, and of 0."""
    layer = Conv1D(weight.size(1), weight.size(0))
    layer.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        zero = layer(torch.zeros(1, len(weight)))
        columns = layer(torch.eye(len(weight))) - zero
    weights = [part.T for part in columns.split(len(weight), dim=1)]
    biases = zero[0].split(len(weight))
    return *weights, *biases


@answer
def pack_documents(documents, end_of_text, block_size):
    """Row by row, each fed from the stream."""
    stream = chain.from_iterable([end_of_text, *document] for document in documents)
    rows = []
    row = [next(stream)]
    for token in stream:
        row.append(token)
        if len(row) == block_size + 1:
            rows.append(row)
            row = [token]
    cut = torch.tensor(rows, dtype=torch.int64).view(-1, block_size + 1)
    return cut[:, :-1], cut[:, 1:]


@answer
def score_choices(logits, ids, n_context, choices):
    losses = [
        F.cross_entropy(x[n_context - 1 : -1], row[n_context:], reduction="sum").item()
        for x, row in zip(logits, ids)
    ]
    scores = [-loss / len(text) for loss, text in zip(losses, choices)]
    return scores, max(range(len(scores)), key=scores.__getitem__)


@answer
def mfu(n_layer, n_embd, vocab_size, block_size, tokens_per_second, peak_flops):
    """Product by product: of each its inputs, outputs, and how often."""
    products = [
        (n_embd, n_embd, 4 * n_layer),  # q, k, v, o
        (n_embd, 4 * n_embd, 2 * n_layer),  # up and down
        (n_embd, block_size, 2 * n_layer),  # scores, and what they weigh
        (n_embd, vocab_size, 1),
    ]
    forward = sum(2 * inputs * outputs * times for inputs, outputs, times in products)
    return (1 + 2) * forward * tokens_per_second / peak_flops


@answer
def load_hf_weights(model, state):
    """From our names to theirs, a parameter at a time; what is left at the end is too much."""
    left = {f"transformer.{n.removeprefix('transformer.')}": tensor for n, tensor in state.items()}
    left = {n: tensor for n, tensor in left.items() if not n.endswith((".attn.bias", ".attn.masked_bias"))}
    tables = {"token_embedding": "wte", "position_embedding": "wpe", "norm": "ln_f", "lm_head": "lm_head"}
    inside = {"attn_norm": "ln_1", "mlp_norm": "ln_2", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}
    used = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, kind = name.rsplit(".", 1)
            last = module.split(".")[-1]
            place, part = "", 0
            if module.startswith("blocks."):
                place = f"h.{module.split('.')[1]}."
                theirs = inside.get(last, "attn.c_proj" if last == "o_proj" else "attn.c_attn")
                part = "qkv".find(last[0]) if theirs == "attn.c_attn" else 0
            else:
                theirs = tables[module]
            key = f"transformer.{place}{theirs}.{kind}"
            tensor = left[key]
            used.add(key)
            if place and kind == "weight" and "ln_" not in theirs:
                tensor = tensor.transpose(0, 1)
            rows = len(parameter)
            whole = 3 * rows if theirs == "attn.c_attn" else rows
            if tensor.shape != (whole, *parameter.shape[1:]):
                raise ValueError(f"{key} is {list(tensor.shape)}")
            parameter.copy_(tensor[part * rows : (part + 1) * rows])
    if model.config.tie_weights:
        used.add("transformer.lm_head.weight")
    if left.keys() - used:
        raise ValueError(f"left over: {left.keys() - used}")


@answer
class ShardReader:
    """Asks for each token by itself; the files are opened anew for every batch."""

    def __init__(self, paths, batch_size, block_size, rank=0, world_size=1):
        self.paths = paths
        self.shape = (batch_size, block_size)
        self.rank, self.world_size = rank, world_size
        self.done = 0

    def read(self, start, stop):
        tokens = []
        begin = 0
        for path in self.paths:
            shard = np.memmap(path, dtype="<u2", mode="r")
            tokens += [int(shard[i - begin]) for i in range(start, stop) if 0 <= i - begin < len(shard)]
            begin += len(shard)
        return torch.tensor(tokens, dtype=torch.int64)

    def next_batch(self):
        rows, width = self.shape
        size = sum(Path(path).stat().st_size for path in self.paths) // 2
        if size - self.done <= rows * width * self.world_size:
            self.done = 0
        starts = [self.done + (self.rank * rows + row) * width for row in range(rows)]
        self.done += rows * width * self.world_size
        cut = torch.stack([self.read(start, start + width + 1) for start in starts])
        return cut[:, :-1], cut[:, 1:]

    def state_dict(self):
        return {"tokens": self.done, "note": "of all processes"}

    def load_state_dict(self, state):
        self.done = int(state["tokens"])


@answer
def ddp_step(model, optimizer, micro_batches, group):
    """All gradients and the loss in one long tensor, which travels once."""
    model.zero_grad()
    losses = []
    for x, y in micro_batches:
        loss = -model(x).log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
        loss.backward()
        losses.append(loss.item())
    trained = [p for p in model.parameters() if p.grad is not None]
    bucket = torch.cat([*(p.grad.flatten() for p in trained), torch.tensor([sum(losses)])])
    group.all_reduce(bucket)
    bucket /= group.world_size * len(micro_batches)
    for parameter, part in zip(trained, bucket[:-1].split([p.numel() for p in trained])):
        parameter.grad = part.view_as(parameter)
    optimizer.step()
    return float(bucket[-1])


# ---- week 7


@answer
def round_to_bf16(x):
    return x.bfloat16().float()


@answer
def autocast_dtypes(program, inputs, dtype):
    """What PyTorch itself answers on a GPU: it is not needed for tensors without numbers."""
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
    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda: True),
        FakeTensorMode(),
        torch.autocast("cuda", dtype),
    ):
        for result, operation, names in program:
            arguments = [torch.zeros(4, 4, dtype=dtypes[name], device="cuda") for name in names]
            dtypes[result] = operations[operation](*arguments).dtype
    return [dtypes[result] for result, _, _ in program]


@answer
def bf16_product(a, b):
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(a, b.T)


@answer
def scaler_step(gradients, dtype, scale, good_steps, max_norm, growth_interval):
    """As torch.amp.GradScaler does it."""
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    received = []
    for p, g in zip(parameters, gradients):
        p.grad = g.clone()
    optimizer = torch.optim.SGD(parameters)
    optimizer.register_step_pre_hook(lambda *_: received.extend(p.grad for p in parameters))
    enabled = dtype == torch.float16
    scaler = torch.amp.GradScaler("cpu", scale, growth_interval=growth_interval, enabled=enabled)
    if scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": good_steps})
    scaler.scale(torch.zeros(()))  # from here on it has its scale in a tensor
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, max_norm)
    scaler.step(optimizer)
    scaler.update()
    state = scaler.state_dict()
    return received, state.get("scale", scale), state.get("_growth_tracker", good_steps)


@answer
class LossScaler(torch.amp.GradScaler):
    """PyTorch's own, with the count that it keeps for itself."""

    def __init__(self, scale=2.0**16, growth_interval=2000):
        super().__init__("cpu", init_scale=scale, growth_interval=growth_interval)
        self.scale(torch.zeros(()))  # from here on it has its scale in a tensor

    @property
    def good_steps(self):
        return self._get_growth_tracker()


@answer
class LinearCrossEntropy(torch.autograd.Function):
    """Each chunk's logits are computed again in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, chunk_size):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.numbers = ignore_index, chunk_size
        total = 0.0
        for h, y in zip(hidden.split(chunk_size), targets.split(chunk_size)):
            total += F.cross_entropy(h @ weight.T, y, ignore_index=ignore_index, reduction="sum")
        return total / (targets != ignore_index).sum()

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets = ctx.saved_tensors
        ignore_index, chunk_size = ctx.numbers
        share = upstream / (targets != ignore_index).sum()
        parts, weight_grad = [], torch.zeros_like(weight)
        for h, y in zip(hidden.split(chunk_size), targets.split(chunk_size)):
            one_hot = torch.zeros(len(y), len(weight))
            used = y != ignore_index
            one_hot[used.nonzero()[:, 0], y[used]] = 1
            grad = share * used[:, None] * ((h @ weight.T).softmax(-1) - one_hot)
            parts.append(grad @ weight)
            weight_grad += grad.T @ h
        return torch.cat(parts), weight_grad, None, None, None


@answer
def state_bytes(parameters, precision, moments):
    """A layer of 64 weights after a step, its bytes counted."""
    dtype = torch.bfloat16 if precision in ("bfloat16", "master") else torch.float32
    layer = nn.Linear(8, 8, bias=False).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        layer(torch.ones(1, 8, dtype=layer.weight.dtype)).sum().backward()
    gradient = layer.weight.grad
    weights = [layer.weight]
    if precision == "master":
        weights.append(nn.Parameter(layer.weight.detach().float()))
    trained = weights[-1]
    trained.grad = gradient.to(trained.dtype)
    optimizers = {
        0: torch.optim.SGD([trained]),
        1: torch.optim.SGD([trained], momentum=0.9),
        2: torch.optim.AdamW([trained]),
    }
    optimizer = optimizers[moments]
    optimizer.step()
    kept = [t for t in optimizer.state[trained].values() if t is not None and t.shape == trained.shape]
    return tuple(parameters * sum(t.nbytes for t in part) // 64 for part in (weights, [gradient], kept))


@answer
def largest_batch(fits, limit):
    tried = []

    def between(low, high):
        """The largest that fits, where `low` does and `high` doesn't."""
        if high - low == 1:
            return low
        middle = (low + high) // 2
        tried.append(middle)
        return between(middle, high) if fits(middle) else between(low, middle)

    powers = takewhile(lambda n: n < limit, (2**i for i in count()))
    for low, high in pairwise([0, *powers, limit]):
        tried.append(high)
        if not fits(high):
            return between(low, high), tried
    return limit, tried
