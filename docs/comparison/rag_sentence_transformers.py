from pathlib import Path

from sentence_transformers import SentenceTransformer, util
from tiny import BASE, SENTENCES
from transformers import AutoModelForCausalLM, AutoTokenizer

paths = sorted(Path("documents").glob("*.md"))
passages = [(path.name, part) for path in paths for part in path.read_text(encoding="utf-8").split("\n\n")]
embedder = SentenceTransformer(SENTENCES)
vectors = embedder.encode([text for _, text in passages], convert_to_tensor=True)
question = "When does the last ferry leave?"
hits = util.semantic_search(embedder.encode(question, convert_to_tensor=True), vectors, top_k=3)[0]
found = [passages[hit["corpus_id"]] for hit in hits]
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForCausalLM.from_pretrained(BASE)
context = "\n\n".join(text for _, text in found)
prompt = tokenizer(f"{context}\n\nQuestion: {question}\nAnswer:", return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
print(tokenizer.decode(ids[prompt["input_ids"].shape[1] :]), [name for name, _ in found])
