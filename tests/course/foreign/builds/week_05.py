"""Answers to the build exercises of week 5, written by people who did not write its grader."""

import re
from collections import Counter, defaultdict

import regex

from shared.tokenizers.bpe import GPT2_PATTERN
from tests.course.foreign.register import right, wrong


@wrong("breaks ties by the joined bytes of the pair instead of by the pair")
def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    pieces = Counter(regex.findall(GPT2_PATTERN, text))
    words = {piece: [bytes([b]) for b in piece.encode("utf-8")] for piece in pieces}
    merges = []
    while len(merges) < vocab_size - 256:
        pairs = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += pieces[piece]
        if not pairs:
            break
        best = max(pairs, key=lambda p: (pairs[p], p[0] + p[1]))
        merges.append(best)
        for piece, word in words.items():
            new, i = [], 0
            while i < len(word):
                if i + 1 < len(word) and (word[i], word[i + 1]) == best:
                    new.append(word[i] + word[i + 1])
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            words[piece] = new
    return merges


@wrong("works on ids and breaks ties by the ids of the tokens instead of their bytes")
def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    vocab = {i: bytes([i]) for i in range(256)}
    counts = Counter(regex.findall(GPT2_PATTERN, text))
    words = [(list(piece.encode("utf-8")), n) for piece, n in counts.items()]
    merges = []
    for new_id in range(256, vocab_size):
        stats = defaultdict(int)
        for ids, n in words:
            for pair in zip(ids, ids[1:]):
                stats[pair] += n
        if not stats:
            break
        best = max(stats, key=lambda p: (stats[p], p))
        merges.append((vocab[best[0]], vocab[best[1]]))
        vocab[new_id] = vocab[best[0]] + vocab[best[1]]
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if ids[i] == best[0] and ids[i + 1] == best[1]:
                    ids[i : i + 2] = [new_id]
                i += 1
    return merges


@wrong("starts from the characters, each encoded as a whole, instead of from single bytes")
def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    word_counts = Counter()
    for piece in regex.findall(GPT2_PATTERN, text):
        word_counts[tuple(ch.encode("utf-8") for ch in piece)] += 1
    merges = []
    for _ in range(vocab_size - 256):
        pair_counts = Counter()
        for word, count in word_counts.items():
            for a, b in zip(word[:-1], word[1:]):
                pair_counts[a, b] += count
        if len(pair_counts) == 0:
            break
        best = max(pair_counts.items(), key=lambda item: (item[1], item[0]))[0]
        merges.append(best)
        new_counts = Counter()
        for word, count in word_counts.items():
            merged = []
            i = 0
            while i < len(word):
                if word[i : i + 2] == best:
                    merged.append(best[0] + best[1])
                    i += 2
                else:
                    merged.append(word[i])
                    i += 1
            new_counts[tuple(merged)] += count
        word_counts = new_counts
    return merges


@wrong("stops when no pair occurs at least twice")
def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    freqs = Counter(
        tuple(bytes([b]) for b in m.group().encode("utf-8")) for m in regex.finditer(GPT2_PATTERN, text)
    )
    merges = []
    while 256 + len(merges) < vocab_size:
        pairs = Counter()
        for word, n in freqs.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best, count = max(pairs.items(), key=lambda kv: (kv[1], kv[0]))
        if count < 2:
            break
        merges.append(best)
        updated = Counter()
        for word, n in freqs.items():
            new, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    new.append(best[0] + best[1])
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            updated[tuple(new)] += n
        freqs = updated
    return merges


@wrong("counts each different piece once, however often it occurs")
def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    words = [[bytes([b]) for b in w.encode("utf-8")] for w in set(regex.findall(GPT2_PATTERN, text))]
    merges = []
    for _ in range(vocab_size - 256):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        left, right_ = max(counts, key=lambda p: (counts[p], p))
        merges.append((left, right_))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if word[i] == left and word[i + 1] == right_:
                    word[i : i + 2] = [left + right_]
                i += 1
    return merges


