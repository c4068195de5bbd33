"""What the tests of week 6's formats share: small models (transformers' and ours), tokenizers, GGUF files."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.models.gpt import GPT, GPTConfig
from shared.models.pretrained import to_hf
from tests.helpers import shake, synthetic_text

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, BLOCK, TIME = 96, 48, 20
GPT2 = dict(
    vocab_size=VOCAB, n_positions=BLOCK, n_layer=2, n_head=4, n_embd=64, bos_token_id=None, eos_token_id=None
)
LLAMA = dict(
    vocab_size=VOCAB,
    max_position_embeddings=BLOCK,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    hidden_size=64,
    intermediate_size=96,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    bos_token_id=None,
    eos_token_id=None,
)


def gpt2(**changes) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**GPT2 | changes))


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA | changes))


QWEN3 = "Qwen3, which is a Llama with norms on queries and keys"
THEIRS = {
    "GPT-2": gpt2,
    "GPT-2 untied": lambda: gpt2(tie_word_embeddings=False),
    "GPT-2 with another width inside and the exact GELU": lambda: gpt2(
        n_inner=96, activation_function="gelu"
    ),
    "GPT-2 with squared ReLU": lambda: gpt2(activation_function="relu2"),
    "Llama": llama,
    "Llama with grouped queries, tied": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True),
    "Llama with one key head and biases": lambda: llama(
        num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    QWEN3: lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA | dict(head_dim=16))),
}
SMALL = dict(vocab_size=VOCAB, block_size=BLOCK, n_layer=2, n_head=4, n_embd=32)
SMALL_LLAMA = dict(SMALL, norm="rmsnorm", position="rope", mlp="swiglu", bias=False)
OURS = {
    "GPT-2": GPTConfig(**SMALL),
    "GPT-2 untied, with dropout": GPTConfig(
        **SMALL, tie_weights=False, mlp_hidden=64, dropout=0.1, zero_init=True
    ),
    "Llama": GPTConfig(**SMALL_LLAMA, tie_weights=False, n_kv_head=2, rope_theta=777.0),
    "Qwen3": GPTConfig.preset("mini", **SMALL, n_kv_head=1),
    "Llama tied": GPTConfig(**SMALL_LLAMA, norm_eps=1e-6, mlp_hidden=40),
}


def build(name: str):
    torch.manual_seed(0)
    return shake(THEIRS[name]())


def ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (2, TIME), generator=torch.Generator().manual_seed(seed))


def same_logits(ours: GPT, theirs, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected, got = theirs.eval()(ids()).logits, ours(ids())
    assert expected.std() > 0.3  # the comparison is worth something
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def edit(folder: Path, **changes) -> Path:
    """The folder with other settings in its config.json; "absent" takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def without(tensors, name):
    return {n: t for n, t in tensors.items() if n != name}


# Tokenizers

TOKENS = 350


def train_bpe(digits: bool = False, special=("<|end|>", "<|x|>")) -> tokenizers.Tokenizer:
    """A tokenizer of Hugging Face's, with GPT-2's rule for cutting text, or SmolLM2's (digits one by one)."""
    made = tokenizers.Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = level
    if digits:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    made.train_from_iterator([synthetic_text(), "12 123 1234 don't I'll we've"], trainer)
    return made


def model_with_tokens(folder: Path) -> Path:
    """A folder with a model of as many tokens as `train_bpe` makes."""
    return to_hf(GPT(replace(OURS["GPT-2"], vocab_size=TOKENS)), folder)


@cache
def llama_with_tokens() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return shake(llama(vocab_size=TOKENS))


# GGUF files


def pairs_side_by_side(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """GGUF's order of the rows of q and k: channel i, then i + head_dim / 2, of every head."""
    order = np.arange(len(weight)).reshape(-1, head_dim)
    order = np.stack([order[:, : head_dim // 2], order[:, head_dim // 2 :]], axis=-1).reshape(-1)
    return weight[order]


def gguf_tensors(theirs) -> dict[str, np.ndarray]:
    """A transformers model's tensors under GGUF's names."""
    is_llama = isinstance(theirs, LlamaForCausalLM)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.GPT2, 2)
    tensors = {}
    for name, t in theirs.state_dict().items():
        if name == "lm_head.weight" and theirs.config.tie_word_embeddings:
            continue
        if not is_llama and "c_" in name and t.dim() == 2:
            t = t.T
        array = t.contiguous().numpy()
        if is_llama and name.endswith(("q_proj.weight", "k_proj.weight")):
            array = pairs_side_by_side(array, theirs.config.head_dim)
        tensors[names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))] = array
    return tensors


def gguf_settings(theirs) -> dict[str, object]:
    """A transformers model's settings, by the method of gguf's writer that writes each."""
    c, is_llama = theirs.config, isinstance(theirs, LlamaForCausalLM)
    settings = {
        "add_block_count": c.num_hidden_layers,
        "add_context_length": c.max_position_embeddings,
        "add_embedding_length": c.hidden_size,
        "add_feed_forward_length": c.intermediate_size if is_llama else 4 * c.hidden_size,
        "add_head_count": c.num_attention_heads,
    }
    if not is_llama:
        return settings | {"add_layer_norm_eps": c.layer_norm_epsilon}
    return settings | {
        "add_head_count_kv": c.num_key_value_heads,
        "add_layer_norm_rms_eps": c.rms_norm_eps,
        "add_rope_dimension_count": c.head_dim,
        "add_rope_freq_base": c.rope_parameters["rope_theta"],
        "add_vocab_size": c.vocab_size,
    }


def gguf_tokenizer(theirs: tokenizers.Tokenizer, pre: str = "gpt-2") -> dict[str, object]:
    """What `write_gguf` must add for a tokenizer of Hugging Face's, by the writer's methods."""
    values = json.loads(theirs.to_str())
    by_id = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    special = {token["content"] for token in values["added_tokens"]}
    return {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": pre,
        "add_token_list": by_id,
        "add_token_types": [3 if token in special else 1 for token in by_id],
        "add_token_merges": [" ".join(merge) for merge in values["model"]["merges"]],
    }


def write_gguf(
    path: Path,
    theirs,
    kind: Kind = Kind.F32,
    *,
    change=None,
    drop=(),
    tokenizer=None,
    tensors=None,
    endian=gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file with gguf's own writer.

    change: called with the writer before it writes. drop: settings to leave out. tensors: None for the
    model's own.
    """
    arch = "llama" if isinstance(theirs, LlamaForCausalLM) else "gpt2"
    writer = GGUFWriter(path, arch, endianess=endian)
    values = gguf_settings(theirs) | (tokenizer or {})
    for method, value in values.items():
        if method not in drop:
            getattr(writer, method)(value)
    if change:
        change(writer)
    for name, array in (tensors or gguf_tensors(theirs)).items():
        if array.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
