"""Week 11. Finding passages and answering from them.

    documents = load_documents("notes").documents
    index = Index(MiniLM())
    index.add(chunk_documents(documents))
    index.search("Who opens the valves?", where={"team": "pumps"})
    RAG(index, Quoter(load_model("smollm2"))).ask("Who opens the valves?").sources

The guide is docs/guides/rag.md.
"""

from shared.retrieval.documents import (
    Chunk,
    Document,
    Section,
    chunk_documents,
    load_documents,
    read_document,
)
from shared.retrieval.embedders import Embedder, HiddenStates, MiniLM, SentenceEmbedder
from shared.retrieval.filters import Where
from shared.retrieval.index import Hit, Index, NoIndex
from shared.retrieval.quoting import Quoter
from shared.retrieval.rag import RAG, Reader, Reply
from shared.retrieval.stores import FaissStore, QdrantStore, make_store

__all__ = [
    "RAG",
    "Chunk",
    "Document",
    "Embedder",
    "FaissStore",
    "HiddenStates",
    "Hit",
    "Index",
    "MiniLM",
    "NoIndex",
    "QdrantStore",
    "Quoter",
    "Reader",
    "Reply",
    "Section",
    "SentenceEmbedder",
    "Where",
    "chunk_documents",
    "load_documents",
    "make_store",
    "read_document",
]
