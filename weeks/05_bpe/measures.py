"""What week 5's notebook measures, where the measuring is not the lesson."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import process_time

import numpy as np

from shared.evaluation import bits_per_byte
from shared.models.gpt import GPT, GPTConfig
from shared.registry import without_memory
from shared.tokenizers import Tokenizer

FIRST_ARTICLE = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
}
"""The first sentence of Article 1 of the Universal Declaration of Human Rights, by language."""
Pair = tuple[bytes, bytes]
Words = dict[tuple[bytes, ...], int]


def in_bytes(pieces: Mapping[str, int]) -> Words:
    """The pieces as tuples of single bytes, with how often each occurs."""
    return {tuple(bytes([b]) for b in piece.encode()): times for piece, times in pieces.items()}


def differing(yours: Sequence, others: Sequence) -> int:
    """In how many places two sequences differ; where one is longer, its rest counts."""
    return sum(a != b for a, b in zip(yours, others)) + abs(len(yours) - len(others))


def different_so_far(words: Iterable[str], every: int) -> list[int]:
    """How many different words there were after every so many words."""
    seen: set[str] = set()
    growth = []
    for i, word in enumerate(words, 1):
        seen.add(word)
        if i % every == 0:
            growth.append(len(seen))
    return growth


def equals_at_each_merge(
    pieces: Mapping[str, int], merges: Sequence[Pair], pair_counts: Callable, merge_pair: Callable
) -> list[int]:
    """How many pairs were as frequent as the one that was merged, itself included."""
    words = in_bytes(pieces)
    equals = []
    for pair in merges:
        counts = pair_counts(words)
        equals.append(sum(count == counts[pair] for count in counts.values()))
        words = {tuple(merge_pair(list(word), pair)): times for word, times in words.items()}
    return equals


def share_touched(pieces: Iterable[str], merges: Sequence[Pair], merge_pair: Callable) -> list[float]:
    """In what share of the different pieces each merge occurs."""
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    shares = []
    for pair in merges:
        at = [i for i, tokens in enumerate(words) if pair in zip(tokens, tokens[1:])]
        shares.append(len(at) / len(words))
        for i in at:
            words[i] = merge_pair(words[i], pair)
    return shares


def seconds_of_one_merge(pieces: Sequence[str], pair_counts: Callable, merge_pair: Callable) -> float:
    """What it takes to count all pairs of these pieces and to merge the most frequent one in each.

    Seconds of the processor, the least of three tries.
    """
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    return min(_seconds_of_one_merge(words, pair_counts, merge_pair) for _ in range(3))


def _seconds_of_one_merge(words: list[list[bytes]], pair_counts: Callable, merge_pair: Callable) -> float:
    started = process_time()
    counts: Counter[Pair] = Counter()
    for word in words:
        counts.update(pair_counts({tuple(word): 1}))
    best = max(counts, key=counts.__getitem__)
    for word in words:
        merge_pair(word, best)
    return process_time() - started


def longest_first(piece: str, known: set[bytes]) -> list[bytes]:
    """The longest known token from the left, again and again: another way to encode, and not ours."""
    rest = piece.encode()
    tokens = []
    while rest:
        end = next(end for end in range(len(rest), 0, -1) if rest[:end] in known)
        tokens.append(rest[:end])
        rest = rest[end:]
    return tokens


def loss_by_frequency(tokenizer: Tokenizer, train_text: str, val_text: str) -> tuple[float, float]:
    """Nats per token and bits per byte of a model that knows only how frequent each token is."""
    counts = np.bincount(tokenizer.encode(train_text), minlength=tokenizer.vocab_size) + 1.0
    ids = tokenizer.encode(val_text)
    loss = float(-np.log(counts / counts.sum())[ids].mean())
    return loss, bits_per_byte(loss, len(ids), len(val_text.encode()))


def shares_at_the_ends(vocab_sizes: Sequence[int]) -> list[float]:
    """What share of the model `mini` sits in its embedding and its output layer, by vocabulary size."""
    config = GPTConfig.preset("mini")
    row = 2 * config.n_embd  # what one token adds: a row of the embedding, and one of the output layer
    with without_memory():
        between = GPT(config).num_parameters() - row * config.vocab_size
    return [row * size / (row * size + between) for size in vocab_sizes]
