"""Week 4. The modules of a GPT that compute with `fused.c` while they are trained: blocks of GPT-2's and of
Llama's kind as a whole; of others RMSNorm, attention with its norms and its rotation, and the MLP with a SiLU
and a gate.

A model knows nothing of it: the functions here take the place of the modules' methods (`fusing.fuse`). What
`fused.c` cannot compute is left to the methods: dropout, a soft cap, a cache, other formats and devices,
evaluation, which needs no gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.attention import Cache, CausalSelfAttention, Rotation
from shared.models.gpt import ACTIVATIONS, MLP, Block
from shared.models.layers import Linear, RMSNorm
from shared.models.rotary import Rotary
from shared.training.fused import Maybe, Norm, gated_silu, is_plain, rms_norm
from shared.training.fused_attention import Heads, causal_attention
from shared.training.fused_block import AttentionBranch, GatedMLPBranch, GELUBranch
from shared.training.fusing import fuse as fuse
from shared.training.fusing import register_fused


def can_compute(*tensors: Tensor | None) -> bool:
    """Whether `fused.c` is to compute with these: for a gradient, in fp32, on a CPU, and for no compiler."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return is_plain(tensors)


def rms_norm_over(module: nn.Module | None, width: int) -> tuple[Tensor, float] | None:
    """Weight and eps of an RMSNorm over `width` channels as `fused.c` computes it; None for anything else."""
    if type(module) is not RMSNorm or module.eps is None or module.normalized_shape != (width,):
        return None
    return None if module.weight is None else (module.weight, module.eps)


def norm_over(module: nn.Module | None, width: int) -> tuple[Norm, Tensor, Maybe] | None:
    """The same of an RMSNorm or a LayerNorm, with the bias that the latter may have."""
    if type(module) is nn.LayerNorm:
        if module.normalized_shape != (width,) or module.weight is None:
            return None
        return Norm(module.eps, centered=True), module.weight, module.bias
    known = rms_norm_over(module, width)
    return None if known is None else (Norm(known[1]), known[0], None)


def fused_norm(module: RMSNorm, x: Tensor) -> Tensor:
    """`RMSNorm.forward`."""
    norm = rms_norm_over(module, x.size(-1))
    if norm is None or not can_compute(x, norm[0]):
        return RMSNorm.forward(module, x)
    return rms_norm(x, *norm)


def fused_mlp(module: MLP, x: Tensor) -> Tensor:
    """`MLP.forward`."""
    if module.gate_proj is None or module.activation is not F.silu:
        return MLP.forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not can_compute(gate, up):
        return module.down_proj(F.silu(gate) * up)
    return module.down_proj(gated_silu(gate, up))


class TableRotation:
    """A rotation whose tables can be read: cosines and sines [time, dim], as `Rotary` has them."""

    def __init__(self, cosines: Tensor, sines: Tensor, rotate: Rotation):
        self.cosines = cosines
        self.sines = sines
        self.rotate = rotate

    def __call__(self, x: Tensor) -> Tensor:
        """The same as a function of queries or keys."""
        return self.rotate(x)


def rotation_with_tables(module: Rotary, positions: Tensor | slice) -> Rotation:
    """`Rotary.at`; for the positions of a text, from its beginning, with their tables."""
    rotate = Rotary.at(module, positions)
    if not isinstance(positions, slice) or positions.stop > module.table_length:
        return rotate
    return TableRotation(module.cos[positions], module.sin[positions], rotate)


def attention_as_heads(
    module: CausalSelfAttention, rotate: Rotation | None, cache: Cache | None
) -> tuple[Heads, list[Tensor | None]] | None:
    """What `fused.causal_attention` takes beside queries, keys and values, to do all that this attention
    does. None where it cannot.
    """
    if cache is not None or module.softcap is not None or (module.training and module.dropout > 0):
        return None
    more: list[Tensor | None] = [None, None]
    eps = 0.0
    if module.norms_heads and module.q_norm is not None:
        of_q = rms_norm_over(module.q_norm, module.head_dim)
        of_k = rms_norm_over(module.k_norm, module.head_dim)
        if of_q is None or of_k is None or of_q[1] != of_k[1]:
            return None
        more, eps = [of_q[0], of_k[0]], of_q[1]
    if isinstance(rotate, TableRotation):
        more += [rotate.cosines, rotate.sines]
    elif rotate is None:
        more += [None, None]
    else:
        return None
    scale = module.head_dim**-0.5 if module.scale is None else module.scale
    return Heads(module.n_head, module.n_kv_head, module.head_dim, scale, module.window, eps), more


def fused_attention(
    module: CausalSelfAttention,
    x: Tensor,
    rotate: Rotation | None = None,
    cache: Cache | None = None,
    layer: int = 0,
) -> Tensor:
    """`CausalSelfAttention.forward`. Without norms and a rotation it is one operation in PyTorch already."""
    known = attention_as_heads(module, rotate, cache)
    if known is None or not can_compute(x):
        return CausalSelfAttention.forward(module, x, rotate, cache, layer)
    heads, more = known
    if all(tensor is None for tensor in more):
        return CausalSelfAttention.forward(module, x, rotate, cache, layer)
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    if not module.norms_heads and module.q_norm is not None and module.k_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if not can_compute(q, k, v, *more):  # an adapter may give another format
        return CausalSelfAttention.forward(module, x, rotate, cache, layer)
    return module.o_proj(causal_attention(heads, q, k, v, *more))


