"""The graded exercises of week 5: counting pairs, merging one, learning merges, cutting a text into pieces,
training a tokenizer, encoding a piece, decoding, and the tokenizer as a class.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, reduce
from typing import Any

import regex
import torch
from torch import Generator

from shared.course.exercise import Exercise, Mistake, NotRight, building, random_int
from shared.tokenizers import bpe_training
from shared.tokenizers.bpe import BPETokenizer
from shared.tokenizers.patterns import GPT2_PATTERN, GPT4_PATTERN

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


def _overwritten(words: dict[tuple[bytes, ...], int]) -> dict[Pair, int]:
    counts: dict[Pair, int] = {}
    for word, times in words.items():
        counts |= {pair: n * times for pair, n in Counter(zip(word, word[1:])).items()}
    return counts


def _with_zeros(words: dict[tuple[bytes, ...], int]) -> dict[Pair, int]:
    known = {token for word in words for token in word}
    return {(left, right): 0 for left in known for right in known} | pair_counts(words)


def _not_overlapping(word: tuple[bytes, ...]) -> Iterator[Pair]:
    """The pairs of a piece, where one that overlaps with the same pair just before it is left out."""
    last: tuple[Pair, int] | None = None
    for i, pair in enumerate(zip(word, word[1:])):
        if last != (pair, i - 1):
            last = (pair, i)
            yield pair


def _across(words: dict[tuple[bytes, ...], int]) -> dict[Pair, int]:
    text = [token for word, times in words.items() for _ in range(times) for token in word]
    return dict(Counter(zip(text, text[1:])))


def _count_cases(generator: Generator) -> list[tuple]:
    def case(words: int, length: int, alphabet: str) -> tuple[dict]:
        drawn = [_letters(generator, random_int(generator, 1, length + 1), alphabet) for _ in range(words)]
        return ({tuple(c.encode() for c in word): random_int(generator, 2, 9) for word in drawn},)

    return [
        ({(b"l", b"o", b"w"): 5, (b"l", b"o", b"w", b"e", b"r"): 2},),
        ({(b"an", b"an", b"an", b"a"): 3, (b"s",): 4},),  # a pair twice in a piece; a piece without any
        ({(b"a", b"a", b"a", b"a"): 2, (b"b", b"a", b"a"): 3},),  # pairs that overlap
        case(4, 6, "abc"),
        case(6, 8, "abcdef"),
        case(2, 9, "xé"),
        ({(b"a",): 7},),
        ({},),
    ]


PAIR_COUNTS = Exercise(
    task="""Training begins by counting which tokens stand side by side. `words` says how often each piece of
    the text occurs: its keys are tuples of tokens (bytes), its values counts of 1 or more. Return a dict from
    each pair of neighbours, (left, right), to how often it occurs in the whole text. A piece that occurs 5
    times brings each of its pairs 5 times, and a pair that it has twice 10 times. Every token but a piece's
    last begins a pair, so a a a has (a, a) twice. Pieces have no neighbours: no pair reaches from one to the
    next. The dict has no entry for a pair that never occurs, not even with the value 0.""",
    reference=pair_counts,
    cases=_count_cases,
    valid=lambda words: all(times > 0 for times in words.values()),
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
        Mistake(
            "a later piece replaces what was counted before",
            _overwritten,
            "A pair has the count of the last piece that contains it. dict.update and counts[pair] = ..."
            " replace a value; add to it: counts[pair] += times.",
        ),
        Mistake(
            "pairs that never occur have an entry",
            _with_zeros,
            "There is an entry for every pair of known tokens, most of them 0. Of 50,000 tokens that would be"
            " 2.5 billion entries; count only what stands side by side.",
        ),
        Mistake(
            "overlapping pairs are counted once",
            lambda words: _counted(words, _not_overlapping),
            "a a a was counted as one (a, a), as if the pairs were merged while they are counted. Every token"
            " but the last begins a pair: it has two.",
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


def _replaced_in_text(tokens: list[bytes], pair: Pair) -> list[bytes]:
    return b" ".join(tokens).replace(b" ".join(pair), b"".join(pair)).split(b" ")


def _merged_from_the_right(tokens: list[bytes], pair: Pair) -> list[bytes]:
    turned = [t[::-1] for t in tokens[::-1]]
    return [t[::-1] for t in merge_pair(turned, (pair[1][::-1], pair[0][::-1]))[::-1]]


def _explain_merging(yours: list[bytes], tokens: list[bytes], pair: Pair) -> str | None:
    merged = pair[0] + pair[1]
    if not all(isinstance(token, bytes) for token in yours):
        return "Every token of the result must be bytes; the merged one is left + right."
    if b"".join(yours) != b"".join(tokens):
        return "Joined, the tokens do not give the same bytes as before: some were lost, or are there twice."
    strange = [token for token in yours if token not in (*tokens, merged)]
    if strange:
        return f"It made {strange[0]!r}, which is neither left + right, {merged!r}, nor a token of `tokens`."
    if pair in zip(yours, yours[1:]):
        return f"{pair[0]!r} and {pair[1]!r} still stand side by side: every place is merged."
    return "The pair was merged where it does not stand, or not from left to right."


def _merge_cases(generator: Generator) -> list[tuple]:
    def case(length: int, alphabet: str, pair: Pair) -> tuple[list[bytes], Pair]:
        return [c.encode() for c in _letters(generator, length, alphabet)], pair

    return [
        ([b"b", b"a", b"n", b"a", b"n", b"a"], (b"a", b"n")),
        ([b"a", b"a", b"a", b"b"], (b"a", b"a")),  # the pair overlaps with itself
        ([b"ab", b"c", b"a", b"bc", b"ab", b"c"], (b"ab", b"c")),  # the same bytes, other tokens
        ([b"x"], (b"x", b"x")),
        case(12, "ab", (b"a", b"b")),
        case(10, "ab", (b"b", b"b")),
        case(9, "abc", (b"c", b"a")),
        ([b"ba", b"n", b"a", b"ny", b" ", b"a", b"n", b" "], (b"a", b"n")),  # tokens that end in it; spaces
        ([], (b"x", b"y")),
        ([b"x", b"y"], (b"x", b"y")),
    ]


MERGE_PAIR = Exercise(
    task="""Merging is all that byte-pair encoding does. `tokens` is a list of tokens (bytes), `pair` two
    tokens (left, right). Return a list in which every left directly followed by right has become one token,
    left + right, and all else stays in its order. A token is compared whole: with the pair (a, n), the tokens
    ba n stay as they are. Go from left to right, and use no token twice: a a a with the pair (a, a) becomes
    aa a. `tokens` itself is not changed.""",
    reference=merge_pair,
    cases=_merge_cases,
    valid=lambda tokens, pair: len(pair) == 2 and all(tokens) and all(pair),
    explain=_explain_merging,
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
        Mistake(
            "replaced in the joined text",
            _replaced_in_text,
            "The tokens were joined with spaces and the pair was replaced in that text. Then it is also found"
            " where it is the end or the beginning of a longer token, and a token that is a space does not"
            " come back from split.",
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


def _greatest(counts: dict[Pair, int]) -> Pair:
    return max(counts, key=lambda pair: (counts[pair], pair))


def _greatest_by_id() -> Callable[[dict[Pair, int]], Pair]:
    """The most frequent pair, of equals the one with the greatest ids: a merge's token is 256 or more."""
    ids = {bytes([i]): i for i in range(256)}

    def best(counts: dict[Pair, int]) -> Pair:
        pair = max(counts, key=lambda pair: (counts[pair], ids[pair[0]], ids[pair[1]]))
        ids.setdefault(pair[0] + pair[1], len(ids))
        return pair

    return best


