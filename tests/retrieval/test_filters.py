"""Searches that are narrowed: conditions, and that what fits is found exactly, in every store and way."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.retrieval.bm25 import BM25
from shared.retrieval.documents import Chunk
from shared.retrieval.filters import fields_test
from shared.retrieval.followups import title_of_best
from shared.retrieval.index import WAYS, Index, reciprocal_rank_fusion
from shared.retrieval.stores import MEASURES, STORES, make_store
from tests.retrieval.helpers import CHUNKS, QUESTIONS, Words, results

# ---- conditions

FIELDS = {"team": ["pumps", "night"], "year": 2024, "pressure": 2.5, "draft": False, "day": "2024-05-01"}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, True),
        ({"year": 2024}, True),
        ({"year": 2024.0}, True),
        ({"year": "2024"}, False),
        ({"team": "pumps"}, True),
        ({"team": "pump"}, False),
        ({"team": ["safety", "night"]}, True),
        pytest.param({"team": {"safety", "day"}}, False, id="a set"),
        ({"year": (2023, 2024)}, True),
        ({"year": []}, False),
        ({"draft": False}, True),
        ({"draft": 0}, False),
        ({"year": {">=": 2024, "<": 2025}}, True),
        ({"year": {">": 2024}}, False),
        ({"pressure": {"<=": 2.5}}, True),
        ({"day": {">=": "2024-01-01", "<": "2025"}}, True),
        ({"day": {">=": 2024}}, False),
        ({"draft": {"<": 1}}, False),
        ({"team": {">": "o", "<": "q"}}, True),
        ({"team": {"!=": "pumps"}}, False),
        ({"team": {"!=": "safety"}}, True),
        ({"year": {"!=": 2023, "<": 2025}}, True),
        ({"none": 1}, False),
        ({"none": {">": 1}}, False),
        ({"none": {"!=": 1}}, True),
        ({"year": 2024, "draft": True}, False),
        pytest.param(lambda fields: fields["pressure"] > 2, True, id="a function"),
    ],
    ids=str,
)
def test_conditions(where, expected):
    assert fields_test(where)(FIELDS) is expected


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("team", "a filter maps fields to what they must be, or is a function; not 'team'"),
        ({"year": None}, "year: None is no text, number, true or false"),
        ({"year": [[1]]}, r"year: \[1\] is no text"),
        ({"year": {"$gte": 1}}, r"year: '\$gte' compares nothing; there are: <, <=, >, >=, !="),
        ({"year": {}}, "year: an empty mapping compares nothing"),
        ({"year": {">": [1]}}, r"year: \[1\] is no text"),
    ],
)
def test_conditions_of_another_form_are_refused(where, words):
    with pytest.raises(ValueError, match=words):
        fields_test(where)


NUMBERS = st.integers(-3, 3) | st.sampled_from([-0.5, 1.0, 2.5])


@given(st.lists(NUMBERS), NUMBERS, NUMBERS)
def test_a_range_is_what_numpy_says(values, low, high):
    fits = fields_test({"x": {">=": low, "<": high}})
    array = np.array(values, float)
    assert [fits({"x": v}) for v in values] == ((array >= low) & (array < high)).tolist()


# ---- stores

DIM = 24
SETTINGS = {"ivf": {"cells": 8, "effort": 1}, "pq": {"pq_bytes": 12}, "hnsw": {"effort": 1}}


def lengthy(n, seed):
    """Vectors of all lengths."""
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((n, DIM)) * draw.uniform(0.1, 20, (n, 1))
    return vectors.astype(np.float32)


def products(questions, vectors, measure):
    """What numpy makes of the measure."""
    questions, vectors = questions.astype(float), vectors.astype(float)
    if measure == "cosine":
        questions = questions / np.linalg.norm(questions, axis=1, keepdims=True)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return questions @ vectors.T


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", STORES)
def test_scores_are_the_measure_whatever_the_vectors_lengths(kind, measure):
    vectors, questions = lengthy(400, 0), lengthy(5, 1)
    store = make_store(kind, DIM, measure=measure, **SETTINGS.get(kind, {}))
    store.add(range(100, 500), vectors)
    expected = products(questions, vectors, measure)
    for among in (None, range(100, 500)):
        scores, ids = store.search(questions, 10, among=among)
        rows, columns = np.nonzero(ids >= 0)
        near = 1e-4 if kind != "pq" else 0.3
        error = np.abs(scores[rows, columns] - expected[rows, ids[rows, columns] - 100])
        assert len(rows) and error.max() <= near * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 40, 300])
@pytest.mark.parametrize("kind", STORES)
def test_among_some_ids_the_nearest_of_them_are_found(kind, size):
    """Also where a store looks at few vectors by itself, after some were deleted, and when it was loaded."""
    vectors, questions = lengthy(600, 0), lengthy(6, 1)
    store = make_store(kind, DIM, **SETTINGS.get(kind, {}))
    store.add(range(600), vectors)
    store.delete(range(0, 100, 2))
    some = np.random.default_rng(size).permutation(600)[:size]
    there = np.array(sorted(set(some.tolist()) - set(range(0, 100, 2))))
    scores, ids = store.search(questions, 10, among=some)
    if kind == "pq":  # exact for what it kept of the vectors
        every, order = store.search(questions, len(store))
        kept = np.isin(order, there)
        expected = [row[mask][:10].tolist() for row, mask in zip(every, kept)]
    else:
        expected = np.sort(products(questions, vectors[there], "cosine"))[:, ::-1][:, :10].tolist()
    filled = min(10, len(there))
    assert scores[:, :filled] == pytest.approx(np.array(expected), abs=1e-4)
    assert (ids[:, filled:] == -1).all() and set(ids[:, :filled].flatten()) <= set(there.tolist())
    none = store.search(questions, 3, among=[0, 2, 10_000])
    assert (none[1] == -1).all() and (store.search(questions, 3, among=[])[1] == -1).all()


def test_zeros_are_near_to_nothing():
    store = make_store("flat", 2)
    store.add([1, 2], np.array([[0, 0], [3, 4]], np.float32))
    scores, ids = store.search(np.array([[0, 5]], np.float32), 2)
    assert ids.tolist() == [[2, 1]] and scores[0] == pytest.approx([0.8, 0])


# ---- the index


def labelled():
    """The handbook's chunks, each document with fields."""
    sources = sorted({chunk.source for chunk in CHUNKS})
    return [
        replace(
            chunk,
            metadata={
                "year": 2000 + sources.index(chunk.source) % 7,
                "teams": ["even"] if sources.index(chunk.source) % 2 == 0 else ["odd", "loud"],
            },
        )
        for chunk in CHUNKS
    ]


