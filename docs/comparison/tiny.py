"""What the scripts of this folder find in the folder that they run in: a text, conversations, documents, and
tiny models without training in place of real ones. None of it is counted.
"""

import json
from pathlib import Path

import torch

from shared.export import save_hf_folder
from shared.models.gpt import GPT, GPTConfig
from shared.retrieval.embedders import HiddenStates
from shared.tokenizers import BPETokenizer

BASE = "base"
"""In place of "HuggingFaceTB/SmolLM2-135M-Instruct", in Hugging Face's files."""
SENTENCES = "sentences"
"""In place of "sentence-transformers/all-MiniLM-L6-v2"."""


def embedder(model: GPT) -> HiddenStates:
    """In place of `MiniLM()`."""
    assert model.tokenizer is not None
    return HiddenStates(model, model.tokenizer, BASE)


def prepare() -> None:
    """Writes it all into the present folder."""
    text = "The last ferry leaves at nine, and the first one at six.\n" * 200
    Path("mine.txt").write_text(text, encoding="utf-8")
    talks = [{"prompt": f"What is {n} times two?", "completion": f"It is {2 * n}."} for n in range(1, 21)]
    Path("mine.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    Path("documents").mkdir()
    for name, words in (
        ("ferry", "The last ferry leaves at nine."),
        ("inn", "Breakfast is served from seven."),
    ):
        Path("documents", f"{name}.md").write_text(f"# {name}\n\n{words}\n", encoding="utf-8")
    torch.manual_seed(0)
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = BPETokenizer.train(text, 285, special_tokens=special)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        block_size=512,
        n_layer=2,
        n_head=2,
        n_embd=32,
        norm="rmsnorm",
        position="rope",
        mlp="swiglu",
        bias=False,
    )
    save_hf_folder(GPT(config), BASE, tokenizer)
    _sentence_model()


def _sentence_model() -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the last ferry leaves at nine breakfast is served when".split()
    folder = Path(SENTENCES)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
