"""What is there to be seen of the code that the pictures draw: the shapes of a real forward pass, by hooks on
tiny models, and the names that objects really have.
"""

import copy
import math
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from shared.adapters.lora import LoRA, LoRAConfig, LoRALinear
from shared.adapters.packing import EncodedTalk, Packed, Rows, lay_out
from shared.alignment import loops
from shared.alignment.rewards import scalar_head
from shared.data.corpus import batches
from shared.evaluation import cross_entropy
from shared.models.attention import attention_maps
from shared.models.bigram import BigramConfig, BigramModel
from shared.models.gpt import GPT, GPTConfig
from shared.models.mlp import WindowMLP, WindowMLPConfig
from shared.quantization.packing import Int4Weight, NF4Weight
from shared.retrieval.documents import Document, Section, chunk_documents
from shared.retrieval.embedders import HiddenStates
from shared.retrieval.index import Index
from shared.serving.slots import SlotCache
from shared.tokenizers import CharTokenizer
from shared.training import BatchesTask, TrainConfig, Trainer
from shared.training.distributed import Processes
from shared.training.execution import Precision

SIZES = {
    **{"B": 2, "T": 5, "C": 12, "H": 3, "D": 4, "V": 13, "L": 7, "M": 9},
    **{"W": 10, "N": 11, "I": 192, "O": 20, "G": 64, "R": 6},
    **{"A": 14, "K": 8, "E": 18, "S": 15},
}
"""Each letter's, all different, so that none can stand in for another."""
Shapes = dict[str, tuple[int, ...]]


def evaluated(shape: str) -> tuple[int, ...]:
    """A shape as it is written in a picture, in numbers.

    >>> evaluated("[B, T, 4C]"), evaluated("[O, I/2]"), evaluated("[B, A−1]"), evaluated("[]")
    ((2, 5, 48), (20, 96), (2, 13), ())
    """
    assert shape[0] == "[" and shape[-1] == "]", shape
    return tuple(_size(part.strip()) for part in shape[1:-1].split(",") if part)


def _size(words: str) -> int:
    """Of letters and numbers that stand beside each other for a product, with one / or one − at most."""
    if "−" in words:
        first, second = words.split("−")
        return _size(first) - _size(second)
    if "/" in words:
        first, second = words.split("/")
        whole, rest = divmod(_size(first), _size(second))
        assert rest == 0, words
        return whole
    assert re.fullmatch(r"(\d+|[A-Z])+", words), words
    factors = re.findall(r"\d+|[A-Z]", words)
    return math.prod(int(factor) if factor.isdigit() else SIZES[factor] for factor in factors)


def tiny_gpt(**more: Any) -> GPT:
    """A GPT of these sizes, with GPT-2's parts."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=SIZES["V"], block_size=16, n_layer=SIZES["L"], n_head=SIZES["H"], n_embd=SIZES["C"]
    )
    return GPT(GPTConfig(**(settings | more)))


def watched(model: nn.Module, prefix: str, call: Callable[[], Any]) -> Shapes:
    """The shapes that enter and leave each module while `call` runs, and those of its parameters."""
    seen: Shapes = {f"{prefix}.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    hooks = []
    for name, module in model.named_modules():
        path = f"{prefix}.{name}" if name else prefix

        def note(module: nn.Module, args: Any, out: Any, path: str = path) -> None:
            if args and isinstance(args[0], Tensor):
                seen[f"{path}.in"] = tuple(args[0].shape)
            if isinstance(out, Tensor):
                seen[f"{path}.out"] = tuple(out.shape)

        hooks.append(module.register_forward_hook(note))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class Attended:
    """Stands in for PyTorch's attention, and notes what goes in and out."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.seen: Shapes = {}
        self.product = F.scaled_dot_product_attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out = self.product(q, k, v, **options)
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
            self.seen[f"{self.prefix}.{name}"] = tuple(tensor.shape)
        return out

    def during(self, call: Callable[[], Any]) -> Shapes:
        F.scaled_dot_product_attention = self  # type: ignore[assignment]
        try:
            call()
        finally:
            F.scaled_dot_product_attention = self.product
        return self.seen


def ids(time: int = SIZES["T"]) -> Tensor:
    """int64 [B, time]."""
    return torch.randint(SIZES["V"], (SIZES["B"], time), generator=torch.Generator().manual_seed(0))


