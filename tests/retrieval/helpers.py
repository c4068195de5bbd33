"""Documents, chunks and a toy embedder that the tests of retrieval share."""

import hashlib
import json
from functools import cache

import numpy as np

from shared.retrieval.bm25 import terms
from shared.retrieval.documents import chunk_documents, load_documents
from shared.retrieval.embedders import Embedder
from shared.retrieval.index import WAYS
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer

WEEK = ROOT / "weeks/11_rag"
DOCUMENTS = load_documents(WEEK / "handbook").documents
QUESTIONS = [
    q for line in (WEEK / "questions.jsonl").read_text().splitlines() if (q := json.loads(line))["document"]
]


TOKENIZER = BPETokenizer.train((s.text for d in DOCUMENTS for s in d.sections), 600)
CHUNKS = chunk_documents(DOCUMENTS, TOKENIZER, size=100, overlap=20, window=40)


class Words(Embedder):
    """An embedder for tests: every word has a direction of its own, always the same."""

    name, dim = "words", 64

    def embed(self, texts):
        rows = [sum((self.direction(w) for w in terms(t)), np.full(self.dim, 1e-3)) for t in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32).reshape(-1, self.dim)

    @staticmethod
    @cache
    def direction(word):
        seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
        return np.random.default_rng(seed).standard_normal(Words.dim)


def results(index, k=7):
    """What some questions find in an index, in each way, with rounded scores."""
    return [
        [(h.chunk, round(h.score, 4)) for h in index.search(q["question"], k, by)]
        for q in QUESTIONS[::16]
        for by in WAYS
    ]
