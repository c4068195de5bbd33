import torch
from tiny import BASE
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(BASE)
for context, continuation in [("The last ferry", " leaves at nine"), ("The first one", " at six")]:
    before, after = tokenizer(context)["input_ids"], tokenizer(continuation)["input_ids"]
    ids = torch.tensor([before + after])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
    print(round(logprobs.gather(-1, ids[0, len(before) :, None]).sum().item(), 3))
prompts = tokenizer(["The last ferry", "The first one at", "and"], return_tensors="pt", padding=True)
ids = model.generate(**prompts, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :]))
