"""Week 6. How Hugging Face and GGUF store a GPT's tensors: what they are called, and how they lie.

Nothing here reads or writes a file: `shared.models.pretrained` does, and week 12's export uses the same
tables in the other direction. What the formats say about a model's settings is in `shared.models.families`.

>>> HF_GPT2.name("blocks.3.attn.q_proj.weight"), GGUF_LLAMA.name("blocks.3.attn.q_proj.weight")
('transformer.h.3.attn.c_attn.weight', 'blk.3.attn_q.weight')

Sources: the models of transformers; the GGUF specification in ggml's repository.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A format's name for each of our modules, and how its tensors differ from ours."""

    names: Mapping[str, str]
    """By our module's name; `{}` stands for the block's number. Where several of our modules have one name,
    that tensor is theirs, one after the other, in the order of these names.
    """
    conv1d: bool = False
    """The blocks' weights are [in, out]."""
    interleaved: bool = False
    """RoPE turns channels (2i, 2i + 1) together, where ours turns (i, i + head_dim / 2): the rows of queries
    and keys come in another order.
    """
    plus_one: bool = False
    """Norms have 1 + weight where ours have the weight."""

    def name(self, ours: str) -> str:
        """Their name of our parameter. Raises KeyError for one that the format does not have."""
        theirs = self.names[_pattern(ours)]
        block = re.search(r"\d+", ours)
        if block:
            theirs = theirs.format(block[0])
        return f"{theirs}.{ours.rpartition('.')[2]}"

    def groups(self, ours: Iterable[str]) -> dict[str, list[str]]:
        """Our parameters by their name."""
        groups: dict[str, list[str]] = {}
        for name in ours:
            groups.setdefault(self.name(name), []).append(name)
        order = list(self.names)
        for parts in groups.values():
            parts.sort(key=lambda name: order.index(_pattern(name)))
        return groups

    def theirs(self, ours: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
        """Our tensors under their names and in their form."""
        theirs = {}
        for name, parts in self.groups(ours).items():
            tensors = [self._reordered(part, ours[part], (2, head_dim // 2)) for part in parts]
            if self._is_counted_from_one(parts[0]):
                tensors = [tensor.float() + 1 for tensor in tensors]
            tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            theirs[name] = tensor.T if self._is_transposed(parts[0]) else tensor
        return theirs

    def ours(
        self,
        tensor: Tensor,
        shapes: Mapping[str, torch.Size],
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """One of their tensors as our parameters of these names and shapes, in memory of their own."""
        if self._is_transposed(next(iter(shapes))):
            tensor = tensor.T
        parts = tensor.split([shape[0] for shape in shapes.values()])
        ours = {}
        for (name, shape), part in zip(shapes.items(), parts):
            part = self._reordered(name, part, (head_dim // 2, 2))
            ours[name] = torch.empty(shape, dtype=dtype).copy_(part)
            if self._is_counted_from_one(name):
                ours[name] -= 1
        return ours

    def _is_counted_from_one(self, ours: str) -> bool:
        return self.plus_one and ours.endswith("norm.weight")

    def _is_transposed(self, ours: str) -> bool:
        return self.conv1d and ours.endswith("_proj.weight")

    def _reordered(self, name: str, tensor: Tensor, channels: tuple[int, int]) -> Tensor:
        """For RoPE, the rows of every head, seen as a matrix of `channels`, transposed."""
        if not self.interleaved or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return tensor
        return tensor.reshape(-1, *channels, tensor.size(-1)).transpose(1, 2).reshape(tensor.shape)


def _pattern(ours: str) -> str:
    """The module of a parameter of ours, with `{}` for the block's number."""
    return re.sub(r"\d+", "{}", ours.rpartition(".")[0])


def _names(outside: Mapping[str, str], block: str, inside: Mapping[str, str]) -> dict[str, str]:
    """Names of the modules outside of the blocks, and of those inside each block (called `block`.number)."""
    names = dict(outside)
    for ours, theirs in inside.items():
        names[f"blocks.{{}}.{ours}"] = f"{block}.{{}}.{theirs}"
    return names


HF_GPT2 = Layout(
    _names(
        {
            "token_embedding": "transformer.wte",
            "position_embedding": "transformer.wpe",
            "norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        "transformer.h",
        {
            "attn_norm": "ln_1",
            "attn.q_proj": "attn.c_attn",
            "attn.k_proj": "attn.c_attn",
            "attn.v_proj": "attn.c_attn",
            "attn.o_proj": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
    ),
    conv1d=True,
)
HF_LLAMA = Layout(
    _names(
        {"token_embedding": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
        "model.layers",
        {
            "attn_norm": "input_layernorm",
            "attn.q_proj": "self_attn.q_proj",
            "attn.k_proj": "self_attn.k_proj",
            "attn.v_proj": "self_attn.v_proj",
            "attn.o_proj": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "mlp.gate_proj": "mlp.gate_proj",
            "mlp.up_proj": "mlp.up_proj",
            "mlp.down_proj": "mlp.down_proj",
        },
    )
)
GGUF_GPT2 = Layout(
    _names(
        {
            "token_embedding": "token_embd",
            "position_embedding": "position_embd",
            "norm": "output_norm",
            "lm_head": "output",
        },
        "blk",
        {
            "attn_norm": "attn_norm",
            "attn.q_proj": "attn_qkv",
            "attn.k_proj": "attn_qkv",
            "attn.v_proj": "attn_qkv",
            "attn.o_proj": "attn_output",
            "mlp_norm": "ffn_norm",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    )
)
GGUF_LLAMA = Layout(
    _names(
        {"token_embedding": "token_embd", "norm": "output_norm", "lm_head": "output"},
        "blk",
        {
            "attn_norm": "attn_norm",
            "attn.q_proj": "attn_q",
            "attn.k_proj": "attn_k",
            "attn.v_proj": "attn_v",
            "attn.o_proj": "attn_output",
            "mlp_norm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
    interleaved=True,
)
# Qwen3 is a Llama with norms on queries and keys. In GGUF its RoPE turns the same channels as ours.
_HF_QK_NORMS = {
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
}
_GGUF_QK_NORMS = {
    "blocks.{}.attn.q_norm": "blk.{}.attn_q_norm",
    "blocks.{}.attn.k_norm": "blk.{}.attn_k_norm",
}
HF_QWEN3 = Layout({**HF_LLAMA.names, **_HF_QK_NORMS})
GGUF_QWEN3 = Layout({**GGUF_LLAMA.names, **_GGUF_QK_NORMS})
_HF_NORMS_AFTER = {
    "blocks.{}.attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
HF_OLMO2 = Layout({**HF_QWEN3.names, **_HF_NORMS_AFTER})
HF_GEMMA = Layout({**HF_OLMO2.names, "blocks.{}.mlp_norm": "model.layers.{}.pre_feedforward_layernorm"})
HF_PHI3 = Layout(
    {
        **HF_LLAMA.names,
        **{f"blocks.{{}}.attn.{part}_proj": "model.layers.{}.self_attn.qkv_proj" for part in "qkv"},
        **{f"blocks.{{}}.mlp.{part}_proj": "model.layers.{}.mlp.gate_up_proj" for part in ("gate", "up")},
    }
)
GGUF_QWEN2 = Layout(GGUF_LLAMA.names)
_GGUF_NORMS_AFTER = {
    "blocks.{}.attn_post_norm": "blk.{}.post_attention_norm",
    "blocks.{}.mlp_post_norm": "blk.{}.post_ffw_norm",
}
GGUF_OLMO2 = Layout({**GGUF_QWEN3.names, **_GGUF_NORMS_AFTER})
GGUF_GEMMA = Layout(GGUF_OLMO2.names, plus_one=True)
GGUF_PHI3 = Layout(
    {
        **GGUF_LLAMA.names,
        **{f"blocks.{{}}.attn.{part}_proj": "blk.{}.attn_qkv" for part in "qkv"},
        **{f"blocks.{{}}.mlp.{part}_proj": "blk.{}.ffn_up" for part in ("gate", "up")},
    }
)
