"""What the tests of shared/adapters have in common: tiny random models, ours and Hugging Face's."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.adapters import LoRAConfig, add_lora
from shared.adapters.peft_files import CONFIG, WEIGHTS
from shared.models.gpt import GPT, GPTConfig
from tests.helpers import shake

Module = TypeVar("Module", bound=nn.Module)

GPT2 = GPTConfig(vocab_size=53, block_size=24, n_layer=2, n_head=4, n_embd=32)
LLAMA = replace(
    GPT2,
    norm="rmsnorm",
    position="rope",
    mlp="swiglu",
    mlp_hidden=64,
    n_kv_head=2,
    bias=False,
    tie_weights=False,
)
OTHER = replace(LLAMA, mlp="relu2", window=16, zero_init=True)  # has no equivalent at Hugging Face
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "other": OTHER}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ALL = ("all-linear",)


# ---- our models


def gpt(config: GPTConfig = LLAMA, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return shake(GPT(config), seed).eval()


def learn(model: Module, seed: int = 1) -> Module:
    """As if what is trainable had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def lora_config(**changes) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, **changes})


def adapted(config: GPTConfig = LLAMA, name: str = "default", seed: int = 1, **lora) -> GPT:
    """A model with one adapter, as trained."""
    return learn(add_lora(gpt(config), lora_config(**lora), name), seed)


def three(**lora) -> GPT:
    """A model with adapters a, b and c of ranks 4, 2 and 4."""
    model = gpt()
    for seed, (name, r) in enumerate({"a": 4, "b": 2, "c": 4}.items(), 1):
        learn(add_lora(model, lora_config(r=r, **lora), name), seed)
    return model


def change(model: nn.Module, layer_name: str = "blocks.1.mlp.down_proj") -> Tensor:
    """What the adapters in use add to this layer's weight."""
    layer = model.get_submodule(layer_name)
    return (layer.weight - layer.base.weight).detach()


# ---- PEFT's

TARGETS = {
    "gpt2": {
        "qkv": ["c_attn"],
        "attention": ["c_attn", "attn.c_proj"],
        "all": ["c_attn", "c_proj", "c_fc"],
    },
    "llama": {
        "qkv": ["q_proj", "v_proj"],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "all": "all-linear",
    },
}


def hf(family: str) -> nn.Module:
    """A tiny model of Hugging Face's, as large as `GPT2` or `LLAMA`."""
    torch.manual_seed(3)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=53,
            n_positions=24,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
        return shake(GPT2LMHeadModel(config)).eval()
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=0,
    )
    return shake(LlamaForCausalLM(config)).eval()


def peft_model(family: str, kind: str, targets: str = "all", **more) -> peft.PeftModel:
    """PEFT's adapter on `hf(family)`, as trained."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS[family][targets],
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
        **KINDS[kind],
        **more,
    )
    torch.manual_seed(4)
    return learn(peft.get_peft_model(hf(family), config).eval())


def load_strictly(base: nn.Module, folder: Path) -> peft.PeftModel:
    """PEFT's own loading; it warns of keys that are missing or left over, and here that is an error."""
    theirs = peft.PeftModel.from_pretrained(deepcopy(base), folder)
    result = theirs.load_adapter(folder, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key and ".again" in key]
    return theirs.eval()


# ---- comparing and damaging


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def base_bits(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that belong to no adapter, under the names they had before."""
    tensors = bits(model)
    own = [name for name in tensors if ".adapters." not in name and ".merged." not in name]
    return {name.replace(".base.", "."): tensors[name] for name in own}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def rewrite(folder: Path, config: Mapping = MappingProxyType({}), tensors=lambda t: t, metadata=None) -> None:
    """Changes an adapter's files: settings of `config`, the tensors by a function, the whole header."""
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**settings, **config}))
    save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata)


def without_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(list(tensors.items())[1:])
