"""Documents, and the shards that they must become."""

import json
import random
from pathlib import Path

import numpy as np
import tiktoken

from shared.data.sources import clean
from shared.tokenizers import BPETokenizer
from shared.tokenizers.bpe import END_OF_TEXT

DRAW = random.Random(5)
WORDS = [
    "the",
    "lobster",
    "Zürich",
    "naïve",
    "数学",
    "😀",
    "cafe\u0301",
    END_OF_TEXT,
    "3.14",
    "a\x00b",
    "x\tY",
    "end \r\n",
    "\n\n\n\n",
]
LONG = [" ".join(DRAW.choices(WORDS, k=DRAW.choice([1, 5, 20, 60, 300]))) for _ in range(300)]
DOCUMENTS = ["", "tiny", *LONG, "", "last but long enough to be kept, surely"]
KEPT = [text for document in DOCUMENTS if len(text := clean(document)) >= 32]
TOKENIZER = BPETokenizer.train(DOCUMENTS, 340, special_tokens=(END_OF_TEXT,))
OTHER = BPETokenizer.train(DOCUMENTS, 340, special_tokens=(END_OF_TEXT, "<|x|>"))


def expected(
    val_tokens: int, shard_tokens: int, tokens: float = float("inf"), tokenizer: BPETokenizer = TOKENIZER
) -> dict[str, bytes]:
    """The files, by a single loop over the clean documents, with tiktoken's merging and our ranks."""
    ranks = {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
    oracle = tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens=tokenizer.special_tokens
    )
    parts, wanted, trained = [[]], val_tokens, 0
    for text in KEPT:
        if len(parts[-1]) >= wanted:
            trained += len(parts[-1]) if len(parts) > 1 else 0
            wanted = min(shard_tokens, tokens - trained)
            parts.append([])
        if wanted <= 0:
            break
        parts[-1] += [oracle.eot_token, *oracle.encode_ordinary(text)]
    names = ["val_00000.bin", *(f"train_{i:05d}.bin" for i in range(len(parts)))]
    return {name: np.array(part, "<u2").tobytes() for name, part in zip(names, parts) if part}


WANTED = expected(2000, 5000)


def written(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def shards_in(folder: str | Path) -> dict[str, bytes]:
    return {name: content for name, content in written(folder).items() if name.endswith(".bin")}


def as_jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
