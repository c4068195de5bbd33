from tiny import BASE, embedder

from shared.models.pretrained import load_model
from shared.retrieval.documents import chunk_documents, load_documents
from shared.retrieval.index import Index
from shared.retrieval.rag import RAG, Reader

model = load_model(BASE)
index = Index(embedder(model))
index.add(chunk_documents(load_documents("documents").documents, model.tokenizer))
reply = RAG(index, Reader(model)).ask("When does the last ferry leave?")
print(reply.text, reply.sources)
