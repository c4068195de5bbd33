"""Answers to the exercises of week 5, written by people who did not write its grader."""

import codecs
import functools
import itertools
import re
from collections import Counter, defaultdict

from tests.course.foreign.register import right, wrong


@wrong("The table starts with every pair of known tokens at 0, and pairs that never occur stay in it.")
def pair_counts(words):
    vocab = {token for word in words for token in word}
    counts = {(a, b): 0 for a in vocab for b in vocab}
    for word, n in words.items():
        for i in range(len(word) - 1):
            counts[word[i], word[i + 1]] += n
    return counts


@wrong("A pair that a piece has twice is counted once, as the pairs pass through a set.")
def pair_counts(words):
    counts = defaultdict(int)
    for word, n in words.items():
        for pair in set(zip(word, word[1:])):
            counts[pair] += n
    return dict(counts)


@wrong("dict.update replaces the counts of earlier pieces instead of adding to them.")
def pair_counts(words):
    pairs = {}
    for word, n in words.items():
        in_word = Counter(zip(word[:-1], word[1:]))
        pairs.update({pair: times * n for pair, times in in_word.items()})
    return pairs


@wrong("Overlapping pairs are skipped: a a a gives the pair (a, a) once instead of twice.")
def pair_counts(words):
    counts = {}
    for word, n in words.items():
        last_used = {}
        for i in range(len(word) - 1):
            pair = (word[i], word[i + 1])
            if last_used.get(pair) == i - 1:
                continue
            last_used[pair] = i
            counts[pair] = counts.get(pair, 0) + n
    return counts


@right
def pair_counts(words):
    def of_piece(item):
        word, n = item
        return Counter({pair: n * times for pair, times in Counter(itertools.pairwise(word)).items()})

    return dict(functools.reduce(lambda a, b: a + b, map(of_piece, words.items()), Counter()))


@wrong("It compares the joined bytes, so another pair that spells the same is merged too.")
def merge_pair(tokens, pair):
    merged = pair[0] + pair[1]
    out = []
    i = 0
    while i < len(tokens):
        if i + 1 < len(tokens) and tokens[i] + tokens[i + 1] == merged:
            out.append(merged)
            i += 2
        else:
            out.append(tokens[i])
            i += 1
    return out


@wrong("It goes from right to left, so a a a becomes a aa.")
def merge_pair(tokens, pair):
    out = []
    i = len(tokens) - 1
    while i >= 0:
        if i > 0 and (tokens[i - 1], tokens[i]) == pair:
            out.append(tokens[i - 1] + tokens[i])
            i -= 2
        else:
            out.append(tokens[i])
            i -= 1
    return out[::-1]


@wrong("Replacing in the joined text also hits the ends of longer tokens, and a space token is lost.")
def merge_pair(tokens, pair):
    text = b" ".join(tokens)
    text = text.replace(b" ".join(pair), b"".join(pair))
    return text.split(b" ")


@wrong("The caller's list is changed in place.")
def merge_pair(tokens, pair):
    left, right_token = pair
    i = 0
    while i < len(tokens) - 1:
        if tokens[i] == left and tokens[i + 1] == right_token:
            tokens[i : i + 2] = [left + right_token]
        i += 1
    return tokens


@right
def merge_pair(tokens, pair):
    stack = []
    for token in tokens:
        if stack and (stack[-1], token) == tuple(pair):
            stack.append(stack.pop() + token)
        else:
            stack.append(token)
    return stack


@wrong("max looks at the counts alone, so of equally frequent pairs it takes the first one met.")
def learn_merges(words, n):
    pieces = {tuple(bytes([b]) for b in word.encode("utf-8")): c for word, c in words.items()}
    merges = []
    for _ in range(n):
        counts = defaultdict(int)
        for piece, c in pieces.items():
            for pair in zip(piece, piece[1:]):
                counts[pair] += c
        best = max(counts, key=counts.get)
        merges.append(best)
        new_pieces = {}
        for piece, c in pieces.items():
            out, i = [], 0
            while i < len(piece):
                if piece[i : i + 2] == best:
                    out.append(best[0] + best[1])
                    i += 2
                else:
                    out.append(piece[i])
                    i += 1
            new_pieces[tuple(out)] = c
        pieces = new_pieces
    return merges


