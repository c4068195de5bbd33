"""shared/retrieval/index.py: what is saved is the same, and embedded once."""

import random
from dataclasses import replace
from itertools import accumulate

import pytest

from shared.retrieval.documents import Chunk
from shared.retrieval.index import FUSED, WAYS, Index, reciprocal_rank_fusion
from shared.retrieval.stores import FAISS_KINDS, FaissStore, make_store
from tests.retrieval.helpers import CHUNKS, DOCUMENTS, QUESTIONS, Words, results


@pytest.mark.slow
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
    assert len(list((tmp_path / "index").glob("[!.]*"))) == 2  # the old vectors are gone


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_index_is_what_a_new_one_would_be(tmp_path):
    """After any series of changes, and when it has been saved and loaded in between."""
    draw, index, truth = random.Random(7), Index(Words()), {}
    groups = {
        source: [c for c in CHUNKS if c.source == source] for source in sorted({c.source for c in CHUNKS})[:8]
    }
    for step in range(40):
        some = draw.sample(sorted(groups), draw.choice([1, 3]))
        new = {source: [replace(c, text=f"{c.text} New {step}.") for c in groups[source]] for source in some}
        action = draw.choice(["update", "delete", "load", "sync"])
        if action == "update":
            index.update(chunk for chunks in new.values() for chunk in chunks)
            truth |= new
        elif action == "delete":
            gone = [source for source in some if source in truth]
            index.delete(gone)
            truth = {source: chunks for source, chunks in truth.items() if source not in gone}
        elif action == "load":
            index = Index.load(index.save(tmp_path), Words())
        else:
            truth = {source: truth.get(source, new[source]) for source in some}
            index.sync(chunk for chunks in truth.values() for chunk in chunks)
        assert sorted(index.sources) == sorted(truth) and len(index) == sum(map(len, truth.values()))
        fresh = Index(Words())
        fresh.add(chunk for chunks in truth.values() for chunk in chunks)
        for by in ("dense", "bm25"):
            found, expected = (
                sorted_hits(each.search("New harbour of the ferry", 99, by)) for each in (index, fresh)
            )
            assert [i for _, i in found] == [i for _, i in expected]
            assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_few_chunks_of_many_windows_are_all_found(k):
    """The nearest windows are all of one chunk, far more of them than a first search asks for."""
    windows = {
        "near.md": ["ferry", "ferry boat"] * 30,
        "middle.md": ["ferry harbour", "ferry boat harbour hill"] * 30,
        "far.md": ["hill", "baker"] * 30,
    }
    index, embedder = Index(Words()), Words()
    index.add(Chunk(source, "", (), **cut(texts)) for source, texts in windows.items())
    question = embedder.embed(["ferry"])[0]
    nearest = {source: max(embedder.embed(texts) @ question) for source, texts in windows.items()}
    found = index.search("ferry", k)
    expected = sorted(nearest, key=nearest.get, reverse=True)[:k]
    assert [hit.chunk.source for hit in found] == expected
    assert [hit.score for hit in found] == pytest.approx([nearest[s] for s in expected], abs=1e-5)


def cut(texts):
    """A chunk's text, and where its windows, which are `texts`, begin and end in it."""
    ends = list(accumulate(len(text) + 1 for text in texts))
    return {
        "text": " ".join(texts),
        "windows": tuple((end - len(text) - 1, end - 1) for text, end in zip(texts, ends)),
    }


@pytest.mark.slow
def test_hybrid_is_the_fusion_of_the_whole_rankings():
    index = Index(Words())
    index.add(CHUNKS)
    for q in QUESTIONS[::80]:
        rankings = [
            [hit.chunk.id for hit in index.search(q["question"], FUSED, by)] for by in ("dense", "bm25")
        ]
        expected = reciprocal_rank_fusion(rankings)
        for k in (1, 7, FUSED):
            found = [(hit.chunk.id, hit.score) for hit in index.search(q["question"], k, "hybrid")]
            assert found == expected[:k]


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


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("question", ["prices", "adults", "tallies"])
def test_a_chunk_is_found_by_its_title_and_headings_too(by, question):
    index = Index(Words())
    index.add([Chunk("a.md", "Boats", (), "Green."), Chunk("b.md", "Prices", ("Adults",), "Nine tallies.")])
    assert index.search(question, 1, by)[0].chunk.source == "b.md"
