"""shared/retrieval/index.py and shared/retrieval/stores.py: against numpy, bm25s and transformers; what is
deleted never comes back; what is saved is the same.
"""

import hashlib
import json
import random
from dataclasses import replace

import bm25s
import numpy as np
import pytest
import torch
import transformers

from shared.assets import fetch
from shared.models.gpt import GPT, GPTConfig
from shared.retrieval.bm25 import BM25, terms
from shared.retrieval.documents import Chunk, chunk_documents, load_documents
from shared.retrieval.embedders import HiddenStates, MiniLM
from shared.retrieval.index import WAYS, Index, reciprocal_rank_fusion
from shared.retrieval.ranking import rank_scores, recall_at
from shared.retrieval.stores import FAISS_KINDS, STORES, FaissStore, make_store, open_store
from shared.runtime import ROOT
from shared.tokenizers import BPETokenizer, gpt2_tokenizer

WEEK = ROOT / "weeks/11_rag"
DOCUMENTS = load_documents(WEEK / "handbook").documents
QUESTIONS = [
    q for line in (WEEK / "questions.jsonl").read_text().splitlines() if (q := json.loads(line))["document"]
]


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


def test_pq_is_small():
    sizes = {
        kind: make_store(kind, 64, **({"pq_bytes": 8} if kind == "pq" else {})) for kind in ("flat", "pq")
    }
    for store in sizes.values():
        store.add(range(20_000), unit(20_000, dim=64))
    flat, pq = (sizes[kind].num_bytes() for kind in ("flat", "pq"))
    assert flat >= 20_000 * 64 * 4 and pq < flat / 6  # 8 bytes for 256; the ids and the codebook come on top


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
    assert len(store) == 0 and (store.search(rows[:2], 3)[1] == -1).all()
    store.add([5], rows[:1])
    assert store.search(rows[:1], 2)[1].tolist() == [[5, -1]]


@pytest.mark.parametrize("kind", STORES)
def test_mistakes_with_stores_are_said_and_change_nothing(kind):
    store, vectors = filled(kind, 300), unit(300)
    with pytest.raises(ValueError, match=r"id 1005 is in the store already \(1 such\): use update"):
        store.add([9, 1005], vectors[:2])
    with pytest.raises(ValueError, match="id 9 is not in the store"):
        store.delete([1005, 9])
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


# ---- embedders


class Words:
    """An embedder for tests: every word has a direction of its own, always the same."""

    name, dim = "words", 64

    def embed(self, texts):
        rows = [sum((self.direction(w) for w in terms(t)), np.full(self.dim, 1e-3)) for t in texts]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32).reshape(-1, self.dim)

    def direction(self, word):
        return np.random.default_rng(int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)).standard_normal(
            self.dim
        )


TOKENIZER = BPETokenizer.train((s.text for d in DOCUMENTS for s in d.sections), 600)


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "norm": "rmsnorm"}])
def test_hidden_states_are_the_mean_over_a_texts_own_tokens(changes):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig.preset("nano", vocab_size=600, block_size=24, n_layer=2, dropout=0.1, **changes)
    ).train()
    texts = ["The ferry leaves.", "Boats", " ".join(["harbour"] * 60), "It rains again on the pier today"]
    found = HiddenStates(model, TOKENIZER, "nano", batch_size=3).embed(texts)
    assert model.training and found.shape == (4, 128) and found.dtype == np.float32
    model.eval()
    states = []
    model.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad():
        for text in texts:
            assert (
                model(torch.tensor([TOKENIZER.encode(text)[:24]])).size(-1) == 600
            )  # the model itself keeps its head
    expected = torch.cat([torch.nn.functional.normalize(s.mean(1), dim=-1) for s in states])
    assert found == pytest.approx(expected.numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="empty text"):
        HiddenStates(model, TOKENIZER, "nano").embed(["a", ""])


@pytest.fixture(scope="module")
def minilm():
    return MiniLM()


def test_minilm_is_what_transformers_computes(minilm):
    texts = ["When does the last tram leave?", "Cats. " * 300, "The tram runs until 23:10."]
    folder = fetch("minilm-config").parent
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder).eval(),
    )
    expected = []
    for text in texts:
        with torch.no_grad():
            states = model(
                **tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            ).last_hidden_state
        expected.append(torch.nn.functional.normalize(states.mean(1), dim=-1)[0].numpy())
    found = minilm.embed(texts)
    assert found == pytest.approx(np.stack(expected), abs=1e-5)
    assert found[0] @ found[2] > 0.5 > found[0] @ found[1]
    assert minilm.embed([]).shape == (0, 384)


