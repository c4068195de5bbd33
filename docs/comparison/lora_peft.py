from datasets import load_dataset
from peft import LoraConfig
from tiny import BASE
from trl import SFTConfig, SFTTrainer

data = load_dataset("json", data_files="mine.jsonl", split="train").train_test_split(0.1)
arguments = SFTConfig(
    "theirs",
    max_steps=4,
    learning_rate=2e-4,
    eval_strategy="steps",
    eval_steps=2,
    save_steps=2,
    load_best_model_at_end=True,
    report_to="none",
    use_cpu=True,
    bf16=False,
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
train, val = data["train"], data["test"]
trainer = SFTTrainer(BASE, arguments, train_dataset=train, eval_dataset=val, peft_config=lora)
trainer.train()
trainer.save_model("theirs")
print(trainer.state.best_metric)
# Served by another program: vllm serve BASE --enable-lora --lora-modules mine=theirs (not run here)
