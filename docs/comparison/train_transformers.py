from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
learner = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<end>"])
bpe.train(["mine.txt"], learner)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
text = Path("mine.txt").read_text(encoding="utf-8")
cut = int(0.9 * len(text))
parts = [tokenizer(part)["input_ids"] for part in (text[:cut], text[cut:])]
train, val = ([{"input_ids": ids[i : i + 32]} for i in range(0, len(ids) - 31, 32)] for ids in parts)
for window in train + val:
    window["labels"] = window["input_ids"]
config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_layer=2, n_head=2, n_embd=32, eos_token_id=0)
model = GPT2LMHeadModel(config)
arguments = TrainingArguments(
    "theirs",
    max_steps=60,
    per_device_train_batch_size=8,
    learning_rate=1e-2,
    eval_strategy="steps",
    eval_steps=30,
    save_steps=30,
    load_best_model_at_end=True,
    report_to="none",
    use_cpu=True,
)
Trainer(model, arguments, train_dataset=train, eval_dataset=val).train()
inputs = tokenizer("The last", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=0)[0]))
