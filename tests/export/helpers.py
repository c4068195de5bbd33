"""Models, tokenizers and comparisons that the tests of exports share."""

from dataclasses import replace
from functools import cache

import torch

from shared.commandline import parse_args
from shared.export import __main__ as export
from shared.models.gpt import GPT, GPTConfig
from shared.sampling import generate
from shared.tokenizers import BPETokenizer, CharTokenizer
from shared.tokenizers.bpe import END_OF_TEXT
from shared.tokenizers.patterns import GPT2_PATTERN
from tests.helpers import shake, synthetic_text

TEXT = synthetic_text()
NEW = 64
SMALL = dict(vocab_size=320, block_size=128, n_layer=2, n_head=4, n_embd=64)
LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False)
CONFIGS = {
    "GPT-2": GPTConfig(**SMALL),
    "GPT-2 without biases, untied": GPTConfig(**SMALL, bias=False, tie_weights=False),
    "Llama with grouped queries": GPTConfig(**SMALL, **LLAMA, n_kv_head=2, rope_theta=777.0),
    "Qwen3, as in week 4's modern recipe": GPTConfig.preset("mini", **SMALL),
}


ONNX_ONLY = "squared ReLU, a window, one key head"
CONFIGS_ONNX = CONFIGS | {
    ONNX_ONLY: GPTConfig.preset("mini", **SMALL, mlp="relu2", window=7, n_kv_head=1, position="learned")
}
del CONFIGS_ONNX["GPT-2 without biases, untied"]


@cache
def bpe(
    pattern: str = GPT2_PATTERN, special: tuple[str, ...] = (END_OF_TEXT,), size: int = 310
) -> BPETokenizer:
    return BPETokenizer.train(TEXT, size, pattern, special)


CHARACTERS = CharTokenizer.train(TEXT + "\u00e9\u20ac\\\t\r'1")
TOKENIZERS = {
    "GPT-2 without biases, untied": bpe(special=(), size=320),
    "Llama with grouped queries": CHARACTERS,
}


@cache
def made(name: str) -> GPT:
    torch.manual_seed(0)
    return shake(GPT(CONFIGS[name])).eval()


def tokenizer_of(name: str):
    return TOKENIZERS.get(name, bpe())


def prompt(name: str) -> list[int]:
    return tokenizer_of(name).encode(TEXT)[:20]


def idx(batch: int = 2, time: int = 40) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, time), generator=torch.Generator().manual_seed(1))


@cache
def greedy(name: str) -> list[int]:
    """64 tokens by our GPT; the best is so far ahead of the second each time that rounding cannot decide."""
    model, ids = made(name), prompt(name)
    new = list(generate(model, ids, NEW, temperature=0))
    with torch.inference_mode():
        best = model(torch.tensor([ids + new]))[0, len(ids) - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4 and len(set(new)) > 10
    return new


@torch.inference_mode()
def same_logits(got, expected, tolerance: float = 1e-5) -> None:
    assert expected.std() > 0.3
    torch.testing.assert_close(torch.as_tensor(got), expected, atol=tolerance, rtol=tolerance)


def with_zeros(model: GPT) -> dict[str, torch.Tensor]:
    """The tensors of a GPT-2, biases of zero among them where it has none."""
    if model.config.norm == "rmsnorm":
        return model.state_dict()
    full = GPT(replace(model.config, bias=True)).state_dict()
    return {name: model.state_dict().get(name, torch.zeros_like(t)) for name, t in full.items()}


def run(*args: str) -> list[str]:
    said: list[str] = []
    export.main(parse_args(export.Settings, list(args)), said.append)
    return said