@wrong("Ties are decided by the joined bytes instead of by left first, then right.")
def learn_merges(words, n):
    def merge(tokens, pair):
        out = []
        i = 0
        while i < len(tokens):
            if i < len(tokens) - 1 and tokens[i] == pair[0] and tokens[i + 1] == pair[1]:
                out.append(pair[0] + pair[1])
                i += 2
            else:
                out.append(tokens[i])
                i += 1
        return out

    corpus = [([bytes([b]) for b in word.encode()], count) for word, count in words.items()]
    merges = []
    while len(merges) < n:
        counts = Counter()
        for tokens, count in corpus:
            for a, b in zip(tokens, tokens[1:]):
                counts[a, b] += count
        pair = max(counts, key=lambda p: (counts[p], p[0] + p[1]))
        merges.append(pair)
        corpus = [(merge(tokens, pair), count) for tokens, count in corpus]
    return merges


@wrong("Every piece begins as its characters, so a character of several bytes is never learned.")
def learn_merges(words, n):
    splits = {word: [ch.encode("utf-8") for ch in word] for word in words}
    merges = []
    for _ in range(n):
        pairs = defaultdict(int)
        for word, freq in words.items():
            split = splits[word]
            for i in range(len(split) - 1):
                pairs[(split[i], split[i + 1])] += freq
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            split = splits[word]
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == best:
                    split = split[:i] + [best[0] + best[1]] + split[i + 2 :]
                i += 1
            splits[word] = split
    return merges


@wrong("Counts are updated as it goes, but the old pairs beside a merged one are never taken off.")
def learn_merges(words, n):
    pieces = [[bytes([b]) for b in word.encode("utf-8")] for word in words]
    freqs = list(words.values())
    counts = Counter()
    for piece, freq in zip(pieces, freqs):
        for pair in zip(piece, piece[1:]):
            counts[pair] += freq

    merges = []
    for _ in range(n):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        del counts[best]
        token = best[0] + best[1]
        for index, piece in enumerate(pieces):
            merged, i = [], 0
            while i < len(piece):
                if tuple(piece[i : i + 2]) == best:
                    merged.append(token)
                    i += 2
                else:
                    merged.append(piece[i])
                    i += 1
            for pair in zip(merged, merged[1:]):
                if token in pair:
                    counts[pair] += freqs[index]
            pieces[index] = merged
    return merges


@right
def learn_merges(words, n):
    def neighbours(tokens):
        return [(tokens[i - 1], tokens[i]) for i in range(1, len(tokens))]

    def merged(tokens, pair):
        source = iter(tokens)
        out = []
        for token in source:
            if out and out[-1] == pair[0] and token == pair[1]:
                out[-1] = b"".join(pair)
            else:
                out.append(token)
        return out

    text = [(list(map(bytes, zip(word.encode("utf-8")))), count) for word, count in words.items()]
    taken = []
    for _ in range(n):
        table = {}
        for tokens, count in text:
            for pair in neighbours(tokens):
                table[pair] = table.get(pair, 0) + count
        ranked = sorted((count, pair) for pair, count in table.items())
        taken.append(ranked[-1][1])
        text = [(merged(tokens, taken[-1]), count) for tokens, count in text]
    return taken


@wrong("Case is ignored, so 'S or 'LL is cut off like 's and 'll.")
def cut(text):
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?[a-z]+| ?[0-9]+| ?[^\sa-z0-9]+|\s+(?!\S)|\s+"
    return re.findall(pattern, text, flags=re.IGNORECASE)


@wrong("Any white space may lead a word, so a newline or tab is glued to it as a space is.")
def cut(text):
    pattern = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\s?[A-Za-z]+|\s?[0-9]+|\s?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
    return [m.group() for m in pattern.finditer(text)]


@wrong("The underscore belongs to no alternative, as \\w contains it, so it disappears.")
def cut(text):
    return re.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+", text)


@wrong("A run of white space is one piece, and its last space is not left to the word that follows.")
def cut(text):
    pieces = []
    i = 0
    pattern = re.compile(r"'(s|t|d|m|ll|ve|re)|\s{2,}| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s")
    while i < len(text):
        match = pattern.match(text, i)
        pieces.append(match.group(0))
        i = match.end()
    return pieces


