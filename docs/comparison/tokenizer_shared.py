from pathlib import Path

from shared.tokenizers import BPETokenizer

text = Path("mine.txt").read_text(encoding="utf-8")
tokenizer = BPETokenizer.train(text, vocab_size=290, special_tokens=("<end>",))
tokenizer.save("ours.json")
tokenizer = BPETokenizer.load("ours.json")
ids = tokenizer.encode("naïve ☕<end>", allowed_special="all")
print(ids, tokenizer.decode(ids))
