"""The tables of docs/models.md: which tests each family goes through, as pytest collects them, and what known
models weigh in each form.

    python -m tests.models_page
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from shared.checkpoint import FORMS, unshared
from shared.models.config import GPTConfig
from shared.models.families import config_from_hf
from shared.models.gpt import GPT
from shared.quantization.modules import ENTRY
from shared.registry import without_memory
from shared.runtime import ROOT, write_atomically

PAGE = ROOT / "docs" / "models.md"
FILES = ("tests/models/test_families.py", "tests/export/test_families.py", "tests/test_families.py")
FAMILIES = {
    "GPT-2": "GPT-2",
    "Llama": "Llama 1 to 3, SmolLM2",
    "Mistral": "Mistral",
    "Qwen2": "Qwen2, Qwen2.5",
    "Qwen3": "Qwen3",
    "SmolLM3": "SmolLM3",
    "OLMo 2": "OLMo 2",
    "Phi-": "Phi-3, Phi-4 mini",
    "Gemma 2": "Gemma 2",
    "Gemma 3": "Gemma 3, text",
}
"""What the name of a tested model begins with, and the family's."""
COLUMNS = {
    "logits": "test_its_logits_are_transformers",
    "gradients": "test_its_gradients_are_transformers",
    "cache in pieces": "test_read_in_pieces_it_says_what_it_says_of_the_whole",
    "Hugging Face and back": "test_it_goes_to_hugging_face_and_back",
    "adapter in PEFT": "test_its_adapter_is_loaded_by_peft",
    "batch of lengths": "test_rows_of_different_lengths_are_what_each_is_alone",
    "served": "test_served_beside_others_it_writes_what_it_writes_alone",
    "8 bits": "test_packed_in_8_bits_it_computes_with_the_weights_that_these_stand_for",
    "adapter merged": "test_a_merged_adapter_computes_what_it_computes_beside_the_weights",
    "checkpoint": "test_saved_and_loaded_it_is_the_same",
    "GGUF and back": "test_it_is_read_again_as_it_was_written",
    "llama.cpp": "test_llama_cpp_writes_the_same_64_tokens",
}


def collected() -> Iterator[tuple[str, str]]:
    """The tests of the families as pytest finds them: the function's name, and the model's."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-n", "0", "-p", "no:nbval", *FILES]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    for line in found.stdout.splitlines():
        if match := re.fullmatch(r".*::(\w+)\[(.+)\]", line):
            yield match.group(1), match.group(2)


def matrix(tests: Iterable[tuple[str, str]]) -> str:
    """A row a family, a column a kind of test: how many models of the family go through it."""
    counts: Counter[tuple[str, str]] = Counter()
    for test, parameters in dict.fromkeys((test, re.sub(r"-(1|7|13)$", "", name)) for test, name in tests):
        for begins, family in FAMILIES.items():
            if parameters.startswith(begins):
                counts[family, test] += 1
    rows = [["family", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for family in FAMILIES.values():
        rows.append([family, *(str(counts[family, test] or "–") for test in COLUMNS.values())])
    return _lines(rows)


def _llama(**values: Any) -> dict[str, Any]:
    return {"model_type": "llama", "tie_word_embeddings": True, **values}


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


def _sizes(*values: int) -> dict[str, Any]:
    return {**dict(zip(SIZES, values, strict=True)), "max_position_embeddings": 1024, "rms_norm_eps": 1e-5}


QWEN = {"tie_word_embeddings": True, "use_sliding_window": False}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "head_dim": 256}
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (_llama(**_sizes(30, 576, 9, 3, 1536, 49152)), 134_515_008),
    "Gemma 3 270M": (
        {"model_type": "gemma3_text", **GEMMA, **_sizes(18, 640, 4, 1, 2048, 262144)},
        268_098_176,
    ),
    "SmolLM2-360M": (_llama(**_sizes(32, 960, 15, 5, 2560, 49152)), 361_821_120),
    "Qwen2.5-0.5B": ({"model_type": "qwen2", **QWEN, **_sizes(24, 896, 14, 2, 4864, 151936)}, 494_032_768),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", **QWEN, "head_dim": 128, **_sizes(28, 1024, 16, 8, 3072, 151936)},
        596_049_920,
    ),
    "Gemma 3 1B": (
        {"model_type": "gemma3_text", **GEMMA, **_sizes(26, 1152, 4, 1, 6912, 262144)},
        999_885_952,
    ),
    "Llama 3.2 1B": (_llama(**_sizes(16, 2048, 32, 8, 8192, 128256)), 1_235_814_400),
    "OLMo 2 1B": (
        {"model_type": "olmo2", "tie_word_embeddings": False, **_sizes(16, 2048, 16, 16, 8192, 100352)},
        1_484_916_736,
    ),
    "SmolLM2-1.7B": (_llama(**_sizes(24, 2048, 32, 32, 8192, 49152)), 1_711_376_384),
    "Gemma 2 2B": ({"model_type": "gemma2", **GEMMA, **_sizes(26, 2304, 8, 4, 9216, 256000)}, 2_614_341_888),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "tie_word_embeddings": True, **_sizes(36, 2048, 16, 4, 11008, 128256)},
        3_075_098_624,
    ),
    "Phi-4 mini": (
        {"model_type": "phi3", "tie_word_embeddings": True, **_sizes(32, 3072, 24, 8, 8192, 200064)},
        3_836_021_760,
    ),
    "Mistral 7B": (
        {"model_type": "mistral", "tie_word_embeddings": False, **_sizes(32, 4096, 32, 8, 14336, 32000)},
        7_241_732_096,
    ),
    "Llama 3.1 8B": (
        _llama(**_sizes(32, 4096, 32, 8, 14336, 128256) | {"tie_word_embeddings": False}),
        8_030_261_248,
    ),
}
"""Sizes that the models' files on the Hugging Face hub give, and how many parameters they hold there."""


def config_of(name: str) -> GPTConfig:
    values, _ = KNOWN[name]
    return config_from_hf(values, name)[0]


def gigabytes(config: GPTConfig, scheme: str | None) -> float:
    """What the weights take: all in bf16 (None), or packed, what is not packed (norms, for one) in bf16."""
    with without_memory():
        model = GPT(config).to(torch.bfloat16)
        if scheme is not None:
            model = FORMS[ENTRY](model, {"scheme": scheme})
    return sum(tensor.numel() * tensor.element_size() for tensor in unshared(model).values()) / 1e9


def sizes() -> str:
    rows = [
        ["model", "parameters", "bf16 (GB)", "int8 (GB)", "int4 (GB)", "cache of 1,000 tokens, bf16 (MB)"],
        ["---", *["---:"] * 5],
    ]
    for name, (_, parameters) in KNOWN.items():
        config = config_of(name)
        weights = [f"{gigabytes(config, scheme):.2f}" for scheme in (None, "int8", "int4")]
        cache = 2 * 2 * 1000 * config.n_layer * (config.n_kv_head or config.n_head) * config.head_dim / 1e6
        rows.append([name, f"{parameters / 1e6:,.0f} M", *weights, f"{cache:,.0f}"])
    return _lines(rows)


def _lines(rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def filled(page: str) -> str:
    """The page with its tables as they are now."""
    for name, text in (("matrix", matrix(collected())), ("sizes", sizes())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    write_atomically(PAGE, filled(PAGE.read_text(encoding="utf-8")))
