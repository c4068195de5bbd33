"""The graded exercises of week 5: counting pairs, merging one, learning merges, cutting a text into pieces,
encoding a piece, decoding.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import reduce

import regex
import torch
from torch import Generator

from shared.course.exercise import Exercise, Mistake, random_int
from shared.tokenizers.bpe import GPT2_PATTERN, BPETokenizer

WHOLE = r"(?s).+"  # a pattern that cuts nothing: a text is one piece

Pair = tuple[bytes, bytes]


def _letters(generator: Generator, length: int, alphabet: str) -> str:
    return "".join(alphabet[i] for i in torch.randint(len(alphabet), (length,), generator=generator))


# ---- 1. counting


def pair_counts(words: dict[tuple[bytes, ...], int]) -> dict[tuple[bytes, bytes], int]:
    return _counted(words, lambda word: zip(word, word[1:]))


def _counted(
    words: dict[tuple[bytes, ...], int],
    pairs_of: Callable[[tuple[bytes, ...]], Iterable],
    weighted: bool = True,
) -> dict[Pair, int]:
    counts: Counter[Pair] = Counter()
    for word, times in words.items():
        for pair in pairs_of(word):
            counts[pair] += times if weighted else 1
    return dict(counts)


def _across(words: dict[tuple[bytes, ...], int]) -> dict[Pair, int]:
    text = [token for word, times in words.items() for _ in range(times) for token in word]
    return dict(Counter(zip(text, text[1:])))


def _count_cases(generator: Generator) -> list[tuple]:
    def case(words: int, length: int, alphabet: str) -> tuple[dict]:
        drawn = [_letters(generator, random_int(generator, 1, length + 1), alphabet) for _ in range(words)]
        return ({tuple(c.encode() for c in word): random_int(generator, 2, 9) for word in drawn},)

    return [
        ({(b"l", b"o", b"w"): 5, (b"l", b"o", b"w", b"e", b"r"): 2},),
        ({(b"an", b"an", b"an", b"a"): 3, (b"s",): 4},),  # a pair twice in a word; a word without any
        case(4, 6, "abc"),
        case(6, 8, "abcdef"),
        case(2, 9, "xé"),
        ({(b"a",): 7},),
    ]


PAIR_COUNTS = Exercise(
    task="""Training begins by counting which tokens stand side by side. `words` says how often each piece of
    the text occurs: its keys are tuples of tokens (bytes), its values counts. Return a dict from each pair of
    neighbours, (left, right), to how often it occurs in the whole text. A piece that occurs 5 times brings
    each of its pairs 5 times, a pair that it has twice 10 times. Pieces have no neighbours: no pair reaches
    from one to the next. Leave out pairs that never occur.""",
    reference=pair_counts,
    cases=_count_cases,
    mistakes=(
        Mistake(
            "how often a piece occurs is forgotten",
            lambda words: _counted(words, lambda word: zip(word, word[1:]), weighted=False),
            "Each piece was counted once, so ` the` weighs no more than a word that occurs a single time. The"
            " merges would then fit the dictionary, not the text.",
        ),
        Mistake(
            "pairs reach across pieces",
            _across,
            "The last token of a piece was paired with the first of the next. The text was cut so that no"
            " token can reach across a cut; and `words` does not even know which piece came after which.",
        ),
        Mistake(
            "pairs do not overlap",
            lambda words: _counted(words, lambda word: zip(word[::2], word[1::2])),
            "The steps were of two tokens: low became (l, o) only, and (o, w) was never seen. Every token but"
            " the last begins a pair.",
        ),
        Mistake(
            "the last pair is lost",
            lambda words: _counted(words, lambda word: zip(word[:-1], word[1:-1])),
            "The loop ends one pair too early. A piece of n tokens has n - 1 pairs, the last of them is"
            " (word[-2], word[-1]).",
        ),
        Mistake(
            "a pair is counted once in a piece",
            lambda words: _counted(words, lambda word: set(zip(word, word[1:]))),
            "A pair that occurs twice in a piece was counted once, as with `if pair in word` or a set. In"
            " banana, (a, n) occurs twice.",
        ),
    ),
    hints=(
        "Two loops: over the pieces with their counts, and inside over the neighbours in a piece.",
        (
            "zip(word, word[1:]) gives the neighbours of one piece. words.items() gives each piece with how"
            " often it occurs."
        ),
        (
            "counts = Counter(); for word, times in words.items(): for pair in zip(word, word[1:]):"
            " counts[pair] += times."
        ),
    ),
)


# ---- 2. merging


def merge_pair(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    return _merged(tokens, lambda i: (tokens[i], tokens[i + 1]) == pair, pair)


def _merged(
    tokens: list[bytes],
    fits: Callable[[int], bool],
    pair: Pair,
    step: int = 2,
    limit: int | None = None,
    end: int = 0,
) -> list[bytes]:
    """From left to right. step: how far to go on after a merge. limit: at most so many merges. end: tokens
    left out at the end.
    """
    out: list[bytes] = []
    i = 0
    done = 0
    while i < len(tokens) - end:
        if i + 1 < len(tokens) and done != limit and fits(i):
            out.append(pair[0] + pair[1])
            i += step
            done += 1
        else:
            out.append(tokens[i])
            i += 1
    return out


def _merged_from_the_right(tokens: list[bytes], pair: Pair) -> list[bytes]:
    turned = [t[::-1] for t in tokens[::-1]]
    return [t[::-1] for t in merge_pair(turned, (pair[1][::-1], pair[0][::-1]))[::-1]]


def _merge_cases(generator: Generator) -> list[tuple]:
    def case(length: int, alphabet: str, pair: Pair) -> tuple[list[bytes], Pair]:
        return [c.encode() for c in _letters(generator, length, alphabet)], pair

    return [
        ([b"b", b"a", b"n", b"a", b"n", b"a"], (b"a", b"n")),
        ([b"a", b"a", b"a", b"b"], (b"a", b"a")),  # the pair overlaps with itself
        ([b"ab", b"c", b"a", b"bc", b"ab", b"c"], (b"ab", b"c")),  # the same bytes, other tokens
        case(12, "ab", (b"a", b"b")),
        case(10, "ab", (b"b", b"b")),
        case(9, "abc", (b"c", b"a")),
        ([b"x"], (b"x", b"y")),
        ([b"x", b"y"], (b"x", b"y")),
    ]


MERGE_PAIR = Exercise(
    task="""Merging is all that byte-pair encoding does. `tokens` is a list of tokens (bytes), `pair` two
    tokens (left, right). Return a new list in which every left directly followed by right has become one
    token, left + right, and all else stays in its order. Go from left to right, and use no token twice: a a a
    with the pair (a, a) becomes aa a.""",
    reference=merge_pair,
    cases=_merge_cases,
    mistakes=(
        Mistake(
            "the last token is lost",
            lambda tokens, pair: _merged(tokens, lambda i: (tokens[i], tokens[i + 1]) == pair, pair, end=1),
            "The loop looks at pairs and stops before the last token, which begins none. If it is not merged,"
            " it still has to be copied.",
        ),
        Mistake(
            "the right half stays behind",
            lambda tokens, pair: _merged(tokens, lambda i: (tokens[i], tokens[i + 1]) == pair, pair, step=1),
            "After a merge the loop went on by one token instead of two, so the right half comes again,"
            " behind the token that contains it. The text has grown.",
        ),
        Mistake(
            "only the first place",
            lambda tokens, pair: _merged(tokens, lambda i: (tokens[i], tokens[i + 1]) == pair, pair, limit=1),
            "Only the first place was merged. A merge applies to every place where the pair stands.",
        ),
        Mistake(
            "merged from right to left",
            _merged_from_the_right,
            "Where a pair overlaps with itself, the direction decides: a a a became a aa and should be aa a."
            " Other tokens, other ids, and a trained model reads something that it has never seen.",
        ),
        Mistake(
            "the new token stands beside the old ones",
            lambda tokens, pair: [
                t
                for token in merge_pair(tokens, pair)
                for t in ((*pair, token) if token == pair[0] + pair[1] else (token,))
            ],
            "The merged token was added, but the two that it is made of were not taken away: an becomes a n"
            " an. The text has changed.",
        ),
        Mistake(
            "the bytes are compared, not the tokens",
            lambda tokens, pair: _merged(
                tokens, lambda i: tokens[i] + tokens[i + 1] == pair[0] + pair[1], pair
            ),
            "left + right was compared joined. Then (a, bc) is taken for (ab, c): the same bytes, but another"
            " pair, which has a merge of its own or none.",
        ),
    ),
    hints=(
        (
            "Walk along with an index. At each place: is this the pair? How far does the index go if it is,"
            " and how far if it is not?"
        ),
        (
            "while i < len(tokens): compare tokens[i : i + 2] with list(pair). It goes on by two after a"
            " merge and by one otherwise."
        ),
        (
            "if tokens[i : i + 2] == list(pair): out.append(pair[0] + pair[1]); i += 2; else:"
            " out.append(tokens[i]); i += 1. A slice at the end is merely shorter, so the last token needs no"
            " care."
        ),
    ),
)


# ---- 3. learning


def learn_merges(words: dict[str, int], n: int) -> list[tuple[bytes, bytes]]:
    documents = (word for word, times in words.items() for _ in range(times))
    return BPETokenizer.train(documents, 256 + n, WHOLE).merges


def _as_bytes(words: dict[str, int]) -> dict[tuple[bytes, ...], int]:
    return {tuple(bytes([b]) for b in word.encode()): times for word, times in words.items()}


def _learned(words: dict[str, int], n: int, best: Callable[[dict[Pair, int]], Pair]) -> list[Pair]:
    """best: picks a pair from the counts."""
    pieces, merges = _as_bytes(words), []
    for _ in range(n):
        merges.append(best(pair_counts(pieces)))
        pieces = {tuple(merge_pair(list(piece), merges[-1])): times for piece, times in pieces.items()}
    return merges


def _counted_once(words: dict[str, int], n: int) -> list[Pair]:
    counts = pair_counts(_as_bytes(words))
    return sorted(counts, key=lambda pair: (counts[pair], pair), reverse=True)[:n]


def _learn_cases(generator: Generator) -> list[tuple]:
    def case(words: int, alphabet: str, n: int) -> tuple[dict[str, int], int]:
        drawn = [_letters(generator, random_int(generator, 4, 8), alphabet) for _ in range(words)]
        return {word: random_int(generator, 1, 6) for word in drawn}, n

    return [
        ({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 6),
        ({"ab": 2, "cd": 2, "xy": 2}, 2),  # nothing but ties
        ({"abxy": 3, "abz": 1, "azq": 4}, 4),
        ({"aba": 2, "az": 2, "ab": 2}, 3),  # (ab, a) is the greater pair, az the greater token
        ({"aaaa": 1, "bc": 3, "bcbc": 1}, 3),
        case(6, "abcd", 5),
        case(5, "nié", 4),
    ]


LEARN_MERGES = Exercise(
    task="""Now the whole training. `words` says how often each piece (str) of the text occurs. Every piece
    begins as its UTF-8 bytes, one token each. Do `n` times: count the pairs, take the most frequent one,
    merge it in all pieces. Return the pairs taken, in order, as a list of (left, right). Among equally
    frequent pairs take the greatest as Python compares tuples of bytes: left first, then right. There are
    always enough pairs.""",
    reference=learn_merges,
    cases=_learn_cases,
    mistakes=(
        Mistake(
            "counted only once",
            _counted_once,
            "These are the most frequent pairs of the first count. Each merge changes the counts: it takes"
            " pairs away, and makes new ones with the new token. So count again after each merge; otherwise"
            " no token gets longer than two bytes.",
        ),
        Mistake(
            "the first of equals",
            lambda words, n: _learned(words, n, lambda counts: max(counts, key=counts.get)),
            "Among equals this takes the pair it met first, as max and most_common do. The result then"
            " depends on the order in which the text was read, and two people get different tokenizers from"
            " the same words.",
        ),
        Mistake(
            "the smallest of equals",
            lambda words, n: _learned(
                words, n, lambda counts: min(counts, key=lambda pair: (-counts[pair], pair))
            ),
            "Among equals the smallest pair was taken. That is a rule too, but not ours: from the first tie"
            " on, every id would differ.",
        ),
        Mistake(
            "equals are compared joined",
            lambda words, n: _learned(
                words, n, lambda counts: max(counts, key=lambda pair: (counts[pair], pair[0] + pair[1]))
            ),
            "Among equals, left + right was compared as one string. The pair is compared left first: (ab, a)"
            " is greater than (a, z), though aba is smaller than az.",
        ),
    ),
    hints=(
        (
            "You have written its two halves already: counting pairs, and merging one. What decides between"
            " equals?"
        ),
        (
            "Keep a dict from tuples of tokens to counts. Begin with tuple(bytes([b]) for b in"
            " word.encode()). max takes a key: the count, and then the pair itself."
        ),
        (
            "n times: counts = pair_counts(pieces); best = max(counts, key=lambda pair: (counts[pair],"
            " pair)); then build the dict anew with tuple(merge_pair(list(word), best)) for each word."
        ),
    ),
)


# ---- 4. cutting


def cut(text: str) -> list[str]:
    return regex.findall(GPT2_PATTERN, text)


def _cut_cases(generator: Generator) -> list[tuple]:
    def case(parts: int) -> tuple[str]:
        pool = ["king", "Rome", "don't", "42", "a1b2", ", ", "--", "   ", "\n", "\n\n", " ", "?!", "we'll"]
        return (
            "".join(
                pool[random_int(generator, 0, len(pool))] + " " * random_int(generator, 0, 2)
                for _ in range(parts)
            ),
        )

    return [
        ("To be, or not to be",),
        ("ROMEO:\nWe'll meet at 10, I'd say.",),
        ("a   b  1600 c3po ",),  # several spaces; letters beside digits; a space at the end
        ("What?! \n\n  It's -- well, he's gone",),
        case(8),
        case(12),
        ("",),
    ]


CUT = Exercise(
    task="""Before anything is merged, a text is cut into pieces, and no token reaches across a cut. Cut
    `text` (ASCII) as GPT-2 does, into a list of str that joined give the text again. At each place, the first
    of these that fits is a piece: 's 't 'd 'm 'll 've or 're; a run of letters, with one space before it if
    there is one; a run of digits, likewise; a run of other signs (neither letters, digits nor white space),
    likewise; a run of two or more white-space characters, all but the last of them if text follows; or white
    space. A regular expression does it in one line: import re, or regex.""",
    reference=cut,
    cases=_cut_cases,
    mistakes=(
        Mistake(
            "str.split",
            lambda text: text.split(),
            "split throws the white space away, and the text cannot be had back: every character has to be in"
            " a piece. It leaves the comma with its word as well, so `be` and `be,` have nothing in common.",
        ),
        Mistake(
            "white space is lost",
            lambda text: regex.findall(r"'(?:[sdmt]|ll|ve|re)|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+", text),
            "Words and signs are cut well, but the white space between them is gone, and with it the lines of"
            " the verse.",
        ),
        Mistake(
            "the space is behind the word",
            lambda text: regex.findall(
                r"'(?:[sdmt]|ll|ve|re) ?|\p{L}+ ?|\p{N}+ ?|[^\s\p{L}\p{N}]+ ?|\s+", text
            ),
            "The space went with the word before it. GPT-2 puts it in front of the next word: a model that"
            " writes word by word then needs no token for the space, and a word is the same before a space, a"
            " comma and the end.",
        ),
        Mistake(
            "the last of several spaces is not left to the word",
            lambda text: regex.findall(
                r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", text
            ),
            r"After several spaces the word stands alone, and its token is another than after one space."
            r" \s+(?!\S) before \s+ takes all of them but "
            "the last, which goes with the word.",
        ),
    ),
    hints=(
        (
            "re.findall with alternatives, written a|b|c: at each place the first that fits is taken. Begin"
            " with words only: ` ?[A-Za-z]+`."
        ),
        r"Six alternatives in the task's order. Signs are [^\sA-Za-z0-9]. A run of white space without its"
        r" last character, where text follows: "
        r"\s+(?!\S). Groups must not be captured, write (?:...).",
        (
            're.findall(r"\'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\\sA-Za-z0-9]+|\\s+(?!\\S)|\\s+",'
            " text)."
        ),
    ),
)


# ---- 5. encoding


def encode_piece(piece: str, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    tokenizer = BPETokenizer(merges, WHOLE)
    return [tokenizer.vocab[i] for i in tokenizer.encode(piece)]


def _encoded(
    piece: str,
    merges: list[Pair],
    choose: Callable[[list[bytes], list[Pair]], Pair],
    limit: int | None = None,
) -> list[bytes]:
    """choose: one of the pairs that can be merged. limit: at most so many merges."""
    tokens, done = [bytes([b]) for b in piece.encode()], 0
    while done != limit:
        able = [pair for pair in zip(tokens, tokens[1:]) if pair in merges]
        if not able:
            break
        tokens = merge_pair(tokens, choose(tokens, able))
        done += 1
    return tokens


def _longest_first(piece: str, merges: list[Pair]) -> list[bytes]:
    vocab = {bytes([i]) for i in range(256)} | {a + b for a, b in merges}
    rest = piece.encode()
    out: list[bytes] = []
    while rest:
        out.append(next(rest[:end] for end in range(len(rest), 0, -1) if rest[:end] in vocab))
        rest = rest[len(out[-1]) :]
    return out


def _encode_cases(generator: Generator) -> list[tuple]:
    def case(length: int, alphabet: str, n: int) -> tuple[str, list[Pair]]:
        text = _letters(generator, 60, alphabet)
        return _letters(generator, length, alphabet), BPETokenizer.train(text, 256 + n, WHOLE).merges

    ranks = [(b"b", b"c"), (b"a", b"b"), (b"bc", b"d"), (b"c", b"d")]
    return [
        ("abcd", ranks),
        ("ababc", ranks),  # here ab is the more frequent pair, bc the earlier
        ("abcbc", ranks),  # here ab stands first
        ("abc", [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]),
        ("café", ranks),  # no merge for the two bytes of é
        case(12, "abc", 10),
        case(10, "éñx", 6),
        ("", ranks),
    ]


ENCODE_PIECE = Exercise(
    task="""A trained tokenizer encodes by doing its merges again, in the order in which they were learned.
    `piece` is one piece of text (str), `merges` a list of (left, right), learned first to last. Begin with
    the UTF-8 bytes of the piece, one token each. Of all pairs that stand side by side, merge the one that
    comes first in `merges`, wherever it stands; go on until no pair is in `merges`. Return the tokens, a list
    of bytes.""",
    reference=encode_piece,
    cases=_encode_cases,
    mistakes=(
        Mistake(
            "the longest token first",
            _longest_first,
            "This takes the longest known token from the left, as a dictionary search would. Training never"
            " saw such cuts: the order of the merges decides, not the length of what they make.",
        ),
        Mistake(
            "from left to right",
            lambda piece, merges: _encoded(piece, merges, lambda tokens, able: able[0]),
            "The leftmost pair that can be merged was merged first. It is not where a pair stands that"
            " decides, but how early it was learned.",
        ),
        Mistake(
            "the most frequent pair of the piece",
            lambda piece, merges: _encoded(
                piece, merges, lambda tokens, able: max(able, key=lambda p: (able.count(p), -merges.index(p)))
            ),
            "The pairs of this piece were counted. Counting belongs to training; what was learned there is"
            " the order in `merges`, and it holds for every text, however short.",
        ),
        Mistake(
            "only one merge",
            lambda piece, merges: _encoded(
                piece, merges, lambda tokens, able: min(able, key=merges.index), limit=1
            ),
            "It stopped after one merge. Each merge makes new neighbours, and these may have a merge too: go"
            " on until none has.",
        ),
        Mistake(
            "characters instead of bytes",
            lambda piece, merges: reduce(merge_pair, merges, [c.encode() for c in piece]),
            "The piece was taken apart into characters. Each é is two bytes, and two tokens to begin with; as"
            " one it is a token that the vocabulary may not have, and no merge of its bytes is ever found.",
        ),
    ),
    hints=(
        "A loop: which neighbours are in `merges`, which of them comes first there, merge that one.",
        (
            "Ranks make it easy: {pair: rank for rank, pair in enumerate(merges)}. min over the neighbours,"
            " with the rank as key; stop when the best has none."
        ),
        (
            "Simpler still: tokens = [bytes([b]) for b in piece.encode()], then for pair in merges: tokens ="
            " merge_pair(tokens, pair). A later merge never makes room for an earlier one."
        ),
    ),
)


# ---- 6. decoding


def decode_ids(ids: list[int], vocab: dict[int, bytes]) -> str:
    return BPETokenizer([], vocab=vocab).decode(ids)


def _decode_cases(generator: Generator) -> list[tuple]:
    vocab = dict(
        enumerate(
            [bytes([i]) for i in range(256)]
            + [b" the", "é".encode(), " 😀".encode()[:3], b"na", "ï".encode()[:1]]
        )
    )

    def case(text: str) -> tuple[list[int], dict[int, bytes]]:
        ids = list(text.encode())
        return [
            i for n in ids for i in ([n, random_int(generator, 256, 260)] if n == ord("_") else [n])
        ], vocab

    return [
        ([256, 32, *"café".encode()], vocab),  # é in two tokens
        ([258, *"😀".encode()[2:], 259, 260, 0xAF, 118, 101], vocab),
        ([256, *"ünï".encode()[:-1]], vocab),  # ends in half a character
        (list("中文".encode())[1:], vocab),  # begins in the middle of one
        case("a_b_ñ_c_"),
        case("_ö__ß_"),
        ([], vocab),
    ]


DECODE_IDS = Exercise(
    task="""Back from ids to text. `ids` is a list of token ids, `vocab` gives the bytes of each. Return the
    text (str) that all the bytes together stand for, read as UTF-8. A character's bytes may be spread over
    several tokens. Bytes that are no character, as when the ids stop in the middle of one, become U+FFFD, the
    sign �, which is what errors="replace" does.""",
    reference=decode_ids,
    cases=_decode_cases,
    mistakes=(
        Mistake(
            "decoded token by token",
            lambda ids, vocab: "".join(vocab[i].decode(errors="replace") for i in ids),
            "Each token was decoded by itself. A token may hold half a character, and both halves become �"
            " although together they are a good é or 中. Join the bytes first, then decode once.",
        ),
        Mistake(
            "wrong bytes are dropped",
            lambda ids, vocab: b"".join(vocab[i] for i in ids).decode(errors="ignore"),
            'errors="ignore" drops what is no character without a word. The reader of a text should see that'
            " something is missing there.",
        ),
        Mistake(
            "a byte taken for a character",
            lambda ids, vocab: b"".join(vocab[i] for i in ids).decode("latin-1"),
            "Each byte became a character, as chr or latin-1 do, and é came out as Ã©. Only below 128 are"
            " bytes and characters the same.",
        ),
        Mistake(
            "the space in front is stripped",
            lambda ids, vocab: b"".join(vocab[i] for i in ids).decode(errors="replace").strip(),
            "White space at the ends was stripped. The space of ` the` belongs to the text, and to a text"
            " that goes on from an earlier one it matters.",
        ),
    ),
    hints=(
        "Two steps. Which of them must come first: joining or decoding?",
        (
            'b"".join makes one bytes object of all tokens. bytes.decode takes an argument for what cannot be'
            " decoded."
        ),
        'b"".join(vocab[i] for i in ids).decode("utf-8", errors="replace").',
    ),
)


EXERCISES: tuple[Exercise, ...] = (PAIR_COUNTS, MERGE_PAIR, LEARN_MERGES, CUT, ENCODE_PIECE, DECODE_IDS)