COMPARED_BY_ID = (
    "Among equally frequent pairs, the ids of the tokens were compared. A merged token has an id above those"
    " of all bytes. Compare the bytes: (x, y) is greater than (ab, x), though ab has the greater id."
)


def _learned(
    words: dict[str, int],
    n: int,
    best: Callable[[dict[Pair, int]], Pair],
    characters: bool = False,
    stops: bool = True,
) -> list[Pair]:
    """best: picks a pair from the counts. characters: begins with those instead of with bytes. stops: where
    no pair is left; otherwise it crashes there.
    """
    pieces, merges = _as_bytes(words), []
    if characters:
        pieces = {tuple(c.encode() for c in word): times for word, times in words.items()}
    for _ in range(n):
        counts = pair_counts(pieces)
        if stops and not counts:
            break
        merges.append(best(counts))
        pieces = {tuple(merge_pair(list(piece), merges[-1])): times for piece, times in pieces.items()}
    return merges


def _counted_once(words: dict[str, int], n: int) -> list[Pair]:
    counts = pair_counts(_as_bytes(words))
    return sorted(counts, key=lambda pair: (counts[pair], pair), reverse=True)[:n]


def _explain_learning(yours: list[Pair], words: dict[str, int], n: int) -> str | None:
    """What is wrong with the first wrong merge."""
    pieces, right = _as_bytes(words), _learned(words, n, _greatest)
    for number, (given, best) in enumerate(zip(yours, right), 1):
        is_pair = isinstance(given, list | tuple) and len(given) == 2
        if not is_pair or not all(isinstance(token, bytes) for token in given):
            return f"A merge is a pair of tokens, (left, right), both bytes; yours is {given!r}."
        counts = pair_counts(pieces)
        made = {left + right for left, right in right[: number - 1]}
        unmade = next((token for token in given if len(token) != 1 and token not in made), None)
        if unmade is not None:
            return (
                f"Merge {number} is {given!r}, and no merge before it has made {unmade!r}: a piece begins as"
                " single bytes, also where a character has several."
            )
        if tuple(given) == best:
            pieces = {tuple(merge_pair(list(piece), best)): times for piece, times in pieces.items()}
        elif tuple(given) not in counts:
            return f"Merge {number} is {given!r}, but at that point these two stand side by side nowhere."
        elif counts[tuple(given)] < counts[best]:
            return (
                f"Merge {number} is {given!r}, which occurs {counts[tuple(given)]} times at that point;"
                f" {best!r} occurs {counts[best]} times."
            )
        else:
            return (
                f"At merge {number}, {given!r} and {best!r} are equally frequent; the second is the greater"
                " pair as Python compares tuples of bytes (left first, then right), and goes first. Neither"
                " ids, nor the joined bytes, nor which was met first decides."
            )
    if len(yours) < len(right):
        return f"It stops after {len(yours)} merges; wanted are {len(right)}, and the text has the pairs."
    return f"It gives {len(yours)} merges; wanted are {len(right)}."


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
        ({"é": 3, "è": 2, "in": 4}, 3),  # characters of two bytes
        case(6, "abcd", 5),
        case(5, "nié", 4),
        ({"low": 1}, 0),
    ]


