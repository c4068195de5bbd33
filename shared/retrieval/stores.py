"""Week 11. Where vectors are kept and their nearest are found: FAISS in four kinds, and Qdrant, behind one
interface.

    store = FaissStore(384, "hnsw")
    store.add([7, 8], vectors)                   # ids are the caller's
    scores, ids = store.search(questions, k=10)  # by cosine, best first
    scores, ids = store.search(questions, k=10, among=[7])
    store.update([7], other); store.delete([8])

All kinds compute inner products. With the measure "cosine" the store brings vectors to length 1 first, those
that it keeps and those that ask, so that the inner product is the cosine; with "dot" it takes them as they
are, for embedders that were trained so. Sources: Jégou et al. (product quantization and IVF,
2011); Malkov & Yashunin (HNSW, 2018); Douze et al. (FAISS, 2024).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.checks import Checks
from shared.extras import needs

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]
FAISS_KINDS = ("flat", "ivf", "hnsw", "pq")
STORES = (*FAISS_KINDS, "qdrant")
Measure = Literal["cosine", "dot"]
MEASURES = ("cosine", "dot")
BLOCK = 1 << 16
"""So many vectors are unpacked at a time."""


def measured(vectors: Vectors, measure: Measure) -> Vectors:
    """Vectors, float32 [n, dim], whose inner products are their `measure`. One of zeros is near to none: its
    cosine with all is 0.
    """
    if measure == "dot":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return (vectors / lengths).astype(np.float32, copy=False)


def _faiss() -> Any:
    # Any: the stubs of FAISS know neither its kinds' parts nor the Python methods that take arrays.
    with needs("rag"):
        import faiss
    return faiss


class VectorStore(ABC):
    """Vectors of `dim` numbers by id (a whole number from 0 up)."""

    kind: str
    """One of `STORES`."""
    dim: int
    measure: Measure
    """What nearness is: "cosine" or "dot", the inner product."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _holds(self, ids: Ids) -> NDArray[np.bool_]:
        """Which of `ids` are there."""

    @abstractmethod
    def _add(self, ids: Ids, vectors: Vectors) -> None: ...

    @abstractmethod
    def _delete(self, ids: Ids) -> None: ...

    @abstractmethod
    def _search(self, vectors: Vectors, k: int, among: Ids | None) -> tuple[Vectors, Ids]:
        """The k nearest; `among` are ids that are there, at least k of them, or None for all."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """All that `open_store` needs besides kind, dim and settings."""

    @abstractmethod
    def _restore(self, arrays: dict[str, np.ndarray]) -> None: ...

    @property
    def settings(self) -> dict[str, Any]:
        """What the store was made with, for JSON."""
        return {"measure": self.measure}

    def num_bytes(self) -> int:
        """Of what `arrays` holds, which is about what it takes in memory."""
        return sum(array.nbytes for array in self.arrays().values())

    def add(self, ids: Sequence[int], vectors: Vectors) -> None:
        """Adds vectors, float32 [len(ids), dim].

        Raises ValueError for ids that are there already, for another shape, for NaN and infinity.
        """
        new, vectors = self._checked(ids, vectors)
        there = new[self._holds(new)]
        if len(there):
            raise ValueError(f"id {there[0]} is in the store already ({len(there)} such): use update")
        if len(new):
            self._add(new, vectors)

    def update(self, ids: Sequence[int], vectors: Vectors) -> None:
        """As `add`, in place of the vectors that these ids had; ids that are new are added."""
        known, vectors = self._checked(ids, vectors)
        self._delete(known[self._holds(known)])
        if len(known):
            self._add(known, vectors)

    def delete(self, ids: Sequence[int]) -> None:
        """Raises ValueError, deleting nothing, for an id that is not there."""
        known = np.asarray(ids, np.int64).reshape(-1)
        missing = known[~self._holds(known)]
        if len(missing):
            raise ValueError(f"id {missing[0]} is not in the store ({len(missing)} such)")
        self._delete(np.unique(known))

    def search(
        self, vectors: Vectors, k: int, *, among: Sequence[int] | Ids | None = None
    ) -> tuple[Vectors, Ids]:
        """The k nearest to each row of float32 [n, dim], best first: scores and ids, both [n, k].

        among: only these ids are looked at, and all of them are, in every kind; None: all ids, as the kind
        does it. Where there are fewer than k, the rest is -inf and -1.
        """
        vectors = self._matrix(vectors)
        if k < 1:
            raise ValueError(f"k={k}: ask for at least 1")
        held: Ids | None = None
        if among is not None:
            held = np.unique(np.asarray(among, np.int64).reshape(-1))
            held = held[self._holds(held)]
        filled = min(k, len(self) if held is None else len(held))
        scores = np.full((len(vectors), k), -np.inf, np.float32)
        ids = np.full((len(vectors), k), -1, np.int64)
        if filled and len(vectors):
            scores[:, :filled], ids[:, :filled] = self._search(vectors, filled, held)
            scores[ids < 0] = -np.inf
        return scores, ids

    def _matrix(self, vectors: Vectors) -> Vectors:
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise ValueError(
                f"vectors of shape {list(vectors.shape)} do not fit: this store takes [n, {self.dim}]"
            )
        if not np.isfinite(vectors).all():
            raise ValueError(
                "a vector has NaN or infinity in it: its embedder is damaged, or its text is empty"
            )
        return measured(vectors, self.measure)

    def _checked(self, ids: Sequence[int] | Ids, vectors: Vectors) -> tuple[Ids, Vectors]:
        vectors = self._matrix(vectors)
        array = np.asarray(ids, np.int64).reshape(-1)
        if len(array) != len(vectors):
            raise ValueError(f"{len(array)} ids and {len(vectors)} vectors do not go together")
        if len(np.unique(array)) < len(array) or (array < 0).any():
            raise ValueError("ids must be different from each other and not negative")
        return array, vectors


def make_store(kind: str, dim: int, **settings: Any) -> VectorStore:
    """An empty store of a kind of `STORES`.

    Raises ValueError for another kind, TypeError for settings that it does not have.
    """
    if kind not in STORES:
        raise ValueError(f"no store is called {kind!r}; there are: {', '.join(STORES)}")
    if kind == "qdrant":
        return QdrantStore(dim, **settings)
    return FaissStore(dim, kind, **settings)


def open_store(kind: str, dim: int, settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> VectorStore:
    """The store with this `kind`, `dim`, `settings` and `arrays`. Raises ValueError for damaged ones."""
    try:
        store = make_store(kind, dim, **settings)
        store._restore(arrays)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"the saved store is damaged ({str(error).splitlines()[-1]}): build the index again"
        ) from None
    return store


class FaissStore(VectorStore):
    """FAISS, by inner product: with the measure "cosine" of vectors that are brought to length 1.

    | kind | what it does | effort |
    | --- | --- | --- |
    | flat | compares with every vector: exact | |
    | ivf | k-means cells, of which only the nearest `effort` are searched | nprobe, 16 |
    | hnsw | walks a graph of neighbours, keeping `effort` candidates | efSearch, 64 |
    | pq | compares with every vector, each kept in `pq_bytes` bytes instead of 4 · dim | |

    effort: may be changed at any time. cells: of ivf; None means 4 √n, but at least 39 vectors for each.
    neighbours: of hnsw, for each vector and level. pq_bytes: must divide dim; None means dim / 8. ivf and pq
    learn from the vectors of the first `add`, so give them many at once. hnsw cannot forget: what is deleted
    is kept out of results, and once half is gone the graph is built anew. A search among some ids compares
    with each of them, in every kind.
    """

    def __init__(
        self,
        dim: int,
        kind: str = "flat",
        *,
        measure: Measure = "cosine",
        effort: int | None = None,
        cells: int | None = None,
        neighbours: int = 32,
        pq_bytes: int | None = None,
    ):
        self.dim = dim
        self.kind = kind
        self.measure = measure
        self.effort = effort
        self.cells = cells
        self.neighbours = neighbours
        self.pq_bytes = max(1, dim // 8) if pq_bytes is None else pq_bytes
        checks = Checks(self)
        checks.require(kind in FAISS_KINDS, f"no kind {kind!r}; there are: {', '.join(FAISS_KINDS)}")
        checks.one_of("measure", MEASURES)
        checks.at_least(1, "dim", "effort", "cells", "neighbours", "pq_bytes")
        if kind == "pq" and not checks.problems:
            divides = dim % self.pq_bytes == 0
            checks.require(divides, f"pq_bytes={self.pq_bytes} does not divide the vectors' {dim} numbers")
        checks.finish()
        if self.effort is None:
            self.effort = {"ivf": 16, "hnsw": 64}.get(kind, 0)
        self._faiss = _faiss()
        self._forget_all()

    def _forget_all(self) -> None:
        self._index: Any = None
        # FAISS knows each vector by a serial number that is never used again; so an id can be deleted and
        # come back, in every kind.
        self._ids: Ids = np.empty(0, np.int64)  # by serial number; -1 for one that was deleted
        self._serials: dict[int, int] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """As the constructor takes them."""
        return {
            "measure": self.measure,
            "effort": self.effort or None,
            "cells": self.cells,
            "neighbours": self.neighbours,
            "pq_bytes": self.pq_bytes,
        }

    def __len__(self) -> int:
        return len(self._serials)

    def _holds(self, ids: Ids) -> NDArray[np.bool_]:
        return np.array([i in self._serials for i in ids.tolist()], bool)

    def _trained(self, vectors: Vectors) -> Any:
        """An empty index, which has learned from `vectors` what its kind needs to."""
        if self.kind == "ivf":
            return self._trained_ivf(vectors)  # keeps ids itself
        if self.kind == "pq":
            return self._faiss.IndexIDMap2(self._trained_pq(vectors))
        if self.kind == "hnsw":
            index = self._faiss.IndexHNSWFlat(self.dim, self.neighbours, self._faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = 200
            return self._faiss.IndexIDMap2(index)
        return self._faiss.IndexIDMap2(self._faiss.IndexFlatIP(self.dim))

    def _trained_ivf(self, vectors: Vectors) -> Any:
        cells = self.cells or max(1, min(round(4 * len(vectors) ** 0.5), len(vectors) // 39))
        if cells > len(vectors):
            raise ValueError(
                f"{cells} cells need at least as many vectors in the first add, not {len(vectors)}:"
                " choose fewer cells"
            )
        quantizer = self._faiss.IndexFlatIP(self.dim)
        index = self._faiss.IndexIVFFlat(quantizer, self.dim, cells, self._faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # FAISS warns on stderr below 39
        index.train(vectors)
        return index

    def _trained_pq(self, vectors: Vectors) -> Any:
        if len(vectors) < 256:
            raise ValueError(
                f"pq learns 256 codes from the vectors of the first add, and {len(vectors)} are too few:"
                " use flat for so few"
            )
        index = self._faiss.IndexPQ(self.dim, self.pq_bytes, 8, self._faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1
        index.train(vectors)
        return index

    def _add(self, ids: Ids, vectors: Vectors) -> None:
        if self._index is None:
            self._index = self._trained(vectors)
        serials = np.arange(len(self._ids), len(self._ids) + len(ids))
        self._index.add_with_ids(vectors, serials)
        self._ids = np.concatenate([self._ids, ids])
        self._serials |= zip(ids.tolist(), serials.tolist())

    def _delete(self, ids: Ids) -> None:
        if not len(ids):
            return
        serials = np.array([self._serials.pop(i) for i in ids.tolist()], np.int64)
        self._ids[serials] = -1
        if self.kind != "hnsw":
            self._index.remove_ids(serials)
        elif 2 * len(self._serials) < len(self._ids):
            self._rebuild()

    def _rebuild(self) -> None:
        """Builds the index anew from what was not deleted."""
        left = np.flatnonzero(self._ids >= 0)
        if not len(left):
            self._forget_all()
            return
        ids = self._ids[left]
        vectors = self._index.reconstruct_batch(left)
        self._forget_all()
        self._add(ids, vectors)

    def _search(self, vectors: Vectors, k: int, among: Ids | None) -> tuple[Vectors, Ids]:
        if among is None:
            scores, serials = self._index.search(vectors, k, params=self._search_parameters(k))
        else:
            scores, serials = self._search_among(
                vectors, k, np.array([self._serials[i] for i in among.tolist()], np.int64)
            )
        return scores, np.where(serials < 0, -1, self._ids[serials])

    def _search_among(self, vectors: Vectors, k: int, serials: Ids) -> tuple[Vectors, Ids]:
        """Compares with all vectors that have these serial numbers."""
        library = self._faiss
        chosen = library.IDSelectorBatch(serials)
        if self.kind == "flat":
            return self._index.search(vectors, k, params=library.SearchParameters(sel=chosen))
        if self.kind == "ivf":
            everywhere = library.SearchParametersIVF(nprobe=self._index.nlist, sel=chosen)
            return self._index.search(vectors, k, params=everywhere)
        # pq takes no choice, and a graph would lose its way among many that are not wanted.
        found = [np.empty((len(vectors), 0), np.float32)]
        for start in range(0, len(serials), BLOCK):
            found.append(vectors @ self._index.reconstruct_batch(serials[start : start + BLOCK]).T)
        scores = np.concatenate(found, axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), serials[best]

    def _search_parameters(self, k: int) -> Any:
        library = self._faiss
        if self.kind == "ivf":
            return library.SearchParametersIVF(nprobe=self.effort)
        if self.kind != "hnsw":
            return None
        effort = max(self.effort or 0, k)
        deleted = np.flatnonzero(self._ids < 0)
        if not len(deleted):
            return library.SearchParametersHNSW(efSearch=effort)
        remaining = library.IDSelectorNot(library.IDSelectorBatch(deleted))
        return library.SearchParametersHNSW(efSearch=effort, sel=remaining)

    def arrays(self) -> dict[str, np.ndarray]:
        """The ids by serial number, and the index as FAISS serializes it."""
        arrays: dict[str, np.ndarray] = {"ids": self._ids}
        if self._index is not None:
            arrays["faiss"] = self._faiss.serialize_index(self._index)
        return arrays

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._ids = arrays["ids"].astype(np.int64)
        self._serials = {i: serial for serial, i in enumerate(self._ids.tolist()) if i >= 0}
        if "faiss" in arrays:
            self._index = self._faiss.deserialize_index(arrays["faiss"])
            held = self._index.ntotal
            expected = len(self._ids) if self.kind == "hnsw" else len(self._serials)
            if self._index.d != self.dim or held != expected:
                raise ValueError(
                    f"the saved store is damaged: {held} vectors of {self._index.d} numbers are not what its"
                    " list of ids says"
                )
        elif len(self._ids):
            raise KeyError("faiss")


class QdrantStore(VectorStore):
    """Qdrant, in this process and in memory, where it compares with every vector: exact. By inner product:
    with the measure "cosine" of vectors that are brought to length 1.

    client: a `qdrant_client.QdrantClient` of a server, whose collection `collection` is then used. Its own
    files on disk are pickles in local mode, so they are not used: `arrays` takes the vectors out.
    """

    kind = "qdrant"

    def __init__(
        self,
        dim: int,
        client: Any = None,
        collection: str = "chunks",
        *,
        measure: Measure = "cosine",
    ):
        with needs("rag"):
            from qdrant_client import QdrantClient, models

        self.dim = dim
        self.measure = measure
        checks = Checks(self)
        checks.one_of("measure", MEASURES)
        checks.at_least(1, "dim")
        checks.finish()
        self.collection = collection
        self._models = models
        self._in_memory = client is None
        self._client = client or QdrantClient(":memory:")
        if not self._client.collection_exists(collection):
            self._client.create_collection(
                collection, vectors_config=models.VectorParams(size=dim, distance=models.Distance.DOT)
            )

    def __len__(self) -> int:
        return self._client.count(self.collection).count

    def _holds(self, ids: Ids) -> NDArray[np.bool_]:
        if not len(ids):
            return np.zeros(0, bool)
        points = self._client.retrieve(self.collection, ids.tolist(), with_payload=False)
        return np.isin(ids, np.array([point.id for point in points], np.int64))

    def _add(self, ids: Ids, vectors: Vectors) -> None:
        self._client.upsert(self.collection, self._models.Batch(ids=ids.tolist(), vectors=vectors.tolist()))

    def _delete(self, ids: Ids) -> None:
        if len(ids):
            self._client.delete(self.collection, self._models.PointIdsList(points=ids.tolist()))

    def _search(self, vectors: Vectors, k: int, among: Ids | None) -> tuple[Vectors, Ids]:
        chosen = None
        if among is not None:
            chosen = self._models.Filter(must=[self._models.HasIdCondition(has_id=among.tolist())])
        exact = None
        if among is not None and not self._in_memory:
            exact = self._models.SearchParams(exact=True)
        requests = [
            self._models.QueryRequest(query=vector, limit=k, filter=chosen, params=exact)
            for vector in vectors.tolist()
        ]
        answers = self._client.query_batch_points(self.collection, requests)
        scores = np.array([[point.score for point in answer.points] for answer in answers], np.float32)
        ids = np.array([[point.id for point in answer.points] for answer in answers], np.int64)
        return scores, ids

    def arrays(self) -> dict[str, np.ndarray]:
        """Ids and vectors, taken out of Qdrant."""
        points = self._client.scroll(
            self.collection, limit=max(1, len(self)), with_vectors=True, with_payload=False
        )[0]
        vectors = np.array([p.vector for p in points], np.float32).reshape(len(points), self.dim)
        return {"ids": np.array([p.id for p in points], np.int64), "vectors": vectors}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.add(arrays["ids"].tolist(), arrays["vectors"])
