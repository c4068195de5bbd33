"""Week 1. How good a language model is: loss in nats per token, perplexity, bits per byte, accuracy.

`evaluate` measures a split of a corpus; `score_text` says it of one text, token by token.

Bits per byte is the one that compares models with different tokenizers: it asks how many bits the model needs
for each byte of the original text (Shannon, "Prediction and Entropy of Printed English", 1951).
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from shared.data.corpus import Tokens, fixed_windows
from shared.devices import device_of
from shared.tokenizers.base import Tokenizer, tokenizer_of

MAX_TOKENS = 1024
"""Tokens in one forward pass. Its logits take 4 · vocab_size bytes for each: 200 MB for a vocabulary of
49,152.
"""
CHUNK = 256  # positions whose log-softmax is held at a time

IGNORED = -100
"""A target that is neither learned nor measured, as PyTorch's cross-entropy has it."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, a scalar.

    logits: [batch, time, vocab_size]. targets: int64 [batch, time]; those that are `IGNORED` do not count.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def perplexity(loss: float) -> float:
    """exp(loss): the model is as uncertain as if it had to choose among that many equally likely tokens.

    >>> round(perplexity(math.log(65)), 6)
    65.0
    """
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """A loss in nats per token as bits per byte of text.

    So many tokens were predicted, and stand for so many bytes.

    >>> bits_per_byte(math.log(2), tokens=100, text_bytes=200)
    0.5
    """
    return loss * tokens / text_bytes / math.log(2)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measures."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float
    accuracy: float
    """Share of tokens that the model's first guess gets right."""
    tokens: int
    """How many were predicted."""

    def as_metrics(self, prefix: str = "val_") -> dict[str, float]:
        """All but `tokens`, by name, with the prefix before each name."""
        return {prefix + name: value for name, value in asdict(self).items() if name != "tokens"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tokens,
    block_size: int,
    token_bytes: Tensor,
    *,
    batch_size: int = 32,
    max_windows: int | None = None,
) -> Evaluation:
    """Measures `model` on windows of `tokens` that lie side by side, the same ones every time.

    Each token but the split's first (and what fills no last window) is predicted once, from those before it
    in its window. token_bytes: how many bytes of text each token stands for, int64 [vocab_size]. max_windows:
    fewer, spread evenly over the split; None takes the whole split. The model comes back in the mode (train
    or eval) it was in.
    """
    device = device_of(model)
    ids, targets = fixed_windows(tokens, block_size, max_windows)
    was_training = model.training
    model.eval()
    loss = 0.0
    correct = 0
    for batch, wanted in zip(ids.split(batch_size), targets.split(batch_size)):
        wanted = wanted.to(device)
        logits = model(batch.to(device))
        loss += cross_entropy(logits, wanted).item() * wanted.numel()
        correct += int((logits.argmax(-1) == wanted).sum())
    model.train(was_training)
    count = targets.numel()
    mean = loss / count
    return Evaluation(
        loss=mean,
        perplexity=perplexity(mean),
        bits_per_byte=bits_per_byte(mean, count, int(token_bytes[targets].sum())),
        accuracy=correct / count,
        tokens=count,
    )


@dataclass(frozen=True)
class TextScore:
    """How probable a model finds a text, token by token."""

    ids: tuple[int, ...]
    """The tokens that were predicted: all of the text's, but for the first where nothing stands before it."""
    logprobs: tuple[float, ...]
    """Of each of them, in nats."""
    greedy: tuple[bool, ...]
    """Whether each of them is the model's first guess."""
    text_bytes: int
    """How many bytes of text they stand for."""

    @property
    def total(self) -> float:
        """The log-probability of the text, in nats."""
        return math.fsum(self.logprobs)

    @property
    def tokens(self) -> int:
        """How many were predicted."""
        return len(self.ids)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return -self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), see `perplexity`."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """See `bits_per_byte`."""
        return bits_per_byte(self.loss, self.tokens, self.text_bytes)

    @property
    def accuracy(self) -> float:
        """Share of tokens that the model's first guess gets right."""
        return sum(self.greedy) / self.tokens