WHERE = {"teams": "loud", "year": {">=": 2004}}


def loud(fields):
    return "loud" in fields["teams"] and fields["year"] >= 2004


@pytest.fixture(scope="module")
def index():
    made = Index(Words())
    made.add(labelled())
    return made


def check_narrowed(index, whole, by, where):
    """The narrowed search in one index is the whole ranking of another without the rest."""
    fitting = 0
    for q in QUESTIONS[::80]:
        every = whole.search(q["question"], len(CHUNKS), by)
        expected = [hit for hit in every if loud(hit.chunk.fields)]
        fitting += len(expected)
        for k in (1, 4, 50):
            found = index.search(q["question"], k, by, where=where)
            assert [hit.score for hit in found] == pytest.approx([h.score for h in expected[:k]], abs=1e-5)
            assert all(loud(hit.chunk.fields) for hit in found)
    assert fitting > 4


@pytest.mark.parametrize("by", ["dense", "bm25"])
@pytest.mark.parametrize("where", [WHERE, loud], ids=["mapping", "function"])
def test_a_narrowed_search_is_the_whole_ranking_without_the_rest(index, by, where):
    check_narrowed(index, index, by, where)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "hnsw", "qdrant"])
def test_it_is_so_with_every_store_of_whole_vectors(index, kind):
    other = Index(Words(), make_store(kind, 64))
    other.add(labelled())
    check_narrowed(other, index, "dense", WHERE)


def test_a_narrowed_hybrid_fuses_the_narrowed_rankings(index):
    for q in QUESTIONS[::60]:
        rankings = [
            [hit.chunk.id for hit in index.search(q["question"], 50, by, where=WHERE)]
            for by in ("dense", "bm25")
        ]
        found = index.search(q["question"], 7, "hybrid", where=WHERE)
        assert [(hit.chunk.id, hit.score) for hit in found] == reciprocal_rank_fusion(rankings)[:7]


@pytest.mark.parametrize("by", WAYS)
def test_a_least_score_leaves_out_what_is_below(index, by):
    every = index.search("the ferry to the harbour", 20, by)
    least = every[8].score
    found = index.search("the ferry to the harbour", 20, by, least_score=least)
    assert found == [hit for hit in every if hit.score >= least] and 0 < len(found) < len(every)
    assert index.search("the ferry to the harbour", 20, by, least_score=1e9) == []


