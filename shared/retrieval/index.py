"""Week 11. An index of chunks, searched by words (BM25), by meaning (embeddings), or by both.

    index = Index(MiniLM())  # or another embedder, and a store such as FaissStore(384, "hnsw")
    index.add(chunk_documents(documents, tokenizer))
    for hit in index.search("When does the last ferry leave?", k=3):
        print(hit.score, hit.chunk.cite)
    index.search("ferry", by="bm25", where={"team": "harbour", "year": {">=": 2020}}, least_score=1.0)
    index.save("indexes/handbook")
    index = Index.load("indexes/handbook", MiniLM())
    # All of it: made or loaded, brought up to date, saved.
    index, changes = Index.kept("indexes/handbook", MiniLM(), chunks)

Sources: Cormack, Clarke & Büttcher (reciprocal rank fusion, 2009); Dai & Callan (a passage is as good as its
best part, 2019).
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.locks import folder_lock
from shared.retrieval.bm25 import BM25, terms
from shared.retrieval.documents import Chunk
from shared.retrieval.embedders import Embedder
from shared.retrieval.evidence import Window
from shared.retrieval.filters import Where, fields_test
from shared.retrieval.stores import FaissStore, VectorStore, open_store
from shared.runtime import write_atomically, write_json

T = TypeVar("T", bound=Hashable)


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[T]], k: float = 60, weights: Sequence[float] | None = None
) -> list[tuple[T, float]]:
    """One ranking from several: each gives what stands at its place p the score weight / (k + p); best first,
    equals as first met.

    >>> [name for name, score in reciprocal_rank_fusion([["a", "b", "c"], ["c", "b"]])]
    ['c', 'b', 'a']
    """
    weights = [1.0] * len(rankings) if weights is None else weights
    if len(weights) != len(rankings) or k < 0:
        raise ValueError(
            f"fusion needs a weight for each of the {len(rankings)} rankings, not {len(weights)}, and a k"
            f" that is not negative, not {k}"
        )
    scores: dict[T, float] = {}
    for ranking, weight in zip(rankings, weights):
        for place, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + weight / (k + place)
    return sorted(scores.items(), key=lambda pair: -pair[1])


WAYS = ("dense", "bm25", "hybrid")
FUSED = 50  # how many of each ranking are fused, at least
WINDOWS = 1 << 16  # a vector's id is its chunk's number times this, plus the window's
MARKS = ".,;:!?\"'“”‘’()[]"  # around a word
LOCK_SECONDS = 60  # how long a writer waits for another
FORMAT = 2  # of index.json; 1, without metadata, is read too


class NoIndex(ValueError):
    """A folder has no index, or one that is damaged: it has to be built, or built again."""


class Hit(NamedTuple):
    """A chunk that was found."""

    chunk: Chunk
    score: float
    """To be compared only within one way to search. "dense": the cosine of the nearest window, from -1 to 1
    (or the inner product, where the store's measure is that). "bm25": the sum over the question's terms, from
    0 up. "hybrid": the sum of the fusion, at most 2/61, which says how high up it stands in both rankings.
    """


class Index:
    """Chunks, searched by words and by meaning. `store` keeps the vectors of their windows (default: FAISS,
    flat, with the embedder's measure).
    """

    def __init__(self, embedder: Embedder, store: VectorStore | None = None):
        self.embedder = embedder
        # An empty store is false.
        self.store = FaissStore(embedder.dim, measure=embedder.measure) if store is None else store
        if self.store.dim != embedder.dim:
            raise ValueError(
                f"the store takes vectors of {self.store.dim} numbers, but {embedder.name} makes"
                f" {embedder.dim}"
            )
        if self.store.measure != embedder.measure:
            raise ValueError(
                f"the store compares by {self.store.measure}, but {embedder.name} by {embedder.measure}: make"
                f" it with measure={embedder.measure!r}"
            )
        self._chunks: dict[int, Chunk] = {}
        self._next = 0
        self._bm25 = BM25()

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def sources(self) -> list[str]:
        """The files whose chunks are in the index."""
        return list(dict.fromkeys(chunk.source for chunk in self._chunks.values()))

    @property
    def fields(self) -> list[str]:
        """What a search can be narrowed by: the names of all fields that a chunk has, in order."""
        return sorted(set(chain.from_iterable(chunk.fields for chunk in self._chunks.values())))

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Raises ValueError for chunks of a file that is in the index already."""
        chunks = list(chunks)
        twice = {chunk.source for chunk in chunks} & set(self.sources)
        if twice:
            raise ValueError(f"{min(twice)} is in the index already: use update")
        self._replace(set(), chunks)

    def _replace(self, gone: set[str], chunks: Sequence[Chunk]) -> None:
        """Puts chunks in the place of those of the files in `gone`.

        The old ones are taken out last: where the embedder or the store fails, the index is as it was.
        """
        old = [number for number, chunk in self._chunks.items() if chunk.source in gone]
        texts = [chunk.window_texts() for chunk in chunks]
        vectors = self.embedder.embed([text for windows in texts for text in windows])
        numbers = range(self._next, self._next + len(chunks))
        self.store.add(
            [number * WINDOWS + i for number, windows in zip(numbers, texts) for i in range(len(windows))],
            vectors,
        )
        self._keep(dict(zip(numbers, chunks)))
        self._take_out(old)

    def _take_out(self, numbers: Sequence[int]) -> None:
        self.store.delete(self._window_ids(numbers))
        self._bm25.delete(numbers)
        for number in numbers:
            del self._chunks[number]

    def _keep(self, chunks: dict[int, Chunk]) -> None:
        self._chunks |= chunks
        self._bm25.add(chunks, (chunk.passage for chunk in chunks.values()))
        self._next = max(self._chunks, default=-1) + 1

    def delete(self, sources: Iterable[str]) -> None:
        """Takes files out. Raises ValueError for one that is not in the index."""
        gone = {sources} if isinstance(sources, str) else set(sources)
        missing = gone - set(self.sources)
        if missing:
            raise ValueError(f"{min(missing)} is not in the index")
        self._take_out([number for number, chunk in self._chunks.items() if chunk.source in gone])

    def update(self, chunks: Iterable[Chunk]) -> None:
        """The chunks of some files, in place of those that these files had.

        Where the embedder or the store raises an error, the index stays as it was.
        """
        chunks = list(chunks)
        self._replace({chunk.source for chunk in chunks}, chunks)

    def changes(self, chunks: Iterable[Chunk]) -> dict[str, list[str]]:
        """What `sync` would do with these chunks: the files, by "added", "changed", "gone"."""
        wanted = _by_source(chunks)
        held = _by_source(self._chunks.values())
        return {
            "added": [source for source in wanted if source not in held],
            "changed": [source for source in wanted if source in held and wanted[source] != held[source]],
            "gone": [source for source in held if source not in wanted],
        }

    def sync(self, chunks: Iterable[Chunk]) -> dict[str, list[str]]:
        """Makes the index hold these chunks and no others; only what is new or changed is embedded. The
        files, by "added", "changed", "gone". Where the embedder or the store raises an error, the index stays
        as it was.
        """
        wanted = _by_source(chunks)
        changes = self.changes(chain.from_iterable(wanted.values()))
        new = [chunk for source in (*changes["changed"], *changes["added"]) for chunk in wanted[source]]
        self._replace({*changes["changed"], *changes["gone"]}, new)
        return changes

    def search(
        self,
        question: str,
        k: int = 5,
        by: Literal["dense", "bm25", "hybrid"] = "dense",
        *,
        where: Where | None = None,
        least_score: float | None = None,
    ) -> list[Hit]:
        """The k chunks that fit the question best, best first; fewer where there are no more. A chunk is as
        near as its nearest window.

        where: only chunks whose fields (what their document says of itself, `source` and `title`) fit these
        conditions, see `shared.retrieval.filters`: {"team": "pumps", "year": {">=": 2020}}. They are chosen
        first and then ranked, all of them in every kind of store: the k best of them are found. What a word
        counts for in BM25 does not change; hybrid fuses the two rankings of what was chosen. least_score:
        leaves out hits with a lower `Hit.score`, which is another thing in each way to search.

        Raises ValueError for an empty question, and for a field that no document has.
        """
        if by not in WAYS:
            raise ValueError(f"there is no search by {by!r}; there are: {', '.join(WAYS)}")
        _check_question(question, k)
        among = self._fitting(where)
        if by == "hybrid":
            depth = max(k, FUSED)
            rankings = [
                [n for n, _ in ranking]
                for ranking in (
                    self._dense(question, depth, among),
                    self._bm25.search(question, depth, among),
                )
            ]
            ranked = reciprocal_rank_fusion(rankings)[:k]
        elif by == "dense":
            ranked = self._dense(question, k, among)
        else:
            ranked = self._bm25.search(question, k, among)
        return [
            Hit(self._chunks[number], score)
            for number, score in ranked
            if least_score is None or score >= least_score
        ]

    def check_where(self, where: Where | None) -> None:
        """Raises ValueError for conditions of another form, and on a field that no chunk here has."""
        if where is None or callable(where):
            return
        fields_test(where)
        known = self.fields
        unknown = [name for name in where if known and name not in known]
        if unknown:
            raise ValueError(f"no document has the field {unknown[0]!r}; there are: {', '.join(known)}")

    def _fitting(self, where: Where | None) -> set[int] | None:
        """The numbers of the chunks that a search is narrowed to; None for all. Raises as `check_where`."""
        if where is None:
            return None
        self.check_where(where)
        fits = fields_test(where)
        return {number for number, chunk in self._chunks.items() if fits(chunk.fields)}

    def _window_ids(self, numbers: Iterable[int]) -> list[int]:
        """The ids that the windows of these chunks have in the store."""
        return [n * WINDOWS + i for n in numbers for i in range(len(self._chunks[n].windows) or 1)]

    def _dense(self, question: str, k: int, among: set[int] | None) -> list[tuple[int, float]]:
        vector, wanted = self.embedder.embed_questions([question]), 4 * k
        ids_among = None if among is None else self._window_ids(among)
        most = len(self.store) if ids_among is None else len(ids_among)
        while True:  # several of the nearest windows may be of one chunk
            scores, ids = (row[0].tolist() for row in self.store.search(vector, wanted, among=ids_among))
            best: dict[int, float] = {}
            for score, i in zip(scores, ids):
                if i >= 0:
                    best.setdefault(i // WINDOWS, score)
            if len(best) >= k or wanted >= most:
                return list(best.items())[:k]
            wanted *= 2

    def nearest_windows(self, question: str, k: int, *, where: Where | None = None) -> list[Window]:
        """The k sentences (windows of chunks) that are nearest to the question, best first, wherever they
        stand; fewer where there are no more. where: as in `search`.
        """
        _check_question(question, k)
        among = self._fitting(where)
        ids_among = None if among is None else self._window_ids(among)
        vector = self.embedder.embed_questions([question])
        scores, ids = (row[0].tolist() for row in self.store.search(vector, k, among=ids_among))
        found = []
        for score, i in zip(scores, ids):
            if i >= 0:
                chunk = self._chunks[i // WINDOWS]
                start, end = chunk.windows[i % WINDOWS] if chunk.windows else (0, len(chunk.text))
                found.append(Window(chunk, start, end, score))
        return found

    def unknown_names(self, question: str) -> list[str]:
        """The names in a question that stand in no document. A name is a word with a capital letter, the
        question's first word aside.
        """
        names = []
        for word in question.split()[1:]:
            name = word.strip(MARKS).removesuffix("'s").removesuffix("’s")
            if name[:1].isupper() and not all(self._bm25.knows(term) for term in terms(name)):
                names.append(name)
        return names

    # ---- files

    def save(self, folder: str | Path) -> Path:
        """Writes index.json and the vectors, and returns the folder. A kill at any moment leaves the old
        index or the new one.

        Of several who write at once each waits for the one before; ValueError where that takes over
        `LOCK_SECONDS`.
        """
        with folder_lock(Path(folder), "saving an index", wait=LOCK_SECONDS):
            return self._write(Path(folder))

    def _write(self, folder: Path) -> Path:
        """What `save` does, by the one who holds the folder's lock."""
        data = save({name: np.ascontiguousarray(array) for name, array in self.store.arrays().items()})
        total = hashlib.sha256(data).hexdigest()
        name = f"vectors-{total[:16]}.safetensors"
        write_atomically(folder / name, data)
        write_json(
            folder / "index.json",
            {
                "format": FORMAT,
                "embedder": self.embedder.name,
                "dim": self.embedder.dim,
                "store": self.store.kind,
                "settings": self.store.settings,
                "vectors": name,
                "sha256": total,
                "chunks": {str(number): asdict(chunk) for number, chunk in self._chunks.items()},
            },
        )
        # No index names these now, and whoever was writing the temporary ones has been killed.
        for pattern in ("vectors-*.safetensors", ".vectors-*.tmp", ".index.json.*.tmp"):
            for other in folder.glob(pattern):
                if other.name != name:
                    other.unlink()
        return folder

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder) -> "Index":
        """The index that `save` wrote. Raises NoIndex, a ValueError, for a folder without one and for one
        that is damaged, ValueError for one of another embedder and for one that a later version wrote.
        """
        values, data = _read(Path(folder))
        written_as = values.get("format", 1)
        if isinstance(written_as, int) and written_as > FORMAT:
            raise ValueError(
                f"the index in {folder} has the format {written_as}, which a later version of this package"
                f" writes; this one reads up to {FORMAT}: update it, or choose another folder"
            )
        try:
            was = values["embedder"], values["dim"]
            chunks = {int(number): _chunk(chunk) for number, chunk in values["chunks"].items()}
            right_checksum = hashlib.sha256(data).hexdigest() == values["sha256"]
            store = values["store"]
            settings = values["settings"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(Path(folder), error) from None
        if was != (embedder.name, embedder.dim):
            raise ValueError(
                f"the index in {folder} was made with the embedder {was[0]} ({was[1]} numbers), and cannot be"
                f" searched with {embedder.name} ({embedder.dim} numbers): use {was[0]}, or build the index"
                " again"
            )
        try:
            if not right_checksum:
                raise ValueError("another checksum than index.json says")
            index = cls(embedder, open_store(store, embedder.dim, settings, load(data)))
        except (SafetensorError, ValueError) as error:
            raise NoIndex(
                f"the vectors of {folder} are cut or damaged ({error}): build the index again"
            ) from None
        index._keep(chunks)
        return index

    @classmethod
    def kept(
        cls,
        folder: str | Path,
        embedder: Embedder,
        chunks: Iterable[Chunk],
        make: Callable[[], VectorStore] | None = None,
        say: Callable[[str], None] = print,
    ) -> tuple["Index", dict[str, list[str]]]:
        """The index of these chunks, kept in `folder`: made there with the store of `make` (default: FAISS,
        flat) or brought up to date. With what `sync` changed.

        A damaged index is built again, and `say` told so. Of several who start at once one builds, and the
        others wait for it. Raises ValueError for an index of another embedder or one that is kept in another
        kind of store, and where another process is at work on it for over `LOCK_SECONDS`.
        """
        folder, chunks = Path(folder), list(chunks)
        store = make() if make else None
        with suppress(NoIndex):
            index = cls._of_store(folder, embedder, store)
            changes = index.changes(chunks)
            if not any(changes.values()):
                return index, changes  # nothing is written: the folder may be read-only
        with folder_lock(folder, "bringing an index up to date", wait=LOCK_SECONDS, say=say):
            try:
                index = cls._of_store(folder, embedder, store)  # another may just have written it
            except NoIndex as error:
                if (folder / "index.json").exists():
                    say(f"{error}. All of it is embedded anew")
                index = cls(embedder, store)
            changes = index.sync(chunks)
            index._write(folder)
        return index, changes

    @classmethod
    def _of_store(cls, folder: Path, embedder: Embedder, store: VectorStore | None) -> "Index":
        """As `load`; ValueError for an index that is kept in another kind of store than `store`."""
        index = cls.load(folder, embedder)
        if store is not None and index.store.kind != store.kind:
            raise ValueError(
                f"the index in {folder} is kept in {index.store.kind}, not {store.kind}: choose that store,"
                " or another folder"
            )
        return index


def _check_question(question: str, k: int) -> None:
    if not question.strip() or k < 1:
        raise ValueError(f"a search needs a question and k of at least 1, not {question!r} and k={k}")


def _read(folder: Path) -> tuple[dict, bytes]:
    """What index.json says, and the bytes of the vectors that it names. Raises NoIndex where that fails."""
    path = folder / "index.json"
    named = None
    try:
        while True:
            values = json.loads(path.read_text(encoding="utf-8"))
            try:
                return values, (folder / Path(values["vectors"]).name).read_bytes()
            except FileNotFoundError:
                if values["vectors"] == named:
                    raise
                named = values["vectors"]  # a writer may have put others in their place: read again
    except FileNotFoundError as error:
        raise NoIndex(
            f"{folder} holds no whole index ({Path(error.filename).name} is missing): build it first"
        ) from None
    except OSError as error:
        raise ValueError(f"the index in {folder} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> NoIndex:
    return NoIndex(f"{folder / 'index.json'} is cut or damaged ({error!r}): build the index again")


def _by_source(chunks: Iterable[Chunk]) -> dict[str, list[Chunk]]:
    found: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.source, []).append(chunk)
    return found


def _chunk(values: dict) -> Chunk:
    return Chunk(
        **values | {"headings": tuple(values["headings"]), "windows": tuple(map(tuple, values["windows"]))}
    )