@dataclass(frozen=True)
class Branches:
    """What `fused.c` computes a block's branches from."""

    of_attention: list[Maybe]
    """Weight and bias of the norm and of each linear layer."""
    of_mlp: list[Maybe]
    attention_norm: Norm
    mlp_norm: Norm
    mlp: Callable[..., Tensor]
    """(norm, x, *of_mlp) -> x and what the MLP adds to it."""


def gelu_branch(norm: Norm, x: Tensor, *tensors: Maybe) -> Tensor:
    """x + down(gelu(up(norm(x))))."""
    return GELUBranch.apply(norm, False, x, *tensors)


def gelu_tanh_branch(norm: Norm, x: Tensor, *tensors: Maybe) -> Tensor:
    """The same with GPT-2's GELU."""
    return GELUBranch.apply(norm, True, x, *tensors)


def gated_branch(norm: Norm, x: Tensor, *tensors: Maybe) -> Tensor:
    """x + down(silu(gate(n)) · up(n)), n = norm(x)."""
    return GatedMLPBranch.apply(norm, x, *tensors)


def mlp_branch(mlp: nn.Module) -> tuple[Callable[..., Tensor], tuple[nn.Module, ...]] | None:
    """What computes this MLP's branch, and the linear layers that it takes, in order; None where nothing in C
    does.
    """
    if type(mlp) is not MLP:
        return None
    if mlp.gate_proj is not None:
        layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return (gated_branch, layers) if mlp.activation is F.silu else None
    if mlp.activation is ACTIVATIONS["gelu"]:
        return gelu_branch, (mlp.up_proj, mlp.down_proj)
    if mlp.activation is ACTIVATIONS["gelu_tanh"]:
        return gelu_tanh_branch, (mlp.up_proj, mlp.down_proj)
    return None


def branches_of(block: Block) -> Branches | None:
    """What the branches of this block are computed from; None where a part of it is something that is not in
    C, or somebody looks at what a part gives.
    """
    attn, known_mlp = block.attn, mlp_branch(block.mlp)
    if type(attn) is not CausalSelfAttention or known_mlp is None:
        return None
    if block.attn_post_norm is not None or block.mlp_post_norm is not None:
        return None
    if (attn.q_norm is not None and not attn.norms_heads) or not isinstance(block.dropout, nn.Identity):
        return None
    linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
    norms = (block.attn_norm, block.mlp_norm, attn.q_norm, attn.k_norm)
    if any(map(is_watched, (block, attn, block.mlp, block.dropout, *norms, *linears, *known_mlp[1]))):
        return None
    of_attention, of_mlp = weights_and_biases(linears), weights_and_biases(known_mlp[1])
    if of_attention is None or of_mlp is None:
        return None
    width = attn.q_proj.in_features
    attn_norm, mlp_norm = norm_over(block.attn_norm, width), norm_over(block.mlp_norm, width)
    if attn_norm is None or mlp_norm is None:
        return None
    return Branches(
        [*attn_norm[1:], *of_attention], [*mlp_norm[1:], *of_mlp], attn_norm[0], mlp_norm[0], known_mlp[0]
    )


def is_watched(part: nn.Module | None) -> bool:
    """Whether somebody looks at what goes into this part, or comes out of it."""
    if part is None:
        return False
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks)


def weights_and_biases(linears: tuple[nn.Module, ...]) -> list[Maybe] | None:
    """Of each of these in turn; None where one is no plain linear layer."""
    tensors: list[Maybe] = []
    for linear in linears:
        if type(linear) is not Linear:
            return None
        tensors += [linear.weight, linear.bias]
    return tensors


def fused_block(block: Block, x: Tensor, rotate: Rotation | None, cache: Cache | None, layer: int) -> Tensor:
    """`Block.forward`."""
    branches, attention_known = branches_of(block), attention_as_heads(block.attn, rotate, cache)
    if branches is None or attention_known is None:
        return Block.forward(block, x, rotate, cache, layer)
    heads, more = attention_known
    if not can_compute(x, *branches.of_attention, *branches.of_mlp, *more):
        return Block.forward(block, x, rotate, cache, layer)
    x = AttentionBranch.apply(heads, branches.attention_norm, x, *branches.of_attention, *more)
    return branches.mlp(branches.mlp_norm, x, *branches.of_mlp)


def in_any_case(module: nn.Module) -> bool:
    """A reason that does not depend on the module."""
    return True


def gains_as_a_whole(block: nn.Module) -> bool:
    """Whether `fused_block` computes this block, where there are gradients and nothing else is in the way."""
    return type(block) is Block and branches_of(block) is not None and block.attn.softcap is None


register_fused(Block, "forward", fused_block, is_reason=gains_as_a_whole)
register_fused(RMSNorm, "forward", fused_norm, is_reason=in_any_case)
register_fused(MLP, "forward", fused_mlp)
register_fused(Rotary, "at", rotation_with_tables, is_reason=in_any_case)
register_fused(CausalSelfAttention, "forward", fused_attention)