LEARN_MERGES = Exercise(
    task="""Now the whole training. `words` says how often each piece (str) of the text occurs. Every piece
    begins as its UTF-8 bytes, one token each. Do `n` times: count the pairs of the pieces as they are now,
    each as often as its piece occurs; take the most frequent pair; merge it in all pieces. Return the pairs
    taken, in order, as a list of (left, right). Among equally frequent pairs take the greatest as Python
    compares tuples of bytes: left first, then right. There are always enough pairs. Your `pair_counts` and
    `merge_pair` are welcome.""",
    reference=learn_merges,
    cases=_learn_cases,
    forbids=(BPETokenizer, bpe_training.learn_merges),
    valid=lambda words, n: n >= 0 and all(times > 0 for times in words.values()),
    explain=_explain_learning,
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
        Mistake(
            "equals are compared by id",
            lambda words, n: _learned(words, n, _greatest_by_id()),
            COMPARED_BY_ID,
        ),
        Mistake(
            "characters instead of bytes",
            lambda words, n: _learned(words, n, _greatest, characters=True),
            "The pieces were taken apart into characters. é is two bytes, and they are two tokens until a"
            " merge joins them: word.encode() gives the bytes, a character's encode() all of its bytes in"
            " one.",
        ),
        Mistake(
            "characters instead of bytes, and then no pair is left",
            lambda words, n: _learned(words, n, _greatest, characters=True, stops=False),
            "The pieces were taken apart into characters, and the merges ran out of pairs. A piece begins as"
            " its bytes: é is two tokens, and they are a pair. word.encode() gives the bytes; tuple(word) and"
            " a character's encode() give é in one.",
        ),
        Mistake(
            "how often a piece occurs is forgotten",
            lambda words, n: _learned(dict.fromkeys(words, 1), n, _greatest),
            "Each different piece was counted once. A pair in a piece that occurs 5 times counts 5 times.",
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
    pool = ["king", "Rome", "don't", "42", "a1b2", ", ", "--", "   ", "\n", "\n\n", " ", "?!", "we'll", "\t"]
    pool += ["_", "I'D", "'t", "7_", "x's", " '", "''"]

    def case(parts: int) -> tuple[str]:
        drawn = [
            pool[random_int(generator, 0, len(pool))] + " " * random_int(generator, 0, 2)
            for _ in range(parts)
        ]
        return ("".join(drawn),)

    return [
        ("To be, or not to be: I",),
        ("ROMEO:\nWe'll meet at 10, I'd say.",),
        ("a   b  1600   -- `s c3po ",),  # several spaces; letters beside digits; a space at the end
        ("What?! \n\n  It's -- well, he's gone\n\n",),
        ("they've, we're, I'm, can't, she'd: 'tis o'clock, rock'n'roll, dogs' ''s",),
        ("IT'S WE'LL I'D",),  # GPT-2 knows contractions in small letters only
        ('snake_case _x x_1 3.14 12345 $9 ("so") #!',),
        ("\tone\n two\r\n\t three \t4 \t, ",),  # only a space goes with what comes next
        case(8),
        case(14),
    ]


def _cut_by(pattern: str) -> Callable[[str], list[str]]:
    return regex.compile(pattern).findall


def _split(text: str) -> list[str]:
    return text.split()


RULES = (
    (r"'(?:[sdmt]|ll|ve|re)", "1, a contraction"),
    (r" ?\p{L}+", "2, a run of letters with the space before it"),
    (r" ?\p{N}+", "3, a run of digits with the space before it"),
    (r" ?[^\s\p{L}\p{N}]+", "4, a run of other signs with the space before it"),
    (r"\s+(?!\S)", "5, a run of white space that leaves its last character to what follows"),
    (r"\s+", "6, white space"),
)


def _explain_cutting(yours: list[str], text: str) -> str | None:
    """Which rule is broken at the first place that is cut otherwise."""
    if "" in yours or not all(isinstance(piece, str) for piece in yours):
        return (
            "A piece is a str, and not an empty one. With a group in ( ) findall gives what the group"
            " captures instead of the whole piece: write (?:...)."
        )
    at = 0
    for given, right in zip([*yours, ""], cut(text)):
        if given != right:
            rule = next(words for pattern, words in RULES if regex.match(pattern, text[at:]))
            behind = f"Behind {text[:at]!r}" if at else "At the start"
            return f"{behind} the piece is {right!r}, by rule {rule}; yours is {given!r}."
        at += len(right)
    return f"There are {len(yours)} pieces, and the text has {len(cut(text))}."


CUT = Exercise(
    task="""Before anything is merged, a text is cut into pieces, and no token reaches across a cut. Cut
    `text` as GPT-2 does, into a list of str that joined give the text again. The text is ASCII; white space
    is the space, the tab and the line breaks \\n and \\r. Begin at the start of the text. At each place,
    the first of these six that fits is a piece, as long as it can be, and the next piece begins behind it:

    1. one of 's 't 'd 'm 'll 've 're, in small letters;
    2. a run of letters, with one space before it if there is one;
    3. a run of digits, likewise with one space before it if there is one;
    4. a run of other signs (all but letters, digits and white space; so also _ and '), likewise;
    5. a run of white space: if it is followed by anything else, all but its last character, where that
       leaves one; at the end of the text, all of it;
    6. a run of white space.

    A regular expression does it in one line: import re, or regex.""",
    reference=cut,
    cases=_cut_cases,
    forbids=(BPETokenizer,),
    explain=_explain_cutting,
    valid=lambda text: text.isascii() and not set("\x0b\x0c\x1c\x1d\x1e\x1f") & set(text),
    mistakes=(
        Mistake(
            "str.split",
            _split,
            "split throws the white space away, and the text cannot be had back: every character has to be in"
            " a piece. It leaves the comma with its word as well, so `be` and `be,` have nothing in common.",
        ),
        Mistake(
            "white space is lost",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+"),
            "Words and signs are cut well, but the white space between them is gone, and with it the lines of"
            " the verse.",
        ),
        Mistake(
            "the space is behind the word",
            _cut_by(r"'(?:[sdmt]|ll|ve|re) ?|\p{L}+ ?|\p{N}+ ?|[^\s\p{L}\p{N}]+ ?|\s+"),
            "The space went with the word before it. GPT-2 puts it in front of the next word: a model that"
            " writes word by word then needs no token for the space, and a word is the same before a space, a"
            " comma and the end.",
        ),
        Mistake(
            "the last of several spaces is not left to the word",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"),
            r"After several spaces the word stands alone, and its token is another than after one space."
            r" \s+(?!\S) before \s+ takes all of them but "
            "the last, which goes with the word.",
        ),
        Mistake(
            "every white-space character is a piece",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"),
            "Each character of white space became a piece of its own. Number 5 of the list takes a run: four"
            " spaces before a word are a piece of three, and one that goes with the word.",
        ),
        Mistake(
            "case is ignored",
            _cut_by(r"(?i)'(?:[sdmt]|ll|ve|re)| ?[a-z]+| ?[0-9]+| ?[^\sa-z0-9]+|\s+(?!\S)|\s+"),
            "'S and 'LL were cut off like 's and 'll. GPT-2 knows its contractions in small letters only"
            " (GPT-4's pattern mends that); the text IT'S becomes IT, ' and S.",
        ),
        Mistake(
            "a group captures",
            _cut_by(r"'([sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
            "With a group in ( ), findall gives what the group captures instead of the whole piece: s for a"
            " contraction, and an empty text for everything else. (?:...) groups and captures nothing.",
        ),
        Mistake(
            "the underscore is a letter",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d]+| ?\d+| ?(?:[^\s\w])+|\s+(?!\S)|\s+"),
            r"snake_case stayed whole: \w contains the underscore, and so does [^\W\d]. It is a sign, as the"
            " hyphen is.",
        ),
        Mistake(
            "the underscore is lost",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+"),
            r"The underscore is in no piece: \w contains it, so [^\s\w] leaves it out, and it is none of the"
            " letters either. Joined, the pieces must give the text again.",
        ),
        Mistake(
            r"\w+ for letters",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)| ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+"),
            r"\w is letters, digits and the underscore: c3po and snake_case became one piece each. Letters"
            " are one run, digits another, and the underscore is a sign.",
        ),
        Mistake(
            "letters and digits in one piece",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"),
            "Letters and digits were taken together: c3po is c, 3 and po. Letters are one run, digits"
            " another.",
        ),
        Mistake(
            "the apostrophe is a sign first",
            _cut_by(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|'(?:[sdmt]|ll|ve|re)"),
            "The contractions were never found: the run of signs comes before them, and takes the apostrophe."
            " The first that fits is taken, so they must stand first.",
        ),
        Mistake(
            "any white space goes with the word",
            _cut_by(r"'(?:[sdmt]|ll|ve|re)|\s?\p{L}+|\s?\p{N}+|\s?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
            "A line break or a tab went with the word behind it. Only a space does: a line break is a piece"
            " of its own.",
        ),
        Mistake(
            "GPT-4's pattern",
            _cut_by(GPT4_PATTERN),
            "This is GPT-4's pattern, which takes any one sign before a word, three digits at most, and"
            " contractions in capitals. The task is GPT-2's.",
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


# ---- 5. training


def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    return bpe_training.learn_merges(Counter(regex.findall(GPT2_PATTERN, text)), vocab_size - 256, False)


def _trained(
    pieces: Iterable[str], n: int, best: Callable[[dict[Pair, int]], Pair] = _greatest, least: int = 1
) -> list[Pair]:
    """At most `n` merges. least: how often a pair must occur to be merged."""
    words, merges = _as_bytes(Counter(pieces)), []
    while len(merges) < n:
        counts = pair_counts(words)
        if not counts or max(counts.values()) < least:
            break
        merges.append(best(counts))
        merged: Counter[tuple[bytes, ...]] = Counter()
        for piece, times in words.items():
            merged[tuple(merge_pair(list(piece), merges[-1]))] += times
        words = merged
    return merges


def _trained_on_characters(text: str, vocab_size: int) -> list[Pair]:
    return _learned(Counter(_pieces(text)), vocab_size - 256, _greatest, characters=True)


def _pieces(text: str) -> list[str]:
    return regex.findall(GPT2_PATTERN, text)


TRAINED_ON = (
    "She sells sea shells by the sea shore. The shells she sells are sea-shells, I'm sure.\n\n"
    "So if she sells sea shells on the sea shore, then I'm sure she sells sea-shore shells.\n"
)


def _train_cases(generator: Generator) -> list[tuple]:
    def case(words: int, alphabet: str, vocab_size: int) -> tuple[str, int]:
        drawn = [_letters(generator, random_int(generator, 1, 6), alphabet) for _ in range(words)]
        text = "".join(word + ("\n", " ", ", ")[random_int(generator, 0, 3)] for word in drawn)
        return text, vocab_size

    return [
        ("low lower lowest", 260),
        (TRAINED_ON, 256 + 40),
        ("ab ab", 300),  # pairs for three tokens only
        ("naïve café, naïve cafés; 中文 中文 😀😀 😀", 256 + 12),
        ("  1600 1600 16 160 don't don't ISN'T   x   x \n \n\n", 256 + 14),
        case(40, "abc", 256 + 25),
        case(30, "aé", 256 + 15),
        ("to be", 256),
        ("", 300),
    ]


TRAIN_BPE = Exercise(
    task="""Now the tokenizer of a whole text. `train_bpe(text, vocab_size)` returns its merges, a list of
    (left, right) in the order in which they were learned. `text` may hold any characters: cut it with
    `regex.findall(GPT2_PATTERN, text)`, which are the rules of `cut` with the letters and digits of every
    script; GPT2_PATTERN comes from shared.tokenizers.bpe. Count how often each different piece occurs, and
    learn from these counts as in `learn_merges`: from UTF-8 bytes, the most frequent pair first, of equally
    frequent ones the greatest. The vocabulary has `vocab_size` tokens (256 or more): the 256 bytes, and one
    for each merge. Where the text has no pair left, the list ends early; a pair that occurs once is merged
    like any other.""",
    reference=train_bpe,
    cases=_train_cases,
    points=3,
    forbids=(BPETokenizer, bpe_training.learn_merges),
    valid=lambda text, vocab_size: vocab_size >= 256,
    explain=lambda yours, text, vocab_size: _explain_learning(
        yours, Counter(_pieces(text)), vocab_size - 256
    ),
    mistakes=(
        Mistake(
            "it does not stop where no pair is left",
            lambda text, vocab_size: _learned(
                Counter(_pieces(text)), vocab_size - 256, _greatest, stops=False
            ),
            "It looked for the most frequent pair where there was none. `learn_merges` may count on pairs"
            " enough, this may not: where `pair_counts` gives an empty dict, the list of merges ends.",
        ),
        Mistake(
            "characters are counted, not pieces",
            lambda text, vocab_size: _learned(Counter(text), vocab_size - 256, _greatest, stops=False),
            "Counter(text) counts the characters of the text, and one of a single byte has no pair. Cut the"
            " text first: Counter(regex.findall(GPT2_PATTERN, text)) counts the pieces.",
        ),
        Mistake(
            "the text is not cut",
            lambda text, vocab_size: _trained([text], vocab_size - 256),
            "The whole text was one piece, and tokens reach over the ends of words. Cut first, then count the"
            " pieces.",
        ),
        Mistake(
            "the bytes do not count",
            lambda text, vocab_size: _trained(_pieces(text), vocab_size),
            "There are as many merges as the vocabulary has tokens. The 256 bytes belong to the vocabulary:"
            " vocab_size - 256 merges are left.",
        ),
        Mistake(
            "the spaces are lost",
            lambda text, vocab_size: _trained(text.split(), vocab_size - 256),
            "The text was cut with split, and no token has a space. The space belongs to the word behind it.",
        ),
        Mistake(
            "letters are A to Z only",
            lambda text, vocab_size: _trained(
                regex.findall(
                    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text
                ),
                vocab_size - 256,
            ),
            "naïve was cut at its ï: for this pattern, as for `cut`, a letter is A to Z. The text may hold"
            " any characters, and GPT2_PATTERN knows the letters of every script.",
        ),
        Mistake(
            "how often a piece occurs is forgotten",
            lambda text, vocab_size: _trained(set(_pieces(text)), vocab_size - 256),
            "Each different piece was counted once, however often it occurs in the text.",
        ),
        Mistake(
            "pairs that occur once are not merged",
            lambda text, vocab_size: _trained(_pieces(text), vocab_size - 256, least=2),
            "It stopped when no pair occurred twice. That may be wise, but the task asks for vocab_size"
            " tokens, as long as there are pairs at all.",
        ),
        Mistake(
            "characters instead of bytes",
            _trained_on_characters,
            "The pieces were cut into characters, each a token of all its bytes. Tokens start as single"
            " bytes: only so do 256 tokens suffice for every text, and é has to be merged like any pair.",
        ),
        Mistake(
            "equals are compared by id",
            lambda text, vocab_size: _trained(_pieces(text), vocab_size - 256, _greatest_by_id()),
            COMPARED_BY_ID,
        ),
        Mistake(
            "equals are compared joined",
            lambda text, vocab_size: _trained(
                _pieces(text),
                vocab_size - 256,
                lambda counts: max(counts, key=lambda pair: (counts[pair], pair[0] + pair[1], pair)),
            ),
            "Among equally frequent pairs, left + right was compared as one string. The pair is compared left"
            " first: (ab, a) is greater than (a, z), though aba is smaller than az.",
        ),
        Mistake(
            "the first of equals",
            lambda text, vocab_size: _trained(
                _pieces(text), vocab_size - 256, lambda counts: max(counts, key=counts.__getitem__)
            ),
            "Among equally frequent pairs this takes the one it met first. The key of max needs the pair"
            " behind the count.",
        ),
        Mistake(
            "the smallest of equals",
            lambda text, vocab_size: _trained(
                _pieces(text),
                vocab_size - 256,
                lambda counts: min(counts, key=lambda pair: (-counts[pair], pair)),
            ),
            "Among equally frequent pairs the smallest was taken. Ours is the greatest.",
        ),
    ),
    hints=(
        (
            "Three parts: cut; count the pieces with Counter; learn the merges. `learn_merges` does the last"
            " one, but it relies on there being pairs enough."
        ),
        (
            "Begin with Counter(regex.findall(GPT2_PATTERN, text)), and a dict from tuples of single bytes to"
            " counts. Loop until there are vocab_size - 256 merges, and leave the loop when pair_counts gives"
            " an empty dict."
        ),
        (
            "pieces = {tuple(bytes([b]) for b in piece.encode()): n for piece, n in"
            " Counter(regex.findall(GPT2_PATTERN, text)).items()}; then while len(merges) < vocab_size - 256:"
            " counts = pair_counts(pieces); if not counts: break; take the best, and merge it in all pieces,"
            " as in learn_merges."
        ),
    ),
)


# ---- 6. encoding


@lru_cache(maxsize=4)
def _tokenizer(merges: tuple[Pair, ...]) -> BPETokenizer:
    return BPETokenizer(merges, WHOLE)


def encode_piece(piece: str, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    tokenizer = _tokenizer(tuple(merges))
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


def _leftmost(piece: str, merges: list[Pair]) -> list[bytes]:
    tokens = [bytes([b]) for b in piece.encode()]
    while able := [i for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in merges]:
        i = able[0]
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


def _longest_first(piece: str, merges: list[Pair]) -> list[bytes]:
    vocab = {bytes([i]) for i in range(256)} | {a + b for a, b in merges}
    rest = piece.encode()
    out: list[bytes] = []
    while rest:
        out.append(next(rest[:end] for end in range(len(rest), 0, -1) if rest[:end] in vocab))
        rest = rest[len(out[-1]) :]
    return out


def _can_be_learned(merges: list[Pair]) -> bool:
    """Whether each merge makes a new token, of bytes and of tokens made before."""
    known = {bytes([i]) for i in range(256)}
    for left, right in merges:
        if left not in known or right not in known or left + right in known:
            return False
        known.add(left + right)
    return True


def _explain_encoding(yours: list[bytes], piece: str, merges: list[Pair]) -> str | None:
    if not all(isinstance(token, bytes) for token in yours):
        return f"A token is bytes; yours has {yours[0]!r}."
    if b"".join(yours) != piece.encode():
        return "Joined, the tokens are not the UTF-8 bytes of the piece."
    left_over = [pair for pair in zip(yours, yours[1:]) if pair in merges]
    if left_over:
        return f"{left_over[0][0]!r} and {left_over[0][1]!r} stand side by side and are in `merges`: go on."
    start = [bytes([b]) for b in piece.encode()]
    first = min((pair for pair in zip(start, start[1:]) if pair in merges), key=merges.index, default=None)
    if first is None:
        return "None of the bytes' pairs is in `merges`: nothing is merged."
    return (
        "Every token is one that merges can make, but they were done in another order. Of the pairs of bytes,"
        f" {first!r} stands earliest in `merges`, and is merged first, everywhere, from left to right."
    )


def _encode_cases(generator: Generator) -> list[tuple]:
    def case(length: int, alphabet: str, n: int) -> tuple[str, list[Pair]]:
        text = _letters(generator, 60, alphabet)
        return _letters(generator, length, alphabet), BPETokenizer.train(text, 256 + n, WHOLE).merges

    ranks = [(b"b", b"c"), (b"a", b"b"), (b"bc", b"d"), (b"c", b"d"), (b"a", b"bcd")]
    return [
        ("abcd", ranks),
        ("ababc", ranks),  # here ab is the more frequent pair, bc the earlier
        ("bcd", ranks),
        ("abcbc", ranks),  # here ab stands first
        ("aaaaaaa", [(b"a", b"a"), (b"aa", b"aa"), (b"aa", b"a")]),
        ("café", ranks),  # no merge for the two bytes of é
        case(12, "abc", 10),
        case(10, "éñx", 6),
        ("", ranks),
        ("to be", []),
    ]


ENCODE_PIECE = Exercise(
    task="""A trained tokenizer encodes with what it learned. `piece` is one piece of text (str), `merges` a
    list of (left, right), the one learned first at its beginning. Begin with the UTF-8 bytes of the piece,
    one token each. Then, again and again: look at all pairs of tokens that stand side by side now, and take
    the one that stands earliest in `merges`; merge it everywhere in the piece, from left to right. When none
    of the pairs is in `merges`, return the tokens, a list of bytes. The merges are as training gives them:
    each makes a token that no other one makes, and stands behind the merges that make its two halves.""",
    reference=encode_piece,
    cases=_encode_cases,
    forbids=(BPETokenizer,),
    valid=lambda piece, merges: _can_be_learned(merges),
    explain=_explain_encoding,
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
            "the leftmost place first",
            _leftmost,
            "The first place from the left where anything can be merged was merged, again and again. It is"
            " not where a pair stands that decides, but how early it was learned.",
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
        Mistake(
            "the last merge first",
            lambda piece, merges: _encoded(piece, merges, lambda tokens, able: max(able, key=merges.index)),
            "Of the pairs that can be merged, the one learned last was taken. The one learned first goes"
            " first: it has the lowest rank.",
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
            " merge_pair(tokens, pair). It gives the same, since a later merge never makes room for an"
            " earlier one; it is slow where there are many merges."
        ),
    ),
)


# ---- 7. decoding


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
        (list("\ufeff\r\n to be \n\n".encode()), vocab),  # nothing is stripped at the ends
        ([0xFF, 256, 0xF0, 0x9F, 33, 0xE4, 0xB8, 0xE9], vocab),  # bytes that are no character
        ([], vocab),
    ]


DECODE_IDS = Exercise(
    task="""Back from ids to text. `ids` is a list of token ids, `vocab` gives the bytes of each. Return the
    text (str) that all the bytes together stand for, read as UTF-8. A character's bytes may be spread over
    several tokens. Bytes that are no character, as when the ids stop in the middle of one, become U+FFFD, the
    sign �, as many as errors="replace" gives; the characters around them stay. Nothing else is changed: white
    space at the ends belongs to the text.""",
    reference=decode_ids,
    cases=_decode_cases,
    forbids=(BPETokenizer,),
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


# ---- 8. the tokenizer


class BPE:
    """Byte-pair encoding with given merges."""

    def __init__(self, merges: list[tuple[bytes, bytes]], special_tokens: tuple[str, ...] = ()):
        self._tokenizer = BPETokenizer(merges, special_tokens=special_tokens)
        self.vocab = self._tokenizer.vocab

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        return self._tokenizer.encode(text, allowed_special)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


BPE_STUB = """class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        # your code here: self.vocab, a dict from each id to its bytes
        ...

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        # your code here
        ...

    def decode(self, ids: list[int]) -> str:
        # your code here
        ...
"""
END, TURN = "<|endoftext|>", "[turn]"
ODD = "naïve café 中文 😀👍🏽  don't  \n\n x_1=1600; IT'S\t "


def _bpe_cases(generator: Generator) -> list[tuple]:
    def case(words: int, alphabet: str, n: int, special_tokens: tuple[str, ...]) -> tuple:
        drawn = [_letters(generator, random_int(generator, 1, 7), alphabet) for _ in range(words)]
        text = " ".join(drawn)
        merges = train_bpe(text, 256 + n)
        return merges, special_tokens, text[::-1] + END + ODD

    low = [(b"o", b"w"), (b"l", b"ow"), (b"low", b"e"), (b" ", b"lowe")]
    return [
        (low, (), "low lower"),
        (train_bpe("don't can't isn't won't " * 3, 266), (), "can't 'tis 'twas  don't\n\n"),  # cuts
        (low, (END,), f"low{END}lower{END}"),
        (train_bpe(TRAINED_ON, 300), (), "The sea shells, she's sure\n"),
        (train_bpe(TRAINED_ON, 300), (END,), f"by the shore.{END} So she sells"),
        (low, ("lowe",), "lower lowe"),  # the merges give the same bytes
        (train_bpe(ODD * 2, 290), (END, TURN), f"{TURN}{ODD}{END}{END}turn endoftext {TURN} {ODD}"),
        ([], (END,), f" é{END}!"),
        case(30, "abc", 12, (END,)),
        case(30, "aé", 10, (TURN, END)),
    ]


def _observe_bpe(
    answer: Callable, merges: list[Pair], special_tokens: tuple[str, ...], text: str
) -> Iterator[tuple[str, Any]]:
    building.takes(answer, "merges", "special_tokens")
    _remembers_well(answer)
    tokenizer = answer(list(merges), special_tokens)
    encode, decode = building.method(tokenizer, "encode"), building.method(tokenizer, "decode")
    vocab = getattr(tokenizer, "vocab", None)
    if not isinstance(vocab, dict):
        raise NotRight("it has no dict `vocab`, which gives the bytes of each id.")
    if not all(isinstance(i, int) and isinstance(token, bytes) for i, token in vocab.items()):
        raise NotRight("`vocab` goes from ids (int) to bytes, such as 97 to b'a': not to text, and not back.")
    if len(vocab) != 256 + len(merges) + len(special_tokens):
        raise NotRight(
            f"`vocab` has {len(vocab)} entries, and should have one for each of the 256 bytes, the"
            f" {len(merges)} merges and the {len(special_tokens)} special tokens."
        )
    yield "the vocabulary", dict(sorted(vocab.items()))
    ids = encode(text)
    yield "the ids of the text", list(ids)
    yield "the text that decode gives for its ids", decode(ids)
    for special in special_tokens:
        allowed = encode(text, allowed_special=(special,))
        yield f"the ids of the text with {special} allowed", allowed
        yield f"the text for the ids with {special} allowed", decode(allowed)
    yield "the ids with all special tokens allowed", encode(text, allowed_special=special_tokens)
    for few in ([240, 159, 152, 128], [255, 97, 195], []):
        yield f"the text of the ids {few}", decode(few)


def _remembers_well(answer: Callable) -> None:
    """Raises NotRight for a dict of remembered ids that is shared, handed out, or not of pieces."""
    tokenizer = answer([(b"z", b"q")])
    first = tokenizer.encode("zqzq")
    if not isinstance(first, list):
        raise NotRight(f"encode gives {type(first).__name__}, and a list of int is wanted.")
    kept = list(first)
    if kept == answer([]).encode("zqzq") == [256, 256]:
        raise NotRight(
            "a second tokenizer, made without merges, gives the ids of the first one: what it remembers"
            " belongs to the class, and all its objects share it. Make that dict in __init__."
        )
    both = [answer([], ("<s>",)) for _ in range(2)]
    both[0].encode("a<s>")
    after, fresh = (list(each.encode("a<s>", allowed_special=("<s>",))) for each in both)
    if after != fresh:
        raise NotRight(
            "encode gives other ids for a text with allowed_special where the same text was encoded without"
            " it before: what is remembered of a whole text forgets what was allowed. Remember the ids of"
            " pieces; those depend on nothing but the merges."
        )
    first.append(0)
    if list(tokenizer.encode("zqzq")) == [*kept, 0]:
        raise NotRight(
            "encode gave a list, its caller appended to that list, and the next encode of the same text gives"
            " the longer one: what is remembered must not be handed out. Return a new list."
        )


def _explain_ids(yours: Any, merges: list[Pair], special_tokens: tuple[str, ...], text: str) -> str | None:
    """What is wrong with ids, where it is those that are wrong."""
    if not isinstance(yours, list | tuple):
        return None
    vocab = BPE(merges, special_tokens).vocab
    unknown = [i for i in yours if i not in vocab]
    if unknown:
        return f"It gives the id {unknown[0]!r}, which is not in the vocabulary."
    if b"".join(vocab[i] for i in yours) != text.encode():
        return (
            "The tokens of these ids, joined, are not the UTF-8 bytes of the text: some were lost or changed."
        )
    return (
        "The tokens of these ids, joined, give the text, but it is divided into other tokens than it should:"
        " look at special tokens first, then at the cuts of the pattern, then at the merges of each piece."
    )


class _AnyBPE(BPE):
    """The right answer, written so that parts of it can be replaced."""

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        ids: list[int] = []
        for part in self._parts(text, allowed_special):
            if part in allowed_special:
                ids.append(self._tokenizer.special_tokens[part])
            else:
                ids += self._plain(part)
        return ids

    def _parts(self, text: str, allowed: tuple[str, ...]) -> list[str]:
        return regex.split(f"({'|'.join(map(regex.escape, allowed))})", text) if allowed else [text]

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class _AlwaysSpecial(_AnyBPE):
    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        return super().encode(text, tuple(self._tokenizer.special_tokens))


class _NeverSpecial(_AnyBPE):
    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        return self._plain(text)


class _AllAllowed(_AnyBPE):
    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        return super().encode(text, tuple(self._tokenizer.special_tokens) if allowed_special else ())


class _NotEscaped(_AnyBPE):
    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        ids: list[int] = []
        for part in regex.split(f"({'|'.join(allowed_special)})", text) if allowed_special else [text]:
            ids += [self._tokenizer.special_tokens[part]] if part in allowed_special else self._plain(part)
        return ids


class _Dropped(_AnyBPE):
    def _parts(self, text: str, allowed: tuple[str, ...]) -> list[str]:
        return regex.split("|".join(map(regex.escape, allowed)), text) if allowed else [text]


class _OnlyTheFirst(_AnyBPE):
    def _parts(self, text: str, allowed: tuple[str, ...]) -> list[str]:
        if not allowed:
            return [text]
        return regex.split(f"({'|'.join(map(regex.escape, allowed))})", text, maxsplit=1)


class _SplitAtNothing(_AnyBPE):
    def _parts(self, text: str, allowed: tuple[str, ...]) -> list[str]:
        return regex.split(f"({'|'.join(map(regex.escape, allowed))})", text)


class _Uncut(_AnyBPE):
    def _plain(self, text: str) -> list[int]:
        return BPETokenizer(self._tokenizer.merges, WHOLE).encode(text)


class _AsciiCut(_AnyBPE):
    def _plain(self, text: str) -> list[int]:
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
        return BPETokenizer(self._tokenizer.merges, pattern).encode(text)


class _LongestFirst(_AnyBPE):
    def _plain(self, text: str) -> list[int]:
        ids = {token: i for i, token in BPETokenizer(self._tokenizer.merges).vocab.items()}
        pieces = regex.findall(GPT2_PATTERN, text)
        return [ids[t] for piece in pieces for t in _longest_first(piece, self._tokenizer.merges)]


class _SpecialsBeforeMerges(_AnyBPE):
    def __init__(self, merges: list[tuple[bytes, bytes]], special_tokens: tuple[str, ...] = ()):
        plain = list(BPETokenizer(merges).vocab.values())
        tokens = [*plain[:256], *(special.encode() for special in special_tokens), *plain[256:]]
        ids = {special: 256 + i for i, special in enumerate(special_tokens)}
        self._tokenizer = BPETokenizer(merges, special_tokens=ids, vocab=dict(enumerate(tokens)))
        self.vocab = self._tokenizer.vocab


class _OneTable(_AnyBPE):
    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        ids = {token: i for i, token in self.vocab.items()}
        return [ids[self.vocab[i]] for i in super().encode(text, allowed_special)]


class _RemembersTexts(_AnyBPE):
    def __init__(self, merges: list[tuple[bytes, bytes]], special_tokens: tuple[str, ...] = ()):
        super().__init__(merges, special_tokens)
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        if text not in self.known:
            self.known[text] = super().encode(text, allowed_special)
        return list(self.known[text])


class _TokenByToken(_AnyBPE):
    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocab[i].decode(errors="replace") for i in ids)


class _Ignoring(_AnyBPE):
    def decode(self, ids: list[int]) -> str:
        return b"".join(self.vocab[i] for i in ids).decode(errors="ignore")


class _SpecialsNotDecoded(_AnyBPE):
    def decode(self, ids: list[int]) -> str:
        specials = self._tokenizer.special_tokens.values()
        return super().decode([i for i in ids if i not in specials])


BPE_CLASS = Exercise(
    task="""Build the tokenizer, with all that you have. `BPE(merges, special_tokens)` is made of the merges
    that training gave and of texts that stand for one token each, such as `("<|endoftext|>",)`; no special
    token is a part of another.

    `vocab` is a dict from each id to its bytes: ids 0 to 255 are the bytes, 256 is the token that the first
    merge makes, and so on in order; behind the merges come the special tokens in their order, each with the
    bytes of its text.

    `encode(text, allowed_special)` gives the ids of a text, a list of int. Cut the text with
    `regex.findall(GPT2_PATTERN, text)`, encode each piece by its merges, and look up the ids. A special
    token's text is plain text, cut and merged like any other, unless `allowed_special` contains it: then each
    place where it stands becomes its id, and the text before it, between and behind is encoded as if it stood
    alone. `allowed_special` holds special tokens of this tokenizer and nothing else.

    `decode(ids)` gives the text of ids, special tokens with their text; bytes that are no character become �.
    For every text, decode(encode(text)) is the text. Words come back often: a dict that remembers the ids of
    each piece makes encode many times faster.""",
    reference=BPE,
    cases=_bpe_cases,
    observe=_observe_bpe,
    stub=BPE_STUB,
    points=3,
    forbids=(BPETokenizer,),
    explain=_explain_ids,
    valid=lambda merges, special_tokens, text: (
        _can_be_learned(merges) and all(len(special) > 3 for special in special_tokens)
    ),
    mistakes=(
        Mistake(
            "special tokens are always allowed",
            _AlwaysSpecial,
            "The text of a special token became its id although nobody allowed it. Whoever types into your"
            " program could then end its instructions and begin others.",
        ),
        Mistake(
            "special tokens are never encoded",
            _NeverSpecial,
            "A special token is plain text even where allowed_special contains it. Split the text at the"
            " allowed ones first, and give each its id.",
        ),
        Mistake(
            "one is allowed, all are taken",
            _AllAllowed,
            "With one special token allowed, the others were encoded as well. Only those in allowed_special"
            " are.",
        ),
        Mistake(
            "the special token is read as a pattern",
            _NotEscaped,
            "<|endoftext|> was put into a regular expression as it is, where | means `or`, and [turn] means"
            " one of four letters. regex.escape takes the meaning away.",
        ),
        Mistake(
            "the special token vanishes",
            _Dropped,
            "The text was split at the special tokens, and they were lost: regex.split keeps what a group"
            " captures, so put the alternatives into ( ).",
        ),
        Mistake(
            "only the first special token",
            _OnlyTheFirst,
            "The text was split at the first allowed special token; those that come later in the text stayed"
            " plain text. Each place where one stands becomes its id.",
        ),
        Mistake(
            "split at nothing",
            _SplitAtNothing,
            "With no special token allowed, the pattern is (), which matches between any two characters: the"
            " text was split into single ones, and hardly anything was merged. With nothing allowed, do not"
            " split.",
        ),
        Mistake(
            "the text is not cut",
            _Uncut,
            "The merges were done on the whole text, so that tokens reach across the cuts. Cut first, then"
            " encode each piece.",
        ),
        Mistake(
            "letters are A to Z only",
            _AsciiCut,
            "naïve was cut at its ï. Your `cut` is for ASCII; GPT2_PATTERN knows the letters of every"
            " script.",
        ),
        Mistake(
            "the longest token first",
            _LongestFirst,
            "Each piece was taken apart into the longest tokens from the left. The order of the merges"
            " decides: `encode_piece`.",
        ),
        Mistake(
            "special tokens come before the merges",
            _SpecialsBeforeMerges,
            "The special tokens took the ids from 256 on, and all merges moved. They come last: a tokenizer"
            " that gets one more special token keeps its other ids.",
        ),
        Mistake(
            "one table for plain and special tokens",
            _OneTable,
            "The table from bytes to ids has the special tokens in it. Where the merges make a token of the"
            " same bytes, plain text gets the special token's id, though nobody allowed it. Take the table"
            " before the special tokens join `vocab`, and keep another for those.",
        ),
        Mistake(
            "remembered without what was allowed",
            _RemembersTexts,
            "The ids of a whole text were remembered under the text alone. The next call, with other special"
            " tokens allowed, gets the old ids. Remember the ids of pieces: what is allowed does not change"
            " them.",
        ),
        Mistake(
            "decoded token by token",
            _TokenByToken,
            "decode turns each token into text by itself. A character may be spread over several tokens: join"
            " the bytes of all, then decode once.",
        ),
        Mistake(
            "wrong bytes are dropped",
            _Ignoring,
            'decode drops bytes that are no character. errors="replace" shows that something is missing.',
        ),
        Mistake(
            "special tokens are not decoded",
            _SpecialsNotDecoded,
            "decode leaves the special tokens out. They are in `vocab` like the others, and decode gives"
            " their text.",
        ),
    ),
    hints=(
        (
            "Three dicts: vocab, its reverse from bytes to ids, and one from special tokens to their ids."
            " encode splits at the allowed special tokens, then cuts, then merges."
        ),
        (
            "vocab: start with {i: bytes([i]) for i in range(256)}; for each merge vocab[len(vocab)] = left +"
            " right. Take the reverse before the special tokens are added. regex.split keeps what a group"
            " captures, so f\"({'|'.join(map(regex.escape, allowed_special))})\" leaves the special tokens"
            " among the parts; with nothing allowed, do not split."
        ),
        (
            "Begin with self.known = {}. encode: for part in parts: if part in allowed_special:"
            " ids.append(self.special_ids[part]); else: for piece in regex.findall(GPT2_PATTERN, part): if"
            " piece not in self.known: self.known[piece] = [self.ids[token] for token in encode_piece(piece,"
            ' self.merges)]; either way ids += self.known[piece]. decode: b"".join(self.vocab[i] for i in'
            ' ids).decode("utf-8", errors="replace").'
        ),
    ),
)


EXERCISES: tuple[Exercise, ...] = (
    PAIR_COUNTS,
    MERGE_PAIR,
    LEARN_MERGES,
    CUT,
    TRAIN_BPE,
    ENCODE_PIECE,
    DECODE_IDS,
    BPE_CLASS,
)