def test_the_right_section_is_among_the_first_five(minilm):
    index = Index(minilm)
    index.add(chunk_documents(DOCUMENTS, gpt2_tokenizer()))
    found = {
        by: [
            [(hit.chunk.source, *hit.chunk.headings) for hit in index.search(q["question"], 10, by)]
            for q in QUESTIONS
        ]
        for by in WAYS
    }
    scores = {
        by: rank_scores(rankings, [{(q["document"], q["section"])} for q in QUESTIONS])
        for by, rankings in found.items()
    }
    assert scores["dense"]["recall@5"].mean >= 0.95
    assert scores["bm25"]["recall@5"].mean >= 0.7


# ---- the index

CHUNKS = chunk_documents(DOCUMENTS, TOKENIZER, size=100, overlap=20, window=40)


def results(index, k=7):
    return [
        [(h.chunk, round(h.score, 4)) for h in index.search(q["question"], k, by)]
        for q in QUESTIONS[::16]
        for by in WAYS
    ]


@pytest.mark.parametrize("kind", [*FAISS_KINDS, "qdrant"])
def test_an_index_is_saved_loaded_and_goes_on(tmp_path, kind):
    index = Index(Words(), make_store(kind, 64))
    index.add(CHUNKS)
    assert len(index) == len(CHUNKS) and index.sources == [d.source for d in DOCUMENTS]
    again = Index.load(index.save(tmp_path / "index"), Words())
    assert results(again) == results(index) and again.sources == index.sources
    for each in (index, again):
        each.delete(["ferry-fares.md"])
        each.update(
            [replace(c, text=c.text.replace("1909", "1955")) for c in CHUNKS if c.source == "tram-line.md"]
        )
    assert results(again) == results(index)
    found = [
        hit.chunk
        for by in WAYS
        for hit in again.search("In which year was the tram line opened? Fares of the ferry", 20, by)
    ]
    assert not any(c.source == "ferry-fares.md" or "1909" in c.text for c in found) and any(
        "1955" in c.text for c in found
    )
    Index.load(again.save(tmp_path / "index"), Words())
    assert len(list((tmp_path / "index").iterdir())) == 2  # the old vectors are gone


def test_sync_embeds_only_what_is_new_or_changed():
    index = Index(Words())
    index.add(c for c in CHUNKS if c.source != "pets.md")
    embedded, embed = [], index.embedder.embed
    index.embedder.embed = lambda texts: embedded.extend(texts) or embed(texts)
    changed = [
        replace(c, text=c.text + " New.") if c.source == "radio.md" else c
        for c in CHUNKS
        if c.source != "seals.md"
    ]
    assert index.sync(changed) == {"added": ["pets.md"], "changed": ["radio.md"], "gone": ["seals.md"]}
    assert embedded == [
        text
        for source in ("radio.md", "pets.md")
        for c in changed
        if c.source == source
        for text in c.window_texts()
    ]
    assert index.sync(changed) == {"added": [], "changed": [], "gone": []}
    fresh = Index(Words())
    fresh.add(changed)
    assert sorted(map(sorted_hits, results(index))) == sorted(map(sorted_hits, results(fresh)))


def test_a_kept_index_embeds_nothing_twice(tmp_path):
    def counting():
        embedder, embedded = Words(), []
        embed = embedder.embed
        embedder.embed = lambda texts: embedded.extend(texts) or embed(texts)
        return embedder, embedded

    _, changes = Index.kept(tmp_path / "index", Words(), CHUNKS)
    assert sorted(changes["added"]) == sorted({c.source for c in CHUNKS})
    files = {f.name: f.read_bytes() for f in (tmp_path / "index").iterdir()}
    embedder, embedded = counting()
    index, changes = Index.kept(tmp_path / "index", embedder, CHUNKS)
    assert not embedded and not any(changes.values())
    assert files == {
        f.name: f.read_bytes() for f in (tmp_path / "index").iterdir()
    }  # nothing changed, nothing written
    changed = [
        replace(c, text=c.text + " New.") if c.source == "radio.md" else c
        for c in CHUNKS
        if c.source != "seals.md"
    ]
    embedder, embedded = counting()
    _, changes = Index.kept(tmp_path / "index", embedder, changed)
    assert changes == {"added": [], "changed": ["radio.md"], "gone": ["seals.md"]}
    assert embedded == [text for c in changed if c.source == "radio.md" for text in c.window_texts()]
    again, fresh = Index.load(tmp_path / "index", Words()), Index(Words())
    fresh.add(changed)
    assert sorted(map(sorted_hits, results(again))) == sorted(map(sorted_hits, results(fresh)))


