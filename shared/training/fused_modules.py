"""Week 4. The modules of a GPT that compute with `fused.c` while they are trained: blocks of Llama's kind as
a whole; of others RMSNorm, attention with its norms and its rotation, and the MLP with a SiLU and a gate.

A model knows nothing of it: the functions here take the place of the modules' methods (`fusing.fuse`). What
`fused.c` cannot compute is left to the methods: dropout, a soft cap, a cache, other formats and devices,
evaluation, which needs no gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.attention import Cache, CausalSelfAttention, Rotation
from shared.models.gpt import MLP, Block
from shared.models.layers import Linear, RMSNorm
from shared.models.rotary import Rotary
from shared.training.fused import Heads, causal_attention, gated_silu, is_plain, rms_norm
from shared.training.fused_block import AttentionBranch, MLPBranch
from shared.training.fusing import fuse as fuse
from shared.training.fusing import register_fused


def can_compute(*tensors: Tensor | None) -> bool:
    """Whether `fused.c` is to compute with these: for a gradient, in fp32, on a CPU, and for no compiler."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return is_plain(tensors)


def norm_over(module: nn.Module | None, width: int) -> tuple[Tensor, float] | None:
    """Weight and eps of an RMSNorm over `width` channels as `fused.c` computes it; None for anything else."""
    if type(module) is not RMSNorm or module.eps is None or module.normalized_shape != (width,):
        return None
    return None if module.weight is None else (module.weight, module.eps)


def fused_norm(module: RMSNorm, x: Tensor) -> Tensor:
    """`RMSNorm.forward`."""
    norm = norm_over(module, x.size(-1))
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
        of_q, of_k = norm_over(module.q_norm, module.head_dim), norm_over(module.k_norm, module.head_dim)
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


def weights_of_branches(block: Block) -> tuple[list[Tensor], list[Tensor]] | None:
    """The linear layers' weights that `fused_block` computes with, attention's and the MLP's; None where a
    part of the block is something else, or somebody looks at what a part gives.
    """
    attn, mlp = block.attn, block.mlp
    if type(attn) is not CausalSelfAttention or type(mlp) is not MLP or mlp.activation is not F.silu:
        return None
    if block.attn_post_norm is not None or block.mlp_post_norm is not None or mlp.gate_proj is None:
        return None
    if (attn.q_norm is not None and not attn.norms_heads) or not isinstance(block.dropout, nn.Identity):
        return None
    linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if any(type(linear) is not Linear or linear.bias is not None for linear in linears):
        return None
    for part in block.modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return None
    weights: list[Tensor] = [linear.weight for linear in linears]
    return weights[:4], weights[4:]


def fused_block(block: Block, x: Tensor, rotate: Rotation | None, cache: Cache | None, layer: int) -> Tensor:
    """`Block.forward`."""
    attention_known = attention_as_heads(block.attn, rotate, cache)
    attn_norm, mlp_norm = norm_over(block.attn_norm, x.size(-1)), norm_over(block.mlp_norm, x.size(-1))
    weights = weights_of_branches(block)
    if attention_known is None or attn_norm is None or mlp_norm is None or weights is None:
        return Block.forward(block, x, rotate, cache, layer)
    heads, more = attention_known
    of_attn, of_mlp = weights
    if not can_compute(x, attn_norm[0], mlp_norm[0], *of_attn, *of_mlp, *more):
        return Block.forward(block, x, rotate, cache, layer)
    x = AttentionBranch.apply(heads, attn_norm[1], x, attn_norm[0], *of_attn, *more)
    return MLPBranch.apply(mlp_norm[1], x, mlp_norm[0], *of_mlp)


register_fused(Block, "forward", fused_block)
register_fused(RMSNorm, "forward", fused_norm, is_reason=True)
register_fused(MLP, "forward", fused_mlp)
register_fused(Rotary, "at", rotation_with_tables, is_reason=True)
register_fused(CausalSelfAttention, "forward", fused_attention)
