"""Answers to the exercises of weeks 5 to 7."""

import codecs
import re
from collections import Counter
from itertools import chain, count, pairwise, takewhile
from unittest.mock import patch

import regex
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers.bpe import GPT2_PATTERN
from shared.training.optim import build_optimizers
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
    """Measured in our GPT, whose random numbers are replaced by as many +std as -std."""

    @torch.no_grad()
    def draw(tensor, mean=0.0, std=1.0):
        return tensor.copy_(std * torch.tensor([1.0, -1.0]).repeat(tensor.numel() // 2).view_as(tensor))

    with patch.object(nn.init, "normal_", draw):
        model = GPT(GPTConfig(vocab_size=4, block_size=4, n_layer=n_layer, n_head=1, n_embd=4))
    return model.get_parameter(name).std(correction=0).item()


@answer
def decay_groups(shapes):
    """As the Trainer's optimizer has them."""
    model = nn.ParameterList(torch.zeros(shape) for shape in shapes.values())
    (optimizer,) = build_optimizers(model, "adamw", lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = [(name, decay[id(p)]) for name, p in zip(shapes, model)]
    return [n for n, d in names if d == 0.1], [n for n, d in names if d == 0]


@answer
def accumulated_gradient(weight, batches):
    """Without backward: probabilities less the truth, times the inputs, over all examples at once."""
    x, y = (torch.cat(parts) for parts in zip(*batches))
    return ((x @ weight.T).softmax(-1) - F.one_hot(y, len(weight))).T @ x / len(y)


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
    return torch.tensor([r[:-1] for r in rows]), torch.tensor([r[1:] for r in rows])


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
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size, block_size, n_layer, 1, n_embd))
    return model.flops_per_token(block_size) * tokens_per_second / peak_flops


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