@wrong("takes vocab_size for the number of merges, the 256 bytes not counted")
def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    pieces = Counter(regex.findall(GPT2_PATTERN, text))
    words = [([bytes([b]) for b in piece.encode("utf-8")], n) for piece, n in pieces.items()]
    merges = []
    while len(merges) < vocab_size:
        counts = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                counts[pair] += n
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    return merges


@right
def train_bpe(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    counted = Counter(regex.findall(GPT2_PATTERN, text))
    words = [[piece.encode()[i : i + 1] for i in range(len(piece.encode()))] for piece in counted]
    times = list(counted.values())
    counts: dict[tuple[bytes, bytes], int] = defaultdict(int)
    places: dict[tuple[bytes, bytes], set[int]] = defaultdict(set)

    def enter(number: int, sign: int) -> None:
        for pair in zip(words[number], words[number][1:]):
            counts[pair] += sign * times[number]
            if counts[pair] == 0:
                del counts[pair]
            if sign > 0:
                places[pair].add(number)

    for number in range(len(words)):
        enter(number, 1)
    merges: list[tuple[bytes, bytes]] = []
    while counts and len(merges) < vocab_size - 256:
        _, best = max((count, pair) for pair, count in counts.items())
        merges.append(best)
        for number in places.pop(best):
            enter(number, -1)
            tokens: list[bytes] = []
            fresh = False
            for token in words[number]:
                if tokens and not fresh and (tokens[-1], token) == best:
                    tokens[-1] += token
                    fresh = True
                else:
                    tokens.append(token)
                    fresh = False
            words[number] = tokens
            enter(number, 1)
    return merges


@wrong("encodes by the longest token of the vocabulary that fits instead of by the merges")
class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        self.vocab = {i: bytes([i]) for i in range(256)}
        for left, right_ in merges:
            self.vocab[len(self.vocab)] = left + right_
        self.ids = {token: i for i, token in self.vocab.items()}
        self.special = {}
        for token in special_tokens:
            self.special[token] = len(self.vocab)
            self.vocab[len(self.vocab)] = token.encode("utf-8")
        self.longest = max(len(token) for token in self.ids)
        self.cache = {}

    def _encode_piece(self, piece):
        if piece in self.cache:
            return self.cache[piece]
        data = piece.encode("utf-8")
        ids = []
        i = 0
        while i < len(data):
            for n in range(self.longest, 0, -1):
                if data[i : i + n] in self.ids:
                    found = data[i : i + n]
                    break
            ids.append(self.ids[found])
            i += len(found)
        self.cache[piece] = ids
        return ids

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        parts = [text]
        if allowed_special:
            parts = re.split("(" + "|".join(re.escape(s) for s in allowed_special) + ")", text)
        ids = []
        for part in parts:
            if part in allowed_special:
                ids.append(self.special[part])
            else:
                for piece in regex.findall(GPT2_PATTERN, part):
                    ids.extend(self._encode_piece(piece))
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")


@wrong("decodes each token by itself, so characters spread over several tokens are lost")
class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
        self.token_to_id = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special_ids = {s: len(tokens) + i for i, s in enumerate(special_tokens)}
        self.vocab = dict(enumerate(tokens + [s.encode("utf-8") for s in special_tokens]))
        self.cache = {}

    def encode_piece(self, piece):
        if piece not in self.cache:
            parts = [bytes([b]) for b in piece.encode("utf-8")]
            while len(parts) > 1:
                pairs = list(zip(parts, parts[1:]))
                best = min(pairs, key=lambda p: self.ranks.get(p, float("inf")))
                if best not in self.ranks:
                    break
                i = pairs.index(best)
                parts[i : i + 2] = [best[0] + best[1]]
            self.cache[piece] = [self.token_to_id[p] for p in parts]
        return self.cache[piece]

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        if allowed_special:
            chunks = re.split("(" + "|".join(map(re.escape, allowed_special)) + ")", text)
        else:
            chunks = [text]
        ids = []
        for chunk in chunks:
            if chunk in allowed_special:
                ids.append(self.special_ids[chunk])
                continue
            for piece in regex.findall(GPT2_PATTERN, chunk):
                ids += self.encode_piece(piece)
        return ids

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocab[i].decode("utf-8", errors="replace") for i in ids)