def score_text(
    model: nn.Module,
    text: str,
    *,
    tokenizer: Tokenizer | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> TextScore:
    """Scores all of `text`, however long: log-probabilities, perplexity, bits per byte.

    A text that does not fit is read through windows of block_size tokens (None: the longest that the model
    takes) that advance by `stride` (None: half of block_size). Each token is scored once, in the first window
    that reaches it, so with all the tokens before it or with more than block_size - stride of them. A small
    stride gives the model more context and takes longer; stride = block_size is `evaluate` on windows side by
    side. The method is Hugging Face's ("Perplexity of fixed-length models"). tokenizer: the model's own if
    not given. max_tokens: see `score_tokens`; a longer window has a forward pass to itself, whose logits take
    4 · vocab_size bytes for each token.

    Raises ValueError for a stride or size out of range, for a text of fewer than two tokens, and without a
    tokenizer.
    """
    (score,) = score_texts(
        model,
        [text],
        tokenizer=tokenizer,
        block_size=block_size,
        stride=stride,
        max_tokens=max_tokens,
        progress=progress,
    )
    return score


def score_texts(
    model: nn.Module,
    texts: Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[TextScore]:
    """`score_text` of each, in their order; texts of like length share forward passes.

    Raises ValueError as `score_text` does, and for no texts.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts={texts!r}: must be a list of at least one text")
    tokenizer = tokenizer_of(model, tokenizer)
    limit = longest_sequence(model)
    block_size = limit if block_size is None else block_size
    if not 1 <= block_size <= limit:
        raise ValueError(f"block_size={block_size}: must be from 1 to the model's {limit}")
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size:
        raise ValueError(
            f"stride={stride}: must be from 1 (all the context there is, slow) to block_size={block_size}"
            " (windows side by side)"
        )
    rows: list[tuple[Tensor, int]] = []
    rows_of = []  # each text's part of them
    for number, text in enumerate(texts):
        place = f"text {number} of {len(texts)}" if len(texts) > 1 else "the text"
        if not isinstance(text, str):
            raise ValueError(f"{place} is {text!r}: must be a str")
        ids = torch.tensor(tokenizer.prompt(text), dtype=torch.int64)
        if len(ids) < 2:
            raise ValueError(
                f"{place} has {len(ids)} tokens: at least 2 are needed, one to predict the other from"
            )
        windows = _windows(ids, block_size, stride)
        rows_of.append((ids, slice(len(rows), len(rows) + len(windows))))
        rows += windows
    scores = score_tokens(model, rows, max_tokens, progress)
    return [_joined(ids[1:].tolist(), scores[own], tokenizer) for ids, own in rows_of]


def _windows(ids: Tensor, block_size: int, stride: int) -> list[tuple[Tensor, int]]:
    """Rows for `score_tokens` that score each id but the first once."""
    rows = []
    done = 0  # ids up to this number are given or scored
    for begin in range(0, len(ids), stride):
        end = min(begin + block_size, len(ids) - 1)
        rows.append((ids[begin : end + 1], end - done))
        done = end
        if done == len(ids) - 1:
            break
    return rows


def _joined(ids: list[int], scores: Sequence[tuple[Tensor, Tensor]], tokenizer: Tokenizer) -> TextScore:
    return TextScore(
        ids=tuple(ids),
        logprobs=tuple(value for logprobs, _ in scores for value in logprobs.tolist()),
        greedy=tuple(value for _, greedy in scores for value in greedy.tolist()),
        text_bytes=sum(len(tokenizer.vocab[i]) for i in ids),
    )


@torch.no_grad()
def score_tokens(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int] | Tensor, int]],
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """For each row (ids, n): the log-probabilities of its last n ids, and whether each id is the likeliest.

    An id's probability is the one given all ids before it. Returns float32 [n] and bool [n] for each row, on
    the CPU, in the rows' order. Rows of like length share a forward pass of at most `max_tokens` tokens (a
    longer row has one to itself); padding on the right changes nothing, since a causal model does not look
    there. The model comes back in the mode (train or eval) it was in.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}: must be at least 1; {MAX_TOKENS} is a good start")
    # The longest first: what does not fit in memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    hidden = None if progress else True  # None: shown on a terminal only
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(rows), desc="scoring", unit="text", disable=hidden, leave=False) as bar:
            while order:
                size = max(1, max_tokens // (len(rows[order[0]][0]) - 1))
                batch = order[:size]
                order = order[size:]
                scores |= zip(batch, _score_batch(model, [rows[i] for i in batch]))
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return [scores[i] for i in range(len(rows))]


def _score_batch(
    model: nn.Module, rows: Sequence[tuple[Sequence[int] | Tensor, int]]
) -> list[tuple[Tensor, Tensor]]:
    device = device_of(model)
    ids = [torch.as_tensor(row, dtype=torch.int64, device=device) for row, _ in rows]
    logits = model(pad_sequence([x[:-1] for x in ids], batch_first=True))  # [batch, time, vocab_size]
    scores = []
    for x, (_, n), row_logits in zip(ids, rows, logits):
        logprobs = []
        greedy = []
        predictions = row_logits[len(x) - 1 - n : len(x) - 1]
        for part, target in zip(predictions.split(CHUNK), x[-n:].split(CHUNK)):
            logprobs.append(-F.cross_entropy(part.float(), target, reduction="none"))
            greedy.append(part.argmax(-1) == target)
        scores.append((torch.cat(logprobs).cpu(), torch.cat(greedy).cpu()))
    return scores


def longest_sequence(model: nn.Module) -> int:
    """The longest sequence a model takes; one that does not say (a bigram) takes any."""
    return getattr(model.config, "block_size", sys.maxsize)


def known_words(sample: str, text: str) -> float:
    """Share of the words in `sample` that occur in `text`; nan without words.

    A crude measure of how far a model's spelling reaches.

    >>> known_words("the kqng, the king", "long live the king")
    0.75
    """
    words = re.findall(r"[A-Za-z']+", sample)
    if not words:
        return math.nan
    vocabulary = set(re.findall(r"[A-Za-z']+", text))
    return sum(word in vocabulary for word in words) / len(words)
