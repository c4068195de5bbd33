"""shared/retrieval/index.py: an index's folder holds a whole index, whoever writes, fails or is killed."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from shared import locks
from shared.retrieval import index as index_module
from shared.retrieval.documents import Chunk
from shared.retrieval.index import Index, NoIndex
from tests.retrieval.helpers import CHUNKS, Words, results

FEW = [chunk for chunk in CHUNKS if chunk.source in {"pets.md", "radio.md", "seals.md"}]


def index_of(chunks):
    index = Index(Words())
    index.add(chunks)
    return index


class Counting(Words):
    """Keeps what it embedded."""

    def __init__(self):
        self.embedded = []

    def embed(self, texts):
        self.embedded += texts
        return super().embed(texts)


# ---- several writers


def test_a_save_inside_anothers_save_is_refused_and_both_can_be_loaded(tmp_path, monkeypatch):
    first, second, refused = index_of(FEW[:3]), index_of(FEW[3:]), []
    write_json = index_module.write_json

    def with_another_before_it(path, value):
        """The vectors are written, index.json is not: what the other deletes now would be missing."""
        monkeypatch.setattr(index_module, "write_json", write_json)
        with pytest.raises(ValueError, match=r"in use by this process on .* \(saving an index, ") as error:
            second.save(tmp_path)
        refused.append(error)
        write_json(path, value)

    monkeypatch.setattr(index_module, "LOCK_SECONDS", 0)
    monkeypatch.setattr(index_module, "write_json", with_another_before_it)
    first.save(tmp_path)
    assert refused and results(Index.load(tmp_path, Words())) == results(first)
    second.save(tmp_path)
    assert results(Index.load(tmp_path, Words())) == results(second)


def test_who_loads_while_another_saves_gets_a_whole_index(tmp_path, monkeypatch):
    old, new, loads = index_of(FEW[:3]), index_of(FEW[3:]), index_module.json.loads
    old.save(tmp_path)

    def with_a_save_behind_it(text):
        """index.json is read, and the vectors that it names are deleted before they are."""
        values = loads(text)
        monkeypatch.setattr(index_module.json, "loads", loads)
        new.save(tmp_path)
        return values

    monkeypatch.setattr(index_module.json, "loads", with_a_save_behind_it)
    assert results(Index.load(tmp_path, Words())) == results(new)


def test_of_two_who_start_at_once_one_embeds(tmp_path, monkeypatch):
    waits, found = threading.Event(), []
    late = Counting()

    def start():
        found.append(Index.kept(tmp_path, late, FEW))

    other = threading.Thread(target=start, daemon=True)

    class Slow(Counting):
        def embed(self, texts):
            if not other.ident:
                other.start()
                assert waits.wait(60)
            return super().embed(texts)

    early = Slow()
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: waits.set())
    index, changes = Index.kept(tmp_path, early, FEW)
    other.join(60)
    assert changes["added"] and early.embedded and not late.embedded
    (waited, unchanged), *_ = found
    assert not any(unchanged.values()) and results(waited) == results(index)


def test_a_kept_index_that_has_not_changed_needs_no_lock(tmp_path, monkeypatch):
    """So it may lie in a folder that cannot be written to."""
    index, _ = Index.kept(tmp_path, Words(), FEW)
    monkeypatch.setattr(index_module, "folder_lock", None)
    again, changes = Index.kept(tmp_path, Words(), FEW)
    assert results(again) == results(index) and not any(changes.values())


def test_what_a_killed_writer_left_is_cleaned_up(tmp_path):
    for name in (
        ".vectors-0123456789abcdef.safetensors.77.tmp",
        ".index.json.77.tmp",
        "vectors-0.safetensors",
    ):
        (tmp_path / name).write_bytes(b"half of it")
    (tmp_path / "notes.txt").write_text("not of an index")
    saved = index_of(FEW)
    saved.save(tmp_path)
    vectors, *more = tmp_path.glob("*vectors*")
    assert not more and results(Index.load(tmp_path, Words())) == results(saved)
    assert {f.name for f in tmp_path.iterdir()} == {vectors.name, "index.json", "notes.txt"}


# ---- damaged folders


def lose_vectors(folder):
    next(folder.glob("vectors-*")).unlink()


def cut_vectors(folder):
    path = next(folder.glob("vectors-*"))
    path.write_bytes(path.read_bytes()[:-9])


def cut_json(folder):
    path = folder / "index.json"
    path.write_bytes(path.read_bytes()[:-50])


def name_no_store(folder):
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"flat"', '"round"'))


@pytest.mark.parametrize("damage", [lose_vectors, cut_vectors, cut_json, name_no_store])
def test_a_damaged_index_is_built_again_where_the_chunks_are_at_hand(tmp_path, damage):
    index, _ = Index.kept(tmp_path, Words(), FEW)
    damage(tmp_path)
    with pytest.raises(NoIndex):
        Index.load(tmp_path, Words())
    said, embedder = [], Counting()
    again, changes = Index.kept(tmp_path, embedder, FEW, say=said.append)
    assert len(said) == 1 and str(tmp_path) in said[0] and said[0].endswith("All of it is embedded anew")
    assert changes["added"] == index.sources and embedder.embedded
    assert results(again) == results(index) == results(Index.load(tmp_path, Words()))
    Index.kept(tmp_path, Words(), FEW, say=said.append)
    assert len(said) == 1


def test_no_files_are_kept_as_an_index_too(tmp_path):
    said = []
    for _ in range(2):
        index, changes = Index.kept(tmp_path, Words(), [], say=said.append)
        assert len(index) == 0 and not any(changes.values()) and not said
    assert Index.kept(tmp_path, Words(), FEW)[1]["added"]


# ---- embedders that fail


class Failing(Words):
    """Fails as `fail` does, once it is set."""

    fail = None

    def embed(self, texts):
        vectors = super().embed(texts)
        return self.fail(vectors) if self.fail else vectors


def out_of_memory(vectors):
    raise RuntimeError("out of memory")


def not_numbers(vectors):
    return np.full_like(vectors, np.nan)


def too_few(vectors):
    return vectors[1:]


@pytest.mark.parametrize("fail", [out_of_memory, not_numbers, too_few])
@pytest.mark.parametrize("change", [Index.update, Index.sync])
def test_an_embedder_that_fails_takes_no_document_with_it(fail, change):
    index = Index(Failing())
    index.add(FEW)
    before, sources = results(index), index.sources
    new = [replace(chunk, text=chunk.text + " New.") for chunk in FEW if chunk.source != "seals.md"]
    index.embedder.fail = fail
    with pytest.raises((RuntimeError, ValueError)):
        change(index, [*new, Chunk("boats.md", "Boats", (), "The green boat.")])
    index.embedder.fail = None
    assert results(index) == before and index.sources == sources
    change(index, new)
    fresh = index_of(new if change is Index.sync else [*(c for c in FEW if c.source == "seals.md"), *new])
    assert results(index) == results(fresh)
