from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<end>"])
tokenizer.train(["mine.txt"], trainer)
tokenizer.save("theirs.json")
tokenizer = Tokenizer.from_file("theirs.json")
ids = tokenizer.encode("naïve ☕<end>").ids
print(ids, tokenizer.decode(ids, skip_special_tokens=False))