@right
def cut(text):
    def kind(char):
        if char.isspace():
            return "space"
        return "letter" if char.isalpha() else "digit" if char.isdigit() else "sign"

    def run_end(i):
        end = i
        while end < len(text) and kind(text[end]) == kind(text[i]):
            end += 1
        return end

    endings = ("'s", "'t", "'d", "'m", "'ll", "'ve", "'re")
    pieces = []
    i = 0
    while i < len(text):
        ending = next((e for e in endings if text.startswith(e, i)), None)
        if ending:
            end = i + len(ending)
        elif kind(text[i]) != "space":
            end = run_end(i)
        elif text[i] == " " and i + 1 < len(text) and kind(text[i + 1]) != "space":
            end = run_end(i + 1)
        else:
            end = run_end(i)
            if end < len(text) and end - i > 1:
                end -= 1
        pieces.append(text[i:end])
        i = end
    return pieces


@wrong("It merges the leftmost pair that is in merges instead of the one learned first.")
def encode_piece(piece, merges):
    known = set(merges)
    tokens = [bytes([b]) for b in piece.encode("utf-8")]
    i = 0
    while i < len(tokens) - 1:
        if (tokens[i], tokens[i + 1]) in known:
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]
            i = 0
        else:
            i += 1
    return tokens


@wrong("It takes the longest known token at each place instead of doing the merges.")
def encode_piece(piece, merges):
    vocab = {left + right_token for left, right_token in merges}
    data = piece.encode("utf-8")
    tokens = []
    start = 0
    while start < len(data):
        end = len(data)
        while end > start + 1 and data[start:end] not in vocab:
            end -= 1
        tokens.append(data[start:end])
        start = end
    return tokens


@wrong("It begins with characters instead of bytes.")
def encode_piece(piece, merges):
    ranks = {pair: i for i, pair in enumerate(merges)}
    tokens = [ch.encode("utf-8") for ch in piece]
    while len(tokens) > 1:
        best = min(zip(tokens, tokens[1:]), key=lambda pair: ranks.get(pair, float("inf")))
        if best not in ranks:
            break
        out, i = [], 0
        while i < len(tokens):
            if tuple(tokens[i : i + 2]) == best:
                out.append(best[0] + best[1])
                i += 2
            else:
                out.append(tokens[i])
                i += 1
        tokens = out
    return tokens


@wrong("It stops at the first merge that the piece does not have, and later ones are never tried.")
def encode_piece(piece, merges):
    tokens = [bytes([b]) for b in piece.encode("utf-8")]
    for left, right_token in merges:
        if (left, right_token) not in list(zip(tokens, tokens[1:])):
            break
        i = 0
        while i < len(tokens) - 1:
            if tokens[i] == left and tokens[i + 1] == right_token:
                tokens[i] = left + right_token
                del tokens[i + 1]
            i += 1
    return tokens


@right
def encode_piece(piece, merges):
    order = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}

    def next_place(tokens):
        places = [(order[pair], i) for i, pair in enumerate(itertools.pairwise(tokens)) if pair in order]
        return min(places)[1] if places else None

    data = piece.encode("utf-8")
    tokens = [data[i : i + 1] for i in range(len(data))]
    while (i := next_place(tokens)) is not None:
        tokens = [*tokens[:i], tokens[i] + tokens[i + 1], *tokens[i + 2 :]]
    return tokens


@wrong("When the bytes are not all valid, each token is decoded by itself, which breaks good characters.")
def decode_ids(ids, vocab):
    try:
        return b"".join(vocab[i] for i in ids).decode("utf-8")
    except UnicodeDecodeError:
        return "".join(vocab[i].decode("utf-8", errors="replace") for i in ids)


@wrong("The incremental decoder is never told that the text ends, so a cut-off character vanishes.")
def decode_ids(ids, vocab):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = ""
    for i in ids:
        text += decoder.decode(vocab[i])
    return text


@wrong("Invalid bytes are dropped instead of becoming U+FFFD.")
def decode_ids(ids, vocab):
    data = b"".join([vocab[i] for i in ids])
    return data.decode("utf-8", errors="ignore")


@wrong("Each token is decoded by itself, so a character spread over tokens is lost.")
def decode_ids(ids, vocab):
    text = []
    for token_id in ids:
        text.append(vocab[token_id].decode("utf-8", errors="replace"))
    return "".join(text)


@right
def decode_ids(ids, vocab):
    everything = bytearray()
    for i in ids:
        everything.extend(vocab[i])
    reader = codecs.getincrementaldecoder("utf-8")(errors="replace")
    parts = [reader.decode(everything[i : i + 1]) for i in range(len(everything))]
    return "".join(parts) + reader.decode(b"", final=True)
