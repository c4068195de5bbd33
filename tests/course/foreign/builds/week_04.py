"""Answers to the build exercises of week 4, written by people who did not write its grader."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models.gpt import MLP, make_norm
from tests.course.foreign.register import right, wrong

if TYPE_CHECKING:
    from shared.models.gpt import GPTConfig


@wrong("the MLP reads the stream as it was before attention (a parallel block)")
class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attn_norm = norm()
        self.attn = attn
        self.mlp_norm = norm()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.attn_norm(x)) + self.mlp(self.mlp_norm(x))


@wrong("adds to the normed stream instead of the stream itself")
class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attn_norm = norm()
        self.attn = attn
        self.mlp_norm = norm()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn_norm(x)
        x = x + self.attn(x)
        x = self.mlp_norm(x)
        x = x + self.mlp(x)
        return x


@wrong("calls norm once and uses the one module as both norms")
class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.attn_norm = self.mlp_norm = norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@wrong("adds in place, which overwrites the caller's tensor and breaks the backward pass")
class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attn_norm = norm()
        self.attn = attn
        self.mlp_norm = norm()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.attn_norm(x))
        x += self.mlp(self.mlp_norm(x))
        return x


@wrong("keeps deep copies of attn and mlp instead of the modules it was handed")
class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.attn_norm = norm()
        self.attn = copy.deepcopy(attn)
        self.mlp_norm = norm()
        self.mlp = copy.deepcopy(mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


@right
class Block(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        for name, layer in {"attn": attn, "mlp": mlp}.items():
            self.add_module(f"{name}_norm", norm())
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.children())
        for norm, layer in zip(layers[::2], layers[1::2], strict=True):
            x = torch.add(layer(norm(x)), x)
        return x


@wrong("scales every layer with proj in its name, q_proj, k_proj, v_proj and up_proj too")
def initialize(model: nn.Module, n_layer: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 0.02
            if "proj" in name:
                std /= math.sqrt(2 * n_layer)
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


@wrong("resets LayerNorm only and leaves RMSNorm as it was")
def initialize(model: nn.Module, n_layer: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for pn, p in model.named_parameters():
        if pn.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))


@wrong("puts new Parameters in place of the old ones, which unties shared weights and loses the optimizer's")
def initialize(model: nn.Module, n_layer: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 0.02
            if name.endswith(("o_proj", "down_proj")):
                std = 0.02 / math.sqrt(2 * n_layer)
            module.weight = nn.Parameter(torch.randn_like(module.weight) * std)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.weight = nn.Parameter(torch.ones_like(module.weight))
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(torch.zeros_like(module.bias))


@wrong("sets the global seed itself")
def initialize(model: nn.Module, n_layer: int) -> None:
    torch.manual_seed(1337)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                p.normal_(0.0, 0.02 / math.sqrt(2 * n_layer))
            else:
                p.normal_(0.0, 0.02)


@wrong("scales the residual projections by the root of n_layer, not of 2 n_layer")
def initialize(model: nn.Module, n_layer: int) -> None:
    def init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    model.apply(init_weights)
    for name, p in model.named_parameters():
        if name.endswith("o_proj.weight") or name.endswith("down_proj.weight"):
            nn.init.normal_(p, std=0.02 * n_layer**-0.5)


@right
def initialize(model: nn.Module, n_layer: int) -> None:
    small = 0.02 * (2 * n_layer) ** -0.5
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "bias":
            fresh = torch.zeros_like(parameter)
        elif parameter.ndim == 1:
            fresh = torch.ones_like(parameter)
        else:
            fresh = torch.randn_like(parameter) * (small if layer.endswith(("o_proj", "down_proj")) else 0.02)
        parameter.data.copy_(fresh)


@wrong("ties the head by sharing .data, which leaves two separate parameters with gradients of their own")
class MiniGPT(nn.Module):
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
        self.blocks = nn.ModuleList(
            [
                block(attention(config.n_embd, config.n_head), MLP(config), lambda: make_norm(config))
                for _ in range(config.n_layer)
            ]
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight.data = self.token_embedding.weight.data

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        batch = idx.shape[0]
        n_head = self.config.n_head
        past = cache[0][0].shape[2] if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past]
        new_cache = []
        for i, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q = block.attn.q_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            k = block.attn.k_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            v = block.attn.v_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            if cache:
                k = torch.cat([cache[i][0], k], dim=2)
                v = torch.cat([cache[i][1], v], dim=2)
            new_cache.append((k, v))
            weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(batch, 1, -1)
            x = x + block.attn.o_proj(y)
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.norm(x)), new_cache

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        if length == 0:
            return idx
        cache = []
        for t in range(idx.shape[1]):
            logits, cache = self.step(idx[:, t : t + 1], cache)
        for i in range(length):
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
            if i < length - 1:
                logits, cache = self.step(token, cache)
        return idx


@wrong("step replaces the entries of the list it was given, so the caller's cache changes")
class MiniGPT(nn.Module):
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
        self.blocks = nn.ModuleList(
            [
                block(attention(config.n_embd, config.n_head), MLP(config), lambda: make_norm(config))
                for _ in range(config.n_layer)
            ]
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        batch = idx.shape[0]
        n_head = self.config.n_head
        past = cache[0][0].shape[2] if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past]
        while len(cache) < len(self.blocks):
            cache.append(None)
        for i, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q = block.attn.q_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            k = block.attn.k_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            v = block.attn.v_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            if cache[i] is not None:
                k = torch.cat([cache[i][0], k], dim=2)
                v = torch.cat([cache[i][1], v], dim=2)
            cache[i] = (k, v)
            weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(batch, 1, -1)
            x = x + block.attn.o_proj(y)
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.norm(x)), cache

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        if length == 0:
            return idx
        cache = []
        for t in range(idx.shape[1]):
            logits, cache = self.step(idx[:, t : t + 1], cache)
        for i in range(length):
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
            if i < length - 1:
                logits, cache = self.step(token, cache)
        return idx


@wrong(
    "generate reads the last given token twice, so its key is in the cache twice and positions are off by one"
)
class MiniGPT(nn.Module):
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
        self.blocks = nn.ModuleList(
            [
                block(attention(config.n_embd, config.n_head), MLP(config), lambda: make_norm(config))
                for _ in range(config.n_layer)
            ]
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        batch = idx.shape[0]
        n_head = self.config.n_head
        past = cache[0][0].shape[2] if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past]
        new_cache = []
        for i, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q = block.attn.q_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            k = block.attn.k_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            v = block.attn.v_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            if cache:
                k = torch.cat([cache[i][0], k], dim=2)
                v = torch.cat([cache[i][1], v], dim=2)
            new_cache.append((k, v))
            weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(batch, 1, -1)
            x = x + block.attn.o_proj(y)
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.norm(x)), new_cache

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        if length == 0:
            return idx
        cache = []
        for t in range(idx.shape[1]):
            _, cache = self.step(idx[:, t : t + 1], cache)
        for _ in range(length):
            logits, cache = self.step(idx[:, -1:], cache)
            next_token = torch.argmax(logits[:, -1, :], dim=-1, keepdim=True)
            idx = torch.cat((idx, next_token), dim=1)
        return idx


@wrong("makes one attention layer and hands it to every block, so all blocks share its weights")
class MiniGPT(nn.Module):
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
        attn = attention(config.n_embd, config.n_head)
        self.blocks = nn.ModuleList()
        for _ in range(config.n_layer):
            self.blocks.append(block(attn, MLP(config), lambda: make_norm(config)))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        batch = idx.shape[0]
        n_head = self.config.n_head
        past = cache[0][0].shape[2] if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past]
        new_cache = []
        for i, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q = block.attn.q_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            k = block.attn.k_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            v = block.attn.v_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            if cache:
                k = torch.cat([cache[i][0], k], dim=2)
                v = torch.cat([cache[i][1], v], dim=2)
            new_cache.append((k, v))
            weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(batch, 1, -1)
            x = x + block.attn.o_proj(y)
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.norm(x)), new_cache

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        if length == 0:
            return idx
        cache = []
        for t in range(idx.shape[1]):
            logits, cache = self.step(idx[:, t : t + 1], cache)
        for i in range(length):
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
            if i < length - 1:
                logits, cache = self.step(token, cache)
        return idx


@wrong("generate runs the whole text through forward for each new token and never uses the cache")
class MiniGPT(nn.Module):
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
        self.blocks = nn.ModuleList(
            [
                block(attention(config.n_embd, config.n_head), MLP(config), lambda: make_norm(config))
                for _ in range(config.n_layer)
            ]
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        batch = idx.shape[0]
        n_head = self.config.n_head
        past = cache[0][0].shape[2] if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past]
        new_cache = []
        for i, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q = block.attn.q_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            k = block.attn.k_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            v = block.attn.v_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            if cache:
                k = torch.cat([cache[i][0], k], dim=2)
                v = torch.cat([cache[i][1], v], dim=2)
            new_cache.append((k, v))
            weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(batch, 1, -1)
            x = x + block.attn.o_proj(y)
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.norm(x)), new_cache

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        for _ in range(length):
            logits = self(idx[:, -self.config.block_size :])
            idx = torch.cat([idx, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
        return idx


@wrong("step leaves out the final norm before lm_head")
class MiniGPT(nn.Module):
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
        self.blocks = nn.ModuleList(
            [
                block(attention(config.n_embd, config.n_head), MLP(config), lambda: make_norm(config))
                for _ in range(config.n_layer)
            ]
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        batch = idx.shape[0]
        n_head = self.config.n_head
        past = cache[0][0].shape[2] if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past]
        new_cache = []
        for i, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q = block.attn.q_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            k = block.attn.k_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            v = block.attn.v_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            if cache:
                k = torch.cat([cache[i][0], k], dim=2)
                v = torch.cat([cache[i][1], v], dim=2)
            new_cache.append((k, v))
            weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(batch, 1, -1)
            x = x + block.attn.o_proj(y)
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(x), new_cache

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        if length == 0:
            return idx
        cache = []
        for t in range(idx.shape[1]):
            logits, cache = self.step(idx[:, t : t + 1], cache)
        for i in range(length):
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
            if i < length - 1:
                logits, cache = self.step(token, cache)
        return idx


@wrong("has a learned position embedding even where config.position is rope")
class MiniGPT(nn.Module):
    def __init__(
        self,
        config: GPTConfig,
        attention: Callable[..., nn.Module],
        block: Callable[..., nn.Module],
    ):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(
            [
                block(attention(config.n_embd, config.n_head), MLP(config), lambda: make_norm(config))
                for _ in range(config.n_layer)
            ]
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.token_embedding.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        batch = idx.shape[0]
        n_head = self.config.n_head
        past = cache[0][0].shape[2] if cache else 0
        x = self.token_embedding(idx) + self.position_embedding.weight[past]
        new_cache = []
        for i, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            q = block.attn.q_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            k = block.attn.k_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            v = block.attn.v_proj(h).view(batch, 1, n_head, -1).transpose(1, 2)
            if cache:
                k = torch.cat([cache[i][0], k], dim=2)
                v = torch.cat([cache[i][1], v], dim=2)
            new_cache.append((k, v))
            weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
            y = (weights @ v).transpose(1, 2).reshape(batch, 1, -1)
            x = x + block.attn.o_proj(y)
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.norm(x)), new_cache

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        if length == 0:
            return idx
        cache = []
        for t in range(idx.shape[1]):
            logits, cache = self.step(idx[:, t : t + 1], cache)
        for i in range(length):
            token = logits[:, -1].argmax(dim=-1, keepdim=True)
            idx = torch.cat([idx, token], dim=1)
            if i < length - 1:
                logits, cache = self.step(token, cache)
        return idx


@right
class MiniGPT(nn.Module):
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
        self.blocks = nn.ModuleList(
            [
                block(attention(config.n_embd, config.n_head), MLP(config), lambda: make_norm(config))
                for _ in range(config.n_layer)
            ]
        )
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            del self.lm_head.weight
            self.lm_head.register_parameter("weight", self.token_embedding.weight)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding(idx)
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def read(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        past = cache[0][0].shape[2] if cache else 0
        places = torch.arange(past, past + idx.shape[1], device=idx.device)
        hidden = torch.arange(past + idx.shape[1], device=idx.device) > places[:, None]
        x = self.token_embedding(idx) + self.position_embedding(places)
        longer = []
        for number, block in enumerate(self.blocks):
            h = block.attn_norm(x)
            attn = block.attn
            q, k, v = (
                projection(h).unflatten(2, (self.config.n_head, -1)).transpose(1, 2)
                for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            if cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[number], (k, v), strict=True))
            longer.append((k, v))
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
            x = x + attn.o_proj(torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        return self.lm_head(self.norm(x)), longer

    def step(self, idx: Tensor, cache: list) -> tuple[Tensor, list]:
        return self.read(idx, cache)

    @torch.no_grad()
    def generate(self, idx: Tensor, length: int) -> Tensor:
        new, cache, tokens = idx, [], [idx]
        for _ in range(length):
            logits, cache = self.read(new, cache)
            new = logits[:, -1:].argmax(dim=-1)
            tokens.append(new)
        return torch.cat(tokens, dim=1)
