"""shared/retrieval/bm25.py against the library bm25s; fusion by hand."""

import bm25s
import numpy as np
import pytest

from shared.retrieval.bm25 import BM25, terms
from shared.retrieval.index import reciprocal_rank_fusion
from tests.retrieval.helpers import DOCUMENTS, QUESTIONS

# ---- BM25


@pytest.mark.parametrize("k1, b", [(1.2, 0.75), (0.5, 0.0), (2.0, 1.0)])
def test_bm25_scores_as_the_library_does(k1, b):
    texts = [" ".join([d.title, *(s.text for s in d.sections)]) for d in DOCUMENTS]
    library = bm25s.BM25(method="lucene", k1=k1, b=b)
    library.index([terms(text) for text in texts], show_progress=False)
    ours = BM25(k1, b)
    ours.add(range(100, 100 + len(texts)), texts)
    for question in [q["question"] for q in QUESTIONS[::10]] + ["ferry ferry harbour"]:
        expected = library.get_scores(terms(question))
        found = ours.search(question, len(texts))
        assert {i - 100 for i, _ in found} == set(np.flatnonzero(expected))
        assert [score for _, score in found] == pytest.approx([expected[i - 100] for i, _ in found], rel=1e-5)
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_bm25_after_deleting_is_as_if_it_had_never_been():
    texts = [s.text for d in DOCUMENTS[:8] for s in d.sections]
    left, whole = BM25(), BM25()
    whole.add(range(len(texts)), texts)
    whole.delete(range(0, len(texts), 2))
    left.add(range(1, len(texts), 2), texts[1::2])
    assert whole.search("the harbour and the town", 99) == left.search("the harbour and the town", 99) != []
    assert BM25().search("harbour", 3) == left.search("zzz", 3) == left.search("the and of", 3) == []
    with pytest.raises(ValueError, match="id 1 is there already"):
        left.add([1], ["again"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The FERRIES' boss", ["ferry", "boss"]),
        ("a bus, shoes; 17:50", ["bus", "shoes", "17", "50"]),
        ("Zürich's bays", ["zürich", "bay"]),
    ],
)
def test_terms(text, expected):
    assert terms(text) == expected


@pytest.mark.parametrize("settings", [{"k1": -1}, {"b": 1.5}])
def test_bm25_refuses_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="BM25: k1="):
        BM25(**settings)


def test_fusion_by_hand():
    found = reciprocal_rank_fusion([["a", "b", "c"], ["c", "d"]], k=1, weights=[1, 2])
    assert found == [("c", 1 / 4 + 2 / 2), ("d", 2 / 3), ("a", 1 / 2), ("b", 1 / 3)]
    assert reciprocal_rank_fusion([["x", "y"]]) == [("x", 1 / 61), ("y", 1 / 62)]
    assert [name for name, _ in reciprocal_rank_fusion([["a", "b"], ["b", "a"]])] == [
        "a",
        "b",
    ]  # equals as first met
    for weights, k in (([1.0], 60), ([1.0, 1.0], -1)):
        with pytest.raises(ValueError, match="fusion needs a weight for each of the 2"):
            reciprocal_rank_fusion([["a"], ["b"]], k, weights)
