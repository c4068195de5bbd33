"""Documents, chunks and a toy embedder that the tests of retrieval share."""

import json

from shared.retrieval.documents import load_documents
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer

WEEK = ROOT / "weeks/11_rag"
DOCUMENTS = load_documents(WEEK / "handbook").documents
QUESTIONS = [
    q for line in (WEEK / "questions.jsonl").read_text().splitlines() if (q := json.loads(line))["document"]
]


TOKENIZER = BPETokenizer.train((s.text for d in DOCUMENTS for s in d.sections), 600)