def of_the_model() -> Shapes:
    """A forward pass of a GPT."""
    model = tiny_gpt()
    seen = watched(model, "gpt", lambda: model(ids()))
    seen |= {
        f"block.{name.removeprefix('gpt.blocks.0.')}": shape
        for name, shape in seen.items()
        if ".blocks.0." in name
    }
    return seen | Attended("attention").during(lambda: model(ids()))


def of_the_cache() -> Shapes:
    """The last of T tokens, read with the others in the cache."""
    model = tiny_gpt()
    cache = model.new_cache(SIZES["B"], SIZES["M"])
    model(ids()[:, :-1], cache)
    new: Shapes = {}
    attn = model.blocks[0].attn
    attn.register_forward_pre_hook(lambda module, args: new.update(x=tuple(args[0].shape)))
    update = cache.update

    def noted(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new.update(k_new=tuple(k.shape), v_new=tuple(v.shape))
        return update(layer, k, v)

    cache.update = noted
    seen = Attended("cached").during(lambda: model(ids()[:, -1:], cache))
    named = {
        "cached.k_all": seen["cached.k"],
        "cache.k": tuple(cache.k.shape),
        "cache.v": tuple(cache.v.shape),
    }
    return seen | named | {f"cached.{name}": shape for name, shape in new.items()}


@cache
def trainer() -> Trainer:
    """A Trainer of a GPT on one batch."""
    batch = (ids(), ids().roll(-1, 1))
    settings = TrainConfig(steps=1, batch_size=SIZES["B"], block_size=SIZES["T"])
    return Trainer(tiny_gpt(), BatchesTask([batch], [batch]), settings)


def of_the_loop() -> Shapes:
    """A step of a Trainer."""
    loop, seen = trainer(), {}
    loss = loop.task.loss

    def noted(call: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        seen.update({"loop.ids": batch[0].shape, "loop.targets": batch[1].shape})
        found = loss(call, *batch)
        seen["loop.loss"] = found.shape
        return found

    loop.task.loss = noted  # type: ignore[method-assign]
    seen["loop.logits"] = watched(loop.model, "model", loop.fit)["model.out"]
    return {name: tuple(shape) for name, shape in seen.items()}


def of_the_first_weeks() -> Shapes:
    """The bigram and the window."""
    bigram = BigramModel(BigramConfig(SIZES["V"]))
    window = WindowMLP(WindowMLPConfig(SIZES["V"], SIZES["W"], SIZES["C"], SIZES["N"]))
    seen = watched(bigram, "bigram", lambda: bigram(ids())) | watched(window, "window", lambda: window(ids()))
    return seen | {"bigram.row": tuple(bigram(ids())[0, 0].shape)}


def of_attention_weights() -> Shapes:
    """The weights themselves, which PyTorch's attention does not show."""
    [weights] = attention_maps(tiny_gpt(n_layer=1), ids())
    return {"attention.weights": tuple(weights.shape)}


def of_several_processes() -> Shapes:
    """A batch that two processes share, and what one of two keeps of a weight."""
    tokens = np.arange(100, dtype=np.uint16)
    both = 2 * SIZES["B"]
    seen = {"ddp.batch": next(batches(tokens, SIZES["T"], both, 0))[0].shape}
    for rank in (0, 1):
        seen[f"ddp.half{rank}"] = next(batches(tokens, SIZES["T"], both, 0, rank=rank, world_size=2))[0].shape
    model = tiny_gpt(n_layer=1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())  # the other one only seems to be
    try:
        call = Processes("fsdp").prepare(model)
        layer = model.blocks[0].attn.q_proj
        layer.register_forward_hook(lambda module, args, out: seen.update({"fsdp.used": module.weight.shape}))
        seen["fsdp.kept"] = layer.weight.to_local().shape
        call(ids()).sum().backward()
        seen["fsdp.gradient"] = layer.weight.grad.to_local().shape
    finally:
        dist.destroy_process_group()
    return {name: tuple(shape) for name, shape in seen.items()}


def of_few_bits() -> Shapes:
    """Packed weights, and adapters beside a layer."""
    weight = torch.randn(SIZES["O"], SIZES["I"], generator=torch.Generator().manual_seed(0))
    int4, nf4 = Int4Weight(weight, SIZES["G"]), NF4Weight(weight, SIZES["G"], double_quant=False)
    seen = {"int4.weight": weight.shape}
    for name, packed in (("int4", int4), ("nf4", nf4)):
        seen |= {f"{name}.{buffer}": tensor.shape for buffer, tensor in packed.named_buffers()}
    layer, adapter = adapted_layer()
    x = torch.randn(SIZES["B"], SIZES["T"], SIZES["I"])
    seen |= watched(layer, "lora", lambda: layer(x))
    seen |= {f"adapter.{name}": p.shape for name, p in adapter.named_parameters()}
    seen["lora.between"] = F.linear(x, adapter.lora_A).shape
    return {name: tuple(shape) for name, shape in seen.items()}


def adapted_layer() -> tuple[LoRALinear, LoRA]:
    """A linear layer with one adapter in use."""
    layer = LoRALinear(nn.Linear(SIZES["I"], SIZES["O"]))
    adapter = LoRA(layer.base, LoRAConfig(r=SIZES["R"]))
    layer.adapters["default"] = adapter
    layer.in_use = {"default": 1.0}
    return layer, adapter


def packed_rows() -> Rows:
    """B rows of T tokens, two texts in each."""
    first, second = EncodedTalk([1, 2, 3, 4], [False, True, True, True]), EncodedTalk([5, 6, 7], [True] * 3)
    return lay_out([[first, second]] * SIZES["B"])


def of_packed_rows() -> Shapes:
    """A batch of packed texts, and its mask."""
    rows = packed_rows()
    mask = Packed(rows.texts).mask(rows.ids.size(1), None)
    return {"rows.ids": tuple(rows.ids.shape), "rows.mask": tuple(mask.shape)}


def noted(seen: dict[str, Any], owner: Any, function: str, name: str, patch: pytest.MonkeyPatch) -> None:
    """Notes the first result of a function of `owner`, by name, whenever it is called."""
    call = getattr(owner, function)

    def watching(*args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        seen[name] = (result[0] if isinstance(result, tuple) else result).shape
        return result

    patch.setattr(owner, function, watching)


def ppo_loop() -> loops.PPO:
    """A loop of tiny models, which rewards long words."""
    policy = tiny_gpt(n_layer=1)
    settings = loops.PPOConfig(steps=1, max_new_tokens=SIZES["A"] - SIZES["T"], epochs=1)
    return loops.PPO(
        policy,
        scalar_head(policy),
        copy.deepcopy(policy),
        lambda step: ids(),
        lambda answers, mask: mask.sum(1).float(),
        config=settings,
    )


def dpo_loop() -> loops.DPO:
    """A loop of tiny models on one batch of pairs."""
    policy = tiny_gpt(n_layer=1)
    pairs = ids(SIZES["A"]).repeat(2, 1)
    mask = torch.ones_like(pairs, dtype=torch.bool)
    mask[:, : SIZES["T"]] = False
    return loops.DPO(policy, copy.deepcopy(policy), lambda step: (pairs, mask), loops.DPOConfig(steps=1))


def of_alignment() -> Shapes:
    """A step of PPO and one of DPO."""
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        loop = ppo_loop()
        noted(seen, loop, "score", "ppo.scores", patch)
        for function, name in (("draw_answers", "ids"), ("token_logprobs", "logp"), ("gae", "advantages")):
            noted(seen, loops, function, f"ppo.{name}", patch)
        with torch.no_grad():
            loop.value(loop.prompts(0))
        loop.update()
        dpo = dpo_loop()
        noted(seen, dpo, "preferences", "dpo.ids", patch)
        dpo_losses = loops.dpo_loss

        def losses(chosen: Tensor, *rest: Any, **options: Any) -> Any:
            seen["dpo.chosen"] = chosen.shape
            return dpo_losses(chosen, *rest, **options)

        patch.setattr(loops, "dpo_loss", losses)
        seen["dpo.logits"] = watched(dpo.policy, "dpo", dpo.update)["dpo.out"]
    return {name: tuple(shape) for name, shape in seen.items()}


def of_documents() -> Shapes:
    """An index that is filled, and one question to it."""
    text = "abcdefghijklmnopqrstuvwxyz .?"
    model = tiny_gpt(vocab_size=len(text), n_embd=SIZES["E"], block_size=64)
    embedder = HiddenStates(model, CharTokenizer(text), "tiny")
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        noted(seen, embedder, "embed", "rag.passages", patch)
        index = Index(embedder)
        section = Section("", "a b c.")
        documents = [Document(f"{i}.txt", "a b", (section,)) for i in range(SIZES["K"])]
        index.add(chunk_documents(documents))
        passages = seen["rag.passages"]
        noted(seen, embedder, "embed_questions", "rag.question", patch)
        index.search("b c?")
    return {"rag.passages": tuple(passages), "rag.question": tuple(seen["rag.question"])}


def of_slots() -> Shapes:
    """A step for all slots."""
    cache = SlotCache(tiny_gpt().config, SIZES["S"], SIZES["M"])
    return {"slots.positions": tuple(cache.rows(0, [3] * SIZES["S"]).positions(1).shape)}


@cache
def shapes() -> Shapes:
    """All that is known, by name."""
    parts = (
        *(of_the_first_weeks, of_attention_weights, of_the_model, of_the_cache, of_the_loop),
        *(of_several_processes, of_few_bits, of_packed_rows, of_alignment, of_documents, of_slots),
    )
    return {name: shape for part in parts for name, shape in part().items()}


class Products(TorchDispatchMode):
    """Notes the types of what is multiplied, after autocast has changed them."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.types = [tensor.dtype for tensor in args[-2:]]
        return func(*args, **(kwargs or {}))


@cache
def types() -> dict[str, str]:
    """The types in a step under autocast, by name."""
    model, seen = tiny_gpt(), {}
    block = model.blocks[0]
    watching = {"attn_norm": block.attn_norm, "q_proj": block.attn.q_proj, "attn": block.attn, "block": block}
    for name, module in watching.items():
        module.register_forward_hook(
            lambda module, args, out, name=name: seen.update({f"{name}.out": out.dtype})
        )
    optimizer = torch.optim.AdamW(model.parameters())
    with Precision(torch.bfloat16).autocast(torch.device("cpu")):
        logits = model(ids())
        loss = cross_entropy(logits, ids())
        with Products() as products:
            block.attn.q_proj(torch.randn(3, SIZES["C"]))
    loss.backward()
    optimizer.step()
    weight = block.attn.q_proj.weight
    seen |= {
        "logits": logits.dtype,
        "loss": loss.dtype,
        "gradient": weight.grad.dtype,
        "q_proj.weight": weight.dtype,
    }
    seen["step"] = optimizer.state[weight]["exp_avg"].dtype
    seen["product.in"], seen["product.weight"] = products.types
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return {f"autocast.{name}": short[dtype] for name, dtype in seen.items()}


@cache
def _objects() -> dict[str, object]:
    model = tiny_gpt()
    weight = torch.zeros(4, 64)
    layer, adapter = adapted_layer()
    return {
        "gpt": model,
        "block": model.blocks[0],
        "trainer": trainer(),
        "bigram": BigramModel(BigramConfig(5)),
        "window": WindowMLP(WindowMLPConfig(5)),
        "int4": Int4Weight(weight),
        "nf4": NF4Weight(weight),
        "lora": layer,
        "adapter": adapter,
        "rows": packed_rows(),
        "ppo": ppo_loop(),
        "dpo": dpo_loop(),
    }


def has(of: str) -> bool:
    """Whether the code has something of this name: an importable one, or a part of a tiny object."""
    first, _, rest = of.partition(".")
    if first in _objects():
        here: object = _objects()[first]
        for part in rest.split("."):
            if not (part.isdigit() or hasattr(here, part)):
                return False
            owner, here = here, here[int(part)] if part.isdigit() else getattr(here, part)  # type: ignore[index]
        return here is not None or not isinstance(owner, nn.Module)  # a switch may leave a module out
    owner_name, _, name = of.rpartition(".")
    found = pkgutil.resolve_name(owner_name)
    if hasattr(found, name) or name in getattr(found, "__dataclass_fields__", {}):
        return True
    return isinstance(found, type) and name in signature(found).parameters  # what a class is made of