@wrong("splits at the special tokens without escaping them, so | in <|endoftext|> means 'or'")
class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        self.vocab = {i: bytes([i]) for i in range(256)}
        for i, (a, b) in enumerate(merges):
            self.vocab[256 + i] = a + b
        self.inverse = {v: k for k, v in self.vocab.items()}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.special = {}
        for i, token in enumerate(special_tokens):
            self.special[token] = 256 + len(merges) + i
            self.vocab[256 + len(merges) + i] = token.encode("utf-8")
        self.cache = {}

    def _bpe(self, piece):
        if piece in self.cache:
            return self.cache[piece]
        word = [bytes([b]) for b in piece.encode("utf-8")]
        while True:
            ranked = [(self.ranks[p], i) for i, p in enumerate(zip(word, word[1:])) if p in self.ranks]
            if not ranked:
                break
            _, i = min(ranked)
            word = word[:i] + [word[i] + word[i + 1]] + word[i + 2 :]
        self.cache[piece] = [self.inverse[w] for w in word]
        return self.cache[piece]

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        ids = []
        pattern = "(" + "|".join(allowed_special) + ")"
        for part in re.split(pattern, text) if allowed_special else [text]:
            if part in allowed_special:
                ids.append(self.special[part])
            elif part:
                for piece in regex.findall(GPT2_PATTERN, part):
                    ids.extend(self._bpe(piece))
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")


@wrong("remembers the ids of whole texts without regard to allowed_special, so a later call gets old ids")
class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        self.vocab = {i: bytes([i]) for i in range(256)}
        for a, b in merges:
            self.vocab[len(self.vocab)] = a + b
        self.token_ids = {token: i for i, token in self.vocab.items()}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.special = {}
        for s in special_tokens:
            self.special[s] = len(self.vocab)
            self.vocab[len(self.vocab)] = s.encode("utf-8")
        self.memo = {}

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        if text in self.memo:
            return list(self.memo[text])
        ids = []
        for special in allowed_special:
            if special in text:
                before, behind = text.split(special, 1)
                ids = self.encode(before, allowed_special)
                ids += [self.special[special]] + self.encode(behind, allowed_special)
                break
        else:
            for piece in regex.findall(GPT2_PATTERN, text):
                word = [bytes([b]) for b in piece.encode("utf-8")]
                while len(word) > 1:
                    rank, i = min((self.ranks.get(p, 10**9), i) for i, p in enumerate(zip(word, word[1:])))
                    if rank == 10**9:
                        break
                    word[i : i + 2] = [word[i] + word[i + 1]]
                ids += [self.token_ids[w] for w in word]
        self.memo[text] = ids
        return list(ids)

    def decode(self, ids: list[int]) -> str:
        return b"".join([self.vocab[i] for i in ids]).decode("utf-8", errors="replace")