def sorted_hits(found):
    return sorted((score, chunk.id) for chunk, score in found)


def test_a_chunk_is_as_near_as_its_nearest_window():
    index, embedder = Index(Words()), Words()
    index.add(CHUNKS)
    for q in QUESTIONS[::20]:
        vector = embedder.embed([q["question"]])[0]
        scores = {c.id: max(embedder.embed(c.window_texts()) @ vector) for c in CHUNKS}
        best = sorted(scores, key=scores.get, reverse=True)[:8]
        found = index.search(q["question"], 8)
        assert [hit.score for hit in found] == pytest.approx([scores[i] for i in best], abs=1e-5)
        assert len({hit.chunk.id for hit in found}) == 8
    assert len(index.search("harbour", 10_000)) == len(CHUNKS)


def test_an_index_of_another_embedder_is_refused(tmp_path):
    index = Index(Words())
    index.add(CHUNKS[:3])
    index.save(tmp_path)
    other = Words()
    other.name = "letters"
    with pytest.raises(
        ValueError,
        match=(
            r"made with the embedder words \(64 numbers\), and cannot be searched with letters \(64 numbers\)"
        ),
    ):
        Index.load(tmp_path, other)
    with pytest.raises(ValueError, match="the store takes vectors of 3 numbers, but words makes 64"):
        Index(Words(), FaissStore(3))


def test_a_damaged_index_is_refused(tmp_path):
    index = Index(Words())
    index.add(CHUNKS[:30])
    with pytest.raises(ValueError, match=r"holds no whole index \(index.json is missing\): build it first"):
        Index.load(tmp_path / "none", Words())
    vectors = next(index.save(tmp_path).glob("vectors-*"))
    whole = vectors.read_bytes()
    for damaged in (whole[:-9], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], b""):
        vectors.write_bytes(damaged)
        with pytest.raises(ValueError, match="the vectors of .* are cut or damaged"):
            Index.load(tmp_path, Words())
    vectors.unlink()
    with pytest.raises(ValueError, match="is missing"):
        Index.load(tmp_path, Words())
    for content in ("{", "[]", "{}", (tmp_path / "index.json").read_text()[:-50]):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(ValueError, match="cut or damaged"):
            Index.load(tmp_path, Words())


def test_every_way_finds_as_many_as_are_wanted():
    index = Index(Words())
    index.add(CHUNKS)
    found = {by: index.search("the harbour and the ferry", len(CHUNKS), by=by) for by in ("dense", "hybrid")}
    assert len(CHUNKS) > 100 and [len(hits) for hits in found.values()] == [len(CHUNKS)] * 2


def test_mistakes_with_an_index_are_said():
    index = Index(Words())
    assert index.search("anything") == [] and index.search("anything", by="hybrid") == []
    index.add(CHUNKS[:3])
    with pytest.raises(ValueError, match=f"{CHUNKS[0].source} is in the index already: use update"):
        index.add(CHUNKS[:1])
    with pytest.raises(ValueError, match="none.md is not in the index"):
        index.delete(["none.md"])
    with pytest.raises(ValueError, match="no search by 'guess'; there are: dense, bm25, hybrid"):
        index.search("x", by="guess")
    for question, k in ((" ", 3), ("x", 0)):
        with pytest.raises(ValueError, match="a search needs a question and k of at least 1"):
            index.search(question, k)


def test_a_chunk_without_windows_is_embedded_whole():
    index = Index(Words())
    index.add([Chunk("a.md", "Boats", (), "The green boat."), Chunk("b.md", "Trams", (), "The red tram.")])
    assert [hit.chunk.source for hit in index.search("green", 1)] == ["a.md"]
    index.delete("a.md")
    assert [hit.chunk.source for hit in index.search("green", 2)] == ["b.md"]
