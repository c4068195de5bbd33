"""Clean solutions of week 4's exercises, each with a word on why; `week.solution(name)` shows them."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.gpt import MLP, GPTConfig, make_norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The mean goes first: squares of what is left are small, so nothing cancels. keepdim keeps mean and
    variance as [batch, time, 1], in line with x.
    """
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def gated_mlp(x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """One branch decides, channel by channel, how much of the other passes: a product, where an ordinary MLP
    has only sums.
    """
    gate = F.silu(x @ gate_weight.T)  # [batch, time, hidden]
    return (gate * (x @ up_weight.T)) @ down_weight.T


def mlp_sublayer(x: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    """The normed x has a name of its own, so that x is still there for the sum."""
    h = F.layer_norm(x, (x.size(-1),))
    return x + F.gelu(h @ up_weight.T) @ down_weight.T


class Block(nn.Module):
    """Both halves have one form: x plus a part of the normed x. Which attention, which MLP and which norm are
    the business of whoever builds the model.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attn_norm = norm()
        self.attn = attn
        self.mlp_norm = norm()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def count_parameters(vocab_size: int, block_size: int, n_layer: int, n_embd: int) -> int:
    """12 n_embd² a block: four square matrices in the attention, and two of four times their size in the MLP.
    Biases and norms add 13 n_embd; the output layer adds nothing, since its weight is the embedding's.
    """
    block = 12 * n_embd**2 + 13 * n_embd
    return (vocab_size + block_size) * n_embd + n_layer * block + 2 * n_embd


@torch.no_grad()
def initialize(model: nn.Module, n_layer: int) -> None:
    """2 n_layer parts add to the stream, and the variances of independent parts add up: each is divided by
    2 n_layer, so the standard deviation by the root of it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            into_stream = name.endswith(("o_proj", "down_proj"))
            std = 0.02 / math.sqrt(2 * n_layer) if into_stream else 0.02
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """Angles first, [time, head_dim/2]; they line up with the last two dimensions of each half of x. Both new
    halves are made from the old ones.
    """
    head_dim = x.size(-1)
    frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    positions = torch.arange(start, start + x.size(2))
    angle = torch.outer(positions.float(), frequency)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The newest token may see all keys, so there is no mask. The longer keys and values are handed on."""
    keys = torch.cat([past_k, k], dim=2)
    values = torch.cat([past_v, v], dim=2)
    scores = q @ keys.transpose(-2, -1) / math.sqrt(q.size(-1))  # [batch, n_head, 1, past + 1]
    return scores.softmax(dim=-1) @ values, keys, values


class MiniGPT(nn.Module):
    """forward is embedding, blocks, norm, head. step does the same to one position: all that it needs of the
    others are their keys and values, which the cache has.
    """

    def __init__(
        self,
        config: GPTConfig,
        attention: Callable[..., nn.Module],
        block: Callable[..., nn.Module],
    ):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        norm = partial(make_norm, config)
        self.blocks = nn.ModuleList(
            block(attention(config.n_embd, config.n_head), MLP(config), norm) for _ in range(config.n_layer)
        )
        self.norm = norm()
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)  # [batch, time, n_embd]
        if self.config.position == "learned":
            x = x + self.position_embedding.weight[: idx.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        position = cache[0][0].size(2) if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[position]
        longer = []
        for number, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q, k, v = (
                projection(h).unflatten(-1, (self.config.n_head, -1)).transpose(1, 2)
                for projection in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
            )  # [batch, n_head, 1, head_dim] each
            past_k, past_v = cache[number] if cache else (k[:, :, :0], v[:, :, :0])
            out, keys, values = decode_step(q, k, v, past_k, past_v)
            x = x + block.attn.o_proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
            longer.append((keys, values))
        return self.lm_head(self.norm(x)), longer

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        cache: list = []
        for t in range(idx.size(1) + length - 1):
            logits, cache = self.step(idx[:, t : t + 1], cache)
            if t >= idx.size(1) - 1:
                idx = torch.cat([idx, logits.argmax(-1)], dim=1)
        return idx