def test_nearest_windows_are_narrowed_too(index):
    every = [w for w in index.nearest_windows("the ferry", 10_000) if loud(w.chunk.fields)]
    found = index.nearest_windows("the ferry", 9, where=WHERE)
    assert [w.score for w in found] == pytest.approx([w.score for w in every[:9]], abs=1e-6)
    assert title_of_best(index, {"source": "pets.md"})("the ferry") == "Pets"


@pytest.mark.parametrize("by", WAYS)
def test_source_and_title_are_fields(index, by):
    hits = index.search("the harbour in winter", 50, by, where={"source": ["pets.md", "seals.md"]})
    assert {hit.chunk.source for hit in hits} <= {"pets.md", "seals.md"} and hits
    title = hits[0].chunk.title
    hits = index.search("the harbour in winter", 50, by, where={"title": title})
    assert {hit.chunk.title for hit in hits} == {title}


@pytest.mark.parametrize("by", WAYS)
def test_where_nothing_fits_nothing_is_found(index, by):
    assert index.search("ferry", 5, by, where={"year": 1999}) == []
    assert index.search("ferry", 5, by, where=lambda fields: False) == []


def test_a_field_that_no_document_has_is_said(index):
    assert index.fields == ["source", "teams", "title", "year"]
    words = "no document has the field 'yeer'; there are: source, teams, title, year"
    for search in (index.search, index.nearest_windows):
        with pytest.raises(ValueError, match=words):
            search("ferry", 3, where={"yeer": 2004})
    assert Index(Words()).search("ferry", where={"yeer": 2004}) == []  # nothing is there to have it


def test_words_count_for_the_same_among_some():
    bm25 = BM25()
    bm25.add(range(3), ["ferry", "ferry harbour", "harbour"])
    assert bm25.search("ferry", 5, among={1}) == [hit for hit in bm25.search("ferry", 5) if hit[0] == 1]


# ---- files


def test_metadata_is_saved_and_a_change_of_it_is_a_change(tmp_path):
    chunks = [chunk for chunk in labelled() if chunk.source in ("pets.md", "seals.md")]
    index, _ = Index.kept(tmp_path, Words(), chunks)
    again = Index.load(tmp_path, Words())
    where = {"year": chunks[0].metadata["year"]}
    assert again.search("pets", where=where) == index.search("pets", where=where) != []
    changed = [replace(c, metadata={"year": 1}) if c.source == "pets.md" else c for c in chunks]
    index, changes = Index.kept(tmp_path, Words(), changed)
    assert changes["changed"] == ["pets.md"] and index.search("pets", where={"year": 1})


def earlier(folder):
    """Makes an index's folder what it was before documents had metadata and stores a measure."""
    path = folder / "index.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    del values["format"], values["settings"]["measure"]
    for chunk in values["chunks"].values():
        del chunk["metadata"]
    path.write_text(json.dumps(values), encoding="utf-8")


def test_an_index_of_the_earlier_format_is_read(tmp_path):
    chunks = CHUNKS[:30]
    index, _ = Index.kept(tmp_path, Words(), chunks)
    earlier(tmp_path)
    assert results(Index.load(tmp_path, Words())) == results(index)
    _, changes = Index.kept(tmp_path, Words(), chunks)
    assert not any(changes.values())


def test_an_index_of_a_later_format_is_left_alone(tmp_path):
    Index.kept(tmp_path, Words(), CHUNKS[:3])
    path = tmp_path / "index.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"format": 2', '"format": 3'), encoding="utf-8")
    before = path.read_bytes()
    for use in (Index.load, lambda folder, embedder: Index.kept(folder, embedder, CHUNKS[:3])):
        with pytest.raises(ValueError, match="has the format 3, which a later version of this"):
            use(tmp_path, Words())
    assert path.read_bytes() == before


class Dots(Words):
    """Vectors that are compared as they are."""

    measure = "dot"


def test_a_store_has_its_embedders_measure():
    index = Index(Dots())
    assert index.store.measure == "dot"
    index.add([Chunk("a.md", "A", (), "The green boat.")])
    with pytest.raises(ValueError, match="by cosine, but words by dot: make it with measure='dot'"):
        Index(Dots(), make_store("flat", 64))
    with pytest.raises(ValueError, match="measure='angle': must be cosine or dot"):
        make_store("flat", 64, measure="angle")
