"""Makes tests/expectations/smollm2_greedy.json: what transformers' SmolLM2 answers, greedily and in fp32, to
twenty conversations.

The tokenizer is Hugging Face's `tokenizers` and the template is rendered by jinja2, both from the GGUF file,
so that nothing of ours has a part in it. From the repository's root:

    python -m tests.expectations.make_smollm2
"""

import json
import time
from functools import cache
from pathlib import Path

import jinja2
import tokenizers
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from shared.assets import fetch

FILE = Path(__file__).parent / "smollm2_greedy.json"
NEW_TOKENS = 24
LEAST_MARGIN = 0.01
"""Between the best and the second logit: rounding is 1,000 times smaller, on any machine."""

CONTROL = 3
"""GGUF's kind of a special token."""

QUESTIONS = [
    "Why is the sky blue?",
    "What is the capital of France?",
    "Write a haiku about autumn.",
    "Give me three tips for learning to play the guitar.",
    "Write a Python function that adds two numbers.",
    "Translate 'good morning' into Spanish.",
    "What is 12 + 30?",
    "Explain photosynthesis to a child.",
    "Who wrote Romeo and Juliet?",
    "List the first 10 prime numbers.",
    'What does the word "serendipity" mean?',
    "hello",
    "Summarize: The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's asleep.",
    "In 1969, what happened on July 20?",
    "Comment dit-on « merci » en anglais ? 😀",
    "  Two spaces before,\n\n\tand a tab   1234567 times.",
    "What is the boiling point of water?",
]
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS] + [
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "What colour is grass?"},
    ],
    [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        {"role": "user", "content": "What is my name?"},
    ],
    [
        {"role": "system", "content": "Answer from this passage: The mill in Tarnholt was built in 1884."},
        {"role": "user", "content": "When was the mill built?"},
    ],
]


@cache
def metadata() -> dict:
    """The GGUF file's metadata."""
    return {name: field.contents() for name, field in GGUFReader(fetch("smollm2")).fields.items()}


@cache
def their_tokenizer() -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer.json, built again: byte-level BPE with digits one by one."""
    tokens, kinds, merges = (
        metadata()[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([token for token, kind in zip(tokens, kinds) if kind == CONTROL])
    return made


def render(messages: list[dict[str, str]]) -> str:
    """The conversation by the file's own template, up to the assistant's answer."""
    return jinja2.Template(metadata()["tokenizer.chat_template"]).render(
        messages=messages, add_generation_prompt=True
    )


def main() -> None:
    path, start = fetch("smollm2"), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    print(f"transformers loaded the file in {time.perf_counter() - start:.1f} s")
    end, rows = metadata()["tokenizer.ggml.eos_token_id"], []
    for messages in CONVERSATIONS:
        prompt = their_tokenizer().encode(render(messages)).ids
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, len(prompt) :].tolist()
        best = torch.stack(out.logits)[:, 0].topk(2).values
        margin = (best[:, 0] - best[:, 1]).min().item()
        print(f"{margin:.4f} {their_tokenizer().decode(new)!r}")
        rows.append({"messages": messages, "prompt": prompt, "new": new, "margin": round(margin, 4)})
    close = [row["messages"][-1]["content"] for row in rows if row["margin"] < LEAST_MARGIN]
    if close:
        raise SystemExit(f"rounding could decide here, take another question: {close}")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
