"""Chat templates of public models, as TRL has them, each with a small tokenizer in our form and theirs."""

import re
from importlib.resources import files
from pathlib import Path

import transformers

from shared.models.tokenizer_files import tokenizer_from_json
from shared.models.tokenizer_writing import hf_tokenizer_config
from shared.runtime import write_json
from shared.tokenizers import BPETokenizer
from tests.helpers import synthetic_text

TEMPLATES = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
}
"""Public templates, each with the token that ends an answer."""
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}


def special_tokens_in(template: str) -> list[str]:
    found = re.findall(r"<\|[\w\- ]+?\|>|<｜[^｜]+｜>|</?[a-z_]+>", template)
    return sorted({"<s>", "</s>", *found})


def tokenizers_with(name: str, folder: Path):
    """A tokenizer with this template in ours and in transformers, from the same files."""
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    special = sorted({*special_tokens_in(template), TEMPLATES[name]})
    trained = BPETokenizer.train(synthetic_text(300), 290 + len(special), special_tokens=special)
    values = trained.to_hf_json()
    config = hf_tokenizer_config(trained, 512) | {
        "bos_token": "<s>",
        "eos_token": TEMPLATES[name],
        "chat_template": template,
    }
    write_json(folder / "tokenizer.json", values)
    write_json(folder / "tokenizer_config.json", config)
    ours, left_out = tokenizer_from_json(values, config)
    assert left_out == []
    return ours, transformers.AutoTokenizer.from_pretrained(folder)
