"""A model whose settings and tensors do not fit is refused before memory is taken for it: our checkpoints,
Hugging Face's folders and GGUF files.
"""

import json
from dataclasses import asdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared import checkpoint
from shared.models.attention import AttentionLM, AttentionLMConfig
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.models.pretrained import from_gguf, from_hf
from shared.quantization import quantize
from shared.quantization.modules import save_quantized
from tests.models.helpers import build, edit, llama, write_gguf

HUGE = 10**6
"""So many that a tensor of them would be seen, and old code fails without filling the machine."""
ENOUGH = 1 << 20
"""Bytes that the largest tensor of one of these models stays far below."""
SMALL = dict(vocab_size=19, block_size=16, n_layer=2, n_head=2, n_embd=64)
OURS = {
    "GPT-2": lambda: GPT(GPTConfig(**SMALL)),
    "modern": lambda: GPT(GPTConfig.preset("mini", **SMALL)),
    "bigrams": lambda: BigramModel(BigramConfig(19)),
    "MLP": lambda: WindowMLP(WindowMLPConfig(19)),
    "attention": lambda: AttentionLM(AttentionLMConfig(19)),
    "quantized": lambda: quantize(GPT(GPTConfig(**SMALL)), "int8", say=lambda line: None),
}
SIZES = ("vocab_size", "block_size", "n_layer", "n_embd", "n_hidden", "mlp_hidden", "window")


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made inside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.bytes = max(self.bytes, made.nbytes)
        return made


def refused(load, match: str = "") -> None:
    largest = Largest()
    with largest, pytest.raises(ValueError, match=match) as error:
        load()
    assert largest.bytes < ENOUGH and "\n" not in str(error.value)


def cases() -> list[tuple[str, str]]:
    found = []
    for name, make in OURS.items():
        config = asdict(make().config)
        found += [
            (name, size) for size in SIZES if size in config and not (size == "window" and name != "MLP")
        ]
    return found


@pytest.mark.parametrize(("name", "size"), cases())
def test_a_checkpoint_with_a_huge_size_is_refused_before_memory_is_taken(name, size, tmp_path):
    save = save_quantized if name == "quantized" else checkpoint.save
    folder = save(OURS[name](), tmp_path / "m")
    largest = Largest()
    with largest:
        checkpoint.load(folder)
    assert 0 < largest.bytes < ENOUGH  # it notices, and a sound one stays below
    path = folder / "config.json"
    values = json.loads(path.read_text())
    sizes = {"n_layer": 2000, "block_size": 10**8 if name == "modern" else HUGE}
    values["config"][size] = sizes.get(size, HUGE)
    path.write_text(json.dumps(values))
    words = "are too few for 2000 layers" if size == "n_layer" else str(folder)
    refused(lambda: checkpoint.load(folder), match=words)


def test_sizes_that_are_those_of_no_tensor_are_refused(tmp_path):
    folder = checkpoint.save(OURS["GPT-2"](), tmp_path / "m")
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["config"]["vocab_size"] = 2**62
    path.write_text(json.dumps(values))
    refused(lambda: checkpoint.load(folder), match="config.json describes no model")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GPT-2", {"vocab_size": HUGE}),
        ("GPT-2", {"n_positions": HUGE}),
        ("GPT-2", {"n_inner": HUGE}),
        ("GPT-2", {"n_layer": 10**8}),
        ("Llama", {"vocab_size": HUGE}),
        ("Llama", {"max_position_embeddings": 10**8}),
        ("Llama", {"intermediate_size": HUGE}),
        ("Llama", {"num_hidden_layers": 10**8}),
        ("Llama", {"hidden_size": HUGE}),
    ],
    ids=repr,
)
def test_a_folder_with_a_huge_size_is_refused_before_memory_is_taken(name, changes, tmp_path):
    build(name).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    refused(lambda: from_hf(tmp_path), match=str(tmp_path))


@pytest.mark.parametrize(
    "setting", ["context_length", "block_count", "embedding_length", "feed_forward_length", "head_count"]
)
def test_a_gguf_file_with_a_huge_size_is_refused_before_memory_is_taken(setting, tmp_path):
    def huge(writer):
        getattr(writer, f"add_{setting}")(10**8)

    path = write_gguf(tmp_path / "m.gguf", llama(), change=huge, drop=[f"add_{setting}"])
    refused(lambda: from_gguf(path), match="m.gguf")


def test_a_long_context_that_is_meant_is_loaded(tmp_path):
    """As many positions as Llama 3.1 has, in a model of a thousandth of its weights."""
    long = GPT(GPTConfig.preset("mini", **SMALL | {"block_size": 131_072}))
    folder = checkpoint.save(long, tmp_path / "m")
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(checkpoint.load(folder).model(idx), long.eval()(idx))
