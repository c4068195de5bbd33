"""Week 11's built exercises against bm25s and the course's code, what `ask` is given, and the run with a
learner's code.
"""

from collections import Counter
from dataclasses import replace

import bm25s
import numpy as np
import pytest
import torch

from shared.course.exercise import Week
from shared.course.report import load_script
from shared.retrieval import index as promoted
from shared.retrieval.bm25 import BM25, terms
from shared.retrieval.documents import chunk_documents
from shared.retrieval.embedders import Embedder
from shared.retrieval.index import Index
from shared.tokenizers import gpt2_tokenizer
from tests.retrieval.helpers import DOCUMENTS, QUESTIONS
from tests.weeks.helpers import script

WEEK = Week(11)
ANSWERS = load_script("11_rag", "answers")
TEXTS = [" ".join([d.title, *(s.text for s in d.sections)]) for d in DOCUMENTS]
ASKED = [q["question"] for q in QUESTIONS[::10]] + ["ferry ferry harbour", "of the"]


def both(name):
    """An exercise's reference and its clean answer."""
    return [WEEK.exercises[name].reference, getattr(ANSWERS, name)]


def close(found, expected):
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-9)


@pytest.mark.parametrize("kind", both("BM25"), ids=("reference", "answer"))
@pytest.mark.parametrize("k1, b", [(1.2, 0.75), (0.5, 0.0), (2.0, 1.0)])
def test_the_exercises_bm25_scores_as_the_library_and_ranks_as_the_course(kind, k1, b):
    library = bm25s.BM25(method="lucene", k1=k1, b=b)
    library.index([terms(text) for text in TEXTS], show_progress=False)
    own, course = kind(terms, k1, b), BM25(k1, b)
    for search in (own, course):
        search.add(list(range(len(TEXTS))), TEXTS)
    for question in ASKED:
        expected = library.get_scores(terms(question)) if terms(question) else np.zeros(len(TEXTS))
        found = own.search(question, len(TEXTS))
        assert {i for i, _ in found} == set(np.flatnonzero(expected))
        assert [score for _, score in found] == pytest.approx([expected[i] for i, _ in found], rel=1e-5)
        close(own.search(question, 7), course.search(question, 7))


def test_the_table_of_counts_and_the_search_have_the_same_formula():
    counts = [Counter(terms(text)) for text in TEXTS]
    vocabulary = sorted(set().union(*counts))
    table = torch.tensor([[count[term] for term in vocabulary] for count in counts]).float()
    search = ANSWERS.BM25(terms, 0.9, 0.4)
    search.add(list(range(len(TEXTS))), TEXTS)
    for question in ASKED[:6]:
        asked = torch.tensor([vocabulary.index(t) for t in set(terms(question)) if t in vocabulary])
        scores = ANSWERS.bm25_scores(table, asked, 0.9, 0.4)
        assert dict(search.search(question, 99)) == pytest.approx(
            {i: s for i, s in enumerate(scores.tolist()) if s}, rel=1e-4
        )


@pytest.mark.parametrize("fuse", both("reciprocal_rank_fusion"), ids=("reference", "answer"))
@pytest.mark.parametrize("k, weights", [(60, None), (1, [1.0, 0.3, 0.7]), (0, [0.2, 1.0, 0.0])])
def test_the_exercises_fusion_is_the_courses(fuse, k, weights):
    generator = np.random.default_rng(3)
    for size in range(1, 12):
        rankings = [generator.permutation(size)[: size // n + 1].tolist() for n in (1, 2, 3)]
        close(fuse(rankings, k, weights), promoted.reciprocal_rank_fusion(rankings, k, weights))


class WordCounts(Embedder):
    """Texts that share terms are near."""

    name = "counts of terms"
    dim = 256
    max_tokens = 10_000

    def __init__(self):
        self.places = {}

    def embed(self, texts):
        vectors = np.full((len(texts), self.dim), 1e-6, np.float32)
        for row, text in zip(vectors, texts):
            for term in terms(text):
                row[self.places.setdefault(term, len(self.places)) % self.dim] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def count_tokens(self, texts):
        return [len(text) for text in texts]


@pytest.fixture(scope="module")
def desk():
    own = load_script("11_rag", "own")
    chunks = chunk_documents(DOCUMENTS[:12], gpt2_tokenizer())
    index = Index(WordCounts())
    index.add(chunks)
    search = own.OwnSearch(index, chunks, ANSWERS.BM25(terms), ANSWERS.reciprocal_rank_fusion)
    return own.Desk(search), search


def test_a_search_with_her_code_is_the_indexs(desk):
    _, search = desk
    for question in ASKED[:8]:
        for by in promoted.WAYS:
            found = [(hit.chunk.id, hit.score) for hit in search.search(question, 9, by)]
            close(found, [(hit.chunk.id, hit.score) for hit in search.index.search(question, 9, by)])


@pytest.mark.parametrize("ask", both("ask"), ids=("reference", "answer"))
def test_what_ask_cites_stands_in_the_passage_that_it_names(desk, ask):
    tools, search = desk
    prompts = []

    def read(prompt):
        prompts.append(prompt)
        return f" {prompt.split()[-9]}\n"

    asked = [q for q in ASKED if terms(q) and not search.index.unknown_names(q)]
    assert len(asked) >= 8
    for question in asked:
        given = ask(question, tools, read, 0.0, 3)
        assert given is not None
        _, title, sentence = given
        assert any(c.place == title and sentence in c.text and sentence in prompts[-1] for c in search.chunks)
    assert len(prompts) == len(asked) and all(prompt.endswith("\nAnswer:") for prompt in prompts)
    assert ask(asked[0], tools, read, 1.1, 3) is ask("?", tools, read, 0.0, 3) is None
    assert ask("Who is the mayor of Paris?", tools, read, 0.0, 3) is None  # a name that no document has
    assert len(prompts) == len(asked)


@pytest.mark.slow
def test_her_search_and_her_fusion_give_the_rows_of_the_course(output, base_model, text_file, monkeypatch):
    monkeypatch.setenv("LLM_WEEKS_ANSWERS", str(output / "answers"))
    for name in ("BM25", "reciprocal_rank_fusion"):
        assert Week(11).shelf.solve(name, getattr(ANSWERS, name)) is None
    module, settings = script("11_rag", text=text_file)
    plain, mine = module.main(settings), module.main(replace(settings, mine=True))
    rows = [key for key in plain if key.startswith(("bm25_", "hybrid_", "dense_"))]
    assert len(rows) == 15
    assert {key: mine[key] for key in rows} == pytest.approx({key: plain[key] for key in rows}, rel=1e-6)