@wrong(
    "looks plain tokens up in a table that holds the special tokens too, so equal bytes get a special's id"
)
class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        self.merges = merges
        self.vocab = {i: bytes([i]) for i in range(256)}
        for a, b in merges:
            self.vocab[len(self.vocab)] = a + b
        for token in special_tokens:
            self.vocab[len(self.vocab)] = token.encode("utf-8")
        self.to_id = {token: i for i, token in self.vocab.items()}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.cache = {}

    def merge(self, piece):
        word = [bytes([b]) for b in piece.encode("utf-8")]
        while True:
            found = [p for p in zip(word, word[1:]) if p in self.rank]
            if not found:
                return word
            pair = min(found, key=self.rank.get)
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [pair[0] + pair[1]]
                i += 1

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        parts = [text]
        if allowed_special:
            parts = regex.split("(" + "|".join(regex.escape(s) for s in allowed_special) + ")", text)
        ids = []
        for part in parts:
            if part in allowed_special:
                ids.append(self.to_id[part.encode("utf-8")])
                continue
            for piece in regex.findall(GPT2_PATTERN, part):
                if piece not in self.cache:
                    self.cache[piece] = [self.to_id[token] for token in self.merge(piece)]
                ids.extend(self.cache[piece])
        return ids

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")


@wrong("takes special tokens for one token each even where allowed_special does not contain them")
class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        self.vocab = {i: bytes([i]) for i in range(256)}
        for a, b in merges:
            self.vocab[len(self.vocab)] = a + b
        self.ids = {token: i for i, token in self.vocab.items()}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.special = {}
        for s in special_tokens:
            self.special[s] = len(self.vocab)
            self.vocab[len(self.vocab)] = s.encode("utf-8")
        self.splitter = "(" + "|".join(re.escape(s) for s in special_tokens) + ")" if special_tokens else None
        self.cache = {}

    def piece_ids(self, piece):
        if piece not in self.cache:
            word = [bytes([b]) for b in piece.encode("utf-8")]
            while len(word) > 1:
                i = min(range(len(word) - 1), key=lambda j: self.ranks.get((word[j], word[j + 1]), 1 << 30))
                if (word[i], word[i + 1]) not in self.ranks:
                    break
                word[i : i + 2] = [word[i] + word[i + 1]]
            self.cache[piece] = [self.ids[w] for w in word]
        return self.cache[piece]

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        out = []
        for part in re.split(self.splitter, text) if self.splitter else [text]:
            if part in self.special:
                out.append(self.special[part])
            else:
                for piece in regex.findall(GPT2_PATTERN, part):
                    out += self.piece_ids(piece)
        return out

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")


@right
class BPE:
    def __init__(
        self,
        merges: list[tuple[bytes, bytes]],
        special_tokens: tuple[str, ...] = (),
    ):
        plain = [bytes([b]) for b in range(256)] + [left + right_ for left, right_ in merges]
        self.vocab = dict(enumerate(plain + [special.encode() for special in special_tokens]))
        self.special = dict(zip(special_tokens, range(len(plain), len(self.vocab)), strict=True))
        self.known = {}
        for i, token in enumerate(plain):
            self.known.setdefault(token, i)
        self.order = {}
        for number, pair in enumerate(merges):
            self.order.setdefault(pair, number)
        self.memory: dict[str, tuple[int, ...]] = {}

    def plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in regex.findall(GPT2_PATTERN, text):
            if piece not in self.memory:
                data = piece.encode()
                cuts = list(range(len(data) + 1))
                while True:
                    triples = zip(cuts, cuts[1:], cuts[2:])
                    numbers = [self.order.get((data[a:b], data[b:c])) for a, b, c in triples]
                    lowest = min((n for n in numbers if n is not None), default=None)
                    if lowest is None:
                        break
                    del cuts[numbers.index(lowest) + 1]
                self.memory[piece] = tuple(self.known[data[a:b]] for a, b in zip(cuts, cuts[1:]))
            ids.extend(self.memory[piece])
        return ids

    def encode(self, text: str, allowed_special: tuple[str, ...] = ()) -> list[int]:
        ids: list[int] = []
        while True:
            found = [(text.find(special), special) for special in allowed_special if special in text]
            if not found:
                return ids + self.plain(text)
            place, special = min(found)
            ids += self.plain(text[:place])
            ids.append(self.special[special])
            text = text[place + len(special) :]

    def decode(self, ids: list[int]) -> str:
        return str(b"".join(map(self.vocab.__getitem__, ids)), "utf-8", "replace")
