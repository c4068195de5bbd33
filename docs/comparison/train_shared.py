from pathlib import Path

from shared.data.corpus import load_corpus
from shared.models.gpt import GPT, GPTConfig
from shared.tokenizers import BPETokenizer
from shared.training import TrainConfig, Trainer

tokenizer = BPETokenizer.train(Path("mine.txt").read_text(encoding="utf-8"), vocab_size=290)
corpus = load_corpus("mine.txt", tokenizer)
model = GPT(GPTConfig(vocab_size=290, block_size=32, n_layer=2, n_head=2, n_embd=32))
config = TrainConfig(steps=60, batch_size=8, block_size=32, lr=1e-2, eval_every=30, checkpoint_every=30)
Trainer(model, corpus, config, checkpoints="ours").fit()
print(GPT.from_checkpoint("ours/best").generate("The last", max_new_tokens=30, temperature=0))
