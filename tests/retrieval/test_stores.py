"""shared/retrieval/stores.py against numpy and a dictionary: what is deleted never comes back."""

import random

import numpy as np
import pytest

from shared.retrieval.ranking import recall_at
from shared.retrieval.stores import STORES, make_store, open_store

# ---- stores

DIM = 32
SETTINGS = {"ivf": {"cells": 8}, "pq": {"pq_bytes": 16}}
EXACT = ("flat", "qdrant")


def unit(n, seed=0, dim=DIM):
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(kind, n=600):
    store = make_store(kind, DIM, **SETTINGS.get(kind, {}))
    store.add(range(1000, 1000 + n), unit(n))
    return store


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
def test_exact_stores_find_what_numpy_finds(kind):
    questions = unit(20, seed=1)
    scores, ids = filled(kind).search(questions, 10)
    products = questions @ unit(600).T
    order = np.argsort(-products, axis=1)[:, :10]
    assert (ids == order + 1000).all()
    assert scores == pytest.approx(np.take_along_axis(products, order, 1), abs=1e-5)


@pytest.mark.parametrize(
    "kind, effort, least", [("hnsw", 64, 0.95), ("hnsw", 600, 1.0), ("ivf", 8, 1.0), ("pq", None, 0.5)]
)
def test_the_others_find_most_of_it_and_more_with_more_effort(kind, effort, least):
    truth = unique(filled("flat").search(unit(50, seed=1), 10)[1])
    store = filled(kind)
    store.effort = 1
    little = np.mean(
        [recall_at(f, t, 10) for f, t in zip(unique(store.search(unit(50, seed=1), 10)[1]), truth)]
    )
    store.effort = effort
    much = np.mean(
        [recall_at(f, t, 10) for f, t in zip(unique(store.search(unit(50, seed=1), 10)[1]), truth)]
    )
    assert much >= least
    assert little < much if kind == "ivf" else little <= much


def unique(rows):
    """Without the -1 that stand for nothing found."""
    return [[i for i in row if i >= 0] for row in rows.tolist()]


@pytest.mark.slow
def test_pq_is_small():
    sizes = {
        kind: make_store(kind, 64, **({"pq_bytes": 8} if kind == "pq" else {})) for kind in ("flat", "pq")
    }
    for store in sizes.values():
        store.add(range(20_000), unit(20_000, dim=64))
    flat, pq = (sizes[kind].num_bytes() for kind in ("flat", "pq"))
    assert flat >= 20_000 * 64 * 4 and pq < flat / 6  # 8 bytes for 256; the ids and the codebook come on top


@pytest.mark.parametrize("dim", [1, 7, 9, 15, 384])
def test_pqs_usual_bytes_divide_short_vectors_too(dim):
    assert make_store("pq", dim).pq_bytes == max(1, dim // 8)


@pytest.mark.parametrize("kind", STORES)
def test_a_store_is_what_a_dictionary_would_be(kind):
    """Any series of operations, then: what is there is found with its own vector, what is not is never
    returned.
    """
    draw, store, vectors = random.Random(4), filled(kind), iter(unit(3000, seed=2))
    truth = {1000 + i: vector for i, vector in enumerate(unit(600))}
    for _ in range(25):
        some = draw.sample(sorted(truth), min(len(truth), draw.choice([1, 40])))
        new = np.stack([next(vectors) for _ in some])
        action = draw.choice(["delete", "update", "add"])
        if action == "delete":
            store.delete(some)
            for i in some:
                del truth[i]
        else:
            ids = some if action == "update" else [max(truth) + 1 + n for n in range(len(some))]
            getattr(store, action)(ids, new)
            truth |= zip(ids, new)
        assert len(store) == len(truth)
    store.effort = 600
    again = open_store(store.kind, store.dim, store.settings, store.arrays())
    ids, rows = np.array(list(truth)), np.stack(list(truth.values()))
    scores, found = store.search(rows[:100], 5)
    assert (found >= 0).all() and set(found.flatten()) <= set(truth)
    assert (again.search(rows[:100], 5)[1] == found).all() and len(again) == len(store)
    if kind != "pq":
        assert scores[:, 0] == pytest.approx(np.ones(100), abs=1e-5)
        nearest = (rows[:100] @ rows.T).argmax(1)
        assert (found[:, 0] == ids[nearest]).all()
    store.delete(ids)
    scores, ids = store.search(rows[:2], 3)
    assert len(store) == 0 and (ids == -1).all() and (scores == -np.inf).all()
    store.add([5], rows[:1])
    assert store.search(rows[:1], 2)[1].tolist() == [[5, -1]]


@pytest.mark.parametrize("kind", STORES)
def test_mistakes_with_stores_are_said_and_change_nothing(kind):
    store, vectors = filled(kind, 300), unit(300)
    with pytest.raises(ValueError, match=r"id 1005 is in the store already \(1 such\): use update"):
        store.add([9, 1005], vectors[:2])
    with pytest.raises(ValueError, match=r"id 9 is not in the store \(2 such\)"):
        store.delete([1005, 9, 8])
    with pytest.raises(ValueError, match="2 ids and 1 vectors"):
        store.add([1, 2], vectors[:1])
    with pytest.raises(ValueError, match="different from each other"):
        store.update([1, 1], vectors[:2])
    with pytest.raises(ValueError, match=r"shape \[1, 31\] do not fit: this store takes \[n, 32\]"):
        store.search(vectors[:1, :31], 5)
    with pytest.raises(ValueError, match="NaN or infinity"):
        store.add([1], vectors[:1] * np.nan)
    with pytest.raises(ValueError, match="k=0"):
        store.search(vectors[:1], 0)
    assert len(store) == 300
    assert store.search(vectors[:1], 400)[1].shape == (1, 400)
    arrays = store.arrays()
    last = max(arrays, key=lambda name: arrays[name].nbytes)
    for damaged in (
        {"ids": arrays["ids"]},
        arrays | {last: arrays[last][:7]},
        arrays | {"ids": arrays["ids"][:7]},
    ):
        with pytest.raises(ValueError, match="damaged|do not go together"):
            open_store(kind, DIM, store.settings, damaged)


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        ("tree", {}, "no store is called 'tree'; there are: flat, ivf"),
        ("ivf", {"cells": 0}, "cells=0: must be at least 1"),
        ("pq", {"pq_bytes": 5}, "pq_bytes=5 does not divide the vectors' 32"),
    ],
)
def test_stores_that_cannot_be_are_refused(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        make_store(kind, DIM, **settings)


@pytest.mark.parametrize(
    "kind, settings, words", [("ivf", {"cells": 50}, "50 cells need"), ("pq", {}, "10 are too few: use flat")]
)
def test_too_few_vectors_to_learn_from_are_refused(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        make_store(kind, DIM, **settings).add(range(10), unit(10))


@pytest.mark.parametrize("kind", STORES)
def test_the_id_0_is_an_id_like_any_other(kind):
    store = make_store(kind, DIM, **SETTINGS.get(kind, {}))
    rows = unit(600)
    store.add(range(600), rows)
    store.delete([7, 8])
    assert 0 in store.search(rows[:1], 5)[1] and len(store) == 598


@pytest.mark.parametrize(
    "vectors, cells", [(39, 1), (77, 1), (78, 2), (780, 20), (13_000, 333), (40_000, 800)]
)
def test_cells_are_four_roots_but_as_few_as_faiss_wants_for_each(vectors, cells):
    """FAISS warns where a cell has fewer than 39 vectors to learn from."""
    store = make_store("ivf", 4)
    store.add(range(vectors), unit(vectors, dim=4))
    assert store._index.nlist == cells
